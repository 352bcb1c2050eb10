// A view whose content can be zoomed and dragged: vitxZoom(view, content). The content takes its scale from --zoom.
// Ctrl and the wheel zoom, the mouse drags, touch and arrow keys scroll by themselves.
function vitxZoom(view, content) {
  let scale = 1;

  function zoom(to, x = view.clientWidth / 2, y = view.clientHeight / 2) {
    const [left, top, was] = [view.scrollLeft + x, view.scrollTop + y, scale];
    scale = Math.min(Math.max(to, 0.3), 3);
    content.style.setProperty("--zoom", scale);
    view.scrollTo((left * scale) / was - x, (top * scale) / was - y); // what is at (x, y) stays there
  }

  view.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey || getComputedStyle(view).overflowX === "visible") return; // nothing to zoom on a phone
      event.preventDefault();
      const frame = view.getBoundingClientRect();
      zoom(scale * Math.exp(-event.deltaY / 400), event.clientX - frame.left, event.clientY - frame.top);
    },
    { passive: false },
  );

  let drag; // where the pointer went down
  view.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch" || event.target.closest("button")) return;
    drag = { x: event.clientX, y: event.clientY, left: view.scrollLeft, top: view.scrollTop };
  });
  view.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!view.hasPointerCapture(event.pointerId)) {
      if (Math.hypot(x, y) < 5) return; // a click
      view.setPointerCapture(event.pointerId); // from here on no link is clicked
    }
    view.scrollTo(drag.left - x, drag.top - y);
  });
  const drop = () => { drag = undefined; };
  for (const end of ["pointerup", "pointercancel", "pointerleave"]) view.addEventListener(end, drop);
  view.addEventListener("dragstart", (event) => event.preventDefault());

  return {
    by: (factor) => zoom(scale * factor),

    // The scale at which all content is seen in the width of the view and the height given, within bounds.
    fit(height, least, most) {
      const whole = scale * Math.min(view.clientWidth / content.offsetWidth, height / content.offsetHeight);
      zoom(Math.min(Math.max(whole, least), most));
    },

    centre(element) {
      const [own, frame] = [element.getBoundingClientRect(), view.getBoundingClientRect()];
      const x = own.left + own.right - frame.left - frame.right;
      view.scrollBy(x / 2, (own.top + own.bottom - frame.top - frame.bottom) / 2);
    },

    // Scroll the view, never the page, until the element is seen.
    reveal(element) {
      const [own, frame] = [element.getBoundingClientRect(), view.getBoundingClientRect()];
      const shift = (start, end, from, to) =>
        start < from ? start - from : end > to ? Math.min(end - to, start - from) : 0;
      const edge = 12; // leaves room for the ring around it
      const x = shift(own.left, own.right, frame.left + edge, frame.right - edge);
      view.scrollBy(x, shift(own.top, own.bottom, frame.top + edge, frame.bottom - edge));
    },
  };
}
