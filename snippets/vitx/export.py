"""The catalogue for other programs: a table for spreadsheets, and the script behind the browse page's downloads.

Pure functions: entries in, text out.
"""

import csv
import json
from collections.abc import Iterable
from io import StringIO

from vitx import cite
from vitx.cite import Entry
from vitx.schema import Catalog, Method

COLUMNS = (
    "id",
    "name",
    "title",
    "authors",
    "year",
    "venue",
    "arxiv",
    "doi",
    "url",
    "code",
    "licence",
    "family",
    "subfamily",
    "category",
    "motivations",
    "tasks",
    "needs",
    "class_specific",
    "output",
    "in_survey",
    "snippet",
    "page",
)
BOM = "\ufeff"  # a spreadsheet that finds it first in a file reads the rest as UTF-8
# A spreadsheet takes what starts so for a formula, which may send the table to a stranger; in the wide forms, too.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")


def files(catalog: Catalog) -> dict[str, str]:
    """Path -> content of what the site serves: all methods and criteria in three formats, and the script below.

    The two of citations leave out the criteria that have no paper.
    """
    entries: list[Entry] = [*catalog.methods.values(), *catalog.criteria.values()]
    published = [entry for entry in entries if entry.paper]
    return {
        "catalog.csv": BOM + csv_text(entries),
        "catalog.bib": cite.bibtex(published),
        "catalog.csl.json": cite.csl_json(published),
        "assets/selection.js": selection_script(catalog.methods.values()),
    }


def csv_text(entries: Iterable[Entry]) -> str:
    """One row of ``COLUMNS`` for each entry, after a row of their names, in comma-separated UTF-8.

    Lists are joined by ``; ``, and what is unknown is empty, but for class_specific and in_survey, which say
    ``unknown``. The columns from family to output are of methods, but for category, which is of criteria. ``page`` is
    an address from the root of the site. A cell that a spreadsheet would take for a formula starts with ``'``.
    """
    return "".join([_line(COLUMNS), *map(_row, entries)])


def _row(entry: Entry) -> str:
    paper = entry.paper
    cells: dict[str, str | None] = {"id": entry.id, "name": entry.name, "in_survey": entry.in_survey}
    if paper:
        cells |= {
            "title": paper.title,
            "authors": "; ".join(paper.authors),
            "year": str(paper.year),
            "venue": paper.venue,
            "arxiv": paper.arxiv,
            "doi": paper.doi,
            "url": cite.address(paper),
        }
    if isinstance(entry, Method):
        cells |= {
            "code": entry.code and entry.code.url,
            "licence": entry.code and entry.code.licence,
            "family": entry.family,
            "subfamily": entry.subfamily,
            "motivations": "; ".join(entry.motivation.terms),
            "tasks": "; ".join(entry.tasks),
            "needs": "; ".join(entry.needs),
            "class_specific": {True: "yes", False: "no", None: "unknown"}[entry.class_specific],
            "output": entry.output,
        }
    else:
        cells["category"] = entry.category
    cells |= {
        "snippet": entry.snippet,
        "page": f"/{'methods' if isinstance(entry, Method) else 'criteria'}/{entry.id}/",
    }
    return _line([_harmless(cells.get(column) or "") for column in COLUMNS])


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _line(cells: Iterable[str]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def selection_script(methods: Iterable[Method]) -> str:
    """A script that gives docs/assets/browse.js what it puts files together from.

    ``window.vitxCitations`` is ``{csv, methods}``: the first line of a CSV file, and by id ``{csv, bibtex, csl,
    paper}``. Methods with the same ``paper`` rest on the same paper, which is cited once. It is a script and no JSON
    because a page that was opened from a folder may load the one and not the other.
    """
    found = {
        method.id: {
            "csv": _row(method),
            "bibtex": cite.bibtex([method]),
            "csl": json.loads(cite.csl_json([method]))[0],
            "paper": cite.paper_key(method),
        }
        for method in methods
    }
    content = json.dumps({"csv": _line(COLUMNS), "methods": found}, ensure_ascii=False, separators=(",", ":"))
    return f"window.vitxCitations = {content};\n"
