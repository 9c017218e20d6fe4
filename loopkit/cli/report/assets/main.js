// What the page shows, and what changes it.

const hues = new Map(); // a run keeps its colour when others come
let page = prepared(JSON.parse(document.getElementById("data").textContent));
const view = {
  axis: "step", smoothing: 0, log: false, grouped: false, hidden: new Set(), order: { column: null, falling: false },
  chosen: null, total: page.runs.length,
};
const orders = new Map();

function prepared(values) {
  values.runs.forEach((run, index) => {
    if (!hues.has(run.path)) hues.set(run.path, hues.size);
    run.index = index;
    run.hue = hues.get(run.path);
  });
  return values;
}

function ordersOf(run) {
  if (!orders.has(run.path)) orders.set(run.path, { evaluations: { column: null, falling: false }, checkpoints: { column: null, falling: false } });
  return orders.get(run.path);
}

function shownRuns() {
  return page.runs.filter((run) => !view.hidden.has(run.path));
}

function groupsOf(runs) {
  const shown = new Set(runs.map((run) => run.index));
  return page.groups.map((group) => group.filter((i) => shown.has(i)).map((i) => page.runs[i])).filter((group) => group.length);
}

// A group bears the settings in which it differs from the others.
function groupName(group) {
  const names = page.differing.filter((name) => !/^(task\.)?(data_)?seed$/.test(name) && name !== "checkpoint");
  const text = names.map((name) => `${name} ${setting(group[0].settings[name])}`).join(", ");
  return `${text || group[0].name} (${group.length} seed${group.length > 1 ? "s" : ""})`;
}

function theme(wanted) {
  const chosen = wanted || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = chosen;
}

function segments(label, choices, current, choose) {
  return h("div", { class: "segments", role: "group", "aria-label": label }, Object.entries(choices).map(([value, text]) =>
    h("button", { type: "button", "aria-pressed": String(value === current), "data-value": value, onclick: () => choose(value) }, text)));
}

function drawControls() {
  const hasAxis = (axis) => page.runs.some((run) => run.axes.some((each) => each[axis].some((value) => value != null)));
  const axes = Object.fromEntries(["step", "epoch", "time"].filter(hasAxis).map((axis) => [axis, AXIS_TITLE[axis]]));
  const output = h("output", {}, view.smoothing.toFixed(2));
  const slider = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smoothing, "aria-label": "smoothing",
    oninput: (event) => { view.smoothing = Number(event.target.value); output.textContent = view.smoothing.toFixed(2); soon(); } });
  const seeds = page.groups.some((group) => group.length > 1);
  fill("controls",
    Object.keys(axes).length > 1 ? segments("axis", axes, view.axis, (axis) => { view.axis = axis; drawControls(); redraw(); }) : null,
    h("label", {}, "smoothing", slider, output),
    h("button", { type: "button", id: "log", "aria-pressed": String(view.log), onclick: () => { view.log = !view.log; drawControls(); redraw(); } }, "log scale"),
    seeds ? h("button", { type: "button", id: "seeds", "aria-pressed": String(view.grouped), onclick: () => { view.grouped = !view.grouped; drawControls(); redraw(); } }, "mean of seeds") : null);
}

let waiting = 0;
function soon() {
  if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; redraw(); });
}

function redraw() {
  const open = [...document.querySelectorAll(".more[open]")].length > 0;
  drawCharts(shownRuns(), view);
  if (open) document.querySelectorAll(".more").forEach((each) => { each.open = true; });
}

function drawHeader() {
  const several = page.runs.length > 1, run = page.runs[0];
  const tasks = [...new Set(page.runs.map((each) => each.task).filter(Boolean))];
  const night = h("button", { type: "button", "aria-label": "light or dark", onclick: () => {
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    drawAll();
  } }, "◐");
  const title = several ? `${tasks.join(", ") || "Runs"}: ${page.runs.length} runs compared` : `${run.task || "Run"}: ${run.name}`;
  fill("header", h("div", { class: "title head" }, h("h1", {}, title), h("div", { class: "controls" }, several ? null : status(run), night)),
    several ? leaders() : [run.reason ? h("p", { class: "note" }, run.reason) : null, ...headerOf(page, run), warningsOf(run)]);
}

// The best run by each monitor, in a line.
function leaders() {
  const names = [...new Set(page.runs.filter((run) => run.best).map((run) => run.monitor.name))];
  return names.map((name) => {
    const ranked = page.runs.filter((run) => run.best && run.monitor.name === name);
    const sign = ranked[0].monitor.mode === "min" ? 1 : -1;
    const best = ranked.reduce((a, b) => (sign * a.best.value <= sign * b.best.value ? a : b));
    return h("p", { class: "note" }, "Best ", h("code", {}, name), `: ${number(best.best.value)} by `, h("b", {}, best.name), ` at step ${whole(best.best.step)}`);
  });
}

// The details of one run; of several, of the one that is chosen.
function drawOne() {
  const several = page.runs.length > 1;
  const run = page.runs.find((each) => each.path === view.chosen) || page.runs[0];
  run.orders = ordersOf(run);
  const parts = [attemptsOf(run), evaluationsOf(run), picturesOf(run), checkpointsOf(run)].filter(Boolean);
  const select = h("select", { id: "chosen", "aria-label": "run", onchange: (event) => { view.chosen = event.target.value; drawOne(); } },
    page.runs.map((each) => h("option", { value: each.path, selected: each === run }, each.name)));
  fill("one", several ? [h("div", { class: "title", style: { margin: "0" } }, h("h2", {}, "One run"), select),
    h("div", { style: { margin: "10px 0 0" } }, status(run), run.reason ? ` ${run.reason}` : ""), ...headerOf(page, run), warningsOf(run), ...parts]
    : parts);
  if (!several && parts.length) parts[0].style.marginTop = "0";
}

function drawAll() {
  view.total = page.runs.length;
  const several = page.runs.length > 1;
  drawHeader();
  fill("runs", several ? runsOf(page, page.runs, view, () => { drawAll(); }) : []);
  drawControls();
  redraw();
  fill("time", timeOf(shownRuns(), several));
  fill("settings", settingsOf(page, page.runs));
  drawOne();
  const made = new Date(page.made * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  fill("footer", page.live ? "Live: new values appear as they are logged." : `Made ${made} by loopkit ${page.version}.`);
}

async function watch() {
  let tag = null;
  for (;;) {
    await new Promise((done) => setTimeout(done, 1000));
    if (document.querySelector("[data-hover]")) continue; // someone reads the values
    try {
      const answer = await fetch("/data", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        page = prepared(await answer.json());
        const scroll = scrollY;
        drawAll();
        scrollTo(0, scroll);
      }
    } catch {
      document.getElementById("footer").textContent = "The program that served this page has ended. What it showed last stays.";
    }
  }
}

theme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { theme(); drawAll(); });
drawAll();
if (page.live) watch();
