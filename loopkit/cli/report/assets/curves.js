// From the values of the page to the points of a chart.

const COLOURS = {
  light: ["#1f6fc4", "#d1600f", "#1a8a5a", "#a8327e", "#7a5ccc", "#8a6a00", "#008a9a", "#c0392b", "#566273", "#5d8a00"],
  dark: ["#6cb0ff", "#ffa057", "#58cf98", "#f083c4", "#b39dff", "#e0bd4a", "#4fd0df", "#ff8577", "#a9b4c2", "#a8d655"],
};

function colour(index) {
  const theme = document.documentElement.dataset.theme === "dark" ? "dark" : "light";
  return COLOURS[theme][index % COLOURS[theme].length];
}

function isEval(name) {
  return name.startsWith("eval/");
}

// Values that are not smoothed: each point counts by itself.
function isExact(name) {
  return isEval(name) || name === "lr" || name.startsWith("lr/") || name === "train/skipped_steps";
}

function panelOf(name, alone) {
  const last = name.split("/").pop();
  if (name === "lr" || name.startsWith("lr/")) return "Learning rate";
  if (name === "train/grad_norm") return "Gradient norm";
  if (last === "runtime" || last === "samples_per_second" || name === "train/skipped_steps") return null;
  // Of one run, names such as grad_norm/<layer> share a panel.
  if (!isEval(name) && !name.startsWith("train/")) return alone && name.includes("/") ? name.split("/")[0] : name;
  const title = last.replaceAll("_", " ");
  return title[0].toUpperCase() + title.slice(1);
}

// A metric of training and of all evaluation sets shares a panel. The panels in their order: loss, metrics of evaluations, rate, gradient norm, all others.
function panelsOf(runs, alone) {
  const panels = new Map();
  for (const run of runs)
    for (const name of Object.keys(run.curves)) {
      const panel = panelOf(name, alone);
      if (panel === null) continue;
      if (!panels.has(panel)) panels.set(panel, new Set());
      panels.get(panel).add(name);
    }
  const rank = (panel, names) =>
    panel === "Loss" ? 0 : [...names].some(isEval) ? 1 : panel === "Learning rate" ? 2 : panel === "Gradient norm" ? 3 : 4;
  return [...panels].map(([title, names]) => ({ title, names: [...names].sort((a, b) => isEval(a) - isEval(b) || a.localeCompare(b)) }))
    .sort((a, b) => rank(a.title, a.names) - rank(b.title, b.names));
}

function points(run, name, axis) {
  const curve = run.curves[name];
  if (!curve) return null;
  const along = run.axes[curve.axis][axis], xs = [], ys = [];
  for (let i = 0; i < along.length; i++) {
    const x = along[i];
    if (x == null || (xs.length && x < xs[xs.length - 1])) continue;
    if (xs.length && x === xs[xs.length - 1]) ys[ys.length - 1] = curve.value[i];
    else { xs.push(x); ys.push(curve.value[i]); }
  }
  return xs.length ? { xs, ys } : null;
}

// An exponential moving average without the pull of its start towards 0 (Kingma & Ba 2015).
function smoothed(ys, weight) {
  let sum = 0, total = 0;
  return ys.map((y) => {
    if (y == null) return y;
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function at(xs, ys, x) {
  if (!xs.length || x < xs[0] || x > xs[xs.length - 1]) return null;
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  if (xs[low] === x) return ys[low];
  if (xs[high] === x) return ys[high];
  if (ys[low] == null || ys[high] == null) return null;
  return ys[low] + ((x - xs[low]) / (xs[high] - xs[low])) * (ys[high] - ys[low]);
}

// Where all runs of a group have a value: their mean, the lowest and the highest.
function band(members) {
  const xs = [...new Set(members.flatMap((each) => each.xs))].sort((a, b) => a - b);
  const found = { xs: [], mean: [], low: [], high: [] };
  for (const x of xs) {
    const values = members.map((each) => at(each.xs, each.ys, x));
    if (values.some((value) => value == null)) continue;
    found.xs.push(x);
    found.mean.push(values.reduce((a, b) => a + b, 0) / values.length);
    found.low.push(Math.min(...values));
    found.high.push(Math.max(...values));
  }
  return found;
}

// The longest axis of a run says where a step lies.
function placeOfStep(run, step, axis) {
  let best = null;
  for (const each of run.axes) if (!best || each.step.length > best.step.length) best = each;
  if (!best) return null;
  if (axis === "step") return step;
  const xs = [], ys = [];
  best.step.forEach((x, i) => { if (best[axis][i] != null) { xs.push(x); ys.push(best[axis][i]); } });
  return at(xs, ys, Math.min(Math.max(step, xs[0]), xs[xs.length - 1]));
}
