"""Catalogues written to a folder, small and hostile or large and synthetic, and every page that comes from one."""

import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from vitx import ATLAS, catalog, criteria_pages, pages
from vitx.schema import Catalog

tiny = runpy.run_path(str(Path(__file__).parent / "site" / "tiny.py"))
# Quotes, too, what is text to PyYAML and a truth value or a number to others: the letters, 1e100.
_Dumper: Any = type("_Dumper", (getattr(yaml, "CSafeDumper", yaml.SafeDumper),), {})
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile("[-0-9][-+.0-9eE]*$"), list("-0123456789"))
_STUB = {"method": "def explain(model, images, target=None): ...\n", "criterion": "def score(relevance): ...\n"}
_FIELDS = {  # kind of entry -> field of the catalogue
    "method": "methods",
    "criterion": "criteria",
    "model": "models",
    "tool": "tools",
    "leaderboard": "leaderboards",
    "perspective": "perspectives",
}


def dumped(kind: str, data: dict[str, Any]) -> str:
    """One entry, or the taxonomy, as the text of its file: quoted where need be, with escapes for odd characters."""
    depth = 0 if kind == "taxonomy" else catalog.PLACES[kind].folder.count("/")
    body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_style=None, width=1000, allow_unicode=True)
    return f"{catalog.schema_line(kind, depth)}\n{body}"


def place(kind: str, data: dict[str, Any]) -> str:
    """Where the file of an entry belongs, from the root of the repository."""
    return f"{catalog.PLACES[kind].folder.replace('<family>', str(data.get('family')))}/{data['id']}.yml"


def entries(content: Catalog) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, fields) of every entry, as its file holds them."""
    for kind, field in _FIELDS.items():
        for entry in getattr(content, field).values():
            yield kind, entry.model_dump(mode="json")


def write(content: Catalog, folder: Path) -> Path:
    """The catalogue as files below ``folder``, with a stub for every snippet. Returns its root."""
    texts = {catalog.TAXONOMY: dumped("taxonomy", content.taxonomy.model_dump(mode="json"))}
    for kind, data in entries(content):
        texts[place(kind, data)] = dumped(kind, data)
        if data.get("snippet"):
            texts[data["snippet"]] = _STUB[kind]
    return _written(texts, folder)


def write_many(count: int, folder: Path) -> Path:
    """``count`` methods and criteria made from the real ones, which come first, and copies of them. Returns the root.

    Copy n of an entry has ``-n`` after its id and relates to the copies n of the entries to which the entry relates.
    """
    real = catalog.load()
    originals = [(kind, data) for kind, data in entries(real) if kind in _STUB]
    ids = {data["id"] for _, data in originals}
    texts = {catalog.TAXONOMY: dumped("taxonomy", real.taxonomy.model_dump(mode="json"))}
    for kind, data in entries(real):
        if kind == "model":
            texts[place(kind, data)] = dumped(kind, data | {"method": None})
    patterns = []
    for kind, data in originals:
        copy = {**data, "id": f"{data['id']}@@", "formerly": []}
        copy["relations"] = [one | {"id": f"{one['id']}@@"} for one in data["relations"] if one["id"] in ids]
        if kind == "method":
            copy["reported"] = [one | {"criterion": None} for one in data["reported"]]
        if data["snippet"]:
            copy["snippet"] = data["snippet"].replace(".py", "%%.py")
        patterns.append((kind, place(kind, copy), copy["snippet"], dumped(kind, copy)))
    for number in range(count):
        kind, path, snippet, text = patterns[number % len(patterns)]
        copy = number // len(patterns)
        ends = (("@@", f"-{copy}"), ("%%", f"_{copy}")) if copy else (("@@", ""), ("%%", ""))
        for mark, end in ends:
            path, text, snippet = (
                path.replace(mark, end),
                text.replace(mark, end),
                snippet and snippet.replace(mark, end),
            )
        texts[path] = text
        if snippet:
            texts[snippet] = _STUB[kind]
    # The last copies are not all there: relations to those that are missing lead to the first ones.
    made = {Path(path).stem for path in texts}
    last = f"-{(count - 1) // len(patterns)}"
    for path in [path for path in texts if path.endswith(f"{last}.yml")]:
        texts[path] = re.sub(
            rf"(?<=  id: )(\S+){last}$",
            lambda match: match[0] if match[0] in made else match[1],
            texts[path],
            flags=re.MULTILINE,
        )
    return _written(texts, folder)


def _written(texts: dict[str, str], folder: Path) -> Path:
    for path in {(folder / path).parent for path in texts}:
        path.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    return folder / "catalog"


def inserts() -> list[str]:
    """Names that the hand-written pages ask for."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ATLAS / "docs").glob("*.md"))]
    return sorted({name for text in texts for name in re.findall(r"<!-- vitx: ([a-z0-9-]+) -->", text)})


def page_modules() -> list[Any]:
    """The modules that render pages from the catalogue alone."""
    names = sorted(path.stem for path in (ATLAS / "snippets" / "vitx").glob("*pages.py"))
    modules = [importlib.import_module(f"vitx.{name}") for name in names]
    return [module for module in modules if hasattr(module, "render")]


def every_page(atlas: pages.Atlas) -> Iterator[pages.Page]:
    """Every page of the site that comes from the catalogue, and every insert of a hand-written page."""
    for module in page_modules():
        yield from module.render(atlas)
    for id in atlas.catalog.methods:
        yield pages.method_page(atlas, id, "<p>code</p>")
    for id in atlas.catalog.criteria:
        yield criteria_pages.criterion_page(atlas, id, "<p>code</p>")
    for name in inserts():
        yield pages.Page(name, name, "", criteria_pages.insert(atlas, name))
