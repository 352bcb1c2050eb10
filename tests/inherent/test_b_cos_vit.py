"""B-cos ViT: the linear map written out as one matrix, its sum, and what the trained model promises."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, tiny, training_script, weights
from safetensors.torch import save_file
from vitx import catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "b-cos-vit"
snippet = load_module(ID)
OPTIONS: dict[str, Any] = {
    "classes": 5,
    "img_size": [24, 16],
    "patch_size": 8,
    "embed_dim": 8,
    "num_heads": 2,
    "hidden": 12,
    "reach": 1,  # less than the largest offset, so that offsets share a value
}


def bcos_model(depth: int = 2, b: float = 2) -> Any:
    """A rough model of 3 x 2 patches and five classes in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.BcosTransformer(**OPTIONS, depth=depth, b=b).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += (0.3 if "norm" in name else 1.0) * torch.randn_like(parameter)
    return model


def bcos_matrix(weight: np.ndarray, x: np.ndarray, b: float) -> np.ndarray:
    """The matrix that a B-cos layer is for one token x, row by row."""
    rows = []
    for w in weight:
        w = w / math.sqrt(sum(value * value for value in w))
        cosine = sum(w * x) / math.sqrt(sum(x * x))
        rows.append(abs(cosine) ** (b - 1) * w)
    return np.stack(rows)


def norm_matrix(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The matrix that LayerNorm without bias is for one token: centring, division by the deviation, weights."""
    centring = np.eye(len(x)) - 1 / len(x)
    return np.diag(weight / math.sqrt(np.var(x) + 1e-5)) @ centring


def each(matrices: list[np.ndarray]) -> np.ndarray:
    """One matrix that applies one of these to each token."""
    rows, columns = matrices[0].shape
    whole = np.zeros((len(matrices) * rows, len(matrices) * columns))
    for i, matrix in enumerate(matrices):
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = matrix
    return whole


def twin(model: Any, image: torch.Tensor, b: float) -> tuple[np.ndarray, np.ndarray]:
    """W(x), (K, 6 H W), as a product of matrices, and x, for one normalised picture of 24 x 16 pixels."""
    w = weights(model)
    colours = image.numpy() * 0.25 + 0.5
    x = np.concatenate([colours, 1 - colours])  # (6, 24, 16)
    index = np.arange(x.size).reshape(x.shape)
    places = [(i, j) for i in range(3) for j in range(2)]
    cut = [index[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten() for i, j in places]
    gather = np.concatenate([np.eye(x.size)[rows] for rows in cut])  # patches one behind the other

    def tokens(matrix: np.ndarray) -> np.ndarray:
        return (matrix @ x.flatten()).reshape(6, -1)

    total = gather
    total = each([bcos_matrix(w["stem.weight"], token, b) for token in tokens(total)]) @ total
    for layer in range(len(model.blocks)):
        name = f"blocks.{layer}."
        normed = each([norm_matrix(w[name + "norm1.weight"], token) for token in tokens(total)]) @ total
        heads = []
        for h in range(2):
            q, k, v = (w[name + "qkv.weight"][8 * part + 4 * h : 8 * part + 4 * h + 4] for part in range(3))
            mixing = np.zeros((6 * 4, 6 * 8))
            for a, (i, j) in enumerate(places):
                query = q @ tokens(normed)[a]
                scores = []
                for c, (m, n) in enumerate(places):
                    row, column = max(-1, min(1, m - i)), max(-1, min(1, n - j))
                    prior = w[name + "prior"][h, row + 1, column + 1]
                    scores.append(math.exp(query @ (k @ tokens(normed)[c]) / 2 + prior))
                for c, score in enumerate(scores):
                    mixing[4 * a : 4 * a + 4, 8 * c : 8 * c + 8] = score / sum(scores) * v
            heads.append(mixing @ normed)
        mixed = np.concatenate([np.concatenate([head[4 * a : 4 * a + 4] for head in heads]) for a in range(6)])
        total = total + each([bcos_matrix(w[name + "proj.weight"], token, b) for token in tokens(mixed)]) @ mixed
        inner = each([norm_matrix(w[name + "norm2.weight"], token) for token in tokens(total)]) @ total
        inner = each([bcos_matrix(w[name + "fc1.weight"], token, b) for token in tokens(inner)]) @ inner
        total = total + each([bcos_matrix(w[name + "fc2.weight"], token, b) for token in tokens(inner)]) @ inner
    total = total.reshape(6, 8, -1).mean(0)
    total = norm_matrix(w["norm.weight"], total @ x.flatten()) @ total
    return bcos_matrix(w["head.weight"], total @ x.flatten(), b) @ total, x


@pytest.mark.parametrize(("depth", "b"), [(1, 2), (2, 2), (2, 1.5), (2, 3)])
def test_the_map_written_out_as_one_matrix(depth, b, proof):
    model, errors = bcos_model(depth, b), []
    x = pictures(tiny(1, img_size=(24, 16)))
    for image in x:
        matrix, colours = twin(model, image, b)
        logits = matrix @ colours.flatten() - math.log(4)
        errors.append(relative_error(model(image[None])[0].detach(), logits))
        for target in range(5):
            found, row = snippet.linear_map(model, image[None], torch.tensor([target]))
            errors.append(relative_error(found[0], colours))
            errors.append(relative_error(row[0].flatten(), matrix[target]))
            contributions = (matrix[target].reshape(6, 24, 16) * colours).sum(0)
            ours = snippet.explain(model, image[None], torch.tensor([target]), pool=None)[0]
            errors.append(relative_error(ours, contributions))
            patches = contributions.reshape(3, 8, 2, 8).sum((1, 3))
            errors.append(relative_error(snippet.explain(model, image[None], torch.tensor([target]))[0], patches))
    oracle = "every layer as a matrix, in plain loops"
    proof(
        ID, f"row of the linear map, depth {depth}, B = {b:g}", max(errors), at_most=1e-9, kind="parity", oracle=oracle
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_contributions_sum_to_the_logit(depth, proof):
    model = bcos_model(depth)
    x = pictures(tiny(1, img_size=(24, 16)), 4)
    logits, errors = model(x).detach(), []
    for target in range(5):
        classes = torch.full((4,), target)
        for pool in ("patch", None):
            total = snippet.explain(model, x, classes, pool=pool).sum((1, 2)) + model.logit_bias
            errors.append(float((total - logits[:, target]).abs().max()))
    what = f"contributions and the constant sum to the logit, depth {depth}"
    proof(ID, what, max(errors), at_most=1e-12, kind="closed form")


def test_contributions_of_the_trained_model_sum_to_the_logit(proof):
    model = models.load("b-cos-vit-glyph").model
    images = glyphs.normalise(glyphs.scenes(16, 800_000, 2).images)
    logits = model(images).detach()
    errors = []
    for rank in (0, 1, 11):
        classes = logits.argsort(-1, descending=True)[:, rank]
        total = snippet.explain(model, images, classes).sum((1, 2)) + model.logit_bias
        errors.append(float((total - logits.gather(1, classes[:, None])[:, 0]).abs().max()))
    what = "contributions and the constant sum to the logit, trained model, float32"
    proof(ID, what, max(errors), at_most=1e-4, kind="closed form", oracle="16 glyph scenes, three classes each")


def test_only_the_direction_of_the_weights_counts():
    model, x = bcos_model(), pictures(tiny(1, img_size=(24, 16)))
    before = model(x)
    with torch.no_grad():
        for layer in (model.stem, model.head, model.blocks[0].proj, model.blocks[1].fc1):
            layer.weight *= 3
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)


def test_a_unit_is_bounded_and_reaches_its_bound_when_aligned(proof):
    """|B-cos(x; w)| <= |x|, with equality where x points the way of w: what drives the alignment."""
    layer = snippet.BcosLinear(6, 4, 2.0).double()
    with torch.no_grad():
        rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        assert (layer(rows).abs() <= rows.norm(dim=1, keepdim=True)).all()
        aligned = layer(2.5 * layer.weight).diagonal()
    error = (aligned - 2.5 * layer.weight.detach().norm(dim=1)).abs().max()
    proof(
        ID, "an aligned input gives a unit its bound, the length of the input", error, at_most=1e-12, kind="closed form"
    )


def test_colours_show_the_row():
    """A row that asks for red alone is red; each colour and its inverse sum to one; opacity is its strength."""
    row = torch.zeros(1, 6, 2, 2)
    row[0, 0] = 2.0  # red, and against neither ...
    row[0, 4:] = 1.0  # ... but for little green and little blue
    row[0, :, 0, 0] *= 0.5
    shown = snippet.colours(row)
    assert torch.equal(shown[0, :3, 1, 1], torch.tensor([1.0, 0.0, 0.0]))
    assert float(shown[0, 3, 0, 0]) == pytest.approx(0.5)
    assert float(shown.max()) <= 1


def test_the_class_asked_about():
    model, x = bcos_model(), pictures(tiny(1, img_size=(24, 16)))
    default = snippet.explain(model, x)
    assert torch.equal(default, snippet.explain(model, x, model(x).argmax(-1)))
    assert not torch.allclose(default, snippet.explain(model, x, (model(x).argmax(-1) + 1) % 5))
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_a_stock_model_is_refused():
    model = tiny(1)
    with pytest.raises(UnsupportedModel, match="not made of B-cos units"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = bcos_model().float()
    save_file(model.state_dict(), tmp_path / "x.safetensors", {"options": json.dumps(OPTIONS | {"depth": 2})})
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    x = pictures(tiny(1, img_size=(24, 16))).float()
    assert not again.training
    assert torch.equal(again(x), model(x))


def test_the_card_holds_on_unseen_scenes(proof):
    script, card = training_script("b_cos_vit_glyph"), catalog.load().models["b-cos-vit-glyph"]
    model = models.load("b-cos-vit-glyph").model
    measured = script.measure_evidence(
        model, snippet.explain, 200, 800_000
    )  # a seed of neither the training nor the card
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.07, name
    oracle = "200 glyph scenes"
    for name, floor in (("pointing_game", 0.6), ("evidence_inside", 0.3), ("evidence_on_the_named_of_two", 0.6)):
        proof(ID, name.replace("_", " "), measured[name], at_least=floor, kind="ground truth", oracle=oracle)
