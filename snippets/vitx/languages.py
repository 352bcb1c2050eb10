"""The Chinese pages, made from the finished English ones: HTML and phrases in, HTML out. No mkdocs, no files.

``translate`` looks up what stands between two block-level tags, whole. A phrase of catalog/languages/zh.yml may hold
placeholders: ``{}`` is a number or an inline element, such as a link, which is translated by itself; ``{text}`` is
any text. Prose that has no translation stays as it is and is marked ``lang="en"``.
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from html import escape, unescape
from typing import NamedTuple

from vitx.catalog import PLACEHOLDER
from vitx.schema import Taxonomy

FOLDER = "zh"  # of the Chinese pages, below the root of the site
SCRIPT = "assets/zh.js"
NAMES = {"en": "English", "zh": "中文"}
_SWITCH_LABEL = {"en": "Language", "zh": "语言"}
ENGLISH_PROSE = "正文为英文；导航、分类与界面为中文。"

_HOLE = "\0"  # stands for a placeholder, and for an inline element
_NUMBER = r"(?<![\w.-])-?\d[\d,.]*(?<![,.])(?:e-?\d+)?(?: ?%)?(?!\w)"
_SLOT = re.compile(f"{_HOLE}|{_NUMBER}")
_CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
_WORD = re.compile("[A-Za-z]{2,}")
PROSE = 3  # words that make an untranslated text prose and not a name
# What keeps the time linear: inline elements inside one another, pieces of a phrase, letters of one that holds {text}.
DEEPEST, LONGEST, LONGEST_NAMED = 8, 60, 600

Parts = tuple[str | int, ...]  # escaped text, and numbers of placeholders from 0


class Words(NamedTuple):
    """Phrases ready for look-up, from ``compiled``."""

    phrases: dict[str, Parts]  # English, each placeholder a hole
    patterns: tuple[tuple[re.Pattern[str], Parts], ...]  # those with {text}
    any_pattern: re.Pattern[str]


def compiled(phrases: Mapping[str, str], literal: Mapping[str, str] = {}) -> Words:
    """Phrases as catalog/languages/zh.yml writes them, English -> Chinese; ``literal`` ones hold no placeholder."""
    exact: dict[str, Parts] = {" ".join(english.split()): (escape(chinese),) for english, chinese in literal.items()}
    patterns: dict[str, Parts] = {}
    for english, chinese in phrases.items():
        english = " ".join(english.split())
        if "{text}" not in english:
            exact[english.replace("{}", _HOLE)] = _parts(chinese)
            continue
        kinds = {"{}": f"({_HOLE}|{_NUMBER})", "{text}": f"([^{_HOLE}]+?)"}
        pattern = "".join(kinds.get(piece, re.escape(piece)) for piece in re.split(r"(\{\}|\{text\})", english))
        patterns[pattern] = _parts(chinese)
    # The longest first: what says more is meant.
    order = sorted(patterns, key=lambda pattern: (-len(pattern), pattern))
    return Words(
        exact,
        tuple((re.compile(pattern), patterns[pattern]) for pattern in order),
        re.compile("|".join(order) or "(?!)"),
    )


def _parts(chinese: str) -> Parts:
    parts: list[str | int] = []
    end = count = 0
    for match in PLACEHOLDER.finditer(chinese):
        parts += [escape(chinese[end : match.start()]), int(match[1]) - 1 if match[1] else count]
        end, count = match.end(), count + 1
    return (*parts, escape(chinese[end:]))


def taxonomy_phrases(taxonomy: Taxonomy) -> dict[str, str]:
    """Labels and definitions of every term, and the forms of a label that pages use."""
    terms = [term for name in Taxonomy.model_fields for term in getattr(taxonomy, name)]
    found: dict[str, str] = {}
    for term in terms:
        found |= {term.definition: term.definition_zh, f"{term.label} {term.label_zh}": term.label_zh}
    for term in terms:
        found |= {term.label.lower(): term.label_zh, term.label.removesuffix(" methods"): term.label_zh}
    return found | {term.label: term.label_zh for term in terms}


def theme_phrases(english: str, chinese: str) -> dict[str, str]:
    """The theme's own strings, from its partials/languages/en.html and zh.html."""
    en, zh = (dict(re.findall(r'"([a-z.]+)": ("(?:[^"\\]|\\.)*")', text)) for text in (english, chinese))
    keys = [key for key in en if key in zh and not key.startswith(("language", "direction", "search.config"))]
    return {json.loads(en[key]): json.loads(zh[key]) for key in keys}


# --- looking up --------------------------------------------------------------------------------------------------


def _find(key: str, words: Words, named: bool = True) -> list[str | int] | None:
    """Translation of a phrase whose elements are holes: escaped text, and the number of each element from 0.

    ``named``: whether phrases with {text} are tried, whose {text} is looked up without, so that the search ends soon.
    """
    for general in dict.fromkeys((key, _SLOT.sub(_HOLE, key))):
        parts = words.phrases.get(general)
        if parts is not None:
            return _filled(parts, [_HOLE] * key.count(_HOLE) if general is key else _SLOT.findall(key), words)
    if named and len(key) < LONGEST_NAMED and words.any_pattern.fullmatch(key):
        for pattern, parts in words.patterns:
            match = pattern.fullmatch(key)
            found = _filled(parts, match.groups(), words) if match else []
            if any(isinstance(part, str) and _IDEOGRAPH.search(part) for part in found):  # not mere marks
                return found
    return None


def _filled(parts: Parts, slots: Sequence[str], words: Words) -> list[str | int]:
    elements = [place for place, slot in enumerate(slots) if slot == _HOLE]
    return [
        part
        if isinstance(part, str)
        else elements.index(part)
        if slots[part] == _HOLE
        else _text(slots[part], words, named=False) or escape(slots[part])
        for part in parts
    ]


def _text(text: str, words: Words, named: bool = True) -> str | None:
    """Translation of a text without elements, escaped."""
    key = " ".join(text.split())
    found = _find(key, words, named)
    if found is not None:
        return "".join(map(str, found))
    if key.endswith(":"):
        before = _find(key[:-1], words, named)
        return None if before is None else "".join(map(str, before)) + "："
    for mark, joint in (("; ", "；"), (", ", "、")):  # a list of phrases
        if mark in key:
            parts = [words.phrases.get(part) for part in key.split(mark)]
            if all(parts):
                return joint.join("".join(map(str, part)) for part in parts if part)
    return None


# --- cutting a page into tokens ------------------------------------------------------------------------------------

# Elements that are part of a sentence; every other tag ends it.
_INLINE = re.compile("a|abbr|b|bdi|cite|code|em|i|kbd|mark|math|q|s|small|span|strong|sub|sup|time|u")
_UNTOUCHED = re.compile("code|kbd|math|pre|script|style|textarea")
_MARKED = re.compile("p|li|dd|dt|td|th|figcaption|summary|h[1-6]")  # may carry lang="en"
_TAG = re.compile(r"<!--|<!doctype[^<>]*>|<(/?)([a-zA-Z][a-zA-Z0-9-]*)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BLOCK = re.compile(r'\bclass="(?:headerlink|vx-small)')  # stands by itself, whatever its element
_KEPT = re.compile(r'\s(?:lang="(?:en|zh)"|translate="no")')
_ATTRIBUTE = re.compile(r'(?<=\s)(title|aria-label|placeholder|alt|data-say)="([^"]+)"')
_DESCRIPTION = re.compile(r'(?<=\s)(content)="([^"]+)"')
TEXT, OPEN, CLOSE, WHOLE, WALL = range(5)
Token = tuple[int, str, str]  # kind, name of the element, HTML


def _tokens(html: str) -> Iterator[Token]:
    """Texts, inline tags, elements that are not looked into (inline ones WHOLE), and all else as WALL."""
    place = 0
    while match := _TAG.search(html, place):
        if match.start() > place:
            yield TEXT, "", html[place : match.start()]
        place = match.end()
        name = (match[2] or "").lower()
        if not name:
            place = _after("-->", html, place) if match[0] == "<!--" else place
            yield WALL, "", html[match.start() : place]
        elif not match[1] and _UNTOUCHED.fullmatch(name):
            place = _after(f"</{name}>", html, place)
            yield WHOLE if _INLINE.fullmatch(name) else WALL, "", html[match.start() : place]
        elif not match[1] and _INLINE.fullmatch(name) and _KEPT.search(match[0]):
            place = _after(f"</{name}>", html, place)  # holds no element of the same name
            yield WHOLE, "", html[match.start() : place]
        elif _INLINE.fullmatch(name) and not _BLOCK.search(match[0]):
            yield CLOSE if match[1] else OPEN, name, match[0]
        else:
            yield WALL, name if not match[1] else "", match[0]
    if place < len(html):
        yield TEXT, "", html[place:]


def _after(end: str, html: str, start: int) -> int:
    found = html.find(end, start)
    return len(html) if found < 0 else found + len(end)


# --- translating -----------------------------------------------------------------------------------------------

_ZH_BESIDE = re.compile(r'>([^<>]+)((?:</a>)?(?:<br>)?\s?)<span class="vx-zh" lang="zh">([^<>]*)</span>')


def translate(html: str, words: Words) -> str:
    """The page in Chinese as far as ``words`` goes.

    Code, formulas, scripts and styles stay as they are; so does what is marked ``lang`` or ``translate="no"``.
    Attributes: title, aria-label, placeholder, alt, the description of the page.
    """
    html = html.replace(_HOLE, "\ufffd")
    # A Chinese label beside an English one: now the English stands beside the Chinese.
    html = _ZH_BESIDE.sub(r'>\3 \2<span class="vx-zh" lang="en">\1</span>', html)
    out: list[str] = []
    run: list[Token] = []
    opened = ""  # name of the tag that the run follows at once
    for kind, name, text in _tokens(html):
        if kind in (OPEN, WALL) and name:
            text = _tag(name, text, words)
        if kind != WALL:
            run.append((kind, name, text))
            continue
        _end_run(run, opened, out, words)
        run, opened = [], name
        out.append(text)
    _end_run(run, opened, out, words)
    return "".join(out)


def _tag(name: str, tag: str, words: Words) -> str:
    if name == "html":
        return tag.replace(' lang="en"', f' lang="{FOLDER}"')

    def attribute(match: re.Match[str]) -> str:
        return f'{match[1]}="{_text(unescape(match[2]), words) or match[2]}"'

    if name == "meta":
        return _DESCRIPTION.sub(attribute, tag) if 'name="description"' in tag else tag
    return _ATTRIBUTE.sub(attribute, tag)


def _end_run(run: list[Token], opened: str, out: list[str], words: Words) -> None:
    """Append the translation of a run; mark the block that it begins as English where it stays so."""
    if not run:
        return
    if all(kind == TEXT and text.isspace() for kind, _, text in run):
        out += (text for _, _, text in run)
        return
    closes, loose = _pairs(run)
    start = 0
    for end in (*loose, len(run)):  # a tag whose partner is elsewhere divides the run
        if start < end:
            done, english = _run(run, closes, start, end, words)
            if english and start == 0 and _MARKED.fullmatch(opened) and " lang=" not in out[-1]:
                out[-1] = f'{out[-1][:-1]} lang="en">'
            out.append(done)
        if end < len(run):
            out.append(run[end][2])
        start = end + 1


def _pairs(run: list[Token]) -> tuple[dict[int, int], list[int]]:
    """Place of each opening tag -> place of its closing tag; places of the tags without a partner, outside of these."""
    closes: dict[int, int] = {}
    waiting: list[tuple[int, int]] = []  # place, and how deep it goes
    for place, (kind, name, _) in enumerate(run):
        if kind == OPEN:
            waiting.append((place, 1))
        elif kind == CLOSE and waiting and run[waiting[-1][0]][1] == name:
            opening, depth = waiting.pop()
            if depth <= DEEPEST:
                closes[opening] = place
            if waiting:
                waiting[-1] = waiting[-1][0], max(waiting[-1][1], depth + 1)
        elif kind == CLOSE:
            waiting.clear()
    paired = {*closes, *closes.values()}
    return closes, [place for place, token in enumerate(run) if token[0] in (OPEN, CLOSE) and place not in paired]


_JOINTS = {",": "、", "and": "和", ", and": "和", ".": "。", ";": "；", ":": "：", "·": " · "}


def _run(run: list[Token], closes: dict[int, int], start: int, end: int, words: Words) -> tuple[str, bool]:
    """Translation of run[start:end], and whether it stays English prose."""
    pieces: list[tuple[str | None, str, str]] = []  # text, or None for an element; translation; original
    place = start
    while place < end:
        kind, _, html = run[place]
        if kind == TEXT:
            pieces.append((unescape(html), html, html))
        elif kind == WHOLE:
            pieces.append((None, html, html))
        else:
            close = closes[place]
            inner, _ = _run(run, closes, place + 1, close, words)
            original = "".join(token[2] for token in run[place : close + 1])
            pieces.append((None, f"{html}{inner}{run[close][2]}", original))
            place = close
        place += 1

    texts = [text for text, _, _ in pieces if text is not None and not text.isspace()]
    if not texts:
        return "".join(done for _, done, _ in pieces), False
    found = None
    if len(pieces) <= LONGEST:
        key = "".join(_HOLE if text is None else text for text, _, _ in pieces)
        found = _find(" ".join(key.split()), words)
        if found is None and len(pieces) == 1:
            whole = _text(key, words)
            found = None if whole is None else [whole]
    if found is not None:
        elements = [done for text, done, _ in pieces if text is None]
        first, last = pieces[0][0] or "", pieces[-1][0] or ""
        before = first[: len(first) - len(first.lstrip())]
        after = last[len(last.rstrip()) :]
        return before + "".join(elements[part] if isinstance(part, int) else part for part in found) + after, False

    done_texts = [None if text is None or text.isspace() else _text(text, words) for text, _, _ in pieces]
    left = [
        text for (text, _, _), done in zip(pieces, done_texts, strict=True) if text and not text.isspace() and not done
    ]
    if sum(len(_WORD.findall(text)) for text in left if text.strip() not in _JOINTS) >= PROSE:
        return "".join(original for _, _, original in pieces), True
    out: list[str] = []
    for place, ((text, done, _), chinese) in enumerate(zip(pieces, done_texts, strict=True)):
        if text is None:
            out.append(done)
        elif chinese is not None:
            out.append(text[: len(text) - len(text.lstrip())] + chinese + text[len(text.rstrip()) :])
        elif (
            place
            and text.strip() in _JOINTS
            and _CHINESE.match(_visible(out[-1])[-1:])
            and (place + 1 == len(pieces) or _CHINESE.match(_visible(pieces[place + 1][1])))
        ):
            out.append(_JOINTS[text.strip()])
        else:
            out.append(done)
    return "".join(out), False


def _visible(html: str) -> str:
    """Its text."""
    return re.sub(r"<[^<>]*>", "", html).strip()


# --- the two pages of an address -----------------------------------------------------------------------------------

_SWITCH = re.compile(r'<nav class="vx-languages"[^<>]*>.*?</nav>', re.DOTALL)
_ADDRESS = re.compile(r'(?<=\s)(href|src)="([^"]*)"')
_OPENING = re.compile(r"<[A-Za-z][^<>]*>")
_CONFIG = re.compile(r'(<script id="__config" type="application/json">)(.*?)(</script>)', re.DOTALL)
_SCOPE = re.compile(r'(__md_scope=new URL\(")([^"]*)(",location\))')
_CANONICAL = re.compile(r'(<link rel="canonical" href=")[^"]*(">)')
_PROSE = re.compile(r'<(?:p|li|dd|p class="vx-lead") lang="en">')  # not the small print
_ARTICLE = re.compile(r'<article class="md-content__inner[^<>]*>')


def switch(here: str, address: str) -> str:
    """The two languages in the header: that of this page, and a link to the same page in the other."""
    names = (
        f'<span lang="{language}" aria-current="true">{name}</span>'
        if language == here
        else f'<a href="{address}" lang="{language}" hreflang="{language}">{name}</a>'
        for language, name in NAMES.items()
    )
    return f'<nav class="vx-languages" aria-label="{_SWITCH_LABEL[here]}">{"<span> / </span>".join(names)}</nav>'


def _public(path: str, language: str) -> str:
    """Address of a page from the root, without the first slash."""
    return (f"{FOLDER}/" if language == "zh" else "") + path.removesuffix("index.html")


def linked(html: str, path: str, site_url: str = "") -> str:
    """The English page at ``path`` with its switch and its alternates; addresses are written from the root."""
    root = site_url.rstrip("/") + "/"
    # Material asks for a site map below each link[rel=alternate]; the blank hides ours from it and from nobody else.
    links = "".join(
        f'<link rel="alternate " hreflang="{language}" href="{escape(root + _public(path, language))}">'
        for language in NAMES
    )
    html = _SWITCH.sub(lambda _: switch("en", "/" + _public(path, "zh")), html, count=1)
    return html.replace("</head>", links + "</head>", 1)


def twin(html: str, path: str, words: Words, mirrored: Set[str], site_url: str = "") -> str:
    """The Chinese page for the finished English page at ``path``, such as methods/evit/index.html.

    Its place is ``FOLDER/path``. Links to pages of ``mirrored`` lead to their Chinese twins and stay as they are; every
    other relative address is written from the new place.
    """
    folder = posixpath.dirname(path)
    place = posixpath.join(FOLDER, folder)

    def moved(address: str) -> str:
        return posixpath.relpath(posixpath.normpath(posixpath.join(folder, address)), place)

    def address(match: re.Match[str]) -> str:
        name, target = match[1], unescape(match[2])
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#|\?|$", target):
            return match[0]
        where, mark, rest = re.match(r"([^?#]*)([?#]?)(.*)", target, re.DOTALL).groups()  # type: ignore[union-attr]
        in_english = 'hreflang="en"' in match.string
        if posixpath.normpath(posixpath.join(folder, where)) in mirrored and not in_english:
            return match[0]
        return f'{name}="{escape(moved(where) + mark + rest)}"'

    def config(match: re.Match[str]) -> str:
        settings = json.loads(match[2])
        for key in ("base", "search"):
            settings[key] = moved(settings[key])
        said = settings["translations"]
        settings["translations"] = {key: unescape(_text(text, words) or text) for key, text in said.items()}
        # A script ends at the first closing tag, wherever it stands.
        return match[1] + json.dumps(settings, sort_keys=True).replace("</", "<\\/") + match[3]

    html = _OPENING.sub(lambda tag: _ADDRESS.sub(address, tag[0]), translate(html, words))
    html = _SWITCH.sub(lambda _: switch("zh", moved(posixpath.basename(path))), html, count=1)
    html = _CONFIG.sub(config, html, count=1)
    html = _SCOPE.sub(lambda match: match[1] + moved(match[2]) + match[3], html, count=1)
    if site_url:
        own = escape(site_url.rstrip("/") + "/" + _public(path, "zh"))
        html = _CANONICAL.sub(lambda match: match[1] + own + match[2], html, count=1)
    html = html.replace("</head>", f'<script src="{posixpath.relpath(SCRIPT, place)}" defer></script></head>', 1)
    article = _ARTICLE.search(html)
    if article and _PROSE.search(html, article.end()):
        html = f'{html[: article.end()]}<p class="vx-english">{ENGLISH_PROSE}</p>{html[article.end() :]}'
    return html


def script(phrases: Mapping[str, str], code: str) -> str:
    """The script of the Chinese pages, with its words."""
    return f"const vitxWords = {json.dumps(phrases, ensure_ascii=False, sort_keys=True)};\n{code}"


# --- what is still missing ---------------------------------------------------------------------------------------

_FURNITURE = re.compile(
    r"<(h[1-6]|th|dt|button|summary|label|legend|option|nav|caption)\b[^<>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE
)


def untranslated(html: str, words: Words, names: Iterable[str] = ()) -> list[str]:
    """Furniture of an English page that ``words`` leaves in English, sorted.

    Furniture: navigation, headings, heads of tables and lists, buttons, summaries, labels, legends, options, and the
    attributes that are read aloud. ``names`` stay English: those of methods, papers, models.
    """
    names = {" ".join(name.split()) for name in names}
    found: set[str] = set()
    page = _ZH_BESIDE.sub(r">\3\2", html)
    page = re.sub(
        r"<(code|kbd|math|pre|script|style|textarea)\b.*?</\1>|<!--.*?-->", "", translate(page, words), flags=re.DOTALL
    )
    page = re.sub(
        r'<(span|a|nav) [^<>]*(?:lang="en"|class="vx-small|class="vx-languages).*?</\1>', "", page, flags=re.DOTALL
    )
    texts = [text for _, inner in _FURNITURE.findall(page) for text in re.split(r"<[^<>]*>", inner)]
    texts += [match[2] for match in _ATTRIBUTE.finditer(page) if match[1] in ("aria-label", "placeholder")]
    for text in texts:
        plain = " ".join(unescape(text).split()).strip(" :.,0123456789")
        if _WORD.search(plain) and not _CHINESE.search(plain) and plain not in names:
            found.add(plain)
    return sorted(found)
