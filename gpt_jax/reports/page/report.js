"use strict";
// Figures, sorting, picking of runs. All text of users is set as text, never as markup.
const figures = JSON.parse(document.getElementById("figures").textContent);
const boxes = [...document.querySelectorAll("#names input")];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const PRINT_WIDTH = 680; // pixels of CSS that a page of A4 or Letter has at least

function layoutOf(figure, width) {
  const narrow = width < 600;
  const small = { size: narrow ? 11 : 12 };
  const axis = {
    gridcolor: "#e6eaee", linecolor: "#9aa4ae", zeroline: false, automargin: true,
    ticks: "outside", tickcolor: "#9aa4ae", minexponent: 4,
  };
  const side = (given) => ({ ...axis, ...given, exponentformat: exponents(given.type),
    title: { ...given.title, standoff: 8 } });
  return {
    ...figure.layout,
    xaxis: { ...side(figure.layout.xaxis), nticks: narrow ? 5 : 10 },
    yaxis: side(figure.layout.yaxis),
    font: { family: FONT, color: "#1c2024", ...small },
    margin: { l: narrow ? 44 : 60, r: 12, t: narrow ? 10 : 32, b: 48 },
    legend: narrow
      ? { orientation: "h", y: -0.22, yanchor: "top", font: small }
      : { font: small, x: 1.02, y: 1 },
    hoverlabel: { namelength: -1 },
    hovermode: "closest",
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    dragmode: narrow ? false : "zoom", // a finger that scrolls the page must not zoom
  };
}

// 10 to a power where a power is a step of the axis; 20M where it is not.
function exponents(type) {
  return type === "log" ? "power" : "SI";
}

function draw(figure) {
  const plot = document.getElementById(figure.key);
  const setting = { responsive: true, displaylogo: false,
    displayModeBar: plot.clientWidth < 600 ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const layout = layoutOf(figure, plot.clientWidth);
  Plotly.newPlot(plot, figure.data, layout, setting).then(() => {
    plot.on("plotly_legendclick", (event) => pickFromLegend(event, false));
    plot.on("plotly_legenddoubleclick", (event) => pickFromLegend(event, true));
  });
  for (const axis of ["x", "y"]) {
    const box = plot.parentElement.querySelector(`[data-axis=${axis}]`);
    box.checked = figure.layout[`${axis}axis`].type === "log";
    box.addEventListener("change", () =>
      setAxis(plot, `${axis}axis`, box.checked ? "log" : "linear"));
  }
}

function setAxis(plot, axis, type) {
  Plotly.relayout(plot, { [`${axis}.type`]: type, [`${axis}.exponentformat`]: exponents(type),
    [`${axis}.autorange`]: true });
}

// A click in a legend is a click in the list of runs, so that figures and table agree.
function pickFromLegend(event, alone) {
  const run = event.data[event.curveNumber].meta;
  const box = boxes.find((box) => box.value === run);
  if (!box) return true; // a law, which is in this figure alone
  if (alone) {
    const wasAlone = boxes.every((other) => other.checked === (other === box));
    for (const other of boxes) other.checked = wasAlone || other === box;
  } else {
    box.checked = !box.checked;
  }
  showPicked();
  return false;
}

function showPicked() {
  const off = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
  for (const figure of figures) {
    const visible = figure.data.map((trace) => (off.has(trace.meta) ? "legendonly" : true));
    if (figure.data.some((trace) => trace.meta)) {
      Plotly.restyle(document.getElementById(figure.key), { visible });
    }
  }
  for (const row of document.querySelectorAll("tr[data-run]")) {
    row.hidden = off.has(row.dataset.run);
  }
  const count = document.getElementById("picked");
  if (count) count.textContent = `${boxes.length - off.size} of ${boxes.length}`;
}

function listRuns() {
  const find = document.getElementById("find");
  if (!find) return;
  const listed = () => boxes.filter((box) => !box.parentElement.hidden);
  const search = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const box of boxes) {
      const name = box.value.toLowerCase();
      box.parentElement.hidden = !words.every((word) => name.includes(word));
    }
  };
  find.addEventListener("input", search);
  const set = (choose) => () => { choose(listed()); showPicked(); };
  document.getElementById("all").onclick =
    set((shown) => shown.forEach((box) => (box.checked = true)));
  document.getElementById("none").onclick =
    set((shown) => shown.forEach((box) => (box.checked = false)));
  document.getElementById("only").onclick =
    set((shown) => boxes.forEach((box) => (box.checked = shown.includes(box))));
  for (const box of boxes) box.addEventListener("change", showPicked);
  search(); // a browser may have kept what was typed
}

function sortable(table) {
  const body = table.tBodies[0];
  for (const head of table.querySelectorAll("thead th")) {
    head.querySelector("button")?.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[head.cellIndex].dataset.value;
      const rows = [...body.rows].sort((a, b) => compare(value(a), value(b), up));
      body.append(...rows);
    });
  }
}

// Numbers by size, text by letters; what has no value comes last, whatever the direction.
function compare(a, b, up) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = !isNaN(a) && !isNaN(b);
  const order = numbers ? a - b : a.localeCompare(b, "en", { numeric: true });
  return up ? order : -order;
}

function fit(width) {
  for (const figure of figures) {
    const plot = document.getElementById(figure.key);
    const { legend } = layoutOf(figure, width ?? plot.clientWidth);
    Plotly.relayout(plot, { width: width ?? null, autosize: width === undefined, legend });
  }
}

figures.forEach(draw);
document.querySelectorAll("table.sortable").forEach(sortable);
listRuns();
if (boxes.some((box) => !box.checked)) showPicked();
window.addEventListener("beforeprint", () => {
  document.body.classList.add("printing"); // tables small, then smaller until they fit
  for (const table of document.querySelectorAll("table")) {
    table.style.zoom = Math.min(1, PRINT_WIDTH / table.scrollWidth);
  }
  fit(PRINT_WIDTH);
});
window.addEventListener("afterprint", () => {
  document.body.classList.remove("printing");
  for (const table of document.querySelectorAll("table")) table.style.zoom = "";
  fit();
});
