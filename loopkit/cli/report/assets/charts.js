// The charts: uPlot with a list of values at the pointer, and marks.

const charts = [];

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What a panel draws: lines with their points, and bands between two of them.
function linesOf(panel, runs, view) {
  const lines = [], bands = [];
  const mixed = panel.names.some(isEval) && panel.names.some((name) => !isEval(name));
  const several = view.total > 1;
  const groups = view.grouped ? groupsOf(runs) : runs.map((run) => [run]);
  for (const [order, group] of groups.entries()) {
    panel.names.forEach((name, which) => {
      const members = group.map((run) => points(run, name, view.axis)).filter(Boolean);
      if (!members.length) return;
      const hue = several ? group[0].hue : which;
      const label = several
        ? (view.grouped ? groupName(group) : group[0].name) + (panel.names.length > 1 ? ` ${name}` : "") : name;
      const weight = isExact(name) ? 0 : view.smoothing;
      const eased = members.map((each) => ({ xs: each.xs, ys: weight ? smoothed(each.ys, weight) : each.ys }));
      const base = { name, hue, label, run: group[0], dashed: several && mixed && isEval(name) };
      if (view.grouped && members.length > 1) {
        const found = band(eased);
        const first = lines.length;
        lines.push({ ...base, xs: found.xs, ys: found.mean, thick: true, dots: isEval(name) && found.xs.length < 60, low: found.low, high: found.high });
        lines.push({ ...base, xs: found.xs, ys: found.low, hidden: true }, { ...base, xs: found.xs, ys: found.high, hidden: true });
        bands.push({ high: first + 2, low: first + 1, hue });
        return;
      }
      if (weight) lines.push({ ...base, xs: members[0].xs, ys: members[0].ys, faint: true });
      lines.push({ ...base, xs: eased[0].xs, ys: eased[0].ys, dots: isEval(name) && eased[0].xs.length < 60 });
    });
  }
  return { lines, bands };
}

function marksOf(panel, runs, view) {
  const marks = [];
  for (const run of runs) {
    for (const attempt of (run.attempts || []).slice(1))
      marks.push({ kind: "resume", run, x: placeOfStep(run, attempt.from_step, view.axis) });
    const skipped = run.curves["train/skipped_steps"];
    if (skipped && panel.title === "Loss")
      skipped.value.forEach((count, i) => {
        if (count > 0) marks.push({ kind: "skipped", run, x: run.axes[skipped.axis][view.axis][i] });
      });
    if (run.best && panel.names.includes(run.monitor.name) && !view.grouped) {
      const line = points(run, run.monitor.name, view.axis);
      const curve = run.curves[run.monitor.name];
      const place = curve ? run.axes[curve.axis].step.indexOf(run.best.step) : -1;
      if (line && place >= 0)
        marks.push({ kind: "best", run, x: run.axes[curve.axis][view.axis][place], y: run.best.value });
    }
  }
  return marks.filter((mark) => mark.x != null);
}

function drawMarks(plot, marks, view) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio || 1;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 8 * ratio, bbox.top - 8 * ratio, bbox.width + 16 * ratio, bbox.height + 16 * ratio);
  ctx.clip();
  for (const mark of marks) {
    const x = plot.valToPos(mark.x, "x", true);
    const hue = view.total > 1 ? colour(mark.run.hue) : css("--mark");
    if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
    if (mark.kind === "resume") {
      ctx.strokeStyle = hue; ctx.lineWidth = 1.2 * ratio; ctx.setLineDash([4 * ratio, 3 * ratio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    } else if (mark.kind === "skipped") {
      const foot = bbox.top + bbox.height;
      ctx.fillStyle = css("--bad"); ctx.beginPath();
      ctx.moveTo(x, foot - 9 * ratio); ctx.lineTo(x - 5 * ratio, foot); ctx.lineTo(x + 5 * ratio, foot); ctx.fill();
    } else {
      if (view.log && mark.y <= 0) continue;
      star(ctx, x, plot.valToPos(mark.y, "y", true), 8 * ratio, view.total > 1 ? hue : css("--good"));
    }
  }
  ctx.restore();
}

function star(ctx, x, y, radius, hue) {
  ctx.beginPath();
  for (let i = 0; i < 10; i++) {
    const angle = -Math.PI / 2 + (i * Math.PI) / 5, size = i % 2 ? radius * 0.45 : radius;
    ctx.lineTo(x + size * Math.cos(angle), y + size * Math.sin(angle));
  }
  ctx.closePath();
  ctx.setLineDash([]);
  ctx.fillStyle = hue; ctx.strokeStyle = css("--card"); ctx.lineWidth = 2;
  ctx.stroke(); ctx.fill();
}

const AXIS_TITLE = { step: "step", epoch: "epoch", time: "time" };

function axisText(view, value) {
  if (value == null) return "";
  return view.axis === "time" ? duration(value) : view.axis === "step" ? whole(value) : String(Number(value.toFixed(2)));
}

function buildChart(panel, runs, view, wide) {
  const box = h("div", { class: wide ? "chart wide" : "chart", "data-panel": panel.title });
  const { lines, bands } = linesOf(panel, runs, view);
  if (!lines.length) return null;
  const marks = marksOf(panel, runs, view);
  const place = h("div", { class: "plot" });
  box.append(h("h3", {}, panel.title), keysOf(lines, view), place);
  const tables = lines.map((line) => [line.xs, view.log ? line.ys.map((y) => (y > 0 ? y : null)) : line.ys]);
  const data = uPlot.join(tables);
  const series = [{}, ...lines.map((line) => ({
    label: line.label,
    stroke: () => (line.hidden ? "transparent" : colour(line.hue) + (line.faint ? "45" : "")),
    width: line.thick ? 2 : line.faint ? 1 : 1.6,
    dash: line.dashed ? [6, 4] : undefined,
    points: { show: Boolean(line.dots), size: 6, fill: () => colour(line.hue) },
    spanGaps: true,
  }))];
  const axis = { stroke: () => css("--faint"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const tip = h("div", { class: "tip", hidden: true });
  const options = {
    width: 300, height: 200,
    series,
    bands: bands.map((each) => ({ series: [each.high + 1, each.low + 1], fill: () => colour(each.hue) + "2e" })),
    legend: { show: false },
    cursor: {
      sync: { key: "runs" }, drag: { x: true, y: false },
      points: { show: (plot, index) => !lines[index - 1].hidden && !lines[index - 1].faint && undefined, size: 7 },
      dataIdx: (plot, index, hovered) => nearest(plot.data, index, hovered),
    },
    scales: { x: { time: false }, y: { distr: view.log ? 3 : 1, range: view.log ? undefined : rangeOf } },
    axes: [
      { ...axis, values: (plot, ticks) => ticks.map((value) => axisText(view, value)), space: 70, size: 30, incrs: view.axis === "time" ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800] : undefined },
      { ...axis, size: 52, values: (plot, ticks) => ticksText(ticks) },
    ],
    hooks: {
      draw: [(plot) => drawMarks(plot, marks, view)],
      setCursor: [(plot) => showTip(plot, tip, lines, view, box)],
    },
  };
  const chart = new uPlot(options, data, place);
  chart.over.append(tip);
  chart.over.addEventListener("mouseenter", () => { box.dataset.hover = "1"; });
  chart.over.addEventListener("mouseleave", () => { delete box.dataset.hover; tip.hidden = true; });
  touches(chart);
  const resize = () => {
    const { width, height } = place.getBoundingClientRect();
    if (width > 40) chart.setSize({ width: Math.floor(width), height: Math.floor(height) });
  };
  const observer = new ResizeObserver(resize);
  observer.observe(place);
  charts.push({ chart, observer, panel, lines });
  return box;
}

// A finger that moves sideways shows the values; one that moves up or down scrolls the page.
function touches(chart) {
  chart.over.style.touchAction = "pan-y";
  const move = (event) => {
    const touch = event.touches[0], rect = chart.over.getBoundingClientRect();
    chart.over.dispatchEvent(new MouseEvent("mouseenter"));
    chart.setCursor({ left: touch.clientX - rect.left, top: touch.clientY - rect.top });
  };
  chart.over.addEventListener("touchstart", move, { passive: true });
  chart.over.addEventListener("touchmove", move, { passive: true });
}

function rangeOf(plot, low, high) {
  if (low == null || high == null) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 - (low === 0 ? room / 3 : 0) : low - room, high + room];
}

// The nearest place at which this line has a value.
function nearest(data, line, hovered) {
  if (hovered == null || data[line][hovered] != null) return hovered;
  const xs = data[0], ys = data[line];
  let left = hovered, right = hovered;
  while (left > 0 && ys[left] == null) left--;
  while (right < ys.length - 1 && ys[right] == null) right++;
  const has = (place) => ys[place] != null;
  if (!has(left) && !has(right)) return null;
  if (!has(left)) return right;
  if (!has(right)) return left;
  return xs[hovered] - xs[left] <= xs[right] - xs[hovered] ? left : right;
}

function showTip(plot, tip, lines, view, box) {
  const { left, top, idx } = plot.cursor;
  if (!box.dataset.hover || idx == null || left < 0) { tip.hidden = true; return; }
  const rows = [];
  lines.forEach((line, i) => {
    if (line.hidden || line.faint) return;
    const place = plot.cursor.idxs[i + 1];
    const value = place == null ? null : plot.data[i + 1][place];
    if (value == null) return;
    const spread = line.low ? ` (${number(line.low[line.xs.indexOf(plot.data[0][place])])} … ${number(line.high[line.xs.indexOf(plot.data[0][place])])})` : "";
    rows.push(h("div", {}, h("span", { class: "swatch", style: { background: colour(line.hue) } }),
      h("span", { class: "name" }, line.label), h("span", { class: "value" }, number(value) + spread)));
  });
  const unit = view.axis === "time" ? "" : `${AXIS_TITLE[view.axis]} `;
  tip.replaceChildren(h("b", {}, unit + axisText(view, plot.data[0][idx])), ...rows.slice(0, 14));
  tip.hidden = false;
  const width = tip.offsetWidth, room = plot.over.clientWidth;
  tip.style.left = `${left + 16 + width > room ? Math.max(-50, left - width - 14) : left + 16}px`;
  tip.style.top = `${Math.max(-30, Math.min(top - 10, plot.over.clientHeight - tip.offsetHeight))}px`;
}

function keysOf(lines, view) {
  const several = view.total > 1, seen = new Set(), keys = [];
  for (const line of lines) {
    const text = several ? line.name : line.label;
    if (line.hidden || line.faint || seen.has(text)) continue;
    seen.add(text);
    const hue = several ? css("--faint") : colour(line.hue);
    keys.push(h("span", { class: "key" }, h("span", { class: line.dashed ? "stroke dashed" : "stroke", style: { borderColor: hue } }), text));
  }
  return h("div", { class: "keys" }, keys);
}

// Which colour is which run, or which group of seeds.
function runKeys(runs, view) {
  if (view.total < 2) return [];
  return (view.grouped ? groupsOf(runs) : runs.map((run) => [run])).map((group) => h("span", { class: "key" },
    h("span", { class: "swatch", style: { background: colour(group[0].hue) } }), view.grouped ? groupName(group) : group[0].name));
}

// A new row must not undo a zoom: the part that is shown, by panel.
function zooms() {
  const found = {};
  for (const { chart, panel } of charts) {
    const { min, max } = chart.scales.x, xs = chart.data[0];
    if (xs.length && (min > xs[0] || max < xs[xs.length - 1])) found[panel.title] = { min, max };
  }
  return found;
}

function clearCharts() {
  for (const { chart, observer } of charts.splice(0)) { observer.disconnect(); chart.destroy(); }
}

const MOST_PANELS = 12;

function drawCharts(runs, view) {
  const kept = view.drawnAxis === view.axis ? zooms() : {};
  view.drawnAxis = view.axis;
  clearCharts();
  const panels = panelsOf(runs, view.total === 1);
  const first = panels.slice(0, MOST_PANELS), rest = panels.slice(MOST_PANELS);
  const boxes = first.map((panel) => buildChart(panel, runs, view, panel.title === "Loss")).filter(Boolean);
  if (rest.length) {
    const inner = h("div", { class: "charts" });
    boxes.push(h("details", { class: "more", ontoggle: (event) => {
      if (event.target.open && !inner.childNodes.length)
        inner.append(...rest.map((panel) => buildChart(panel, runs, view, false)).filter(Boolean));
    } }, h("summary", {}, `${rest.length} more`), inner));
  }
  for (const { chart, panel } of charts) if (kept[panel.title]) chart.setScale("x", kept[panel.title]);
  document.getElementById("charts").replaceChildren(...(boxes.length ? boxes : [h("p", { class: "note" }, "Nothing was logged yet.")]));
  document.getElementById("keys").replaceChildren(...runKeys(runs, view));
  const kinds = new Set(panels.flatMap((panel) => marksOf(panel, runs, view).map((mark) => mark.kind)));
  const texts = { best: "★ best", resume: "┆ resumed", skipped: "▲ skipped steps" };
  const marks = Object.keys(texts).filter((kind) => kinds.has(kind)).map((kind) => texts[kind]);
  if (view.grouped) marks.unshift("line: mean of the seeds, band: lowest to highest");
  const thin = runs.some((run) => Object.values(run.curves).some((curve) => curve.value.length < curve.count));
  if (thin) marks.push("of long curves, the lowest and highest value of each stretch are drawn");
  document.getElementById("marks").textContent = [...marks, "Drag to zoom, double click to see all."].join("  ·  ");
}
