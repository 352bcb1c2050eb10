"""The pages as text: what goes in as text comes out as text, formulas become MathML, links lead somewhere."""

import json
import re
import runpy
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from vitx import map_pages, markup, notebook_html, pages
from vitx.schema import Paper

tiny = runpy.run_path(str(Path(__file__).parents[1] / "site" / "tiny.py"))
VOID = {"img", "br", "hr", "input", "meta", "link", "mspace", "rect", "circle", "path"}


class Elements(HTMLParser):
    """Tags with their attributes, the text, and faults: tags that are not closed in order, attributes given twice."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        return [attributes.get(name) or "" for one, attributes in self.tags if one == tag and name in attributes]


def prepared(count: int = 4, nasty: str = "", results: Any = None) -> pages.Atlas:
    figures = {"compare-photo": markup.Figure("/assets/figures/compare-photo.png", 800, 400)}
    citation = {"title": "vitx" + nasty, "authors": [{"name": "Us" + nasty}], "date-released": "2026-01-01"}
    return pages.prepare(
        tiny["catalog"](count, nasty), tiny["results"]() if results is None else results, figures, citation
    )


def every_page(atlas: pages.Atlas) -> list[pages.Page]:
    methods = [pages.method_page(atlas, id, "<p>code</p>") for id in atlas.catalog.methods]
    inserts = [
        pages.Page(name, name, "", pages.insert(atlas, name))
        for name in (
            "mindmap",
            "counts",
            "grades",
            "proofs",
            "differences",
            "cost",
            "shapley",
            "pruned",
            "balance",
            "citation",
            "compare-photo",
            "compare-glyph",
        )
    ]
    return [*pages.render(atlas), *map_pages.render(atlas), *methods, *inserts]


# --- safety ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", every_page(prepared(nasty=tiny["NASTY"])), ids=lambda page: page.path)
def test_hostile_text_in_any_field_shows_as_text(page: pages.Page) -> None:
    plain = {page.path: page for page in every_page(prepared())}[page.path]
    parsed, expected = Elements(page.html + page.rail), Elements(plain.html + plain.rail)
    assert not parsed.faults
    attributes = {name for _, attributes in parsed.tags for name in attributes}
    assert not {name for name in attributes if name.startswith("on")}
    # No tag beside those of the same page with harmless text, but for the two neutralised links of the hostile text.
    count = {tag: sum(one == tag for one, _ in parsed.tags) for tag, _ in parsed.tags}
    usual = {tag: sum(one == tag for one, _ in expected.tags) for tag, _ in expected.tags}
    assert {tag: n for tag, n in count.items() if tag != "a"} == {tag: n for tag, n in usual.items() if tag != "a"}
    for address in parsed.all("a", "href"):
        assert re.match(r"https://|/|#", address), address
    if page.path not in ("compare-photo", "compare-glyph", "counts"):
        assert "<img src=x" in parsed.text
        assert "不 é" in parsed.text


@pytest.mark.parametrize(
    "text",
    [
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](java&#115;cript:alert(1))",
        "[x](&#1;javascript:alert(1))",
        "[x](data:text/html,<script>1</script>)",
        "[x](vbscript:x)",
        "[x][r]\n\n[r]: javascript:alert(1)",
        "<javascript:alert(1)>",
        "[x](//elsewhere.example/)",
    ],
)
def test_markdown_links_cannot_run_code(text: str) -> None:
    for address in Elements(markup.markdown_html(text)).all("a", "href"):
        assert address == "#"


@pytest.mark.parametrize(
    "text",
    [
        "![x](https://elsewhere.example/x.png)",
        "![x][r]\n\n[r]: https://elsewhere.example/x.png",
        '<img src="https://elsewhere.example/x.png">',
        "<b>bold</b> <iframe src=x></iframe>",
        "<div>\n\nblock\n\n</div>",
        "a &lt;script&gt; b",
        "\ue0000\ue001 \x02wzxhzdk:0\x03",
        "# a heading\n\nand\n=====",
    ],
)
def test_markdown_loads_nothing_and_lets_no_html_through(text: str) -> None:
    parsed = Elements(markup.markdown_html(text))
    assert not parsed.faults
    assert {tag for tag, _ in parsed.tags} <= {"p", "a", "br"}


def test_ordinary_markdown_works() -> None:
    html = markup.markdown_html("A [paper](https://arxiv.org/abs/1) and *stress*:\n\n1. one\n2. `a<b`")
    assert 'href="https://arxiv.org/abs/1"' in html
    assert "<em>stress</em>" in html
    assert "<li>one</li>" in html
    assert "<code>a&lt;b</code>" in html


def test_only_ids_of_methods_become_links() -> None:
    html = markup.markdown_html("`evit` and `other` and [`evit`](/x/)", {"evit": "/methods/evit/"})
    assert html.count('<a href="/methods/evit/"><code>evit</code></a>') >= 1
    assert "<code>other</code>" in html
    assert 'href="/methods/other/"' not in html
    assert not Elements(html).faults


# --- formulas ----------------------------------------------------------------------------------------------------


def test_formulas_become_mathml() -> None:
    html = markup.markdown_html(r"Let $x_i < \alpha_j$ and $$\sum_i x_i * y_i * z$$ hold.")
    assert html.count("<math") == 2
    assert 'display="block"' in html
    assert "<em>" not in html, "Markdown must leave the inside of a formula alone"
    assert "$" not in html
    assert "<script" not in markup.markdown_html(r"$\text{<script>}$")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It costs $5 and $6.", "It costs $5 and $6."),
        ("Run `echo $HOME $PATH`.", "Run echo $HOME $PATH."),
        (r"A \$5 note.", "A $5 note."),
        ("One $ alone.", "One $ alone."),
        ("```\n$a$\n```", "$a$"),
    ],
)
def test_a_dollar_that_is_no_formula_stays(text: str, shown: str) -> None:
    parsed = Elements(markup.markdown_html(text))
    assert "math" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.strip() == shown


def test_a_formula_that_cannot_be_read_is_shown_and_marked() -> None:
    html = markup.markdown_html(r"Here $\nonsense <b>$ is.")
    assert 'class="vx-bad-math"' in html
    assert r"\nonsense &lt;b&gt;" in html
    assert not Elements(html).faults


# --- small things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("Abnar, Samira", "Zuidema, Willem"), "Samira Abnar and Willem Zuidema"),
        (("Simonyan, Karen", "others"), "Karen Simonyan et al."),
        (("A, B", "C, D", "E, F"), "B A, D C and F E"),
        (("Madonna",), "Madonna"),
    ],
)
def test_authors(names: tuple[str, ...], shown: str) -> None:
    paper = Paper(title="t", authors=names, year=2020, venue=None, arxiv=None, doi=None, url=None)
    assert pages.authors(paper) == shown


def test_first_author_alone() -> None:
    paper = Paper(title="t", authors=("A, B", "C, D"), year=2020, venue=None, arxiv=None, doi=None, url=None)
    assert pages.authors(paper, 1) == "B A et al."


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.123456, "0.1235"), (1.25e-17, "1.2e-17"), (3e7, "3.0e7"), (12, "12"), ("<b>", "&lt;b&gt;")],
)
def test_numbers(value: Any, shown: str) -> None:
    assert markup.number(value) == shown


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("methods/evit/index.html", "/methods/grad-cam/", "../grad-cam/index.html"),
        ("methods/evit/index.html", "/methods/evit/#cite", "index.html#cite"),
        ("methods/evit/index.html", "/browse/?family=a", "../../browse/index.html?family=a"),
        ("methods/evit/index.html", "/", "../../index.html"),
        ("methods/evit/index.html", "../..", "../../index.html"),
        ("methods/evit/index.html", "/assets/x.png", "../../assets/x.png"),
        ("index.html", "/browse/", "browse/index.html"),
        ("index.html", ".", "index.html"),
        ("index.html", "./", "index.html"),
        ("index.html", "assets/x.css", "assets/x.css"),
        ("a/index.html", "#here", "#here"),
        ("a/index.html", "https://arxiv.org/abs/1/", "https://arxiv.org/abs/1/"),
        ("a/index.html", "//host/x/", "//host/x/"),
        ("a/index.html", "mailto:x@y", "mailto:x@y"),
        ("a/index.html", "?q=/", "?q=/"),
    ],
)
def test_links_work_from_a_folder(page: str, link: str, expected: str) -> None:
    assert markup.relative_links(f'<a class="x" href="{link}">', page) == f'<a class="x" href="{expected}">'


def test_code_that_talks_about_links_is_left_alone() -> None:
    html = '<code>a = {"href": "/x/"}; href="/x/"</code>'
    assert markup.relative_links(html, "a/index.html") == html


def test_contents_nest_by_level() -> None:
    html = markup.heading(2, "a", "A & b", "中") + '<h3 id="b">B <code>c</code></h3>' + markup.heading(2, "d", "D")
    assert markup.contents(html) == [
        {
            "level": 2,
            "id": "a",
            "name": "A &amp; b",
            "children": [{"level": 3, "id": "b", "name": "B c", "children": []}],
        },
        {"level": 2, "id": "d", "name": "D", "children": []},
    ]


def test_citation_is_bibtex() -> None:
    cff = {"title": "T", "authors": [{"family-names": "A", "given-names": "B"}, {"name": "Group"}], "version": "1"}
    assert pages.citation(cff).splitlines() == [
        "@software{vitx,",
        "  title = {{T}},",
        "  author = {A, B and {Group}},",
        "  version = {1}",
        "}",
    ]


def test_unknown_insert_is_refused() -> None:
    with pytest.raises(KeyError):
        pages.insert(prepared(), "nonsense")


# --- pages -------------------------------------------------------------------------------------------------------


def test_pages_have_balanced_html_unique_ids_and_one_title() -> None:
    for page in every_page(prepared()):
        parsed = Elements(page.html)
        assert not parsed.faults, page.path
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), page.path
        if page.path.endswith("/"):
            assert page.html.count("<h1") == 1
        assert all(parsed.all("img", "alt")), page.path


def test_internal_links_lead_to_pages() -> None:
    atlas = prepared()
    made = [page for page in every_page(atlas) if page.path.endswith("/")]
    written = (
        "",
        "contributing/",
        "coverage/",
        "about/",
        "how-to-read/",
        "official-code/",
        "cost/",
        "proofs/",
        "shapley/",
        "pruning/",
        "criteria/",
        "criteria/deletion/",
        "benchmark/",
        "reported/",
        "browse/",
        "timeline/",
        "lineage/",
    )
    addresses = {"/" + page.path for page in made} | {"/" + path for path in written}
    for page in made:
        for link in Elements(page.html + page.rail).all("a", "href"):
            place = re.sub(r"[?#].*", "", link)
            if link.startswith("/") and not link.startswith(("/assets/", "/snippets/")):
                assert place in addresses, (page.path, link)


@pytest.mark.parametrize("site", ["", "https://atlas.example/a&b/"])
def test_former_addresses_lead_to_the_present_one(site: str) -> None:
    atlas = prepared(nasty=tiny["NASTY"])
    made = pages.moved(atlas, site)
    assert list(made) == ["methods/m-one/", "methods/m-uno/"]
    html = made["methods/m-one/"]
    parsed = Elements(html)
    assert not parsed.faults
    assert [tag for tag, _ in parsed.tags if tag in ("img", "script")] == []
    assert parsed.all("a", "href") == ["../m-1/index.html"]
    canonical = [one for tag, one in parsed.tags if tag == "link"]
    assert canonical == [{"rel": "canonical", "href": f"{site}methods/m-1/" if site else "../m-1/"}]
    refresh = [one["content"] for tag, one in parsed.tags if tag == "meta" and one.get("http-equiv") == "refresh"]
    assert refresh == ["0; url=../m-1/index.html"]
    full = atlas.catalog
    criteria = {"deletion": full.criteria["deletion"].model_copy(update={"formerly": ("deleting",)})}
    assert list(pages.moved(atlas._replace(catalog=full._replace(methods={}, criteria=criteria)), site)) == [
        "criteria/deleting/"
    ]


def test_relations_show_in_both_directions() -> None:
    atlas = prepared()
    assert "Extends" in pages.method_page(atlas, "m-1", "").html
    back = pages.method_page(atlas, "m-0", "").html
    assert "Extended by" in back
    assert all(f'href="/methods/m-{n}/"' in back for n in (1, 2, 3))


def test_evidence_tables_hold_what_was_measured() -> None:
    atlas = prepared()
    plain = {
        name: unescape(re.sub(r"<[^>]+>", " ", pages.insert(atlas, name))) for name in ("proofs", "differences", "cost")
    }
    assert "1 failed" not in plain["proofs"]
    assert "2 failed" in plain["proofs"]
    assert "glyph: 0.5 (smallest 0.25)" in plain["differences"]
    assert "commit 0123456" in plain["differences"]
    assert "Not measured: Because" in plain["differences"]
    for said in ("1 forward", "2.5", "2.25", "3.1", "failed: no"):
        assert said in plain["cost"]
    shapley = pages.insert(atlas, "shapley")
    assert shapley.count("<svg") == 2
    assert "0.875 ± 0.03125" in unescape(re.sub(r"<[^>]+>", " ", shapley))
    bare = prepared(results={})
    assert "not measured yet" in pages.insert(bare, "differences")
    assert "Not measured yet." in pages.insert(bare, "cost")
    assert "Not measured yet." in pages.insert(bare, "proofs")
    assert "official-code" in pages.method_page(atlas, "m-0", "").html
    assert "official-code" not in pages.method_page(atlas, "m-1", "").html


def test_a_method_page_holds_the_entry() -> None:
    atlas = prepared()
    html = pages.method_page(atlas, "m-1", "<p>the executed code</p>").html
    text = unescape(re.sub(r"<[^>]+>", " ", html))
    for expected in (
        "Method 1",
        "On 1",
        "Lovelace, Alan Turing et al.",
        "Journal, 2011",
        "DOI 10.1000/a;b'c(1)",
        "arXiv 2005.00928",
        "licence MIT",
        "Public only after 12 November 2023",
        "Faithfulness",
        "Speed",
        "vitx run m-1",
        "the executed code",
        "0.700",
        "Random map",
        "@article{",
    ):
        assert expected in text, expected
    assert "<math" in html


def test_an_entry_without_code_asks_for_it() -> None:
    html = pages.method_page(prepared(), "m-3", None).html
    assert "Nobody wrote it." in html
    assert '<a href="/coverage/#gap-snippet">Contribute it</a>' in html
    assert "vitx run" not in html


def test_proofs_go_from_weakest_to_strongest_and_say_what_failed() -> None:
    html = pages.method_page(prepared(), "m-0", "").html
    assert html.index("Contract") < html.index("Parity")
    assert html.count("vx-pass") == 1
    assert html.count("vx-fail") == 2


def test_what_was_not_measured_says_so() -> None:
    atlas = prepared(results={})._replace(figures={})
    html = pages.method_page(atlas, "m-0", None).html
    assert html.count("Not measured yet.") == 2
    assert "Not executed yet." in html
    assert "Not measured yet." in pages.insert(atlas, "grades")
    assert "Not drawn yet." in pages.insert(atlas, "compare-glyph")
    pages.render(atlas)


def test_grades_are_sorted_and_ignore_methods_that_left_the_catalogue() -> None:
    results = tiny["results"]()
    row = {"method": "gone", "mass_inside": 0.99, "pointing_game": 1.0, "scenes": 1}
    results["glyph"]["rows"].append(row)
    html = pages.grade_table(prepared(results=results))
    places = [html.index(name) for name in ("object mask", "Method 1", "Method 0", "Random map")]
    assert places == sorted(places)
    assert "0.99" not in html
    assert "not defined" in html


def test_a_method_page_does_not_grow_with_the_catalogue() -> None:
    small, large = prepared(400), prepared(4000)
    sizes = [len(page.html + page.rail) for page in (pages.method_page(a, "m-1", "") for a in (small, large))]
    assert sizes[1] < sizes[0] + 2000


# --- notebooks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny notebook as mkdocs-jupyter renders it."""
    convert = pytest.importorskip("mkdocs_jupyter.convert")
    path = tmp_path_factory.mktemp("notebook") / "n.ipynb"
    path.write_text(tiny["notebook"]())
    return convert.nb2html(str(path))


def test_a_notebook_is_reduced_to_its_content(rendered: str) -> None:
    figure = markup.Figure("/methods/m-0/figure-1.png", 4, 3, "What is seen")
    html = notebook_html.notebook(rendered, [figure], {"m-1": "/methods/m-1/"})
    parsed = Elements(html)
    assert not parsed.faults
    assert len(rendered) > 100_000 > 10_000 > len(html)
    assert not {"script", "style", "svg", "h1", "clipboard-copy"} & {tag for tag, _ in parsed.tags}
    assert "data:image" not in html
    assert 'src="/methods/m-0/figure-1.png"' in html
    assert parsed.all("img", "alt") == ["What is seen"]
    assert html.count("<math") == 2
    assert '<h3 id="the-equation">The equation</h3>' in html
    assert '<a href="/methods/m-1/"><code>m-1</code></a>' in html
    assert parsed.text.count("def explain") == 1
    assert "predicted <b>star</b> & more" in parsed.text
    assert "/private/path" not in html


def test_headings_of_a_notebook_do_not_take_the_ids_of_the_page() -> None:
    cell = '<div class="jp-Notebook"><div class="jp-Cell"><div class="jp-RenderedMarkdown">{}</div></div></div>'
    html = notebook_html.notebook(
        cell.format('<h2 id="cite">Cite</h2><h2 id="a">A</h2><h2 id="a">A</h2><h2 id="">引</h2>'), []
    )
    assert re.findall('id="(.*?)"', html) == ["cite-2", "a", "a-2", "part"]


def test_pictures_of_a_notebook() -> None:
    (shown,) = notebook_html.notebook_pictures(tiny["notebook"]())
    assert shown == notebook_html.Picture(tiny["png"](), "png", "")
    assert notebook_html.picture_size(shown.data) == (4, 3)
    assert notebook_html.notebook_pictures(json.dumps({"cells": [{"cell_type": "markdown", "source": "x"}]})) == []


def test_the_accuracy_of_a_card_is_the_models_own():
    """Never that of the plain model which stands beside it."""
    assert pages._accuracy({"top1_plain": 1.0, "top1_glyph": 0.9, "top1_at_0.5": 0.8, "top1": 0.7}) == (
        "0.8 <code>top1_at_0.5</code>"
    )
    assert pages._accuracy({"iou": 0.5, "video_accuracy": 0.4}) == ""
    assert pages._accuracy({"top1_<b>": 0.5}) == "0.5 <code>top1_&lt;b&gt;</code>"
