// Tables, which are sorted by a click on the head of a column.

const MANY_ROWS = 16;

// columns: {title, value(row) -> number or text, show(row) -> text or element, number}
function sortable(columns, rows, options) {
  const order = (options && options.order) || { column: null, falling: false };
  const body = h("tbody"), heads = [];
  const draw = () => {
    const sorted = [...rows];
    const column = order.column == null ? null : columns[order.column];
    if (column) sorted.sort((a, b) => compared(column.value(a), column.value(b), order.falling));
    body.replaceChildren(...sorted.map((row) => h("tr", (options && options.row && options.row(row)) || {},
      columns.map((each) => h("td", { class: [each.number ? "number" : "", each.wrap ? "wrap" : ""].join(" ").trim() || null },
        each.show ? each.show(row) : shownCell(each.value(row)))))));
    heads.forEach((head, i) => columns[i].title && head.setAttribute("aria-sort", i === order.column ? (order.falling ? "descending" : "ascending") : "none"));
  };
  columns.forEach((column, i) => {
    if (!column.title) { heads.push(h("td")); return; }
    const click = () => {
      order.falling = order.column === i ? !order.falling : false;
      order.column = i;
      draw();
    };
    heads.push(h("th", { scope: "col", class: column.number ? "number" : null }, h("button", { type: "button", onclick: click }, column.title)));
  });
  draw();
  return h("div", { class: rows.length > MANY_ROWS ? "scroll tall" : "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
}

// What is missing comes last, whichever way the others go.
function compared(a, b, falling) {
  if (a == null || b == null) return (a == null) - (b == null);
  const sign = falling ? -1 : 1;
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function shownCell(value) {
  return typeof value === "number" ? number(value) : value == null ? DASH : value;
}

function plain(heads, rows, options) {
  const wrap = (options && options.wrap) || [];
  const numbers = (options && options.numbers) || [];
  const kind = (i) => [numbers.includes(i) ? "number" : "", wrap.includes(i) ? "wrap" : ""].join(" ").trim() || null;
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: kind(i) }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", row.attributes || {}, (row.cells || row).map((cell, i) =>
      cell instanceof HTMLTableCellElement ? cell : h("td", { class: kind(i) }, cell)))))));
}
