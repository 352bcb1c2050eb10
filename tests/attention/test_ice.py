"""ICE: patches that are asked one by one, against loops, and its two losses against the authors' formula."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    close_to_card,
    layer_norm,
    pictures,
    read_back,
    relative_error,
    tiny,
    twin_block,
    twin_forward,
    twin_tokens,
    weights,
)
from vitx import load_module
from vitx.vit import UnsupportedModel

ID = "ice"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def ice_model(depth: int = 2) -> Any:
    """A rough ICE model of 4 x 6 patches, five classes and background, whose patches disagree."""
    plain = tiny(depth, img_size=(32, 48))
    model = snippet.IceTransformer(5, **(BACKBONE | {"depth": depth})).double().eval()
    state = {key: value for key, value in plain.state_dict().items() if not key.startswith(("head", "norm."))}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        model.patch_head.weight.copy_(noise)
    return model


def softmax(row: np.ndarray) -> np.ndarray:
    powers = [math.exp(value - row.max()) for value in row]
    return np.array(powers) / sum(powers)


def twin(model: Any, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every patch (P, K + 1) and logits (K,) of an ICE model, patch by patch."""
    w, stream = weights(model), twin_tokens(model, image)
    for index in range(len(model.blocks)):
        stream = twin_block(model, index, stream)["output"]
    scores = np.stack([w["patch_head.weight"] @ token for token in stream[1:]])
    kept = [row for row in scores if row.argmax() != 5]
    return scores, sum(kept, np.zeros(6))[:5] / (len(kept) + 1)


@pytest.mark.parametrize("depth", [2, 3])
def test_an_ice_model_in_plain_loops(depth, proof):
    model, errors = ice_model(depth), []
    x = pictures(tiny(2, img_size=(32, 48)))
    found = snippet.explain(model, x, torch.tensor([3, 0]))
    for index, (image, target) in enumerate(zip(x, (3, 0), strict=True)):
        scores, logits = twin(model, image)
        assert found.classes[index].flatten().tolist() == [int(row.argmax()) for row in scores]
        errors.append(relative_error(found.scores[index].flatten(0, 1), scores))
        errors.append(relative_error(found.relevance[index].flatten(), [softmax(row)[target] for row in scores]))
        errors.append(relative_error(model(image[None])[0].detach(), logits))
    assert len(found.classes.unique()) > 2  # else there would be nothing to tell apart
    oracle = "transformer, head and foreground in plain loops"
    proof(ID, f"an ICE model, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_stock_model_in_plain_loops(depth, proof):
    model, errors = tiny(depth, img_size=(32, 48)), []
    x, w = pictures(model), weights(model)
    found = snippet.explain(model, x, torch.tensor([3, 0]))
    for index, (image, target) in enumerate(zip(x, (3, 0), strict=True)):
        tokens = layer_norm(twin_forward(model, image)[0][-1]["output"], w["norm.weight"], w["norm.bias"])[1:]
        theirs = [softmax(w["head.weight"] @ token + w["head.bias"])[target] for token in tokens]
        errors.append(relative_error(found.heatmap()[index].flatten(), theirs))
    oracle = "transformer and head in plain loops"
    proof(ID, f"a stock model, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_average_pooling_is_the_mean_of_its_patches(proof):
    """Without a norm after pooling the head is linear, so the picture's logits are the mean of the patches'."""
    model = tiny(2, img_size=(32, 48), class_token=False, global_pool="avg", fc_norm=False)
    x = pictures(model)
    error = relative_error(snippet.explain(model, x).scores.mean((1, 2)), model(x).detach())
    proof(ID, "average pooling: logits are the mean of the patches'", error, at_most=1e-12, kind="closed form")


def test_probabilities_of_all_classes_and_background_sum_to_one(proof):
    model = ice_model()
    x = pictures(tiny(2, img_size=(32, 48)), 1).expand(5, -1, -1, -1)
    of_classes = snippet.explain(model, x, torch.arange(5)).relevance.sum(0)
    of_background = snippet.explain(model, x[:1]).scores.softmax(-1)[0, ..., 5]
    error = (of_classes + of_background - 1).abs().max()
    proof(ID, "classes and background of a patch sum to one", error, at_most=1e-12, kind="closed form")


def published_loss(patch: torch.Tensor, wanted: torch.Tensor) -> float:
    """The objective as the paper's authors wrote it down, in loops: wanted (B, K)."""
    total, spread, foreground = 0.0, 0.0, 0
    batch, patches, width = patch.shape
    for rows, goal in zip(patch.tolist(), wanted.tolist(), strict=True):
        mean, kept = [0.0] * width, 0
        for row in rows:
            if max(range(width), key=lambda k: row[k]) != width - 1:
                mean, kept = [m + value for m, value in zip(mean, row, strict=True)], kept + 1
        foreground += kept
        mean = [m / (kept + 1) for m in mean]
        whole = math.log(sum(math.exp(m) for m in mean))
        total += sum(g * (whole - m) for g, m in zip([*goal, 0.0], mean, strict=True))
        everywhere = [0.5 * sum(row[k] for row in rows) / patches for k in range(width)]
        spread += math.log(sum(math.exp(e) for e in everywhere)) - everywhere[-1]
    weight = 0.0 if foreground / (batch * patches) < 0.1 else 0.025
    return (total + weight * spread) / batch


@pytest.mark.parametrize("lift", [-3.0, 0.0, 3.0, 9.0])
def test_the_losses_are_the_published_ones(lift, proof):
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)
    scores[..., 5] += lift  # from hardly any background to nothing else
    wanted = torch.rand(3, 5, generator=generator, dtype=torch.float64).softmax(1)
    theirs = published_loss(scores, wanted)
    error = abs(float(snippet.ice_loss(scores, wanted)) - theirs) / theirs
    proof(ID, f"loss, background scores raised by {lift:g}", error, at_most=1e-12, kind="parity", oracle="loops")


def test_the_two_losses_pull_against_each_other():
    """One step down the gradient lowers the background's score where only the first counts, and raises it by both."""
    scores = torch.zeros(1, 10, 4, dtype=torch.float64)
    scores[..., 0] = 1.0
    wanted = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    slopes = []
    for weight in (0.0, 10.0):
        leaf = scores.clone().requires_grad_()
        (slope,) = torch.autograd.grad(snippet.ice_loss(leaf, wanted, weight=weight), leaf)
        slopes.append(float(slope[..., -1].sum()))
    assert slopes[0] > 0 > slopes[1]


def test_the_class_asked_about():
    """None is the class that the model names; another has another map; one that is not there is refused."""
    model, x = ice_model(), pictures(tiny(2, img_size=(32, 48)))
    predicted = model(x).argmax(-1)
    default = snippet.explain(model, x).relevance
    assert torch.equal(default, snippet.explain(model, x, predicted).relevance)
    assert not torch.allclose(default, snippet.explain(model, x, (predicted + 1) % 5).relevance)
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):  # 5 is the background
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_a_head_that_reads_no_single_token_is_refused():
    model = tiny(2, global_pool="max")
    with pytest.raises(UnsupportedModel, match="global_pool='max'"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = ice_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    x = pictures(tiny(2, img_size=(32, 48))).float()
    assert torch.equal(again(x), model(x))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("ice-glyph", monkeypatch, within=0.05)
    for creatures in (1, 2):
        what = f"foreground against the true creatures, {creatures} in a scene: IoU"
        value = measured[f"foreground_iou_{creatures}"]
        proof(ID, what, value, at_least=0.4, kind="ground truth", oracle="200 glyph scenes")
