// What a run says at an epoch and a threshold. `undefined` stands for what was not recorded; NaN is a value.

const STEPS_PER_DECADE = 4096;
const ZERO = 2 ** 20;
const UNKNOWN = -2;

class Run {
  constructor(content, page) {
    Object.assign(this, content);
    this.page = page;
    this.hasArrays = "dimensions" in this.arrays;
    this.hasHistory = Object.keys(this.history).length > 0;
  }

  // A run that has ended goes on showing its last epoch.
  epochIndex(epoch) {
    let found = -1;
    this.epochs.forEach((each, index) => { if (each <= epoch) found = index; });
    return found;
  }

  integer(name, stage, layer, epoch) {
    if (!this.hasArrays || epoch < 0) return undefined;
    const found = at(this.arrays[name], stage, layer, epoch);
    return found < 0 ? undefined : found;
  }

  dimension(family, stage, layer, epoch, threshold) {
    if (!this.hasArrays) return undefined;
    const found = at(this.arrays.dimensions[family], stage, layer, threshold, epoch);
    return found < 0 ? undefined : found;
  }

  value(statistic, stage, layer, epoch, threshold) {
    const entry = this.statistics[statistic];
    if (!entry || epoch < 0) return undefined;
    if (entry.kind) {
      const found = this.dimension(entry.family, stage, layer, epoch, threshold);
      if (found !== undefined) return entry.kind === "share" ? found / this.integer("width", stage, layer, epoch) : found;
      if (this.page.hasArrays && this.page.thresholds[threshold] !== entry.threshold) return undefined;
    }
    if (!entry.values || !at(entry.is_recorded, stage, layer, epoch)) return undefined;
    return at(entry.values, stage, layer, epoch);
  }

  // The ends of a value's interval; the upper one is NaN while a fold is empty. Undefined without folds.
  interval(statistic, stage, layer, epoch, threshold) {
    const value = this.value(statistic, stage, layer, epoch, threshold);
    if (value === undefined) return undefined;
    const entry = this.statistics[statistic];
    if (entry.kind && this.dimension(entry.family, stage, layer, epoch, threshold) !== undefined) {
      if (!this.arrays.held_out) return undefined;
      const found = at(this.arrays.held_out[entry.family], stage, layer, threshold, epoch);
      if (found === UNKNOWN) return [value, NaN];
      if (found < 0) return undefined;
      const other = entry.kind === "share" ? found / this.integer("width", stage, layer, epoch) : found;
      return [Math.min(value, other), Math.max(value, other)];
    }
    if (!entry.low || !entry.high) return undefined;
    const [low, high] = [entry.low, entry.high].map((end) => at(end, stage, layer, epoch));
    return Number.isNaN(low) ? undefined : [low, high];
  }

  // The most directions that a layer's weights and width allow, unless the dimension refutes it.
  ceiling(stage, layer, epoch, threshold) {
    const found = epoch < 0 ? -1 : at(this.ceilings, stage, layer, threshold, epoch);
    return found < 0 ? (this.facts[layer].ceiling ?? undefined) : found;
  }

  // What Python says of a layer, in words; undefined where nothing was recorded.
  standsOut(stage, layer, epoch, threshold) {
    return epoch < 0 ? undefined : this.words[at(this.stands_out, stage, layer, threshold, epoch)];
  }

  // The part of it that is a problem; "" where there is none.
  problem(stage, layer, epoch, threshold) {
    return (epoch < 0 ? undefined : this.problems[at(this.stands_out, stage, layer, threshold, epoch)]) ?? "";
  }

  hasCeilings() {
    return this.facts.some(({ ceiling }) => ceiling !== null);
  }

  // Over the layers where the statistic is defined.
  mean(statistic, stage, epoch, threshold) {
    let sum = 0;
    let count = 0;
    let seen = 0;
    for (let layer = 0; layer < this.page.layers.length; layer++) {
      const value = this.value(statistic, stage, layer, epoch, threshold);
      if (value !== undefined) seen += 1;
      if (value !== undefined && !Number.isNaN(value)) {
        sum += value;
        count += 1;
      }
    }
    return seen ? sum / count : undefined;
  }

  // The layers in the low-saturation tail; undefined if not all saturations are known.
  tail(stage, epoch, threshold) {
    const layers = this.page.layers.map((_, layer) => layer);
    const found = layers.map((layer) => (epoch < 0 ? -1 : at(this.in_tail, stage, layer, threshold, epoch)));
    return found.some((each) => each >= 0) ? new Set(layers.filter((layer) => found[layer] === 1)) : undefined;
  }

  ofKind(kind) {
    return Object.keys(this.statistics).find((name) => this.statistics[name].kind === kind);
  }

  // Indices, counted from 1, and eigenvalues; those that are zero have no place on a logarithmic axis.
  spectrum(stage, layer, epoch) {
    const found = { x: [], y: [] };
    const width = this.integer("width", stage, layer, epoch);
    const positions = width === undefined ? [] : this.arrays.positions[width] || [];
    const largest = positions.length ? at(this.arrays.largest, stage, layer, epoch) : NaN;
    positions.forEach((position, point) => {
      const steps = at(this.arrays.points, stage, layer, point, epoch);
      if (steps >= 0 && steps < ZERO && largest > 0) {
        found.x.push(position);
        found.y.push(largest * 10 ** (-steps / STEPS_PER_DECADE));
      }
    });
    return found;
  }
}

class Page {
  constructor(content) {
    Object.assign(this, content);
    this.hasArrays = content.runs.some((run) => "dimensions" in run.arrays);
    this.runs = content.runs.map((run) => new Run(run, this));
    this.hasCeilings = this.runs.some((run) => run.hasCeilings());
    this.epochs = [...new Set(this.runs.flatMap((run) => run.epochs))].sort((a, b) => a - b);
    this.statistics = [...new Set(this.runs.flatMap((run) => Object.keys(run.statistics)))];
  }

  // What the slider does to a statistic that it does not move.
  fixedWords(statistic) {
    if (!this.hasArrays || !statistic || this.kind(statistic)) return "";
    const threshold = this.runs.map((run) => run.statistics[statistic]?.fixed).find((each) => each !== undefined);
    return threshold === undefined
      ? `${statistic} has no threshold: the slider does not move it.`
      : `${statistic} is shown as it was recorded, at its threshold ${threshold}: the slider does not move it.`;
  }

  kind(statistic) {
    return this.runs.map((run) => run.statistics[statistic]).find(Boolean)?.kind;
  }
}

// What follows a value in brackets.
function shownInterval(interval, kind) {
  if (!interval) return "";
  const [low, high] = interval;
  return ` (${shown(low, kind)}–${Number.isNaN(high) ? "?" : shown(high, kind)})`;
}

function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

// With all the digits that a reader can use; the exact number goes into the table's `value`.
function shown(value, kind) {
  if (value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (kind === "share") return value.toFixed(3);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(3);
}
