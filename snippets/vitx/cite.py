"""How to cite what was used: BibTeX, CSL-JSON and APA text from catalogue entries. Pure functions.

BibTeX is plain ASCII wherever LaTeX has an accent or a dash for the character and UTF-8 elsewhere, which bibtex and
biber both read. Keys are the ids of the entries, so a citation stays valid when the catalogue grows.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal, NamedTuple

from vitx.schema import Criterion, Method, Paper

Entry = Method | Criterion

_CONFERENCES = {
    "AAAI": "AAAI Conference on Artificial Intelligence",
    "ACCV": "Asian Conference on Computer Vision",
    "ACL": "Annual Meeting of the Association for Computational Linguistics",
    "AISTATS": "International Conference on Artificial Intelligence and Statistics",
    "BMVC": "British Machine Vision Conference",
    "CIKM": "ACM International Conference on Information and Knowledge Management",
    "CPAL": "Conference on Parsimony and Learning",
    "CVPR": "Conference on Computer Vision and Pattern Recognition",
    "ECCV": "European Conference on Computer Vision",
    "ICCV": "International Conference on Computer Vision",
    "ICIP": "International Conference on Image Processing",
    "ICLR": "International Conference on Learning Representations",
    "ICME": "International Conference on Multimedia and Expo",
    "ICML": "International Conference on Machine Learning",
    "ICPR": "International Conference on Pattern Recognition",
    "IJCAI": "International Joint Conference on Artificial Intelligence",
    "IJCNN": "International Joint Conference on Neural Networks",
    "KDD": "ACM SIGKDD Conference on Knowledge Discovery and Data Mining",
    "NeurIPS": "Advances in Neural Information Processing Systems",
    "PRCV": "Chinese Conference on Pattern Recognition and Computer Vision",
    "WACV": "Winter Conference on Applications of Computer Vision",
}
_MEETING = re.compile(r"conference|workshop|symposium|proceedings|meeting", re.IGNORECASE)


def _paper(entry: Entry) -> Paper:
    """The paper behind an entry. Raises ``ValueError`` where there is none."""
    if entry.paper is None:
        raise ValueError(f"{entry.id} has no paper of its own; cite this atlas, see CITATION.cff")
    return entry.paper


class _Publication(NamedTuple):
    kind: Literal["conference", "journal", "preprint"]
    container: str  # proceedings or journal; the archive of a preprint; "" when unknown
    year: int


def _publication(paper: Paper) -> _Publication:
    """Where and when the paper appeared, as far as the free text of ``venue`` tells."""
    parts = [part.strip() for part in (paper.venue or "").split(" / ")]
    venue = next((part for part in parts if part and not part.startswith("arXiv")), "")
    match = re.fullmatch(r"(.*?)[ ,]*\b((?:19|20)[0-9]{2})\b *(.*)", venue)
    name, year, rest = (match[1], int(match[2]), match[3]) if match else (venue, paper.year, "")
    if not venue or name == "bioRxiv":
        return _Publication("preprint", name or ("arXiv" if paper.arxiv else ""), year)
    acronym, _, inner = name.partition(" ")
    if acronym in _CONFERENCES and not inner:
        full = f"{_CONFERENCES[acronym]} ({acronym})"
        if not rest or rest.startswith("("):
            return _Publication("conference", full, year)
        return _Publication("conference", f"{full} {rest[0].upper()}{rest[1:]}", year)
    whole = f"{name} {rest}".strip()
    return _Publication("conference" if _MEETING.search(whole) else "journal", whole, year)


def paper_key(entry: Entry) -> str:
    """Equal for two entries that rest on the same paper. Raises ``ValueError`` for an entry without a paper."""
    paper = _paper(entry)
    return paper.arxiv or paper.doi or re.sub(r"\W+", " ", paper.title).casefold()


def _once(entries: Iterable[Entry]) -> list[tuple[Entry, list[str]]]:
    """Each paper once, under the entry that came first, with the ids of the other entries that share it."""
    found: dict[str, tuple[Entry, list[str]]] = {}
    for entry in entries:
        same = paper_key(entry)
        if same in found:
            first, others = found[same]
            if entry.id != first.id and entry.id not in others:
                others.append(entry.id)
        else:
            found[same] = (entry, [])
    return list(found.values())


def _split(name: str) -> tuple[str, str]:
    """ "Family, Given" -> (family, given); given is empty for an organisation or a single name."""
    family, _, given = name.partition(",")
    return family.strip(), given.strip()


def address(paper: Paper) -> str | None:
    """The best address of the paper."""
    if paper.doi:
        return f"https://doi.org/{paper.doi}"
    if paper.arxiv:
        return f"https://arxiv.org/abs/{paper.arxiv}"
    return paper.url


# -------------------------------------------------------------------------------------------------------- BibTeX


_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
    "\u0328": "k",
}
_CHARACTERS = {
    "\\": r"{\textbackslash}",
    "{": r"{\textbraceleft}",  # bibtex counts braces, escaped or not
    "}": r"{\textbraceright}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"{\textasciitilde}",
    "^": r"{\textasciicircum}",
    "ß": r"{\ss}",
    "å": r"{\aa}",
    "Å": r"{\AA}",
    "ø": r"{\o}",
    "Ø": r"{\O}",
    "ł": r"{\l}",
    "Ł": r"{\L}",
    "æ": r"{\ae}",
    "Æ": r"{\AE}",
    "œ": r"{\oe}",
    "Œ": r"{\OE}",
    "đ": r"{\dj}",
    "Đ": r"{\DJ}",
    "ı": r"{\i}",
    "–": "--",
    "—": "---",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "\u00a0": "~",
}
# Signs that LaTeX prints only inside a formula, as their commands.
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi - pi rho - sigma tau upsilon phi chi psi "
    "omega"
)  # - where LaTeX has no command
_FORMULAS = {chr(ord("α") + place): name for place, name in enumerate(_GREEK.split()) if name != "-"}
_FORMULAS |= {_letter.upper(): _FORMULAS[_letter].title() for _letter in "γδθλξπσφψω"}  # the others look Latin
_FORMULAS |= {"≠": "neq", "≤": "leq", "≥": "geq", "≈": "approx", "∈": "in", "∞": "infty", "→": "to", "∇": "nabla"}


def _latex(text: str) -> str:
    """Escape what LaTeX would take for a command; write accents as commands."""
    written = []
    for character in unicodedata.normalize("NFC", text):
        base, *accents = unicodedata.normalize("NFD", character)
        if character in _CHARACTERS:
            written.append(_CHARACTERS[character])
        elif character in _FORMULAS:
            written.append(f"{{$\\{_FORMULAS[character]}$}}")
        elif len(accents) == 1 and accents[0] in _ACCENTS and base.isascii():
            letter = {"i": r"\i", "j": r"\j"}.get(base, base)
            written.append(f"{{\\{_ACCENTS[accents[0]]}{{{letter}}}}}")
        else:
            written.append(character)
    return "".join(written)


def _bibtex_title(title: str) -> str:
    """Braces around the words whose capitals a bibliography style must not touch, such as ViT or Grad-CAM."""
    words = []
    for word in title.split():
        core = word.rstrip(":,;.?!")
        fixed = any(letter.isdigit() for letter in core) or any(
            letter.isupper() for part in core.split("-") for letter in part[1:]
        )
        words.append(f"{{{_latex(core)}}}{_latex(word[len(core) :])}" if fixed else _latex(word))
    return " ".join(words)


def _bibtex_author(name: str) -> str:
    family, given = _split(name)
    if not given:
        return name if name == "others" else f"{{{_latex(family)}}}"
    protected = f"{{{_latex(family)}}}" if re.search(r"\band\b", family) else _latex(family)
    return f"{protected}, {_latex(given)}"


def bibtex(entries: Iterable[Entry]) -> str:
    """BibTeX of the papers behind ``entries``, each once. Raises ``ValueError`` for an entry without a paper.

    A paper that several of them share appears under the id of the first; the field ``ids`` (an alias to biber, ignored
    by bibtex) holds the others.
    """
    return "\n".join(_bibtex_entry(entry, others) for entry, others in _once(entries))


def _bibtex_entry(entry: Entry, others: list[str]) -> str:
    paper = _paper(entry)
    where = _publication(paper)
    fields = {
        "title": _bibtex_title(paper.title),
        "author": " and ".join(_bibtex_author(name) for name in paper.authors),
        "booktitle": _latex(where.container) if where.kind == "conference" else None,
        "journal": _latex(where.container) if where.kind == "journal" else None,
        "howpublished": _latex(where.container) if where.kind == "preprint" and not paper.arxiv else None,
        "year": str(where.year),
        "doi": paper.doi,
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv" if paper.arxiv else None,
        "url": address(paper),
        "ids": ", ".join(others) or None,
    }
    kind = {"conference": "inproceedings", "journal": "article", "preprint": "misc"}[where.kind]
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{entry.id},", *lines, "}", ""])


# ------------------------------------------------------------------------------------------------------ CSL-JSON


def csl_json(entries: Iterable[Entry]) -> str:
    """CSL-JSON (an array of items, for Zotero, pandoc and the like) of the papers behind ``entries``, each once.

    Raises ``ValueError`` for an entry without a paper.
    """
    items = [_csl_item(entry) for entry, _others in _once(entries)]
    return json.dumps(items, indent=2, ensure_ascii=False) + "\n"


def _csl_item(entry: Entry) -> dict:
    paper = _paper(entry)
    where = _publication(paper)
    item = {
        "id": entry.id,
        "type": {"conference": "paper-conference", "journal": "article-journal", "preprint": "article"}[where.kind],
        "title": paper.title,
        "author": [_csl_name(name) for name in paper.authors if name != "others"],
        "issued": {"date-parts": [[where.year]]},
    }
    if where.container:
        item["publisher" if where.kind == "preprint" else "container-title"] = where.container
    if paper.arxiv:
        item["number"] = f"arXiv:{paper.arxiv}"
    if paper.doi:
        item["DOI"] = paper.doi
    if url := address(paper):
        item["URL"] = url
    if "others" in paper.authors:
        item["note"] = "The author list is incomplete."
    return item


def _csl_name(name: str) -> dict[str, str]:
    family, given = _split(name)
    return {"family": family, "given": given} if given else {"literal": family}


# ----------------------------------------------------------------------------------------------------------- APA


def apa(entry: Entry) -> str:
    """One reference in the manner of APA 7, as plain text. The title keeps its printed capitals.

    Raises ``ValueError`` for an entry without a paper.
    """
    paper = _paper(entry)
    where = _publication(paper)
    names = [_apa_name(name) for name in paper.authors if name != "others"]
    if "others" in paper.authors:
        authors = ", ".join(names) + ", et al."
    elif len(names) > 20:
        authors = ", ".join(names[:19]) + ", … " + names[-1]
    elif len(names) > 1:
        authors = ", ".join(names[:-1]) + ", & " + names[-1]
    else:
        authors = names[0]
    title = paper.title if paper.title.endswith(("?", "!")) else paper.title + "."
    container = ("In " if where.kind == "conference" else "") + where.container + "." if where.container else ""
    stop = "" if authors.endswith(".") else "."
    return " ".join(part for part in (f"{authors}{stop} ({where.year}).", title, container, address(paper)) if part)


def _apa_name(name: str) -> str:
    family, given = _split(name)
    initials = [
        "-".join(f"{piece[0]}." for piece in word.split("-") if piece) for word in given.replace(".", ". ").split()
    ]
    return f"{family}, {' '.join(initials)}" if initials else family
