"""Ten thousand entries: no false alarm, and work that grows as the entries do. Work is counted, not timed."""

import cProfile
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import atlases
import pytest
from vitx import ATLAS, catalog, criteria_pages, export, history_pages, jsonld, pages
from vitx.schema import Catalog

CITATION = {"title": "vitx", "authors": [{"name": "Us"}]}
SMALL, LARGE = 3, 12  # copies of a part of the catalogue


class Counted(dict):
    """A dictionary that counts how often somebody goes through all of it."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        return super().__iter__()

    def keys(self) -> Any:
        self.walks += 1
        return super().keys()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()


def copies(number: int) -> Catalog:
    """``number`` copies of every fifth method and criterion, each related to those of its own copy."""
    real = catalog.load()

    def copied(entries: dict[str, Any]) -> Counted:
        chosen = list(entries.values())[::5]
        ids = {one.id for one in chosen}
        made = Counted()
        for copy in range(number):
            for place, one in enumerate(chosen):
                kept = [relation for relation in one.relations if relation.id in ids]
                kept += [relation.model_copy(update={"id": chosen[place - 1].id}) for relation in one.relations[:1]]
                related = tuple(relation.model_copy(update={"id": f"{relation.id}-{copy}"}) for relation in kept)
                changes: dict[str, Any] = {"id": f"{one.id}-{copy}", "relations": related, "formerly": ()}
                if hasattr(one, "reported"):
                    changes["reported"] = tuple(row.model_copy(update={"criterion": None}) for row in one.reported)
                made[changes["id"]] = one.model_copy(update=changes)
        return made

    return Catalog(real.taxonomy, copied(real.methods), real.models, copied(real.criteria), {}, {}, {})


def walks(content: Catalog) -> int:
    return sum(entries.walks for entries in (content.methods, content.criteria) if isinstance(entries, Counted))


def calls(function: Callable[[], Any]) -> int:
    """Calls of functions, in Python or in C, and items that generators give."""
    profile = cProfile.Profile()
    profile.runcall(function)
    return sum(row.callcount for row in profile.getstats())  # type: ignore[attr-defined]


def entries(atlas: pages.Atlas) -> None:
    for id in atlas.catalog.methods:
        pages.method_page(atlas, id, "<p>code</p>")
    for id in atlas.catalog.criteria:
        criteria_pages.criterion_page(atlas, id, "<p>code</p>")


def described(atlas: pages.Atlas) -> None:
    for id in atlas.places:
        jsonld.entry(atlas, id, "https://vitx.example", "text")


def exported(atlas: pages.Atlas) -> None:
    export.files(atlas.catalog)


def prepared(atlas: pages.Atlas) -> None:
    pages.prepare(atlas.catalog, {}, {}, CITATION)


WORK: dict[str, Callable[[pages.Atlas], Any]] = {module.__name__: module.render for module in atlases.page_modules()}
WORK |= {function.__name__: function for function in (entries, described, exported, prepared)}


@pytest.fixture(scope="module")
def pair() -> tuple[pages.Atlas, pages.Atlas]:
    small, large = (pages.prepare(copies(number), {}, {}, CITATION) for number in (SMALL, LARGE))
    assert len(large.catalog.methods) > 450
    assert sum(len(one.relations) for one in large.catalog.methods.values()) > 300
    return small, large


@pytest.mark.parametrize("name", WORK)
def test_pages_and_files_take_work_for_each_entry_once(
    pair: tuple[pages.Atlas, pages.Atlas], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def below(ids: Iterable[str], *_: Any) -> dict[str, int]:
        return {id: row for row, id in enumerate(ids)}

    # The layout of the lineage looks for room; it never sees more than a fixed number of methods.
    monkeypatch.setattr(history_pages, "arrange", below)
    small, large = pair
    work = WORK[name]
    work(small)  # what is remembered from then on is no work of either
    before = walks(small.catalog), walks(large.catalog)
    few, many = calls(lambda: work(small)), calls(lambda: work(large))
    assert many <= 1.04 * LARGE / SMALL * few, f"{few} calls, then {many}"
    gone = walks(small.catalog) - before[0], walks(large.catalog) - before[1]
    assert gone[0] == gone[1] < 100, "the more entries, the more often all of them are gone through"


def test_the_page_of_one_entry_goes_through_no_others() -> None:
    """With the measured results, of which the copies have none."""
    real = catalog.load()
    content = real._replace(methods=Counted(real.methods), criteria=Counted(real.criteria))
    files = sorted((ATLAS / "catalog" / "results").glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    atlas = pages.prepare(content, results, {}, CITATION)
    before = walks(content)
    for id in real.methods:
        pages.method_page(atlas, id, "")
        assert walks(content) == before, id
    for id in real.criteria:
        criteria_pages.criterion_page(atlas, id, "")
        assert walks(content) == before, id
    for id in [*real.methods, *real.criteria]:
        jsonld.entry(atlas, id, "", "")
        assert walks(content) == before, id


def test_walks_and_calls_are_counted() -> None:
    """What the tests above rest on: a sum of all entries for each of them is seen, in Python and in C."""
    content = Counted({str(number): number for number in range(50)})
    for walk in (dict, list, set, sorted, lambda one: {**one}, lambda one: [*one.values()], lambda one: [*one.items()]):
        before = content.walks
        walk(content)
        assert content.walks > before
    few, many = (calls(lambda numbers=range(size): [sum(a for a in numbers) for _ in numbers]) for size in (50, 200))
    assert many > 12 * few


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[None]:
    """One item for each call of a function from now on."""
    found: list[None] = []
    function = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given, **named: found.append(None) or function(*given, **named))
    return found


def test_a_check_of_ten_thousand_entries_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = atlases.write_many(10_000, tmp_path)
    files = len([*root.rglob("*.yml")])
    snippets = len([*(root.parent / "snippets").rglob("*.py")])
    assert files > 10_000
    assert snippets > 3_000
    parsed, compiled = counted(monkeypatch, catalog, "parse"), counted(monkeypatch, catalog.ast, "parse")
    assert catalog.check(root) == []
    assert len(parsed) == files
    assert len(compiled) == snippets


def test_the_work_of_a_check_grows_with_the_entries(tmp_path: Path) -> None:
    real = sum(1 for kind, _ in atlases.entries(catalog.load()) if kind in ("method", "criterion"))
    roots = [atlases.write_many(number * real, tmp_path / str(number)) for number in (1, 2, 4)]
    few, twice, many = (calls(lambda root=root: catalog.check(root)) for root in roots)
    assert many - twice <= 1.02 * 2 * (twice - few), f"{few} calls, then {twice}, then {many}"
