// Tables whose columns sort by a click or the Enter key on their head, and a field that shows only some rows.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.tabIndex = 0;
      head.setAttribute("aria-sort", "none");
      const sort = () => {
        const numeric = head.dataset.kind === "number";
        const before = head.getAttribute("aria-sort");
        const down = before === "none" ? numeric : before === "ascending"; // the largest number first, words from A
        table.querySelectorAll("thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [a.cells[column].textContent, b.cells[column].textContent];
          if (!x.trim() || !y.trim()) return !x.trim() - !y.trim(); // empty cells are last in either order
          const order = numeric ? parseFloat(x) - parseFloat(y) : x.localeCompare(y, "en", { numeric: true });
          return down ? -order : order;
        });
        body.append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  });
  document.querySelectorAll("input.table-filter").forEach((field) => {
    const rows = [...document.querySelector("table.sortable").tBodies[0].rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    });
  });
});
