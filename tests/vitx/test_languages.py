"""The Chinese pages: what is translated and what never is, hostile text, links, the file of phrases."""

import json
import re
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from vitx import ATLAS, catalog, languages
from vitx.catalog import CatalogError
from vitx.languages import compiled, translate, twin, untranslated

PHRASES = {
    "Mechanism": "原理",
    "Gradients": "梯度",
    "Concepts": "概念",
    "x": "艾克斯",
    "{} methods in {} families.": "{2} 个家族中的 {1} 种方法。",
    "{} passed": "{} 项通过",
    "See the {}, then {}.": "先看{2}，再看{1}。",
    "Scores, {text}": "得分，{}",
    "{text} ({})": "{}（{}）",
    "Search": "搜索",
    "How to read a map": "如何解读解释图",
}
WORDS = compiled(PHRASES)
NOTHING = compiled({})
NASTY = '<img src=x onerror="alert(1)"><script>alert(2)</script> \'" & </title> 文'


# --- what is translated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("<h2 id='a'>Mechanism</h2>", "<h2 id='a'>原理</h2>"),
        ("<p>\n  Mechanism </p>", "<p>\n  原理 </p>"),
        ('<a title="Mechanism" href="x">x1</a>', '<a title="原理" href="x">x1</a>'),
        ('<input placeholder="Search">', '<input placeholder="搜索">'),
        ('<meta name="description" content="Mechanism">', '<meta name="description" content="原理">'),
        ('<meta name="robots" content="Mechanism">', '<meta name="robots" content="Mechanism">'),
        ("<p><b>12</b> methods in 5 families.</p>", "<p>5 个家族中的 <b>12</b> 种方法。</p>"),
        ("<td>3 passed</td>", "<td>3 项通过</td>"),
        ("<td>1,000 passed</td>", "<td>1,000 项通过</td>"),
        (
            '<p>See the <a href="1">Gradients</a>, then <i>Concepts</i>.</p>',
            '<p>先看<i>概念</i>，再看<a href="1">梯度</a>。</p>',
        ),
        ('<div aria-label="Scores, Gradients"></div>', '<div aria-label="得分，梯度"></div>'),
        ('<div aria-label="Scores, Grad-CAM"></div>', '<div aria-label="得分，Grad-CAM"></div>'),
        ("<td>Gradients, Concepts</td>", "<td>梯度、概念</td>"),
        ("<td><a>Gradients</a>, <a>Concepts</a>.</td>", "<td><a>梯度</a>、<a>概念</a>。</td>"),
        ("<text>Gradients (11)</text>", "<text>梯度（11）</text>"),
        ("<text>Concep…</text>", "<text>Concep…</text>"),
        ("<text>Grad-CAM (2017)</text>", "<text>Grad-CAM (2017)</text>"),
        ("<p>Mechanism<br>Gradients</p>", "<p>原理<br>梯度</p>"),
        ('<a href="1"><span><svg></svg></span> Gradients</a>', '<a href="1"><span><svg></svg></span> 梯度</a>'),
        (
            '<h2 id="a">Gradients <span class="vx-zh" lang="zh">梯度</span><a class="headerlink">¶</a></h2>',
            '<h2 id="a">梯度 <span class="vx-zh" lang="en">Gradients </span><a class="headerlink">¶</a></h2>',
        ),
    ],
)
def test_phrases_become_chinese(english: str, chinese: str) -> None:
    assert translate(english, WORDS) == chinese


@pytest.mark.parametrize("tag", ["code", "pre", "script", "style", "math", "textarea", "kbd"])
def test_code_and_formulas_stay(tag: str) -> None:
    html = f'<p>Mechanism</p><{tag} title="Mechanism">Mechanism <b>x</b> 3 passed</{tag}><p>Mechanism</p>'
    assert translate(html, WORDS) == html.replace("<p>Mechanism</p>", "<p>原理</p>")


def test_comments_and_what_is_marked_stay() -> None:
    for html in ("<!-- Mechanism <p>Mechanism</p> -->", '<a lang="en">Mechanism</a>', '<i translate="no">x</i>'):
        assert translate(html, WORDS) == html


def test_prose_is_left_whole_and_marked_as_english() -> None:
    html = '<p>This sentence says more than the <a href="1">Gradients</a> know, and <b>Concepts</b>.</p>'
    assert translate(html, WORDS) == html.replace("<p>", '<p lang="en">', 1)
    assert translate('<p title="Mechanism">One two three four.</p>', WORDS) == (
        '<p title="原理" lang="en">One two three four.</p>'
    )
    assert translate("<td>Grad-CAM</td>", WORDS) == "<td>Grad-CAM</td>", "a name is no prose"


def test_the_page_says_its_language() -> None:
    assert translate('<!doctype html>\n<html lang="en" class="no-js">', WORDS) == (
        '<!doctype html>\n<html lang="zh" class="no-js">'
    )


def test_what_was_translated_is_not_translated_again() -> None:
    html = "".join(f"<p>{english.replace('{}', '7').replace('{text}', 'Gradients')}</p>" for english in PHRASES)
    html += "<p>Prose that nobody has put into Chinese.</p>"
    once = translate(html, WORDS)
    assert translate(once, WORDS) == once != html


def test_without_words_nothing_but_the_mark_of_prose_changes() -> None:
    html = '<div a="1"><b>x</i> &lt;b&gt; &amp; <p>3 passed</p><!-- c --><br/>1 < 2 > 0<pre>x'
    assert translate(html, NOTHING) == html


# --- hostile text ----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.said: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_hostile_translations_stay_text() -> None:
    words = compiled(
        {"Mechanism": NASTY, "{} passed": NASTY + "{}", "Scores, {text}": NASTY + "{}"}, {"Gradients": NASTY}
    )
    html = translate(
        '<p title="Mechanism">Mechanism</p><p title="3 passed">3 passed</p><p title="Scores, b">Gradients</p>', words
    )
    page = Tags(html)
    assert [tag for tag, _ in page.seen] == ["p", "p", "p"]
    assert [dict(attrs)["title"] for _, attrs in page.seen] == [NASTY, NASTY + "3", NASTY + "b"]
    assert page.said == [NASTY, NASTY + "3", NASTY]


def test_hostile_english_stays_text() -> None:
    key = NASTY.replace("{", "").replace("}", "")
    words = compiled({"Scores, {text}": "得分，{}"}, {key: "中文"})
    said = escape(key)
    assert translate(f'<p title="{said}">{said}</p>', words) == '<p title="中文">中文</p>'
    html = translate(f'<p title="Scores, {said}">Scores, {said}</p>', words)
    assert html == '<p title="得分，中文">得分，中文</p>'
    other = escape(NASTY + "!")
    page = Tags(translate(f'<p title="Scores, {other}">Scores, {other}</p>', words))
    assert page.seen == [("p", [("title", "得分，" + NASTY + "!")])]
    assert page.said == ["得分，" + NASTY + "!"]


def test_a_placeholder_on_a_page_is_text() -> None:
    for text in ("{} passed", "\0 passed", "{text} passed", "{1} passed"):
        assert "项通过" not in translate(f"<p>{text}</p>", WORDS)


def test_a_large_page_does_not_take_forever() -> None:
    """Each would take hours, or all of the stack, if time or depth grew faster than the page."""
    many = 10_000
    for piece in (
        "<pre>", "<b>", "</b>", "<!--", "<p>Gradients</p>", "<", '<a lang="en">', "Gradients, ", "(1): ", "x (1) ", ":",
        "<b>Gradients</b>, ", "<b>x</b>", "…", "<p", '"', " ", "\n", '>x <span class="vx-zh" lang="zh">', "1", "1,",
    ):  # fmt: skip
        translate(piece * many, WORDS)
        translate(f"<p>{piece * many}</p>", WORDS)
        translate(f"<p>{(piece + '</b>') * many}</p>", WORDS)
    translate("<b>" * many + "Gradients" + "</b>" * many, WORDS)
    for text in ("(1): " * 79 + "x", "x" + " (1)" * 99, "(1): " * 40 + "x" + " (1)" * 40):
        assert len(text) < languages.LONGEST_NAMED
        translate(f"<p>{text}</p>", compiled({"({}): {text}": "（{}）：{}", "{text} ({})": "{}（{}）"}))


# --- the two pages of an address -------------------------------------------------------------------------------------

PAGE = """<html lang="en"><head><title>Mechanism</title><script>__md_scope=new URL("../..",location)</script>
<link rel="stylesheet" href="../../assets/vitx.css"></head><body><nav class="vx-languages"></nav>
<article class="md-content__inner md-typeset"><h1>Mechanism</h1>
<a href="../../index.html">1</a><a href="index.html#x">2</a><a href="../other/index.html?a=1&amp;b=2#c">3</a>
<a href="../../catalog.json">4</a><img src="figure-1.png" alt="Mechanism"><a href="#x">5</a><a href="?a=1">6</a>
<a href="https://x.example/a">7</a><a href="../gone/index.html">8</a><a href="mailto:a@b">9</a></article>
<script id="__config" type="application/json">{"base": "../..", "search": "../../assets/s.js",
"translations": {"a": "Search", "b": "# <\\/script>"}}</script></body></html>"""
MIRRORED = {"index.html", "methods/a/index.html", "methods/other/index.html"}


def test_links_lead_to_chinese_pages_and_to_files_of_the_root() -> None:
    html = twin(PAGE, "methods/a/index.html", WORDS, MIRRORED)
    found = re.findall(r'<(?:a|img) (?:href|src)="([^"]*)"', html)
    assert [unescape(one) for one in found] == [
        "../../../methods/a/index.html",  # the switch, in the header
        "../../index.html",
        "index.html#x",
        "../other/index.html?a=1&b=2#c",
        "../../../catalog.json",
        "../../../methods/a/figure-1.png",
        "#x",
        "?a=1",
        "https://x.example/a",
        "../../../methods/gone/index.html",
        "mailto:a@b",
    ]
    assert '<link rel="stylesheet" href="../../../assets/vitx.css">' in html
    assert '<script src="../../../assets/zh.js" defer></script></head>' in html
    assert '__md_scope=new URL("../../..",location)' in html
    assert '<html lang="zh">' in html
    config = re.search(r'id="__config" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert config
    assert json.loads(config[1]) == {
        "base": "../../..",
        "search": "../../../assets/s.js",
        "translations": {"a": "搜索", "b": "# </script>"},
    }


def test_each_page_names_the_other() -> None:
    english = languages.linked(PAGE, "methods/a/index.html")
    assert '<link rel="alternate " hreflang="zh" href="/zh/methods/a/">' in english
    assert '<link rel="alternate " hreflang="en" href="/methods/a/">' in english
    assert '<a href="/zh/methods/a/" lang="zh" hreflang="zh">中文</a>' in english
    assert '<span lang="en" aria-current="true">English</span>' in english
    from vitx.markup import relative_links

    chinese = twin(relative_links(english, "methods/a/index.html"), "methods/a/index.html", WORDS, MIRRORED)
    assert '<a href="../../../methods/a/index.html" lang="en" hreflang="en">English</a>' in chinese
    assert '<span lang="zh" aria-current="true">中文</span>' in chinese
    assert '<link rel="alternate " hreflang="zh" href="index.html">' in chinese
    assert '<link rel="alternate " hreflang="en" href="../../../methods/a/index.html">' in chinese
    assert chinese.count("hreflang=") == 3


def test_the_home_page_has_a_twin_too() -> None:
    from vitx.markup import relative_links

    english = relative_links(languages.linked(PAGE, "index.html"), "index.html")
    assert '<a href="zh/index.html" lang="zh" hreflang="zh">中文</a>' in english
    chinese = twin(english, "index.html", WORDS, MIRRORED)
    assert '<a href="../index.html" lang="en" hreflang="en">English</a>' in chinese


def test_published_pages_name_whole_addresses() -> None:
    site = "https://example.org/vitx/"
    canonical = '<link rel="canonical" href="https://example.org/vitx/methods/a/"></head>'
    english = languages.linked(PAGE.replace("</head>", canonical), "methods/a/index.html", site)
    chinese = twin(english, "methods/a/index.html", WORDS, MIRRORED, site)
    for html in (english, chinese):
        assert 'hreflang="zh" href="https://example.org/vitx/zh/methods/a/"' in html
        assert 'hreflang="en" href="https://example.org/vitx/methods/a/"' in html
    assert '<link rel="canonical" href="https://example.org/vitx/zh/methods/a/">' in chinese


def test_only_a_page_with_english_prose_says_so() -> None:
    prose = PAGE.replace("</article>", "<p>Four words of prose.</p></article>")
    assert languages.ENGLISH_PROSE in twin(prose, "index.html", WORDS, MIRRORED)
    small = PAGE.replace("</article>", '<p class="vx-small">Measured on some machine.</p></article>')
    for page in (PAGE, small):
        assert languages.ENGLISH_PROSE not in twin(page, "index.html", WORDS, MIRRORED)


def test_missing_furniture_is_found_and_names_are_not() -> None:
    html = (
        "<nav><a>Lost one</a> <a>Gradients</a></nav><h2>Mechanism <code>lost two</code></h2><th>Grad-CAM 2</th>"
        '<button aria-label="Lost three">3</button><label>Lost four</label><p>Prose is no furniture.</p>'
        "<summary>3 passed</summary><option>Lost five: 7</option>"
    )
    lost = ["Lost five", "Lost four", "Lost one", "Lost three"]
    assert untranslated(html, WORDS, ["Grad-CAM"]) == lost
    assert untranslated(html, WORDS) == sorted([*lost, "Grad-CAM"])


# --- where the words come from ---------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    root = folder / "catalog"
    (root / "languages").mkdir(parents=True)
    (root / "languages" / "zh.yml").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        (['  "a": "甲"', '  "b": "乙"', '  "a": "丙"'], 4, "given twice"),
        (['  "a": ""'], 2, "not blank"),
        (['  "a": null'], 2, "must be text"),
        (['  "a": 3'], 2, "must be text"),
        (['  "a": [甲]'], 2, "must be text"),
        (['  "{} a": "甲"'], 2, "has 1 placeholders"),
        (['  "a": "甲{}"'], 2, "has 0 placeholders"),
        (['  "{} a {}": "{1}甲{1}"'], 2, "has 2 placeholders"),
        (['  "{} a {}": "{1}甲{}"'], 2, "has 2 placeholders"),
        (['  "{name} a": "甲{}"'], 2, "{name} is no placeholder"),
        (['  "{} a": "甲{text}"'], 2, "{text} is no placeholder"),
        (['  "a{": "甲"'], 2, "{ is no placeholder"),
        (['  " a": "甲"'], 2, "blanks at its ends"),
        (['  "a  b": "甲"'], 2, "blanks at its ends"),
    ],
)
def test_a_fault_of_the_phrases_is_told_with_its_line(tmp_path: Path, lines: list[str], line: int, said: str) -> None:
    root = write(tmp_path, "\n".join(["pages:", *lines, "scripts:", '  "b": "乙"', ""]))
    with pytest.raises(CatalogError) as error:
        catalog.read_phrases("zh", root)
    (problem,) = error.value.problems
    assert problem.startswith(f"catalog/languages/zh.yml:{line}: pages")
    assert said in problem
    assert problem in catalog.check(root)


def test_parts_and_files_that_nobody_reads_are_told(tmp_path: Path) -> None:
    root = write(tmp_path, 'pages:\n  "a": "甲"\nother:\n  "b": "乙"\n')
    (root / "languages" / "fr.yml").write_text("pages: {}\n")
    (root / "languages" / "notes.txt").write_text("x")
    problems = [line for line in catalog.check(root) if "languages" in line]
    assert [line.split(": ", 1)[0] for line in problems] == [
        "catalog/languages/fr.yml:1",
        "catalog/languages/notes.txt:1",
        "catalog/languages/zh.yml:1",
        "catalog/languages/zh.yml:3",
    ]


def test_the_real_phrases_are_sound() -> None:
    phrases = catalog.read_phrases("zh")
    assert len(phrases.pages) > 300
    ideograph = re.compile("[\u4e00-\u9fff]")
    marks = {"{text} - vitx", "({}): {text}", "{text} ({})", "{text} ({}), {text}", "{}, {text}: {}"}
    marks |= {"transformer", "{} of {}"}
    for english, chinese in {**phrases.pages, **phrases.scripts}.items():
        assert ideograph.search(chinese) or english in marks, english
        assert not re.search("[\u4e00-\u9fff] [,.;:]|[\u4e00-\u9fff][,;]", chinese), f"marks of English in {chinese}"
    assert compiled(phrases.pages)


def test_every_term_has_one_chinese_label_and_a_definition() -> None:
    taxonomy = catalog.load().taxonomy
    labels: dict[str, set[str]] = {}
    for name in type(taxonomy).model_fields:
        for term in getattr(taxonomy, name):
            labels.setdefault(term.label, set()).add(term.label_zh)
            assert re.search("[\u4e00-\u9fff]", term.definition_zh), term.id
            assert "\n" not in term.definition_zh
    assert {label: said for label, said in labels.items() if len(said) > 1} == {}, "pages tell them by the label alone"


def test_labels_and_definitions_of_hostile_terms() -> None:
    taxonomy = catalog.load().taxonomy
    term = taxonomy.needs[0].model_copy(
        update={"label": "A {}" + NASTY, "label_zh": "甲{1}" + NASTY, "definition": "B", "definition_zh": NASTY}
    )
    words = compiled({}, languages.taxonomy_phrases(taxonomy.model_copy(update={"needs": (term,)})))
    label = escape(term.label)
    page = Tags(translate(f'<a title="B">{label}</a>', words))
    assert page.seen == [("a", [("title", NASTY)])]
    assert "".join(page.said) == term.label_zh


def test_the_themes_own_strings() -> None:
    material = pytest.importorskip("material")
    folder = Path(material.__file__).parent / "templates" / "partials" / "languages"
    found = languages.theme_phrases(*((folder / f"{name}.html").read_text("utf-8") for name in ("en", "zh")))
    assert found["Table of contents"] == "目录"
    assert found["# matching documents"].startswith("#")
    assert "en" not in found


def test_no_torch_and_no_mkdocs() -> None:
    source = (ATLAS / "snippets" / "vitx" / "languages.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (torch|mkdocs)", source, re.MULTILINE)
    assert "vitx.languages" in sys.modules
