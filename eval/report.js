"use strict";
// Sorting tables and moving the two sliders. All else on the page works without a script.
document.documentElement.classList.add("js");

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const numeric = head.classList.contains("n");
    const key = (row) => {
      const text = row.cells[head.cellIndex].textContent.trim();
      return numeric ? Number.parseFloat(text.replace("−", "-")) : text;
    };
    const missing = (value) => value !== value || value === "" || value === "–";
    const compare = (a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b); // last, whatever the order
      const found = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
      return order === "ascending" ? found : -found;
    };
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort((a, b) => compare(a[0], b[0]));
    body.append(...rows.map((pair) => pair[1]));
  });
}

for (const input of document.querySelectorAll("input[type=range]")) {
  input.addEventListener("input", () => {
    document.documentElement.style.setProperty(`--${input.id}`, input.value + (input.dataset.unit ?? ""));
    for (const output of document.querySelectorAll(`output[for=${input.id}]`)) output.value = input.value;
  });
}
