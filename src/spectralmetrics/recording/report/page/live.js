// While the run is open the page reloads by itself, and keeps its sliders and its place.

const KEPT = `spectralmetrics ${location.pathname}`;
const RETRY = 500; // milliseconds
const PAUSE = 3000;

// Names, not places: after the next record a layer, an epoch or a threshold may be elsewhere in its list.
function kept() {
  return {
    statistic: current.statistic,
    quantity: current.quantity,
    stage: page.stages[current.stage],
    layer: page.layers[current.layer],
    epoch: current.epoch === page.epochs.length - 1 ? undefined : page.epochs[current.epoch], // or the newest
    threshold: page.thresholds[current.threshold],
    runs: page.runs.map((run, index) => [run.name, current.runs[index]]),
    sorting,
    theme: document.documentElement.dataset.theme,
    focus: document.activeElement?.id,
    scroll: [scrollX, scrollY, byId("table-scroll").scrollLeft],
  };
}

function recall() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT));
    sessionStorage.removeItem(KEPT);
    return found;
  } catch {
    return null; // where a browser keeps nothing for files
  }
}

// What was chosen before the page was loaded again, as far as it is still there.
function restored(state, found) {
  if (!found) return state;
  const place = (list, value) => (list.indexOf(value) < 0 ? undefined : list.indexOf(value));
  const runs = new Map(found.runs);
  sorting = found.sorting;
  if (found.theme) document.documentElement.dataset.theme = found.theme;
  return {
    statistic: page.statistics.includes(found.statistic) ? found.statistic : state.statistic,
    stage: place(page.stages, found.stage) ?? state.stage,
    layer: place(page.layers, found.layer) ?? state.layer,
    epoch: place(page.epochs, found.epoch) ?? state.epoch,
    threshold: place(page.thresholds, found.threshold) ?? state.threshold,
    quantity: found.quantity in page.quantities ? found.quantity : state.quantity,
    runs: page.runs.map((run) => runs.get(run.name) ?? true),
  };
}

function goBack(found) {
  if (!found) return;
  history.scrollRestoration = "manual";
  const go = () => {
    scrollTo(found.scroll[0], found.scroll[1]);
    byId("table-scroll").scrollLeft = found.scroll[2];
  };
  go();
  // Charts that are drawn meanwhile move what is below them.
  const drawn = new MutationObserver(() => {
    if (document.documentElement.dataset.drawn !== "all") return;
    drawn.disconnect();
    go();
  });
  drawn.observe(document.documentElement, { attributes: true, attributeFilter: ["data-drawn"] });
  if (found.focus) byId(found.focus)?.focus({ preventScroll: true });
}

function keepFresh() {
  const seconds = Number(document.documentElement.dataset.refresh);
  if (!(seconds > 0)) return;
  byId("live").hidden = false;
  byId("live").textContent = `The run goes on: this page looks for new records every ${seconds} s.`;
  let isHeld = false;
  let touched = -PAUSE;
  for (const kind of ["pointerdown", "pointerup", "pointercancel", "keydown", "input", "wheel"]) {
    addEventListener(kind, () => {
      if (kind.startsWith("pointer")) isHeld = kind === "pointerdown";
      touched = performance.now();
    }, { passive: true });
  }
  // Not while somebody drags a slider, has just chosen something, or selects text.
  const isBusy = () => isHeld || document.hidden || performance.now() - touched < PAUSE || String(getSelection());
  const reload = () => {
    if (isBusy()) {
      setTimeout(reload, RETRY);
      return;
    }
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(kept()));
    } catch {
      // it begins anew then
    }
    location.reload();
  };
  setTimeout(reload, 1000 * seconds);
}
