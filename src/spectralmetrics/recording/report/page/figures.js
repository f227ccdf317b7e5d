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
  return `epoch ${page.epochs[state.epoch]}${stage}${share}`;
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
  const names = nameAxis(layers.map((layer) => page.layers[layer]), width - 70, width < 600 ? 16 : 22);
  const epoch = page.epochs[state.epoch];
  const size = Math.min(Math.max((width / layers.length) * 0.8, 3), 7);
  const all = [];
  const traces = visibleRuns(state).map(({ run, index }) => {
    const when = run.epochIndex(epoch);
    const tail = run.tail(state.stage, when, state.threshold);
    const values = layers.map((layer) => run.value(state.statistic, state.stage, layer, when, state.threshold));
    all.push(...values);
    return {
      type: "scatter",
      mode: "lines+markers",
      x: layers.map((_, place) => place),
      y: values.map((value) => (Number.isFinite(value) ? value : null)),
      customdata: layers,
      text: layers.map((layer, place) =>
        escaped(`${named(run)}${page.layers[layer]}: ${shown(values[place], page.kind(state.statistic))}`),
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
  return {
    traces,
    layout: {
      height: 300 + names.pixels,
      margin: { l: 58, r: 10, t: 10, b: names.pixels },
      xaxis: axis({ ...names, pixels: undefined, tickangle: -90, range: [-0.6, layers.length - 0.4], showgrid: false }),
      yaxis: axis({ title: state.statistic, ...range(state.statistic, all) }),
      shapes: chosen < 0 ? [] : [{
        type: "line", xref: "x", yref: "paper", x0: chosen, x1: chosen, y0: 0, y1: 1,
        line: { color: style("--quiet"), width: 1, dash: "dot" },
      }],
    },
    label: `Line chart of ${state.statistic} over ${layers.length} layers, ${condition(state)}. The table has its numbers.`,
    click: (point) => choose({ layer: point.customdata }),
  };
}

function heatFigure(state, run, width) {
  const layers = layersOf(state);
  const kind = page.kind(state.statistic);
  const names = nameAxis(layers.map((layer) => page.layers[layer]), heatHeight(layers.length) - 60, width < 500 ? 16 : 22);
  const rows = layers.map((layer) =>
    run.epochs.map((_, epoch) => run.value(state.statistic, state.stage, layer, epoch, state.threshold)),
  );
  const epoch = run.epochIndex(page.epochs[state.epoch]);
  const chosen = layers.indexOf(state.layer);
  // White around black is seen on every colour.
  const outline = (x0, x1, y0, y1) =>
    [["white", 4], ["black", 1.5]].map(([color, width]) => ({ type: "rect", x0, x1, y0, y1, line: { color, width } }));
  const shapes = [];
  if (epoch >= 0) shapes.push(...outline(epoch - 0.5, epoch + 0.5, -0.5, layers.length - 0.5));
  if (chosen >= 0) shapes.push(...outline(-0.5, run.epochs.length - 0.5, chosen - 0.5, chosen + 0.5));
  const every = Math.ceil(run.epochs.length / Math.max(2, Math.floor((width - 200) / 36)));
  const ticks = run.epochs.map((_, index) => index).filter((index) => index % every === 0);
  return {
    traces: [{
      type: "heatmap",
      z: rows.map((row) => row.map((value) => (Number.isFinite(value) ? value : null))),
      text: rows.map((row, place) =>
        row.map((value, index) =>
          escaped(`${named(run)}${page.layers[layers[place]]}, epoch ${run.epochs[index]}: ${shown(value, kind)}`),
        ),
      ),
      hoverinfo: "text",
      colorscale: "Viridis",
      ...(kind === "share" ? { zmin: 0, zmax: 1 } : {}),
      xgap: run.epochs.length <= 30 ? 1 : 0,
      ygap: layers.length <= 40 ? 1 : 0,
      colorbar: { thickness: 10, len: 1, outlinewidth: 0, xpad: 4 },
    }],
    layout: {
      height: heatHeight(layers.length),
      margin: { l: names.pixels, r: 10, t: 10, b: 44 },
      xaxis: axis({
        title: "epoch", tickmode: "array", tickvals: ticks, ticktext: ticks.map((index) => String(run.epochs[index])),
        range: [-0.5, run.epochs.length - 0.5], showgrid: false, tickangle: 0,
      }),
      yaxis: axis({ ...names, pixels: undefined, range: [layers.length - 0.5, -0.5], showgrid: false }),
      shapes,
    },
    label: `Heat map of ${state.statistic} of run ${run.name}: ${layers.length} layers by ${run.epochs.length} epochs, ${condition(state)}.`,
    click: (point) => {
      const shownNow = layersOf(current);
      choose({ layer: shownNow[point.y], epoch: page.epochs.indexOf(run.epochs[point.x]) });
    },
  };
}

function heatHeight(layers) {
  return Math.min(Math.max(layers * 17 + 60, 220), 640);
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
          escaped(`${named(run)}epoch ${run.epochs[epoch]}, eigenvalue ${position}: ${shown(y[point] + 0)}`),
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
      shapes.push({
        type: "line", xref: "x", yref: "paper", x0: dimension || 1, x1: dimension || 1, y0: 0, y1: 1,
        line: { color: colour(index), width: 1.5, dash: "dash" },
      });
    }
  }
  const isEmpty = traces.every((trace) => !trace.x.length);
  return {
    traces,
    layout: {
      height: 340,
      margin: { l: 70, r: 10, t: 10, b: 44 },
      xaxis: axis({ type: "log", title: "index of the eigenvalue", ...indexTicks(traces.flatMap((trace) => trace.x)) }),
      yaxis: axis({ type: "log", title: "eigenvalue", exponentformat: "power", ...logTicks(traces.flatMap((trace) => trace.y)) }),
      shapes,
      annotations: isEmpty ? [{ text: "no spectrum was recorded here", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] : [],
    },
    label: `Spectrum of layer ${page.layers[state.layer]}, ${condition(state, true)}: dimension ${words.join("; ") || "unknown"}.`,
    hint: isEmpty
      ? "A spectrum needs the covariances that the writer “arrays” keeps."
      : `The dashed line is the dimension at threshold ${page.thresholds[state.threshold]}: ${words.join("; ") || "unknown"}.${traces.length > visibleRuns(state).length ? " Faint lines are other epochs." : ""}`,
  };
}

function historyFigure(state) {
  const all = [];
  const used = new Set();
  const traces = visibleRuns(state).flatMap(({ run, index }) =>
    page.stages.map((name, stage) => {
      const values = run.epochs.map((_, epoch) => run.value(state.statistic, stage, state.layer, epoch, state.threshold));
      if (values.some((value) => value !== undefined)) used.add(stage);
      all.push(...values);
      return curve(run, index, dashOf(stage, state), values, (value, epoch) =>
        `${named(run)}${name}, epoch ${run.epochs[epoch]}: ${shown(value, page.kind(state.statistic))}`,
      );
    }),
  );
  return {
    traces,
    layout: {
      height: 340,
      margin: { l: 70, r: 10, t: 10, b: 44 },
      xaxis: epochAxis(),
      yaxis: axis({ title: state.statistic, ...range(state.statistic, all) }),
      shapes: [epochLine(state)],
    },
    label: `Line chart of ${state.statistic} of layer ${page.layers[state.layer]} over ${page.epochs.length} epochs.`,
    hint: stageWords(used, state),
    click: (point) => choose({ epoch: page.epochs.indexOf(point.x) }),
  };
}

function scalarsFigure(state) {
  const names = [...new Set(page.runs.flatMap((run) => run.scalars.map((scalar) => scalar.name)))];
  const titles = [...(state.statistic ? [`mean ${state.statistic}`] : []), ...names];
  const first = titles.length - names.length;
  const used = new Set();
  const traces = [];
  const extent = titles.map(() => []);
  for (const { run, index } of visibleRuns(state)) {
    const lines = (first ? page.stages : []).map((name, stage) => ({
      row: 0,
      stage: name,
      values: run.epochs.map((_, epoch) => run.mean(state.statistic, stage, epoch, state.threshold)),
    }));
    run.scalars.forEach((scalar) => lines.push({
      row: first + names.indexOf(scalar.name),
      stage: scalar.stage,
      values: run.epochs.map((_, epoch) => (scalar.is_recorded.values[epoch] ? scalar.values.values[epoch] : undefined)),
    }));
    for (const { row, stage, values } of lines) {
      const known = page.stages.indexOf(stage);
      if (known >= 0 && values.some((value) => value !== undefined)) used.add(known);
      extent[row].push(...values);
      traces.push({
        ...curve(run, index, dashOf(known, state), values, (value, epoch) =>
          `${named(run)}${titles[row]}${stage ? `, ${stage}` : ""}, epoch ${run.epochs[epoch]}: ${shown(value)}`,
        ),
        yaxis: row ? `y${row + 1}` : "y",
      });
    }
  }
  const rowHeight = 150;
  const height = titles.length * rowHeight + 44;
  const layout = {
    height,
    margin: { l: 70, r: 10, t: 24, b: 44 },
    xaxis: { ...epochAxis(), anchor: titles.length > 1 ? `y${titles.length}` : "y" },
    shapes: [epochLine(state)],
    annotations: [],
  };
  titles.forEach((title, row) => {
    const top = 1 - row / titles.length;
    const bottom = 1 - (row + 1) / titles.length;
    const domain = [bottom + (row + 1 < titles.length ? 0.3 / titles.length : 0), top];
    const bounds = row >= first ? range("", extent[row]) : range(state.statistic, extent[row]);
    layout[row ? `yaxis${row + 1}` : "yaxis"] = axis({ domain, ...bounds, nticks: 5 });
    layout.annotations.push({
      text: escaped(title), showarrow: false, xref: "paper", yref: "paper", x: 0, y: domain[1],
      xanchor: "left", yanchor: "bottom",
    });
  });
  return {
    traces,
    layout,
    label: `Line charts over ${page.epochs.length} epochs: ${titles.join(", ")}.`,
    hint: `${stageWords(used, state)}${first ? " The mean is over all layers." : ""}`,
    click: (point) => choose({ epoch: page.epochs.indexOf(point.x) }),
  };
}

function curve(run, index, dash, values, text) {
  return {
    type: "scatter",
    mode: run.epochs.length > 40 ? "lines" : "lines+markers",
    x: run.epochs,
    y: values.map((value) => (Number.isFinite(value) ? value : null)),
    text: values.map((value, epoch) => escaped(text(value, epoch))),
    hoverinfo: "text",
    line: { color: colour(index), width: 2, dash: DASHES[dash] },
    marker: { color: colour(index), size: 6, symbol: MARKERS[index % MARKERS.length] },
  };
}

function epochAxis() {
  const [first, last] = [page.epochs[0], page.epochs[page.epochs.length - 1]];
  const room = Math.max((last - first) * 0.03, 0.5);
  return axis({ title: "epoch", range: [first - room, last + room], nticks: 8, ...(last - first < 8 ? { dtick: 1 } : {}) });
}

function epochLine(state) {
  const epoch = page.epochs[state.epoch];
  return {
    type: "line", xref: "x", yref: "paper", x0: epoch, x1: epoch, y0: 0, y1: 1,
    line: { color: style("--quiet"), width: 1, dash: "dot" },
  };
}

// Solid is the stage that is chosen, or none.
function dashOf(stage, state) {
  if (stage < 0 || stage === state.stage) return 0;
  return 1 + ((stage > state.stage ? stage - 1 : stage) % (DASHES.length - 1));
}

function stageWords(used, state) {
  const words = [...used].sort().map((stage) => `${page.stages[stage] || "no stage"} is ${DASH_WORDS[dashOf(stage, state)]}`);
  return words.length ? `${words.join(", ")}.`.replace(/^./, (letter) => letter.toUpperCase()) : "";
}
