
"use strict";
(() => {
  const markdown = document.querySelector(".markdown");
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy as Markdown";
  copy.addEventListener("click", async () => {
    const text = markdown.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      // Where a page may not write to the clipboard, its text is marked, for the keys.
      markdown.open = true;
      getSelection().selectAllChildren(text);
    }
    copy.textContent = markdown.open ? "Marked: press Ctrl+C" : "Copied";
  });
  markdown.before(copy);

  const table = document.querySelector("table.layers");
  const body = table.tBodies[0];
  const rows = [...body.rows];

  // Sorting: the headings become buttons, so that a page without this script promises nothing.
  const headings = [...table.tHead.rows[0].cells];
  const valueOf = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    const text = cell.dataset.value;
    return text === "" ? null : Number(text.replace("inf", "Infinity"));
  };
  const order = new Intl.Collator(undefined, { numeric: true });
  const sortBy = (column, descending) => {
    const numeric = headings[column].classList.contains("right");
    const sorted = rows.map((row) => [valueOf(row, column, numeric), row]);
    sorted.sort(([one, a], [other, b]) => {
      // What has no value stands last, whichever way the others go.
      if (one === null || other === null) return (one === null) - (other === null) || a.sectionRowIndex - b.sectionRowIndex;
      const difference = numeric ? (one > other) - (one < other) : order.compare(one, other);
      return descending ? -difference : difference;
    });
    body.append(...sorted.map(([, row]) => row));
    headings.forEach((heading, index) => {
      heading.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending");
    });
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = heading.title;
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", column === 0 ? "ascending" : "none");
    button.addEventListener("click", () => {
      const current = heading.getAttribute("aria-sort");
      // The largest cost or error is what one looks for first.
      const first = heading.classList.contains("right") && column !== 0 ? "descending" : "ascending";
      sortBy(column, current === "none" ? first === "descending" : current === "ascending");
    });
  });

  // Filtering by text and by what was done.
  const form = document.querySelector(".controls");
  const count = form.querySelector("output");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const what = form.elements.what.value;
    let shown = 0;
    for (const row of rows) {
      // `● separable: rank 17, vertical`, or `- kept: a reason`.
      const done = row.querySelector("summary").textContent.split(":")[0].trim().split(/\s+/)[1];
      const kind = what === "" || what === done || (what === "swapped" && done !== "kept");
      row.hidden = !(kind && words.every((word) => texts.get(row).includes(word)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} layers`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // The picture leads to rows, also to those that are filtered out.
  for (const link of document.querySelectorAll("a.layer")) {
    link.addEventListener("click", () => {
      if (document.querySelector(link.hash).hidden) {
        form.reset();
        filter();
      }
    });
  }
})();
