// Tables are DataTables, plots are Plotly (`plots.js`), and what a reader chose stands in the address.
const chips = [...document.querySelectorAll(".press")];
const isOn = press => press === "none" || chips.find(chip => chip.dataset.press === press).getAttribute("aria-pressed") === "true";
const selects = [...document.querySelectorAll("select[data-table]")];

// ------------------------------------------------------------------------------------------------- the address

const chosen = () => new URLSearchParams(location.hash.slice(1));
function choose(name, values) {
  const now = chosen();
  now.delete(name);
  [values].flat().filter(one => one !== "" && one !== null).forEach(one => now.append(name, one));
  history.replaceState(null, "", `#${now}`);
}

// ------------------------------------------------------------------------------------------------------- tables

// What is missing is last in both directions. A cell's order is its number, or nothing.
const order = sign => (a, b) => (a === "") - (b === "") || (a === "" ? 0 : sign * (a - b));
Object.assign(DataTable.ext.type.order, { "figure-asc": order(1), "figure-desc": order(-1) });

const tables = [...document.querySelectorAll("table")].map((element, number) => {
  const heads = [...element.rows[0].cells], pinned = heads.length - 1;
  const those = test => heads.flatMap((head, index) => (test(head.dataset) ? [index] : []));
  const keys = heads.map(head => head.dataset.key);
  const shown = heads.map(head => head.dataset.shown !== "false");
  const first = element.dataset.ranked === "true" ? -1 : heads.findIndex(head => head.dataset.metric === "true" && head.dataset.shown === "true" && head.dataset.better !== "none");
  const best = first < 0 ? [] : [[first, heads[first].dataset.better === "true" ? "desc" : "asc"]]; // best first
  const table = new DataTable(element, {
    paging: false, info: false, autoWidth: false, order: best, orderFixed: { pre: [[pinned, "asc"]] },
    layout: { topStart: null, topEnd: element.tBodies[0].rows.length > 8 ? "search" : null },
    columnDefs: [{ targets: those(data => data.better === "true"), orderSequence: ["desc", "asc", ""] }, { targets: those(data => data.text === "false"), type: "figure" },
      { targets: [pinned, ...those(data => data.shown === "false")], visible: false }],
    language: { search: "Search" },
  });
  // DataTables reads aria-sort off the first of the sorted columns, which is the pinned one.
  const tell = () => heads.forEach(head => {
    const direction = ["asc", "desc"].find(one => head.classList.contains(`dt-ordering-${one}`));
    if (direction) head.setAttribute("aria-sort", `${direction}ending`);
    else head.removeAttribute("aria-sort");
  });
  table.on("draw", tell);
  tell();
  table.search.fixed("press", (text, data, index) => isOn(table.row(index).node().dataset.press));
  const sort = () => table.order().filter(one => one[0] !== pinned).map(([index, direction]) => `${keys[index]}:${direction}`);
  const asMade = sort();
  element.addEventListener("click", event => event.target.closest("th") && choose(`sort.${number}`, sort()));
  element.addEventListener("keyup", event => event.target.closest("th") && choose(`sort.${number}`, sort()));
  return { table, keys, shown, heads, asMade };
});

// --------------------------------------------------------------------------------------- which columns are shown

const boxes = new Map(); // key -> its box, for all tables
const menu = document.querySelector("#columns > div");
for (const { keys, heads } of tables) keys.forEach((key, index) => {
  if (!key || key === "press" || boxes.has(key)) return;
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox";
  box.value = key;
  box.addEventListener("change", () => { choose("columns", visible()); showColumns(); });
  label.append(box, ` ${heads[index].dataset.name}`);
  label.title = heads[index].title;
  menu.append(label);
  boxes.set(key, box);
});
const asMade = [...boxes.keys()].filter(key => tables.some(one => one.shown[one.keys.indexOf(key)]));
const visible = () => [...boxes].filter(([, box]) => box.checked).map(([key]) => key);
function showColumns() {
  const wanted = visible();
  tables.forEach(({ table, keys }) => keys.forEach((key, index) => {
    if (boxes.has(key) && table.column(index).visible() !== wanted.includes(key)) table.column(index).visible(wanted.includes(key));
  }));
}
document.querySelectorAll("#columns button").forEach(button => button.addEventListener("click", () => {
  choose("columns", button.dataset.set === "all" ? [...boxes.keys()] : []);
  apply();
}));

// -------------------------------------------------------------------------------------------------------- plots

function draw() {
  const value = (choice, table) => document.querySelector(`select[data-choice="${choice}"][data-table="${table}"]`).value;
  const plots = [...document.querySelectorAll(".plot")].map(element => {
    const { plot: kind, table } = element.dataset, index = Number(value("metric", table)), metric = all[table].metrics[index];
    return { element, kind, metric, made: metric ? traces(kind, all[table], index, value("amount", table), value("shown", table), isOn) : [] };
  });
  // All are shown or hidden before any is drawn: the others take the space of a hidden one.
  for (const { element, made } of plots) element.parentElement.hidden = !made.length;
  for (const select of document.querySelectorAll("select[data-choice='amount']"))
    select.parentElement.hidden = select.options.length < 3 || !plots.some(one => one.element.dataset.table === select.dataset.table && LINES.includes(one.kind) && one.made.length);
  for (const { element, kind, metric, made } of plots.filter(one => one.made.length))
    Plotly.react(element, made, layout(kind, element.dataset.axis, metric.better), { displayModeBar: false, responsive: true })
      .then(() => Plotly.Plots.resize(element));
}

for (const select of selects) {
  const { metrics, rows } = all[select.dataset.table], { choice } = select.dataset;
  if (choice === "metric") metrics.forEach((one, index) => select.add(new Option(one.name, index)));
  if (choice === "amount") {
    const amounts = [...new Set(rows.map(row => row.amount).filter(Boolean))];
    amounts.forEach(one => select.add(new Option(one, one)));
    if (rows.length > 8 && amounts.length) select.value = amounts[0]; // more lines than one can tell apart
  }
  if (choice === "shown") {
    const isMany = new Set(rows.map(row => row.press)).size > 9;
    select.parentElement.hidden = !isMany;
    select.value = isMany ? "leading" : "all";
  }
  select.dataset.asMade = select.value;
  select.addEventListener("change", () => {
    const name = choice === "metric" ? metrics[Number(select.value)].name : select.value;
    choose(`${choice}.${select.dataset.table}`, name || "all runs");
    draw();
  });
}

// ------------------------------------------------------------------------------------- what the address asks for

function theme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(name === "dark"));
  button.textContent = name === "dark" ? "Light" : "Dark";
  chips.forEach(({ firstElementChild: dot, dataset }) => {
    dot.style.color = color(dataset.press);
    dot.textContent = styles[dataset.press].glyph;
  });
  draw();
}

function apply() {
  const asked = chosen(), columns = asked.getAll("columns");
  chips.forEach(chip => chip.setAttribute("aria-pressed", String(!asked.getAll("off").includes(chip.dataset.press))));
  boxes.forEach((box, key) => (box.checked = (columns.length ? columns : asMade).includes(key)));
  showColumns();
  for (const select of selects) {
    const { choice, table } = select.dataset, wanted = asked.get(`${choice}.${table}`);
    const value = choice === "metric" ? String(all[table].metrics.findIndex(one => one.name === wanted)) : wanted === "all runs" ? "" : wanted;
    select.value = select.dataset.asMade;
    if (wanted !== null && [...select.options].some(one => one.value === value)) select.value = value;
  }
  tables.forEach(({ table, keys, asMade }, number) => {
    const wanted = asked.has(`sort.${number}`) ? asked.getAll(`sort.${number}`) : asMade;
    const pairs = wanted.map(one => [keys.indexOf(one.slice(0, one.lastIndexOf(":"))), one.slice(one.lastIndexOf(":") + 1)]);
    table.order(pairs.filter(([index, direction]) => index >= 0 && ["asc", "desc"].includes(direction))).draw();
  });
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  theme(["dark", "light"].includes(asked.get("theme")) ? asked.get("theme") : system);
}

for (const chip of chips) chip.addEventListener("click", () => {
  chip.setAttribute("aria-pressed", String(!isOn(chip.dataset.press)));
  choose("off", chips.map(one => one.dataset.press).filter(press => !isOn(press)));
  tables.forEach(one => one.table.draw());
  draw();
});
document.getElementById("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  choose("theme", name);
  theme(name);
});
document.addEventListener("click", event => event.target.closest("#columns") || document.getElementById("columns").removeAttribute("open"));
// Paper is white whatever the screen is.
let onScreen;
addEventListener("beforeprint", () => { onScreen = document.documentElement.dataset.theme; theme("light"); });
addEventListener("afterprint", () => theme(onScreen));
addEventListener("hashchange", apply);
apply();
document.documentElement.dataset.ready = "true";
