// What each chart shows: traces and layout for Plotly, and a sentence for those who do not see it.

function visibleRuns(state) {
  return page.runs.map((run, index) => ({ run, index })).filter(({ index }) => state.runs[index]);
}

function named(run) {
  return page.runs.length > 1 ? `${run.name}, ` : "";
}

function heading(run) {
  return page.runs.length > 1 ? `${run.name}: ` : "";
}

function condition(state, isAtThreshold = Boolean(page.kind(state.statistic))) {
  const share = isAtThreshold && page.hasArrays ? `, threshold ${page.thresholds[state.threshold]}` : "";
  const stage = page.stages[state.stage] ? ` in ${page.stages[state.stage]}` : "";
  return `${page.unit} ${page.epochs[state.epoch]}${stage}${share}`;
}

// The layers of which some visible run knows the statistic, at any epoch of the stage.
function layersOf(state) {
  return page.layers
    .map((_, layer) => layer)
    .filter((layer) =>
      visibleRuns(state).some(({ run }) => {
        const entry = run.statistics[state.statistic];
        if (!entry) return false;
        return run.epochs.some(
          (_, epoch) =>
            (entry.values && at(entry.is_recorded, state.stage, layer, epoch)) ||
            (entry.kind && run.integer("width", state.stage, layer, epoch) !== undefined),
        );
      }),
    );
}

// Shares from 0 to 1, other statistics from 0 on, scalars (no statistic) as they are.
function range(statistic, values) {
  const finite = values.filter(Number.isFinite);
  if (page.kind(statistic) === "share") return { range: [0, 1.03] };
  if (!finite.length) return { range: [0, 1] };
  const most = finite.reduce((a, b) => Math.max(a, b));
  const least = finite.reduce((a, b) => Math.min(a, b), statistic ? Math.min(0, most) : most);
  const room = (most - least || Math.abs(most) || 1) * 0.08;
  return { range: [least === 0 ? 0 : least - room, most + room] };
}

// Powers of ten on a logarithmic axis, with 2 and 5 between them where it is short.
function logTicks(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return {};
  const most = Math.log10(positive.reduce((a, b) => Math.max(a, b)));
  const least = Math.log10(positive.reduce((a, b) => Math.min(a, b)));
  const room = Math.max((most - least) * 0.03, 0.02);
  return { dtick: most - least < 1.2 ? "D2" : Math.ceil((most - least) / 6), range: [least - room, most + room] };
}

function indexTicks(values) {
  const last = values.reduce((a, b) => Math.max(a, b), 1);
  const all = Array.from({ length: 18 }, (_, place) => [1, 2, 5][place % 3] * 10 ** Math.floor(place / 3));
  const ticks = all.filter((tick) => tick <= last && (last <= 500 || Number.isInteger(Math.log10(tick))));
  return { ...logTicks(values), dtick: undefined, tickmode: "array", tickvals: ticks, ticktext: ticks.map(String) };
}

function profileFigure(state, width) {
  const layers = layersOf(state);
  const names = nameAxis(layers, width - 70, width < 600 ? 22 : 30);
  const epoch = page.epochs[state.epoch];
  const size = Math.min(Math.max((width / layers.length) * 0.8, 3), 7);
  const all = [];
  const bands = [];
  const kind = page.kind(state.statistic);
  const traces = visibleRuns(state).map(({ run, index }) => {
    const when = run.epochIndex(epoch);
    const tail = run.tail(state.stage, when, state.threshold) || new Set();
    const values = layers.map((layer) => run.value(state.statistic, state.stage, layer, when, state.threshold));
    const intervals = layers.map((layer) => run.interval(state.statistic, state.stage, layer, when, state.threshold));
    bands.push(...band(index, layers.map((_, place) => place), intervals));
    all.push(...values, ...intervals.flatMap((interval) => interval ?? []));
    return {
      type: "scatter",
      mode: "lines+markers",
      x: layers.map((_, place) => place),
      y: values.map((value) => (Number.isFinite(value) ? value : null)),
      customdata: layers,
      text: layers.map((layer, place) =>
        escaped(`${named(run)}${page.layers[layer]}: ${shown(values[place], kind)}${shownInterval(intervals[place], kind)}`),
      ),
      hoverinfo: "text",
      line: { color: colour(index), width: 2 },
      marker: {
        color: layers.map((layer) => (tail.has(layer) ? style("--page") : colour(index))),
        line: { color: colour(index), width: size > 4 ? 2 : 1 },
        size: layers.map((layer) => (tail.has(layer) ? size + 4 : size)),
        opacity: 1,
        symbol: layers.map((layer) => (tail.has(layer) ? "diamond" : MARKERS[index % MARKERS.length])),
      },
    };
  });
  const chosen = layers.indexOf(state.layer);
  const ceilings = ceilingLines(state, layers, all);
  const words = [
    ...(bands.length ? ["The band is the interval of the value."] : []),
    ...(ceilings.length ? ["The stepped line is the ceiling that a layer's weights and width set."] : []),
  ];
  return {
    traces: [...traces, ...bands],
    hint: words.join(" "),
    layout: {
      height: 300 + names.pixels,
      margin: { l: 58, r: 10, t: 10, b: names.pixels },
      xaxis: axis({ ...names, pixels: undefined, tickangle: -90, range: [-0.6, layers.length - 0.4], showgrid: false }),
      yaxis: axis({ title: state.statistic, ...range(state.statistic, all) }),
      shapes: [...ceilings, ...(chosen < 0 ? [] : [upright(chosen)])],
    },
    label: `Line chart of ${state.statistic} over ${counted(layers.length, "layer")}, ${condition(state)}. The table has its numbers.`,
    click: (point) => choose({ layer: point.customdata }),
  };
}

function upright(x, line = { color: style("--quiet"), width: 1, dash: "dot" }) {
  return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line };
}

// A step for each layer, and a line for each run that has another one; the values join those of the axis.
function ceilingLines(state, layers, values) {
  const kind = page.kind(state.statistic);
  const found = new Map();
  for (const { run, index } of visibleRuns(state)) {
    if (!kind || !run.hasCeilings()) continue;
    const when = run.epochIndex(page.epochs[state.epoch]);
    let path = "";
    let isOpen = false;
    layers.forEach((layer, place) => {
      const ceiling = run.ceiling(state.stage, layer, when, state.threshold);
      const share = kind === "share" ? ceiling / run.integer("width", state.stage, layer, when) : ceiling;
      if (Number.isFinite(share)) {
        path += isOpen ? `V${share}H${place + 0.5}` : `M${place - 0.5},${share}H${place + 0.5}`;
        values.push(share);
      }
      isOpen = Number.isFinite(share);
    });
    if (path && !found.has(path)) found.set(path, index);
  }
  return [...found].map(([path, index]) => ({
    type: "path", xref: "x", yref: "y", path, layer: "below", opacity: 0.6,
    line: { color: found.size > 1 ? colour(index) : style("--quiet"), width: 1.5 },
  }));
}

// White around black is seen on every colour.
function outline(x0, x1, y0, y1) {
  return [["white", 4], ["black", 1.5]].map(([color, width]) => ({ type: "rect", x0, x1, y0, y1, line: { color, width } }));
}

// A labelled bar of colours; that of logarithms has their numbers: 1, 2 and 5, over many decades powers of ten.
function colourBar(title, logarithms) {
  const bar = { thickness: 10, len: 1, outlinewidth: 0, xpad: 4, title: { text: escaped(title), side: "right" } };
  if (!logarithms?.length) return bar;
  const [least, most] = [Math.min, Math.max].map((end) => logarithms.reduce((a, b) => end(a, b)));
  const decades = Array.from({ length: Math.ceil(most) - Math.floor(least) + 1 }, (_, step) => Math.floor(least) + step);
  const every = Math.ceil(decades.length / 8);
  const factors = most - least < 3 ? [1, 2, 5] : [1];
  const numbers = decades
    .filter((_, index) => index % every === 0)
    .flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`)))
    .filter((tick) => Math.log10(tick) >= least && Math.log10(tick) <= most);
  const ticks = numbers.length > 1 ? numbers : [...new Set([least, most])].map((end) => 10 ** end);
  return { ...bar, tickmode: "array", tickvals: ticks.map(Math.log10), ticktext: ticks.map((tick) => (numbers.length > 1 ? String(tick) : shown(tick))) };
}

// Layers downwards, numbers as colours; `labels` has one of each column, and the axis those at `ticks`.
function heatMap({ layers, numbers, text, isShare, xgap, colorbar, title, labels, ticks, shapes }, width) {
  const height = Math.min(Math.max(layers.length * 17 + 60, 220), 640);
  const names = nameAxis(layers, height - 60, width < 700 ? 22 : 48);
  return {
    traces: [{
      type: "heatmap",
      z: numbers.map((row) => row.map((value) => (Number.isFinite(value) ? value : null))),
      text,
      hoverinfo: "text",
      colorscale: "Viridis",
      ...(isShare ? { zmin: 0, zmax: 1 } : {}),
      xgap,
      ygap: layers.length <= 40 ? 1 : 0,
      colorbar,
    }],
    layout: {
      height,
      margin: { l: names.pixels, r: 10, t: 10, b: 44 },
      xaxis: axis({
        title, tickmode: "array", tickvals: ticks, ticktext: ticks.map((index) => String(labels[index])),
        range: [-0.5, labels.length - 0.5], showgrid: false, tickangle: 0,
      }),
      yaxis: axis({ ...names, pixels: undefined, range: [layers.length - 0.5, -0.5], showgrid: false }),
      shapes,
    },
  };
}

function heatFigure(state, run, width) {
  const layers = layersOf(state);
  const kind = page.kind(state.statistic);
  const rows = layers.map((layer) =>
    run.epochs.map((_, epoch) => run.value(state.statistic, state.stage, layer, epoch, state.threshold)),
  );
  const epoch = run.epochIndex(page.epochs[state.epoch]);
  const chosen = layers.indexOf(state.layer);
  const isEmpty = rows.every((row) => row.every((value) => value === undefined));
  const shapes = [];
  if (epoch >= 0) shapes.push(...outline(epoch - 0.5, epoch + 0.5, -0.5, layers.length - 0.5));
  if (chosen >= 0) shapes.push(...outline(-0.5, run.epochs.length - 0.5, chosen - 0.5, chosen + 0.5));
  const every = Math.ceil(run.epochs.length / Math.max(2, Math.floor((width - 200) / 36)));
  const ticks = run.epochs.map((_, index) => index).filter((index) => index % every === 0);
  return {
    isEmpty: isEmpty && "no values at this threshold",
    ...heatMap({
      layers,
      numbers: rows,
      text: rows.map((row, place) =>
        row.map((value, index) =>
          escaped(`${named(run)}${page.layers[layers[place]]}, ${page.unit} ${run.epochs[index]}: ${shown(value, kind)}`),
        ),
      ),
      isShare: kind === "share",
      xgap: run.epochs.length <= 30 ? 1 : 0,
      colorbar: colourBar(state.statistic),
      title: page.unit,
      labels: run.epochs,
      ticks,
      shapes: isEmpty ? [] : shapes,
    }, width),
    label: `Heat map of ${state.statistic} of run ${run.name}: ${counted(layers.length, "layer")} by ${counted(run.epochs.length, page.unit)}, ${condition(state)}.`,
    click: (point) => {
      const shownNow = layersOf(current);
      choose({ layer: shownNow[point.y], epoch: page.epochs.indexOf(run.epochs[point.x]) });
    },
  };
}

// Layers by forwards: scales as powers of ten, shares as they are.
function forwardsFigure(state, run, width) {
  const found = run.history[page.stages[state.stage]];
  const title = page.quantities[state.quantity];
  if (!found) return { isEmpty: "no history of this stage", traces: [], layout: { height: 120 }, label: "No history of this stage." };
  const isShare = state.quantity === "zero_share";
  const values = found.layers.map((_, row) => found.forwards.map((_, column) => at(found[state.quantity], row, column)));
  const words = (ends) => (ends[0] === ends[1] ? `${ends[0]}` : `${ends[0]} to ${ends[1]}`);
  const when = found.forwards.map((ends, column) => {
    const steps = found.steps[column];
    return `forward ${words(ends)}${steps[0] < 0 ? "" : `, step ${words(steps)}`}`;
  });
  const hasSteps = found.steps.every((steps) => steps[0] >= 0);
  const labels = (hasSteps ? found.steps : found.forwards).map((ends) => ends[0]);
  // A step may have several forwards: its label stands at the first.
  const firsts = labels.map((_, column) => column).filter((column) => labels[column] !== labels[column - 1]);
  const every = Math.ceil(firsts.length / Math.max(2, Math.floor((width - 200) / 48)));
  const ticks = firsts.filter((_, index) => index % every === 0);
  const chosen = found.layers.indexOf(state.layer);
  return {
    ...heatMap({
      layers: found.layers,
      numbers: isShare ? values : values.map((row) => row.map(Math.log10)),
      text: values.map((row, place) =>
        row.map((value, column) => escaped(`${named(run)}${page.layers[found.layers[place]]}, ${when[column]}: ${title} ${shown(value)}`)),
      ),
      isShare,
      colorbar: colourBar(title, isShare ? undefined : values.flat().map(Math.log10).filter(Number.isFinite)),
      title: hasSteps ? "step" : "forward",
      labels,
      ticks,
      shapes: chosen < 0 ? [] : outline(-0.5, found.forwards.length - 0.5, chosen - 0.5, chosen + 0.5),
    }, width),
    label: `Heat map of the ${title} of ${counted(found.layers.length, "layer")} in ${counted(found.forwards.length, "column")} of forwards, run ${run.name}.`,
    click: (point) => choose({ layer: found.layers[point.y] }),
  };
}

function spectrumFigure(state) {
  const traces = [];
  const shapes = [];
  const words = [];
  for (const { run, index } of visibleRuns(state)) {
    const now = run.epochIndex(page.epochs[state.epoch]);
    const others = Math.min(6, run.epochs.length);
    const faint = new Set(
      Array.from({ length: others }, (_, step) => Math.round((step * (run.epochs.length - 1)) / Math.max(others - 1, 1))),
    );
    faint.delete(now);
    for (const epoch of [...faint, now]) {
      const { x, y } = run.spectrum(state.stage, state.layer, epoch);
      const isNow = epoch === now;
      traces.push({
        type: "scatter",
        mode: x.length > 1 ? "lines" : "markers",
        x,
        y,
        text: x.map((position, point) =>
          escaped(`${named(run)}${page.unit} ${run.epochs[epoch]}, eigenvalue ${position}: ${shown(y[point] + 0)}`),
        ),
        hoverinfo: "text",
        opacity: isNow ? 1 : 0.35,
        line: { color: colour(index), width: isNow ? 2.5 : 1 },
        marker: { color: colour(index) },
      });
    }
    const dimension = now < 0 ? undefined : run.dimension(0, state.stage, state.layer, now, state.threshold);
    if (dimension !== undefined) {
      words.push(`${heading(run)}${dimension} of ${run.integer("width", state.stage, state.layer, now)}`);
      shapes.push(upright(dimension || 1, { color: colour(index), width: 1.5, dash: "dash" }));
    }
  }
  const isEmpty = traces.every((trace) => !trace.x.length);
  return {
    traces,
    isEmpty: isEmpty && "no spectrum was recorded here",
    layout: {
      height: 340,
      margin: { l: 70, r: 10, t: 10, b: 44 },
      xaxis: axis({ type: "log", title: "index of the eigenvalue", ...indexTicks(traces.flatMap((trace) => trace.x)) }),
      yaxis: axis({ type: "log", title: "eigenvalue", exponentformat: "power", ...logTicks(traces.flatMap((trace) => trace.y)) }),
      shapes,
    },
    label: `Spectrum of layer ${page.layers[state.layer]}, ${condition(state, true)}: dimension ${words.join("; ") || "unknown"}.`,
    hint: isEmpty
      ? "A spectrum needs the covariances that the writer “arrays” keeps."
      : `The dashed line is the dimension at threshold ${page.thresholds[state.threshold]}: ${words.join("; ") || "unknown"}.${traces.length > visibleRuns(state).length ? ` Faint lines are other ${page.unit}s.` : ""}`,
  };
}
