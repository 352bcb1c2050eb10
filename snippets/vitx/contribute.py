"""Where a contribution begins: addresses of filled-in forms and of files in the repository. Pure functions.

The repository is named in one place, ``repository-code`` of CITATION.cff; CI names the one that it runs in, so that the
site of a fork leads to the fork (see mkdocs.yml). Where it is not known there are no such addresses, and pages say
which file to write.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from vitx.catalog import PLACES
from vitx.markup import link
from vitx.schema import Criterion, Method

BRANCH = "main"
HOW = "/coverage/#gap-snippet"  # what to do by hand


def repository(citation: Mapping[str, Any]) -> str:
    """Address of the repository without a slash at its end; empty where it is not known.

    Raises:
        ValueError: what CITATION.cff holds is no https address.
    """
    address = str(citation.get("repository-code") or "")
    if address and not address.startswith("https://"):
        raise ValueError(f"CITATION.cff: repository-code must be an address that starts with https://, not {address}")
    return address.rstrip("/")


def form(repository: str, template: str, title: str, **fields: str) -> str:
    """Address of the issue form ``template`` with some of its fields filled in.

    GitHub fills in inputs and text areas; a drop-down in the address would open a blank form.
    """
    return f"{repository}/issues/new?{urlencode({'template': template, 'title': title, **fields})}"


def edit(repository: str, file: str) -> str:
    """Address at which a file of the repository is edited; GitHub makes a fork and a pull request of it."""
    return f"{repository}/edit/{BRANCH}/{file}"


def entry_file(kind: str, id: str, family: str = "") -> str:
    """Path of an entry from the root of the repository."""
    return f"{PLACES[kind].folder.replace('<family>', family)}/{id}.yml"


def fact(repository: str, id: str, field: str) -> str:
    """Address of the form that supplies a fact which an entry lacks."""
    return form(repository, "error.yml", f"{id}: {field}", id=id, wrong=f"{field}: \nSeen in: ")


def snippet(repository: str, entry: Method | Criterion) -> str:
    """Address of the form by which code for an entry is offered."""
    title = f"Code for {entry.name}"
    if isinstance(entry, Criterion):
        return form(repository, "error.yml", title, id=entry.id, wrong="snippet: ")
    known = {"arXiv": entry.paper.arxiv, "DOI": entry.paper.doi}
    paper = "; ".join([entry.paper.title, *(f"{name} {value}" for name, value in known.items() if value)])
    return form(
        repository,
        "method.yml",
        title,
        id=entry.id,
        name=entry.name,
        paper=paper,
        subfamily=entry.subfamily,
    )


def snippet_link(repository: str, entry: Method | Criterion) -> str:
    """The words "Contribute it" as a link: to the form, or to what to do by hand where there is no address."""
    return link(snippet(repository, entry) if repository else HOW, "Contribute it")
