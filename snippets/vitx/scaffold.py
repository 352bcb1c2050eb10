"""What ``vitx new ID`` writes: entry, snippet and test that ``vitx check`` accepts, except for the TODOs it lists."""

import re
from pathlib import Path

from vitx import ATLAS
from vitx.catalog import TODO, importable_names, nearest, parse, read_taxonomy, schema_line, snippet_name, test_name

_ENTRY = """\
{schema_line}
id: {id}
name: {name}  # {todo} the name that the field uses
paper:
  title: "{todo} title as printed"
  authors: ["{todo} Family, Given; one item each, in printed order"]
  year: 2000  # {todo} year of publication
  venue: null  # {todo} such as ICCV 2021; null if unknown
  arxiv: null  # {todo} in quotes, such as "2005.00928"; null if there is none
  doi: null  # {todo} without https://doi.org/; null if there is none
  url: null
code: null  # {todo} the authors' own: a url and a licence (SPDX id); null if there is none
family: {family}
subfamily: {subfamily}  # {todo} a subfamily of {family} in catalog/taxonomy.yml
motivation:
  terms: [faithfulness]  # {todo} terms of the motivations in catalog/taxonomy.yml, the weightiest first
  text: "{todo} one or two sentences: what did the authors set out to mend?"
tasks: [image-classification]  # {todo} terms of the tasks in catalog/taxonomy.yml
needs: [forward-pass, attention-weights]  # {todo} terms of the needs in catalog/taxonomy.yml
class_specific: null  # {todo} true if the explanation changes with the class, else false
output: heatmap  # {todo} a term of the outputs in catalog/taxonomy.yml
stochastic: false  # {todo} true if explain draws random numbers
mechanism: |-
  {todo} how it works, enough to implement from: Markdown, $inline$ and display equations.

  $$M_p = A_{{\\mathrm{{cls}},\\,p}}$$
relations: []  # {todo} such as - {{type: extends, id: attention-rollout}}
in_survey: unknown
snippet: {snippet}
sources: ["{todo} where each fact was seen"]
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
        row = readout(model, record)  # (B, N)
    return to_grid(model, images, row[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. {todo} every difference, numbered; "None." if there is none.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "{id}")
'''

_TEST = '''\
"""What is true of {name}, beyond the contract that tests/test_contract.py proves for every snippet."""

import pytest
import timm
import torch
import vitx

explain = vitx.load("{id}")


@pytest.fixture
def model() -> torch.nn.Module:
    """A small random ViT in float64 whose attention is far from uniform, which default weights would hide."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=3).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8) if "qkv" in name else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_shape_and_type(model):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    relevance = explain(model, images)
    assert relevance.shape == (2, 4, 4)
    assert relevance.dtype == torch.float64


@pytest.mark.skip(reason="{todo} a property that follows from the equation, such as a sum or a uniform case")
def test_closed_form(model): ...


@pytest.mark.skip(reason="{todo} agreement to 1e-6 with an independent implementation, or with plain loops")
def test_agrees_with_slow_twin(model): ...


@pytest.mark.skip(reason="{todo} better than random by a margin on vitx.glyphs, whose evidence is known")
def test_finds_the_object_in_glyph_scenes(): ...
'''


def new(id: str, family: str, root: Path = ATLAS / "catalog") -> list[Path]:
    """Write the skeletons of a method and return their paths: entry, snippet, test.

    Every place that awaits its author holds the marker ``catalog.TODO``, by which ``vitx check`` lists it.

    Args:
        id: kebab-case, new, and not the name of a Python module.
        family: a family of the taxonomy.
        root: the catalog folder of a clone of the repository.

    Raises:
        ValueError: an argument does not fit, one of the files exists already, or there is no clone. Nothing is written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", id) or len(id) > 80:
        raise ValueError(f'"{id}" is not an id: write lower-case words joined by hyphens, such as attention-rollout')
    document, faults = parse(f"id: {id}")
    if faults or document.data["id"] != id:
        raise ValueError(f'"{id}" is a truth value or nothing to YAML; add a word to the id')
    taxonomy = read_taxonomy(root)
    families = [term.id for term in taxonomy.families]
    if family not in families:
        near = nearest(family, families)
        hint = f"did you mean {', '.join(near)}?" if near else f"they are {', '.join(families)}"
        raise ValueError(f'"{family}" is not one of the families; {hint}')
    if id.replace("-", "_") in importable_names():
        raise ValueError(f"{id} would shadow the Python module {id.replace('-', '_')}; add a word to the id")
    taken = next((root / "methods").glob(f"*/{id}.yml"), None)
    if taken is not None:
        raise ValueError(f"{id} exists already: {taken.relative_to(root.parent).as_posix()}")
    tests = root.parent / "tests"
    if not tests.is_dir():
        raise ValueError(f"{tests} is missing; `vitx new` works in a clone of the repository")

    values = {
        "id": id,
        "name": id.replace("-", " ").capitalize(),
        "family": family,
        "subfamily": next(term.id for term in taxonomy.subfamilies if term.family == family),
        "snippet": snippet_name(id, family),
        "schema_line": schema_line("method", depth=2),
        "todo": TODO,
    }
    texts = {
        f"catalog/methods/{family}/{id}.yml": _ENTRY,
        snippet_name(id, family): _SNIPPET,
        test_name(id, family): _TEST,
    }
    paths = {root.parent / name: template.format(**values) for name, template in texts.items()}
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
