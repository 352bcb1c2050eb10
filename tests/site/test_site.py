"""The built site as files: no other host, no dead link, no half megabyte of styles, pages of a decent weight."""

import json
import posixpath
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("use", "href")}


class Document(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))
        for name, value in attributes.items():
            if (tag, name) in LOADS and not (tag == "link" and attributes.get("rel") == "canonical"):
                self.loads.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")


@cache
def documents(site: Path) -> dict[str, Document]:
    """Address of the file from the root of the site -> the parsed page."""
    return {
        path.relative_to(site).as_posix(): Document(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def internal(link: str) -> bool:
    return not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", link)


def test_expected_pages_exist(site: Path) -> None:
    content = json.loads((site / "catalog.json").read_text(encoding="utf-8"))
    places = [
        "",
        "mindmap/",
        "mindmap/motivation/",
        "mindmap/task/",
        "mindmap/year/",
        "mindmap/needs/",
        "browse/",
        "families/",
        "comparison/",
        "models/",
    ]
    places += ["how-to-read/", "contributing/", "coverage/", "about/", "vocabulary/"]
    places += [f"families/{term['id']}/" for term in content["taxonomy"]["families"]]
    places += [f"methods/{method['id']}/" for method in content["methods"]]
    places += ["criteria/", "benchmark/", "scale/", "tools/", "leaderboards/", "perspectives/"]
    places += [f"criteria/{criterion['id']}/" for criterion in content["criteria"]]
    for place in places:
        assert (site / place / "index.html").is_file(), place
    for kind in ("method", "criterion", "taxonomy", "model", "tool", "leaderboard", "perspective"):
        json.loads((site / "schema" / f"{kind}.json").read_text())


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for name, page in documents(site).items():
        for address in page.loads:
            assert internal(address) or address.startswith("data:"), (name, address)
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", page.html), name
        assert not re.search(r"@import", page.html), name
    for path in [*site.rglob("*.css"), *site.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", text), path
        assert not re.search(r"sourceMappingURL", text), path
        # Addresses in scripts: only names of namespaces and of licences, never something to load.
        for host in ("unpkg.com", "cdnjs", "jsdelivr", "googleapis", "gstatic", "mathjax.org", "google-analytics"):
            assert host not in text, (path, host)


def test_every_internal_link_and_anchor_leads_somewhere(site: Path) -> None:
    pages = documents(site)
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    dead = []
    for name, page in pages.items():
        for link in {*page.links, *page.loads}:
            if not internal(link) or link.startswith("data:"):
                continue
            place, _, anchor = link.partition("#")
            place = unquote(place.partition("?")[0])
            target = (
                posixpath.normpath(posixpath.join("/", posixpath.dirname(name), place)).lstrip("/") if place else name
            )
            if place.endswith("/") or target in ("", "."):
                if name != "404.html":  # that one knows only addresses from the root
                    dead.append((name, link, "a folder does not open from a folder"))
                    continue
                target = posixpath.join(target, "index.html").lstrip("/")
            if target not in files:
                dead.append((name, link, "no such file"))
            elif anchor and target in pages and unquote(anchor) not in {*pages[target].ids, "__skip", "__toc"}:
                dead.append((name, link, "no such anchor"))
    assert not dead


def test_no_page_starts_from_the_root_of_a_server(site: Path) -> None:
    for name, page in documents(site).items():
        if name != "404.html":
            assert not [link for link in {*page.links, *page.loads} if link.startswith("/")], name


def test_pages_keep_their_weight(site: Path) -> None:
    for name, page in documents(site).items():
        limit = 250_000 if name.startswith(("methods/", "criteria/")) else 500_000
        assert len(page.html.encode()) < limit, name
        assert "jp-Notebook" not in page.html, name
        assert not re.search(r"<style[^>]*>.{5000}", page.html, re.DOTALL), name
        assert "data:image/png" not in page.html, name


def test_ids_are_unique_and_pictures_have_a_text(site: Path) -> None:
    for name, page in documents(site).items():
        assert len(page.ids) == len(set(page.ids)), (name, sorted(i for i in page.ids if page.ids.count(i) > 1))
        for tag, attributes in page.tags:
            if tag == "img":
                assert attributes.get("alt"), (name, attributes)
                assert attributes.get("width"), name


def test_every_page_has_its_own_title_and_description(site: Path) -> None:
    titles = {}
    for name, page in documents(site).items():
        if name == "404.html":
            continue
        title = re.findall(r"<title>(.*?)</title>", page.html.partition("</head>")[0], re.DOTALL)
        assert len(title) == 1, name
        key = name.startswith("zh/"), title[0]
        assert key not in titles, (name, titles[key])
        titles[key] = name
        assert page.html.count("<h1") == 1, name
        assert re.search(r'<meta name="description" content="[^"]+">', page.html), name


def test_formulas_are_mathml_and_none_is_broken(site: Path) -> None:
    for name, page in documents(site).items():
        assert 'class="vx-bad-math"' not in page.html, name
        if name.startswith(("methods/", "criteria/")):
            prose = re.sub(
                r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>|<math.*?</math>", "", page.html, flags=re.S
            )
            assert not re.search(r"\$\S[^$]*\\[a-zA-Z]+[^$]*\$", prose), name


def test_search_leads_to_files_and_works_without_a_server(site: Path) -> None:
    text = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    index = json.loads(text)
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8") == f"var __index = {text}"
    assert len(index["docs"]) > 10
    for entry in index["docs"]:
        place, _, anchor = entry["location"].partition("#")
        assert (site / place).is_file(), entry["location"]
        if anchor:
            assert unquote(anchor) in documents(site)[place].ids, entry["location"]
        assert not re.search(r"<(img|script|iframe)", entry["title"] + entry["text"]), entry["location"]


def test_hostile_text_builds_no_element(tiny_site: Path) -> None:
    for name, page in documents(tiny_site).items():
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on")], (name, tag, attributes)
            assert not (attributes.get("src") or "").startswith("x"), (name, tag)
            assert not re.match(r"\s*javascript:", attributes.get("href") or "", re.I), (name, attributes)
        assert "alert(2)</script>" not in page.html, name
        assert ">49<" not in page.html


@pytest.mark.parametrize(
    ("fault", "said"),
    [("notebook", "snippets/attribution/m_0.py was not executed"), ("result", "catalog/results/glyph.json: ")],
)
def test_a_fault_stops_a_strict_build_and_is_named(fault: str, said: str, tmp_path: Path) -> None:
    tiny = Path(__file__).with_name("tiny.py")
    command = [sys.executable, str(tiny), str(tmp_path), fault]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert said in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "name", ["browse.js", "export.js", "mindmap.js", "scores.js", "table.js", "worker.js", "zoom.js"]
)
def test_own_scripts_are_small_and_served_as_they_are(site: Path, name: str) -> None:
    script = (site / "assets" / name).read_text()
    assert len(script) < 7500
    assert script == (Path(__file__).resolve().parents[2] / "docs" / "assets" / name).read_text()
