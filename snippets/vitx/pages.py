"""The pages: catalogue and measured results in, HTML text out. No mkdocs, no torch, no files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

from vitx import charts, cite, contribute, mindmap
from vitx.catalog import names_creatures
from vitx.markup import Figure, code_block, heading, inline, link, markdown_html, number, picture, small, table
from vitx.schema import Catalog, Criterion, Difference, Method, Paper, Reported, Subfamily, Term

SURVEY = "https://arxiv.org/abs/2311.06786"
IN_SURVEY = {
    "yes": "Yes. Believed to be covered by Kashefi et al.; the full text was not at hand.",
    "no": "No. Public only after 12 November 2023, when the survey appeared.",
    "unknown": "Unknown. Older than the survey; whether it is covered was not established.",
}
KINDS = {  # of proof, weakest to strongest, with the word for readers
    "contract": "Contract",
    "closed form": "Closed form",
    "parity": "Parity",
    "ground truth": "Ground truth",
    "sanity": "Sanity",
}
FORWARD = {
    "extends": "Extends",
    "compares-with": "Compares itself with",
    "supersedes": "Supersedes",
    "same-idea-as": "Same idea as",
    "applies": "Applies",
    "uses": "Uses",
}
BACKWARD = {
    "extends": "Extended by",
    "compares-with": "Compared with in",
    "supersedes": "Superseded by",
    "same-idea-as": "Same idea as",
    "applies": "Applied by",
    "uses": "Used by",
}
BASELINES = {"random": "Random map", "object-mask": "The object mask itself"}
NEIGHBOURS = 20  # methods listed beside a method page, on each side of it: keeps the site linear in its entries


class Page(NamedTuple):
    """A page ready for the theme. ``path`` is its address from the root, without the first slash."""

    path: str
    title: str  # plain text
    description: str  # plain text
    html: str
    hide: tuple[str, ...] = ("navigation", "toc")
    rail: str = ""  # HTML for the left column, in place of the theme's navigation


class Atlas(NamedTuple):
    """Catalogue, results and figures, with the look-ups that every page needs, computed once by ``prepare``."""

    catalog: Catalog
    results: Mapping[str, Any]
    figures: Mapping[str, Figure]
    citation: Mapping[str, Any]  # content of CITATION.cff
    terms: dict[tuple[str, str], Term]  # (vocabulary, id)
    colours: dict[str, int]  # of families
    incoming: dict[str, list[tuple[str, str]]]  # id -> (type, id of the entry that points here)
    proofs: dict[str, list[dict[str, Any]]]
    grades: dict[str, dict[str, Any]]  # id -> row of results/glyph.json
    members: dict[str, list[Method]]  # subfamily -> methods
    places: dict[str, str]  # id of a method or criterion -> its address
    measured: dict[tuple[str, str], list[dict[str, Any]]]  # (name of a result, method) -> its rows
    ranks: dict[str, int]  # method -> its place among the methods of its subfamily
    reads: Mapping[str, Sequence[str]] = {}  # criterion -> names of the quantities that its snippet reads


def prepare(
    catalog: Catalog, results: Mapping[str, Any], figures: Mapping[str, Figure], citation: Mapping[str, Any]
) -> Atlas:
    """``results``: file name without ``.json`` -> its content (``glyph``, ``proof``); absent means not measured."""
    taxonomy = catalog.taxonomy
    vocabularies: dict[str, Sequence[Term]] = {
        "family": taxonomy.families,
        "subfamily": taxonomy.subfamilies,
        "motivation": taxonomy.motivations,
        "task": taxonomy.tasks,
        "needs": taxonomy.needs,
        "output": taxonomy.outputs,
        "category": taxonomy.categories,
    }
    incoming: dict[str, list[tuple[str, str]]] = {}
    members: dict[str, list[Method]] = {}
    for method in catalog.methods.values():
        members.setdefault(method.subfamily, []).append(method)
    for entry in (*catalog.methods.values(), *catalog.criteria.values()):
        for relation in entry.relations:
            incoming.setdefault(relation.id, []).append((relation.type, entry.id))
    proofs: dict[str, list[dict[str, Any]]] = {}
    for row in results.get("proof", {}).get("rows", ()):
        proofs.setdefault(row["method"], []).append(row)
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in ("cost", "differences", "pruned"):
        for row in results.get(name, {}).get("rows", ()):
            measured.setdefault((name, row["method"]), []).append(row)
    return Atlas(
        catalog,
        results,
        figures,
        citation,
        {(name, term.id): term for name, terms in vocabularies.items() for term in terms},
        mindmap.family_colours(catalog),
        incoming,
        proofs,
        {row["method"]: row for row in results.get("glyph", {}).get("rows", ())},
        members,
        {id: f"/methods/{id}/" for id in catalog.methods}
        | {id: f"/criteria/{id}/" for id in catalog.criteria}
        | {id: f"/perspectives/{id}/" for id, one in catalog.perspectives.items() if one.snippet},
        measured,
        {method.id: rank for below in members.values() for rank, method in enumerate(below)},
    )


def authors(paper: Paper, most: int = 1000) -> str:
    """Names in reading order, plain text: ``Samira Abnar and Willem Zuidema``."""
    names = [" ".join(reversed(name.split(", ", 1))) for name in paper.authors if name != "others"]
    if "others" in paper.authors or len(names) > most:
        return ", ".join(names[:most]) + " et al."
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def term_link(atlas: Atlas, vocabulary: str, id: str) -> str:
    """A term as a link to the methods that share it; families, subfamilies, categories lead to their definition."""
    term = atlas.terms[vocabulary, id]
    address = f"/browse/?{vocabulary}={id}"
    if vocabulary == "family":
        address = f"/families/{id}/"
    elif vocabulary == "category":
        address = f"/criteria/#{id}"
    elif isinstance(term, Subfamily):
        address = f"/families/{term.family}/#{id}"
    return f'<a href="{address}" title="{escape(term.definition)}">{escape(term.label)}</a>'


def term_links(atlas: Atlas, vocabulary: str, ids: Iterable[str]) -> str:
    return ", ".join(term_link(atlas, vocabulary, id) for id in ids)


def yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown or meaningless"}[value]


def method_link(atlas: Atlas, id: str) -> str:
    method = atlas.catalog.methods[id]
    dot = f'<span class="vx-dot c{atlas.colours[method.family]}" aria-hidden="true"></span>'
    return f"{dot}{link(f'/methods/{id}/', method.name)}"


def entry_link(atlas: Atlas, id: str) -> str:
    """A method, a criterion, or a baseline, which has no page."""
    if id in BASELINES:
        return escape(BASELINES[id])
    if id in atlas.catalog.criteria:
        return link(f"/criteria/{id}/", atlas.catalog.criteria[id].name)
    return method_link(atlas, id)


def provenance(result: Mapping[str, Any]) -> str:
    """Where numbers come from, in one small line."""
    facts = result.get("provenance") or {}
    said = "; ".join(f"{escape(str(key))} {escape(_plain(value))}" for key, value in facts.items() if value)
    return f'<p class="vx-small">Measured: {said}.</p>' if said else ""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(below)}" for key, below in value.items())
    return str(value)


def rows_of(atlas: Atlas, name: str, ids: Iterable[str] | None = None) -> Sequence[dict[str, Any]]:
    """Rows of one result, of all methods or of ``ids``; a page of one method does not read those of the others."""
    if ids is None:
        return atlas.results.get(name, {}).get("rows", ())
    return [row for id in ids for row in atlas.measured.get((name, id), ())]


def grade_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """Measured localisation in the glyph world, for ``ids`` (all when None), best first, beside the baselines."""
    if not atlas.grades:
        return '<p class="vx-missing">Not measured yet.</p>'
    wanted = atlas.grades if ids is None else dict.fromkeys([*ids, *BASELINES])
    rows = [
        atlas.grades[id] for id in wanted if id in atlas.grades and (id in BASELINES or id in atlas.catalog.methods)
    ]
    if all(row["method"] in BASELINES for row in rows):
        return '<p class="vx-missing">Not measured yet.</p>'
    rows.sort(key=lambda row: (-row["mass_inside"], row["method"]))

    def bar(value: float | None) -> str:
        if value is None:
            return "not defined"
        width = 100 * min(max(value, 0), 1)
        return f'<span class="vx-bar" style="--value:{width:.1f}%">{value:.3f}</span>'

    heads = ("Method", "Relevance inside the object", "Pointing game", "On the creature asked about", "Scenes")
    cells = [
        (
            entry_link(atlas, row["method"]),
            bar(row["mass_inside"]),
            bar(row["pointing_game"]),
            bar(row.get("mass_on_target")),
            number(row["scenes"]),
        )
        for row in rows
    ]
    return table(heads, cells, "Localisation on glyph scenes", "vx-grades") + provenance(atlas.results["glyph"])


def method_table(atlas: Atlas, methods: Iterable[Method], label: str) -> str:
    """Methods of one subfamily, one row each."""
    rows = [
        (
            method_link(atlas, method.id),
            str(method.paper.year),
            term_links(atlas, "needs", method.needs),
            term_links(atlas, "task", method.tasks),
            yes_no(method.class_specific),
            term_link(atlas, "output", method.output),
            "runs here" if method.snippet else "described",
        )
        for method in methods
    ]
    heads = ("Method", "Year", "Needs", "Explains", "Class-specific", "Gives", "Code")
    return table(heads, rows, label)


# --- evidence --------------------------------------------------------------------------------------------------


def proof_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """One row for each method, or each of ``ids``: its oracles, the largest error against them, its identities."""
    rows = []
    for id in sorted(atlas.proofs.keys() & set(atlas.catalog.methods if ids is None else ids)):
        proofs = atlas.proofs[id]
        parity = [row for row in proofs if row["kind"] == "parity"]
        errors = [row["value"] for row in parity if row.get("sense") != "at least"]
        agreements = [row["value"] for row in parity if row.get("sense") == "at least"]
        oracles = sorted({row["oracle"] for row in parity if row["oracle"]})
        identities = [row["check"] for row in proofs if row["kind"] == "closed form"]
        failed = sum(not row["passed"] for row in proofs)
        rows.append(
            (
                entry_link(atlas, id),
                escape("; ".join(oracles)) or "none",
                number(max(errors)) if errors else "",
                number(min(agreements)) if agreements else "",
                escape("; ".join(identities)),
                f"{len(proofs)} passed" if not failed else f'<span class="vx-fail">{failed} failed</span>',
            )
        )
    if not rows:
        return '<p class="vx-missing">Not measured yet.</p>'
    what = "Method" if ids is None else "Criterion"
    heads = (what, "Oracle", "Largest relative error", "Smallest agreement", "Identities", "Checks")
    return table(heads, rows, "Proofs", "vx-proofs") + provenance(atlas.results["proof"])


def differences_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """Every difference found between a paper and its official code, with its measured effect."""
    measured = {
        (row["method"], repr(sorted(row["options"].items()))): row for row in rows_of(atlas, "differences", ids)
    }

    def effect(id: str, difference: Difference) -> str:
        if difference.options is None:
            return f"Not measured: {inline(difference.why_not_measured or '')}"
        row = measured.get((id, repr(sorted(difference.options.items()))))
        options = ", ".join(f"{name}={value!r}" for name, value in difference.options.items())
        if row is None:
            return f"<code>{escape(options)}</code><br>not measured yet"
        said = "<br>".join(
            f"{world}: {number(row[world]['mean'])} (smallest {number(row[world]['smallest'])})"
            for world in ("glyph", "photo")
            if world in row  # models of the glyph world see no photographs
        )
        few = f"<br>over {row['scenes']} scenes and one photograph" if row.get("photographs") == 1 else ""
        return f"<code>{escape(options)}</code><br>{said}{few}"

    rows = []
    for id in atlas.catalog.methods if ids is None else ids:
        for one in atlas.catalog.methods[id].differences:
            repository = one.repository.removeprefix("https://")
            place = f"{link(one.repository, repository)}<br>commit {escape(one.commit[:7])}<br>{inline(one.function)}"
            rows.append((method_link(atlas, id), inline(one.paper), inline(one.code), place, effect(id, one)))
    if not rows:
        return '<p class="vx-missing">None recorded.</p>'
    heads = ("Method", "The paper", "The code", "Where", "Correlation of the two maps")
    said = provenance(atlas.results["differences"]) if "differences" in atlas.results else ""
    return table(heads, rows, "Differences between papers and official code", "vx-differences") + said


def cost_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """Measured cost of methods, beside the same methods in other libraries."""
    measured = rows_of(atlas, "cost", ids)
    rows = []
    for row in measured:
        id = row["method"]
        if id not in atlas.catalog.methods:
            continue
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        by = escape(row["by"]) + (f"<br><small>{escape(options)}</small>" if options else "")
        if "failed" in row:
            rows.append((method_link(atlas, id), by, "", f"failed: {escape(row['failed'])}", *[""] * 4))
            continue

        def values(name: str) -> list[str]:
            return [number(row[name].get(batch, "too long")) for batch in ("1", "8")]  # noqa: B023

        passes = escape(atlas.catalog.methods[id].passes or "") if row["by"] == "vitx" and not options else ""
        rows.append(
            (
                method_link(atlas, id),
                by,
                passes,
                number(row["operations"]),
                *values("forwards"),
                *values("memory"),
            )
        )
    if not rows:
        return '<p class="vx-missing">Not measured yet.</p>'
    heads = (
        "Method",
        "By",
        "Passes that it needs",
        "Operations (x forward)",
        "Time, batch 1 (x forward)",
        "Time, batch 8 (x forward)",
        "Memory, batch 1 (MB)",
        "Memory, batch 8 (MB)",
    )
    done = {row["method"] for row in measured}
    missing = [
        method_link(atlas, method.id)
        for method in (atlas.catalog.methods.values() if ids is None else ())
        if method.snippet and method.model == "glyph" and method.id not in done
    ]
    rest = f"<p>Not measured yet: {', '.join(missing)}.</p>" if missing else ""
    return table(heads, rows, "Cost of methods", "vx-cost") + rest + provenance(atlas.results["cost"])


def shapley_figures(atlas: Atlas) -> str:
    """How close methods come to exact Shapley values: two charts and their table."""
    result = atlas.results.get("shapley")
    if not result:
        return '<p class="vx-missing">Not measured yet.</p>'
    parts = []
    for key, label in (("correlation", "Correlation with the exact values"), ("relative_error", "Relative error")):
        series: dict[str, list[tuple[float, float, float]]] = {}
        for row in result["rows"]:
            points = series.setdefault(row["method"], [])
            points.append((row["samples"], row[key], row[f"{key}_deviation"]))
        best = {name: sorted(points) for name, points in series.items()}
        parts.append(charts.curves(best, "Passes or coalitions for each picture", label, label))
    rows = [
        (
            escape(row["method"]),
            number(row["samples"]),
            f"{number(row['correlation'])} ± {number(row['correlation_deviation'])}",
            f"{number(row['relative_error'])} ± {number(row['relative_error_deviation'])}",
        )
        for row in result["rows"]
    ]
    heads = ("Method", "Passes or coalitions", "Correlation", "Relative error")
    parts.append(table(heads, rows, "Distance from exact Shapley values") + provenance(result))
    return "".join(parts)


def pruned_figures(atlas: Atlas) -> str:
    """What pruning saves and keeps: accuracy against operations and time, and the evidence among what lives."""
    result = atlas.results.get("pruned")
    if not result:
        return '<p class="vx-missing">Not measured yet.</p>'
    methods = atlas.catalog.methods
    rows = [row for row in result["rows"] if row["method"] in methods]
    tokens = [row for row in rows if "recall" in row]
    units = [row for row in rows if "recall" not in row]
    share = "Operations, as a share of the full model's"
    parts = [heading(2, "tokens", "Tokens that are dropped or merged")] if tokens else []
    if tokens:
        parts += [
            _pruned_chart(tokens, "operations", "accuracy", share, "Accuracy"),
            _pruned_chart(tokens, "time", "accuracy", "Time, as a share of the full model's", "Accuracy"),
            _pruned_chart(
                tokens,
                "tokens",
                "recall",
                "Share of the patches that the last block reads",
                "Share of the creature in them",
            ),
        ]
    if units:
        parts += [
            heading(2, "units", "Heads, neurons and blocks that are taken out"),
            _pruned_chart(units, "operations", "accuracy", share, "Accuracy"),
        ]
    return "".join(parts) + heading(2, "numbers", "The numbers") + pruned_table(atlas)


def _pruned_chart(rows: list[dict[str, Any]], x: str, y: str, x_label: str, y_label: str) -> str:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for row in sorted(
        (row for row in rows if row[x] <= 1.5), key=lambda row: row[x]
    ):  # more would press the rest together
        series.setdefault(row["method"], []).append((row[x], row[y], 0.0))
    return charts.curves(series, x_label, y_label, f"{y_label} against: {x_label[0].lower()}{x_label[1:]}", x_log=False)


def balance_figures(atlas: Atlas) -> str:
    """Accuracy of models that explain themselves against how true their explanations are."""
    result = atlas.results.get("balance")
    if not result:
        return '<p class="vx-missing">Not measured yet.</p>'
    rows = [row for row in result["rows"] if row["method"] in atlas.catalog.methods]
    if not rows:
        return '<p class="vx-missing">Not measured yet.</p>'
    accuracy = "Accuracy of the model"

    def name(row: dict[str, Any]) -> str:
        own = atlas.catalog.methods[row["method"]].family == "inherent"
        return row["method"] if own else f"glyph, {row['method']}"

    def chart(y: str, label: str) -> str:
        series = {name(row): [(row["accuracy"], row[y], 0.0)] for row in rows}
        return charts.curves(series, accuracy, label, f"{label}, against the accuracy of the model", x_log=False)

    cells = [
        (
            method_link(atlas, row["method"]),
            escape(atlas.catalog.methods[row["method"]].model),
            *(number(row[key]) for key in ("accuracy", "parts", "mass_inside", "pointing_game")),
        )
        for row in rows
    ]
    heads = ("Method", "Model", "Accuracy", "Parts (rank correlation)", "Mass on the creature", "Pointing game")
    return (
        chart("parts", "Agreement on the parts")
        + chart("mass_inside", "Mass on the creature")
        + heading(2, "numbers", "The numbers")
        + table(heads, cells, "Accuracy and explanation", "vx-balance")
        + provenance(result)
    )


def pruned_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """Accuracy, operations, time and evidence of pruned models at every measured setting."""
    rows = [
        (
            method_link(atlas, row["method"]),
            escape(", ".join(f"{name}={value}" for name, value in row["options"].items())),
            f"{number(row['accuracy'])} (full: {number(row['plain_accuracy'])})",
            number(row["operations"]),
            number(row["time"]),
            *(number(row[name]) if name in row else "" for name in ("tokens", "precision", "recall")),
            number(row["agreement"]),
        )
        for row in rows_of(atlas, "pruned", ids)
        if row["method"] in atlas.catalog.methods
    ]
    if not rows:
        return '<p class="vx-missing">Not measured yet.</p>'
    heads = (
        "Method",
        "Setting",
        "Accuracy",
        "Operations (x full)",
        "Time (x full)",
        "Patches alive",
        "Creature in them",
        "Creature kept",
        "Same explanation (correlation)",
    )
    return table(heads, rows, "Pruned models", "vx-pruned") + provenance(atlas.results["pruned"])


# --- method page -----------------------------------------------------------------------------------------------


def arxiv_link(arxiv: str) -> str:
    return link("https://arxiv.org/abs/" + arxiv, "arXiv " + arxiv)


def paper_facts(paper: Paper) -> str:
    """Title, authors, venue and links."""
    links = []
    if paper.doi:
        links.append(link("https://doi.org/" + quote(paper.doi, safe="/().;:-_"), "DOI " + paper.doi))
    if paper.arxiv:
        links.append(arxiv_link(paper.arxiv))
    if paper.url:
        links.append(link(paper.url, "Page of the paper"))
    venue = paper.venue or "venue unknown"
    year = "" if str(paper.year) in venue else f", {paper.year}"
    below = " · ".join(links) or "No DOI or arXiv identifier known"
    return f"<cite>{escape(paper.title)}</cite><br>{escape(authors(paper))}<br>{escape(venue + year)}<br>{below}"


def facts(entries: Iterable[tuple[str, str]], classes: str = "") -> str:
    """Facts as a list of names and values, both HTML."""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)
    return f'<dl class="vx-card {classes}">{items}</dl>'


def _card(atlas: Atlas, method: Method) -> str:
    code = "None known"
    if method.code:
        licence = {None: "licence unknown", "none": "no licence given"}.get(
            method.code.licence, f"licence {method.code.licence}"
        )
        code = f"{link(method.code.url, method.code.url.removeprefix('https://'))} ({escape(licence)})"
    draws = "Yes, <code>explain</code> takes a <code>generator</code>." if method.stochastic else "No"
    entries = [
        ("Paper", paper_facts(method.paper)),
        ("Official code", code),
        (
            "Branch",
            f"{term_link(atlas, 'family', method.family)} › {term_link(atlas, 'subfamily', method.subfamily)}",
        ),
        ("Motivation", term_links(atlas, "motivation", method.motivation.terms)),
        ("Explains", term_links(atlas, "task", method.tasks)),
        ("Needs", term_links(atlas, "needs", method.needs)),
        ("Gives", term_link(atlas, "output", method.output)),
        ("Class-specific", yes_no(method.class_specific).capitalize()),
        ("Random", draws),
        ("In the survey", f'{escape(IN_SURVEY[method.in_survey])} <a href="/about/#the-survey">What this rests on</a>'),
    ]
    if method.note:
        entries.append(("Note", inline(method.note)))
    return facts(entries)


def proof(atlas: Atlas, id: str) -> str:
    """Every recorded check of one method or criterion."""
    rows = atlas.proofs.get(id)
    if not rows:
        return '<p class="vx-missing">Not measured yet.</p>'
    order = list(KINDS)
    rows = sorted(rows, key=lambda row: order.index(row["kind"]) if row["kind"] in order else len(order))
    cells = [
        (
            escape(KINDS.get(row["kind"], str(row["kind"]))),
            escape(str(row["check"])),
            escape(str(row["oracle"])),
            number(row["value"]),
            ("≥ " if row.get("sense") == "at least" else "≤ ") + number(row["bound"]),
            '<span class="vx-pass">passed</span>' if row["passed"] else '<span class="vx-fail">failed</span>',
        )
        for row in rows
    ]
    heads = ("Kind", "Check", "Against", "Value", "Bound", "Result")
    return table(heads, cells, "How correct is proven", "vx-proof") + provenance(atlas.results["proof"])


def relations(atlas: Atlas, entry: Method | Criterion) -> str:
    """Links to related entries, in both directions."""
    groups: dict[str, dict[str, None]] = {}  # name -> ids in order, each once
    for relation in entry.relations:
        groups.setdefault(FORWARD[relation.type], {})[relation.id] = None
    for kind, id in atlas.incoming.get(entry.id, ()):
        groups.setdefault(BACKWARD[kind], {})[id] = None
    if not groups:
        return "<p>No relation to another entry is recorded.</p>"
    entries = ((name, ", ".join(entry_link(atlas, id) for id in ids)) for name, ids in groups.items())
    return facts(entries, "vx-relations")


def measured_criteria(atlas: Atlas) -> set[str]:
    """Criteria for which a result of the benchmark holds a number."""
    return {
        row["criterion"]
        for name, result in atlas.results.items()
        if name.startswith("benchmark-")
        for row in result.get("rows", ())
        if row["mean"] is not None
    }


def reported_value(one: Reported) -> str:
    return escape(f"{one.value:g}" + (f"\N{NO-BREAK SPACE}{one.unit}" if one.unit else ""))


def reported_metric(atlas: Atlas, one: Reported) -> str:
    """The paper's name of the metric, above the criterion that asks the same here."""
    return escape(one.metric) + small("Here: ", entry_link(atlas, one.criterion) if one.criterion else "")


def _source(text: str) -> str:
    """An address as a link; a place such as github:owner/name:file as a link to its repository."""
    if re.fullmatch(r"https://[^\s<>\"'\\{}]+", text):
        return link(text, text.removeprefix("https://"))
    repository = re.match(r"github:([\w-]+/[\w.-]+):", text, re.ASCII)
    return link(f"https://github.com/{repository[1]}", text) if repository else escape(text)


def reported_where(one: Reported) -> str:
    """Table and source, and what else must be known."""
    return escape(one.where) + small("Seen in: ", _source(one.source)) + small("", inline(one.note or ""))


def reported(atlas: Atlas, method: Method) -> str:
    """What the paper of a method reports, with a word of caution; nothing where no number was found."""
    if not method.reported:
        return ""
    heads = ("Metric", "Value", "Model", "Data", "Where seen")
    rows = [
        (reported_metric(atlas, one), reported_value(one), escape(one.model), escape(one.data), reported_where(one))
        for one in method.reported
    ]
    measured = measured_criteria(atlas)
    asked = dict.fromkeys(one.criterion for one in method.reported if one.criterion in measured)
    ours = ", ".join(entry_link(atlas, id) for id in asked if id)
    return (
        heading(2, "reported", "What the paper reports")
        + "<p>Copied, not measured here; a row says so where others than the authors gave the number. "
        'Our own numbers, on <a href="/benchmark/">the benchmark page</a>'
        + (f" and with {ours}" if ours else "")
        + ", are of other models and other data, and steps and ways of hiding differ too: they cannot be compared "
        'with these directly. <a href="/reported/">What all papers report</a>.</p>'
        + table(heads, rows, "What the paper reports", "vx-reported")
    )


def _rail(atlas: Atlas, method: Method) -> str:
    """Left column of a method page: the branches of its family, and its neighbours in its own branch."""
    colour = atlas.colours[method.family]
    items = []
    for term in atlas.catalog.taxonomy.subfamilies:
        if term.family != method.family or term.id not in atlas.members:
            continue
        below = ""
        if term.id == method.subfamily:
            siblings = atlas.members[term.id]
            here = atlas.ranks[method.id]
            near = siblings[max(0, here - NEIGHBOURS) : here + NEIGHBOURS + 1]
            below = "".join(
                f'<li><a href="/methods/{one.id}/"{" aria-current=page" if one is method else ""}>'
                f"{escape(one.name)}</a></li>"
                for one in near
            )
            below = f"<ul>{below}</ul>"
        items.append(f"<li>{link(f'/families/{term.family}/#{term.id}', term.label)}{below}</li>")
    family = atlas.terms["family", method.family]
    return (
        f'<nav class="vx-rail c{colour}" aria-label="Methods nearby">'
        f'<p><a href="/families/{family.id}/">{escape(family.label)}</a></p><ul>{"".join(items)}</ul></nav>'
    )


def method_page(atlas: Atlas, id: str, code: str | None, figure: Figure | None = None) -> Page:
    """The page of one method. ``code``: its executed snippet as HTML (from ``notebook``); None where there is none."""
    method = atlas.catalog.methods[id]
    family, subfamily = atlas.terms["family", method.family], atlas.terms["subfamily", method.subfamily]
    runs = f"vitx run {id}"
    if method.output == "heatmap" and method.model == "glyph" and "changed-architecture" not in method.needs:
        runs += f"\nvitx run {id} --image coffee --model photo"
    parts = [
        f'<nav class="vx-crumbs" aria-label="Breadcrumb"><a href="/families/">Families</a> › '
        f"{link(f'/families/{family.id}/', family.label)} › "
        f"{link(f'/families/{family.id}/#{subfamily.id}', subfamily.label)}</nav>",
        f'<h1 class="vx-method c{atlas.colours[method.family]}">{escape(method.name)}</h1>',
        f'<p class="vx-lead">{inline(method.motivation.text)}</p>',
    ]
    if figure:
        parts.append(picture(figure, "Output of the code below."))
    parts += [
        _card(atlas, method),
        heading(2, "mechanism", "Mechanism"),
        markdown_html(method.mechanism, atlas.places),
    ]
    if method.snippet:
        python = f'import vitx\n\nexplain = vitx.load("{id}")  # explain(model, images, target=None)'
        parts += [
            heading(2, "run-it", "Run it"),
            code_block(runs, "language-console"),
            code_block(python, "language-python"),
            heading(2, "code", "The code"),
            f"<p>One file, {link('/' + method.snippet, method.snippet)}, executed for this page.</p>",
            code if code is not None else '<p class="vx-missing">Not executed yet.</p>',
            heading(2, "correct", "How correct is proven"),
            proof(atlas, id),
        ]
        if method.differences:
            parts += [
                heading(2, "official-code", "What the official code does"),
                '<p>Where it differs from the paper. <a href="/official-code/">All methods</a>.</p>',
                differences_table(atlas, [id]),
            ]
        if ("cost", id) in atlas.measured:
            parts += [
                heading(2, "cost", "Cost"),
                '<p>Beside one plain forward pass. <a href="/cost/">All methods</a>.</p>',
                cost_table(atlas, [id]),
            ]
        if ("pruned", id) in atlas.measured:
            parts += [
                heading(2, "pruned", "What it keeps and saves"),
                '<p>On glyph scenes, beside the full model. <a href="/pruning/">All methods</a>.</p>',
                pruned_table(atlas, [id]),
            ]
        if id in atlas.grades or (method.output == "heatmap" and names_creatures(atlas.catalog, method)):
            parts += [
                heading(2, "ground-truth", "Ground truth in the glyph world"),
                "<p>How much of the relevance falls on the creature that decides the class, in scenes of one "
                "creature and of two. "
                '<a href="/how-to-read/#numbers">How to read these numbers</a>.</p>',
                grade_table(atlas, [id]),
            ]
    else:
        parts += [
            heading(2, "code", "The code"),
            f'<p class="vx-missing">No code here yet. {inline(method.why_no_snippet or "")} '
            f"{contribute.snippet_link(contribute.repository(atlas.citation), method)}.</p>",
        ]
    parts += [
        heading(2, "relations", "Relations"),
        relations(atlas, method),
        reported(atlas, method),
        heading(2, "cite", "Cite"),
        code_block(cite.bibtex([method]).strip(), "language-bibtex"),
        f'<p class="vx-small">Facts of this entry were seen in: '
        f"{', '.join(escape(source) for source in method.sources)}.</p>",
    ]
    description = f"{method.name}: {method.motivation.text}"
    return Page(f"methods/{id}/", method.name, description, "\n".join(parts), ("navigation",), _rail(atlas, method))


def moved(atlas: Atlas, site: str) -> dict[str, str]:
    """Former address -> a small page that leads to the present one, for each id that an entry had before.

    ``site``: address of the site, or nothing; canonical links are absolute where there is one.
    """
    made = {}
    for id, entry in {**atlas.catalog.methods, **atlas.catalog.criteria}.items():
        for old in entry.formerly:
            text = f"{old} is now called {id}"
            canonical = f"{site.rstrip('/')}{atlas.places[id]}" if site else f"../{id}/"
            made[f"{atlas.places[id].strip('/').partition('/')[0]}/{old}/"] = (
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f'<title>{text}</title><meta name="description" content="{text}.">'
                f'<link rel="canonical" href="{escape(canonical)}">'
                f'<meta http-equiv="refresh" content="0; url=../{id}/index.html"></head>'
                f"<body><h1>{text}</h1><p>{link(f'../{id}/index.html', entry.name)}</p></body></html>\n"
            )
    return made


def picture_text(method: Method) -> str:
    """What is seen on a picture that the method's snippet has shown."""
    if method.output == "heatmap":
        return f"{method.name}: pictures, each beside the relevance that the method gives, drawn over the picture"
    return f"{method.name}: pictures, each beside what the method gives for it"


# --- other pages -----------------------------------------------------------------------------------------------


def counts(atlas: Atlas) -> str:
    methods = atlas.catalog.methods
    runs = sum(method.snippet is not None for method in methods.values())
    families = len(atlas.catalog.taxonomy.families)
    return f"<strong>{len(methods)}</strong> methods in {families} families, <strong>{runs}</strong> of them run here."


def map_overview(atlas: Atlas) -> str:
    """The mind map without its methods, light enough for the first page: drawn, and as a list for a phone."""
    root = mindmap.overview(mindmap.tree(atlas.catalog, "family"))
    return (
        '<div class="vx-mindmap vx-map-overview" data-search-exclude>'
        f"{mindmap.drawing(root)}{mindmap.outline(root)}{mindmap.legend(atlas.catalog, hollow=False)}</div>"
    )


def families_page(atlas: Atlas) -> Page:
    parts = ["<h1>Families</h1>", f"<p>{counts(atlas)}</p>"]
    for term in atlas.catalog.taxonomy.families:
        own = [sub for sub in atlas.catalog.taxonomy.subfamilies if sub.family == term.id]
        number_of = sum(len(atlas.members.get(sub.id, ())) for sub in own)
        parts.append(
            f'<section class="vx-family c{atlas.colours[term.id]}">'
            f'<h2 id="{term.id}"><a href="/families/{term.id}/">{escape(term.label)}</a> '
            f'<span class="vx-zh" lang="zh">{escape(term.label_zh)}</span></h2>{markdown_html(term.definition)}'
            f'<p class="vx-small">{_methods(number_of)}. Branches: '
            + ", ".join(link(f"/families/{term.id}/#{sub.id}", sub.label) for sub in own)
            + ".</p></section>"
        )
    return Page("families/", "Families", "The families of explanation methods.", "\n".join(parts), ())


def _methods(count: int) -> str:
    return "1 method" if count == 1 else f"{count} methods"


def family_page(atlas: Atlas, family: Term) -> Page:
    branches = [term for term in atlas.catalog.taxonomy.subfamilies if term.family == family.id]
    methods = [method for term in branches for method in atlas.members.get(term.id, ())]
    parts = [
        f'<h1 class="vx-method c{atlas.colours[family.id]}">{escape(family.label)} '
        f'<span class="vx-zh" lang="zh">{escape(family.label_zh)}</span></h1>',
        markdown_html(family.definition),
    ]
    figure = atlas.figures.get(f"compare-{family.id}")
    if figure:
        alt = (
            f"Rows are the heat-map methods of the family {family.label}, columns are photographs and glyph scenes of "
            "two creatures, each asked about once; each cell shows the relevance that the method gives"
        )
        caption = (
            "The family's heat-map methods: on photographs for the class that <code>photo</code> predicts, and on "
            "glyph scenes for each of the two creatures, below whose picture stands the truth."
        )
        parts.append(picture(figure._replace(alt=alt), caption, wide=True))
    for term in branches:
        below = atlas.members.get(term.id)
        parts += [
            heading(2, term.id, term.label, term.label_zh),
            markdown_html(term.definition),
            method_table(atlas, below, term.label) if below else '<p class="vx-missing">No entry yet.</p>',
        ]
    if any(method.id in atlas.grades for method in methods):
        parts += [
            heading(2, "ground-truth", "Ground truth in the glyph world"),
            '<p>Only where a method returns a heat map. <a href="/how-to-read/#numbers">How to read this</a>.</p>',
            grade_table(atlas, [method.id for method in methods]),
        ]
    return Page(f"families/{family.id}/", family.label, family.definition, "\n".join(parts), ())


def vocabulary_page(atlas: Atlas) -> Page:
    taxonomy = atlas.catalog.taxonomy
    parts = [
        "<h1>Vocabulary</h1>",
        "<p>The words that entries are classified with. Families and their branches are defined on "
        '<a href="/families/">their own pages</a>.</p>',
    ]
    for name, title, terms in (
        ("motivation", "Motivations", taxonomy.motivations),
        ("task", "Tasks", taxonomy.tasks),
        ("needs", "Needs", taxonomy.needs),
        ("output", "Outputs", taxonomy.outputs),
    ):
        parts.append(heading(2, name, title))
        parts.append(
            '<dl class="vx-card">'
            + "".join(
                f'<div id="{name}-{term.id}"><dt>{link(f"/browse/?{name}={term.id}", term.label)}'
                f'<br><span class="vx-zh" lang="zh">{escape(term.label_zh)}</span></dt>'
                f"<dd>{inline(term.definition)}</dd></div>"
                for term in terms
            )
            + "</dl>"
        )
    return Page("vocabulary/", "Vocabulary", "The terms of the catalogue.", "\n".join(parts), ("navigation",))


def _accuracy(metrics: Mapping[str, float]) -> str:
    """The first metric of a card that is an accuracy of the model itself, with its name."""
    for name, value in metrics.items():
        if name.split("_")[0] in ("top1", "accuracy", "right", "caption") and not name.endswith(("plain", "glyph")):
            return f"{number(value)} <code>{escape(name)}</code>"
    return ""


def models_page(atlas: Atlas) -> Page:
    """The model cards."""
    parts = [
        "<h1>Models</h1>",
        "<p>Checkpoints that come with vitx. Any timm Vision Transformer works in their place: "
        "<code>--model deit_small_patch16_224</code>.</p>",
    ]
    rows = []
    for card in atlas.catalog.models.values():
        method = atlas.catalog.methods.get(card.method or "")
        rows.append(
            [
                f'<a href="#{card.id}">{escape(card.id)}</a>',
                link(f"/methods/{method.id}/", method.name) if method else "",
                f"{card.parameters:,}",
                number(card.minutes),
                _accuracy(card.metrics),
            ]
        )
    if rows:
        heads = ("Model", "Made for", "Weights", "Minutes of training", "Accuracy, by its name on the card")
        parts.append(table(heads, rows, "All models"))
        plain = atlas.catalog.models.get("glyph")
        if plain:
            parts.append(
                f"<p>The plain Vision Transformer beside which most of them stand is <code>glyph</code>: accuracy "
                f"{_accuracy(plain.metrics)}. Minutes are of two cores or one, at times beside other work.</p>"
            )
    for card in atlas.catalog.models.values():
        metrics = ", ".join(f"{escape(name)} {number(value)}" for name, value in card.metrics.items())
        entries = [
            ("Architecture", inline(card.architecture)),
            ("Size", f"{card.parameters:,} weights; input {card.input_size} px; {card.classes} classes"),
            ("Training", inline(card.training)),
            ("Command", f"<code>{escape(card.command)}</code> (seed {card.seed}, {card.minutes:g} minutes)"),
            ("Measured", metrics or "Not measured yet"),
            ("Limits", inline(card.limits)),
            ("Source", inline(card.source)),
            ("Licence", escape(card.licence)),
            ("SHA-256", f"<code>{card.sha256}</code>"),
        ]
        parts += [heading(2, card.id, card.name), facts(entries)]
    if not atlas.catalog.models:
        parts.append('<p class="vx-missing">No model card yet.</p>')
    return Page("models/", "Models", "The checkpoints that come with vitx.", "\n".join(parts), ("navigation",))


def render(atlas: Atlas) -> list[Page]:
    """Every page that comes from the catalogue alone. Method pages are made one by one, with ``method_page``."""
    return [
        families_page(atlas),
        *(family_page(atlas, family) for family in atlas.catalog.taxonomy.families),
        vocabulary_page(atlas),
        models_page(atlas),
    ]


# --- what hand-written pages ask for ---------------------------------------------------------------------------

_FIGURES = {
    "compare-photo": (
        "Rows are photographs, columns are methods, one of every branch; each cell shows the "
        "relevance that the method gives to the class in question, drawn over the photograph",
        "The <code>photo</code> model on photographs.",
    ),
    "compare-glyph": (
        "Each row is a glyph scene with two creatures, asked about one of them; columns are the scene, the truth, and "
        "methods; each cell shows the relevance that the method gives, drawn over the scene",
        "The <code>glyph</code> model on scenes whose evidence is known; each is asked about twice.",
    ),
}


def insert(atlas: Atlas, name: str) -> str:
    """HTML for ``<!-- vitx: name -->`` in a hand-written page. Raises KeyError for an unknown name."""
    if name in _FIGURES:
        alt, caption = _FIGURES[name]
        figure = atlas.figures.get(name)
        missing = '<p class="vx-missing">Not drawn yet.</p>'
        return picture(figure._replace(alt=alt), caption, wide=True) if figure else missing
    inserts = {
        "mindmap": lambda: map_overview(atlas),
        "counts": lambda: f"<p>{counts(atlas)}</p>",
        "grades": lambda: grade_table(atlas),
        "proofs": lambda: proof_table(atlas),
        "differences": lambda: differences_table(atlas),
        "cost": lambda: cost_table(atlas),
        "shapley": lambda: shapley_figures(atlas),
        "pruned": lambda: pruned_figures(atlas),
        "balance": lambda: balance_figures(atlas),
        "citation": lambda: code_block(citation(atlas.citation), "language-bibtex"),
    }
    return inserts[name]()


def citation(cff: Mapping[str, Any]) -> str:
    """The content of CITATION.cff as BibTeX."""
    names = " and ".join(
        ", ".join(filter(None, (author.get("family-names"), author.get("given-names")))) or f"{{{author['name']}}}"
        for author in cff["authors"]
    )
    fields = {
        "title": f"{{{cff['title']}}}",
        "author": names,
        "version": cff.get("version"),
        "year": str(cff.get("date-released", ""))[:4],
        "doi": cff.get("doi"),
        "url": cff.get("url") or cff.get("repository-code"),
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@software{{vitx,\n{lines}\n}}"
