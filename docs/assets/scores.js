// Tables of scores: a column's arrow sorts, the form filters and saves, a number shows its interval and the maps behind
// it. All is read from the tables: a cell's text is the mean, its data-v "low high count p".
for (const block of document.querySelectorAll(".vx-score-block")) {
  const table = block.querySelector("table");
  const form = block.querySelector("form");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows]; // in the order of the catalogue
  const methods = rows.filter((row) => row.dataset.family); // the others are baselines
  const name = (row) => (row.cells[0].querySelector("a") ?? row.cells[0].firstChild).textContent;
  const shown = (one) => !one.hidden;

  // --- sort

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.querySelector("span")?.textContent ?? "↕";
    button.setAttribute("aria-label", column ? `Sort by ${head.querySelector("a").textContent}` : "As catalogued");
    button.onclick = () => {
      const sorted = head.getAttribute("aria-sort");
      const descending = sorted ? sorted === "ascending" : head.dataset.better !== "down"; // the best value comes first
      vitxTable.sort(table, rows, column || null, descending, (row) => parseFloat(row.cells[column].textContent));
    };
    head.querySelector("span")?.remove();
    head.append(button);
  });

  // --- filter

  function filter() {
    const { family, category, text } = form.elements;
    const words = vitxTable.fold(text.value);
    for (const row of methods) {
      const named = vitxTable.fold(`${name(row)} ${row.dataset.id}`).includes(words);
      row.hidden = !named || (family.value && row.dataset.family !== family.value);
    }
    const hidden = heads.map((head, column) => column && category.value && head.dataset.category !== category.value);
    for (const row of [table.tHead.rows[0], ...rows])
      hidden.forEach((hide, column) => { row.cells[column].hidden = hide; });
    const count = (all) => `${all.filter(shown).length} of ${all.length}`;
    form.querySelector("output").textContent = `${count(methods)} methods, ${count(heads.slice(1))} criteria`;
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());

  // --- save what is shown

  form.elements.csv.onclick = () => {
    const lines = ["method,criterion,mean,low,high,count,p"];
    for (const row of [...body.rows].filter(shown))
      heads.forEach((head, column) => {
        const { dataset, textContent } = row.cells[column];
        if (!column || head.hidden || !dataset.v) return;
        const [low, high, count, p = ""] = dataset.v.split(" ");
        lines.push([row.dataset.id, head.dataset.id, textContent, low, high, count, p].join(","));
      });
    vitxTable.save(`vitx-${block.dataset.name}.csv`, "text/csv", lines.join("\n") + "\n");
  };

  // --- what is behind a number

  const dialog = document.createElement("dialog");
  dialog.className = "vx-maps";
  dialog.onclick = (event) => event.target === dialog && dialog.close(); // beside it
  block.append(dialog);
  const write = (tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text;
    dialog.append(element);
    return element;
  };

  function show(cell) {
    const row = cell.parentElement;
    const [low, high, count, p] = cell.dataset.v.split(" ");
    dialog.replaceChildren();
    write("h3", `${name(row)}: ${heads[cell.cellIndex].querySelector("a").textContent}`);
    const chance = p && ` Test against the random map: p ${+p ? "= " + p : "< 0.0005"}.`;
    write("p", `Mean ${cell.textContent}, 95 % interval ${low} to ${high}, ${count} pictures.${chance ?? ""}`);
    const maps = row.querySelector(".vx-maps-link");
    if (maps) {
      const image = write("img", "");
      image.src = maps.href;
      image.alt = `Maps of ${name(row)}`;
      const said = "The method on the comparison's photographs and glyph scenes, not on the pictures that were scored.";
      write("p", said).className = "vx-small";
    }
    write("button", "Close").onclick = () => dialog.close();
    dialog.showModal();
  }

  // One cell can be reached with the Tab key, the others from it with the arrows.
  const cells = [...body.querySelectorAll("td[data-v]")];
  const enter = (cell) => {
    for (const one of body.querySelectorAll("[tabindex='0']")) one.tabIndex = -1;
    cell.tabIndex = 0;
  };
  body.addEventListener("click", (event) => {
    const cell = event.target.closest("td[data-v]");
    if (cell) enter(cell), cell.focus(), show(cell);
  });
  const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  body.addEventListener("keydown", (event) => {
    let cell = event.target.closest("td[data-v]");
    if (!cell) return;
    if (event.key === "Enter") return show(cell);
    const [right, down] = steps[event.key] ?? [];
    if (right === undefined) return;
    event.preventDefault();
    do cell = body.rows[cell.parentElement.sectionRowIndex + down]?.cells[cell.cellIndex + right];
    while (cell && (!cell.dataset.v || cell.hidden || cell.parentElement.hidden));
    if (cell) enter(cell), cell.focus();
  });
  if (cells.length) enter(cells[0]);
  form.hidden = false;
  filter();
}
