"""What ``vitx new ID`` writes: entry, snippet and test that ``vitx check`` accepts, except for the TODOs it lists."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vitx import ATLAS
from vitx.catalog import (
    PLACES,
    TODO,
    _entry_files,
    _read,
    _relative,
    _renamed_file,
    importable_names,
    nearest,
    parse,
    read_taxonomy,
    schema_line,
    snippet_name,
    test_name,
)
from vitx.metadata import Work
from vitx.schema import Term

# What is said of a field of the paper that is not known, or not for sure.
_HINTS = {
    "title": "title as printed",
    "authors": "Family, Given; one item each, in printed order",
    "year": "year of publication",
    "venue": "such as ICCV 2021; null if unknown",
    "arxiv": 'in quotes, such as "2005.00928"; null if there is none',
    "doi": "without https://doi.org/; null if there is none",
}
_UNSURE = {
    "authors": "arXiv gives a name in one piece; see that each is Family, Given",
    "venue": "arXiv often does not know; such as ICCV 2021",
}

_ENTRY = """\
{schema_line}
id: {id}
name: {name}  # {todo} the name that the field uses
{paper}
code: null  # {todo} the authors' own: a url and a licence (SPDX id); null if there is none
family: {family}
subfamily: {subfamily}  # {todo} one of {subfamilies}
motivation:
  terms: [faithfulness]  # {todo} the weightiest first, of {motivations}
  text: "{todo} one or two sentences: what did the authors set out to mend?"
tasks: [image-classification]  # {todo} some of {tasks}
needs: [forward-pass, attention-weights]  # {todo} some of {needs}
class_specific: null  # {todo} true if the explanation changes with the class, else false
output: heatmap  # {todo} one of {outputs}
stochastic: false  # {todo} true if explain draws random numbers
mechanism: |-
  {todo} how it works, enough to implement from: Markdown, $inline$ and display equations.

  $$M_p = A_{{\\mathrm{{cls}},\\,p}}$$
relations: []  # {todo} such as - {{type: extends, id: attention-rollout}}
in_survey: unknown
snippet: {snippet}
sources:
{sources}
note: null
"""

_CRITERION_ENTRY = """\
{schema_line}
id: {id}
name: {name}  # {todo} the name that the field uses
{paper}
category: {category}  # {todo} one of {categories}
definition: |-
  {todo} what is computed, enough to implement from: Markdown, $inline$ and display equations.

  $$s = \\frac{{\\max_p |R_p|}}{{\\sum_p |R_p|}}$$
better: neither  # {todo} up or down, if an explanation gets better as the number moves
implemented_in: []  # {todo} such as quantus.Infidelity; leave it empty if nowhere
in_survey: unknown
snippet: {snippet}
relations: []  # {todo} such as - {{type: extends, id: deletion}}
sources:
{sources}
note: null
"""

_SNIPPET = '''\
# %% [markdown]
# # {name}
#
# {todo} what it answers, in two or three sentences; the equation; who proposed it, by catalogue id.
#
# $$M_p = A_{{\\mathrm{{cls}},\\,p}}$$
#
# Catalogue entry: `{id}`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, readout, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """{todo} what the numbers mean, in one sentence.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None means the predicted class.

    Returns:
        (B, gh, gw), raw. {todo} the range of the values.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: {todo} paper, section, equation.
    """
    check(model, images)
    # {todo} the method itself, with a shape behind each line that changes one. So far: attention of the last layer.
    with torch.no_grad(), capture(model, "attention") as record:
        model(images)
    attention = record["attention"][-1].mean(1)  # (B, N, N), queries in rows
    row = (readout(model, record)[:, None] @ attention)[:, 0]  # (B, N), of the class token where the model has one
    return to_grid(model, images, row[:, model.num_prefix_tokens :])  # (B, gh, gw)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. {todo} every difference, numbered; "None." if there is none.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "{id}")
'''

_CRITERION_SNIPPET = '''\
# %% [markdown]
# # {name}
#
# {todo} what it asks of an explanation, in two or three sentences; the equation; the range and how to read it.
#
# $$s = \\frac{{\\max_p |R_p|}}{{\\sum_p |R_p|}}$$
#
# Catalogue entry: `{id}`.

# %%
from torch import Tensor


def score(relevance: Tensor) -> Tensor:
    """{todo} what the number means, in one sentence.

    Args:
        relevance: (B, gh, gw), any real values. {todo} what else it reads; vitx.evaluate.QUANTITIES names it all.

    Returns:
        (B,). {todo} the range, and which way is better.

    Source: {todo} paper, section, equation.
    """
    # {todo} the criterion itself. So far: the share of the largest patch.
    size = relevance.flatten(1).abs()  # (B, P)
    return size.amax(1) / size.sum(1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. {todo} every difference, numbered; "None." if there is none.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.criterion("{id}")
'''

_TEST = '''\
"""What is true of {name}, beyond the contract that tests/test_contract.py proves for every snippet."""

import pytest
import vitx
from helpers import area_under_curve, pictures, relative_error, tiny, twin_forward
from vitx import glyphs, models

ID = "{id}"
explain = vitx.load(ID)


def test_agrees_with_plain_loops(proof):
    model = tiny(3)  # three blocks, 2 x 2 patches; attention far from uniform, which default weights would hide
    x = pictures(model)
    theirs = []
    for image in x:
        blocks, _ = twin_forward(model, image)  # all that each block computes, in numpy; see tests/helpers.py
        # {todo} the equation in plain loops. So far: attention of the last block, averaged over the heads.
        theirs.append(blocks[-1]["attention"].mean(0)[0, 1:].reshape(2, 2))
    error = relative_error(explain(model, x), theirs)
    proof(ID, "map, three blocks", error, at_most=1e-9, kind="parity", oracle="the equation in plain loops")


@pytest.mark.skip(reason="{todo} a property that follows from the equation, such as a sum or a uniform case")
def test_closed_form(proof): ...


def test_finds_the_creature_in_glyph_scenes(proof):
    scenes = glyphs.scenes(16, seed=5)
    creature = (glyphs.patch_fraction(scenes.object_masks, (14, 14)) > 0.5).any(1).flatten(1)  # (16, 196)
    relevance = explain(models.load("glyph").model, glyphs.normalise(scenes.images))
    area = area_under_curve(relevance, creature).mean()
    least = 0.5  # {todo} what it reaches, less a margin; 0.5 is chance
    proof(ID, "area under the ROC curve of creature patches, 16 scenes", area, at_least=least, kind="ground truth")
'''

_CRITERION_TEST = '''\
"""What is true of {name}, beyond what tests/test_criteria.py proves for every criterion."""

import pytest
import torch
import vitx

score = vitx.load_module("{id}").score


def test_one_value_for_each_map():
    relevance = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert score(relevance).shape == (3,)
    assert score(relevance).dtype == torch.float64


@pytest.mark.skip(reason="{todo} maps whose score follows from the equation, such as a constant map or one patch")
def test_closed_form(): ...


@pytest.mark.skip(reason="{todo} agreement to 1e-6 with an independent implementation, or with plain loops")
def test_agrees_with_slow_twin(): ...
'''


def new(id: str, family: str, root: Path = ATLAS / "catalog", work: Work | None = None) -> list[Path]:
    """Write the skeletons of a method and return their paths: entry, snippet, test.

    Every place that awaits its author holds the marker ``catalog.TODO``, by which ``vitx check`` lists it.

    Args:
        id: kebab-case, new, and not the name of a Python module.
        family: a family of the taxonomy.
        root: the catalog folder of a clone of the repository.
        work: what is known of the paper.

    Raises:
        ValueError: an argument does not fit, one of the files exists already, or there is no clone. Nothing is written.
    """
    check_new(id, root=root, work=work)
    taxonomy = read_taxonomy(root)
    families = [term.id for term in taxonomy.families]
    if family not in families:
        near = nearest(family, families)
        hint = f"did you mean {', '.join(near)}?" if near else f"they are {', '.join(families)}"
        raise ValueError(f'"{family}" is not one of the families; {hint}')
    branches = [term for term in taxonomy.subfamilies if term.family == family]
    texts = {
        f"catalog/methods/{family}/{id}.yml": _ENTRY,
        snippet_name(id, family): _SNIPPET,
        test_name(id, family): _TEST,
    }
    values = {
        "family": family,
        "subfamily": branches[0].id,
        "subfamilies": _listed(branches),
        **{name: _listed(getattr(taxonomy, name)) for name in ("motivations", "tasks", "needs", "outputs")},
        "snippet": snippet_name(id, family),
        "schema_line": schema_line("method", depth=2),
    }
    return _write(texts, values, id, root, work)


def new_criterion(id: str, root: Path = ATLAS / "catalog", work: Work | None = None) -> list[Path]:
    """Write the skeletons of a criterion of evaluation, as ``new`` does for a method."""
    check_new(id, root=root, work=work)
    texts = {
        f"catalog/evaluation/{id}.yml": _CRITERION_ENTRY,
        snippet_name(id, "evaluation"): _CRITERION_SNIPPET,
        test_name(id, "evaluation"): _CRITERION_TEST,
    }
    categories = read_taxonomy(root).categories
    values = {
        "category": categories[0].id,
        "categories": _listed(categories),
        "snippet": snippet_name(id, "evaluation"),
        "schema_line": schema_line("criterion", depth=1),
    }
    return _write(texts, values, id, root, work)


def check_new(id: str, root: Path = ATLAS / "catalog", work: Work | None = None) -> None:
    """Raise ``ValueError`` where ``id`` cannot be that of a new entry, or the catalogue holds the paper already."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", id) or len(id) > 80:
        raise ValueError(f'"{id}" is not an id: write lower-case words joined by hyphens, such as attention-rollout')
    document, faults = parse(f"id: {id}")
    if faults or document.data["id"] != id:
        raise ValueError(f'"{id}" is a truth value or nothing to YAML; add a word to the id')
    if id.replace("-", "_") in importable_names():
        raise ValueError(f"{id} would shadow the Python module {id.replace('-', '_')}; add a word to the id")
    if not (root.parent / "tests").is_dir():
        raise ValueError(f"{root.parent / 'tests'} is missing; `vitx new` works in a clone of the repository")
    files = {kind: _entry_files(root / place.folder.split("/")[1], [], root) for kind, place in PLACES.items()}
    taken = next((path for paths in files.values() for path in paths if path.stem == id), None)
    if taken is not None:
        raise ValueError(f"{id} exists already: {_relative(taken, root)}")
    works = {path.stem: path for path in (*files["method"], *files["criterion"])}
    if now := _renamed_file(id, works, root):
        raise ValueError(f"{id} was the id of {now} before, and its address leads there")
    wanted = {name: value.lower() for name in ("arxiv", "doi") if (value := getattr(work, name, None))}
    for path in works.values() if wanted else ():
        document, _ = _read(path, _relative(path, root), [])
        paper = document.data.get("paper") if document else None
        for name, value in wanted.items():
            if isinstance(paper, dict) and str(paper.get(name)).lower() == value:
                raise ValueError(
                    f"{value} is the paper of {path.stem} already ({_relative(path, root)}); "
                    "for a second entry from one paper leave the identifier out and fill it in by hand"
                )


def _listed(terms: Iterable[Term]) -> str:
    return ", ".join(term.id for term in terms)


def _quoted(text: str) -> str:
    """A YAML scalar in double quotes. JSON's escapes are YAML's."""
    return json.dumps(text, ensure_ascii=False)


def _paper_yaml(work: Work) -> str:
    """The paper in YAML; a field that is unknown or unsure has its TODO."""
    blank = {"title": f'"{TODO} {_HINTS["title"]}"', "year": "2000"}
    lines = ["paper:"]
    for field in ("title", "authors", "year", "venue", "arxiv", "doi"):
        value = getattr(work, field)
        hint = (_UNSURE[field] if field in work.unsure else "") if value else _HINTS[field]
        todo = f"  # {TODO} {hint}" if hint else ""
        if field == "authors" and value:
            lines += [f"  authors:{todo}", *(f"    - {_quoted(name)}" for name in value)]
        elif field == "authors":
            lines += [f'  authors: ["{TODO} {hint}"]']
        elif field == "title":
            lines += [f"  title: {_quoted(value) if value else blank[field]}"]
        else:
            said = _quoted(value) if isinstance(value, str) else str(value or blank.get(field, "null"))
            lines += [f"  {field}: {said}{todo}"]
    return "\n".join([*lines, f"  url: {_quoted(work.url) if work.url else 'null'}"])


def _write(
    templates: Mapping[str, str], values: Mapping[str, str], id: str, root: Path, work: Work | None
) -> list[Path]:
    """Fill the templates in and write them, all or none."""
    work = work or Work()
    sources = [_quoted(f"{work.source} (the paper's facts)")] if work.source else []
    about = {
        "id": id,
        "name": id.replace("-", " ").capitalize(),
        "paper": _paper_yaml(work),
        "sources": "\n".join(f"  - {source}" for source in [*sources, f'"{TODO} where each fact was seen"']),
        "todo": TODO,
    }
    paths = {root.parent / name: template.format(**about, **values) for name, template in templates.items()}
    for path in paths:
        if path.exists():
            raise ValueError(f"{path.relative_to(root.parent).as_posix()} exists already; nothing was written")
    beside = {path: path.with_name(path.name + ".part") for path in paths}
    try:
        for path, text in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside[path].write_text(text, encoding="utf-8")
        for path in paths:
            beside[path].replace(path)
    finally:
        for part in beside.values():
            part.unlink(missing_ok=True)
    return list(paths)
