// Who extends whom: while the pointer or the focus is on a method, its ancestors and descendants stay and the rest fades.
// A line names its two methods as data-ends="earlier later", each by the number of its link, data-n.
for (const svg of document.querySelectorAll(".vx-history:has([data-ends])")) {
  const links = new Map([...svg.querySelectorAll("a[data-n]")].map((link) => [link.dataset.n, link]));
  const lines = [...svg.querySelectorAll("[data-ends]")].map((element) => ({
    element,
    ends: element.dataset.ends.split(" "),
    kin: !element.classList.contains("same-idea-as"), // the same idea is no descent: it is shown, not followed
  }));
  const at = [0, 1].map((side) => {
    const found = new Map();
    for (const line of lines) found.set(line.ends[side], [...(found.get(line.ends[side]) ?? []), line]);
    return found;
  });

  function show(start) {
    for (const element of svg.querySelectorAll(".vx-on")) element.classList.remove("vx-on");
    svg.classList.toggle("vx-lit", start !== undefined);
    if (start === undefined) return;
    links.get(start).classList.add("vx-on");
    for (const side of [0, 1]) {
      const seen = new Set([start]);
      for (const number of seen) // grows while it is walked
        for (const { element, ends, kin } of at[side].get(number) ?? []) {
          if (!kin && number !== start) continue;
          element.classList.add("vx-on");
          links.get(ends[1 - side]).classList.add("vx-on");
          if (kin) seen.add(ends[1 - side]);
        }
    }
  }

  const number = (target) => target?.closest?.("a[data-n]")?.dataset.n;
  svg.addEventListener("pointerover", (event) => show(number(event.target) ?? number(document.activeElement)));
  svg.addEventListener("pointerleave", () => show(svg.contains(document.activeElement) ? number(document.activeElement) : undefined));
  svg.addEventListener("focusin", (event) => show(number(event.target)));
  svg.addEventListener("focusout", () => show());
}
