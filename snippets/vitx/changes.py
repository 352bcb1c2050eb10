"""What changed in vocabularies and entries between two versions of the catalogue, for release notes.

``compare`` and ``markdown`` are pure. Files are taken as they are written and not by the schema of today, which an
older version need not meet.
"""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vitx import ATLAS
from vitx.catalog import MAX_BYTES, PLACES, _Refused, parse

_KINDS = {place.folder.split("/")[1]: kind for kind, place in PLACES.items()}  # by folder
_PLURALS = {"criterion": "criteria"}
# What an entry is classified by: where it is written.
_AXES = {
    axis: (axis,) for axis in ("family", "subfamily", "tasks", "needs", "class_specific", "output", "category")
} | {
    "motivation": ("motivation", "terms"),
    "better": ("better",),
}


class Version(NamedTuple):
    """The catalogue at one time, as it is written."""

    terms: dict[str, dict[str, Mapping[str, Any]]]  # vocabulary -> id -> term
    entries: dict[str, dict[str, Mapping[str, Any]]]  # kind -> id -> entry


class Changes(NamedTuple):
    """What differs; every item is a mapping with an id and what is to be said of it. Empty lists are left out."""

    terms: dict[str, dict[str, list[dict[str, Any]]]]  # vocabulary -> added, removed, renamed, redefined, moved
    # kind -> added, removed, renamed, reclassified, with a snippet now, without one now
    entries: dict[str, dict[str, list[dict[str, Any]]]]


# -------------------------------------------------------------------------------------------------------- reading


def read(where: str, root: Path = ATLAS) -> Version:
    """The catalogue in a folder, or at a git revision of the repository ``root``.

    Raises ``ValueError`` where there is neither, or a file cannot be read.
    """
    for folder in (Path(where), Path(where) / "catalog"):
        if (folder / "taxonomy.yml").is_file():
            paths = sorted(path for path in folder.rglob("*.yml") if path.is_file())
            return version({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    try:
        commit = (
            _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{where}^{{commit}}").decode().strip()
        )
        archive = _git(root, "archive", "--format=tar", commit, "catalog")
    except (subprocess.CalledProcessError, OSError):
        raise ValueError(f"{where} is neither a folder with taxonomy.yml nor a revision that holds catalog/") from None
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".yml") and (opened := tar.extractfile(member)):
                files[member.name.removeprefix("catalog/")] = opened.read()
    return version(files)


def _git(root: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout


def version(files: Mapping[str, bytes]) -> Version:
    """The catalogue in files by their path below catalog/. Raises ``ValueError`` that names the file."""
    terms: dict[str, dict[str, Mapping[str, Any]]] = {}
    entries: dict[str, dict[str, Mapping[str, Any]]] = {kind: {} for kind in PLACES}
    for file, content in files.items():
        folder, _, rest = file.partition("/")
        if file != "taxonomy.yml" and folder not in _KINDS:
            continue
        try:
            if len(content) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES:,} bytes")
            data = parse(content.decode("utf-8"))[0].data
        except _Refused as refused:
            line, said = refused.args
            raise ValueError(f"{file}:{line}: {said}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if rest:
            entries[_KINDS[folder]][Path(rest).stem] = data
        else:
            terms = {
                name: {str(term["id"]): term for term in listed if isinstance(term, dict) and "id" in term}
                for name, listed in data.items()
                if isinstance(listed, list)
            }
    return Version(terms, entries)


# ------------------------------------------------------------------------------------------------------ comparing


def compare(old: Version, new: Version) -> Changes:
    """What differs. The order in which an entry lists its terms does not count."""
    terms, entries = {}, {}
    for name in dict.fromkeys([*new.terms, *old.terms]):
        terms[name] = _compare_terms(old.terms.get(name, {}), new.terms.get(name, {}))
    for kind in PLACES:
        entries[kind] = _compare_entries(old.entries[kind], new.entries[kind])
    return Changes(_filled(terms), _filled(entries))


def _filled(found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    kept = {name: {what: items for what, items in lists.items() if items} for name, lists in found.items()}
    return {name: lists for name, lists in kept.items() if lists}


def _compare_terms(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    both = [(id, old[id], new[id]) for id in new if id in old]

    def differ(before: Mapping[str, Any], after: Mapping[str, Any], field: str) -> bool:
        return field in before and _text(before[field]) != _text(after.get(field))

    return {
        "added": [_term(id, term) for id, term in new.items() if id not in old],
        "removed": [_term(id, term) for id, term in old.items() if id not in new],
        "renamed": [
            {"id": id, "from": _text(before[field]), "to": _text(after.get(field))}
            for id, before, after in both
            for field in ("label", "label_zh")
            if differ(before, after, field)
        ],
        "redefined": [
            _term(id, after)
            for id, before, after in both
            if differ(before, after, "definition") or differ(before, after, "definition_zh")
        ],
        "moved": [
            _term(id, after) | {"from": _text(before["family"]), "to": _text(after.get("family"))}
            for id, before, after in both
            if differ(before, after, "family")
        ],
    }


def _term(id: str, term: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": id, "label": _text(term.get("label"))} | (
        {"family": _text(term["family"])} if "family" in term else {}
    )


def _compare_entries(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    former = {id: next((one for one in _items(entry.get("formerly")) if one in old), id) for id, entry in new.items()}
    both = [(id, old[former[id]], entry) for id, entry in new.items() if former[id] in old]
    kept = set(former.values())

    def about(id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        place = "/".join(_text(entry[axis]) for axis in ("family", "subfamily", "category") if axis in entry)
        return {"id": id, "name": _text(entry.get("name"))} | ({"place": place} if place else {})

    def snippets(had: bool) -> list[dict[str, Any]]:
        return [
            about(id, after)
            for id, before, after in both
            if (before.get("snippet") is not None) is had and (after.get("snippet") is not None) is not had
        ]

    return {
        "added": [
            about(id, entry) | ({"snippet": entry.get("snippet") is not None} if "in_survey" in entry else {})
            for id, entry in new.items()
            if former[id] not in old
        ],
        "removed": [about(id, entry) for id, entry in old.items() if id not in kept],
        "renamed": [about(id, new[id]) | {"from": before} for id, before in former.items() if before != id],
        "reclassified": [
            about(id, after) | {"axes": axes} for id, before, after in both if (axes := _reclassified(before, after))
        ],
        "with_snippet": snippets(had=False),
        "without_snippet": snippets(had=True),
    }


def _reclassified(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """The axes on which an entry moved, with what came and what went; an axis that only one version knows is none."""
    found = {}
    for axis, path in _AXES.items():
        was, now = _at(before, path), _at(after, path)
        if was is None or now is None:
            continue
        came, went = [term for term in now if term not in was], [term for term in was if term not in now]
        if came or went:
            found[axis] = {"added": came, "removed": went}
    return found


def _at(entry: Any, path: tuple[str, ...]) -> list[str] | None:
    for key in path:
        if not isinstance(entry, dict) or key not in entry:
            return None
        entry = entry[key]
    return _items(entry) if isinstance(entry, list) else [_text(entry)]


def _items(value: Any) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) else []


def _text(value: Any) -> str:
    """On one line, in words for null and truth values."""
    words = {None: "unknown", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else " ".join(str(value).split())


# -------------------------------------------------------------------------------------------------------- writing


def as_json(changes: Changes) -> str:
    """The changes as a JSON object with the fields ``terms`` and ``entries``."""
    return json.dumps(changes._asdict(), indent=2, ensure_ascii=False) + "\n"


_HEADS = {
    "added": "New",
    "removed": "Gone",
    "renamed": "Renamed",
    "redefined": "Defined anew",
    "moved": "In another family",
    "reclassified": "Classified anew",
    "with_snippet": "With a snippet now",
    "without_snippet": "Without a snippet now",
}


def markdown(changes: Changes, old: str, new: str) -> str:
    """The changes as Markdown; the texts of the catalogue are escaped."""
    lines = [f"# Changes of the catalogue from {_plain(old)} to {_plain(new)}", ""]
    for kind, lists in changes.entries.items():
        lines += _section(_PLURALS.get(kind, f"{kind}s").capitalize(), lists)
    for name, lists in changes.terms.items():
        lines += _section(f"Vocabulary: {name}", lists)
    if len(lines) == 2:
        lines += ["Nothing changed.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(title: str, lists: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = [f"## {_plain(title)}", ""]
    for what, items in lists.items():
        lines += [f"### {_HEADS[what]} ({len(items)})", "", *(f"- {_sentence(item)}" for item in items), ""]
    return lines


def _sentence(item: Mapping[str, Any]) -> str:
    id = "`" + item["id"].replace("`", "") + "`"
    said = f"{_plain(item['name'])} ({id})" if "name" in item else id
    if "label" in item:
        said += f": {_plain(item['label'])}"
    if "axes" in item:
        axes = []
        for axis, moved in item["axes"].items():
            came = [f"+ {_plain(term)}" for term in moved["added"]]
            went = [f"− {_plain(term)}" for term in moved["removed"]]
            axes.append(f"{axis.replace('_', ' ')} {', '.join([*came, *went])}")
        return f"{said}: {'; '.join(axes)}"
    if "from" in item:
        return f"{said}: from {_plain(item['from'])}" + (f" to {_plain(item['to'])}" if "to" in item else "")
    place = item.get("place") or item.get("family")
    said += f", {_plain(place)}" if place else ""
    return said + ("" if item.get("snippet", True) else ", without a snippet yet")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", text)
