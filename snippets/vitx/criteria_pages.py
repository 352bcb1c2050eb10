"""The pages of evaluation: criteria and the benchmark, as HTML text. No mkdocs, no torch, no files."""

import ast
import re
from collections.abc import Callable
from html import escape
from typing import Any

from vitx import benchmark_pages, cite, contribute, pages
from vitx.findings import findings
from vitx.markup import Figure, code_block, heading, inline, link, markdown_html, number, picture, small, table
from vitx.pages import Atlas, Page, entry_link, facts, provenance
from vitx.schema import Criterion

READS = {  # parameter of a snippet's score -> what it is
    "relevance": "the map",
    "target": "",  # every criterion is about a class
    "logits": "the prediction for the whole picture",
    "empty_logits": "the prediction with everything hidden",
    "inside": "where the object is",
    "single": "predictions with one patch hidden",
    "sets": "predictions with random sets of patches hidden",
    "shapley": "exact Shapley values of groups of patches",
    "parts": "what each part of the object is worth to the model",
    "most_first": "predictions as patches are hidden, most relevant first",
    "least_first": "predictions as patches are hidden, least relevant first",
    "bands": "predictions with patches of like relevance hidden",
    "imputed": "predictions as the most relevant patches are imputed",
    "multiplied_logits": "the prediction for the picture times its map",
    "noisy": "maps of noisy copies",
    "randomised": "maps of the model with random weights",
    "other_relevance": "the map for another class",
    "memorised_relevance": "the map of a model that learned random labels",
    "mosaic": "the map of a mosaic of pictures, one of them of the class",
    "double_mosaic": "the map of a mosaic of pictures, two of them of the class",
    "pair": "the map of a scene with two objects",
    "passes": "the passes that the explanation takes",
}

# For the cost of a large run, see scale.
PICTURES, MODELS = 50_000, 3
COSTLY = 200  # passes
ASSUMED = 1_000  # forward passes a second on one GPU: assumed, not measured


def reads(source: str) -> tuple[str, ...]:
    """Names of the quantities that the ``score`` of a snippet reads: its parameters before the star."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "score":
            return tuple(argument.arg for argument in node.args.args)
    return ()


def _reads(atlas: Atlas, id: str) -> str:
    said = (READS.get(name, name.replace("_", " ")) for name in atlas.reads.get(id, ()))
    return escape("; ".join(filter(None, said)))


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence outside a formula."""
    for stop in re.finditer(r"(?<!\.)\.(?=\s+[A-Z`$*]|\s*$)", text):
        if text[: stop.start()].count("$") % 2 == 0:
            return text[: stop.end()]
    return text


# --- criteria ----------------------------------------------------------------------------------------------------


def criteria_page(atlas: Atlas) -> Page:
    """All criteria by category."""
    criteria = atlas.catalog.criteria.values()
    runs = sum(one.snippet is not None for one in criteria)
    parts = [
        "<h1>Criteria</h1>",
        f"<p><strong>{len(atlas.catalog.criteria)}</strong> ways to judge an explanation, <strong>{runs}</strong> of "
        'them run here. <a href="/benchmark/">What they say of the methods</a>.</p>',
    ]
    for term in atlas.catalog.taxonomy.categories:
        rows = [
            (
                entry_link(atlas, one.id),
                inline(_first_sentence(one.definition)) + small("Reads: ", _reads(atlas, one.id)),
                benchmark_pages.arrow(one),
                "runs here" if one.snippet else "described" + small("", inline(one.why_no_snippet or "")),
            )
            for one in criteria
            if one.category == term.id
        ]
        heads = ("Criterion", "What is computed", "Better", "Code")
        parts += [
            heading(2, term.id, term.label, term.label_zh),
            markdown_html(term.definition),
            table(heads, rows, term.label, "vx-criteria") if rows else '<p class="vx-missing">No entry yet.</p>',
        ]
    parts += [
        heading(2, "correct", "How correct is proven"),
        "<p>What the tests of each criterion measured in their last recorded run.</p>",
        pages.proof_table(atlas, atlas.catalog.criteria),
    ]
    return Page(
        "criteria/", "Criteria", "Criteria by which explanations are judged.", "\n".join(parts), ("navigation",)
    )


def criterion_page(atlas: Atlas, id: str, code: str | None, figure: Figure | None = None) -> Page:
    """The page of one criterion. ``code``: its executed snippet as HTML; None where there is none."""
    criterion = atlas.catalog.criteria[id]
    category = atlas.terms["category", criterion.category]
    parts = [
        f'<nav class="vx-crumbs" aria-label="Breadcrumb"><a href="/criteria/">Criteria</a> › '
        f"{link(f'/criteria/#{category.id}', category.label)}</nav>",
        f"<h1>{escape(criterion.name)}</h1>",
        facts(_facts(atlas, criterion)),
        heading(2, "definition", "Definition"),
        markdown_html(criterion.definition, atlas.places),
    ]
    if figure:
        parts.insert(2, picture(figure, "Output of the code below."))
    parts += [heading(2, "code", "The code")]
    if criterion.snippet:
        python = (
            "import vitx\nfrom vitx import evaluate\n\n"
            f'scores = evaluate.measure("{id}", model, images, explain=vitx.load("grad-cam"))'
        )
        parts += [
            code_block(python, "language-python"),
            f"<p>One file, {link('/' + criterion.snippet, criterion.snippet)}, executed for this page.</p>",
            code if code is not None else '<p class="vx-missing">Not executed yet.</p>',
            heading(2, "correct", "How correct is proven"),
            pages.proof(atlas, id),
        ]
        rankings = [(data, benchmark_pages.ranking(atlas, data, id)) for data in benchmark_pages.DATA]
        if any(html for _, html in rankings):
            parts += [
                heading(2, "ranking", "What it says of the methods"),
                '<p><a href="/benchmark/">All criteria</a>.</p>',
                *(heading(3, f"ranking-{data}", benchmark_pages.DATA[data]) + html for data, html in rankings if html),
            ]
    else:
        parts.append(
            f'<p class="vx-missing">No code here yet. {inline(criterion.why_no_snippet or "")} '
            f"{contribute.snippet_link(contribute.repository(atlas.citation), criterion)}.</p>"
        )
    parts += [heading(2, "relations", "Relations"), pages.relations(atlas, criterion)]
    if criterion.paper:
        parts += [heading(2, "cite", "Cite"), code_block(cite.bibtex([criterion]).strip(), "language-bibtex")]
    parts.append(f'<p class="vx-small">Facts of this entry were seen in: {escape(", ".join(criterion.sources))}.</p>')
    description = f"{criterion.name}, a criterion of {category.label.lower()}: definition, code and what it measured."
    return Page(f"criteria/{id}/", criterion.name, description, "\n".join(parts), ("navigation",))


def _facts(atlas: Atlas, criterion: Criterion) -> list[tuple[str, str]]:
    paper = pages.paper_facts(criterion.paper) if criterion.paper else "Of no single work"
    survey = f'{escape(pages.IN_SURVEY[criterion.in_survey])} <a href="/about/#the-survey">What this rests on</a>'
    entries = [
        ("Category", pages.term_link(atlas, "category", criterion.category)),
        ("Better", benchmark_pages.BETTER[criterion.better]),
        ("Paper", paper),
        ("Reads", _reads(atlas, criterion.id)),
        ("Implemented in", escape(", ".join(criterion.implemented_in)) or "No other place known"),
        ("In the survey", survey),
        ("Note", inline(criterion.note or "")),
    ]
    return [(name, value) for name, value in entries if value]


def picture_text(criterion: Criterion) -> str:
    """What is seen on a picture that the criterion's snippet has shown."""
    return f"{criterion.name}: maps of one glyph scene by several methods, and the scores of each over eight scenes"


# --- a large run -------------------------------------------------------------------------------------------------


def scale(atlas: Atlas) -> str:
    """Passes and hours of explaining 50,000 pictures with all methods and three models, from what was measured."""
    cheapest: dict[str, dict[str, Any]] = {}  # rows at default settings, or the cheapest where there is none
    for row in atlas.results.get("cost", {}).get("rows", ()):
        id = row["method"]
        if row["by"] == "vitx" and "operations" in row and id in atlas.catalog.methods:
            cheapest[id] = min(cheapest.get(id, row), row, key=lambda one: (bool(one["options"]), one["operations"]))
    if not cheapest:
        return _missing("vitx bench --cost")
    each = {id: row["operations"] for id, row in cheapest.items()}
    seconds = sorted(
        row["seconds"]["1"] / row["forwards"]["1"]
        for row in cheapest.values()
        if row.get("seconds", {}).get("1") and row.get("forwards", {}).get("1")
    )
    second = seconds[len(seconds) // 2] if seconds else None
    cheap = [value for value in each.values() if value <= COSTLY]
    lines = [
        (f"Explaining with all {len(each)} methods", sum(each.values())),
        (f"Explaining with the {len(cheap)} methods of at most {COSTLY} passes", sum(cheap)),
    ]
    for data, name in benchmark_pages.DATA.items():
        result = benchmark_pages.result(atlas, data).get("provenance", {})
        if result.get("passes") and result.get("data", {}).get("pictures"):
            label = f"The whole benchmark, as it was run: {name}"
            lines.append((escape(label), result["passes"] / result["data"]["pictures"]))

    def hours(seconds: float) -> str:
        return f"{seconds / 3600:,.0f}" if seconds > 36_000 else f"{seconds / 3600:.2g}"

    def cells(label: str, passes: float) -> tuple[str, ...]:
        total = passes * PICTURES * MODELS
        here = hours(total * second) if second else "not measured"
        return label, f"{passes:,.0f}", number(total), here, hours(total / ASSUMED)

    heads = (
        "What",
        "Passes for one picture and model",
        f"Passes for {PICTURES:,} pictures and {MODELS} models",
        "Hours on the processor that was measured",
        f"GPU hours, assuming {ASSUMED:,} passes a second",
    )
    reduced = [
        f"{entry_link(atlas, id)} ({benchmark_pages.arguments(row['options'])})"
        for id, row in cheapest.items()
        if row["options"]
    ]
    said = [
        f"Hours = passes for one picture × {PICTURES:,} pictures × {MODELS} models × seconds for a pass ÷ 3600.",
        'Passes of an explanation are its operations over those of a forward pass, from <a href="/cost/">the measured '
        "cost</a>.",
        f"Not at default settings: {', '.join(reduced)}." if reduced else "",
        f"On the processor a pass took {second:.3g} s, the median over methods." if second else "",
        f"The speed of a GPU is an assumption and was not measured: at S passes a second, multiply the last column by "
        f"{ASSUMED:,} ÷ S.",
        "Both speeds are for models of the size of <code>vit_small_patch16_224</code>.",
    ]
    return (
        table(heads, [cells(*line) for line in lines], "Cost of a large run", "vx-scale")
        + f'<p class="vx-small">{" ".join(filter(None, said))}</p>'
        + provenance(atlas.results["cost"])
    )


# --- what the hooks ask for --------------------------------------------------------------------------------------

_BENCHMARK: dict[str, Callable[[Atlas, str], str]] = {
    "findings": findings,
    "scores": benchmark_pages.scores,
    "curves": benchmark_pages.curves,
    "ranks": benchmark_pages.ranks,
    "pareto": benchmark_pages.pareto,
    "agreement": benchmark_pages.agreement,
    "cascade": benchmark_pages.cascade,
    "skipped": benchmark_pages.skipped,
}


def render(atlas: Atlas) -> list[Page]:
    """Pages that come from the catalogue alone. Those of criteria are made one by one, with ``criterion_page``."""
    return [criteria_page(atlas)]


def insert(atlas: Atlas, name: str) -> str:
    """HTML for ``<!-- vitx: name -->``; "scores-glyph" is the table of scores on glyph scenes, and so on.

    Raises KeyError for an unknown name.
    """
    if name == "scale":
        return scale(atlas)
    kind, _, data = name.partition("-")
    if kind in _BENCHMARK and data in benchmark_pages.DATA:
        if not benchmark_pages.result(atlas, data):
            return _missing(f"vitx bench --data {data}")
        return _BENCHMARK[kind](atlas, data) or '<p class="vx-missing">This run holds no such numbers.</p>'
    return pages.insert(atlas, name)


def _missing(command: str) -> str:
    return f'<p class="vx-missing">Not measured yet. <code>{command}</code> measures it.</p>'
