"""CRATE: its layers in plain loops, its objective by other formulas, and what each trained layer does to it."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_norm, pictures, relative_error, tiny, training_script, weights
from safetensors.torch import save_file
from vitx import catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "crate"
snippet = load_module(ID)
OPTIONS: dict[str, Any] = {"classes": 5, "img_size": [24, 16], "patch_size": 8, "embed_dim": 8, "num_heads": 2}


def crate_model(depth: int = 2) -> Any:
    """A rough model of 3 x 2 patches, two subspaces and five classes in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.CrateTransformer(**OPTIONS, depth=depth).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
    return model


def twin(model: Any, image: torch.Tensor) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Records of all layers, and the logits, of one picture, token by token."""
    w = weights(model)
    z = [w["cls_token"][0, 0]]
    for i in range(3):
        for j in range(2):
            patch = image[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
            token = (w["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
            z.append(slow_norm(token, w["norm_pre.weight"], w["norm_pre.bias"]))
    z, records = np.stack(z) + w["pos_embed"][0], []
    for layer in range(len(model.blocks)):
        p = {n.removeprefix(f"blocks.{layer}."): t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
        before = np.stack([slow_norm(token, p["norm1.weight"], p["norm1.bias"]) for token in z])
        a = 1 / (1 + math.exp(-float(p["compression"])))
        half, attention = (1 - a) * before, np.zeros((2, 7, 7))
        for k in range(2):
            u = p["subspaces.weight"][4 * k : 4 * k + 4].T  # U_k: (d, p)
            for i in range(7):
                powers = [math.exp((u.T @ before[i]) @ (u.T @ before[j]) / 2) for j in range(7)]
                for j in range(7):
                    attention[k, i, j] = powers[j] / sum(powers)
                    half[i] = half[i] + a * attention[k, i, j] * (u @ (u.T @ before[j]))
        d, after = p["dictionary"], []
        for token in half:
            x = slow_norm(token, p["norm2.weight"], p["norm2.bias"])
            after.append(np.maximum(x + 0.1 * d.T @ (x - d @ x) - 0.1 * 0.1, 0))
        z = np.stack(after)
        records.append({"attention": attention, "before": before, "half": half, "after": z})
    return records, w["head.weight"] @ layer_norm(z[0], w["norm.weight"], w["norm.bias"]) + w["head.bias"]


def slow_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weight + bias


def slow_rate(model: Any, layer: int, tokens: np.ndarray, unit: bool = False) -> float:
    """R^c by the N x N matrix of the paper's definition and by eigenvalues, instead of the p x p determinant."""
    total = 0.0
    rows = weights(model)[f"blocks.{layer}.subspaces.weight"]
    for k in range(2):
        y = tokens @ rows[4 * k : 4 * k + 4].T  # (N, p)
        if unit:
            y = np.stack([row / math.sqrt(row @ row) for row in y])
        eigenvalues = np.linalg.eigvalsh(np.eye(len(y)) + 4 / (len(y) * 0.1**2) * y @ y.T)
        total += sum(math.log(value) for value in eigenvalues) / 2
    return total


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_in_plain_loops(depth, proof):
    model, errors = crate_model(depth), []
    x = pictures(tiny(1, img_size=(24, 16)))
    for unit in (False, True):
        found = snippet.explain(model, x, unit=unit)
        for index, image in enumerate(x):
            records, logits = twin(model, image)
            errors.append(relative_error(model(image[None])[0].detach(), logits))
            errors.append(relative_error(found.heads[index].flatten(1), records[-1]["attention"][:, 0, 1:]))
            for layer, record in enumerate(records):
                for side, tokens in enumerate((record["before"], record["half"])):
                    theirs = slow_rate(model, layer, tokens, unit)
                    errors.append(abs(float(found.rate[index, layer, side]) - theirs) / theirs)
                errors.append(abs(float(found.nonzero[index, layer]) - (record["after"] > 0).mean()))
    oracle = "layers in plain loops, coding rate by eigenvalues of the N x N matrix"
    proof(ID, f"layers and their objective, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_any_layer_can_be_shown():
    model, x = crate_model(3), pictures(tiny(1, img_size=(24, 16)))
    for layer in (0, 1, -1):
        found = snippet.explain(model, x, layer=layer).heads[0].flatten(1)
        assert np.allclose(found, twin(model, x[0])[0][layer]["attention"][:, 0, 1:], atol=1e-12)
    with pytest.raises(ValueError, match="layer 3 is out of range: the model has layers 0 to 2"):
        snippet.explain(model, x, layer=3)


def test_the_coding_rate_of_one_direction_is_known(proof):
    """N equal tokens of length s in one subspace of p dimensions: half the logarithm of 1 + p s^2 / epsilon^2."""
    y = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    y[..., 2] = 0.7
    theirs = math.log(1 + 4 * 0.7**2 / 0.1**2) / 2
    error = abs(float(snippet.coding_rate(y)) - theirs) / theirs
    proof(ID, "coding rate of equal tokens", error, at_most=1e-12, kind="closed form")


def block(width: int = 12, heads: int = 3) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return snippet.CrateBlock(width, heads).double()


def test_attention_in_orthogonal_subspaces_lowers_the_rate(proof):
    """With orthonormal bases, U_k' half = U_k' Z ((1 - a) I + a A): a mixture of tokens, which costs fewer bits."""
    layer, worst = block(), 0.0
    with torch.no_grad():
        layer.subspaces.weight.copy_(torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0])
        z = torch.randn(50, 20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        step = layer.steps(z)
        y, half = layer.project(step.before), layer.project(step.half)
        mixed = 0.5 * y + 0.5 * step.attention @ y
        worst = float((snippet.coding_rate(half) / snippet.coding_rate(y)).max())
    error = relative_error(half, mixed)
    proof(ID, "orthonormal subspaces: attention only mixes tokens", error, at_most=1e-12, kind="closed form")
    what = "orthonormal subspaces: rate after attention over the rate before, largest of 50"
    proof(ID, what, worst, at_most=0.999, kind="closed form")


def test_the_attention_step_goes_down_the_gradient(proof):
    """The direction of the step has a negative product with the gradient of R^c, by automatic differentiation."""
    layer = block()
    z = torch.randn(50, 20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = layer.steps(z)
    before = step.before.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(snippet.coding_rate(layer.project(before)).sum(), before)
    along = (gradient * (step.half - step.before)).sum((1, 2)) / gradient.norm(dim=(1, 2))
    along = along / (step.half - step.before).norm(dim=(1, 2))
    what = "cosine of the step with the gradient of the rate, largest of 50"
    proof(ID, what, along.detach().max(), at_most=-0.05, kind="closed form", oracle="torch.autograd")


def test_the_mlp_is_one_step_of_ista(proof):
    """Half a squared error by automatic differentiation, then the proximal map of eta lambda |z|_1 with z >= 0."""
    layer = block()
    with torch.no_grad():
        layer.dictionary /= torch.linalg.matrix_norm(layer.dictionary, 2)
    z = torch.randn(4, 20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = layer.steps(z)
    x = layer.norm2(step.half).detach()
    code = x.clone().requires_grad_()
    error = (x - code @ layer.dictionary.T).square().sum() / 2
    (gradient,) = torch.autograd.grad(error, code)
    theirs = (x - 0.1 * gradient - 0.1 * 0.1).clamp(min=0)
    worst = relative_error(step.after.detach(), theirs)
    proof(ID, "the MLP is a proximal gradient step", worst, at_most=1e-12, kind="parity", oracle="torch.autograd")

    def objective(z: torch.Tensor) -> torch.Tensor:
        return (x - z @ layer.dictionary.T).square().sum((1, 2)) / 2 + 0.1 * z.abs().sum((1, 2))

    falls = float((objective(step.after) / objective(x.clamp(min=0))).max())
    what = "the objective of the sparse code after the step over that of the rectified tokens, largest of 4"
    proof(ID, what, falls, at_most=1, kind="closed form")


def test_the_class_asked_about():
    """The maps are the same for every class; one that is not there is refused."""
    model, x = crate_model(), pictures(tiny(1, img_size=(24, 16)))
    assert torch.equal(snippet.explain(model, x).heads, snippet.explain(model, x, torch.tensor([3, 0])).heads)
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_a_stock_model_is_refused():
    model = tiny(1)
    with pytest.raises(UnsupportedModel, match="no steps of the sparse rate reduction"):
        snippet.explain(model, pictures(model))


def test_crops_take_their_places():
    """Patches with the places of the whole grid are the whole picture."""
    model, x = crate_model(), pictures(tiny(1, img_size=(24, 16)))
    assert torch.equal(model.tokens(x), model.tokens(x, torch.arange(6).expand(2, -1)))


def test_a_file_gives_back_its_model(tmp_path):
    model = crate_model().float()
    save_file(model.state_dict(), tmp_path / "x.safetensors", {"options": json.dumps(OPTIONS | {"depth": 2})})
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    x = pictures(tiny(1, img_size=(24, 16))).float()
    assert not again.training
    assert torch.equal(again(x), model(x))


def test_every_layer_of_the_trained_model_lowers_its_rate(proof):
    model = models.load("crate-glyph").model
    images = glyphs.normalise(glyphs.scenes(100, 800_000, 1).images)
    for unit, name in ((False, "rate"), (True, "rate of tokens of length one")):  # the second falls by mixing alone
        rate = snippet.explain(model, images, unit=unit).rate  # (B, L, 2)
        worst = float((rate[..., 1].mean(0) / rate[..., 0].mean(0)).max())
        what = f"{name} after the attention of a layer over that before, mean of scenes, worst layer"
        proof(ID, what, worst, at_most=1, kind="ground truth", oracle="100 glyph scenes")


def test_the_card_holds_on_unseen_scenes(proof):
    script, card = training_script("crate_glyph"), catalog.load().models["crate-glyph"]
    model = models.load("crate-glyph").model
    measured = script.measure_evidence(model, script.maps, 200, 800_000) | script.layers(model, 200, 800_000)
    for name, value in card.metrics.items():
        assert abs(value - measured[name]) < 0.07, name
    for name, floor in (("pointing_game", 0.5), ("evidence_inside_best_head", 0.25)):
        proof(
            ID, name.replace("_", " "), measured[name], at_least=floor, kind="ground truth", oracle="200 glyph scenes"
        )
