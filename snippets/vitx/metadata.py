"""What is known of a publication by its arXiv identifier, its DOI or its BibTeX.

Pure parsers, and one function, ``fetch``, that asks a host. All that they read is untrusted text: sizes are limited,
characters that no reader would see are removed, and a field of an unexpected form counts as unknown.
"""

import html
import http.client
import json
import re
import socket
import time
import unicodedata
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from pydantic import TypeAdapter, ValidationError

from vitx import cite
from vitx.catalog import _ODD_CHARACTER
from vitx.schema import Arxiv, Doi, Url

SECONDS = 15  # that an answer may take
MAX_ANSWER = 2_000_000  # bytes
MAX_FILE = 20_000  # bytes of BibTeX
MAX_TEXT = 500  # characters of a title, a name, a venue
MAX_AUTHORS = 200
USER_AGENT = f"vitx/{version('vitx')} (an atlas of explainability methods; looks up one paper at a time)"


class Work(NamedTuple):
    """A publication as far as it is known; all texts are clean, on one line, and of limited length."""

    title: str | None = None
    authors: tuple[str, ...] = ()  # "Family, Given", in printed order
    year: int | None = None
    venue: str | None = None
    arxiv: str | None = None  # without a version
    doi: str | None = None  # without https://doi.org/
    url: str | None = None
    source: str | None = None  # where this was seen
    unsure: tuple[str, ...] = ()  # fields at which a person must look


class NoAnswer(Exception):
    """A host could not be reached or said nothing that can be used; the message is one sentence without a full stop."""


class UnknownWork(ValueError):
    """The host was reached and does not know the work."""


# --------------------------------------------------------------------------------------------------- identifiers


def arxiv_id(text: str) -> str:
    """The identifier in "2005.00928v2", "arXiv:2005.00928", an address at arxiv.org or arXiv's own DOI.

    Raises ``ValueError`` where there is none.
    """
    found = re.split("[?#]", unquote(text.strip()))[0]
    found = re.sub(r"^(https?://)?(dx\.)?doi\.org/", "", found, flags=re.IGNORECASE)
    found = re.sub(r"^(doi: *)?10\.48550/arxiv\.", "", found, flags=re.IGNORECASE)
    found = re.sub(r"^(https?://)?([a-z]+\.)?arxiv\.org/[a-z-]+/", "", found, flags=re.IGNORECASE)
    found = re.sub(r"^arxiv: *", "", found, flags=re.IGNORECASE)
    found = re.sub(r"(v[0-9]{1,3})?(\.pdf)?/?$", "", found)
    if not _fits(Arxiv, found):
        raise ValueError(f'"{" ".join(text.split())[:80]}" is not an arXiv identifier, such as 2005.00928')
    return found


def doi_name(text: str) -> str:
    """The DOI in "10.1000/182", "doi:10.1000/182" or an address at doi.org.

    Raises ``ValueError`` where there is none.
    """
    found = text.strip()
    if match := re.match(r"(https?://)?(dx\.|www\.)?doi\.org/", found, re.IGNORECASE):
        found = unquote(found[match.end() :])
    found = re.sub(r"^doi: *", "", found, flags=re.IGNORECASE).rstrip(".,;")
    if len(found) > 200 or not _fits(Doi, found):
        raise ValueError(f'"{" ".join(text.split())[:80]}" is not a DOI, such as 10.18653/v1/2020.acl-main.385')
    return found


def identify(text: str) -> Work:
    """The work that an arXiv identifier, a DOI or an address names; arXiv's own DOIs count as identifiers.

    Raises ``ValueError`` for other texts.
    """
    if arxiv := _or_none(arxiv_id, text):
        return Work(arxiv=arxiv)
    if doi := _or_none(doi_name, text):
        return Work(doi=doi)
    name = " ".join(text.split())[:80]
    raise ValueError(f'"{name}" is neither an arXiv identifier, such as 2005.00928, nor a DOI, such as 10.1000/182')


def _is_arxiv_doi(doi: str) -> bool:
    return doi.lower().startswith("10.48550/arxiv.")


def _fits(kind: Any, text: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return False
    return clean(text) == text


# ----------------------------------------------------------------------------------------------------- the network


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise NoAnswer(f"{req.host} leads to an address that is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, accept: str) -> bytes:
    """What a host answers, over https.

    Raises:
        UnknownWork: the host says that there is no such thing.
        NoAnswer: no network, no answer in time, an error of the host, or an answer of more than ``MAX_ANSWER`` bytes.
    """
    host = urlsplit(url).hostname
    if urlsplit(url).scheme != "https":
        raise ValueError(f"{url[:80]} is not an https address")
    request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": USER_AGENT})
    last = time.monotonic() + SECONDS
    try:
        with urllib.request.build_opener(_OnlyHttps).open(request, timeout=SECONDS) as response:
            content = b""
            while chunk := response.read1(65536):
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise NoAnswer(f"{host} answers with more than {MAX_ANSWER:,} bytes")
                if time.monotonic() > last:
                    raise NoAnswer(f"{host} takes more than {SECONDS} seconds to answer")
            return content
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise UnknownWork(f"{host} knows no {unquote(urlsplit(url).path.lstrip('/'))[:200]}") from None
        raise NoAnswer(f"{host} answers with error {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # of the network, of the answer's form
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise NoAnswer(f"{host} takes more than {SECONDS} seconds to answer") from None
        if isinstance(reason, socket.gaierror):
            raise NoAnswer(f"there is no network, or it does not reach {host}") from None
        raise NoAnswer(f"{host} cannot be reached ({' '.join(str(reason).split())[:100]})") from None


def complete(work: Work) -> Work:
    """The work with what arXiv or doi.org knows of it. Raises ``UnknownWork`` and ``NoAnswer``."""
    return by_arxiv(work.arxiv) if work.arxiv else by_doi(str(work.doi))


def by_arxiv(id: str) -> Work:
    """Ask arXiv for a work. Raises ``UnknownWork`` and ``NoAnswer``."""
    return from_atom(
        fetch(f"https://export.arxiv.org/api/query?id_list={quote(id, safe='/')}", "application/atom+xml"), id
    )


def by_doi(doi: str) -> Work:
    """Ask the agency that registered a DOI for its work. Raises ``UnknownWork`` and ``NoAnswer``."""
    return from_csl(fetch(f"https://doi.org/{quote(doi, safe='/')}", "application/vnd.citationstyles.csl+json"), doi)


# --------------------------------------------------------------------------------------------------------- parsers


def clean(text: object, most: int = MAX_TEXT) -> str | None:
    """A text on one line without characters that no reader would see; None if nothing is left, or too much."""
    if not isinstance(text, str) or len(text) > 10 * most:
        return None
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in text)
    shown = " ".join(_ODD_CHARACTER.sub(" ", unicodedata.normalize("NFC", shown)).split())
    return shown if 0 < len(shown) <= most else None


def _names(names: list[str | None]) -> tuple[str, ...]:
    """The names that are known, in the form of the catalogue: "others" last where some are missing or too many."""
    known = [name for name in names if name and name != "others"]
    complete = len(known) == len(names) and len(known) <= MAX_AUTHORS
    return tuple(known if complete or not known else [*known[:MAX_AUTHORS], "others"])


def _year(value: object) -> int | None:
    match = re.match(r"\s*((?:19|20)[0-9]{2})\b", str(value))
    return int(match[1]) if match and int(match[1]) >= 1950 else None


def _url(value: object) -> str | None:
    return value if isinstance(value, str) and len(value) <= MAX_TEXT and _fits(Url, value) else None


def _or_none(normalise: Any, value: object) -> str | None:
    try:
        return normalise(value) if isinstance(value, str) and len(value) <= MAX_TEXT else None
    except ValueError:
        return None


def _venue(container: str | None, year: int | None) -> str | None:
    """ "ICCV 2021" where the name of the conference is known, else the name and the year."""
    if container is None or re.match(r"arxiv|corr\b", container, re.IGNORECASE):
        return None
    name = re.sub(r"^Proceedings of (the )?", "", container, flags=re.IGNORECASE)
    bare = re.sub(r" \([A-Z][A-Za-z]*( (19|20)[0-9]{2})?\)$| [0-9]+$", "", name).rstrip(" ,")
    for acronym, full in cite._CONFERENCES.items():
        if re.search(rf"(^|\W){re.escape(full)}$", bare, re.IGNORECASE) or name == acronym:
            name = acronym
    return name if year is None or str(year) in name else f"{name} {year}"


# Words that begin a family name; as a rule of thumb, since arXiv gives a name in one piece.
_PARTICLES = frozenset(
    ("van", "von", "de", "der", "den", "del", "della", "di", "da", "dos", "du", "la", "le", "ten", "ter", "el", "al")
)
_SUFFIXES = {"jr", "sr", "ii", "iii", "iv"}


def family_first(name: str) -> str:
    """ "Luc Van Gool" -> "Van Gool, Luc"; a name of one word stays. For more than two words, a rule of thumb."""
    words = name.split()
    if len(words) < 2:
        return name
    first = len(words) - 1 - (len(words) > 2 and words[-1].lower().rstrip(".") in _SUFFIXES)
    while first > 1 and words[first - 1].lower() in _PARTICLES:
        first -= 1
    return f"{' '.join(words[first:]).replace(',', '')}, {' '.join(words[:first]).rstrip(',')}"


_ATOM = {"a": "http://www.w3.org/2005/Atom", "arxiv": "http://arxiv.org/schemas/atom"}


def from_atom(answer: bytes, id: str) -> Work:
    """The work in an answer of arXiv's API. Raises ``UnknownWork``, and ``NoAnswer`` for what is no such answer."""
    try:
        text = answer.decode("utf-8")
        if re.search(r"<!(doctype|entity)", text, re.IGNORECASE):
            raise ValueError("declares a document type")
        feed = ElementTree.fromstring(text)
    except (ValueError, ElementTree.ParseError, RecursionError):
        raise NoAnswer("arXiv's answer cannot be read") from None
    if feed.tag != f"{{{_ATOM['a']}}}feed":
        raise NoAnswer("arXiv's answer cannot be read")
    for entry in feed.findall("a:entry", _ATOM):

        def said(path: str, entry: ElementTree.Element = entry) -> str | None:
            return clean(entry.findtext(path, None, _ATOM))

        if _or_none(arxiv_id, said("a:id")) != id:
            continue  # an error of the API is an entry, too
        names = [clean(name.text) for name in entry.findall("a:author/a:name", _ATOM)]
        guessed = any(name is not None and len(name.split()) > 2 for name in names)
        year = _year(said("a:published"))
        doi = _or_none(doi_name, said("arxiv:doi"))
        journal = said("arxiv:journal_ref")
        return Work(
            title=said("a:title"),
            authors=_names([name and family_first(name) for name in names]),
            year=year,
            venue=journal or (f"arXiv {year}" if year else None),
            arxiv=id,
            doi=None if doi is None or _is_arxiv_doi(doi) else doi,
            source=f"https://arxiv.org/abs/{id}",
            unsure=("authors", "venue") if guessed else ("venue",),  # authors tell arXiv the venue late or never
        )
    raise UnknownWork(f"arXiv knows no {id}")


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(value: object) -> object:
    """CSL has texts where some agencies send lists of one text."""
    return value[0] if isinstance(value, list) and value else value


def _without_tags(text: object) -> str | None:
    """Titles of registration agencies hold a little HTML."""
    if not isinstance(text, str) or len(text) > 10 * MAX_TEXT:
        return None
    return clean(html.unescape(re.sub(r"</?(i|b|em|strong|sub|sup|sc|scp|span|italic|bold)>", "", text, flags=re.I)))


def from_csl(answer: bytes, doi: str) -> Work:
    """The work in an answer of doi.org as CSL-JSON. Raises ``NoAnswer`` for what is no such answer."""
    try:
        item = json.loads(answer.decode("utf-8"))
    except (ValueError, RecursionError):
        raise NoAnswer("the answer of doi.org cannot be read") from None
    if not isinstance(item, dict) or not {"title", "author"} & item.keys():
        raise NoAnswer("the answer of doi.org cannot be read")
    names = []
    people = item.get("author")
    for person in map(_mapping, people if isinstance(people, list) else ()):
        family = " ".join(filter(None, (clean(person.get(k)) for k in ("non-dropping-particle", "family"))))
        given = " ".join(filter(None, (clean(person.get(k)) for k in ("given", "dropping-particle", "suffix"))))
        whole = clean(person.get("literal")) or clean(person.get("name"))
        family = family.replace(",", "")
        names.append(f"{family}, {given}" if family and given else family or given or whole)
    parts = _first(_first(_mapping(item.get("issued")).get("date-parts")))
    year = _year(parts) or _year(_mapping(item.get("issued")).get("raw"))
    return Work(
        title=_without_tags(_first(item.get("title"))),
        authors=_names(names),
        year=year,
        venue=_venue(_without_tags(_first(item.get("container-title"))), year),
        doi=doi,
        source=f"https://doi.org/{doi}",
    )


def by_hand(title: str | None, authors: str | None, year: str | None) -> Work:
    """The work from what somebody typed: authors as "Family, Given" with semicolons between."""
    names = [clean(name) for name in (authors or "").split(";") if name.strip()]
    return Work(title=clean(title), authors=_names(names), year=_year(year))


def read_bibtex(path: Path) -> Work:
    """The work in a BibTeX file. Raises ``ValueError`` and ``OSError``."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"{path} is larger than {MAX_FILE:,} bytes; give one entry")
    try:
        return from_bibtex(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def from_bibtex(text: str) -> Work:
    """The work in BibTeX that holds one entry. Raises ``ValueError`` with one sentence for anything else."""
    import bibtexparser
    from bibtexparser.bibdatabase import UndefinedString
    from bibtexparser.bparser import BibTexParser

    if len(text) > MAX_FILE:
        raise ValueError(f"the BibTeX is longer than {MAX_FILE:,} characters; give one entry")
    try:
        parser = BibTexParser(ignore_nonstandard_types=False, common_strings=True)
        entries = bibtexparser.loads(text, parser).entries
    except UndefinedString as error:
        raise ValueError(f"the BibTeX cannot be read: {error} stands without quotes or braces") from None
    except Exception as error:  # pyparsing's, recursion: whatever its grammar trips over
        raise ValueError(f"the BibTeX cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not entries:
        raise ValueError("the BibTeX holds no entry that can be read, such as @inproceedings{key, title = {...}}")
    if len(entries) > 1:
        raise ValueError(f"the BibTeX holds {len(entries)} entries; give one")
    fields = {name: value for name, value in entries[0].items() if isinstance(value, str)}

    def said(name: str) -> str | None:
        return clean(from_latex(fields.get(name, "")))

    year = _year(said("year") or said("date"))
    doi = _or_none(doi_name, from_latex(fields.get("doi", "")))
    return Work(
        title=said("title"),
        authors=_names([_bibtex_name(name) for name in _split_names(fields.get("author", ""))]),
        year=year,
        venue=_venue(said("booktitle") or said("journal") or said("journaltitle"), year),
        arxiv=_bibtex_arxiv(fields),
        doi=None if doi is None or _is_arxiv_doi(doi) else doi,
        url=_bibtex_url(fields.get("url", "")),
        source="the paper's BibTeX",
    )


def _bibtex_arxiv(fields: dict[str, str]) -> str | None:
    archive = (fields.get("archiveprefix") or fields.get("eprinttype") or "arxiv").lower()
    candidates = [fields.get("eprint", "")] if archive == "arxiv" else []
    for name in ("doi", "url", "journal", "volume", "howpublished", "note"):
        candidates += re.findall(
            r"(?:arxiv(?:\.org/[a-z]+/|[:.] ?)|\babs/)([a-z.-]+/[0-9]{7}|[0-9]{4}\.[0-9]{4,5})",
            fields.get(name, "")[:MAX_TEXT],
            re.IGNORECASE,
        )
    return next((id for text in candidates if (id := _or_none(arxiv_id, text))), None)


def _bibtex_url(text: str) -> str | None:
    """An address that neither arXiv nor the DOI says already."""
    url = _url(re.sub(r"^\\url\{(.*)\}$", r"\1", text.strip()).replace("\\", ""))
    return None if url and re.match(r"https://([a-z]+\.)?(arxiv|doi)\.org/", url) else url


def _split_names(text: str) -> list[str]:
    """The names between the "and"s that stand in no braces."""
    names, word, depth = [], "", 0
    for piece in re.split(r"(\\.|[{}]|\sand\s)", " ".join(text.split())):
        depth += {"{": 1, "}": -1}.get(piece, 0)
        if depth <= 0 and piece == " and ":
            names, word = [*names, word], ""
        else:
            word += piece
    return [name.strip() for name in [*names, word] if name.strip()]


def _bibtex_name(name: str) -> str | None:
    """ "Luc {Van Gool}" -> "Van Gool, Luc"; what stands in braces as a whole is one name."""
    from bibtexparser.customization import splitname

    if name == "others" or (name.startswith("{") and _closing(name) == len(name) - 1):
        return clean(from_latex(name).replace(",", ""))
    try:
        parts = splitname(name, strict_mode=False)
    except (StopIteration, RuntimeError):  # a backslash at the end
        return clean(from_latex(name))
    said = {part: clean(from_latex(" ".join(words))) or "" for part, words in parts.items()}
    family = " ".join(filter(None, (said.get("von"), said.get("last")))).replace(",", "")
    given = " ".join(filter(None, (said.get("first"), said.get("jr"))))
    return f"{family}, {given}" if family and given else family or given or None


def _closing(text: str) -> int:
    """Where the brace closes that opens the text."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return place
    return len(text)


# The reverse of what cite writes, and of other ways to write the same.
_ACCENTS = {command: accent for accent, command in cite._ACCENTS.items()}
_LETTERS = {
    latex.strip("{}\\"): character for character, latex in cite._CHARACTERS.items() if re.match(r"\{\\[a-zA-Z]", latex)
} | {"aa": "å", "AA": "Å", "textendash": "–", "textemdash": "—", "textquoteright": "’", "textquoteleft": "‘"}
_MARKS = {"{": "", "}": "", "~": " ", "---": "—", "--": "–", "``": "“", "''": "”"}
_LATEX = re.compile(
    r"""(?P<formula> (?<!\\)\$[^$]*\$ )
    | \\ (?: (?P<mark>[`'^~=."]) | (?P<letter>[uvHckr])(?=[\s{\\]) ) \s* (?P<brace>\{)? \s*
      (?P<base> \\[ij](?![a-zA-Z]) | [^\W\d_] ) (?(brace)\s*\}?)
    | \\ (?:emph|textit|textbf|textsc|textrm|texttt|mathrm|url) \s* (?=\{)
    | \\ (?P<name>[a-zA-Z]+) (?: \{\} | \s+(?=\w) )?
    | \\ (?P<escaped>[&%$#_{}\ ])
    | (?P<plain> ---? | `` | '' | [{}~] )""",
    re.VERBOSE,
)


def from_latex(text: str) -> str:
    """Text without LaTeX's ways to write accents, letters, dashes and quotes. Other commands and mathematics stay."""

    def shown(match: re.Match[str]) -> str:
        if match["base"]:
            accent = _ACCENTS[match["mark"] or match["letter"]]
            return unicodedata.normalize("NFC", match["base"].lstrip("\\") + accent)
        if match["name"]:
            return _LETTERS.get(match["name"], match[0])
        return match["formula"] or match["escaped"] or _MARKS.get(match["plain"], "")

    return _LATEX.sub(shown, text[: 20 * MAX_TEXT])
