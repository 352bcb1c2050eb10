"""The page of what papers report: every number of the catalogue, like beside like. No mkdocs, no torch, no files."""

from collections.abc import Iterator
from html import escape

from vitx.markup import heading, number, table
from vitx.pages import Atlas, Page, entry_link, method_link, reported_value, reported_where
from vitx.schema import Method, Reported

Row = tuple[Method, Reported]
NOT_REPRODUCED = ("other model and data", "other model", "other data", "same model and data, but not this number")


def reproduced(atlas: Atlas, method: Method, one: Reported) -> str:
    """Whether the benchmark measured this method by this criterion on the model and data of the paper, as text.

    Models and data are compared by their names, whatever their case and punctuation.
    """
    most = 0
    for name, result in atlas.results.items():
        if not name.startswith("benchmark-"):
            continue
        about = result.get("provenance", {})
        same_model = _same(about.get("model"), one.model)
        same_data = _same(about.get("data", {}).get("name"), one.data)
        if same_model and same_data:
            for row in result.get("rows", ()):
                if (row["method"], row["criterion"]) == (method.id, one.criterion) and row["mean"] is not None:
                    return f"yes: {number(row['mean'])}"
        most = max(most, same_data + 2 * same_model)
    return NOT_REPRODUCED[most]


def _same(ours: object, theirs: str) -> bool:
    """Whether two names have the same letters and digits, and any."""
    first, second = ("".join(filter(str.isalnum, str(name or "").casefold())) for name in (ours, theirs))
    return first == second != ""


def _groups(atlas: Atlas) -> Iterator[tuple[str, str, list[Row]]]:
    """(id, title, rows) for each criterion in the order of the catalogue, then for metrics that are no criterion's."""
    rows: dict[str | None, list[Row]] = {}
    for method in atlas.catalog.methods.values():
        for one in method.reported:
            rows.setdefault(one.criterion, []).append((method, one))
    for id, criterion in atlas.catalog.criteria.items():
        if id in rows:
            yield id, criterion.name, sorted(rows[id], key=lambda row: _words(row[1], "data", "metric", "model"))
    if None in rows:
        yield "others", "Other metrics", sorted(rows[None], key=lambda row: _words(row[1], "metric", "data", "model"))


def _words(one: Reported, *fields: str) -> list[str]:
    return [str(getattr(one, field)).casefold() for field in fields]


def _methods(count: int) -> str:
    return f"<strong>{count}</strong> " + ("method" if count == 1 else "methods")


def reported_page(atlas: Atlas) -> Page:
    """Every number that a paper gives for its method, grouped by what it measures, then by data."""
    groups = list(_groups(atlas))
    rows = [row for _, _, own in groups for row in own]
    methods = {method.id for method, _ in rows}
    parts = [
        "<h1>What papers report</h1>",
        f"<p><strong>{len(rows)}</strong> numbers of {_methods(len(methods))}, copied from papers, from their "
        "authors' repositories, and from works that quote them, which the row then says. None was measured here, each "
        "names where it was seen, and what was not seen is absent. Our own numbers are on "
        '<a href="/benchmark/">the benchmark page</a>: they are of other models and other data, and cannot be compared '
        "with these directly.</p>"
        "<p>Nor can these always be compared with each other: papers differ in the model and its training, in steps, "
        "in what hides a patch, and in the class that is asked about. Rows of one table stand by data, then by "
        "metric; compare only what shares both, and the model.</p>",
    ]
    heads = ("Method", "Metric", "Value", "Model", "Data", "Where seen", "Reproduced here")
    for id, title, own in groups:
        cells = [
            (
                method_link(atlas, method.id),
                escape(one.metric),
                reported_value(one),
                escape(one.model),
                escape(one.data),
                reported_where(one),
                reproduced(atlas, method, one),
            )
            for method, one in own
        ]
        asked = f"<p>Here: {entry_link(atlas, id)}.</p>" if id in atlas.catalog.criteria else ""
        parts += [heading(2, id, title), asked, table(heads, cells, title, "vx-reported")]
    if not groups:
        parts.append('<p class="vx-missing">No number was found yet.</p>')
    description = "Numbers that papers give for their methods, with model, data and the place where each was seen."
    return Page("reported/", "What papers report", description, "\n".join(parts), ("navigation",))


def render(atlas: Atlas) -> list[Page]:
    """The page of what papers report."""
    return [reported_page(atlas)]
