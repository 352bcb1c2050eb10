// Filters the table of the browse page. The selection lives in the URL, as the form's own query string:
// ?family=attention&needs=gradients&from=2019. Boxes of one facet mean "or", facets mean "and".
{
  const form = document.querySelector(".vx-facets");
  const status = document.querySelector(".vx-count");
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const facets = [...new Set(boxes.map((box) => box.name))];
  const rows = [...document.querySelectorAll(".vx-methods tbody tr")].map((element) => ({
    element,
    year: Number(element.dataset.year),
    values: Object.fromEntries(facets.map((facet) => [facet, element.dataset[facet].split(" ")])),
  }));

  function read() {
    const query = new URLSearchParams(location.search);
    for (const box of boxes) box.checked = query.getAll(box.name).includes(box.value);
    for (const name of ["from", "to"]) form.elements[name].value = query.get(name) ?? "";
    for (const group of form.querySelectorAll("details details")) group.open ||= !!group.querySelector(":checked");
  }

  function show() {
    const chosen = Object.fromEntries(facets.map((facet) => [facet, new Set()]));
    for (const box of boxes) if (box.checked) chosen[box.name].add(box.value);
    const from = Number(form.elements.from.value) || -Infinity;
    const to = Number(form.elements.to.value) || Infinity;
    const counts = new Map();
    let shown = 0;
    for (const row of rows) {
      const inYears = from <= row.year && row.year <= to;
      const missed = facets.filter(
        (facet) => chosen[facet].size && !row.values[facet].some((value) => chosen[facet].has(value)),
      );
      row.element.hidden = !inYears || missed.length > 0;
      shown += !row.element.hidden;
      // Beside a box stands how many rows it would show, given the other facets.
      for (const facet of facets)
        if (inYears && missed.every((one) => one === facet))
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
    status.textContent = shown === rows.length ? `${shown} methods` : `${shown} of ${rows.length} methods`;
  }

  function write() {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value)).toString();
    history.replaceState(null, "", location.pathname + (query && `?${query}`) + location.hash);
  }

  form.addEventListener("input", () => (write(), show()));
  form.addEventListener("reset", () => setTimeout(() => (write(), show())));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("popstate", () => (read(), show()));
  if (matchMedia("(max-width: 59.9375em)").matches) form.querySelector(".vx-all").open = false;
  form.hidden = false;
  read();
  show();
}
