"""Whatever a file of the catalogue holds: it loads, or is refused in one line for each fault; then its pages are safe.

By hand, thousands of other cases: ``VITX_FUZZ=20000 pytest tests/vitx/test_fuzz.py --hypothesis-seed=1``.
"""

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import atlases
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vitx import ATLAS, catalog, cite, export, jsonld, markup, pages
from vitx.catalog import CatalogError

html5lib = pytest.importorskip("html5lib")

CASES = int(os.environ.get("VITX_FUZZ", "0"))


def fuzz(examples: int, slower: int = 1) -> settings:
    """``examples`` cases, always the same; with $VITX_FUZZ that many others, divided by ``slower``."""
    return settings(
        max_examples=CASES // slower or examples,
        derandomize=not CASES,
        database=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if slower == 1 else [])],
        deadline=30_000,  # ms: no case hangs, however busy the machine is
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


# --- what is tried -----------------------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    return set(text.split())


def pieces(text: str) -> list[str]:
    return text.replace("\n|", "|").split("|")


HTML = pieces(
    """<script>alert(1)</script>|</script><script>alert(1)//|<img src=x onerror=alert(1)>|"><svg/onload=alert(1)>
|' onmouseover='alert(1)|" onfocus="alert(1)" autofocus="|</title><b>|</textarea>|<!--|-->|--!>|<![CDATA[|]]>
|<?php ?>|&lt;script&gt;|&#60;script&#62;|&#x3c;b&#x3e;|&amp;lt;|&quot;|&#34; onload=1
|<a href=javascript:alert(1)>|<b>|</div>|</p>|<iframe srcdoc=x>|<style>*{x:y}</style>|{{7*7}}|{% raw %}
|<!-- vitx: counts -->|<base href=//evil.example>|</section>|<math><mi xlink:href="data:x,1">|<table><td>
|<svg><style><img src=x onerror=1>|<plaintext>|<br/|<|>|&|"|'|`|=|/>|</a>|</math>|</code>|</pre>|<template>
|<noscript>|<form action=//evil.example>|<meta http-equiv=refresh>"""
)
MARKDOWN = pieces(
    """[x](javascript:alert(1))|[x](JaVaScRiPt:alert(1))|[x](java&#115;cript:1)|[x](&#1;javascript:1)|**|__|*|_|~~
|[x](data:text/html,<b>)|[x](vbscript:x)|[x](//evil.example)|[x](/\\evil.example)
|![x](https://evil.example/x.png)|<javascript:alert(1)>|<https://a.example/?"x>
|[x](https://a.example "t\\" onload=")|[x](https://a.example 'q" x')|`|``|`code`|`m-0`|\\|[|]|(|)|[x][|[x]
|&copy;|<a@b.example>|[^1]: x|*[a]: b|![][x]|[m-0](/methods/m-0/)|[x](#cite)|!|\\["""
)
BLOCKS = ["\n\n", "\n", "  \n", "\n    code\n", "\n# h\n", "\n===\n", "\n---\n", "\n> q\n", "\n1. a\n", "\n- b\n", "\t"]
BLOCKS += ["\na|b\n-|:-:\nc|d\n", "```\n", '~~~ {#cite .vx-pass onload="x"}\nx\n~~~\n', "\n\n[x]: javascript:1\n\n"]
BLOCKS += [
    '\n[x]: https://a.example "t"\n',
    "| - |\n",
    "\n\n- a\n\n    - b\n",
    "\n\n1) x\n",
    "\n<div>\n\nx\n\n</div>\n",
]
LATEX = pieces(
    r"""$x$|$$\frac12$$|$|$$|\$|$\input{/etc/passwd}$|\input{/etc/passwd}|\write18{ls}|$\text{<b>}$|$\mathrm{x}$
|$\href{javascript:alert(1)}{x}$|$\color{red;x:y}x$|$\color{red}x$|$\operatorname{<script>}$|\def\x{\x\x}
|$\def\x{\x\x}\x$|$\newcommand{\x}{\x\x}\x$|\end{document}|}|{|}}}|%|#1|^^M|^^5cinput|\catcode`\%=1
|\immediate\openout|@article{x,|"|~|_|^|\\|$<$|$&$|$"$|$x'$|$\foo onmouseover=alert$|[x](/a$x$)
|[x](/a "$\mathrm{x}$")|[$x$](/b)|<https://a.example/$x$>|\begin{x}|$\begin{matrix}a&b\\c\end{matrix}$|$$|\)|\]
|\csname x\endcsname|\verb|\url{x}|$\sqrt{x|`$x$`|$\hspace{9em}x$"""
)
ODD = ["\u202e", "\u200b", "\ufeff", "\ud800", "\udfff", "\ue000", "\ue001", "\x02", "\x03", "\x00", "\x1b[31m", "\x85"]
ODD += ["\u2028", "\U000e0041", "\xad", "\u2066", "\r", "\uffff", "\U0010ffff", "\u061c", "\ufffd", "\x7f", "\u200d"]
UNICODE = [
    "é",
    "不",
    "e\u0301",
    "𝔸",
    "🏳",
    "ﷺ",
    "İ",
    "ß",
    "\u0301" * 9,
    "אב",
    "Ω",
    "ﬁ",
    "\u00a0",
    "\u3000",
    "ａ",
    "－",
    "∇",
]
PLAIN = [
    " ",
    "a",
    " and ",
    "others",
    ", ",
    ".",
    ". A",
    ":",
    ";",
    "0",
    "ICLR 2020",
    " / ",
    "arXiv",
    "-",
    "\\n",
    "others,",
]

# What the loader takes: U+FFFC and U+FFFD stand for something else, and from U+E0000 on nothing is seen.
LETTERS = {"exclude_categories": ["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"], "exclude_characters": "\ufffc\ufffd"}
sound = st.text(st.characters(max_codepoint=0xDFFFF, **LETTERS), max_size=6)
hostile = st.lists(
    st.one_of(*(st.sampled_from(pieces) for pieces in (HTML, MARKDOWN, BLOCKS, LATEX, UNICODE, PLAIN)), sound),
    min_size=1,
    max_size=8,
).map(lambda pieces: "".join(pieces) if "".join(pieces).strip() else "a")
odd = st.lists(st.one_of(hostile, st.sampled_from(ODD), st.text(max_size=4)), max_size=4).map("".join)

YAML = pieces(
    """&a |*a|!!python/object/apply:os.system ["touch EXECUTED"]|!!python/name:os.system |!%1B[31m x|!%E2%80%AE x|!x
|!!binary aGk=|!!set {a}|!<tag:x> |<<: |? |: |- |[|]|{|}|,|'|"|#|%YAML 1.1|%TAG ! x|---|...|>|>-2|~|null|yes|No
|010|0x1f|1:30|1_000|.inf|-.nan|1e999|1e-999|-0|=|2020-01-01|99999999999999999999|0.1|1e3|"\\x07"|"\\uD800"
|"\\U00110000"|"\\N"|"\\_"|"\\L"|"\\ud83d\\ude00"|{{|@|`|!|&|*|\t|""|''|"\\r"|"a\\|!!str |!!int 3|{a: b, a: b}
|{a: {a: {a: b}}}|[[[[[[[[[[[[]|true|True|{}|[]|[null]|{"": a}|? [a]|{1: 2}|id: x|title: x|snippet: /etc/passwd
|snippet: snippets/../x.py"""
)
YAML += ["|\n", "|2-\n", "\n", "\r\n", "\r", "\n  ", "\n- ", "\n\t", " ", "  ", ": ", "\n---\n", "\n...\n"]

event = st.one_of(st.sampled_from(YAML), st.sampled_from(ODD), st.sampled_from(PLAIN), st.text(max_size=3))


# --- the contract of the loader ----------------------------------------------------------------------------------

LINE = re.compile(r"(catalog|snippets|tests)/\S.*?:([1-9][0-9]*): \S.*")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny atlas as files, with an entry of every kind."""
    root = atlases.write(atlases.tiny["catalog"](5, ""), tmp_path_factory.mktemp("atlas"))
    assert catalog.check(root) == []
    return root


@cache
def files() -> list[str]:
    """Texts of all real entries."""
    return [path.read_text(encoding="utf-8") for path in sorted((ATLAS / "catalog").rglob("*.yml"))]


_watched: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "exec", "socket.connect"):
        _watched.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


def answered(root: Path) -> bool:
    """Load and check answer as they promise and execute nothing; whether the catalogue loads."""
    global _watching
    _watching = True
    try:
        lines = catalog.check(root)
        catalog.load.cache_clear()
        try:
            catalog.load(root)
            said, refused = "", list[str]()
        except CatalogError as error:
            said, refused = str(error), error.problems
    finally:
        _watching = False
    assert not _watched
    assert said == "\n".join(refused)
    assert set(refused) <= set(lines)
    assert len(lines) == len(set(lines))
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert len(line) < 2000
        match = LINE.fullmatch(line)
        assert match, line
        path = root.parent / line.split(":")[0]
        if path.is_file():
            content = path.read_bytes()
            assert int(match[2]) <= len(re.findall(rb"\r\n|\r|\n|\x85|\xe2\x80[\xa8\xa9]", content)) + 1, line
    return not refused


def answers(root: Path, file: str, data: bytes) -> bool:
    """The same with ``data`` in place of one file."""
    path = root.parent / file
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        return answered(root)
    finally:
        path.write_bytes(before)


FILES = ["methods/attribution/m-0.yml", "methods/attention/m-2.yml", "evaluation/deletion.yml", "tools/one.yml"]
FILES += ["leaderboards/board.yml", "perspectives/full.yml", "models/glyph.yml", "taxonomy.yml"]
target = st.sampled_from([f"catalog/{file}" for file in FILES])


@fuzz(150)
@given(target, st.one_of(st.binary(max_size=400), odd.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_random_files(root: Path, file: str, data: bytes) -> None:
    answers(root, file, data)


@fuzz(150)
@given(target, st.lists(event, max_size=40))
def test_random_yaml(root: Path, file: str, events: list[str]) -> None:
    answers(root, file, "".join(events).encode("utf-8", "surrogatepass"))


CHANGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(0, 7)),
    st.tuples(st.just("drop line"), st.integers(0, 10**6), st.integers(1, 5)),
    st.tuples(st.just("swap lines"), st.integers(0, 10**6), st.integers(0, 10**6)),
    st.tuples(st.just("repeat line"), st.integers(0, 10**6), st.integers(1, 3)),
    st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(0, 60)),
    st.tuples(st.just("insert"), st.integers(0, 10**6), event),
    st.tuples(st.just("replace value"), st.integers(0, 10**6), st.one_of(event, hostile, odd.map(json.dumps))),
    st.tuples(st.just("indent"), st.integers(0, 10**6), st.integers(-4, 12)),
    st.tuples(st.just("line ends"), st.sampled_from(["\r\n", "\r", "\n\n", "\u2028", "\x85"]), st.just(0)),
    st.tuples(st.just("encode"), st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-7", "utf-32-be"]), st.just(0)),
)


def changed(data: bytes, change: tuple[str, Any, Any]) -> bytes:
    kind, place, what = change
    text = data.decode("utf-8", "surrogateescape")
    lines = text.split("\n")
    if kind == "flip":
        flipped = bytearray(data or b"a")
        flipped[place % len(flipped)] ^= 1 << what
        return bytes(flipped)
    if kind == "line ends":
        text = text.replace("\n", place)
    elif kind == "encode":
        return text.encode(place, "replace")
    elif kind == "cut":
        at = place % (len(text) + 1)
        text = text[:at] + text[at + what :]
    elif kind == "insert":
        at = place % (len(text) + 1)
        text = text[:at] + what + text[at:]
    else:
        at = place % len(lines)
        if kind == "drop line":
            del lines[at : at + what]
        elif kind == "swap lines":
            other = what % len(lines)
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "repeat line":
            lines[at:at] = [lines[at]] * what
        elif kind == "indent":
            lines[at] = " " * what + lines[at] if what > 0 else lines[at][-what:]
        elif kind == "replace value":
            head, colon, _ = lines[at].partition(": ")
            lines[at] = f"{head}{colon or ': '}{what}"
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")


@fuzz(150)
@given(target, st.integers(0, 10**6), st.lists(CHANGE, min_size=1, max_size=5))
def test_mutated_entries(root: Path, file: str, real: int, changes: list[tuple[str, Any, Any]]) -> None:
    data = (root.parent / file).read_bytes()
    if real % 2:  # one of the real catalogue, whose words this taxonomy does not know
        data = files()[real % len(files())].encode()
    for change in changes:
        try:
            data = changed(data, change)
        except UnicodeError:  # of a change after one that broke the encoding
            break
    answers(root, file, data)


BOMBS = {
    "10 MB": "a: " + "x" * 10_000_000,
    "10 MB of lines": "a: b\n" * 2_000_000,
    "just below the limit": "a: " + "x" * 999_000,
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "100,000 anchors": "".join(f"&a{i} " for i in range(100_000)),
    "aliases of themselves": "a: &a [*a]",
    "merge": "<<: &a {<<: *a}",
    "100,000 levels, flow": "a: " + "[" * 100_000 + "]" * 100_000,
    "100,000 levels, flow mappings": "a: " + "{a: " * 100_000,
    "levels of blocks": "a:\n" + "".join(f"{' ' * depth}- a:\n" for depth in range(1, 1300)),
    "100,000 levels, one line": "a: " + "- " * 100_000,
    "questions": "? " * 400_000,
    "key of 900,000": "k" * 900_000 + ": x",
    "quoted key": '"' + "k" * 900_000 + '": x',
    "huge number": "a: " + "9" * 900_000,
    "huge float": "a: 1" + "0" * 400_000 + ".5e9999",
    "sexagesimal": "a: 1" + ":59" * 300_000,
    "60,000 keys": "".join(f"k{i}: 1\n" for i in range(60_000)),
    "60,000 equal keys": "k: 1\n" * 60_000,
    "60,000 unknown references": "relations:\n" + "  - {type: uses, id: nowhere}\n" * 30_000,
    "different unknown references": "relations: ["
    + "".join(f"{{type: uses, id: n{i}}}, " for i in range(30_000))
    + "]",
    "unknown words": "tasks: [" + "".join(f"w{i}, " for i in range(100_000)) + "]",
    "many documents": "---\na: b\n" * 100_000,
    "documents of nothing": "--- \n" * 200_000,
    "directives": "%TAG ! x\n" * 100_000,
    "comments": "#\n" * 499_999,
    "tags": "a: " + "!" + "x" * 900_000 + " y",
    "percent": "a: !%" + "41" * 100_000,
    "block of blanks": "a: |\n" + " \n" * 400_000,
    "escapes": 'a: "' + "\\x41" * 200_000 + '"',
    "open quotes": "a: '" + "''" * 400_000,
    "faults of every line": "".join(f"a{i}: no\n" for i in range(30_000)),
    "wide characters": "a: " + "\U0001f600" * 200_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_explode(root: Path, name: str) -> None:
    sound_entry = (root.parent / "catalog/methods/attribution/m-0.yml").read_text()
    for file, data in (
        (
            "catalog/methods/attribution/m-0.yml",
            re.sub(r"relations:.*|tasks:.*(\n- .*)*", "", sound_entry) + BOMBS[name],
        ),
        ("catalog/taxonomy.yml", BOMBS[name]),
    ):
        assert not answers(root, file, data.encode())


def test_a_file_of_faults_says_the_first_hundred(root: Path) -> None:
    file = "catalog/methods/attribution/m-0.yml"
    path = root.parent / file
    before = path.read_text()
    path.write_text(BOMBS["faults of every line"])
    try:
        lines = [line for line in catalog.check(root) if "truth value" in line or "more faults" in line]
        assert len(lines) == catalog.MAX_FAULTS + 2
        assert f"{file}:101: and 29,900 more faults" in [line.replace("29900", "29,900") for line in lines]
        path.write_text(before.replace("relations: []", "relations:" + "\n- {type: uses, id: nowhere}" * 5000))
        assert len(catalog.check(root)) == catalog.MAX_FAULTS
    finally:
        path.write_text(before)


def test_the_nearest_ids_are_looked_for_a_hundred_times(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(catalog, "_did_you_mean", lambda word, known: asked.append(word) or "")
    for path in sorted((root / "methods").rglob("*.yml")):
        made = "".join(f"\n- {{type: uses, id: {path.stem}-{i}}}" for i in range(90))
        file = path.relative_to(root.parent).as_posix()
        before = path.read_text()
        path.write_text(re.sub(r"relations:.*(\n- .*|\n  .*)*?(?=\n\w)", f"relations:{made}", before))
        try:
            assert f"{file}:" in "".join(catalog.check(root))
        finally:
            path.write_text(before)
    asked.clear()
    reading = catalog._read_all(root)
    for number in range(500):
        catalog._hint(reading, f"x{number % 300}", ("method",))
    assert asked == [f"x{number}" for number in range(catalog.MAX_HINTS)]


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return atlases.write(atlases.tiny["catalog"](5, ""), tmp_path)


@pytest.mark.parametrize(
    "place", ["tools/odd.yml", "methods/attention/odd.yml", "evaluation/odd.yml", "models/odd.yml"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling", "loop", "device", "link to a folder", "socket"])
def test_what_is_no_file_is_refused_and_never_opened(own: Path, place: str, kind: str) -> None:
    path = own / place
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        here = Path.cwd()
        os.chdir(path.parent)  # addresses of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)
    else:
        leads = {"dangling": "nowhere", "loop": path.name, "device": "/dev/zero", "link to a folder": str(own)}
        path.symlink_to(leads.get(kind, str(own / "tools" / "one.yml")))
    assert not answered(own)
    said = "is a folder, a link or a device; an entry is a file"
    assert catalog.check(own) == [f"catalog/{place}:1: {said}"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing"])
def test_a_taxonomy_that_is_no_file(own: Path, kind: str) -> None:
    path = own / "taxonomy.yml"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    assert not answered(own)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(own: Path) -> None:
    (own / "tools" / "one.yml").chmod(0)
    assert catalog.check(own) == ["catalog/tools/one.yml:1: cannot be read: Permission denied"]


@pytest.mark.parametrize(
    "name",
    [b"a\nb.yml",
     b"\xff\xfe.yml", "\u202eab.yml".encode(), b"a\x1b[31m.yml", b"a:9: b.yml", b" .yml", b".yml",
     b"..yml", "不.yml".encode(), b"A.YML", b"a.yml.yml", b"a" * 251 + b".yml", b"-.yml",
     b"x\ty.yml", b"\xed\xa0\x80.yml"],
)  # fmt: skip
def test_odd_names_of_files(own: Path, name: bytes) -> None:
    try:
        Path(os.fsdecode(os.fsencode(own / "tools") + b"/" + name)).write_text((own / "tools" / "one.yml").read_text())
    except OSError:
        pytest.skip("this file system has no such name")
    assert answered(own) == name.startswith(b".")  # hidden
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from vitx import catalog\n"
         "for line in catalog.check(Path(sys.argv[1])): print(line)", str(own)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- the pages ---------------------------------------------------------------------------------------------------

RESULTS = atlases.tiny["results"]()
CITATION = {"title": "vitx", "authors": [{"name": "Us"}], "date-released": "2026-01-01", "license": "MIT"}
SCHEME = re.compile(r"(https?:|mailto:|#|/(?![/\\])|[^:/\\?#\s]+([/?#]|$))", re.IGNORECASE)
STYLE = re.compile(r"[-a-z]+:\s*[-#\w.%]+;?")
ADDRESSES = {"href", "src", "action", "formaction", "poster", "data", "background", "xlink:href", "cite", "srcset"}


class Seen(NamedTuple):
    """What a piece of HTML is made of."""

    elements: dict[str, int]
    attributes: set[tuple[str, str]]
    classes: set[str]
    ids: list[str]
    addresses: list[str]
    styles: set[str]
    scripts: list[str]
    comments: int
    faults: list[str]


def seen(html: str, whole: bool = False) -> Seen:
    parser = html5lib.HTMLParser(tree=html5lib.getTreeBuilder("etree"), namespaceHTMLElements=False)
    tree = parser.parse(html) if whole else parser.parseFragment(html)
    found = Seen({}, set(), set(), [], [], set(), [], 0, [f"{code} {facts}" for _, code, facts in parser.errors])
    comments = 0
    for element in tree.iter():
        if not isinstance(element.tag, str):
            comments += 1
            continue
        tag = element.tag.rpartition("}")[2]
        found.elements[tag] = found.elements.get(tag, 0) + 1
        if tag == "script":
            found.scripts.append(element.text or "")
        for name, value in element.attrib.items():
            name = name.rpartition("}")[2]
            found.attributes.add((tag, name))
            if name in ADDRESSES:
                found.addresses.append(value)
            elif name == "class":
                found.classes.update(value.split())
            elif name == "id":
                found.ids.append(value)
            elif name == "style":
                found.styles.update(filter(None, value.split(";")))
    return found._replace(comments=comments)


# What Markdown and formulas may add to a page.
TEXT = words("p em strong code pre a br ul ol li blockquote hr table thead tbody tr th td")
FORMULA = words(
    """math mi mn mo ms mtext mrow mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable
    mtr mtd mpadded mphantom menclose semantics mstyle merror mmultiscripts mprescripts none span"""
)
ADDED = {*TEXT, *FORMULA, "DOCUMENT_FRAGMENT"}
ADDED_ATTRIBUTES = {("a", "href"), ("a", "title"), ("th", "style"), ("td", "style"), ("ol", "start")}
ADDED_ATTRIBUTES |= {("span", name) for name in ("class", "tabindex", "role", "aria-label")}
ADDED_ATTRIBUTES |= {("code", "class"), ("code", "title")}
MATH_ATTRIBUTES = words(
    """display mathvariant style stretchy form lspace rspace width height depth voffset accent fence
    columnalign columnspacing rowspacing displaystyle scriptlevel movablelimits linethickness separator minsize maxsize
    symmetric largeop accentunder class rowalign columnlines rowlines frame notation mathcolor mathbackground intent arg
    title alttext"""
)


def judge(html: str, usual: Seen, where: str, whole: bool = False) -> None:
    """Nothing in ``html`` that the template and Markdown did not put there."""
    found = seen(html, whole)
    assert not found.faults, (where, found.faults[:5], html[:1500])
    assert {*found.elements} <= {*usual.elements} | ADDED, where
    for tag in ("script", "style", "img", "svg", "form", "input", "iframe", "section", "nav", "h1", "h2", "h3", "link"):
        assert found.elements.get(tag, 0) == usual.elements.get(tag, 0), (where, tag)
    extra = found.attributes - usual.attributes - ADDED_ATTRIBUTES
    assert not {(tag, name) for tag, name in extra if tag not in FORMULA or name not in MATH_ATTRIBUTES}, (where, extra)
    assert not [name for _, name in found.attributes if name.startswith("on")], where
    assert found.classes <= usual.classes | {"vx-bad-math", "vx-display"} | FORMULA_CLASSES, (where, found.classes)
    assert found.ids == usual.ids, where
    assert found.comments == usual.comments, where
    for address in found.addresses:
        assert address == "" or SCHEME.match(re.sub(r"[\x00-\x20]", "", address)), (where, address)
    for style in found.styles:
        assert STYLE.fullmatch(style.strip()), (where, style)


FORMULA_CLASSES: set[str] = set()
NOTHING = Seen({}, set(), set(), [], [], set(), [], 0, [])


@fuzz(400)
@given(st.one_of(hostile, odd))
def test_markdown(text: str) -> None:
    html = markup.markdown_html(text, {"m-0": "/methods/m-0/"})
    judge(html, NOTHING, "markdown")
    inline = markup.inline(text)
    judge(f"<p>{inline}</p>", NOTHING, "inline")
    assert not re.search("<(p|ul|ol|li|pre|table|blockquote|hr)\\b", inline)


@fuzz(300)
@given(
    st.lists(
        st.one_of(st.sampled_from([piece.strip("$") for piece in LATEX]), sound, st.sampled_from(HTML)), max_size=8
    )
)
def test_formulas(pieces: list[str]) -> None:
    for display in (False, True):
        judge(f"<p>{markup.math(''.join(pieces), display=display)}</p>", NOTHING, "formula")


@pytest.mark.parametrize(
    "latex",
    ["{" * 100_000, r"\frac" * 50_000, r"\hat{" * 50_000, r"x^{" * 50_000, r"\left(" * 50_000,
     r"\begin{matrix}" * 30_000, r"\def\a{" + "x" * 500 + r"}\def\b{" + r"\a" * 200 + r"}\b\b\b",
     r"\newcommand\a{x}", "x" * 100_000, "\ud800"],
    ids=lambda latex: ascii(latex[:8]),
)  # fmt: skip
def test_a_formula_ends_no_process(latex: str) -> None:
    """Deep nesting once ended Python itself, inside the library: no exception would have told."""
    html = markup.math(latex, display=False)
    assert html.startswith('<code class="vx-bad-math"')
    assert f"$ {latex} $"[:20].strip("$ ")[:8] in unescape(html)


@pytest.mark.parametrize(
    "text", ["[" * 8000, "1. " * 2600, "> " * 4000, "*a " * 2600, "`" * 8000, "[a](" * 2000, "```\n" * 2000]
)
def test_deep_and_long_markdown_is_answered(text: str) -> None:
    assert len(text) <= catalog.MAX_CHARACTERS
    judge(markup.markdown_html(text), NOTHING, text[:4])
    assert markup.markdown_html("[a](/b)") == '<p><a href="/b">a</a></p>'  # the converter is as new


def prepared(content: Any) -> pages.Atlas:
    return pages.prepare(content, RESULTS, {}, CITATION)


@cache
def usual() -> dict[str, Seen]:
    """The pages with harmless text: what the templates put there."""
    return {
        page.path: seen(page.html + page.rail) for page in atlases.every_page(prepared(atlases.tiny["catalog"](5, "")))
    }


def texts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all text in nested dicts and lists."""
    if isinstance(value, str):
        yield place
    elif isinstance(value, (dict, list)):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from texts(below, (*place, key))


def put(value: Any, place: tuple[Any, ...], text: str) -> None:
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = text


@cache
def free() -> list[tuple[str, dict[str, Any], list[tuple[Any, ...]]]]:
    """Every entry of the tiny atlas, with the places in it where the schema takes any text."""
    content = atlases.tiny["catalog"](5, "")
    found = []
    for kind, data in [("taxonomy", content.taxonomy.model_dump(mode="json")), *atlases.entries(content)]:
        own = []
        for place in texts(data):
            changed_copy = copy.deepcopy(data)
            put(changed_copy, place, "Any text; of {all} kinds")
            try:
                catalog.KINDS[kind].model_validate(changed_copy)
            except ValueError:
                continue
            own.append(place)
        found.append((kind, data, own))
    return found


def filled(chance: random.Random, texts: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The entries of the tiny atlas with hostile text wherever any text may stand."""
    records = []
    for kind, data, places in free():
        changed_copy = copy.deepcopy(data)
        for place in places:
            put(changed_copy, place, chance.choice(texts))
        records.append((kind, changed_copy))
    return records


@fuzz(12, slower=20)
@given(st.integers(0, 10**9), st.lists(hostile, min_size=200, max_size=200))
def test_every_page_of_a_hostile_catalogue(
    tmp_path_factory: pytest.TempPathFactory, seed: int, texts: list[str]
) -> None:
    """Through the files: what loads is shown as text, whatever it is, on every page and in every format."""
    records = filled(random.Random(seed), texts)
    folder = tmp_path_factory.mktemp("hostile")
    paths = []
    for kind, one in records:
        file = catalog.TAXONOMY if kind == "taxonomy" else atlases.place(kind, one)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(atlases.dumped(kind, one), encoding="utf-8")
        paths.append(path)
    catalog.load.cache_clear()
    try:
        content = catalog.load(folder / "catalog")
    except CatalogError as error:  # only where a list holds a text twice, or "others" has nobody before it
        expected = re.compile(r"is listed twice|must not be blank|\"others\" stands last")
        if not all(map(expected.search, error.problems)):
            raise
        return
    finally:
        for path in paths:
            path.unlink()
    atlas = prepared(content)
    for page in atlases.every_page(atlas):
        judge(page.html + page.rail, usual()[page.path], page.path)
    for name, text in export.files(content).items():
        if name.endswith(".js"):
            json.loads(text.partition(" = ")[2].rstrip(";\n"))
    described = [jsonld.entry(atlas, id, "https://vitx.example", "x" * 9) for id in atlas.places]
    for nodes in (jsonld.home(atlas, "", []), jsonld.vocabulary(atlas, ""), *described):
        (script,) = seen(jsonld.script(*nodes)).scripts
        json.loads(script)
        assert "<" not in script


# --- citations ---------------------------------------------------------------------------------------------------

# All the LaTeX that a citation may hold: a text that was escaped.
COMMAND = re.compile(r"\{\\[`'^~=.\"a-zA-Z]\{(?:\\[ij]|[a-zA-Z])\}\}|\{\\[a-zA-Z]+\}|\{\$\\[a-zA-Z]+\$\}|\\[&%$#_]")


@fuzz(300)
@given(st.lists(hostile, min_size=3, max_size=5), st.booleans())
def test_citations(words: list[str], journal: bool) -> None:
    title, venue, *authors = words
    record = copy.deepcopy(next(data for kind, data, _ in free() if kind == "method"))
    record["paper"] |= {"title": title, "venue": venue if journal else None, "authors": authors}
    try:
        entry = catalog.KINDS["method"].model_validate(record)
    except ValueError:
        return  # "others" with nobody before it
    bibtex = cite.bibtex([entry])  # type: ignore[list-item]
    lines = bibtex.split("\n")
    assert re.fullmatch(r"@[a-z]+\{[a-z0-9-]+,", lines[0])
    assert lines[-2:] == ["}", ""]
    depth = 0
    for line in lines[1:-2]:
        name, equals, value = line.partition(" = ")
        if depth == 0:
            assert re.fullmatch(r"  [a-zA-Z]+", name), line
            assert equals
            assert value.startswith("{")
        for letter in line:
            depth += {"{": 1, "}": -1}.get(letter, 0)
            assert depth >= 0, line
        if depth == 0:
            assert line.endswith("},"), line
        if name.strip() in ("title", "author", "booktitle", "journal", "howpublished"):
            rest = COMMAND.sub("", value)
            assert not re.search(r"[\\%$#_^&]", rest), (line, rest)
    assert depth == 0
    (item,) = json.loads(cite.csl_json([entry]))  # type: ignore[list-item]
    assert item["title"] == entry.paper.title  # type: ignore[union-attr]
    assert cite.apa(entry).strip()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["Y", "n", "y", "N", "yes", "Off", "null", "1:30", "010", "1e100", "-0E9", "<<", "Yes", "ny"]
)
def test_the_files_that_are_tried_hold_the_text_that_was_meant(name: str) -> None:
    """Y and 1e100 were once written without quotes, and refused."""
    record = copy.deepcopy(next(data for kind, data, _ in free() if kind == "method")) | {"name": name}
    document, faults = catalog.parse(atlases.dumped("method", record))
    assert not faults
    assert document.data == record


def test_nothing_of_the_real_site_is_unusual() -> None:
    """The judge takes the real entries, so it is no stricter than the site needs."""
    for text in files():
        document, _ = catalog.parse(text)
        for field in ("mechanism", "definition", "note", "description"):
            if isinstance(document.data.get(field), str):
                judge(markup.markdown_html(document.data[field]), NOTHING, field)


def test_the_judge_sees_what_is_wrong() -> None:
    for html in (
        "<p onclick=x>a</p>",
        "<p><a href='javascript:x'>a</a></p>",
        "<p><img src=x></p>",
        "<p><b>x</p>",
        "<p id=a>x</p>",
        '<p class="a">x</p>',
        "<p>a<!-- b --></p>",
        '<p><a href="//evil.example">x</a></p>',
        '<table><tbody><tr><td style="x:url(y)">a</td></tr></tbody></table>',
    ):
        with pytest.raises(AssertionError):
            judge(html, NOTHING, "broken")
