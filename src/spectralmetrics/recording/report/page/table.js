// The summary table: the same numbers for those who read, sort or listen.

// A column: what it is called, what a row says there, and how that is written. A column without any value is not
// shown; one more needs one more line here. A fact is known of layers that were not recorded, too.
function columns(state) {
  const own = page.kind(state.statistic) ? [] : [state.statistic];
  return [
    ...(page.runs.length > 1 ? [{ title: "run", text: true, value: ({ run }) => run.name }] : []),
    { title: "layer", text: true, isLayer: true, value: ({ layer }) => layer, words: ({ layer }) => page.layers[layer] },
    { title: "type", text: true, isType: true, value: ({ run, layer }) => run.facts[layer].kind || undefined },
    { title: "width", value: ({ run, where }) => run.integer("width", ...where) },
    ...(page.hasCeilings ? [{ title: "ceiling", isFact: true, value: ({ run, where }) => run.ceiling(...where) }] : []),
    { title: "observations", value: ({ run, where }) => run.integer("observations", ...where) },
    {
      title: "dimension",
      kind: "dimension",
      value: ({ run, where }) => run.value(run.ofKind("dimension"), ...where),
      interval: ({ run, where }) => run.interval(run.ofKind("dimension"), ...where),
    },
    { title: "saturation", kind: "share", value: ({ run, where }) => run.value(run.ofKind("share"), ...where) },
    ...own.map((name) => ({
      title: name,
      value: ({ run, where }) => run.value(name, ...where),
      interval: ({ run, where }) => run.interval(name, ...where),
    })),
    { title: "what stands out", text: true, isWords: true, value: ({ run, where }) => run.standsOut(...where) ?? "" },
  ];
}

let sorting = { title: "", isDescending: false };
const tableRows = new Map();

function updateTable(state) {
  const all = columns(state);
  const rows = visibleRuns(state).flatMap(({ run, index }) => {
    const epoch = run.epochIndex(page.epochs[state.epoch]);
    return page.layers
      .map((_, layer) => ({ run, index, layer, state, where: [state.stage, layer, epoch, state.threshold] }))
      .map((row) => ({ ...row, cells: all.map((column) => column.value(row)) }))
      .filter((row) => row.cells.some((cell, i) => cell !== undefined && !all[i].text && !all[i].isFact));
  });
  const kept = all
    .map((column, index) => ({ ...column, index }))
    .filter(({ index }) => rows.some((row) => row.cells[index] !== undefined));
  updateHeadings(kept);
  sort(rows, kept.find((column) => column.title === sorting.title));
  const hasIntervals = rows.some((row) => kept.some((column) => column.interval?.(row)));
  const brackets = hasIntervals ? "; in brackets the interval of a value" : "";
  const body = byId("rows");
  const elements = rows.map((row) => rowElement(row, kept));
  // Moving an element takes the focus away from what is in it: touch only what is out of place.
  elements.forEach((element, place) => {
    if (body.children[place] !== element) body.insertBefore(element, body.children[place] || null);
  });
  while (body.children.length > elements.length) body.lastChild.remove();
  byId("table-caption").firstElementChild.textContent =
    `${counted(rows.length, "row")}: ${condition(state, true)}${ended(state)}${brackets}`;
}

function ended(state) {
  const epoch = page.epochs[state.epoch];
  const words = visibleRuns(state)
    .filter(({ run }) => run.epochs[run.epochIndex(epoch)] !== epoch)
    .map(({ run }) => {
      const last = run.epochs[run.epochIndex(epoch)];
      return last === undefined ? `${run.name} begins later` : `${run.name} shows its ${page.unit} ${last}`;
    });
  return words.length ? `; ${words.join(", ")}` : "";
}

function updateHeadings(kept) {
  const headings = byId("headings");
  const titles = kept.map((column) => column.title);
  if (headings.dataset.titles !== JSON.stringify(titles)) {
    headings.dataset.titles = JSON.stringify(titles);
    tableRows.clear();
    headings.replaceChildren(
      ...kept.map((column) => {
        const button = made("button", { type: "button", textContent: column.title });
        button.addEventListener("click", () => {
          // First the largest number, or the first letter.
          const isSame = sorting.title === column.title;
          sorting = { title: column.title, isDescending: isSame ? !sorting.isDescending : !column.text };
          updateTable(current);
        });
        return made("th", { scope: "col", className: column.text ? "text" : "" }, button);
      }),
    );
  }
  kept.forEach((column, index) => {
    const direction = sorting.isDescending ? "descending" : "ascending";
    headings.children[index].setAttribute("aria-sort", column.title === sorting.title ? direction : "none");
  });
}

function sort(rows, column) {
  if (!column) return;
  const sign = sorting.isDescending ? -1 : 1;
  // Whatever the direction, what has no number comes last.
  const isNone = (cell) => cell === undefined || cell === "" || Number.isNaN(cell);
  rows.sort((left, right) => {
    const [a, b] = [left.cells[column.index], right.cells[column.index]];
    if (isNone(a) || isNone(b)) return isNone(a) - isNone(b);
    return sign * (a < b ? -1 : a > b ? 1 : 0);
  });
}

function rowElement(row, kept) {
  const key = `${row.index}/${row.layer}`;
  let element = tableRows.get(key);
  if (!element) {
    element = newRow(row, kept);
    tableRows.set(key, element);
  }
  element.className = row.layer === row.state.layer ? "chosen" : "";
  kept.forEach((column, index) => {
    const cell = row.cells[column.index];
    const place = element.children[index];
    if (column.isLayer) return;
    if (column.text) {
      if (place.textContent !== (cell ?? "")) place.textContent = cell ?? "";
      return;
    }
    const data = place.firstChild;
    const exact = cell === undefined ? "" : String(cell);
    if (data.value !== exact || !data.textContent) {
      data.value = exact;
      data.textContent = shown(cell, column.kind);
    }
    if (column.interval) {
      const interval = shownInterval(column.interval(row), column.kind);
      if (place.lastChild.textContent !== interval) place.lastChild.textContent = interval;
    }
  });
  return element;
}

function newRow(row, kept) {
  return made("tr", {}, ...kept.map((column) => {
    const className = column.isWords ? "words" : column.isType ? "text type" : column.text ? "text" : "";
    if (column.isLayer) {
      const button = made("button", { type: "button" }, ...breakable(column.words(row)));
      button.addEventListener("click", () => choose({ layer: row.layer }));
      return made("th", { className, scope: "row" }, button);
    }
    if (column.text) return made("td", { className });
    return made("td", { className }, made("data"), ...(column.interval ? [made("span")] : []));
  }));
}
