// Everything but the curves.

function status(run) {
  return h("span", { class: `status ${run.status}` }, run.status);
}

function copied(text) {
  const button = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return button;
}

function command(title, text) {
  return text ? h("div", { class: "command" }, h("span", {}, title), h("code", { tabindex: "0" }, text), copied(text)) : null;
}

function commitText(run) {
  if (!run.commit) return null;
  const branch = run.commit.branch && run.commit.branch !== "(detached)" ? ` on ${run.commit.branch}` : "";
  return `${run.commit.id.slice(0, 10)}${branch}${run.commit.clean ? "" : ", with changes"}`;
}

function deviceText(run) {
  if (!run.devices) return null;
  const count = run.devices.ranks > 1 ? `${run.devices.ranks} × ` : "";
  return `${count}${run.devices.device}${run.devices.name ? `, ${run.devices.name}` : ""}`;
}

function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter(([, value]) => value != null && value !== DASH && value !== "")
    .map(([name, value]) => h("div", { class: String(value).length > 60 ? "broad" : null }, h("dt", {}, name), h("dd", {}, value))));
}

function headerOf(page, run) {
  const done = run.total_steps ? `${whole(run.step)} of ${whole(run.total_steps)}` : whole(run.step);
  const best = run.best ? `${number(run.best.value)} at step ${whole(run.best.step)}` : null;
  const sizes = run.parameters ? `${whole(run.parameters.total)}${run.parameters.trainable === run.parameters.total ? "" : `, ${whole(run.parameters.trainable)} trained`}` : null;
  const versions = run.versions ? Object.entries(run.versions).map(([name, value]) => `${name} ${value}`).join(", ") : null;
  return [
    facts([
      ["started", moment(run.started)],
      ["lasted", run.seconds == null ? null : `${duration(run.seconds)}${run.evaluating > 1 ? `, of which evaluation ${duration(run.evaluating)}` : ""}`],
      ["steps", done],
      [`best ${run.monitor.name}`, best],
      ["device", deviceText(run)],
      ["precision", run.precision],
      ["strategy", run.strategy],
      ["parameters", sizes],
      ["peak memory", run.peak_memory ? bytes(run.peak_memory) : null],
      ["host", run.host],
      ["commit", commitText(run)],
      ["versions", versions],
      ["folder", run.path],
    ]),
    command("command", run.command),
    command("continue", run.commands.continue),
    command("evaluate", run.commands.evaluate),
  ];
}

function warningsOf(run) {
  const seen = new Map();
  for (const attempt of run.attempts)
    for (const each of attempt.warnings || []) seen.set(each.text, each);
  if (!seen.size) return null;
  return h("div", { class: "warnings" }, h("b", {}, `${seen.size} warning${seen.size > 1 ? "s" : ""}`), [...seen.keys()].map((text) => h("p", {}, text)));
}

function attemptsOf(run) {
  if (run.attempts.length < 2) return null;
  return h("section", {}, h("h2", {}, "Attempts"), plain(["", "started", "steps", "ended by", "commit", "host"],
    run.attempts.map((attempt, i) => [String(i + 1), moment(attempt.started), `${whole(attempt.from_step)} to ${whole(attempt.to_step)}`,
      h("span", {}, status(attempt), attempt.reason ? ` ${attempt.reason}` : ""), commitText(attempt) || DASH, attempt.host || DASH]), { wrap: [3] }));
}

// ---- time of a step ----

const PARTS = [["data", "waiting for data"], ["compute", "forward and backward"], ["update", "optimizer"], ["framework", "loopkit"]];
const MUCH_WAITING = 0.1;

function limitText(timings) {
  const share = Object.fromEntries(PARTS.map(([part]) => [part, (timings[part] || 0) / timings.step]));
  if (share.data > MUCH_WAITING)
    return { high: true, text: `Training waits for data for ${percent(share.data)} of the time: a Loader with more num_workers reads ahead.` };
  const [part, title] = PARTS.reduce((a, b) => (share[a[0]] >= share[b[0]] ? a : b));
  const advice = part === "update" ? ": try a fused optimizer" : part === "framework" ? ": the steps are very short" : "";
  return { high: false, text: `Limited by ${title}, ${percent(share[part])} of a step${advice}.` };
}

function timeOf(runs, several) {
  const measured = runs.filter((run) => run.timings && run.timings.step);
  if (!measured.length) return [];
  const longest = Math.max(...measured.map((run) => run.timings.step));
  const rows = measured.flatMap((run) => {
    const limit = limitText(run.timings);
    const width = Math.max(18, (100 * run.timings.step) / longest);
    const bar = h("div", { class: "bar", style: { width: `${width}%` }, role: "img", "aria-label": limit.text },
      PARTS.map(([part, title]) => {
        const share = (run.timings[part] || 0) / run.timings.step;
        const text = `${title}: ${micros(run.timings[part])}, ${percent(share)}`;
        return h("div", { class: part + (part === "data" && share > MUCH_WAITING ? " high" : ""), style: { width: `${100 * share}%` }, title: text }, share * width > 13 ? percent(share) : "");
      }));
    return [h("div", { class: "name" }, several ? h("span", {}, swatch(run), run.name, h("br"), micros(run.timings.step)) : micros(run.timings.step)), bar,
      h("div", { class: `note limit${limit.high ? " high" : ""}` }, limit.text)];
  });
  const keys = h("div", { class: "keys" }, PARTS.map(([part, title]) => h("span", { class: "key" }, h("span", { class: "bar" , style: { width: "11px", height: "11px", borderRadius: "3px" } }, h("div", { class: part, style: { width: "100%" } })),
    several ? title : `${title} ${micros(measured[0].timings[part])}`)));
  return [h("div", { class: "title" }, h("h2", {}, "Time of a step"), keys), h("div", { class: "bars" }, rows),
    h("p", { class: "note" }, "Mean over the steps of the last attempt, by the clock of rank 0. Waiting for data is red where it takes more than a tenth.")];
}

// ---- settings ----

function swatch(run) {
  return h("span", { class: "swatch", style: { background: colour(run.hue), marginRight: "8px" } });
}

function settingsOf(page, runs) {
  const several = runs.length > 1, defaults = page.defaults;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const argument = (name) => !(name in defaults) || name.startsWith("task.");
  const changed = (name) => argument(name) || runs.some((run) => name in run.settings && setting(run.settings[name]) !== setting(defaults[name]));
  const differs = new Set(page.differing);
  const first = names.filter((name) => (several ? differs.has(name) : changed(name)));
  const second = several ? names.filter((name) => !differs.has(name) && changed(name)) : [];
  const rest = names.filter((name) => !first.includes(name) && !second.includes(name));
  first.sort((a, b) => argument(b) - argument(a));
  const table = (which) => plain(
    ["", ...(several ? runs.map((run) => h("span", {}, swatch(run), run.name)) : ["value"]), "default"],
    which.map((name) => [h("code", {}, name), ...runs.map((run) => {
      const value = setting(run.settings[name]);
      const odd = !argument(name) && value !== setting(defaults[name]);
      return h("td", { class: `wrap${odd || differs.has(name) ? " changed" : ""}` }, value);
    }), argument(name) ? h("span", { class: "note" }, "argument of the task") : setting(defaults[name])]));
  const blocks = [h("div", { class: "title" }, h("h2", {}, several ? "What differs" : "Arguments and changed options"))];
  blocks.push(first.length ? table(first) : h("p", { class: "note" }, several ? "All settings are equal." : "Every option has its default."));
  if (second.length) blocks.push(h("details", { open: runs.length < 2 }, h("summary", { class: "note" }, `${second.length} arguments and changed options that are equal`), table(second)));
  if (rest.length) blocks.push(h("details", {}, h("summary", { class: "note" }, `${rest.length} options with their defaults`), table(rest)));
  return blocks;
}

// ---- evaluations, matrices, checkpoints of one run ----

function evaluationsOf(run) {
  if (!run.evaluations.length) return null;
  const names = [...new Set(run.evaluations.flatMap((row) => Object.keys(row)))].filter((name) => name !== "step").sort((a, b) => rankOf(a, run) - rankOf(b, run) || a.localeCompare(b));
  const best = run.best && run.best.step;
  const isBest = (row) => row.step === best && run.monitor.name in row;
  const columns = [{ title: "step", value: (row) => row.step, show: (row) => whole(row.step), number: true },
    ...names.map((name) => ({ title: name.replace(/^eval\//, "").replace("samples_per_second", "samples/s"), value: (row) => row[name] ?? null, show: (row) => amount(name, row[name]), number: true })),
    { title: "", value: (row) => (isBest(row) ? 1 : 0), show: (row) => (isBest(row) ? `★ best ${run.monitor.name}` : "") }];
  return h("section", {}, h("h2", {}, `Evaluations`), sortable(columns, run.evaluations, { row: (row) => ({ class: isBest(row) ? "best" : null }), order: run.orders.evaluations }));
}

function rankOf(name, run) {
  return name === run.monitor.name ? 0 : name.endsWith("/loss") ? 1 : /\/(runtime|samples_per_second)$/.test(name) ? 3 : 2;
}

const MOST_NUMBERS = 16;

// The names of the classes, where the run has one for each; else their numbers.
function namesOf(run, size) {
  const known = run.class_names || [];
  return known.length === size ? known : Array.from({ length: size }, (_, i) => String(i));
}

function matrixOf(each, run) {
  const size = each.value.length, names = namesOf(run, size), longest = Math.max(...names.map((name) => name.length));
  const upright = longest > 3; // names of columns that do not fit their cells
  const room = Math.min(560, document.documentElement.clientWidth - 90) - (upright ? Math.min(132, 7 * longest) : 0);
  const cell = Math.max(5, Math.min(40, Math.floor(room / size) - 1));
  const sums = each.value.map((row) => row.reduce((a, b) => a + Math.max(0, b), 0) || 1);
  const labelled = size <= 40;
  const grid = h("div", { class: "matrix", style: { gridTemplateColumns: `${labelled ? "max-content " : ""}repeat(${size}, ${cell}px)` } });
  const dark = document.documentElement.dataset.theme === "dark";
  each.value.forEach((row, i) => {
    if (labelled) grid.append(h("div", { class: "label row", title: names[i] }, names[i]));
    row.forEach((count, j) => {
      const share = Math.max(0, count) / sums[i];
      // Right answers are blue, wrong ones orange, so that a faint mistake still shows.
      const hue = i === j ? "47,111,179" : "224,108,26", depth = count > 0 ? 0.07 + 0.93 * Math.sqrt(share) : 0;
      grid.append(h("div", { title: `true ${names[i]}, predicted ${names[j]}: ${number(count)} (${percent(share)} of true ${names[i]})`,
        style: { background: count > 0 ? `rgba(${hue},${depth.toFixed(3)})` : "var(--soft)", color: depth > (dark ? 0.45 : 0.6) ? "#fff" : "inherit" } },
        size <= MOST_NUMBERS && cell >= 22 && count ? (Number.isInteger(count) ? String(count) : count.toFixed(2)) : ""));
    });
  });
  if (labelled) grid.append(h("div", { class: "label" }), ...names.map((name, j) => h("div", { class: `label${upright ? " upright" : ""}`, title: name }, cell >= 18 || j % 5 === 0 ? h("span", {}, name) : "")));
  return h("div", {}, h("h3", {}, each.name), h("div", { class: "scroll" }, grid),
    h("p", { class: "axis" }, `rows: true class, columns: predicted · step ${whole(each.step)}${each.best ? ", the best" : ""} · shade: share of the row`));
}

function vectorOf(each, run) {
  const names = namesOf(run, each.value.length);
  const most = Math.max(...each.value.map(Math.abs), 1e-12);
  return h("div", {}, h("h3", {}, each.name), h("div", { class: "vector" }, each.value.slice(0, 60).flatMap((value, i) =>
    [h("span", {}, names[i]), h("i", { style: { width: `${(100 * Math.abs(value)) / most}%` } }), h("span", {}, number(value))])),
    h("p", { class: "axis" }, `step ${whole(each.step)}${each.best ? ", the best" : ""}${each.value.length > 60 ? `, the first 60 of ${each.value.length}` : ""}`));
}

function picturesOf(run) {
  if (!run.arrays.length) return null;
  return h("section", {}, h("h2", {}, run.arrays.some((each) => each.kind === "matrix") ? "Confusion matrix" : "By class"),
    h("div", { class: "pictures", style: { marginTop: "10px" } }, run.arrays.map((each) => (each.kind === "matrix" ? matrixOf(each, run) : vectorOf(each, run)))));
}

function checkpointsOf(run) {
  if (!run.checkpoints.length) return h("section", {}, h("h2", {}, "Checkpoints"), h("p", { class: "note" }, "There is none."));
  const names = [...new Set(run.checkpoints.flatMap((each) => Object.keys(each.metrics)))].sort((a, b) => rankOf(a, run) - rankOf(b, run) || a.localeCompare(b));
  const isBest = (each) => Boolean(run.best && each.step === run.best.step);
  const columns = [{ title: "checkpoint", value: (each) => each.name, show: (each) => h("code", {}, each.name) },
    { title: "step", value: (each) => each.step, show: (each) => whole(each.step), number: true },
    { title: "size", value: (each) => each.bytes, show: (each) => (each.problem ? DASH : bytes(each.bytes)), number: true },
    ...names.map((name) => ({ title: name, value: (each) => each.metrics[name] ?? null, number: true })),
    { title: "", value: (each) => each.problem || (isBest(each) ? "★ best" : each.kind === "weights" ? "weights alone" : ""), wrap: true }];
  return h("section", {}, h("h2", {}, "Checkpoints"), sortable(columns, run.checkpoints, { row: (each) => ({ class: isBest(each) ? "best" : null }), order: run.orders.checkpoints }));
}

// ---- several runs ----

function runsOf(page, runs, view, changed) {
  const monitors = [...new Set(runs.filter((run) => run.best).map((run) => run.monitor.name))];
  const others = [...new Set(runs.flatMap((run) => Object.keys(run.last)))].filter((name) => isEval(name) && !/\/(runtime|samples_per_second)$/.test(name));
  const leading = {};
  for (const name of monitors) {
    const ranked = runs.filter((run) => run.best && run.monitor.name === name);
    const sign = ranked[0].monitor.mode === "min" ? 1 : -1;
    leading[name] = ranked.reduce((a, b) => (sign * a.best.value <= sign * b.best.value ? a : b));
  }
  const columns = [
    { title: "run", value: (run) => run.name, show: (run) => h("label", {}, h("input", { type: "checkbox", checked: !view.hidden.has(run.path), "aria-label": `show ${run.name}`,
      onchange: (event) => { event.target.checked ? view.hidden.delete(run.path) : view.hidden.add(run.path); changed(); } }), swatch(run), run.name) },
    { title: "status", value: (run) => run.status, show: status },
    ...page.differing.filter((name) => name !== "checkpoint").slice(0, 8).map((name) => ({ title: name, number: runs.every((run) => typeof run.settings[name] !== "string"),
      value: (run) => (typeof run.settings[name] === "number" ? run.settings[name] : run.settings[name] == null ? null : setting(run.settings[name])), show: (run) => (typeof run.settings[name] === "number" ? String(run.settings[name]) : setting(run.settings[name])) })),
    ...monitors.map((name) => ({ title: `best ${name}`, number: true, value: (run) => (run.best && run.monitor.name === name ? run.best.value : null),
      show: (run) => (run.best && run.monitor.name === name ? h("span", { class: leading[name] === run ? "bestmark" : null }, `${leading[name] === run ? "★ " : ""}${number(run.best.value)}`) : DASH) })),
    ...others.slice(0, 4).map((name) => ({ title: `last ${name}`, number: true, value: (run) => run.last[name] ?? null })),
    { title: "steps", number: true, value: (run) => run.step, show: (run) => whole(run.step) },
    { title: "time", number: true, value: (run) => run.seconds, show: (run) => duration(run.seconds) },
    { title: "started", value: (run) => run.started, show: (run) => moment(run.started) },
  ];
  return [h("div", { class: "title" }, h("h2", {}, `${runs.length} runs`)),
    sortable(columns, runs, { order: view.order, row: (run) => ({ class: view.hidden.has(run.path) ? "off" : null, "data-run": run.name }) })];
}
