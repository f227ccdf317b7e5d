// Charts over epochs: a layer's history, and scalars.

function historyFigure(state) {
  const all = [];
  const used = new Set();
  const bands = [];
  const kind = page.kind(state.statistic);
  const traces = visibleRuns(state).flatMap(({ run, index }) =>
    page.stages.map((name, stage) => {
      const intervals = run.epochs.map((_, epoch) => run.interval(state.statistic, stage, state.layer, epoch, state.threshold));
      if (stage === state.stage) {
        bands.push(...band(index, run.epochs, intervals));
        all.push(...intervals.flatMap((interval) => interval ?? []));
      }
      const values = run.epochs.map((_, epoch) => run.value(state.statistic, stage, state.layer, epoch, state.threshold));
      if (values.some((value) => value !== undefined)) used.add(stage);
      all.push(...values);
      return curve(run, index, dashOf(stage, state), values, (value, epoch) =>
        `${named(run)}${name}, ${page.unit} ${run.epochs[epoch]}: ${shown(value, kind)}${shownInterval(intervals[epoch], kind)}`,
      );
    }),
  );
  return {
    traces: [...traces, ...bands],
    layout: {
      height: 340,
      margin: { l: 70, r: 10, t: 10, b: 44 },
      xaxis: epochAxis(),
      yaxis: axis({ title: state.statistic, ...range(state.statistic, all) }),
      shapes: [upright(page.epochs[state.epoch])],
    },
    label: `Line chart of ${state.statistic} of layer ${page.layers[state.layer]} over ${counted(page.epochs.length, page.unit)}.`,
    hint: `${stageWords(used, state)}${bands.length ? " The band is the interval of the value." : ""}`,
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
          `${named(run)}${titles[row]}${stage ? `, ${stage}` : ""}, ${page.unit} ${run.epochs[epoch]}: ${shown(value)}`,
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
    shapes: [upright(page.epochs[state.epoch])],
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
    label: `Line charts over ${counted(page.epochs.length, page.unit)}: ${titles.join(", ")}.`,
    hint: `${stageWords(used, state)}${first ? " The mean is over the layers where it is defined." : ""}`,
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
  return axis({ title: page.unit, range: [first - room, last + room], nticks: 8, ...(last - first < 8 ? { dtick: 1 } : {}) });
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
