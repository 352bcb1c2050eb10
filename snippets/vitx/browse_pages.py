"""The browse page: every method in one table, and what docs/assets/browse.js searches, sorts and saves it with."""

from collections.abc import Iterable, Sequence
from html import escape

from vitx.pages import Atlas, Page, authors, method_link
from vitx.schema import Method

_CLASS = {True: "yes", False: "no", None: "unknown"}
_COLUMNS = {  # name in the address of a sorted page -> head
    "name": "Method",
    "year": "Year",
    "family": "Family",
    "motivation": "Motivation",
    "task": "Task",
    "needs": "Needs",
    "class": "Class-specific",
    "output": "Gives",
    "survey": "In survey",
}


def render(atlas: Atlas) -> list[Page]:
    return [browse_page(atlas)]


def browse_page(atlas: Atlas) -> Page:
    methods = list(atlas.catalog.methods.values())
    heads = "".join(f'<th scope="col" data-key="{key}">{head}</th>' for key, head in _COLUMNS.items())
    html = (
        "<h1>Browse</h1>"
        '<p class="vx-small vx-no-script">Filtering needs JavaScript, and so do search, sorting and saving a '
        "selection. The table below is complete without it.</p>"
        f'<div class="vx-browse">{_facets(atlas, methods)}<div>{_TOOLS}'
        f'<p role="status" class="vx-count">{len(methods)} methods</p>'
        '<div class="vx-scroll" tabindex="0" role="region" aria-label="Methods">'
        f'<table class="vx-table vx-methods"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(_row(atlas, method) for method in methods)}</tbody></table></div>"
        '<p class="vx-small">The whole catalogue, with the criteria of evaluation: '
        '<a href="/catalog.json">JSON</a>, <a href="/catalog.csv">CSV</a>, <a href="/catalog.bib">BibTeX</a>, '
        '<a href="/catalog.csl.json">CSL-JSON</a>. <a href="/contributing/#data-for-other-tools">What they hold</a>.'
        "</p></div></div>"
        '<script src="/assets/table.js" defer></script><script src="/assets/browse.js" defer></script>'
        '<script src="/assets/export.js" defer></script>'
    )
    return Page("browse/", "Browse", "All methods, to be filtered, searched, sorted and cited.", html)


# The fields belong to the form of the facets, so that its address holds them, too.
_TOOLS = (
    '<div class="vx-choose" hidden>'
    '<p><label class="vx-wide-field">Search <input type="search" name="text" form="vx-facets" '
    'placeholder="name, author, title, venue, term"></label></p>'
    '<p><span>Save <span class="vx-chosen"></span> as</span> '
    '<button type="button" data-save="csv">CSV</button><button type="button" data-save="bib">BibTeX</button>'
    '<button type="button" data-save="csl.json">CSL-JSON</button>'
    '<label><input type="checkbox" name="only" value="picked" form="vx-facets"> only picked</label>'
    '<button type="button" class="vx-clear">Clear picks</button></p>'
    '<p><label class="vx-wide-field">Link <input type="text" class="vx-address" readonly></label>'
    '<button type="button" class="vx-copy">Copy link</button><output class="vx-said" role="status"></output></p>'
    "</div>"
)


def _row(atlas: Atlas, method: Method) -> str:
    paper = method.paper
    data = {
        "id": method.id,
        "family": method.family,
        "subfamily": method.subfamily,
        "motivation": " ".join(method.motivation.terms),
        "task": " ".join(method.tasks),
        "needs": " ".join(method.needs),
        "output": method.output,
        "class": _CLASS[method.class_specific],
        "survey": method.in_survey,
        "code": "yes" if method.snippet else "no",
        "year": paper.year,
        # searched beside what the cells show
        "text": " ".join([paper.title, *paper.authors, paper.venue or "", paper.arxiv or "", paper.doi or ""]),
    }
    attributes = "".join(f' data-{name}="{escape(str(value))}"' for name, value in data.items())

    def labels(vocabulary: str, ids: Iterable[str]) -> str:
        return escape(", ".join(atlas.terms[vocabulary, id].label for id in ids))

    return (
        f"<tr{attributes}>"
        f'<th scope="row">{method_link(atlas, method.id)}'
        f'<span class="vx-small">{escape(authors(paper, 1))}</span></th>'
        f"<td>{paper.year}</td>"
        f'<td>{labels("family", [method.family])}<span class="vx-small">{labels("subfamily", [method.subfamily])}'
        "</span></td>"
        f"<td>{labels('motivation', method.motivation.terms)}</td>"
        f"<td>{labels('task', method.tasks)}</td>"
        f"<td>{labels('needs', method.needs)}</td>"
        f"<td>{data['class']}</td>"
        f"<td>{labels('output', [method.output])}</td>"
        f"<td>{method.in_survey}</td></tr>"
    )


def _facets(atlas: Atlas, methods: Sequence[Method]) -> str:
    taxonomy = atlas.catalog.taxonomy
    words = {"yes": "Yes", "no": "No", "unknown": "Unknown"}
    facets: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("family", "Family", [(term.id, term.label) for term in taxonomy.families]),
        (
            "subfamily",
            "Subfamily",
            [(term.id, term.label) for term in taxonomy.subfamilies if term.id in atlas.members],
        ),
        ("motivation", "Motivation", [(term.id, term.label) for term in taxonomy.motivations]),
        ("task", "Task", [(term.id, term.label) for term in taxonomy.tasks]),
        ("needs", "Needs", [(term.id, term.label) for term in taxonomy.needs]),
        ("output", "Gives", [(term.id, term.label) for term in taxonomy.outputs]),
        ("class", "Class-specific", list(words.items())),
        ("survey", "In the survey", list(words.items())),
        ("code", "Runs here", [("yes", "Yes"), ("no", "No")]),
    ]
    years = [method.paper.year for method in methods] or [2000]
    fields = []
    for name, legend, options in facets:
        boxes = "".join(
            f'<label><input type="checkbox" name="{name}" value="{value}"> <span>{escape(label)}</span> '
            "<output></output></label>"
            for value, label in options
        )
        state = " open" if name in ("family", "needs") else ""
        fields.append(
            f'<details{state}><summary>{legend}</summary><fieldset><legend class="vx-hidden">{legend}</legend>'
            f"{boxes}</fieldset></details>"
        )
    bounds = f'min="{min(years)}" max="{max(years)}"'
    fields.append(
        '<details open><summary>Year</summary><fieldset class="vx-years"><legend class="vx-hidden">Year</legend>'
        f'<label>from <input type="number" name="from" {bounds} placeholder="{min(years)}"></label> '
        f'<label>to <input type="number" name="to" {bounds} placeholder="{max(years)}"></label></fieldset></details>'
    )
    return (
        '<form id="vx-facets" class="vx-facets" hidden><details class="vx-all" open><summary>Filters</summary>'
        f'{"".join(fields)}<p><button type="reset">Clear filters</button></p></details></form>'
    )
