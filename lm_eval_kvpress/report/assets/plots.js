// What the plots show: rows of a table to Plotly's traces and layouts. `page.js` says which, and draws them.
const all = JSON.parse(document.getElementById("points").textContent);
const styles = JSON.parse(document.getElementById("styles").textContent);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const LINES = ["distance", "position", "place"]; // plots with a line per run
const NUM_LEADING = 6;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = press => styles[press].color || css("--ink");
// Plotly reads a subset of HTML in names and hover texts.
const plain = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const percent = share => (share === null ? "-" : `${(100 * share).toFixed(1)} %`);
const stem = name => name.replace(/_at_\d+/, "");

function hover(row, value, bounds, ofWhat = "to baseline") {
  const range = bounds ? `<br>${ofWhat}: ${bounds.map(one => one.toPrecision(3)).join(" to ")}` : "";
  const doubt = row.void ? `<br>not to be trusted: ${plain(row.void)}` : "";
  return `<b>${plain(row.press)}</b> ${plain(row.arguments)}<br>${value.toPrecision(4)}${range}<br>removed ${percent(row.removed)}, kept ${percent(row.kept)}${doubt}<extra></extra>`;
}

function trace(points, mode, dash = "solid") {
  const press = points[0].row.press;
  return { type: "scatter", mode, name: plain(press), showlegend: false, x: points.map(one => one.x), y: points.map(one => one.y),
    hovertemplate: points.map(one => one.hover), line: { color: color(press), width: 1.5, dash },
    marker: { color: color(press), symbol: points.map(one => styles[press].symbol + (one.row.void ? "-open" : "")), size: press === "none" ? 12 : 9 } };
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

// The presses that lead by the mean of a metric over their runs.
function leading(rows, metric, better) {
  const known = rows.filter(row => row.press !== "none" && !row.void && row.values[metric] !== null);
  const mean = [...new Set(known.map(row => row.press))].map(press => {
    const own = known.filter(row => row.press === press);
    return [press, own.reduce((sum, row) => sum + row.values[metric], 0) / own.length];
  });
  return mean.sort((a, b) => (better ? b[1] - a[1] : a[1] - b[1])).slice(0, NUM_LEADING).map(one => one[0]);
}

function traces(kind, data, metric, amount, shown, isOn) {
  let rows = data.rows.filter(row => isOn(row.press));
  if (shown === "leading" && data.metrics[metric].better !== null) {
    const chosen = ["none", ...leading(rows, metric, data.metrics[metric].better)];
    rows = rows.filter(row => chosen.includes(row.press));
  }
  if (LINES.includes(kind)) {
    const chosen = rows.filter(row => row.press === "none" || !amount || row.amount === amount);
    return lines(chosen, row => ({ distance: distances, position: positions, place: places })[kind](row, data, metric));
  }
  const base = data.rows.find(row => row.is_baseline)?.values[metric] ?? 0;
  const points = rows.filter(row => row[kind] !== null && row.values[metric] !== null).map(row => {
    const range = row.bounds[metric]?.map(one => base + one), said = data.metrics[metric].own ? [range, "95 %"] : [row.bounds[metric]];
    return { row, x: kind === "bytes" ? row.bytes / 2 ** 20 : row[kind], y: row.values[metric], range, hover: hover(row, row.values[metric], ...said) };
  });
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
