"""MkDocs hooks: put the pages of ``vitx.pages`` into the site. The only file that imports mkdocs.

on_config reads the catalogue, on_files adds pages, notebooks and pictures, on_page_content fills the pages in,
on_post_page and on_post_build make the result work from a folder and without any other host.
"""

import json
import logging
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import get_toc

from vitx import (
    ATLAS,
    browse_pages,
    catalog,
    contribute,
    coverage_pages,
    criteria_pages,
    execute,
    export,
    history_pages,
    jsonld,
    languages,
    map_pages,
    markup,
    notebook_html,
    pages,
    reference_pages,
    reported_pages,
)
from vitx.schema import Criterion, Method

log = logging.getLogger("mkdocs.vitx")

_atlas: pages.Atlas
_generated: dict[str, pages.Page] = {}  # by address
_notebooks: dict[str, Path] = {}  # executed snippets, by method or criterion
_figures: dict[str, list[markup.Figure]] = {}  # their pictures
_written: list[str] = []  # files of the pages, below the root of the site
_phrases: catalog.Phrases
_words: languages.Words
_PAGES = {  # by folder
    "methods": pages.method_page,
    "criteria": criteria_pages.criterion_page,
    "perspectives": reference_pages.example_page,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the catalogue and the results, and build the navigation."""
    global _atlas, _phrases, _words
    logging.getLogger("mkdocs.plugins.mkdocs_jupyter").setLevel(logging.WARNING)  # a line for each notebook
    try:
        read = catalog.load()
        results = {path.stem: _read_json(path) for path in sorted((ATLAS / "catalog" / "results").glob("*.json"))}
        citation = catalog.parse((ATLAS / "CITATION.cff").read_text(encoding="utf-8"))[0].data
        if config.extra.get("repository"):  # that in which the site is built
            citation["repository-code"] = config.extra["repository"]
        contribute.repository(citation)
        theme = next(path for folder in config.theme.dirs if (path := Path(folder) / "partials" / "languages").is_dir())
        known = languages.theme_phrases(*((theme / f"{name}.html").read_text("utf-8") for name in languages.NAMES))
        known |= languages.taxonomy_phrases(read.taxonomy)
        _phrases = catalog.read_phrases("zh")
        _words = languages.compiled(_phrases.pages, known)
    except (ValueError, OSError) as error:  # all of them say which file
        raise PluginError(str(error)) from error
    _written.clear()
    _atlas = pages.prepare(read, results, {}, citation)
    config.nav = [
        {"Home": "index.md"},
        {
            "Mind map": [
                {"By family": "mindmap/index.md"},
                {"By motivation": "mindmap/motivation.md"},
                {"By task": "mindmap/task.md"},
                {"By year": "mindmap/year.md"},
                {"By needs": "mindmap/needs.md"},
                {"Timeline": "timeline.md"},
                {"Who extends whom": "lineage.md"},
            ]
        },
        {"Browse": "browse.md"},
        {
            "Families": [
                "families/index.md",
                *({escape(term.label): f"families/{term.id}.md"} for term in read.taxonomy.families),
            ]
        },
        {
            "Comparison": [
                {"The same pictures": "comparison.md"},
                {"How correct is proven": "proofs.md"},
                {"What the official code does": "official-code.md"},
                {"What a method costs": "cost.md"},
                {"How close to Shapley values": "shapley.md"},
                {"What pruning keeps": "pruning.md"},
                {"Models that explain themselves": "balance.md"},
            ]
        },
        {
            "Evaluation": [
                {"Criteria": "criteria/index.md"},
                {"Benchmark": "benchmark.md"},
                {"What papers report": "reported.md"},
                {"Beyond one machine": "scale.md"},
            ]
        },
        {
            "Reference": [
                {"Tools": "tools.md"},
                {"Leaderboards": "leaderboards.md"},
                {"Perspectives": "perspectives.md"},
            ]
        },
        {"How to read a map": "how-to-read.md"},
        {"Contribute": ["contributing.md", {"Coverage": "coverage.md"}]},
        {
            "About": [
                {"About": "about.md"},
                {"Models": "models.md"},
                {"Vocabulary": "vocabulary.md"},
            ]
        },
    ]
    return config


def _fault(config: MkDocsConfig, text: str) -> None:
    """Stop a strict build. MkDocs itself only counts warnings, and --quiet makes it count none."""
    if config.strict:
        raise PluginError(text)
    log.warning(text)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add figures, executed snippets with their pictures, data files, and an empty source for each page."""
    global _atlas

    def add(uri: str, **source: Any) -> None:
        files.append(File.generated(config, uri, **source))

    def add_figure(uri: str, data: bytes, alt: str = "") -> markup.Figure:
        add(uri, content=data)
        return markup.Figure(f"/{uri}", *notebook_html.picture_size(data), alt)

    examples = {id: one for id, one in _atlas.catalog.perspectives.items() if one.snippet}
    entries = {**_atlas.catalog.methods, **_atlas.catalog.criteria, **examples}
    try:
        drawn = execute.figures()
        executed = execute.notebooks([id for id, entry in entries.items() if entry.snippet])
    except execute.ExecutionError as error:
        raise PluginError(str(error)) from error

    figures = {key: add_figure(f"assets/figures/{key}{path.suffix}", path.read_bytes()) for key, path in drawn.items()}
    snippets = {id: ATLAS / one.snippet for id, one in _atlas.catalog.criteria.items() if one.snippet}
    reads = {id: criteria_pages.reads(path.read_text(encoding="utf-8")) for id, path in snippets.items()}
    _atlas = _atlas._replace(figures=figures, reads=reads)
    _generated.clear()
    for page in [
        *pages.render(_atlas),
        *map_pages.render(_atlas),
        *browse_pages.render(_atlas),
        *criteria_pages.render(_atlas),
        *reference_pages.render(_atlas),
        *history_pages.render(_atlas),
        *reported_pages.render(_atlas),
        *coverage_pages.render(_atlas),
    ]:
        _generated[page.path] = page
        folder = page.path.rstrip("/")
        name = "index" if folder in ("mindmap", "families", "criteria") else ""
        add(f"{folder}/{name}.md" if name else f"{folder}.md", content="")

    _notebooks.clear()
    _notebooks.update(executed)
    _figures.clear()
    for id, entry in entries.items():
        place = _atlas.places[id].strip("/")
        if entry.snippet:
            add(entry.snippet, abs_src_path=str(ATLAS / entry.snippet))
        path = _notebooks.get(id)
        if path:
            alt = pages.picture_text(entry) if isinstance(entry, Method) else f"{entry.name}: what the code shows"
            if isinstance(entry, Criterion):
                alt = criteria_pages.picture_text(entry)
            add(f"{place}.ipynb", abs_src_path=str(path))
            _figures[id] = [
                add_figure(f"{place}/figure-{n}.{shown.extension}", shown.data, shown.alt or alt)
                for n, shown in enumerate(notebook_html.notebook_pictures(path.read_text(encoding="utf-8")), 1)
            ]
        else:
            if entry.snippet:
                _fault(config, f"{entry.snippet} was not executed; its page has no code")
            add(f"{place}.md", content="")

    for place, text in pages.moved(_atlas, config.site_url or "").items():
        add(f"{place}index.html", content=text)
    add("catalog.json", content=_catalog_json(_atlas))
    for name, text in export.files(_atlas.catalog).items():
        add(name, content=text)
    for path in sorted((ATLAS / "catalog" / "schema").glob("*.json")):
        add(f"schema/{path.name}", abs_src_path=str(path))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """mkdocs-jupyter wraps each notebook and forgets, for one outside docs/, where it lies; say it again."""
    for id, path in _notebooks.items():
        file = files.get_file_from_path(f"{_atlas.places[id].strip('/')}.ipynb")
        assert file is not None
        file.abs_src_path = str(path)
    return nav


def _catalog_json(atlas: pages.Atlas) -> str:
    content: dict[str, Any] = {"taxonomy": atlas.catalog.taxonomy.model_dump(mode="json")}
    for name, entries in atlas.catalog._asdict().items():
        if name != "taxonomy":
            content[name] = [entry.model_dump(mode="json") for entry in entries.values()]
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


_INSERT = re.compile(r"<!-- vitx: ([a-z0-9-]+) -->")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The HTML of a generated page; hand-written ones get their inserts."""
    uri = page.file.src_uri
    folder, _, id = uri.rpartition(".")[0].rpartition("/")
    if folder in _PAGES and id in _atlas.places:
        code = figure = None
        if uri.endswith(".ipynb"):
            code = notebook_html.notebook(html, _figures[id], _atlas.places)
            figure = next(iter(_figures[id]), None)
        made = _PAGES[folder](_atlas, id, code, figure)
    else:
        made = _generated.get(page.url)
    nodes = _described(made, page, files, config.site_url or "")
    page.meta["jsonld"] = jsonld.script(*nodes) if nodes else ""
    if made is None:
        try:
            return _INSERT.sub(lambda match: criteria_pages.insert(_atlas, match[1]), html)
        except KeyError as error:
            raise PluginError(f"docs/{uri}: there is no insert {error}") from error

    # The theme prints these as they are, so they are escaped here.
    page.meta.update(
        title=escape(made.title),
        description=escape(made.description),
        hide=list(made.hide),
        rail=made.rail,
    )
    page.toc = get_toc(markup.contents(made.html))
    for formula in re.findall(r'class="vx-bad-math" title="([^"]*)">(.*?)</code>', made.html):
        _fault(config, f"{uri}: formula {unescape(formula[1])}: {unescape(formula[0])}")
    return made.html


def _described(made: pages.Page | None, page: Page, files: Files, site: str) -> list[jsonld.Node]:
    """What the page says to machines."""
    folder, _, id = page.url.strip("/").rpartition("/")
    if page.is_homepage:
        return jsonld.home(_atlas, site, [name for name in jsonld.FORMATS if files.get_file_from_path(name)])
    if made and made.path == "vocabulary/":
        return jsonld.vocabulary(_atlas, site)
    return jsonld.entry(_atlas, id, site, made.description) if made and folder in ("methods", "criteria") else []


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    path = page.file.dest_uri
    _written.append(path)
    return markup.relative_links(languages.linked(output, path, config.site_url or ""), path)


@event_priority(-100)  # after the search index is written
def on_post_build(config: MkDocsConfig) -> None:
    """Chinese pages, search from a folder, and no address of another host in the theme's scripts."""
    site = Path(config.site_dir)
    for path in _written:
        html = (site / path).read_text(encoding="utf-8")
        place = site / languages.FOLDER / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(
            languages.twin(html, path, _words, frozenset(_written), config.site_url or ""), encoding="utf-8"
        )
    script = site / languages.SCRIPT
    script.write_text(languages.script(_phrases.scripts, script.read_text(encoding="utf-8")), encoding="utf-8")

    index = site / "search" / "search_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    for entry in content["docs"]:
        place, mark, anchor = entry["location"].partition("#")
        entry["location"] = (place + "index.html" if place.endswith("/") or not place else place) + mark + anchor
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    index.write_text(text, encoding="utf-8")
    index.with_suffix(".js").write_text(f"var __index = {text}", encoding="utf-8")

    for path in site.rglob("*.map"):
        path.unlink()
    for path in [*site.rglob("*.min.js"), *site.rglob("*.min.css")]:
        text = path.read_text(encoding="utf-8")
        # Material fetches two scripts of others from a public host when a page asks for them; ours never do.
        clean = text.replace("https://unpkg.com/", "/absent/")
        clean = re.sub(r"\n?(//# sourceMappingURL=\S+|/\*# sourceMappingURL=\S+? ?\*/)\s*$", "\n", clean)
        if clean != text:
            path.write_text(clean, encoding="utf-8")
