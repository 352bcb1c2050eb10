"""The pages of the mind map, as HTML text. No mkdocs, no torch, no files."""

from vitx import mindmap
from vitx.pages import Atlas, Page

_AXES: dict[mindmap.Axis, tuple[str, str, str]] = {
    "family": ("mindmap/", "By family", "What is explained with: the families, their branches, their methods."),
    "motivation": (
        "mindmap/motivation/",
        "By motivation",
        "Why the methods were proposed. A method with two motivations hangs under both.",
    ),
    "task": ("mindmap/task/", "By task", "What the explained models do. A method for two tasks hangs under both."),
    "year": ("mindmap/year/", "By year", "When the papers of the methods appeared, the newest first."),
    "needs": (
        "mindmap/needs/",
        "By needs",
        "What the methods ask of the model. A method with two needs hangs under both.",
    ),
}

# Shown by docs/assets/mindmap.js, which puts numbers and names for each #.
_TOOLS = """<form class="vx-map-tools" role="search" aria-label="Mind map" hidden>
<label>Find <input type="search" name="find" autocomplete="off" spellcheck="false" data-say="Matches: #"></label>
<button name="next" data-say="Match # of #">Next match</button>
<span class="vx-matches" role="status"></span>
<span class="vx-group"><button type="button" name="all">Open all</button>
<button type="button" name="none">Close all</button></span>
<span class="vx-group vx-zoom"><button type="button" name="smaller" aria-label="Zoom out" title="Zoom out">−</button>
<button type="button" name="larger" aria-label="Zoom in" title="Zoom in">+</button>
<button type="button" name="fit" title="Show the whole map">Fit</button></span>
</form>"""
_HELP = (
    '<p class="vx-small">Every name is a link; colours are families.</p>'
    '<p class="vx-small vx-script">A number says how many methods a branch holds; it opens and closes the branch.</p>'
    '<p class="vx-small vx-script vx-keys">Keys: in the field, Enter goes to the next match and the down arrow into '
    "the map. In the map, up and down go from name to name, away from the middle opens, towards it closes, and Escape "
    "leads back to the field. Drag to move, Ctrl and the wheel to zoom.</p>"
)


def map_page(atlas: Atlas, by: mindmap.Axis) -> Page:
    """One order of the map: a tree that opens and closes; without scripts the drawing and the outline."""
    path, title, text = _AXES[by]
    root = mindmap.tree(atlas.catalog, by)
    tabs = "".join(
        f'<a href="/{address}"{" aria-current=page" if axis == by else ""}>{name}</a>'
        for axis, (address, name, _) in _AXES.items()
    )
    tabs += '<a href="/timeline/">Timeline</a><a href="/lineage/">Who extends whom</a>'
    html = (
        '<div class="vx-map-head"><h1>Mind map</h1>'
        f'<nav class="vx-tabs" aria-label="Order of the mind map">{tabs}</nav></div>'
        f'<p class="vx-map-lead">{text}</p>'
        f'<div class="vx-mindmap" data-search-exclude>{_TOOLS}'
        f'<noscript>{mindmap.drawing(root)}<p class="vx-drawing">The same as a list:</p></noscript>'
        f'<div class="vx-view" data-say="#, methods: #">{mindmap.outline(root)}</div>'
        f"{mindmap.legend(atlas.catalog)}{_HELP}</div>"
        '<script src="/assets/table.js"></script><script src="/assets/zoom.js"></script>'
        '<script src="/assets/mindmap.js"></script>'  # at once, or the long list would flash
    )
    return Page(path, f"Mind map {title.lower()}", text, html)


def render(atlas: Atlas) -> list[Page]:
    """The mind map in each of its orders."""
    return [map_page(atlas, axis) for axis in _AXES]
