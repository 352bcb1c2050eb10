"""Text as HTML, and the elements that pages are made of: formulas, tables, pictures, headings, links. Pure functions.

Everything is escaped; Markdown goes through ``markdown_html``, which lets no HTML through. Links are written from the
root of the site (``/methods/evit/``); ``relative_links`` makes them work from a folder.
"""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape, unescape
from html.entities import html5
from typing import Any, NamedTuple

import markdown
import math_core


class Figure(NamedTuple):
    """A picture of the site: its address from the root, its size in pixels, what is seen on it."""

    src: str
    width: int
    height: int
    alt: str = ""


_converter = math_core.LatexToMathML(fancy_error=False)


# Code comes first, so that a dollar inside it stays a dollar.
MATH = re.compile(
    r"(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<dollar>\\\$)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|\$(?!\s)(?P<inline>(?:[^$\n]|\n(?!\s*\n))+?)(?<!\s)\$(?!\d)",
    re.DOTALL,
)


_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters that stand for a formula while Markdown is at work


# Deep nesting ends the whole process inside math-core (about 4,000 braces do); the longest formula here has 503.
_LONGEST_FORMULA = 1000
_MACRO = re.compile(r"\\(?:def|newcommand|renewcommand|providecommand)(?![A-Za-z])")  # a few make megabytes of MathML


def math(latex: str, *, display: bool) -> str:
    """LaTeX as MathML; what cannot be read is shown as it is, in ``<code class="vx-bad-math">``."""
    try:
        if len(latex) > _LONGEST_FORMULA or _MACRO.search(latex):
            raise ValueError(f"longer than {_LONGEST_FORMULA} characters, or with a macro of its own")
        mathml = _converter.convert_with_local_state(latex.strip(), displaystyle=display)
    except (math_core.LatexError, ValueError) as error:
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
    address = re.sub(r"[\x00-\x20]", "", unescape(match[1])).replace("\\", "/")  # as browsers read it
    safe = re.match(r"(https?:|mailto:|#|/(?!/)|[^:/?#]+(?:[/?#]|$)|$)", address, re.IGNORECASE)
    return match[0] if safe else 'href="#"'


# What no text of HTML may hold, and the private characters.
_NO_TEXT = re.compile(
    f"[{_OPEN}{_CLOSE}\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
_ENTITY = re.compile(r"&(#?\w+);")


def _known_entity(match: re.Match[str]) -> str:
    """``&copy;`` and ``&#169;`` stay; ``&nonsense;`` and ``&#1;``, which HTML does not know, are shown as they are."""
    name = match[1]
    try:
        code = int(f"0{name[1:]}", 16 if name[1:2] in ("x", "X") else 10) if name[0] == "#" and len(name) < 9 else 0
        known = (code > 0x1F and not _NO_TEXT.match(chr(code))) or f"{name};" in html5
    except (ValueError, OverflowError):
        known = False
    return match[0] if known else f"&amp;{match[0][1:]}"


_MOST_BRACKETS = 500  # that open: Python-Markdown takes time in their square
_FENCED = re.compile(r"<pre[^<>]*><code[^<>]*>")


def markdown_html(text: str, places: Mapping[str, str] = {}) -> str:
    """Markdown with ``$...$`` and ``$$...$$`` as HTML. HTML in ``text`` shows as text; pictures are not loaded.

    A code span that is one of ``places``, id -> address, becomes a link to it. Text that Markdown cannot take apart,
    as it is nested too deeply, is shown as it is.
    """
    formulas: list[tuple[str, str]] = []  # MathML and LaTeX

    def keep(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["dollar"]:
            return "$"
        display = match["display"]
        formulas.append((math(display or match["inline"], display=display is not None), match[0]))
        return f"{_OPEN}{len(formulas) - 1}{_CLOSE}"

    text = _NO_TEXT.sub("", text)
    if text.count("[") > _MOST_BRACKETS:
        text = text.replace("[", "\\[")
    try:
        html = _markdown().reset().convert(MATH.sub(keep, text))
    except RecursionError:
        _markdown.cache_clear()  # this converter still believes itself inside the list
        return f"<p>{escape(text)}</p>"
    html = re.sub(r'href="([^"]*)"', _safe_href, html)
    html = _ENTITY.sub(_known_entity, html)
    html = _FENCED.sub("<pre><code>", html)  # a text may not choose an id or a class
    kept = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
    html = _TAG.sub(lambda tag: kept.sub(lambda match: escape(formulas[int(match[1])][1]), tag[0]), html)
    html = kept.sub(lambda match: formulas[int(match[1])][0], html)
    if places:
        html = re.sub(
            r"(?<!<pre>)<code>([a-z0-9-]+)</code>",
            lambda match: f'<a href="{places[match[1]]}">{match[0]}</a>' if match[1] in places else match[0],
            html,
        )
    return html


def inline(text: str) -> str:
    """Markdown of one paragraph, without the paragraph around it; text that makes anything else is shown as it is."""
    text = _NO_TEXT.sub("", re.sub(r"\s+", " ", text))
    html = markdown_html(text)
    return html[3:-4] if html.startswith("<p>") and html.count("<p>") == 1 and html.endswith("</p>") else escape(text)


def formula(match: re.Match[str]) -> str:
    """A formula inside already escaped text."""
    if match["code"]:
        return match[0]
    if match["dollar"]:
        return "$"
    latex = unescape(match["display"] or match["inline"])
    return math(latex, display=match["display"] is not None)


def number(value: Any) -> str:
    """A measured value for a table: four digits, or powers of ten where it is tiny or huge."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


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


def captioned(html: str, caption: str) -> str:
    """A chart with its caption, both HTML."""
    return f'<figure class="vx-figure">{html}<figcaption>{caption}</figcaption></figure>'


def small(name: str, text: str) -> str:
    """A small line below a cell of a table: a word and its value, both HTML; nothing where there is no value."""
    return f'<span class="vx-small">{name}{text}</span>' if text else ""


def heading(level: int, id: str, text: str, zh: str = "") -> str:
    beside = f' <span class="vx-zh" lang="zh">{escape(zh)}</span>' if zh else ""
    anchor = f'<a class="headerlink" href="#{id}" title="Permanent link">¶</a>'
    return f'<h{level} id="{id}">{escape(text)}{beside}{anchor}</h{level}>'


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
