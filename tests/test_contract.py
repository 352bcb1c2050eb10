"""What holds for every snippet: its form, its result, the model left as it was, one sentence for what it refuses."""

import ast
import copy
from typing import Any

import pytest
import timm
import torch
import vitx
from helpers import VARIANTS, pictures, variant
from torch import Tensor
from vitx import ATLAS, catalog, models
from vitx.vit import UnsupportedModel

ENTRIES = {entry.id: entry for entry in catalog.load().methods.values() if entry.snippet}
# Cheap settings of the methods that need many passes.
OPTIONS: dict[str, dict[str, Any]] = {
    "integrated-gradients": {"steps": 3},
    "attattr": {"steps": 2},
    "tam": {"steps": 3},
    "beyond-intuition": {"steps": 3},
    "smoothgrad": {"samples": 4},
    "gradientshap": {"samples": 4},
    "iterated-integrated-attributions": {"steps": 2},
    "tis": {"masks": 8},
    "vit-cx": {"threshold": 0.2},
    "atman": {"cell": 4},
    "prisma": {"cell": 4},
    "r-cut": {"centred": True},
    "d-rise": {"masks": 30},
    "focused-attention-retina": {"iterations": 2, "samples": 8},
    "kernelshap": {"samples": 40},
    "lime": {"samples": 30},
    "rise": {"masks": 30},
    "score-cam": {"channels": 8},
    "grad-cam-plus-plus": {"relu": False},  # on the rough models nothing is left of the rectified map
}
# What a snippet may import above its demo, so that it can be lifted out with one kit file.
IMPORTS = {
    "collections",
    "copy",
    "difflib",
    "functools",
    "json",
    "math",
    "typing",
    "torch",
    "timm",
    "numpy",
    "scipy",
    "networkx",
    "safetensors",
    "vitx.vit",
}


def tensors(result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"heatmap": result}
    fields = {name: value for name, value in result._asdict().items() if isinstance(value, Tensor)}
    return fields | ({"heatmap": result.heatmap()} if hasattr(result, "heatmap") else {})


def of(fields) -> str:
    """The field that is compared: the heat map, or the logits of a pruned model whose units are explained."""
    return "heatmap" if "heatmap" in fields else "logits"


def explained(id, model, x, target=None):
    return tensors(vitx.load(id)(model, x, target, **OPTIONS.get(id, {})))


def state(model) -> dict:
    """All that a method could leave behind."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "flags": [
            {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str)} for m in model.modules()
        ],
        "gradients": [(p.grad is None, p.requires_grad) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["hooks"] == after["hooks"]
    assert before["flags"] == after["flags"]
    assert before["gradients"] == after["gradients"]
    assert torch.equal(before["random"], after["random"])
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after["weights"].items())


def one_sentence(error: pytest.ExceptionInfo) -> None:
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert len(message) > 20


@pytest.fixture(scope="module")
def variants():
    return {name: variant(name) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("id", ENTRIES)
def test_architectures(id, name, variants, proof):
    """Every architecture is explained, alone as in a batch and without a trace, or refused in one sentence."""
    model = variants[name]
    x = pictures(model, 3)
    kept, before = x.clone(), state(model)
    try:
        batch = explained(id, model, x)
    except UnsupportedModel:
        with pytest.raises(UnsupportedModel) as error:
            explained(id, model, x)
        one_sentence(error)
        assert name != "vit_tiny_patch16_224" or ENTRIES[id].model != "glyph", "a plain ViT must be explained"
        assert_same(before, state(model))
        return
    assert_same(before, state(model))
    assert torch.equal(x, kept)
    if "heatmap" in batch:
        assert batch["heatmap"].shape == (3, *model.patch_embed.grid_size)
    alone = [explained(id, model, image[None]) for image in x]
    errors = [0.0]
    for field, values in batch.items():
        assert values.isfinite().all()
        assert not values.requires_grad
        singles = torch.cat([single[field] for single in alone])
        if values.is_floating_point():
            assert values.dtype == x.dtype
            errors.append(float((values - singles).abs().max() / values.abs().max().clamp(min=1e-12)))
        else:
            assert torch.equal(values, singles)
    assert batch[of(batch)].abs().max() > 0
    proof(id, f"a batch of three equals three singles: {name}", max(errors), at_most=1e-9, kind="contract")


@pytest.mark.parametrize("name", ["glyph", "photo"])
@pytest.mark.parametrize("id", [id for id, entry in ENTRIES.items() if entry.model == "glyph"])
def test_bundled_models(id, name, proof):
    loaded = models.load(name)
    side = {"glyph": 14, "photo": 16}[name]
    x = pictures(loaded.model)
    options = {"occlusion": {"window": side - 2}}.get(id, OPTIONS.get(id, {}))
    before = state(loaded.model)
    found = tensors(vitx.load(id)(loaded.model, x, **options))
    assert_same(before, state(loaded.model))
    batch, field = found[of(found)], of(found)
    assert field == "logits" or batch.shape == (2, side, side)
    alone = torch.cat([tensors(vitx.load(id)(loaded.model, image[None], **options))[field] for image in x])
    error = (batch - alone).abs().max() / batch.abs().max()
    # Single precision: products of other shapes round differently, and a softmax or an eigenvector magnifies it.
    proof(id, f"a batch of two equals two singles, float32: {name}", error, at_most=2e-3, kind="contract")


@pytest.mark.parametrize("id", [id for id, entry in ENTRIES.items() if entry.model != "glyph"])
def test_own_models(id, proof):
    """A method that brings its own model leaves it as it was, and explains a batch as it does each picture."""
    loaded = models.load(ENTRIES[id].model)
    from vitx import glyphs

    x = glyphs.normalise(glyphs.scenes(3, seed=5).images)
    before = state(loaded.model)
    batch = explained(id, loaded.model, x)
    assert_same(before, state(loaded.model))
    field = of(batch)
    assert field == "logits" or batch[field].shape == (3, 14, 14)
    alone = torch.cat([explained(id, loaded.model, image[None])[field] for image in x])
    error = (batch[field] - alone).abs().max() / batch[field].abs().max()
    proof(
        id, f"a batch of three equals three singles, float32: {ENTRIES[id].model}", error, at_most=2e-3, kind="contract"
    )


PLAIN = [id for id, entry in ENTRIES.items() if entry.model == "glyph" and entry.output != "units"]


@pytest.mark.parametrize("id", PLAIN)
def test_target(id, variants, proof):
    """None is the predicted class; a class-specific map depends on the class, another does not."""
    model = variants["vit_tiny_patch16_224"]
    x = pictures(model)
    predicted = model(x).argmax(-1)
    default = explained(id, model, x)["heatmap"]
    assert torch.equal(default, explained(id, model, x, predicted)["heatmap"])
    other = explained(id, model, x, (predicted + 1) % 7)["heatmap"]
    change = float((default - other).abs().max() / default.abs().max())
    if ENTRIES[id].class_specific:
        proof(id, "another class gives another map", change, at_least=1e-3, kind="contract")
        for bad in ([0, 7], [-1, 0], [0]):
            with pytest.raises(
                ValueError, match=r"out of range: the model has classes 0 to 6|one class index for each"
            ) as error:
                explained(id, model, x, torch.tensor(bad))
            one_sentence(error)
    else:
        assert change == 0


@pytest.mark.parametrize("id", PLAIN)
def test_target_made_in_inference_mode(id, variants):
    model = variants["vit_tiny_patch16_224"]
    x = pictures(model, 1)
    with torch.inference_mode():
        target = model(x).argmax(-1)
    assert explained(id, model, x, target)["heatmap"].shape == (1, 4, 4)


@pytest.mark.parametrize("id", PLAIN)
def test_frozen_weights_and_no_grad(id, variants):
    model = variants["vit_tiny_patch16_224"]
    x = pictures(model)
    expected = explained(id, model, x)["heatmap"]
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(explained(id, frozen, x)["heatmap"], expected)


@pytest.mark.parametrize("id", PLAIN)
def test_randomising_the_weights_changes_the_map(id, proof):
    """Sanity check of Adebayo et al. 2018: a map that survives random weights explains the picture, not the model."""
    loaded = models.load("glyph")
    from vitx import glyphs

    x = glyphs.normalise(glyphs.scenes(8, seed=77).images)
    target = loaded.model(x).argmax(-1)
    trained = explained(id, loaded.model, x, target)["heatmap"].flatten(1)
    other = copy.deepcopy(loaded.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other.init_weights()  # pyright: ignore[reportCallIssue]
    random = explained(id, other, x, target)["heatmap"].flatten(1)
    ranks = [m.argsort(1).argsort(1).double() for m in (trained, random)]
    ranks = [(r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True) for r in ranks]
    correlation = (ranks[0] * ranks[1]).mean(1).abs().mean()
    what = "rank correlation with the map of a model with random weights"
    proof(id, what, correlation, at_most=0.75, kind="sanity", oracle="8 glyph scenes")


@pytest.mark.parametrize("id", PLAIN)
def test_what_is_refused(id, variants):
    model = variants["vit_tiny_patch16_224"]
    x = pictures(model)
    explain = vitx.load(id)
    with pytest.raises(UnsupportedModel, match="ResNet is not a timm VisionTransformer") as error:
        explain(timm.create_model("resnet18", pretrained=False).eval(), torch.zeros(1, 3, 64, 64))
    one_sentence(error)
    broken = x.clone()
    broken[1, 0, 3, 3] = torch.nan
    for bad, reason in (
        (broken, "picture 1 of images holds NaN"),
        (x.float(), "images are torch.float32"),
        (x[:, :, :32], "reads pictures of 64 x 64 pixels, not 32 x 64"),
        (x[0], "must have shape"),
        (x[:0], "with B at least 1"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            explain(model, bad)
        one_sentence(error)
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.blocks[2].attn.qkv.weight[5, 5] = torch.nan
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in spoilt.modules()]
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.qkv\.weight of the model holds NaN") as error:
        explain(spoilt, x, **OPTIONS.get(id, {}))
    one_sentence(error)
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in spoilt.modules()]
    with pytest.raises(ValueError, match="training mode"):
        explain(copy.deepcopy(model).train(), x)


@pytest.mark.parametrize("id", ENTRIES)
def test_form(id):
    """Percent format, liftable imports, a demo that import does not run, and the section on departures."""
    source = (ATLAS / str(ENTRIES[id].snippet)).read_text()
    tree = ast.parse(source)
    assert source.startswith("# %% [markdown]\n# # "), "the first cell holds the title"
    assert "# ## Where this departs from the paper\n" in source
    assert f"`{id}`" in source, "the text names the catalogue id"
    assert ast.get_docstring(tree) is None
    assert "__file__" not in source
    body = [node for node in tree.body if not isinstance(node, ast.If)]
    demo = tree.body[-1]
    assert isinstance(demo, ast.If)
    assert ast.unparse(demo.test) == "__name__ == '__main__'"
    for node in body:
        for inner in ast.walk(node):
            names = []
            if isinstance(inner, ast.Import):
                names = [alias.name for alias in inner.names]
            elif isinstance(inner, ast.ImportFrom):
                names = [str(inner.module)]
            for name in names:
                assert name in IMPORTS or name.split(".")[0] in IMPORTS, f"{id} imports {name} above its demo"
    explain = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "explain")
    assert [argument.arg for argument in explain.args.args][:3] == ["model", "images", "target"]
    documentation = ast.get_docstring(explain) or ""
    for word in ("Args:", "Returns:", "Raises:", "Source:"):
        assert word in documentation
