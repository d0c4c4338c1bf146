"use strict";
// Sorts the methods of a league, each block for itself (references stay on top). Cells without a number always come last.
document.querySelectorAll("table.league thead button").forEach((button) => {
  const header = button.closest("th");
  button.addEventListener("click", () => {
    const table = header.closest("table");
    const words = button.dataset.kind === "text";
    const before = header.getAttribute("aria-sort");
    const up = before === "none" ? words : before === "descending";
    header.parentElement.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[header.cellIndex];
      if (words) return cell.textContent.trim().toLowerCase();
      return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
    };
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return (words ? x.localeCompare(y) : x - y) * (up ? 1 : -1);
    };
    table.querySelectorAll("tbody.methods").forEach((body) => {
      [...body.rows].sort(compare).forEach((row) => body.append(row));
    });
  });
});
