
"use strict";
(() => {
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
    const numeric = headings[column].classList.contains("number");
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
      const first = heading.classList.contains("number") && column !== 0 ? "descending" : "ascending";
      sortBy(column, current === "none" ? first === "descending" : current === "ascending");
    });
  });

  // Filtering by text and by what was done.
  const form = document.querySelector(".controls");
  const told = form.querySelector("output");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const wanted = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const what = form.elements.what.value;
    let shown = 0;
    for (const row of rows) {
      const kind = what === "" || what === row.dataset.action || what === `kind:${row.dataset.kind}`;
      row.hidden = !(kind && wanted.every((word) => texts.get(row).includes(word)));
      shown += !row.hidden;
    }
    told.textContent = `${shown} of ${rows.length} layers`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // The picture: one column of it is in the order of the tab key, the arrow keys go on from there.
  const picture = document.querySelector("svg.layers");
  const tip = document.querySelector(".tip");
  const columns = [...picture.querySelectorAll(".column")];
  picture.setAttribute("role", "group");
  const lines = columns.map((column) => {
    // Its title would be shown as well as ours.
    const title = column.querySelector("title");
    title.remove();
    return title.textContent;
  });
  const show = (index) => {
    const frame = tip.parentElement.getBoundingClientRect();
    const place = columns[index].querySelector(".hit").getBoundingClientRect();
    tip.textContent = lines[index];
    tip.hidden = false;
    const right = place.right - frame.left + 8;
    const left = right + tip.offsetWidth <= frame.width ? right : place.left - frame.left - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(0, left)}px`;
  };
  const hide = () => { tip.hidden = true; };
  const find = (index) => {
    const row = document.getElementById(`layer-${index + 1}`);
    if (row.hidden) {
      form.reset();
      filter();
    }
    for (const other of rows) other.classList.toggle("found", other === row);
    row.scrollIntoView({ block: "center" });
    row.querySelector("summary").focus({ preventScroll: true });
  };
  columns.forEach((column, index) => {
    column.setAttribute("tabindex", index === 0 ? "0" : "-1");
    column.setAttribute("role", "button");
    column.setAttribute("aria-label", lines[index].replaceAll("\n", "; "));
    column.addEventListener("pointerenter", () => show(index));
    column.addEventListener("pointerleave", hide);
    column.addEventListener("focus", () => show(index));
    column.addEventListener("blur", hide);
    column.addEventListener("click", () => find(index));
    column.addEventListener("keydown", (event) => {
      const last = columns.length - 1;
      const next = { ArrowRight: Math.min(last, index + 1), ArrowLeft: Math.max(0, index - 1), Home: 0, End: last };
      if (event.key in next) {
        columns[index].setAttribute("tabindex", "-1");
        columns[next[event.key]].setAttribute("tabindex", "0");
        columns[next[event.key]].focus();
      } else if (event.key === "Enter" || event.key === " ") {
        find(index);
      } else if (event.key === "Escape") {
        hide();
      } else {
        return;
      }
      event.preventDefault();
    });
  });
})();
