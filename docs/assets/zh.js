// The Chinese pages load this script before the others. What those write in English it puts into Chinese, before the
// browser shows it. Its words, vitxWords, are put in front of it when the site is built: {} is a number, {text} any text.
{
  const number = /-?\d[\d,.]*(?:e-?\d+)?(?: %)?(?<![,.])/g;
  const words = new Map(Object.entries(vitxWords));
  const named = [...words]
    .filter(([english]) => english.includes("{text}"))
    .map(([english, chinese]) => [
      new RegExp(`^${english.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace("{text}", "(.+)")}$`),
      chinese,
    ]);
  const fill = (chinese, slots) => {
    let next = 0;
    return chinese.replace(/\{(\d?)\}/g, (_, place) => slots[place ? place - 1 : next++]);
  };

  function translated(text) {
    const key = text.trim();
    const exact = words.get(key) ?? words.get(key.replace(number, "{}"));
    if (exact) return fill(exact, key.match(number) ?? []);
    for (const [pattern, chinese] of named) if (pattern.test(key)) return fill(chinese, key.match(pattern).slice(1));
  }

  const attributes = ["aria-label", "title", "placeholder", "alt"];
  function turn(node, name) {
    const now = name ? node.getAttribute(name) : node.data;
    const chinese = now && translated(now);
    if (!chinese) return;
    if (name) node.setAttribute(name, chinese);
    else node.data = chinese;
  }
  function visit(node) {
    if (node.nodeType === Node.TEXT_NODE) return turn(node);
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    for (const name of attributes) if (node.hasAttribute(name)) turn(node, name);
    for (const child of node.childNodes) visit(child);
  }

  new MutationObserver((changes) => {
    for (const { type, target, addedNodes, attributeName } of changes)
      if (type === "childList") addedNodes.forEach(visit);
      else turn(target, attributeName);
  }).observe(document.body, { subtree: true, childList: true, characterData: true, attributeFilter: attributes });
}
