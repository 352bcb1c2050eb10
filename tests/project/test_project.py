"""The files around the code say what the code says."""

import re
import subprocess
import sys
import tomllib

import yaml
from vitx import ATLAS, catalog
from vitx.schema import Method

PROJECT = tomllib.loads((ATLAS / "pyproject.toml").read_text())
TOP = {"catalog", "docs", "snippets", "tests", "mkdocs.yml", "README.md", "pyproject.toml", "Makefile", "LICENSE"}


def form() -> dict[str, dict]:
    text = (ATLAS / ".github" / "ISSUE_TEMPLATE" / "method.yml").read_text()
    return {field["id"]: field["attributes"] for field in yaml.safe_load(text)["body"]}


def test_the_issue_form_has_the_keys_of_an_entry():
    assert list(form()) == list(Method.model_fields)


def test_the_issue_form_offers_the_vocabularies():
    taxonomy, fields = catalog.load().taxonomy, form()
    for field, terms in (("family", taxonomy.families), ("needs", taxonomy.needs), ("output", taxonomy.outputs)):
        assert fields[field]["options"] == [term.id for term in terms]


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ATLAS, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP | {"CITATION.cff", "CONTRIBUTING.md"}


def test_every_dependency_is_bounded_and_locked():
    project = PROJECT["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    locked = {
        re.split("[=@ ]", line)[0].lower().replace("_", "-")
        for line in (ATLAS / ".ci" / "lock.txt").read_text().splitlines()
        if "==" in line
    }
    for line in listed:
        name = re.split(r"[\[<>=]", line)[0].lower()
        assert "<" in line or "==" in line, f"{line} has no upper bound"
        assert name in locked, f"{name} is not in .ci/lock.txt: make lock"


def test_no_checkpoint_is_larger_than_four_megabytes():
    for path in (ATLAS / "snippets" / "models").glob("*.safetensors"):
        assert path.stat().st_size < 4_000_000, path


def test_importing_vitx_and_checking_the_catalogue_need_no_torch():
    code = "import sys, vitx, vitx.catalog, vitx.cite, vitx.cli, vitx.pages, vitx.execute; vitx.catalog.check(); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_readme_names_commands_that_exist():
    from vitx.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"vitx (list|show|cite|run|compare|bench|check|new)\b", (ATLAS / "README.md").read_text()))
    assert named <= known
    assert {"list", "show", "cite", "run", "compare", "check", "new"} <= known
