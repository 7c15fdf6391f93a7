"use strict";
// Draws every picture in the colours of the page, lets drop-downs choose among options, and sorts tables.
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const PAPER = 680; // pixels
const chosen = {};

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(layout) {
  const axes = {};
  for (const key of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((name) => /^[xy]axis/.test(name))])) {
    axes[key] = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true, ...layout[key],
    };
  }
  return {
    autosize: true,
    margin: { l: 70, r: 30, t: 44, b: 80 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 },
    hoverlabel: { align: "left", bgcolor: colour("--shade"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12 } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...layout,
    ...axes,
  };
}

// Two panels side by side become one above the other where there is no room beside.
function stack(layout) {
  if (!layout.xaxis2 || !layout.xaxis.domain || layout.xaxis.domain[1] === 1) return;
  [["", [0.62, 1]], ["2", [0, 0.3]]].forEach(([axis, domain]) => {
    layout[`xaxis${axis}`] = { ...layout[`xaxis${axis}`], domain: [0, 1], tickangle: 0, tickfont: { size: 9 } };
    layout[`yaxis${axis}`] = { ...layout[`yaxis${axis}`], domain };
  });
}

function draw(name) {
  const option = pictures[name][chosen[name] || 0];
  const place = document.querySelector(`[data-plot="${name}"]`);
  document.querySelector(`[data-sentence="${name}"]`).textContent = option.sentence;
  const copy = JSON.parse(JSON.stringify(option));
  for (const trace of copy.data) if (trace.error_y) trace.error_y.color = trace.type === "bar" ? colour("--ink") : colour("--soft");
  if (document.documentElement.classList.contains("printing")) copy.layout.width = PAPER;
  else if (place.clientWidth < 600) stack(copy.layout);
  Plotly.react(place, copy.data, themed(copy.layout), { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] });
}

// On paper: light colours, and pictures as wide as a page of A4.
function printing(on) {
  document.documentElement.classList.toggle("printing", on);
  drawAll();
  if (!on) document.querySelectorAll(".plot").forEach((place) => Plotly.Plots.resize(place));
}

function drawAll() {
  Object.keys(pictures).forEach(draw);
}

for (const select of document.querySelectorAll("select[data-for]")) {
  select.addEventListener("change", () => {
    chosen[select.dataset.for] = Number(select.value);
    draw(select.dataset.for);
  });
}

function sortBy(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const up = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => (row.cells[column].dataset.number === undefined ? null : Number(row.cells[column].dataset.number));
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.some((row) => key(row) !== null);
  rows.sort((one, two) => {
    if (!numeric) {
      const order = one.cells[column].textContent.localeCompare(two.cells[column].textContent, "en", { numeric: true });
      return up ? order : -order;
    }
    const [a, b] = [key(one), key(two)];
    if (a === null || b === null) return (a === null) - (b === null); // what has no figure stays last, either way
    return up ? a - b : b - a;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = cell.querySelector("button");
    if (button) button.addEventListener("click", () => sortBy(table, column));
  });
}

if (Object.keys(pictures).length) {
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));
}
