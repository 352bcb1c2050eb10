"""The pages: catalogue and measured results in, HTML text out. No mkdocs, no torch, no files.

Every field of the catalogue is escaped; Markdown fields go through ``markdown_html``, which lets no HTML through.
Links are written from the root of the site (``/methods/evit/``); ``relative_links`` makes them work from a folder.
"""

import json
import posixpath
import re
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape, unescape
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import quote

import bs4
import markdown
import math_core
from PIL import Image

from vitx import cite, mindmap
from vitx.schema import Catalog, Method, Paper, Subfamily, Term

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


class Figure(NamedTuple):
    """A picture of the site: its address from the root, its size in pixels, what is seen on it."""

    src: str
    width: int
    height: int
    alt: str = ""


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
    }
    incoming: dict[str, list[tuple[str, str]]] = {}
    members: dict[str, list[Method]] = {}
    for method in catalog.methods.values():
        members.setdefault(method.subfamily, []).append(method)
        for relation in method.relations:
            incoming.setdefault(relation.id, []).append((relation.type, method.id))
    proofs: dict[str, list[dict[str, Any]]] = {}
    for row in results.get("proof", {}).get("rows", ()):
        proofs.setdefault(row["method"], []).append(row)
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
    )


# --- text ------------------------------------------------------------------------------------------------------

_converter = math_core.LatexToMathML(fancy_error=False)

# Code comes first, so that a dollar inside it stays a dollar.
_MATH = re.compile(
    r"(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<dollar>\\\$)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|\$(?!\s)(?P<inline>(?:[^$\n]|\n(?!\s*\n))+?)(?<!\s)\$(?!\d)",
    re.DOTALL,
)
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters that stand for a formula while Markdown is at work


def math(latex: str, *, display: bool) -> str:
    """LaTeX as MathML; what cannot be read is shown as it is, in ``<code class="vx-bad-math">``."""
    try:
        mathml = _converter.convert_with_local_state(latex.strip(), displaystyle=display)
    except math_core.LatexError as error:
        problem = str(error).strip().splitlines()[0]
        return f'<code class="vx-bad-math" title="{escape(problem)}">{escape(latex)}</code>'
    if not display:
        return mathml
    return f'<span class="vx-display" tabindex="0" role="group" aria-label="Equation">{mathml}</span>'


@cache
def _markdown() -> markdown.Markdown:
    converter = markdown.Markdown(extensions=["tables", "fenced_code", "sane_lists"])
    converter.preprocessors.deregister("html_block")
    for name in ("html", "image_link", "image_reference", "short_image_ref"):
        converter.inlinePatterns.deregister(name)
    for name in ("hashheader", "setextheader"):
        converter.parser.blockprocessors.deregister(name)
    return converter


def _safe_href(match: re.Match[str]) -> str:
    """Keep an address that leads to a page; blank any other (javascript:, data:, ...)."""
    address = re.sub(r"[\x00-\x20]", "", unescape(match[1]))
    safe = re.match(r"(https?:|mailto:|#|/(?!/)|[^:/?#]+(?:[/?#]|$)|$)", address, re.IGNORECASE)
    return match[0] if safe else 'href="#"'


def markdown_html(text: str, ids: Iterable[str] = ()) -> str:
    """Markdown with ``$...$`` and ``$$...$$`` as HTML. HTML in ``text`` shows as text; pictures are not loaded.

    A code span that is one of ``ids`` becomes a link to that method.
    """
    formulas: list[str] = []

    def keep(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["dollar"]:
            return "$"
        display = match["display"]
        formulas.append(math(display or match["inline"], display=display is not None))
        return f"{_OPEN}{len(formulas) - 1}{_CLOSE}"

    text = re.sub(f"[{_OPEN}{_CLOSE}\x02\x03]", "", text)
    html = _markdown().reset().convert(_MATH.sub(keep, text))
    html = re.sub(r'href="([^"]*)"', _safe_href, html)
    html = re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda match: formulas[int(match[1])], html)
    known = set(ids)
    if known:
        html = re.sub(
            r"(?<!<pre>)<code>([a-z0-9-]+)</code>",
            lambda match: f'<a href="/methods/{match[1]}/">{match[0]}</a>' if match[1] in known else match[0],
            html,
        )
    return html


def inline(text: str) -> str:
    """One paragraph of Markdown without the paragraph around it."""
    html = markdown_html(text)
    return html[3:-4] if html.startswith("<p>") and html.count("<p>") == 1 and html.endswith("</p>") else html


def authors(paper: Paper, most: int = 1000) -> str:
    """Names in reading order, plain text: ``Samira Abnar and Willem Zuidema``."""
    names = [" ".join(reversed(name.split(", ", 1))) for name in paper.authors if name != "others"]
    if "others" in paper.authors or len(names) > most:
        return ", ".join(names[:most]) + " et al."
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def number(value: Any) -> str:
    """A measured value for a table: four digits, or powers of ten where it is tiny or huge."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


# --- pieces ----------------------------------------------------------------------------------------------------


def link(address: str, text: str) -> str:
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def code_block(text: str, language: str = "") -> str:
    """A block that the theme gives a copy button."""
    return f'<div class="highlight {language}"><pre><code>{escape(text)}</code></pre></div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str, classes: str = "") -> str:
    """A table that scrolls inside itself. ``heads`` and ``rows`` are HTML; the first column holds row headers."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="vx-scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="vx-table {classes}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def picture(figure: Figure, caption: str = "", *, wide: bool = False) -> str:
    """A figure; ``wide`` ones scroll inside themselves on a small screen and open at full size."""
    image = (
        f'<img src="{escape(figure.src)}" width="{figure.width}" height="{figure.height}" alt="{escape(figure.alt)}" '
        'loading="lazy">'
    )
    if wide:
        image = (
            f'<div class="vx-scroll vx-wide" tabindex="0" role="region" aria-label="Figure">'
            f'<a href="{escape(figure.src)}">{image}</a></div>'
        )
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="vx-figure">{image}{below}</figure>'


def term_link(atlas: Atlas, vocabulary: str, id: str) -> str:
    """A term as a link to the methods that share it; families and subfamilies lead to their definition."""
    term = atlas.terms[vocabulary, id]
    address = f"/browse/?{vocabulary}={id}"
    if vocabulary == "family":
        address = f"/families/{id}/"
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


def heading(level: int, id: str, text: str, zh: str = "") -> str:
    beside = f' <span class="vx-zh" lang="zh">{escape(zh)}</span>' if zh else ""
    anchor = f'<a class="headerlink" href="#{id}" title="Permanent link">¶</a>'
    return f'<h{level} id="{id}">{escape(text)}{beside}{anchor}</h{level}>'


def provenance(result: Mapping[str, Any]) -> str:
    """Where numbers come from, in one small line."""
    facts = result.get("provenance") or {}
    said = "; ".join(f"{escape(str(key))} {escape(_plain(value))}" for key, value in facts.items() if value)
    return f'<p class="vx-small">Measured: {said}.</p>' if said else ""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(below)}" for key, below in value.items())
    return str(value)


def grade_table(atlas: Atlas, ids: Iterable[str] | None = None) -> str:
    """Measured localisation in the glyph world, for ``ids`` (all when None), best first, beside the baselines."""
    if not atlas.grades:
        return '<p class="vx-missing">Not measured yet.</p>'
    wanted = None if ids is None else {*ids, *BASELINES}
    rows = [
        row
        for id, row in atlas.grades.items()
        if (wanted is None or id in wanted) and (id in BASELINES or id in atlas.catalog.methods)
    ]
    if all(row["method"] in BASELINES for row in rows):
        return '<p class="vx-missing">Not measured yet.</p>'
    rows.sort(key=lambda row: (-row["mass_inside"], row["method"]))

    def name(id: str) -> str:
        return escape(BASELINES[id]) if id in BASELINES else method_link(atlas, id)

    def bar(value: float | None) -> str:
        if value is None:
            return "not defined"
        width = 100 * min(max(value, 0), 1)
        return f'<span class="vx-bar" style="--value:{width:.1f}%">{value:.3f}</span>'

    heads = ("Method", "Relevance inside the object", "Pointing game", "On the creature asked about", "Scenes")
    cells = [
        (
            name(row["method"]),
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


# --- method page -----------------------------------------------------------------------------------------------


def _card(atlas: Atlas, method: Method) -> str:
    paper = method.paper
    links = []
    if paper.doi:
        links.append(link("https://doi.org/" + quote(paper.doi, safe="/().;:-_"), "DOI " + paper.doi))
    if paper.arxiv:
        links.append(link("https://arxiv.org/abs/" + paper.arxiv, "arXiv " + paper.arxiv))
    if paper.url:
        links.append(link(paper.url, "Page of the paper"))
    venue = paper.venue or "venue unknown"
    year = "" if str(paper.year) in venue else f", {paper.year}"
    code = "None known"
    if method.code:
        licence = {None: "licence unknown", "none": "no licence given"}.get(
            method.code.licence, f"licence {method.code.licence}"
        )
        code = f"{link(method.code.url, method.code.url.removeprefix('https://'))} ({escape(licence)})"
    draws = "Yes, <code>explain</code> takes a <code>generator</code>." if method.stochastic else "No"
    entries = [
        (
            "Paper",
            f"<cite>{escape(paper.title)}</cite><br>{escape(authors(paper))}<br>{escape(venue + year)}"
            + (f"<br>{' · '.join(links)}" if links else "<br>No DOI or arXiv identifier known"),
        ),
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
    return (
        '<dl class="vx-card">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)
        + "</dl>"
    )


def _proof(atlas: Atlas, method: Method) -> str:
    rows = atlas.proofs.get(method.id)
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


def _relations(atlas: Atlas, method: Method) -> str:
    groups: dict[str, list[str]] = {}
    for relation in method.relations:
        groups.setdefault(FORWARD[relation.type], []).append(relation.id)
    for kind, id in atlas.incoming.get(method.id, ()):
        ids = groups.setdefault(BACKWARD[kind], [])
        if id not in ids:
            ids.append(id)
    if not groups:
        return "<p>No relation to another entry is recorded.</p>"
    return (
        '<dl class="vx-card vx-relations">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{', '.join(method_link(atlas, id) for id in ids)}</dd></div>"
            for name, ids in groups.items()
        )
        + "</dl>"
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
            here = siblings.index(method)
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
    if method.output == "heatmap" and "changed-architecture" not in method.needs:
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
        markdown_html(method.mechanism, atlas.catalog.methods),
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
            _proof(atlas, method),
        ]
        if method.output == "heatmap" or id in atlas.grades:
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
            '<a href="/contributing/">Contribute it</a>.</p>',
        ]
    parts += [
        heading(2, "relations", "Relations"),
        _relations(atlas, method),
        heading(2, "cite", "Cite"),
        code_block(cite.bibtex([method]).strip(), "language-bibtex"),
        f'<p class="vx-small">Facts of this entry were seen in: '
        f"{', '.join(escape(source) for source in method.sources)}.</p>",
    ]
    description = f"{method.name}: {method.motivation.text}"
    return Page(f"methods/{id}/", method.name, description, "\n".join(parts), ("navigation",), _rail(atlas, method))


_SECTIONS = ("mechanism", "run-it", "code", "correct", "ground-truth", "relations", "cite")  # ids on a method page

# --- notebooks -------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture that an executed snippet has shown."""

    data: bytes
    extension: str  # png or jpg
    alt: str  # as given by the snippet, often empty


def notebook_pictures(text: str) -> list[Picture]:
    """The pictures among the outputs of an executed notebook (the text of an .ipynb), in order."""
    found = []
    for cell in json.loads(text)["cells"]:
        for output in cell.get("outputs", ()):
            for kind, extension in (("image/png", "png"), ("image/jpeg", "jpg")):
                if data := output.get("data", {}).get(kind):
                    alt = output.get("metadata", {}).get(kind, {}).get("alt", "")
                    found.append(Picture(b64decode("".join(data)), extension, alt))
    return found


def picture_text(method: Method) -> str:
    """What is seen on a picture that the method's snippet has shown."""
    if method.output == "heatmap":
        return f"{method.name}: pictures, each beside the relevance that the method gives, drawn over the picture"
    return f"{method.name}: pictures, each beside what the method gives for it"


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a PNG or JPEG file."""
    with Image.open(BytesIO(data)) as image:
        return image.size


def notebook(html: str, figures: Iterable[Figure], ids: Iterable[str] = ()) -> str:
    """What mkdocs-jupyter made of an executed snippet, reduced to what this site's own style shows.

    Its half megabyte of styles, its scripts and its hidden copies of the code are dropped; formulas become MathML;
    embedded pictures become files (``figures``, in order); headings move one level down and
    the first, which repeats the title, goes; a code span that is one of ``ids`` links to that method.
    """
    known = set(ids)
    html = re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.DOTALL | re.IGNORECASE)
    soup = bs4.BeautifulSoup(html, "html.parser")
    parts: list[str] = []
    pictures = iter(figures)
    seen_title = False
    taken: dict[str, int] = dict.fromkeys(_SECTIONS, 1)  # ids of headings
    for cell in soup.select(".jp-Notebook > .jp-Cell"):
        prose = cell.select_one(".jp-RenderedMarkdown")
        if prose is not None:
            for anchor in prose.select("a.anchor-link"):
                anchor.decompose()
            for tag in prose.find_all(["h1", "h2", "h3", "h4"]):
                if tag.name == "h1" and not seen_title:
                    seen_title = True
                    tag.decompose()
                    continue
                tag.name = f"h{int(tag.name[1]) + 1}"
                base = tag["id"] = str(tag.get("id") or "part")
                while tag["id"] in taken:
                    taken[base] += 1
                    tag["id"] = f"{base}-{taken[base]}"
                taken[str(tag["id"])] = 1
            for text in list(prose.find_all(string=True)):
                if text.find_parent(["code", "pre"]) is None and "$" in text:
                    formula = _MATH.sub(_formula, escape(text, quote=False))
                    text.replace_with(bs4.BeautifulSoup(formula, "html.parser"))
            for tag in prose.find_all("code"):
                if tag.get_text() in known and tag.find_parent(["a", "pre"]) is None:
                    tag.wrap(soup.new_tag("a", href=f"/methods/{tag.get_text()}/"))
            parts.append(prose.decode_contents().strip())
            continue
        source = cell.select_one(".highlight-ipynb pre")
        if source is not None and source.get_text().strip():
            inner = source.decode_contents().removeprefix("<span></span>").strip("\n")
            parts.append(f'<div class="highlight language-python"><pre><code>{inner}</code></pre></div>')
        for output in cell.select(".jp-OutputArea-output"):
            if output.find("img") is not None:
                parts.append(picture(next(pictures)))
            elif "stderr" not in str(output.get("data-mime-type")) and output.get_text().strip():
                block = output.find("pre")
                text = (block or output).get_text().strip("\n")
                parts.append(f'<div class="vx-output"><pre tabindex="0">{escape(text, quote=False)}</pre></div>')
    return '<div class="vx-notebook">' + "\n".join(parts) + "</div>"


def _formula(match: re.Match[str]) -> str:
    """A formula inside already escaped text."""
    if match["code"]:
        return match[0]
    if match["dollar"]:
        return "$"
    latex = unescape(match["display"] or match["inline"])
    return math(latex, display=match["display"] is not None)


# --- other pages -----------------------------------------------------------------------------------------------


def counts(atlas: Atlas) -> str:
    methods = atlas.catalog.methods
    runs = sum(method.snippet is not None for method in methods.values())
    families = len(atlas.catalog.taxonomy.families)
    return f"<strong>{len(methods)}</strong> methods in {families} families, <strong>{runs}</strong> of them run here."


def map_html(atlas: Atlas, by: mindmap.Axis) -> str:
    """Both layouts of one mind map, its legend and its outline."""
    root = mindmap.tree(atlas.catalog, by)
    legend = "".join(
        f'<li><span class="vx-dot c{atlas.colours[term.id]}" aria-hidden="true"></span>'
        f"{link(f'/families/{term.id}/', term.label)}</li>"
        for term in atlas.catalog.taxonomy.families
    )
    hollow = any(method.snippet is None for method in atlas.catalog.methods.values())
    if hollow:
        legend += '<li><span class="vx-dot hollow" aria-hidden="true"></span>no code here yet</li>'
    return (
        '<div class="vx-mindmap" data-search-exclude>'
        f'<div class="vx-scroll" tabindex="0" role="region" aria-label="Mind map">{mindmap.svg(root)}</div>'
        f"{mindmap.svg(root, 'narrow')}"
        f'<ul class="vx-legend">{legend}</ul>'
        f"<details><summary>The same as a list</summary>{mindmap.outline(root)}</details></div>"
    )


_AXES: dict[mindmap.Axis, tuple[str, str, str]] = {
    "family": ("mindmap/", "By family", "What is explained with: the five families, their branches, their methods."),
    "motivation": (
        "mindmap/motivation/",
        "By motivation",
        "Why the methods were proposed. A method with two motivations hangs under both; its colour is its family.",
    ),
    "task": (
        "mindmap/task/",
        "By task",
        "What the explained models do. A method for two tasks hangs under both; its colour is its family.",
    ),
}


def map_page(atlas: Atlas, by: mindmap.Axis) -> Page:
    path, title, text = _AXES[by]
    tabs = "".join(
        f'<a href="/{address}"{" aria-current=page" if axis == by else ""}>{name}</a>'
        for axis, (address, name, _) in _AXES.items()
    )
    html = (
        f'<h1>Mind map</h1><nav class="vx-tabs" aria-label="Order of the mind map">{tabs}</nav>'
        f"<p>{text} Every node is a link.</p>{map_html(atlas, by)}"
    )
    return Page(path, f"Mind map {title.lower()}", text, html)


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
    figure = atlas.figures.get(f"compare-photo-{family.id}")
    if figure:
        alt = (
            f"Rows are photographs, columns are the heat-map methods of the family {family.label}; each cell shows "
            "the relevance that the method gives to the predicted class, drawn over the photograph"
        )
        caption = "The family's heat-map methods on photographs."
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


def browse_page(atlas: Atlas) -> Page:
    """All methods in one table, and the form that docs/assets/browse.js filters it with."""
    catalog = atlas.catalog
    methods = list(catalog.methods.values())
    rows = []
    for method in methods:
        family, subfamily = atlas.terms["family", method.family], atlas.terms["subfamily", method.subfamily]
        data = {
            "family": method.family,
            "subfamily": method.subfamily,
            "motivation": " ".join(method.motivation.terms),
            "task": " ".join(method.tasks),
            "needs": " ".join(method.needs),
            "output": method.output,
            "class": _CLASS[method.class_specific],
            "survey": method.in_survey,
            "code": "yes" if method.snippet else "no",
            "year": method.paper.year,
        }
        attributes = "".join(f' data-{name}="{value}"' for name, value in data.items())

        def labels(vocabulary: str, ids: Iterable[str]) -> str:
            return escape(", ".join(atlas.terms[vocabulary, id].label for id in ids))

        rows.append(
            f"<tr{attributes}>"
            f'<th scope="row">{method_link(atlas, method.id)}'
            f'<span class="vx-small">{escape(authors(method.paper, 1))}</span></th>'
            f"<td>{method.paper.year}</td>"
            f'<td>{escape(family.label)}<span class="vx-small">{escape(subfamily.label)}</span></td>'
            f"<td>{labels('motivation', method.motivation.terms)}</td>"
            f"<td>{labels('task', method.tasks)}</td>"
            f"<td>{labels('needs', method.needs)}</td>"
            f"<td>{_CLASS[method.class_specific]}</td>"
            f"<td>{escape(atlas.terms['output', method.output].label)}</td>"
            f"<td>{method.in_survey}</td></tr>"
        )
    heads = ("Method", "Year", "Family", "Motivation", "Task", "Needs", "Class-specific", "Gives", "In survey")
    html = (
        "<h1>Browse</h1>"
        '<p class="vx-small vx-no-script">Filtering needs JavaScript. The table below is complete without it.</p>'
        f'<div class="vx-browse">{_facets(atlas, methods)}<div>'
        f'<p role="status" class="vx-count">{_methods(len(methods))}</p>'
        '<div class="vx-scroll" tabindex="0" role="region" aria-label="Methods">'
        '<table class="vx-table vx-methods"><thead><tr>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div></div>"
        '<script src="/assets/browse.js" defer></script>'
    )
    return Page("browse/", "Browse", "All methods, to be filtered by family, motivation, task and needs.", html)


_CLASS = {True: "yes", False: "no", None: "unknown"}


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
        '<form class="vx-facets" hidden><details class="vx-all" open><summary>Filters</summary>'
        f'{"".join(fields)}<p><button type="reset">Clear all</button></p></details></form>'
    )


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


def models_page(atlas: Atlas) -> Page:
    """The model cards."""
    parts = [
        "<h1>Models</h1>",
        "<p>Checkpoints that come with vitx. Any timm Vision Transformer works in their place: "
        "<code>--model deit_small_patch16_224</code>.</p>",
    ]
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
        parts += [
            heading(2, card.id, card.name),
            '<dl class="vx-card">'
            + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)
            + "</dl>",
        ]
    if not atlas.catalog.models:
        parts.append('<p class="vx-missing">No model card yet.</p>')
    return Page("models/", "Models", "The checkpoints that come with vitx.", "\n".join(parts), ("navigation",))


def render(atlas: Atlas) -> list[Page]:
    """Every page that comes from the catalogue alone. Method pages are made one by one, with ``method_page``."""
    return [
        *(map_page(atlas, axis) for axis in _AXES),
        families_page(atlas),
        *(family_page(atlas, family) for family in atlas.catalog.taxonomy.families),
        browse_page(atlas),
        vocabulary_page(atlas),
        models_page(atlas),
    ]


# --- what hand-written pages ask for ---------------------------------------------------------------------------

_FIGURES = {
    "compare-photo": (
        "Rows are photographs, columns are methods; each cell shows the relevance that the method gives to the "
        "class in question, drawn over the photograph",
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
        "mindmap": lambda: map_html(atlas, "family"),
        "counts": lambda: f"<p>{counts(atlas)}</p>",
        "grades": lambda: grade_table(atlas),
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


# --- whole pages -----------------------------------------------------------------------------------------------

_HEADING = re.compile(r'<h([23])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)
_TAG = re.compile(r"<[A-Za-z][^<>]*>")
_ADDRESS = re.compile(r'(?<=\s)(href|src)="([^"]*)"')


def contents(html: str) -> list[Any]:
    """Headings of level two and three as the nested tokens of Python-Markdown's table of contents."""
    tokens: list[dict[str, Any]] = []
    for level, id, inner in _HEADING.findall(html):
        inner = re.sub(r'<(a class="headerlink"|span class="vx-zh").*?</(a|span)>', "", inner)
        text = re.sub(r"<[^>]+>", "", inner).strip()
        token = {"level": int(level), "id": id, "name": text, "children": []}
        if level == "3" and tokens:
            tokens[-1]["children"].append(token)
        else:
            tokens.append(token)
    return tokens


def relative_links(html: str, path: str) -> str:
    """Make every internal address relative to the page at ``path``, and let those of folders name their index.html.

    So the site works at any address, and also from a folder, where no server turns ``methods/evit/`` into a file.
    """
    folder = posixpath.dirname(path)

    def address(match: re.Match[str]) -> str:
        name, target = match[1], match[2]
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#|$", target):
            return match[0]
        place, mark, rest = re.match(r"([^?#]*)([?#]?)(.*)", target, re.DOTALL).groups()  # type: ignore[union-attr]
        if place.startswith("/"):
            up = posixpath.relpath("/" + place.lstrip("/"), "/" + folder)
            place = up + "/" if place.endswith("/") else up
        if place.endswith("/") or posixpath.basename(place) in (".", ".."):
            place = posixpath.join(place, "index.html").removeprefix("./")
        return f'{name}="{place}{mark}{rest}"'

    return _TAG.sub(lambda tag: _ADDRESS.sub(address, tag[0]), html)
