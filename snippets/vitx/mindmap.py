"""The mind map: catalogue in, one drawing (SVG) and one nested list out. Pure text, no mkdocs.

The list is what docs/assets/mindmap.js turns into a tree that opens and closes, what a phone shows, and the outline
for those without scripts; the drawing is the map without scripts. Colours and fonts come from docs/assets/vitx.css, so
that one text serves light and dark. Lengths are CSS pixels at scale one.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from typing import Literal, NamedTuple

from vitx.markup import link
from vitx.schema import Catalog, Method, Term

Axis = Literal["family", "motivation", "task", "year", "needs"]


class Node(NamedTuple):
    """One bubble of the map. ``colour`` is 1, 2, ... for the families in their order and 0 for neutral."""

    label: str
    href: str
    children: tuple["Node", ...] = ()
    colour: int = 0
    title: str = ""  # shown on hover and read aloud
    hollow: bool = False  # a method without a snippet
    id: str = ""  # of a branch, unique in its tree: names it in the address of a shared map


def family_colours(catalog: Catalog) -> dict[str, int]:
    """Family id -> number of its colour, 1 to 8, by the order of the families."""
    return {term.id: 1 + place % 8 for place, term in enumerate(catalog.taxonomy.families)}


def tree(catalog: Catalog, by: Axis) -> Node:
    """The catalogue as a tree of four levels: root, branches, twigs and methods.

    ``family``: families and their subfamilies. Any other axis: its terms (years: newest first) and the families of the
    methods under each. A method with two terms hangs under both. What holds no method is left out, except families.
    """
    colours = family_colours(catalog)
    families = catalog.taxonomy.families

    def leaf(method: Method) -> Node:
        title = f"{method.name} ({method.paper.year})" + ("" if method.snippet else ", no code here yet")
        return Node(
            method.name, f"/methods/{method.id}/", (), colours[method.family], title, hollow=method.snippet is None
        )

    under: dict[tuple[str, str], list[Node]] = {}  # (branch, twig) -> its methods
    for method in catalog.methods.values():
        for branch in _branches_of(method, by):
            twig = method.subfamily if by == "family" else method.family
            under.setdefault((branch, twig), []).append(leaf(method))

    def twig_of(branch: str, term: Term, family: str, label: str, href: str) -> Node:
        leaves = tuple(under[branch, term.id])
        return Node(label, href, leaves, colours[family], _title(term), id=f"{branch}.{term.id}")

    if by == "family":
        branches = []
        for family in families:
            address = f"/families/{family.id}/"
            twigs = tuple(
                twig_of(family.id, term, family.id, term.label, f"{address}#{term.id}")
                for term in catalog.taxonomy.subfamilies
                if (family.id, term.id) in under
            )
            branches.append(Node(_short(family), address, twigs, colours[family.id], _title(family), id=family.id))
        return Node("ViT explainability", "/families/", tuple(branches), title="All families")

    branches = []
    for id, label, href, title in _headings(catalog, by):
        twigs = tuple(
            twig_of(id, family, family.id, _short(family), f"{href}&family={family.id}")
            for family in families
            if (id, family.id) in under
        )
        if twigs:
            branches.append(Node(label, href, twigs, 0, title, id=id))
    return Node(_QUESTIONS[by], "/browse/", tuple(branches), title="All methods")


_QUESTIONS = {"motivation": "Why explain?", "task": "Which task?", "year": "When?", "needs": "What is needed?"}


def _branches_of(method: Method, by: Axis) -> Sequence[str]:
    return {
        "family": (method.family,),
        "motivation": method.motivation.terms,
        "task": method.tasks,
        "year": (str(method.paper.year),),
        "needs": method.needs,
    }[by]


def _headings(catalog: Catalog, by: Axis) -> list[tuple[str, str, str, str]]:
    """(id, label, address, title) of the branches of any axis but the families."""
    if by == "year":
        years = sorted({method.paper.year for method in catalog.methods.values()}, reverse=True)
        return [(str(year), str(year), f"/browse/?from={year}&to={year}", str(year)) for year in years]
    taxonomy = catalog.taxonomy
    terms = {"motivation": taxonomy.motivations, "task": taxonomy.tasks, "needs": taxonomy.needs}[by]
    return [(term.id, term.label, f"/browse/?{by}={term.id}", _title(term)) for term in terms]


def _title(term: Term) -> str:
    return f"{term.label} {term.label_zh}"


def _short(family: Term) -> str:
    return family.label.removesuffix(" methods")  # every branch of the map holds methods


def overview(root: Node) -> Node:
    """The tree without its methods: each twig says how many it holds."""

    def bare(twig: Node) -> Node:
        return twig._replace(label=f"{twig.label} ({len(twig.children)})", children=())

    return root._replace(
        children=tuple(branch._replace(children=tuple(map(bare, branch.children))) for branch in root.children)
    )


def outline(root: Node) -> str:
    """The same tree as nested lists of links. Items carry their level, colour and id for the style and the script."""

    def item(node: Node, depth: int) -> str:
        hollow = " hollow" if node.hollow else ""
        id = f' data-id="{escape(node.id)}"' if node.id else ""
        title = f' title="{escape(node.title)}"' if node.title not in ("", node.label) else ""
        below = "<ul>" + "".join(item(child, depth + 1) for child in node.children) + "</ul>" if node.children else ""
        return (
            f'<li class="l{_level(node, depth)} c{node.colour}{hollow}"{id}>'
            f'<a href="{escape(node.href)}"{title}>{escape(node.label)}</a>{below}</li>'
        )

    return f'<ul class="vx-outline">{item(root, 0)}</ul>'


def legend(catalog: Catalog, *, hollow: bool = True) -> str:
    """What the colours mean, and the hollow dot if there is one."""
    rows = [
        f'<li><span class="vx-dot c{colour}" aria-hidden="true"></span>{link(f"/families/{term.id}/", term.label)}</li>'
        for term, colour in zip(catalog.taxonomy.families, family_colours(catalog).values(), strict=True)
    ]
    if hollow and any(method.snippet is None for method in catalog.methods.values()):
        rows.append('<li><span class="vx-dot hollow" aria-hidden="true"></span>no code here yet</li>')
    return f'<ul class="vx-legend">{"".join(rows)}</ul>'


# --- measuring and clipping text -------------------------------------------------------------------------------


def text_width(text: str, size: float) -> float:
    """Width of ``text`` in pixels in a sans serif of ``size`` pixels: an estimate on the generous side."""
    return size * sum(map(_em, text))


@lru_cache(maxsize=5000)
def _em(c: str) -> float:
    narrow, wide = "iljItfr.,:;'|!()[] -", "mwMW@%"
    return 1.02 if ord(c) > 0x2E80 else 0.37 if c in narrow else 0.92 if c in wide else 0.7 if c.isupper() else 0.585


def clip(text: str, size: float, room: float) -> str:
    """``text``, cut with an ellipsis where it is wider than ``room`` pixels."""
    width = text_width(text, size)
    if width <= room:
        return text
    width += text_width("…", size)
    while text and width > room:
        width -= text_width(text[-1], size)
        text = text[:-1]
    return text.rstrip(" (-,") + "…"


# --- drawing ---------------------------------------------------------------------------------------------------

SIZE = (17, 15, 13.5, 13)  # text size of the root, the branches, the twigs and the leaves
BOLD = 1.08  # times the width of plain text: root and branches are bold, in whatever font the reader has
WIDE = 1450  # beyond this width 13 px text falls under 11 px in a window of 1280 px
ROOMS = range(250, 110, -10)  # labels are cut at the first of these widths that keeps the map within WIDE


class Box(NamedTuple):
    """A placed node: its box, and where its children's edges start."""

    node: Node
    level: int  # index into SIZE
    x: float  # inner edge: left edge where the branch grows rightwards, right edge where it grows leftwards
    y: float  # centre
    width: float
    side: int  # +1 grows rightwards, -1 leftwards


def _level(node: Node, depth: int) -> int:
    return depth if node.children or depth < 2 else 3


def _box_width(node: Node, level: int) -> float:
    return text_width(node.label, SIZE[level]) * (BOLD if level < 2 else 1) + (24 if level < 3 else 14)


def _fitted(node: Node, room: float, depth: int = 0) -> Node:
    """The tree with labels cut to ``room`` pixels (first level: 110 more); the whole label stays in the title."""
    return node._replace(
        label=clip(node.label, SIZE[_level(node, depth)], room if depth > 1 else room + 110),
        title=node.title or node.label,
        children=tuple(_fitted(child, room, depth + 1) for child in node.children),
    )


def _bubble(box: Box) -> str:
    """One node: a link with a rounded box, or with a dot where it is a method."""
    node, level, x, y, width, side = box
    left = x if side > 0 else x - width
    text, title = escape(node.label), escape(node.title)
    if level == 3:
        dot = x + 5 * side
        words = x + 14 * side
        shape = f'<rect x="{left:.0f}" y="{y - 10:.0f}" width="{width:.0f}" height="20" rx="4"/>'
        shape += f'<circle cx="{dot:.0f}" cy="{y:.0f}" r="4"/>'
        anchor = "start" if side > 0 else "end"
    else:
        height = (34, 30, 24)[level]
        words, anchor = left + width / 2, "middle"
        shape = (
            f'<rect x="{left:.0f}" y="{y - height / 2:.0f}" width="{width:.0f}" height="{height}" '
            f'rx="{height / 2:.0f}"/>'
        )
    hollow = " hollow" if node.hollow else ""
    return (
        f'<a href="{escape(node.href)}" class="l{level} c{node.colour}{hollow}"><title>{title}</title>{shape}'
        f'<text x="{words:.0f}" y="{y + SIZE[level] * 0.35:.1f}" text-anchor="{anchor}">{text}</text></a>'
    )


def _place_side(branches: Iterable[Node], side: int, start: float) -> tuple[list[Box], list[tuple[Box, Box]], float]:
    """Place branches below one another, growing to one side from ``x = start``.

    Returns the boxes, the edges between them as (parent, child), and the height.
    """
    boxes: list[Box] = []
    edges: list[tuple[Box, Box]] = []
    y = 0.0
    for branch in branches:
        above = y
        children: list[Box] = []
        # Columns of this branch, each as wide as its widest box.
        twig_x = start + side * (_box_width(branch, 1) + 28)
        widest = max((_box_width(twig, 2) for twig in branch.children if twig.children), default=0)
        leaf_x = twig_x + side * (widest + 26)
        for twig in branch.children:
            level = _level(twig, 2)
            if level == 3:
                children.append(Box(twig, 3, twig_x, y + 11, _box_width(twig, 3), side))
                y += 22
                continue
            leaves = []
            height = max(22 * len(twig.children), 30)
            first = y + height / 2 - 22 * (len(twig.children) - 1) / 2
            for place, leaf in enumerate(twig.children):
                leaves.append(Box(leaf, 3, leaf_x, first + 22 * place, _box_width(leaf, 3), side))
            y += height
            own = Box(twig, 2, twig_x, y - height / 2, _box_width(twig, 2), side)
            children.append(own)
            boxes += leaves
            edges += [(own, one) for one in leaves]
            y += 8
        if not children:
            y += 30
        middle = (children[0].y + children[-1].y) / 2 if children else (above + y) / 2
        top = Box(branch, 1, start, middle, _box_width(branch, 1), side)
        boxes += [*children, top]
        edges += [(top, child) for child in children]
        y += 18
    return boxes, edges, max(y - 18, 0)


def _edge(parent: Box, child: Box) -> str:
    """A curve from the parent's outer edge to the child's inner edge."""
    x1 = parent.x + parent.side * parent.width
    x2 = child.x
    half = (x1 + x2) / 2
    return (
        f'<path class="e{child.level} c{child.node.colour}" d="M{x1:.0f} {parent.y:.0f}'
        f'C{half:.0f} {parent.y:.0f} {half:.0f} {child.y:.0f} {x2:.0f} {child.y:.0f}"/>'
    )


def _split(branches: tuple[Node, ...]) -> int:
    """How many branches go to the right, the rest to the left, so that both sides are about equally tall."""
    weights = [
        1.2 + sum(0.4 + max(1.3, len(twig.children)) if twig.children else 1 for twig in branch.children)
        for branch in branches
    ]
    total = sum(weights)
    return min(range(1, len(branches) + 1), key=lambda n: abs(total - 2 * sum(weights[:n])), default=0)


def svg(root: Node) -> str:
    """Draw a tree of at most four levels: root in the middle, branches to both sides.

    Every node is a link; long labels are cut, whole in the title.
    """
    cut = _split(root.children)
    root_width = _box_width(root, 0)
    sides, right, left = [], 0.0, 0.0
    for room in ROOMS:
        branches = _fitted(root, room).children
        sides = [
            _place_side(part, side, side * (root_width / 2 + 30))
            for side, part in ((1, branches[:cut]), (-1, branches[cut:]))
        ]
        right, left = (
            max((box.side * box.x + box.width for box in boxes), default=root_width / 2) + 8 for boxes, _, _ in sides
        )
        if left + right <= WIDE:
            break
    width, full = left + right, max(height for _, _, height in sides) + 24
    centre = Box(root._replace(title=root.title or root.label), 0, -root_width / 2, full / 2, root_width, 1)
    curves, bubbles = [], [_bubble(centre)]
    for boxes, edges, height in sides:
        drop = (full - height) / 2  # both sides are centred
        low = {id(box): box._replace(y=box.y + drop) for box in boxes}
        for box in low.values():
            if box.level == 1:
                curves.append(_edge(centre._replace(x=0, width=0), box))
            bubbles.append(_bubble(box))
        curves += [_edge(low[id(parent)], low[id(child)]) for parent, child in edges]
    return (
        f'<svg class="vx-map" role="group" aria-label="Mind map: {escape(root.label)}" '
        f'viewBox="{-left:.0f} 0 {width:.0f} {full:.0f}" width="{width:.0f}" height="{full:.0f}" '
        f'style="min-width:{0.85 * width:.0f}px">'
        f'<g class="edges" aria-hidden="true">{"".join(curves)}</g>{"".join(bubbles)}</svg>'
    )


def drawing(root: Node) -> str:
    """The drawing in a frame that scrolls sideways; a phone shows the outline in its place."""
    return f'<div class="vx-drawing vx-scroll" tabindex="0" role="region" aria-label="Mind map">{svg(root)}</div>'
