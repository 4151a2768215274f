// Sorts the tables of class "sortable" by a column. Buttons are native, so Enter and Space press them.
"use strict";

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function sortBy(table, head) {
  const column = head.cellIndex;
  const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const sign = direction === "ascending" ? 1 : -1;
  const rows = Array.from(table.tBodies[0].rows);
  const values = new Map(rows.map((row) => [row, valueOf(row, column)]));
  const numeric = [...values.values()].every((value) => !Number.isNaN(Number(value)));
  rows.sort((a, b) => {
    const [first, second] = [values.get(a), values.get(b)];
    // What was not measured stays at the end in both directions.
    if (!first || !second) return Number(!first) - Number(!second);
    const order = numeric ? first - second : first.localeCompare(second, undefined, { numeric: true });
    return sign * order;
  });
  table.tBodies[0].append(...rows);
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
  for (const head of heads) {
    if (head.tagName !== "TH") continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head));
    head.append(button);
  }
}
for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
