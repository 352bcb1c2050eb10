"""Release notes say what differs between two versions of the catalogue, and nothing else."""

import copy
import json
import subprocess

import pytest
import yaml
from vitx import ATLAS, changes

TAXONOMY = {
    "families": [
        {"id": "attention", "label": "Attention", "label_zh": "甲", "order": 1, "definition": "One."},
        {"id": "tasks", "label": "Other tasks", "label_zh": "乙", "order": 2, "definition": "Two."},
    ],
    "subfamilies": [
        {"id": "rollout", "family": "attention", "label": "Rollout", "order": 1, "definition": "Three."},
    ],
}
METHOD = {
    "id": "a",
    "name": "Method A",
    "family": "attention",
    "subfamily": "rollout",
    "motivation": {"terms": ["faithfulness"], "text": "Because."},
    "tasks": ["image-classification"],
    "needs": ["forward-pass", "gradients"],
    "class_specific": None,
    "output": "heatmap",
    "in_survey": "yes",
    "snippet": None,
    "sources": ["here"],
}
FILES = {
    "taxonomy.yml": TAXONOMY,
    "methods/attention/a.yml": METHOD,
    "methods/attention/b.yml": METHOD | {"id": "b", "name": "Method B"},
    "evaluation/c.yml": {
        "id": "c",
        "name": "Criterion C",
        "category": "faithfulness",
        "better": "up",
        "in_survey": "no",
    },
    "tools/t.yml": {"id": "t", "name": "Tool"},
}


def version(files):
    return changes.version({file: yaml.safe_dump(data, allow_unicode=True).encode() for file, data in files.items()})


@pytest.fixture
def later():
    return copy.deepcopy(FILES)


def compared(later):
    return changes.compare(version(FILES), version(later))


def test_nothing_changed(later):
    later["methods/attention/a.yml"]["sources"] = ["elsewhere"]
    later["methods/attention/a.yml"]["needs"].reverse()
    later["taxonomy.yml"]["families"].reverse()
    later["results/run.yml"] = {"not": "an entry"}
    assert compared(later) == ({}, {})
    assert changes.markdown(compared(later), "v1", "v2") == (
        "# Changes of the catalogue from v1 to v2\n\nNothing changed.\n"
    )


def test_terms(later):
    first, second = later["taxonomy.yml"]["families"]
    first |= {"label": "Attention-based", "definition": "One,  more\nexactly.", "definition_zh": "一"}
    second["label_zh"] = "丙"
    later["taxonomy.yml"]["subfamilies"][0]["family"] = "tasks"
    later["taxonomy.yml"]["subfamilies"].append({"id": "flow", "family": "tasks", "label": "Flow"})
    later["taxonomy.yml"]["tasks"] = [{"id": "video", "label": "Video"}]
    assert compared(later).terms == {
        "families": {
            "renamed": [
                {"id": "attention", "from": "Attention", "to": "Attention-based"},
                {"id": "tasks", "from": "乙", "to": "丙"},
            ],
            "redefined": [{"id": "attention", "label": "Attention-based"}],
        },
        "subfamilies": {
            "added": [{"id": "flow", "label": "Flow", "family": "tasks"}],
            "moved": [
                {"id": "rollout", "label": "Rollout", "family": "tasks", "from": "attention", "to": "tasks"},
            ],
        },
        "tasks": {"added": [{"id": "video", "label": "Video"}]},
    }
    back = changes.compare(version(later), version(FILES)).terms
    assert back["tasks"] == {"removed": [{"id": "video", "label": "Video"}]}
    assert back["subfamilies"]["moved"][0]["to"] == "attention"


def test_a_field_that_came_to_all_terms_redefines_none(later):
    for term in later["taxonomy.yml"]["families"]:
        term["definition_zh"] = "新"
    assert compared(later) == ({}, {})


def test_entries(later):
    a = later.pop("methods/attention/a.yml") | {
        "family": "tasks",
        "motivation": {"terms": ["debugging", "faithfulness"]},
        "needs": ["forward-pass"],
        "class_specific": True,
        "snippet": "snippets/tasks/a.py",
    }
    later["methods/tasks/a.yml"] = a
    later.pop("tools/t.yml")
    later["methods/attention/new.yml"] = METHOD | {"id": "new", "name": "New"}
    later["evaluation/c.yml"]["better"] = "down"
    found = compared(later).entries
    assert found["method"]["reclassified"] == [
        {
            "id": "a",
            "name": "Method A",
            "place": "tasks/rollout",
            "axes": {
                "family": {"added": ["tasks"], "removed": ["attention"]},
                "needs": {"added": [], "removed": ["gradients"]},
                "class_specific": {"added": ["yes"], "removed": ["unknown"]},
                "motivation": {"added": ["debugging"], "removed": []},
            },
        }
    ]
    assert [item["id"] for item in found["method"]["with_snippet"]] == ["a"]
    assert found["method"]["added"] == [
        {"id": "new", "name": "New", "place": "attention/rollout", "snippet": False},
    ]
    assert found["criterion"]["reclassified"][0]["axes"] == {"better": {"added": ["down"], "removed": ["up"]}}
    assert found["tool"] == {"removed": [{"id": "t", "name": "Tool"}]}
    assert [item["id"] for item in changes.compare(version(later), version(FILES)).entries["method"]["removed"]] == [
        "new"
    ]


def test_an_entry_that_was_renamed_is_neither_new_nor_gone(later):
    later["methods/attention/z.yml"] = later.pop("methods/attention/a.yml") | {"formerly": ["a"], "output": "boxes"}
    found = compared(later).entries["method"]
    assert set(found) == {"renamed", "reclassified"}
    assert (found["renamed"][0]["id"], found["renamed"][0]["from"]) == ("z", "a")


def test_markdown(later):
    later["methods/attention/b.yml"]["tasks"] = ["video", "language"]
    later["methods/attention/x.yml"] = METHOD | {
        "id": "x",
        "name": "[x](javascript:y) <script>*\n# head",
        "snippet": "s",
    }
    later["taxonomy.yml"]["families"][0]["label"] = "Attention_based"
    assert changes.markdown(compared(later), "v1.0", "main").splitlines() == [
        "# Changes of the catalogue from v1.0 to main",
        "",
        "## Methods",
        "",
        "### New (1)",
        "",
        r"- \[x\](javascript:y) \<script\>\* \# head (`x`), attention/rollout",
        "",
        "### Classified anew (1)",
        "",
        "- Method B (`b`): tasks + video, + language, − image-classification",
        "",
        "## Vocabulary: families",
        "",
        "### Renamed (1)",
        "",
        r"- `attention`: from Attention to Attention\_based",
    ]
    assert json.loads(changes.as_json(compared(later)))["entries"]["method"]["added"][0]["id"] == "x"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a: &x b", "methods/attention/a.yml:1: anchor"), (b"\xff", "methods/attention/a.yml: "), (b"", "is empty")],
)
def test_files_that_cannot_be_read(content, reason):
    with pytest.raises(ValueError, match=reason):
        changes.version({"methods/attention/a.yml": content})


@pytest.mark.parametrize("odd", [{"families": [1, {"id": [2]}, {}], "x": "y"}, {"families": [{"id": "attention"}]}])
def test_odd_but_sound_yaml(later, odd):
    later["taxonomy.yml"] = odd
    later["methods/attention/a.yml"] = {"name": ["x"], "tasks": {"a": 1}, "motivation": 3, "formerly": 5}
    for found in (compared(later), changes.compare(version(later), version(FILES))):
        assert changes.markdown(found, "a", "b")
        assert changes.as_json(found)


@pytest.fixture
def repository(tmp_path):
    """A repository with two commits: the second adds Method B."""

    def git(*words):
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    git("init", "-q")
    for number, names in enumerate((["taxonomy.yml", "methods/attention/a.yml"], ["methods/attention/b.yml"])):
        for name in names:
            path = tmp_path / "catalog" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(FILES[name]))
        git("add", ".")
        git("commit", "-qm", str(number))
    git("tag", "v2")
    return tmp_path


def test_revisions_and_folders(repository):
    old, new = changes.read("v2~1", repository), changes.read("v2", repository)
    assert list(changes.compare(old, new).entries["method"]) == ["added"]
    assert changes.read(str(repository / "catalog"), repository) == new
    assert changes.read(str(repository), repository) == new
    for nothing in ("v3", "--output=x", "v2:catalog", str(repository / "catalog" / "methods")):
        with pytest.raises(ValueError, match="neither a folder with taxonomy"):
            changes.read(nothing, repository)
    assert sorted(path.name for path in repository.iterdir()) == [".git", "catalog"]


def test_the_catalogue_of_today():
    whole = changes.read(str(ATLAS / "catalog"))
    assert changes.compare(whole, whole) == ({}, {})
    from vitx import catalog

    read = catalog.load()
    assert whole.entries["method"].keys() == read.methods.keys()
    assert whole.entries["perspective"].keys() == read.perspectives.keys()
    assert [term.id for term in read.taxonomy.families] == list(whole.terms["families"])
