"""Load the catalogue, check it, ask it.

``load`` reads catalog/ alone and raises ``CatalogError`` with every problem of every file, one line each:
``catalog/methods/attention/x.yml:5: year: ...``. ``check`` adds what concerns the rest of the repository (snippets
exist and define ``explain`` or ``score``, no file is orphaned, nothing is left to do) and returns the lines. Neither
imports torch.
"""

import ast
import difflib
import functools
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from vitx import ATLAS
from vitx.schema import (
    KINDS,
    Catalog,
    Code,
    Criterion,
    LaterPaper,
    LeaderboardRow,
    Method,
    ModelCard,
    Motivation,
    Paper,
    Perspective,
    Reported,
    Runs,
    Subfamily,
    Taxonomy,
)

BUNDLED_MODELS = ("glyph", "photo")  # known even to a catalogue without cards
# What `vitx new` leaves in its skeletons; `check` reports every line that holds it.
TODO = "TODO(new):"

TAXONOMY = "catalog/taxonomy.yml"
LANGUAGES = ("zh",)  # beside English; catalog/languages/<language>.yml
PLACEHOLDER = re.compile(r"\{([1-9]?)\}")  # in a translation: {} in the order of the original, or {2} for its second
MAX_BYTES = 1_000_000
MAX_CHARACTERS = 8_000  # of one text; more would take the Markdown of a page too long
MAX_FAULTS = 100  # told of one file
MAX_HINTS = 100  # ids of entries that do not exist for which the nearest are looked for
MAX_DEPTH = 10  # entries need 3

Location = tuple[str | int, ...]  # ("paper", "authors", 0)


class _Place(NamedTuple):
    """Where the entries of a kind live, and what computes them."""

    folder: str  # of the files, below the repository root
    function: str | None = None  # that a snippet defines, "" for none in particular; None where there are no snippets


PLACES = {
    "method": _Place("catalog/methods/<family>", "explain"),
    "criterion": _Place("catalog/evaluation", "score"),
    "model": _Place("catalog/models"),
    "tool": _Place("catalog/tools"),
    "leaderboard": _Place("catalog/leaderboards"),
    "perspective": _Place("catalog/perspectives", ""),
}


class Problem(NamedTuple):
    """One fault, in sorting order."""

    file: str  # relative to the repository root
    line: int  # from 1
    text: str

    def __str__(self) -> str:
        return f"{_visible(self.file)}:{self.line}: {_visible(' '.join(self.text.split())[:600])}"


def _visible(text: str) -> str:
    """``text`` with whatever cannot be printed, or hides on screen, written as an escape such as \\u202e."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class CatalogError(ValueError):
    """The catalogue has faults; ``problems`` holds one line for each."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = [str(problem) for problem in sorted(problems)]
        super().__init__("\n".join(self.problems))


class UnknownId(ValueError):
    """No entry has this id; the message names the nearest."""


class NoSnippet(ValueError):
    """The entry exists but nothing computes it; the message says why."""


# ---------------------------------------------------------------------------------------------------------- YAML


class Document(NamedTuple):
    """One parsed file."""

    data: dict[str, Any]
    lines: dict[Location, int]  # line of each key and of each list item, from 1
    text: str  # the whole file


# Only its parser is used: the events become plain values below, and no constructor ever runs. libyaml if there is one.
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Whatever is no text in a text file, and what makes text look like something else on screen: control characters,
# line breaks that only YAML 1.1 or old systems know, byte order marks, characters without width or for private use,
# halves of characters, marks that reverse the reading direction.
_ODD_CHARACTER = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\uf8ff\ufeff"
    "\ufdd0-\ufdef\ufff0-\uffff\U000e0000-\U0010ffff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 14))
    + "]|\r(?!\n)"
)


def _odd(text: str) -> re.Match[str] | None:
    """The first odd character of a text."""
    plain = text.replace("\n", "")  # most texts are printable, which is found out much faster
    if plain.isprintable() and "\ufffc" not in plain and "\ufffd" not in plain:
        return None
    return _ODD_CHARACTER.search(text)


_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?")
_CONSTANTS = {"null": None, "true": True, "false": False}
_BOOLEAN_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false"}


def _is_yaml_1_1_trap(text: str) -> bool:
    """Would a YAML 1.1 reader take this plain scalar for something else than text (date, octal, 1:30, no)?"""
    if len(text) < 6 and (text == "" or text.lower() in _BOOLEAN_WORDS):
        return True
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.get(text[0])
    return bool(resolvers) and any(pattern.match(text) for _tag, pattern in resolvers)


def _plain_value(text: str) -> Any:
    """Value of an unquoted scalar. ValueError where YAML 1.1 and YAML 1.2 disagree about it."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    word = text[:6].lower()
    if word in ("", "~", "null"):
        raise ValueError("write null for an unknown value")
    if word in ("true", "false"):
        raise ValueError(f"write {word}, or quote it if it is text")
    if word in _BOOLEAN_WORDS:
        raise ValueError(f'unquoted {text} is a truth value to some readers; write true or false, or "{text}"')
    if _is_yaml_1_1_trap(text):
        raise ValueError(
            f'unquoted {text} is a number, a date or a merge to some readers; write "{text}" if it is text'
        )
    return text


class _Refused(Exception):
    """Stops reading a file: (line, text)."""


def parse(text: str) -> tuple[Document, list[tuple[int, Location, str]]]:
    """Parse the YAML of one entry, strictly.

    Refused, each with its line: duplicate keys, keys that are not text, anchors, aliases, merge keys, tags, a second
    document, unquoted scalars on which YAML 1.1 and 1.2 disagree, odd characters, deep nesting, anything but a mapping
    at the top. No value is ever constructed from a tag.

    Returns the document and the faults (line, location, text) that do not prevent reading on.
    """
    lines: dict[Location, int] = {}
    faults: list[tuple[int, Location, str]] = []
    parser = _Parser(text)
    following = parser.get_event

    def build(event: Event, here: Location) -> Any:
        line = _line(event)
        if isinstance(event, AliasEvent):
            raise _Refused(line, f"alias *{event.anchor} is not allowed; write the value out")
        assert isinstance(event, (ScalarEvent, CollectionStartEvent))
        if event.anchor is not None:
            raise _Refused(line, f"anchor &{event.anchor} is not allowed; write the value out")
        if event.tag is not None:
            raise _Refused(line, f"tag {event.tag} is not allowed")
        if isinstance(event, ScalarEvent):
            value, fault = _scalar(event)
            if fault is not None:
                faults.append((line, here, fault))
            return value
        if len(here) == MAX_DEPTH:
            raise _Refused(line, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := following(), SequenceEndEvent):
                place = (*here, len(items))
                lines[place] = _line(event)
                items.append(build(event, place))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := following(), MappingEndEvent):
            place = (*here, key := _key(event))
            if key in mapping:
                faults.append((_line(event), place, f"given twice, first in line {lines[place]}"))
            else:
                lines[place] = _line(event)
            mapping[key] = build(following(), place)
        return mapping

    data = None
    try:
        while not isinstance(event := following(), StreamEndEvent):
            if isinstance(event, DocumentStartEvent) and data is not None:
                raise _Refused(_line(event), "a second document starts here; one file holds one entry")
            if isinstance(event, NodeEvent):
                if not isinstance(event, MappingStartEvent):
                    raise _Refused(_line(event), "the file must hold one mapping (key: value lines)")
                data = build(event, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise _Refused(mark.line + 1 if mark else 1, f"not valid YAML: {said}") from None
    except yaml.YAMLError as error:
        raise _Refused(1, f"not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        parser.dispose()
    if data is None:
        raise _Refused(1, "the file is empty")
    return Document(data, lines, text), faults


def _line(event: Event) -> int:
    return event.start_mark.line + 1


def _key(event: Event) -> str:
    if not isinstance(event, ScalarEvent) or event.anchor is not None or event.tag is not None:
        raise _Refused(_line(event), "a key must be plain text")
    fault = _key_fault(event.value, event.implicit[0])
    if fault:
        raise _Refused(_line(event), fault)
    return event.value


@functools.lru_cache(maxsize=500)  # every entry has the same
def _key_fault(key: str, plain: bool) -> str | None:
    if plain:
        if key == "<<":
            return "merge key << is not allowed; write the values out"
        if key in _CONSTANTS or _is_yaml_1_1_trap(key):
            return f"key {key or 'without a name'} must be text; quote it"
    return "a key holds a control character" if _ODD_CHARACTER.search(key) else None


def _scalar(event: ScalarEvent) -> tuple[Any, str | None]:
    """(value, what is wrong with it)."""
    text = event.value
    odd = event.style == '"' and _odd(text)  # only there may an escape hide one from ``_read``
    if odd:
        return text, f"holds the character U+{ord(odd[0]):04X}, which no reader would see"
    if len(text) > MAX_CHARACTERS:
        return text[:MAX_CHARACTERS], f"is longer than {MAX_CHARACTERS:,} characters"
    if not event.implicit[0]:  # quoted or a block
        return text, None
    try:
        return _plain_value(text), None
    except ValueError as error:
        return text, str(error)


def _read(path: Path, file: str, problems: list[Problem]) -> tuple[Document | None, set[Location]]:
    """Parse one file; append its faults to ``problems``. Returns the document and the locations already faulted."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would never end, a link leads out of the catalogue
            problems.append(Problem(file, 1, "is a folder, a link or a device; an entry is a file"))
            return None, set()
        with path.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
    except OSError as error:
        problems.append(Problem(file, 1, f"cannot be read: {error.strerror or error}"))
        return None, set()
    if len(raw) > MAX_BYTES:
        problems.append(Problem(file, 1, f"larger than {MAX_BYTES:,} bytes"))
        return None, set()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.append(Problem(file, raw.count(b"\n", 0, error.start) + 1, "not UTF-8 text"))
        return None, set()
    odd = _odd(text)
    if odd:
        line = text.count("\n", 0, odd.start()) + 1
        problems.append(Problem(file, line, f"holds the character U+{ord(odd[0]):04X}; remove it"))
        return None, set()
    try:
        document, faults = parse(text)
    except _Refused as refused:
        line, said = refused.args
        last = text.count("\n") + 1  # libyaml says the line after it where the file ends too early
        problems.append(Problem(file, min(line, last), said))
        return None, set()
    for line, location, said in faults[:MAX_FAULTS]:
        problems.append(Problem(file, line, f"{_dotted(location)}: {said}"))
    if len(faults) > MAX_FAULTS:
        problems.append(Problem(file, faults[MAX_FAULTS][0], f"and {len(faults) - MAX_FAULTS} more faults"))
    return document, {location for _line, location, _said in faults}


# -------------------------------------------------------------------------------------------------------- schema


_PATTERN_MEANING = {
    r"^[a-z]": "must be an id: lower-case words joined by hyphens",
    r"^https:": "must be an address that starts with https://",
    r"^([0-9]{4}": 'must be an arXiv identifier such as "2005.00928", without a version',
    r"^10\.": "must be a DOI such as 10.18653/v1/2020.acl-main.385, without https://doi.org/",
    r"^snippets/evaluation": "must be a path such as snippets/evaluation/deletion.py",
    r"^snippets/perspectives": "must be a path such as snippets/perspectives/model_debugging_improvement.py",
    r"^snippets": "must be a path such as snippets/attention/attention_rollout.py",
    r"^[0-9]{4}-": 'must be a year and a month such as "2023-11"',
    r"^[0-9a-f]": "must be 64 hexadecimal digits in lower case",
}


_PARTS = (Paper, Code, Motivation, Reported, Subfamily, Runs, LeaderboardRow, LaterPaper)
_FIELDS = sorted({field for record in (*KINDS.values(), *_PARTS) for field in record.model_fields})


def _dotted(location: Location) -> str:
    """("paper", "authors", 0) -> paper.authors[0]."""
    dotted = ""
    for part in location:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}"
    return dotted.lstrip(".")


def _line_of(location: Location, lines: dict[Location, int]) -> int:
    """Line of the nearest ancestor that is written in the file."""
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 1)


def _explain_error(error: Any) -> str:
    """A pydantic error in the words of somebody who edits YAML."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not a field" + _did_you_mean(str(error["loc"][-1]), _FIELDS)
    if kind == "string_pattern_mismatch":
        meaning = next((m for start, m in _PATTERN_MEANING.items() if context["pattern"].startswith(start)), None)
        return meaning or error["msg"]
    if kind == "string_too_short":
        return "must not be blank; write null for an unknown value"
    if kind == "too_short":
        return "must hold at least one item"
    if kind == "tuple_type":
        return "must be a list"
    if kind in ("model_type", "dict_type"):
        return "must be a mapping (key: value lines)"
    if kind == "value_error":
        return str(context["error"])
    said = error["msg"].replace("Input should", "must")
    value = error["input"]
    return said + (f", not {value!r:.80}" if isinstance(value, (str, int, float, bool, type(None))) else "")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f"; did you mean {', '.join(near)}?" if near else ""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words that ``word`` may have meant: those that contain it, then those spelt much like it."""
    known = sorted(known)
    word = word.lower()[:80]
    inside = [k for k in known if len(word) > 2 and word in k]
    alike = difflib.get_close_matches(word, known, n=count, cutoff=0.6)
    return list(dict.fromkeys(inside + alike))[:count]


def _validate(kind: str, document: Document, file: str, faulted: set[Location], problems: list[Problem]) -> Any:
    """The typed record, or None with its faults appended to ``problems``."""
    record = KINDS[kind]
    try:
        return record.model_validate(document.data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    above = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    if len(errors) > MAX_FAULTS:
        line = _line_of(errors[MAX_FAULTS]["loc"], document.lines)
        problems.append(Problem(file, line, f"and {len(errors) - MAX_FAULTS} more faults"))
    for error in errors[:MAX_FAULTS]:
        location = error["loc"]
        if location in faulted or (error["type"] == "too_short" and location in above):
            continue  # said already, or a mere consequence
        text = _explain_error(error)
        where = _dotted(location)
        problems.append(Problem(file, _line_of(location, document.lines), f"{where}: {text}" if where else text))
    return None


# ---------------------------------------------------------------------------------------------------------- load


class _Reading(NamedTuple):
    taxonomy: Taxonomy | None
    entries: dict[str, dict[str, Any]]  # kind -> id of a valid entry -> the entry
    documents: dict[str, Document]  # by file
    files: dict[str, dict[str, str]]  # kind -> id of an entry, valid or not -> file
    problems: list[Problem]
    hints: dict[tuple[str, tuple[str, ...]], str]  # id that no entry has, kinds where it was looked for -> the nearest


def _entry_files(folder: Path, problems: list[Problem], root: Path) -> list[Path]:
    paths = []
    for path in sorted(folder.rglob("*")):
        folder_of_others = path.is_dir() and not path.is_symlink() and path.suffix != ".yml"
        if folder_of_others or path.name.startswith("."):
            continue
        if path.suffix != ".yml":
            problems.append(Problem(_relative(path, root), 1, "is not an entry; entries are <id>.yml files"))
        else:
            paths.append(path)
    return paths


def _relative(path: Path, root: Path) -> str:
    """Path as messages show it: catalog/methods/attention/x.yml, snippets/..."""
    return path.relative_to(root.parent).as_posix()


def _read_all(root: Path) -> _Reading:
    problems: list[Problem] = []
    documents: dict[str, Document] = {}

    def read(kind: str, path: Path) -> Any:
        file = _relative(path, root)
        document, faulted = _read(path, file, problems)
        if document is None:
            return None
        documents[file] = document
        return _validate(kind, document, file, faulted, problems)

    taxonomy = read("taxonomy", root / "taxonomy.yml")
    entries: dict[str, dict[str, Any]] = {kind: {} for kind in PLACES}
    files: dict[str, dict[str, str]] = {kind: {} for kind in PLACES}
    taken: dict[str, str] = {}  # by methods and criteria, which are asked for by id alone
    for kind, place in PLACES.items():
        ids = taken if place.function else files[kind]
        for path in _entry_files(root / place.folder.split("/")[1], problems, root):
            file = _relative(path, root)
            if file.count("/") != place.folder.count("/") + 1:
                problems.append(Problem(file, 1, f"belongs in {place.folder}/"))
                continue
            if path.stem in ids:
                problems.append(Problem(file, 1, f"id: {path.stem} is taken by {ids[path.stem]}"))
                continue
            ids[path.stem] = files[kind][path.stem] = file
            entry = read(kind, path)
            if entry is not None:
                entries[kind][path.stem] = entry
    return _Reading(taxonomy, entries, documents, files, problems, {})


def _cross_check(reading: _Reading) -> list[Problem]:
    """What no single file can tell."""
    problems: list[Problem] = []
    if reading.taxonomy is not None:
        problems += _check_taxonomy(reading.taxonomy, reading.documents[TAXONOMY])
    vocabularies = _vocabularies(reading.taxonomy)
    owners = {term.id: term.family for term in reading.taxonomy.subfamilies} if reading.taxonomy else {}
    models = {*BUNDLED_MODELS, *reading.entries["model"]}
    for kind, entries in reading.entries.items():
        for stem in entries:
            found = _check_entry(kind, stem, reading, vocabularies, owners, models)
            problems += islice(found, MAX_FAULTS)
    problems += _check_former_ids(reading)
    return problems


# Lists in which nothing stands twice.
_SETS = (
    "tasks",
    "needs",
    "relations",
    "implemented_in",
    "methods",
    "implements",
    "entries",
    "later_papers",
    "formerly",
    "reported",
)


def _references(kind: str, entry: Any) -> Iterator[tuple[Location, str, tuple[str, ...]]]:
    """Each id of another entry that the entry names: its place, the id, the kinds of entry that it may be."""
    works = ("method", "criterion")
    for position, relation in enumerate(getattr(entry, "relations", ())):
        yield ("relations", position, "id"), relation.id, (kind,)
    if isinstance(entry, ModelCard) and entry.method is not None:
        yield ("method",), entry.method, ("method",)
    for field in ("implements", "entries"):
        for position, id in enumerate(getattr(entry, field, ())):
            yield (field, position), id, works
    for position, paper in enumerate(getattr(entry, "later_papers", ())):
        if paper.entry is not None:
            yield ("later_papers", position, "entry"), paper.entry, works
    for position, reported in enumerate(getattr(entry, "reported", ())):
        if reported.criterion is not None:
            yield ("reported", position, "criterion"), reported.criterion, ("criterion",)


def _check_entry(
    kind: str,
    stem: str,
    reading: _Reading,
    vocabularies: dict[str, set[str]],
    owners: dict[str, str],
    models: set[str],
) -> Iterator[Problem]:
    """``stem`` is the name of its file without the suffix; ``owners`` gives the family of each subfamily."""
    entry, file = reading.entries[kind][stem], reading.files[kind][stem]
    lines = reading.documents[file].lines

    def say(*location: str | int, text: str) -> Problem:
        return Problem(file, _line_of(location, lines), f"{_dotted(location)}: {text}")

    folder = Path(file).parent.name
    if entry.id != stem:
        yield say("id", text=f"{entry.id} is not the file name {stem}")
    if PLACES[kind].function is not None and entry.snippet not in (None, expected := snippet_name(stem, folder)):
        yield say("snippet", text=f"must be {expected}")
    for name, terms in vocabularies.items():
        for location, word in _words(entry, name):
            if word not in terms:
                yield say(*location, text=f"{word} is not in the {name} of taxonomy.yml{_did_you_mean(word, terms)}")
    lists: dict[Location, Iterable] = {(name,): getattr(entry, name, ()) for name in _SETS}
    if isinstance(entry, Method):
        lists |= {("motivation", "terms"): entry.motivation.terms}
        if entry.family != folder:
            yield say("family", text=f"{entry.family} is not the folder {folder}")
        owner = owners.get(entry.subfamily)
        if owner not in (None, entry.family):
            yield say("subfamily", text=f"{entry.subfamily} belongs to the family {owner}")
        if entry.model not in models:
            yield say("model", text=f"{entry.model} has no card in catalog/models{_did_you_mean(entry.model, models)}")
    for location, words in lists.items():
        seen = set()
        for position, word in enumerate(words):
            if word in seen:
                yield say(*location, position, text="is listed twice")
            seen.add(word)
    for location, id, kinds in _references(kind, entry):
        if id == stem and kind in kinds:
            yield say(*location, text="an entry is not related to itself")
        elif not any(id in reading.files[name] for name in kinds):
            yield say(*location, text=f"there is no entry {id}{_hint(reading, id, kinds)}")


def _hint(reading: _Reading, id: str, kinds: tuple[str, ...]) -> str:
    """What ``id`` is called now, or the nearest ids; looked for once and not for hundreds, which takes long."""
    key = id, kinds
    if key not in reading.hints:
        hint = ""
        if len(reading.hints) < MAX_HINTS:
            now = _renamed(id, (one for name in kinds for one in reading.entries[name].values()))
            known = (one for name in kinds for one in reading.files[name])
            hint = f"; it is now called {now}" if now else _did_you_mean(id, known)
        reading.hints[key] = hint
    return reading.hints[key]


def _check_former_ids(reading: _Reading) -> list[Problem]:
    """A former id leads to one entry: it is the id of none, and the former id of no other."""
    problems: list[Problem] = []
    kinds = [kind for kind, place in PLACES.items() if place.function]  # they share their ids
    present = {stem: file for kind in kinds for stem, file in reading.files[kind].items()}
    former: dict[str, str] = {}
    for kind in kinds:
        for stem, entry in reading.entries[kind].items():
            file = present[stem]
            for position, id in enumerate(entry.formerly):
                location = ("formerly", position)
                line = _line_of(location, reading.documents[file].lines)
                if id in present:
                    problems.append(Problem(file, line, f"{_dotted(location)}: {id} is the id of {present[id]}"))
                elif former.setdefault(id, file) != file:
                    problems.append(Problem(file, line, f"{_dotted(location)}: {id} is listed by {former[id]} too"))
    return problems


def snippet_name(id: str, family: str) -> str:
    """Path of the snippet from the repository root; the family of a criterion is "evaluation"."""
    return f"snippets/{family}/{id.replace('-', '_')}.py"


def _vocabularies(taxonomy: Taxonomy | None) -> dict[str, set[str]]:
    if taxonomy is None:
        return {}
    return {name: {term.id for term in getattr(taxonomy, name)} for name in Taxonomy.model_fields}


_FIELD_OF = {"families": "family", "subfamilies": "subfamily", "outputs": "output", "categories": "category"}


def _words(entry: Any, vocabulary: str) -> list[tuple[Location, str]]:
    """Each use of the vocabulary by the entry, with its place."""
    if vocabulary == "motivations":
        words = entry.motivation.terms if isinstance(entry, Method) else ()
        return [(("motivation", "terms", i), word) for i, word in enumerate(words)]
    field = _FIELD_OF.get(vocabulary, vocabulary)
    value = getattr(entry, field, ())
    return [((field,), value)] if isinstance(value, str) else [((field, i), word) for i, word in enumerate(value)]


def _check_taxonomy(taxonomy: Taxonomy, document: Document) -> list[Problem]:
    problems: list[Problem] = []
    families = {term.id for term in taxonomy.families}
    for name in Taxonomy.model_fields:
        ids: set[str] = set()
        orders: set[tuple[str, int]] = set()
        for position, term in enumerate(getattr(taxonomy, name)):
            family = getattr(term, "family", "")

            def say(field: str, text: str, where: Location = (name, position)) -> None:
                location = (*where, field)
                line = _line_of(location, document.lines)
                problems.append(Problem(TAXONOMY, line, f"{_dotted(location)}: {text}"))

            if term.id in ids:
                say("id", f"{term.id} is used twice in {name}")
            if (family, term.order) in orders:
                say("order", f"{term.order} is used twice in {family or name}")
            if family and family not in families:
                say("family", f"{family} is not in the families{_did_you_mean(family, families)}")
            ids.add(term.id)
            orders.add((family, term.order))
    return problems


def read_taxonomy(root: Path = ATLAS / "catalog") -> Taxonomy:
    """The vocabularies alone. Raises ``CatalogError``."""
    problems: list[Problem] = []
    path = root / "taxonomy.yml"
    document, faulted = _read(path, _relative(path, root), problems)
    taxonomy = _validate("taxonomy", document, TAXONOMY, faulted, problems) if document else None
    if problems or taxonomy is None:
        raise CatalogError(problems)
    return taxonomy


class Phrases(NamedTuple):
    """What pages and their scripts say beside the catalogue, English -> translation.

    In English ``{}`` stands for a number or an inline element such as a link, ``{text}`` for any text.
    """

    pages: dict[str, str]
    scripts: dict[str, str]


def _read_phrases(language: str, root: Path, problems: list[Problem]) -> Phrases:
    path = root / "languages" / f"{language}.yml"
    file = _relative(path, root)
    document, faulted = _read(path, file, problems)
    if document is None:
        return Phrases({}, {})

    def say(location: Location, text: str) -> None:
        if location not in faulted:
            problems.append(Problem(file, _line_of(location, document.lines), f"{_dotted(location)[:80]}: {text}"))

    for name in document.data.keys() - set(Phrases._fields):
        say((name,), f"is not a part of the file; they are {' and '.join(Phrases._fields)}")
    parts: list[dict[str, str]] = []
    for name in Phrases._fields:
        phrases = document.data.get(name)
        if not isinstance(phrases, dict):
            say((name,), "must be a mapping (English: translation)")
            phrases = {}
        for english, translation in phrases.items():
            fault = _phrase_fault(english, translation)
            if fault:
                say((name, english), fault)
        parts.append(phrases)
    return Phrases(*parts)


def _phrase_fault(english: str, translation: Any) -> str:
    if not isinstance(translation, str) or not translation.strip():
        return "must be text, not blank"
    if " ".join(english.split()) != english:
        return "holds a line break, or blanks at its ends or side by side"
    for text, known in ((english, ("{}", "{text}")), (translation, ("{}", *(f"{{{n}}}" for n in range(1, 10))))):
        odd = [part for part in re.findall(r"\{[^{}]*\}|[{}]", text) if part not in known]
        if odd:
            return f"{odd[0]} is no placeholder; those of {'English' if text is english else 'a translation'} are " + (
                "{} and {text}" if text is english else "{} in order, or {1}, {2} and so on"
            )
    count = len(re.findall(r"\{(?:text)?\}", english))
    used = sorted(PLACEHOLDER.findall(translation))
    if used != [""] * count and used != [str(n + 1) for n in range(count)]:
        return f"has {count} placeholders; its translation must use each once, as {{}} in order or as {{1}}, {{2}}"
    return ""


def _check_languages(root: Path) -> list[Problem]:
    problems: list[Problem] = []
    for path in _entry_files(root / "languages", problems, root):
        if path.parent.name == "languages" and path.stem in LANGUAGES:
            _read_phrases(path.stem, root, problems)
        else:
            problems.append(Problem(_relative(path, root), 1, f"is not a language; they are {', '.join(LANGUAGES)}"))
    return problems


def read_phrases(language: str, root: Path = ATLAS / "catalog") -> Phrases:
    """The translations of catalog/languages/<language>.yml. Raises ``CatalogError``."""
    problems: list[Problem] = []
    phrases = _read_phrases(language, root, problems)
    if problems:
        raise CatalogError(problems)
    return phrases


@functools.cache
def load(root: Path = ATLAS / "catalog") -> Catalog:
    """The whole catalogue; read once per root (``load.cache_clear()`` forgets it).

    Raises ``CatalogError`` with every problem of every file. Whether the snippets exist is not its business but that of
    ``check``.
    """
    reading = _read_all(root)
    problems = reading.problems + _cross_check(reading)
    if problems:
        raise CatalogError(problems)
    assert reading.taxonomy is not None
    family = {term.id: term.order for term in reading.taxonomy.families}
    subfamily = {term.id: term.order for term in reading.taxonomy.subfamilies}
    category = {term.id: term.order for term in reading.taxonomy.categories}
    entries = {kind: dict(sorted(found.items())) for kind, found in reading.entries.items()}
    methods = sorted(
        entries["method"].values(), key=lambda m: (family[m.family], subfamily[m.subfamily], m.paper.year, m.id)
    )
    criteria = sorted(
        entries["criterion"].values(),
        key=lambda c: (category[c.category], c.paper.year if c.paper else math.inf, c.id),
    )
    return Catalog(
        reading.taxonomy,
        {m.id: m for m in methods},
        entries["model"],
        {c.id: c for c in criteria},
        entries["tool"],
        entries["leaderboard"],
        entries["perspective"],
    )


# --------------------------------------------------------------------------------------------------------- check


def check(root: Path = ATLAS / "catalog") -> list[str]:
    """Every problem of the catalogue and of the files that belong to it, one line each, sorted; empty when sound."""
    reading = _read_all(root)
    problems = set(reading.problems + _cross_check(reading))
    importable = importable_names()
    for kind, place in PLACES.items():
        if place.function is None:
            continue
        for stem, file in reading.files[kind].items():
            lines = reading.documents[file].lines if file in reading.documents else {}
            name = stem.replace("-", "_")
            if name in importable:
                problems.add(Problem(file, _line_of(("id",), lines), f"id: {stem} shadows the Python module {name}"))
            entry = reading.entries[kind].get(stem)
            if entry is not None and entry.snippet is not None:
                line = _line_of(("snippet",), lines)
                path = root.parent / entry.snippet
                problems |= set(_check_snippet(path, entry.snippet, place.function, file, line))
    problems |= set(_check_orphans(root, reading))
    problems |= set(_check_first_lines(root, reading))
    problems |= set(_todos(root, reading))
    problems |= set(_check_languages(root))
    return [str(problem) for problem in sorted(problems)]


@functools.cache
def importable_names() -> frozenset[str]:
    """Top-level modules that a snippet run as a script may import, directly or through others.

    These are the standard library and all that vitx depends on, without its extras. What else happens to be installed
    does not count, or the same catalogue would pass on one machine and fail on another.
    """
    found = set(sys.stdlib_module_names) | {"vitx"}
    needed: set[str] = set()
    queue = ["vitx"]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        queue += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]
    for module, distributions in metadata.packages_distributions().items():
        if any(re.sub(r"[-_.]+", "-", one).lower() in needed for one in distributions):
            found.add(module)
    return frozenset(found)


def _check_snippet(path: Path, name: str, function: str, file: str, line: int) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(file, line, f"snippet: {name} does not exist; write it, or say why_no_snippet")
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = getattr(error, "lineno", None) or 1
        yield Problem(name, where, f"is not Python: {getattr(error, 'msg', None) or error}")
        return
    if function and not any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body):
        yield Problem(name, 1, f"defines no top-level function {function}")


def _check_orphans(root: Path, reading: _Reading) -> Iterator[Problem]:
    """Snippets that no entry describes."""
    families = [term.id for term in reading.taxonomy.families] if reading.taxonomy else []
    for kind, folders in (("method", families), ("criterion", ["evaluation"]), ("perspective", ["perspectives"])):
        place, named = PLACES[kind], {entry.snippet for entry in reading.entries[kind].values()}
        for folder in folders:
            for path in sorted((root.parent / "snippets" / folder).glob("*.py")):
                stem = path.stem.replace("_", "-")
                if _relative(path, root) not in named and stem not in reading.files[kind]:
                    entry = f"{place.folder.replace('<family>', folder)}/{stem}.yml"
                    yield Problem(_relative(path, root), 1, f"has no entry {entry}")


def _check_first_lines(root: Path, reading: _Reading) -> Iterator[Problem]:
    """Files that people edit lead their editor to the schema; model cards are written by the training scripts."""
    expected = {
        file: schema_line(kind, depth=PLACES[kind].folder.count("/"))
        for kind, files in reading.files.items()
        for file in files.values()
        if kind != "model"
    }
    expected[TAXONOMY] = schema_line("taxonomy", depth=0)
    for file, line in expected.items():
        if file in reading.documents and reading.documents[file].text.partition("\n")[0].rstrip() != line:
            yield Problem(file, 1, f"the first line must be: {line}")


def schema_line(kind: str, depth: int) -> str:
    """The comment by which editors find the schema, for a file ``depth`` folders below catalog/."""
    return f"# yaml-language-server: $schema={'../' * depth}schema/{kind}.json"


def _todos(root: Path, reading: _Reading) -> Iterator[Problem]:
    above = f"{root.parent}/"
    for stem, file in (item for files in reading.files.values() for item in files.items()):
        family = file.rsplit("/", 2)[1]
        for name in (file, snippet_name(stem, family), test_name(stem, family)):
            if name in reading.documents:
                text = reading.documents[name].text
            elif os.path.isfile(above + name):  # noqa: PTH113 - a Path for each of 30,000 takes a second
                text = Path(above + name).read_text(encoding="utf-8", errors="replace")
            else:
                continue
            if TODO in text:
                for number, line in enumerate(text.splitlines(), 1):
                    if TODO in line:
                        yield Problem(name, number, "to do: " + line.split(TODO, 1)[1].strip(" \"'])"))


def test_name(id: str, family: str) -> str:
    """Path of the snippet's test from the repository root; the family of a criterion is "evaluation"."""
    return f"tests/{family}/test_{id.replace('-', '_')}.py"


# ----------------------------------------------------------------------------------------------------------- ask


def snippet_path(id: str, root: Path = ATLAS / "catalog") -> Path:
    """File of the snippet of entry ``id``, without reading the rest of the catalogue.

    Raises ``UnknownId`` with the nearest ids, ``NoSnippet`` with the reason that the entry gives, ``CatalogError``
    where the entry itself is faulty.
    """
    criteria = {path.stem: path for path in (root / "evaluation").glob("*.yml")}
    entries = criteria | {path.stem: path for path in (root / "methods").glob("*/*.yml")}
    if id not in entries:
        raise UnknownId(_unknown("method or criterion", id, entries, _renamed_file(id, entries, root)))
    path = root.parent / snippet_name(id, entries[id].parent.name)
    if path.is_file():
        return path
    problems: list[Problem] = []
    file = _relative(entries[id], root)
    document, faulted = _read(entries[id], file, problems)
    kind = "criterion" if id in criteria else "method"
    entry = _validate(kind, document, file, faulted, problems) if document else None
    if entry is None:
        raise CatalogError(problems)
    why = entry.why_no_snippet or f"{entry.snippet} does not exist."
    raise NoSnippet(f"{id} has no snippet: {why}")


def model_card(name: str, root: Path = ATLAS / "catalog") -> ModelCard:
    """The card of a model that ships, without reading the rest of the catalogue. Raises ``CatalogError``."""
    path, problems = root / "models" / f"{name}.yml", []
    file = _relative(path, root)
    document, faulted = _read(path, file, problems)
    card = _validate("model", document, file, faulted, problems) if document else None
    if card is None:
        raise CatalogError(problems)
    return card


def get(catalog: Catalog, id: str) -> Method:
    """The method ``id``. Raises ``UnknownId`` with the id that it has now, or with the nearest ids."""
    if id not in catalog.methods:
        raise UnknownId(_unknown("method", id, catalog.methods, _renamed(id, catalog.methods.values())))
    return catalog.methods[id]


def entry(catalog: Catalog, id: str) -> Method | Criterion:
    """The method or the criterion ``id``. Raises ``UnknownId`` with its present id, or with the nearest ids of both."""
    entries = {**catalog.methods, **catalog.criteria}
    if id not in entries:
        raise UnknownId(_unknown("method or criterion", id, entries, _renamed(id, entries.values())))
    return entries[id]


def runnable(catalog: Catalog) -> dict[str, Method | Criterion | Perspective]:
    """The entries that have a snippet, by id."""
    entries = {**catalog.methods, **catalog.criteria, **catalog.perspectives}
    return {id: one for id, one in entries.items() if one.snippet}


def named(catalog: Catalog, id: str) -> list[Any]:
    """Every entry with this id, of whatever kind: a tool may carry the id of the method that it holds.

    Raises ``UnknownId`` with its present id, or with the nearest ids of all kinds.
    """
    kinds: tuple[dict[str, Any], ...] = catalog[1:]  # all but the taxonomy
    found = [entries[id] for entries in kinds if id in entries]
    if not found:
        known = {id: one for entries in kinds for id, one in entries.items()}
        raise UnknownId(_unknown("entry", id, known, _renamed(id, known.values())))
    return found


def names_creatures(catalog: Catalog, method: Method) -> bool:
    """Whether the model of a method tells the creatures of the glyph world apart, so that one can be asked for.

    Models of other tasks find parts, or answer questions.
    """
    card, plain = catalog.models.get(method.model), catalog.models.get("glyph")
    return method.model.endswith("glyph") and (card is None or plain is None or card.classes == plain.classes)


def _renamed(id: str, entries: Iterable[Any]) -> str | None:
    """Present id of the entry that was called ``id``."""
    return next((entry.id for entry in entries if id in getattr(entry, "formerly", ())), None)


def _renamed_file(id: str, files: dict[str, Path], root: Path) -> str | None:
    """The same, from the files that mention it, so that nothing else need be read or be sound."""
    for stem, path in sorted(files.items()):
        if path.is_file() and id in path.read_text(encoding="utf-8", errors="replace"):
            document, _ = _read(path, _relative(path, root), [])
            former = document.data.get("formerly") if document else None
            if isinstance(former, list) and id in former:
                return stem
    return None


def _unknown(kind: str, id: str, known: Iterable[str], now: str | None) -> str:
    if now is not None:
        return f'"{id}" is now called "{now}"'
    return f'there is no {kind} "{id[:80]}"' + (_did_you_mean(id, known) or "; `vitx list` shows them all")


def find(
    catalog: Catalog,
    *,
    family: str | None = None,
    motivation: str | None = None,
    task: str | None = None,
    needs: str | None = None,
    year: str | None = None,
) -> list[Method]:
    """The methods that match every filter given, in catalogue order.

    Args:
        family, motivation, task, needs: a term of that vocabulary; ``needs`` keeps the methods that need it.
        year: "2021", or a range with both ends included, "2020-2022".

    Raises:
        ValueError: a term is not in its vocabulary (the nearest are named), or the year is written otherwise.
    """
    wanted = {"families": family, "motivations": motivation, "tasks": task, "needs": needs}
    for name, term in wanted.items():
        terms = [known.id for known in getattr(catalog.taxonomy, name)]
        if term is not None and term not in terms:
            hint = _did_you_mean(term, terms) or f"; they are {', '.join(terms)}"
            raise ValueError(f'"{term}" is not one of the {name}{hint}')
    first, last = _years(year)
    return [
        method
        for method in catalog.methods.values()
        if first <= method.paper.year <= last
        and all(term is None or term in {word for _, word in _words(method, name)} for name, term in wanted.items())
    ]


def _years(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 9999
    match = re.fullmatch(r"([0-9]{4})(?:-([0-9]{4}))?", text.strip())
    if not match:
        raise ValueError(f'the year must be written as 2021 or as 2020-2022, not "{text}"')
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ValueError(f"the years {text} run backwards")
    return first, last
