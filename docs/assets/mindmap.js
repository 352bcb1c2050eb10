// The mind map: the page's nested list becomes a tree (drawn by vitx.css) whose branches open and close, with a search.
// What is open and sought lives in the URL: ?find=rollout&open=attention,pruning (the theme's own search answers to q).
{
  const block = document.querySelector(".vx-mindmap");
  const form = block.querySelector("form");
  const { find, next } = form.elements;
  const status = form.querySelector("[role=status]");
  const view = block.querySelector(".vx-view");
  const tree = view.querySelector(".vx-outline");
  const links = [...tree.querySelectorAll("a")];
  const place = vitxZoom(view, tree);
  const narrow = matchMedia("(max-width: 44.9375em)"); // a phone shows the list as it is, with buttons
  const say = (element, ...values) => element.dataset.say.replace(/#/g, () => values.shift());

  // --- the list becomes a tree

  const branches = new Map(); // id -> its button and its list
  for (const item of tree.querySelectorAll("li[data-id]")) {
    const list = item.querySelector("ul");
    if (!list) continue;
    const button = document.createElement("button");
    const count = list.querySelectorAll(".l3").length;
    button.textContent = count;
    button.setAttribute("aria-label", say(view, item.firstChild.textContent, count));
    button.onclick = () => turn(item.dataset.id);
    item.firstChild.after(button);
    branches.set(item.dataset.id, { button, list });
  }
  const ids = [...branches.keys()];

  // About half of the twigs grow to the left.
  const items = [...(tree.querySelector("ul")?.children ?? [])];
  const sum = (some) => some.reduce((total, item) => total + item.querySelectorAll(".l2").length + 1, 0);
  const tilt = (cut) => Math.abs(sum(items.slice(0, cut)) - sum(items.slice(cut)));
  const cut = items.reduce((best, _, index) => (tilt(index + 1) < tilt(best) ? index + 1 : best), 0);
  if (cut < items.length) {
    const left = document.createElement("ul");
    left.className = "left";
    items[0].parentElement.after(left);
    left.append(...items.slice(cut));
  }

  // --- what is open

  const isOpen = (id) => !branches.get(id).list.hidden;

  function set(id, open) {
    const { button, list } = branches.get(id);
    list.hidden = !open;
    button.setAttribute("aria-expanded", open);
  }

  function show(open) {
    for (const id of ids) set(id, open.includes(id));
  }

  // One branch; its button stays where it is as far as the view can scroll.
  function turn(id) {
    const { button, list } = branches.get(id);
    const before = button.getBoundingClientRect();
    set(id, !isOpen(id));
    const after = button.getBoundingClientRect();
    view.scrollBy(after.left - before.left, after.top - before.top);
    if (isOpen(id)) place.reveal(list);
    write();
  }

  // --- search

  const said = links.map((link) => vitxTable.fold(`${link.textContent} ${link.title}`));
  let hits = []; // links
  let at = 0; // the one that is ringed
  let before; // what was open before the search

  // What is open when nobody says otherwise: the way to each match, or all but the methods.
  function usual() {
    if (find.value.trim()) return ids.filter((id) => hits.some((link) => branches.get(id).list.contains(link)));
    return ids.filter((id) => !narrow.matches && !id.includes("."));
  }

  function mark() {
    const words = vitxTable.fold(find.value).split(" ").filter(Boolean);
    hits = links.filter((_, index) => words.length && words.every((word) => said[index].includes(word)));
    for (const link of links) {
      const text = document.createElement(hits.includes(link) ? "mark" : "span");
      text.textContent = link.textContent;
      link.replaceChildren(text);
      link.classList.remove("here");
    }
    status.textContent = words.length ? say(find, hits.length) : "";
    at = 0;
  }

  // Ring one match and bring it into sight.
  function go(index) {
    hits[at]?.classList.remove("here");
    at = hits.length && index % hits.length;
    if (!hits.length) return;
    for (const id of ids) if (branches.get(id).list.contains(hits[at])) set(id, true);
    hits[at].classList.add("here");
    place.reveal(hits[at]);
  }

  form.addEventListener("input", () => {
    before ??= ids.filter(isOpen);
    mark();
    show(find.value.trim() ? usual() : before);
    if (!find.value.trim()) before = undefined;
    go(0);
    write();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!hits.length) return;
    go(at + 1);
    if (narrow.matches) hits[at].scrollIntoView({ block: "center" });
    status.textContent = say(next, at + 1, hits.length);
    write();
  });

  // --- the URL

  function read() {
    const query = new URLSearchParams(location.search);
    find.value = ""; // a browser may have kept it
    before = query.has("find") ? usual() : undefined;
    find.value = query.get("find") ?? "";
    mark();
    const open = query.get("open");
    show(open === "all" ? ids : (open?.split(",") ?? usual()));
  }

  function write() {
    const open = ids.filter(isOpen).join();
    const query = [];
    if (find.value.trim()) query.push(`find=${encodeURIComponent(find.value.trim())}`);
    if (open !== usual().join()) query.push(`open=${open === ids.join() ? "all" : open || "none"}`);
    history.replaceState(null, "", location.pathname + (query.length ? `?${query.join("&")}` : "") + location.hash);
  }

  // --- buttons and keys

  const all = (open) => () => (show(open), place.centre(links[0]), write());
  form.elements.all.onclick = all(ids);
  form.elements.none.onclick = all([]);
  form.elements.larger.onclick = () => place.by(1.25);
  form.elements.smaller.onclick = () => place.by(0.8);
  form.elements.fit.onclick = () => {
    place.fit(parseFloat(getComputedStyle(view).maxHeight), 0, 1.5);
    place.centre(links[0]);
  };

  // Up and down go along the names in sight; away from the root opens, towards it closes.
  tree.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return find.focus();
    const item = event.target.closest("li");
    const mirrored = getComputedStyle(item).direction === "rtl";
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const away = { ArrowRight: !mirrored, ArrowLeft: mirrored }[event.key];
    if (event.altKey || event.ctrlKey || event.metaKey || (step ?? away) === undefined) return;
    event.preventDefault();
    const { id } = item.dataset;
    const names = links.filter((link) => link.offsetParent);
    if (step) return names[names.indexOf(item.firstChild) + step]?.focus();
    if (branches.has(id) && isOpen(id) !== away) return turn(id), item.firstChild.focus();
    (away ? item.querySelector(":scope > ul a") : item.parentElement.closest("li")?.firstChild)?.focus();
  });

  find.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    (hits[at] ?? links[0]).focus();
  });

  // --- start

  tree.classList.add("vx-tree");
  view.tabIndex = 0;
  view.setAttribute("role", "region");
  view.setAttribute("aria-label", form.getAttribute("aria-label"));
  form.hidden = false;
  read();
  const room = innerHeight - view.getBoundingClientRect().top - scrollY - 16; // below what stands above the map
  place.fit(room, 0.85, 1); // text of at least 11 pixels
  place.centre(links[0]);
  go(0);
}
