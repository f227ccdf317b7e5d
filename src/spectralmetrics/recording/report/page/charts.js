// How all charts look, and drawing them with Plotly.

const COLOURS = {
  light: ["#0b62a8", "#b8420e", "#00735a", "#8b2fa0", "#715500", "#0e6f87", "#b01657", "#4b5563"],
  dark: ["#6db3f2", "#ff9f5a", "#4fd1a5", "#d8a1f0", "#e6c34a", "#67d5e8", "#f78fb3", "#c3cad5"],
};
const DASHES = ["solid", "dot", "dash", "dashdot"];
const DASH_WORDS = ["solid", "dotted", "dashed", "dash-dotted"];
const MARKERS = ["circle", "square", "triangle-up", "cross", "triangle-down", "x", "star", "hexagon"];
const CONFIG = { displayModeBar: false, responsive: false, typesetMath: false, scrollZoom: false, doubleClick: "reset" };

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
}

function colour(index) {
  const all = COLOURS[isDark() ? "dark" : "light"];
  return all[index % all.length];
}

// Plotly reads tags and entities in all text.
function escaped(name) {
  return String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// Of a long name the end says most.
function shortened(name, most) {
  const letters = [...name];
  return letters.length > most ? `…${letters.slice(1 - most).join("")}` : name;
}

const pen = document.createElement("canvas").getContext("2d");

// A name that may be broken behind its dots, dashes and slashes.
function breakable(name) {
  return name.split(/(?<=[._/-])/).flatMap((part, index) => (index ? [made("wbr"), part] : [part]));
}

// Labels for an axis of layers: as many as have room, and the pixels that the longest of them takes.
function nameAxis(layers, room, most) {
  const areShort = layers.every((layer) => [...page.layers[layer]].length <= most);
  const names = layers.map((layer) => (areShort ? page.layers : page.short_layers)[layer]);
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const every = Math.max(1, Math.ceil((names.length * 15) / Math.max(room, 15)));
  const picked = names.map((_, index) => index).filter((index) => index % every === 0);
  const texts = picked.map((index) => shortened(names[index], most));
  const longest = Math.max(0, ...texts.map((text) => pen.measureText(text).width));
  return { tickmode: "array", tickvals: picked, ticktext: texts.map(escaped), pixels: longest + 16 };
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(options) {
  return {
    gridcolor: style("--line"),
    linecolor: style("--quiet"),
    zerolinecolor: style("--line"),
    zeroline: false,
    ...options,
    title: options.title ? { text: options.title, standoff: 8 } : undefined,
  };
}

function faint(index) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour(index).slice(start, start + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, 0.25)`;
}

// What lies between the two ends of some intervals; nothing where there is none.
function band(index, x, intervals) {
  const outline = { x: [], y: [] };
  const add = (places) => {
    if (!places.length) return;
    const round = [...places.map((place) => [place, 0]), ...places.reverse().map((place) => [place, 1])];
    for (const [place, end] of [...round, round[0]]) {
      outline.x.push(x[place]);
      outline.y.push(intervals[place][end]);
    }
    outline.x.push(null);
    outline.y.push(null);
  };
  let places = [];
  intervals.forEach((interval, place) => {
    if (interval?.every(Number.isFinite)) return places.push(place);
    add(places);
    places = [];
  });
  add(places);
  if (!outline.x.length) return [];
  const line = { color: faint(index), width: 1 };
  return [{ type: "scatter", mode: "lines", ...outline, fill: "toself", fillcolor: faint(index), line, hoverinfo: "skip", zorder: -1 }];
}

function nothing(text) {
  return { text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
}

function drawChart(element, figure) {
  element.setAttribute("aria-label", figure.label);
  const zooms = matchMedia("(pointer: fine)").matches; // a finger that drags wants to scroll
  const layout = {
    width: element.clientWidth,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style("--text") },
    hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--quiet"), font: { color: style("--text") } },
    showlegend: false,
    annotations: figure.isEmpty ? [nothing(figure.isEmpty)] : [],
    hovermode: "closest",
    dragmode: zooms ? "zoom" : false,
    ...figure.layout,
  };
  element.style.height = `${layout.height}px`;
  const isNew = !element.data;
  Plotly.react(element, figure.traces, layout, CONFIG);
  if (isNew && figure.click) element.on("plotly_click", (event) => figure.click(event.points[0]));
}
