// Tables of the class "sortable": a button in each column's head sorts the rows of every body, first
// up, then down. Rows of the class "group" stay on top of theirs, and cells without a value come last.
(() => {
  function key(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  }

  function sort(table, column, sign) {
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      const keys = new Map(rows.map((row) => [row, key(row, column)]));
      const numeric = [...keys.values()].every((text) => text === "" || text === "–" || !isNaN(text));
      rows.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (!numeric) return sign * x.localeCompare(y);
        const [u, v] = [x, y].map((text) => (text === "–" ? NaN : parseFloat(text)));
        return isNaN(u) - isNaN(v) || sign * (u - v) || 0;
      });
      body.append(...rows);
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const table of document.querySelectorAll("table.sortable")) {
      const headers = [...table.tHead.rows[0].cells];
      headers.forEach((header, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.append(...header.childNodes);
        header.append(button);
        button.addEventListener("click", () => {
          const down = header.getAttribute("aria-sort") === "ascending";
          headers.forEach((other) => other.removeAttribute("aria-sort"));
          header.setAttribute("aria-sort", down ? "descending" : "ascending");
          sort(table, column, down ? -1 : 1);
        });
      });
    }
  });
})();
