// Filters, searches and sorts the table of the browse page; export.js saves it. The selection lives in the URL:
// ?family=attention&needs=gradients&from=2019&text=rollout&sort=-year&ids=lrp,evit&only=picked. Boxes of one facet mean
// "or", facets and the words of a search mean "and".
{
  const place = document.querySelector(".vx-browse");
  const find = (selector) => place.querySelector(selector);
  const form = find(".vx-facets");
  const table = find(".vx-methods");
  const heads = [...table.tHead.rows[0].cells];
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const facets = [...new Set(boxes.map((box) => box.name))];
  const address = find(".vx-address");
  const say = (text) => { find(".vx-said").textContent = text; };

  const rows = [...table.tBodies[0].rows].map((element) => {
    const { id, year } = element.dataset;
    const values = Object.fromEntries(facets.map((facet) => [facet, element.dataset[facet].split(" ")]));
    const cells = [...element.cells].map((cell) => cell.textContent);
    const words = vitxTable.fold([...Object.values(element.dataset), ...cells].join(" "));
    const pick = document.createElement("input");
    pick.type = "checkbox";
    pick.setAttribute("aria-label", `Pick ${element.querySelector("a").textContent}`);
    element.cells[0].prepend(pick);
    return { element, id, words, values, pick, year: Number(year) };
  });
  const picks = () => rows.filter((row) => row.pick.checked);
  let sorted = ""; // the key of a column, after a minus if descending

  function read() {
    const query = new URLSearchParams(location.search);
    for (const box of boxes) box.checked = query.getAll(box.name).includes(box.value);
    for (const name of ["from", "to", "text"]) form.elements[name].value = query.get(name) ?? "";
    form.elements.only.checked = query.has("only");
    const ids = (query.get("ids") ?? "").split(",");
    for (const row of rows) row.pick.checked = ids.includes(row.id);
    for (const group of form.querySelectorAll("details details")) group.open ||= !!group.querySelector(":checked");
    address.value = location.href;
    sort(query.get("sort") ?? "");
    show();
  }

  function sort(by) {
    const column = heads.findIndex((head) => head.dataset.key === by.replace("-", ""));
    const value = ({ cells }) => (cells[column].querySelector("a") ?? cells[column]).textContent;
    vitxTable.sort(table, rows.map((row) => row.element), column < 0 ? null : column, by[0] === "-", value);
    sorted = column < 0 ? "" : by;
  }

  function show() {
    const chosen = Object.fromEntries(facets.map((facet) => [facet, new Set()]));
    for (const box of boxes) if (box.checked) chosen[box.name].add(box.value);
    const from = Number(form.elements.from.value) || -Infinity;
    const to = Number(form.elements.to.value) || Infinity;
    const words = vitxTable.fold(form.elements.text.value).split(" ");
    const picked = picks().length;
    const only = picked && form.elements.only.checked;
    const counts = new Map();
    let shown = 0;
    for (const row of rows) {
      const wanted = from <= row.year && row.year <= to && words.every((word) => row.words.includes(word));
      const meant = wanted && (!only || row.pick.checked);
      const missed = facets.filter(
        (facet) => chosen[facet].size && !row.values[facet].some((value) => chosen[facet].has(value)),
      );
      row.element.hidden = !meant || missed.length > 0;
      shown += !row.element.hidden;
      // Beside a box stands how many rows it would show, given all else.
      for (const facet of facets)
        if (meant && missed.every((one) => one === facet))
          for (const value of row.values[facet]) {
            const key = `${facet} ${value}`;
            counts.set(key, (counts.get(key) ?? 0) + 1);
          }
    }
    for (const box of boxes) {
      const count = counts.get(`${box.name} ${box.value}`) ?? 0;
      const label = box.closest("label");
      label.querySelector("output").textContent = count;
      label.classList.toggle("vx-none", count === 0 && !box.checked);
    }
    const all = shown === rows.length ? `${shown} methods` : `${shown} of ${rows.length} methods`;
    find(".vx-count").textContent = picked ? `${all}, ${picked} picked` : all;
    find(".vx-chosen").textContent = picked ? `the ${picked} picked` : `the ${shown} shown`;
    form.elements.only.disabled = !picked;
    say("");
  }

  function write() {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    if (sorted) query.set("sort", sorted);
    if (picks().length) query.set("ids", picks().map((row) => row.id));
    const text = query.toString().replaceAll("%2C", ",");
    const url = location.pathname + (text && `?${text}`) + location.hash;
    address.value = new URL(url, location.href);
    history.replaceState(null, "", url);
  }
  const update = () => (show(), write());

  for (const head of heads) {
    const button = document.createElement("button");
    const { key } = head.dataset;
    button.type = "button";
    button.textContent = head.textContent;
    button.onclick = () => {
      sort(sorted === key ? `-${key}` : sorted === `-${key}` ? "" : key); // up, down, as catalogued
      update();
    };
    head.replaceChildren(button);
  }
  find(".vx-clear").onclick = () => {
    for (const row of picks()) row.pick.checked = false;
    form.elements.only.checked = false;
    update();
  };
  find(".vx-copy").onclick = () => {
    address.select();
    say(document.execCommand("copy") ? "Link copied." : "Press Ctrl+C to copy the link.");
  };
  place.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("popstate", read);
  if (matchMedia("(max-width: 59.9375em)").matches) form.querySelector(".vx-all").open = false;
  form.hidden = find(".vx-choose").hidden = false;
  read();
}
