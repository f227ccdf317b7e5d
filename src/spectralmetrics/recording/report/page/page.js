// The state of the page, its controls, and when what is drawn.

let page;
let current;

function byId(id) {
  return document.getElementById(id);
}

function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Change the state; everything that shows it follows before the next frame.
let isWaiting = false;
function choose(change) {
  for (const [key, value] of Object.entries(change)) {
    if (value !== undefined && value !== -1) current[key] = value;
  }
  if (!isWaiting) {
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      update();
    });
  }
}

function update() {
  document.documentElement.dataset.drawn = "";
  updateControls();
  updateTable(current);
  drawSoon(charts());
}

function charts() {
  const width = (id) => byId(id).clientWidth;
  const ofRuns = (kind, figure, has = () => true) =>
    page.runs
      .map((run, index) => ({ run, element: byId(`${kind}-${index}`), isShown: current.runs[index] && has(run) }))
      .filter(({ isShown }) => isShown)
      .map(({ run, element }) => ({ element, figure: () => figure(current, run, element.clientWidth) }));
  return [
    { element: byId("profile"), figure: () => profileFigure(current, width("profile")), hint: byId("profile-hint") },
    ...ofRuns("heat", heatFigure),
    { element: byId("spectrum"), figure: () => spectrumFigure(current), hint: byId("spectrum-hint") },
    { element: byId("history"), figure: () => historyFigure(current), hint: byId("history-hint") },
    ...ofRuns("forwards", forwardsFigure, (run) => run.hasHistory),
    { element: byId("scalars"), figure: () => scalarsFigure(current), hint: byId("scalars-hint") },
  ];
}

// What is in view at once, the rest one by one while there is nothing else to do.
let rest = [];
let restTimer = 0;
function drawSoon(all) {
  clearTimeout(restTimer);
  const isInView = ({ element }) => {
    const box = element.getBoundingClientRect();
    return box.bottom > -50 && box.top < innerHeight + 50;
  };
  const [now, later] = [all.filter(isInView), all.filter((chart) => !isInView(chart))];
  now.forEach(draw);
  rest = later;
  restTimer = setTimeout(drawRest, 0);
}

function drawRest() {
  const next = rest.shift();
  if (!next) {
    document.documentElement.dataset.drawn = "all";
    if (!performance.getEntriesByName("drawn").length) performance.mark("drawn");
    return;
  }
  draw(next);
  restTimer = setTimeout(drawRest, 0);
}

function draw({ element, figure, hint }) {
  const made = figure();
  drawChart(element, made);
  if (hint) hint.textContent = made.hint;
}

function updateControls() {
  const epoch = page.epochs[current.epoch];
  const threshold = page.thresholds[current.threshold];
  for (const id of ["statistic", "stage", "layer", "epoch", "threshold", "quantity"]) byId(id).value = String(current[id]);
  byId("epoch-shown").textContent = String(epoch);
  byId("epoch").setAttribute("aria-valuetext", `${page.unit} ${epoch}`);
  byId("threshold-shown").textContent = page.hasArrays ? String(threshold) : "–";
  byId("threshold").setAttribute("aria-valuetext", `${threshold} of the variance`);
  byId("layer-title").replaceChildren("Layer ", ...breakable(page.layers[current.layer] ?? "–"));
  byId("tail").textContent = tailWords();
  const notes = countNotes();
  byId("notes").hidden = !notes;
  byId("notes").firstElementChild.textContent = `Notes on ${counted(notes, "layer")}: see the table.`;
  byId("statistic-note").textContent = page.fixedWords(current.statistic);
  page.runs.forEach((run, index) => {
    byId(`heat-box-${index}`).hidden = !current.runs[index];
    byId(`forwards-box-${index}`).hidden = !current.runs[index] || !run.hasHistory;
  });
}

function tailWords() {
  const words = visibleRuns(current).map(({ run }) => {
    const when = run.epochIndex(page.epochs[current.epoch]);
    const tail = run.tail(current.stage, when, current.threshold);
    const problems = problemWords(run, when);
    if (!tail) return `${heading(run)}${problems}saturation is not known`;
    const names = [...tail].map((layer) => page.layers[layer]);
    const found = !names.length
      ? "no low-saturation tail"
      : `low-saturation tail of ${names.length} layers, ${names[0]} to ${names[names.length - 1]}`;
    return `${heading(run)}${problems}${found}`;
  });
  const said = `${condition(current, true)}: ${words.join("; ")}.`.replace(/^./, (letter) => letter.toUpperCase());
  const unchecked = "Without covariances (writer “arrays”), collapsed and dead layers and NaN are not found.";
  return page.hasArrays ? said : `${said} ${unchecked}`;
}

// The layers with a problem, which are said before anything else.
function problemWords(run, when) {
  const found = page.layers
    .map((layer, index) => [layer, run.problem(current.stage, index, when, current.threshold)])
    .filter(([, problem]) => problem)
    .map(([layer, problem]) => `problem in ${layer}: ${problem}`);
  const more = found.length > 3 ? [`problems in ${counted(found.length - 3, "more layer")}`] : [];
  return [...found.slice(0, 3), ...more].map((each) => `${each}; `).join("");
}

// How many layers have a note beside their problem, which is told above.
function countNotes() {
  return visibleRuns(current).flatMap(({ run }) => {
    const when = run.epochIndex(page.epochs[current.epoch]);
    const where = (layer) => [current.stage, layer, when, current.threshold];
    return page.layers.filter((_, layer) => (run.standsOut(...where(layer)) ?? "") !== run.problem(...where(layer)));
  }).length;
}

function fill(select, names) {
  select.replaceChildren(...names.map(([value, text]) => made("option", { value: String(value), textContent: text })));
}

function makeControls() {
  const layers = `${counted(page.layers.length, "layer")}, ${counted(page.epochs.length, page.unit)}`;
  document.querySelectorAll(".unit").forEach((each) => { each.textContent = page.unit; });
  byId("subtitle").textContent = page.runs.length > 1 ? `${page.runs.length} runs, ${layers}` : `${page.runs[0].name}, ${layers}`;
  fill(byId("statistic"), page.statistics.map((name) => [name, name]));
  fill(byId("stage"), page.stages.map((name, index) => [index, name || "no stage"]));
  fill(byId("quantity"), Object.entries(page.quantities));
  byId("forwards-section").hidden = !page.runs.some((run) => run.hasHistory);
  fill(byId("layer"), page.layers.map((name, index) => [index, name]));
  byId("epoch").max = page.epochs.length - 1;
  byId("threshold").max = page.thresholds.length - 1;
  byId("threshold").disabled = !page.hasArrays;
  byId("epoch").disabled = page.epochs.length < 2;
  for (const id of ["statistic", "quantity"]) byId(id).addEventListener("change", (event) => choose({ [id]: event.target.value }));
  for (const id of ["stage", "layer"]) byId(id).addEventListener("change", (event) => choose({ [id]: Number(event.target.value) }));
  for (const id of ["epoch", "threshold"]) byId(id).addEventListener("input", (event) => choose({ [id]: Number(event.target.value) }));
  makeRuns();
  writeNotes();
  byId("theme").value = document.documentElement.dataset.theme || "auto";
  byId("theme").addEventListener("change", (event) => {
    document.documentElement.dataset.theme = event.target.value;
    restyle();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) choose({}); // on a telephone the height changes with every scroll
    width = innerWidth;
  });
  addEventListener("beforeprint", () => charts().forEach(draw));
}

function restyle() {
  page.runs.forEach((_, index) => {
    const swatch = byId(`swatch-${index}`);
    if (swatch) swatch.style.background = colour(index);
  });
  choose({});
}

function showAlarms() {
  const lines = page.runs.flatMap((run) => run.alarms.map((alarm) => `${heading(run)}${alarm}`));
  byId("alarms").hidden = !lines.length;
  byId("alarm-list").replaceChildren(...lines.map((line) => made("li", {}, line)));
}

function makeRuns() {
  const several = page.runs.length > 1;
  byId("runs").hidden = !several;
  page.runs.forEach((run, index) => {
    if (several) {
      const box = made("input", { type: "checkbox", checked: current.runs[index], id: `run-${index}` });
      box.addEventListener("change", () => {
        current.runs[index] = box.checked;
        choose({});
      });
      const swatch = made("span", { className: "swatch", id: `swatch-${index}` });
      swatch.style.background = colour(index);
      byId("runs").append(made("label", {}, box, swatch, run.name));
    }
    for (const kind of ["heat", "forwards"]) {
      const chart = made("div", { className: "chart", id: `${kind}-${index}` });
      chart.setAttribute("role", "img");
      const title = several ? [made("h3", {}, run.name)] : [];
      byId(kind).append(made("div", { id: `${kind}-box-${index}` }, ...title, chart));
    }
  });
}

function writeNotes() {
  const why = byId("threshold-why");
  const without = page.runs.filter((run) => !run.hasArrays);
  const words = without
    .map((run) => {
      const recorded = Object.values(run.statistics).find((entry) => entry.kind)?.threshold;
      return recorded === undefined ? run.name : `${run.name} at ${recorded}`;
    })
    .join(", ");
  if (!page.hasArrays) {
    why.textContent = `The threshold cannot be moved: no covariances were recorded (writer “arrays”). Recorded: ${words}.`;
  } else if (without.length) {
    why.textContent = `Without covariances (writer “arrays”), and shown at the recorded threshold only: ${words}.`;
  }
  why.hidden = !why.textContent;
}

async function start() {
  const [library, data] = await Promise.all([unpacked("library"), unpacked("data")]);
  document.head.append(made("script", { textContent: new TextDecoder().decode(library) }));
  byId("library-version").textContent = `plotly.js ${Plotly.version}`;
  page = new Page(readContent(data));
  current = {
    statistic: page.statistic ?? undefined,
    stage: Math.max(page.stages.indexOf("eval"), 0),
    layer: 0,
    epoch: page.epochs.length - 1,
    threshold: page.threshold,
    quantity: "rms",
    runs: page.runs.map(() => true),
  };
  const before = recall();
  current = restored(current, before);
  byId("report").hidden = false;
  makeControls();
  showAlarms();
  update();
  goBack(before);
  keepFresh();
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
}

start().catch((error) => {
  byId("failure").hidden = false;
  byId("failure").textContent =
    typeof DecompressionStream === "undefined"
      ? "This browser is too old for this page: it needs Chrome 80, Firefox 113, Safari 16.4 or a later one."
      : `This page could not be drawn: ${error.message}`;
  throw error;
});
