// Filters for the table of papers: one for each of these columns, and a search over whole rows.
const FILTERS = ["room", "tags", "parity", "premises", "verdict"];

function filterPapers() {
  const place = document.getElementById("paper-filters");
  const table = place && place.parentElement.querySelector("table");
  if (!table || place.childElementCount) return;
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row,
    text: row.textContent.toLowerCase(),
    cells: Object.fromEntries(heads.map((head, i) => [head, row.cells[i].textContent.trim()])),
  }));
  const word = (head, text) => (head === "premises" ? text.split(":")[0] : text);
  const values = (head, cells) => (head === "tags" ? cells.tags.split(", ") : [word(head, cells[head])]);
  const selects = {};
  for (const head of FILTERS) {
    const select = document.createElement("select");
    const known = [...new Set(rows.flatMap(({ cells }) => values(head, cells)))].sort();
    select.append(new Option(`${head}: all`, ""), ...known.map((value) => new Option(value, value)));
    select.setAttribute("aria-label", head);
    selects[head] = select;
  }
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "search" });
  const count = document.createElement("span");
  place.append(...Object.values(selects), search, count);
  const show = () => {
    let shown = 0;
    for (const { row, text, cells } of rows) {
      const fits = FILTERS.every((head) => !selects[head].value || values(head, cells).includes(selects[head].value));
      row.hidden = !fits || !text.includes(search.value.toLowerCase());
      shown += !row.hidden;
    }
    count.textContent = ` ${shown} of ${rows.length}`;
  };
  place.addEventListener("input", show);
  show();
}

document.addEventListener("DOMContentLoaded", filterPapers);
