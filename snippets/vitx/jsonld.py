"""What pages say to machines: schema.org descriptions as JSON-LD. Pure functions.

Addresses are absolute where the site has one (``site_url`` of mkdocs.yml) and left out where it has none, for a file in
a folder has no address that means anything elsewhere.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from vitx.contribute import repository
from vitx.pages import SURVEY, Atlas
from vitx.schema import Method, Paper, Term

Node = dict[str, Any]
FORMATS = {  # file of the whole catalogue -> its media type
    "catalog.json": "application/json",
    "catalog.csv": "text/csv",
    "catalog.bib": "application/x-bibtex",
    "catalog.csl.json": "application/vnd.citationstyles.csl+json",
}
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def script(*nodes: Node) -> str:
    """The element that carries ``nodes``. No text in them can end it or open another."""
    content = {"@context": "https://schema.org", "@graph": [_without_gaps(node) for node in nodes]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)
    return f'<script type="application/ld+json">{text}</script>'


def _without_gaps(value: Any) -> Any:
    """The value without what is unknown or empty."""
    if isinstance(value, dict):
        return {key: _without_gaps(below) for key, below in value.items() if below not in (None, "", [], {})}
    return [_without_gaps(below) for below in value] if isinstance(value, list) else value


def _address(site: str, place: str) -> str | None:
    """Absolute address of a place such as /methods/evit/."""
    return site.rstrip("/") + place if site else None


# --- the whole ---------------------------------------------------------------------------------------------------


def home(atlas: Atlas, site: str, served: Iterable[str]) -> list[Node]:
    """The site, and the catalogue as a data set. ``served``: the names among ``FORMATS`` that the site has."""
    catalog, cff = atlas.catalog, atlas.citation
    held = f"{len(catalog.methods)} methods and {len(catalog.criteria)} criteria of evaluation"
    dataset = {
        "@type": "Dataset",
        "@id": _address(site, "/#catalogue"),
        "url": _address(site, "/"),
        "name": "The catalogue of vitx",
        "description": "Methods that explain Vision Transformers and criteria that judge explanations, each with its "
        f"paper, official code, motivation, mechanism and relations: {held}.",
        "version": cff.get("version"),
        "datePublished": cff.get("date-released"),
        "license": _licence(cff),
        "creator": _creators(cff),
        "keywords": cff.get("keywords"),
        "isAccessibleForFree": True,
        "inLanguage": "en",
        "isBasedOn": SURVEY,
        "distribution": [
            {
                "@type": "DataDownload",
                "name": name,
                "contentUrl": _address(site, f"/{name}") or name,  # from the home page, which carries this
                "encodingFormat": FORMATS[name],
            }
            for name in served
        ],
    }
    return [{**_website(atlas, site), "license": _licence(cff), "publisher": _creators(cff)}, dataset]


def _website(atlas: Atlas, site: str) -> Node:
    return {
        "@type": "WebSite",
        "@id": _address(site, "/#site"),
        "url": _address(site, "/"),
        "name": str(atlas.citation.get("title") or "vitx"),
        "inLanguage": "en",
    }


def _licence(cff: Mapping[str, Any]) -> str | None:
    licence = cff.get("license")
    return f"https://spdx.org/licenses/{quote(str(licence))}" if licence else None


def _creators(cff: Mapping[str, Any]) -> list[Node]:
    return [
        {"@type": "Person", "familyName": one["family-names"], "givenName": one.get("given-names")}
        if "family-names" in one
        else {"@type": "Organization", "name": one.get("name")}
        for one in cff.get("authors", ())
    ]


# --- terms -------------------------------------------------------------------------------------------------------

_SETS = {  # name of a term's vocabulary -> field of the taxonomy, name of the set
    "family": ("families", "Families of explanation methods"),
    "subfamily": ("subfamilies", "Branches of the families"),
    "motivation": ("motivations", "Motivations"),
    "task": ("tasks", "Tasks"),
    "needs": ("needs", "Needs of a method"),
    "output": ("outputs", "What a method gives"),
    "category": ("categories", "Categories of criteria"),
}


def _term_place(vocabulary: str, term: Term) -> str:
    """Where the term is defined."""
    if vocabulary == "family":
        return f"/families/{term.id}/"
    if vocabulary == "subfamily":
        return f"/families/{getattr(term, 'family', '')}/#{term.id}"
    return f"/criteria/#{term.id}" if vocabulary == "category" else f"/vocabulary/#{vocabulary}-{term.id}"


def _term(atlas: Atlas, site: str, vocabulary: str, id: str) -> Node:
    """A term, as an entry refers to it."""
    term = atlas.terms[vocabulary, id]
    address = _address(site, _term_place(vocabulary, term))
    return {
        "@type": "DefinedTerm",
        "@id": address,
        "url": address,
        "termCode": id,
        "name": term.label,
        "inDefinedTermSet": _set(site, vocabulary),
    }


def _set(site: str, vocabulary: str) -> Node:
    return {
        "@type": "DefinedTermSet",
        "@id": _address(site, f"/vocabulary/#{vocabulary}"),
        "name": _SETS[vocabulary][1],
    }


def vocabulary(atlas: Atlas, site: str) -> list[Node]:
    """Every vocabulary with its terms, in English and Chinese."""
    sets = []
    for name, (field, _) in _SETS.items():
        terms = getattr(atlas.catalog.taxonomy, field)
        defined = [
            {
                **_term(atlas, site, name, term.id),
                "alternateName": {"@language": "zh", "@value": term.label_zh},
                "description": term.definition,
                "inDefinedTermSet": None,  # it is the one around it
            }
            for term in terms
        ]
        sets.append({**_set(site, name), "hasDefinedTerm": defined})
    return sets


# --- entries -----------------------------------------------------------------------------------------------------


def paper(paper: Paper) -> Node:
    """The publication behind an entry."""
    doi = "https://doi.org/" + quote(paper.doi, safe="/().;:-_") if paper.doi else None
    arxiv = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else None
    addresses = [address for address in (doi, arxiv, paper.url) if address]
    identifiers = [("DOI", paper.doi, doi), ("arXiv", paper.arxiv, arxiv)]
    return {
        "@type": "ScholarlyArticle",
        "@id": addresses[0] if addresses else "_:paper",
        "name": paper.title,
        "headline": paper.title,
        "author": [_author(name) for name in paper.authors if name != "others"],
        "datePublished": str(paper.year),
        "publication": {"@type": "PublicationEvent", "name": paper.venue} if paper.venue else None,
        "identifier": [
            {"@type": "PropertyValue", "propertyID": name, "value": value, "url": address}
            for name, value, address in identifiers
            if value
        ],
        "sameAs": addresses,
    }


def _author(name: str) -> Node:
    """ "Family, Given" as a person; a single name may be that of a group, so it is only a name."""
    family, _, given = name.partition(", ")
    if not given:
        return {"@type": "Person", "name": name}
    return {"@type": "Person", "name": f"{given} {family}", "familyName": family, "givenName": given}


def entry(atlas: Atlas, id: str, site: str, description: str) -> list[Node]:
    """The page of a method or criterion, its paper and its code; the page and the code are about the paper."""
    one = atlas.catalog.methods.get(id) or atlas.catalog.criteria[id]
    address = _address(site, atlas.places[id])
    work = paper(one.paper) if one.paper else None
    about = [{"@id": work["@id"]}] if work else []
    if isinstance(one, Method):
        words = [("family", one.family), ("subfamily", one.subfamily)]
        words += [("motivation", word) for word in one.motivation.terms]
    else:
        words = [("category", one.category)]
    article = {
        "@type": "TechArticle",
        "@id": address,
        "url": address,
        "name": one.name,
        "headline": one.name,
        "description": description,
        "identifier": id,
        "inLanguage": "en",
        "license": _licence(atlas.citation),
        "author": _creators(atlas.citation),
        "isPartOf": _website(atlas, site),
        "about": about,
        "keywords": [_term(atlas, site, *word) for word in words],
    }
    code = {
        "@type": "SoftwareSourceCode",
        "@id": f"{address}#code" if address else "_:code",
        "name": one.name,
        "url": _address(site, f"/{one.snippet}"),
        "programmingLanguage": "Python",
        "codeRepository": repository(atlas.citation),
        "license": _licence(atlas.citation),
        "about": about,
    }
    if one.snippet:
        article["hasPart"] = {"@id": code["@id"]}
    return [article, *([work] if work else []), *([code] if one.snippet else [])]
