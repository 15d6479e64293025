// A click on a column's title sorts the table by it: by number where every cell is one, the other way round next time.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const descending = head.getAttribute("aria-sort") === "ascending";
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    const rows = Array.from(body.rows);
    const numeric = rows.every((row) => value(row) === "" || !Number.isNaN(Number(value(row))));
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, either way
      return (descending ? -1 : 1) * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
    };
    body.append(...rows.sort(order));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}
