"""The issue forms ask for what an entry holds, in the words of the schema and of the vocabularies."""

from typing import Any, get_args

import pytest
import yaml
from vitx import ATLAS, catalog, contribute
from vitx.schema import Criterion, Method

FORMS = {
    path.stem: path for path in sorted((ATLAS / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"
}
VOCABULARIES = {"family": "families", "needs": "needs", "output": "outputs", "category": "categories"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(FORMS[name].read_text(encoding="utf-8"))


def test_which_forms_there_are():
    assert list(FORMS) == ["criterion", "error", "fact", "method"]


@pytest.mark.parametrize("name", FORMS)
def test_what_github_asks_of_a_form(name):
    form = read(name)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown")
        assert field["attributes"]["label"]
        assert all(isinstance(option, str) for option in field["attributes"].get("options", ())), "quote true and yes"
        assert ("options" in field["attributes"]) == (field["type"] == "dropdown")


@pytest.mark.parametrize(("name", "record"), [("method", Method), ("criterion", Criterion)])
def test_a_proposal_has_the_keys_of_the_entry_and_its_words(name, record):
    fields = {field["id"]: field for field in read(name)["body"]}
    assert list(fields) == list(record.model_fields)
    taxonomy = catalog.load().taxonomy
    for id, field in fields.items():
        assert field["attributes"]["label"] == id
        options = field["attributes"].get("options")
        if id in VOCABULARIES:
            assert options == [term.id for term in getattr(taxonomy, VOCABULARIES[id])]
        elif options:
            kind = record.model_fields[id].annotation
            words = {bool: ("true", "false"), bool | None: ("true", "false", "unknown")}.get(kind, get_args(kind))
            assert sorted(options) == sorted(words)
        required = field.get("validations", {}).get("required", False)
        assert not required or record.model_fields[id].is_required()


def test_addresses_fill_in_fields_that_take_text():
    """GitHub opens a blank form where a field of the address is a drop-down or is absent."""
    from urllib.parse import parse_qs, urlsplit

    entries = catalog.load()
    method, criterion = next(iter(entries.methods.values())), next(iter(entries.criteria.values()))
    for address in (
        contribute.fact("https://host/a", "x", "paper.doi"),
        contribute.snippet("https://host/a", method),
        contribute.snippet("https://host/a", criterion),
    ):
        asked = parse_qs(urlsplit(address).query)
        template = asked.pop("template")[0]
        types = {field["id"]: field["type"] for field in read(template.removesuffix(".yml"))["body"]}
        asked.pop("title")
        assert {types.get(id) for id in asked} <= {"input", "textarea"}
