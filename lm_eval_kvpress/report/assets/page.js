// Glue only: tables are DataTables, plots are Plotly. `DataTable` is imported by the page.
const all = JSON.parse(document.getElementById("points").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a63d2", "#7f7f7f"];
// Plotly's symbols and the characters that stand for them in the filter, which is the legend; `none` is the star.
const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "triangle-down"];
const GLYPHS = ["●", "■", "◆", "▲", "✚", "✖", "⬟", "▼"].map(one => one + "\ufe0e"); // as text, not as a picture
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const LINES = ["distance", "position", "place"]; // plots with a line per run
const chips = [...document.querySelectorAll(".press")];
const names = chips.map(chip => chip.dataset.press);
const color = press => (press === "none" ? css("--ink") : COLORS[names.indexOf(press) % COLORS.length]);
// Colours repeat after eight presses; each round pairs them with other shapes.
const shapeIndex = press => (names.indexOf(press) + Math.floor(names.indexOf(press) / COLORS.length)) % SHAPES.length;
const shape = press => (press === "none" ? "star" : SHAPES[shapeIndex(press)]);
const isOn = press => press === "none" || chips[names.indexOf(press)].getAttribute("aria-pressed") === "true";
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads a subset of HTML in names and hover texts.
const plain = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const percent = share => (share === null ? "-" : `${(100 * share).toFixed(1)} %`);
const stem = name => name.replace(/_at_\d+/, "");

// What is missing is last in both directions. A cell's order is its number, or nothing.
const order = sign => (a, b) => (a === "") - (b === "") || (a === "" ? 0 : sign * (a - b));
Object.assign(DataTable.ext.type.order, { "figure-asc": order(1), "figure-desc": order(-1) });

const tables = [...document.querySelectorAll("table")].map(element => {
  const pinned = element.rows[0].cells.length - 1;
  const extra = [...element.rows[0].cells].flatMap((cell, index) => (cell.dataset.main === "false" ? [index] : []));
  const figures = [...element.rows[0].cells].flatMap((cell, index) => (cell.dataset.text === "false" ? [index] : []));
  const descending = [...element.rows[0].cells].flatMap((cell, index) => (cell.dataset.better === "true" ? [index] : [])); // best first
  const table = new DataTable(element, {
    paging: false, info: false, autoWidth: false, order: [], orderFixed: { pre: [[pinned, "asc"]] },
    layout: { topStart: null, topEnd: element.tBodies[0].rows.length > 8 ? "search" : null },
    columnDefs: [{ targets: descending, orderSequence: ["desc", "asc", ""] }, { targets: figures, type: "figure" }, { targets: [pinned, ...extra], visible: false }], language: { search: "Search" },
  });
  // DataTables reads aria-sort off the first of the sorted columns, which is the pinned one.
  table.on("draw", () => [...element.tHead.rows[0].cells].forEach(head => {
    const direction = ["asc", "desc"].find(one => head.classList.contains(`dt-ordering-${one}`));
    if (direction) head.setAttribute("aria-sort", `${direction}ending`);
    else head.removeAttribute("aria-sort");
  }));
  table.search.fixed("press", (text, data, index) => isOn(table.row(index).node().dataset.press));
  return { table, extra };
});

function hover(row, value, bounds) {
  const range = bounds ? `<br>to baseline: ${bounds.map(one => one.toPrecision(3)).join(" to ")}` : "";
  const doubt = row.void ? `<br>not to be trusted: ${plain(row.void)}` : "";
  return `<b>${plain(row.press)}</b> ${plain(row.arguments)}<br>${value.toPrecision(4)}${range}<br>removed ${percent(row.removed)}, kept ${percent(row.kept)}${doubt}<extra></extra>`;
}

function trace(points, mode, dash = "solid") {
  const press = points[0].row.press;
  return { type: "scatter", mode, name: plain(press), showlegend: false, x: points.map(one => one.x), y: points.map(one => one.y),
    hovertemplate: points.map(one => one.hover), line: { color: color(press), width: 1.5, dash },
    marker: { color: color(press), symbol: points.map(one => shape(press) + (one.row.void ? "-open" : "")), size: press === "none" ? 12 : 9 } };
}

// The interval of the difference, around the figure.
function bars(points) {
  const reach = points.map(one => one.range ?? [one.y, one.y]);
  return { type: "data", symmetric: false, array: points.map((one, index) => Math.max(0, reach[index][1] - one.y)),
    arrayminus: points.map((one, index) => Math.max(0, one.y - reach[index][0])), thickness: 1, width: 0, color: color(points[0].row.press) + "66" };
}

function front(all, better, moreIsBetter) {
  const sorted = all.filter(one => !one.row.void).sort((a, b) => (moreIsBetter ? b.x - a.x : a.x - b.x) || (better ? b.y - a.y : a.y - b.y));
  const best = [];
  for (const one of sorted) if (!best.length || (better ? one.y > best.at(-1).y : one.y < best.at(-1).y)) best.push(one);
  return { type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip", x: best.map(one => one.x), y: best.map(one => one.y), line: { color: css("--quiet"), width: 1, dash: "dot" } };
}

function distances(row, data, metric) {
  const steps = data.metrics.flatMap((one, index) => (one.distance !== null && stem(one.name) === stem(data.metrics[metric].name) && row.values[index] !== null ? [{ x: one.distance, index }] : []));
  return steps.map(({ x, index }) => ({ row, x, y: row.values[index], hover: `${x} tokens<br>` + hover(row, row.values[index], row.bounds[index]) }));
}

function positions(row, data, metric) {
  const known = (row.curves[data.metrics[metric].task] ?? []).filter(one => one.perplexity !== null);
  return known.map(one => ({ row, x: one.position, y: one.perplexity, hover: `up to token ${one.position}, ${one.num_documents} documents<br>` + hover(row, one.perplexity, null) }));
}

function places(row) {
  return row.places.map(one => ({ row, x: one.last, y: one.kl_mean, hover: `up to ${one.last} tokens after the context, ${one.num_tokens} tokens<br>` + hover(row, one.kl_mean, null) }));
}

// A line per run; the runs of one press share its colour and differ in their dashes.
function lines(rows, points) {
  const seen = {};
  return rows.map(points).filter(one => one.length).map(one => {
    const press = one[0].row.press;
    seen[press] = (seen[press] ?? -1) + 1;
    return trace(one, "lines+markers", DASHES[seen[press] % DASHES.length]);
  });
}

function traces(kind, data, metric, amount) {
  const rows = data.rows.filter(row => isOn(row.press));
  if (LINES.includes(kind)) {
    const chosen = rows.filter(row => row.press === "none" || !amount || row.amount === amount);
    return lines(chosen, row => ({ distance: distances, position: positions, place: places })[kind](row, data, metric));
  }
  const base = data.rows.find(row => row.is_baseline)?.values[metric] ?? 0;
  const points = rows.filter(row => row[kind] !== null && row.values[metric] !== null).map(row => ({ row, x: kind === "bytes" ? row.bytes / 2 ** 20 : row[kind], y: row.values[metric],
    range: row.bounds[metric]?.map(one => base + one), hover: hover(row, row.values[metric], row.bounds[metric]) }));
  const group = kind === "kept" ? "series" : "press";
  const made = [...new Set(points.map(one => one.row[group]))].map(name => {
    const own = points.filter(one => one.row[group] === name).sort((a, b) => a.x - b.x);
    return { ...trace(own, kind === "kept" ? "lines+markers" : "markers"), error_y: bars(own) };
  });
  if (kind === "kept" || !made.length || data.metrics[metric].better === null) return made;
  return [front(points, data.metrics[metric].better, kind === "decode"), ...made];
}

function layout(kind, axisTitle, isHigherBetter) {
  const direction = kind === "position" || kind === "place" ? "lower is better" : { true: "higher is better", false: "lower is better" }[isHigherBetter] ?? "";
  const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
  const scale = { kept: { tickformat: ".0%" }, position: { type: "log", tick0: 0, dtick: Math.log10(4), tickformat: ",d" }, place: { type: "log" } }[kind] ?? {};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 50, r: 10, t: 10, b: 40 }, hovermode: "closest", xaxis: { ...axis, title: { text: axisTitle }, ...scale },
    yaxis: { ...axis, title: { text: direction } },
  };
}

function draw() {
  const chosen = (choice, table) => document.querySelector(`select[data-choice="${choice}"][data-table="${table}"]`).value;
  const plots = [...document.querySelectorAll(".plot")].map(element => {
    const { plot: kind, table } = element.dataset, metric = all[table].metrics[chosen("metric", table)];
    return { element, kind, metric, made: metric ? traces(kind, all[table], Number(chosen("metric", table)), chosen("amount", table)) : [] };
  });
  // All are shown or hidden before any is drawn: the others take the space of a hidden one.
  for (const { element, made } of plots) element.parentElement.hidden = !made.length;
  for (const select of document.querySelectorAll("select[data-choice='amount']"))
    select.parentElement.hidden = select.options.length < 3 || !plots.some(one => one.element.dataset.table === select.dataset.table && LINES.includes(one.kind) && one.made.length);
  for (const { element, kind, metric, made } of plots.filter(one => one.made.length))
    Plotly.react(element, made, layout(kind, element.dataset.axis, metric.better), { displayModeBar: false, responsive: true })
      .then(() => Plotly.Plots.resize(element));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(name === "dark"));
  button.textContent = name === "dark" ? "Light" : "Dark";
  chips.forEach(({ firstElementChild: dot, dataset }) => {
    dot.style.color = color(dataset.press);
    dot.textContent = GLYPHS[shapeIndex(dataset.press)];
  });
  draw();
}

for (const select of document.querySelectorAll("select[data-table]")) {
  const { metrics, rows } = all[select.dataset.table];
  if (select.dataset.choice === "metric") metrics.forEach((one, index) => select.add(new Option(one.name, index)));
  else {
    const amounts = [...new Set(rows.map(row => row.amount).filter(Boolean))];
    amounts.forEach(one => select.add(new Option(one, one)));
    if (rows.length > 8 && amounts.length) select.value = amounts[0]; // more lines than one can tell apart
  }
  select.addEventListener("change", draw);
}
for (const chip of chips) chip.addEventListener("click", () => {
  chip.setAttribute("aria-pressed", String(!isOn(chip.dataset.press)));
  tables.forEach(one => one.table.draw());
  draw();
});
document.getElementById("metrics").addEventListener("click", event => {
  const isAll = event.currentTarget.getAttribute("aria-pressed") !== "true";
  event.currentTarget.setAttribute("aria-pressed", String(isAll));
  tables.forEach(one => one.table.columns(one.extra).visible(isAll));
});
document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
// Paper is white whatever the screen is.
let onScreen;
addEventListener("beforeprint", () => { onScreen = document.documentElement.dataset.theme; theme("light"); });
addEventListener("afterprint", () => theme(onScreen));
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.ready = "true";
