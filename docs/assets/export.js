// Saves the picked rows of the browse page, else the shown ones, in their order, as a file for other programs. What the
// files are put together from is a script of its own, loaded when one is asked for; see vitx/export.py.
{
  const source = new URL("selection.js", document.currentScript.src);
  let loading;
  const load = () =>
    (loading ??= new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = source;
      script.onload = () => done(window.vitxCitations);
      script.onerror = () => ((loading = null), failed(new Error("The citations could not be loaded.")));
      document.head.append(script);
    }));

  // Each paper once, under the first of the methods that rest on it, as `vitx cite` has it.
  const once = (methods) => {
    const papers = new Map();
    for (const one of methods) papers.set(one.paper, [...(papers.get(one.paper) ?? []), one]);
    return [...papers.values()];
  };
  const bibtex = ([first, ...others]) => {
    const ids = others.map((one) => one.csl.id).join(", ");
    return ids ? first.bibtex.replace(/\}\n$/, `  ids = {${ids}},\n}\n`) : first.bibtex;
  };
  const formats = {
    csv: (methods, head) => "\ufeff" + head + methods.map((one) => one.csv).join(""),
    bib: (methods) => once(methods).map(bibtex).join("\n"),
    "csl.json": (methods) => JSON.stringify(once(methods).map(([first]) => first.csl), null, 2) + "\n",
  };
  const types = {
    csv: "text/csv",
    bib: "application/x-bibtex",
    "csl.json": "application/vnd.citationstyles.csl+json",
  };

  const place = document.querySelector(".vx-browse");
  async function save(format) {
    const rows = [...place.querySelectorAll(".vx-methods tbody tr")];
    const picked = rows.filter((row) => row.querySelector("input").checked);
    const ids = (picked.length ? picked : rows.filter((row) => !row.hidden)).map((row) => row.dataset.id);
    if (!ids.length) throw new Error("There is nothing to save.");
    const { csv, methods } = await load();
    vitxTable.save(`vitx-selection.${format}`, types[format], formats[format](ids.map((id) => methods[id]), csv));
  }
  for (const button of place.querySelectorAll("[data-save]"))
    button.onclick = () => save(button.dataset.save).catch((error) => {
      place.querySelector(".vx-said").textContent = error.message;
    });
}
