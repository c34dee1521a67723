// Glue only: tables are DataTables, plots are Plotly. `DataTable` is imported by the page.
const all = JSON.parse(document.getElementById("points").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a63d2", "#7f7f7f"];
const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "star"];
const chips = [...document.querySelectorAll(".press")];
const names = chips.map(chip => chip.dataset.press);
const color = press => (press === "none" ? css("--ink") : COLORS[names.indexOf(press) % COLORS.length]);
const shape = press => (press === "none" ? "star" : SHAPES[names.indexOf(press) % SHAPES.length]);
const isOn = press => press === "none" || chips[names.indexOf(press)].getAttribute("aria-pressed") === "true";
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads a subset of HTML in names and hover texts.
const plain = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const percent = share => (share === null ? "-" : `${(100 * share).toFixed(1)} %`);
const stage = { bytes: "KV bytes allocated per context", decode: "decode tokens per second", removed: "removed share asked", distance: "distance in tokens" };

const tables = [...document.querySelectorAll("table")].map(element => {
  const pinned = element.rows[0].cells.length - 1;
  const extra = [...element.rows[0].cells].flatMap((cell, index) => (cell.dataset.main === "false" ? [index] : []));
  const table = new DataTable(element, {
    paging: false, info: false, autoWidth: false, order: [], orderFixed: { pre: [[pinned, "asc"]] },
    layout: { topStart: null, topEnd: element.tBodies[0].rows.length > 8 ? "search" : null },
    columnDefs: [{ targets: [pinned, ...extra], visible: false }], language: { search: "Search" },
  });
  table.search.fixed("press", (text, data, index) => isOn(table.row(index).node().dataset.press));
  return { table, extra };
});

function hover(row, metric, value) {
  const bounds = row.bounds[metric];
  const range = bounds ? `<br>to baseline: ${bounds.map(one => one.toPrecision(3)).join(" to ")}` : "";
  return `<b>${plain(row.press)}</b> ${plain(row.arguments)}<br>${value.toPrecision(4)}${range}<br>removed ${percent(row.removed)}, kept ${percent(row.kept)}<extra></extra>`;
}

function trace(press, points, mode) {
  return { type: "scatter", mode, name: plain(press), showlegend: false, x: points.map(one => one.x), y: points.map(one => one.y),
    hovertemplate: points.map(one => one.hover), line: { color: color(press), width: 1.5 },
    marker: { color: color(press), symbol: shape(press), size: press === "none" ? 12 : 9 } };
}

function front(points, better, moreIsBetter) {
  const sorted = [...points].sort((a, b) => (moreIsBetter ? b.x - a.x : a.x - b.x));
  const best = [];
  for (const one of sorted) if (!best.length || (better ? one.y > best.at(-1).y : one.y < best.at(-1).y)) best.push(one);
  return { type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip", x: best.map(one => one.x), y: best.map(one => one.y), line: { color: css("--quiet"), width: 1, dash: "dot" } };
}

function traces(kind, data, metric) {
  const rows = data.rows.filter(row => isOn(row.press));
  const presses = [...new Set(rows.map(row => row.press))];
  if (kind === "distance") {
    const steps = data.metrics.map((one, index) => ({ ...one, index })).filter(one => one.distance !== null && one.name.startsWith(data.metrics[metric].name + "_at_"));
    return rows.map(row => trace(row.press, steps.filter(one => row.values[one.index] !== null).map(one => ({ x: one.distance, y: row.values[one.index], hover: hover(row, one.index, row.values[one.index]) })), "lines+markers")).filter(one => one.x.length);
  }
  const points = rows.filter(row => row[kind] !== null && row.values[metric] !== null)
    .map(row => ({ press: row.press, x: row[kind], y: row.values[metric], hover: hover(row, metric, row.values[metric]) }));
  const made = presses.map(press => trace(press, points.filter(one => one.press === press).sort((a, b) => a.x - b.x), kind === "removed" ? "lines+markers" : "markers")).filter(one => one.x.length);
  return kind === "removed" || !made.length ? made : [front(points, data.metrics[metric].better, kind === "decode"), ...made];
}

function draw() {
  for (const element of document.querySelectorAll(".plot")) {
    const data = all[element.dataset.table], kind = element.dataset.plot;
    const metric = Number(document.querySelector(`select[data-table="${element.dataset.table}"]`).value);
    const made = data.metrics.length ? traces(kind, data, metric) : [];
    element.parentElement.hidden = !made.length;
    if (!made.length) continue;
    const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
    const better = data.metrics[metric].better ? "higher is better" : "lower is better";
    Plotly.react(element, made, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 50, r: 10, t: 10, b: 40 }, hovermode: "closest",
      xaxis: { ...axis, title: { text: stage[kind] }, ...(kind === "bytes" ? { exponentformat: "SI" } : kind === "removed" ? { tickformat: ".0%" } : {}) },
      yaxis: { ...axis, title: { text: better } },
    }, { displayModeBar: false, responsive: true });
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(name === "dark"));
  button.textContent = name === "dark" ? "Light" : "Dark";
  chips.forEach(chip => { chip.querySelector(".dot").style.background = color(chip.dataset.press); });
  draw();
}

for (const select of document.querySelectorAll("select[data-table]")) {
  all[select.dataset.table].metrics.forEach((one, index) => select.add(new Option(one.name, index)));
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
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.ready = "true";
