"""TS-CAM: attention times semantic map, against loops; its box against the true one."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    layer_norm,
    masks_of_both,
    peaks_on_its_own,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    twin_block,
    twin_tokens,
    weakly_supervised,
    weights,
)
from scipy.signal import correlate
from vitx import load_module, models
from vitx.vit import UnsupportedModel

ID = "ts-cam"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def rough_model(depth: int = 2) -> Any:
    """4 x 6 patches, two heads, five classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.SemanticTransformer(5, **(BACKBONE | {"depth": depth})), 4)


def twin(model: Any, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Attention (4, 6) and semantic maps (5, 4, 6) of one picture."""
    w, stream, attention = weights(model), twin_tokens(model, image), np.zeros(24)
    for index in range(len(model.blocks)):
        record = twin_block(model, index, stream)
        stream = record["output"]
        for p in range(24):
            attention[p] += (record["attention"][0, 0, 1 + p] + record["attention"][1, 0, 1 + p]) / 2
    patches = layer_norm(stream, w["norm.weight"], w["norm.bias"])[1:]
    framed = np.zeros((8, 6, 8))  # a frame of zeros
    for p in range(24):
        framed[:, 1 + p // 6, 1 + p % 6] = patches[p]
    kernels, bias = w["semantic_head.weight"], w["semantic_head.bias"]
    semantic = [correlate(framed, kernel, mode="valid")[0] + b for kernel, b in zip(kernels, bias, strict=True)]
    return attention.reshape(4, 6), np.stack(semantic)


@pytest.mark.parametrize("depth", [2, 3])
def test_in_plain_loops(depth, proof):
    model, errors = rough_model(depth), []
    x, targets = pictures(tiny(2, img_size=(32, 48))), (3, 0)
    ours = snippet.explain(model, x, torch.tensor(targets))
    for index, (image, target) in enumerate(zip(x, targets, strict=True)):
        attention, semantic = twin(model, image)
        errors.append(relative_error(ours[index], attention * semantic[target]))
        errors.append(relative_error(model(image[None])[0].detach(), semantic.mean((1, 2))))
    oracle = "transformer in plain loops, scipy.signal.correlate"
    proof(ID, f"map and logits, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_uniform_attention_leaves_the_semantic_map(proof):
    """With queries and keys of zero every token attends to all 25 alike: the product is S times 2 / 25."""
    model = rough_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
            block.attn.qkv.bias[:16] = 0
    x = pictures(tiny(2, img_size=(32, 48)))
    target = torch.tensor([1, 4])
    semantic = snippet.branches(model, x).semantic[torch.arange(2), target]
    error = relative_error(snippet.explain(model, x, target), semantic * 2 / 25)
    proof(ID, "uniform attention: the semantic map times layers over tokens", error, at_most=1e-12, kind="closed form")


def test_the_class_asked_about():
    model, x = rough_model(), pictures(tiny(2, img_size=(32, 48)))
    predicted = model(x).argmax(-1)
    default = snippet.explain(model, x)
    assert torch.equal(default, snippet.explain(model, x, predicted))
    assert not torch.allclose(default, snippet.explain(model, x, (predicted + 1) % 5))
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match="no semantic head"):
        snippet.explain(tiny(1), pictures(tiny(1)))


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    x = pictures(tiny(2, img_size=(32, 48))).float()
    assert torch.equal(again(x), model(x))


# --- boxes ---------------------------------------------------------------------------------------------------------


def test_the_box_of_the_largest_part():
    """At the size of the map nothing is interpolated, so the parts above the threshold are known."""
    maps = torch.full((1, 6, 8), -1.0)
    maps[0, 1:3, 2:5] = 3.0  # six cells
    maps[0, 4, 6] = 9.0  # one cell, the strongest
    maps[0, 5, 0] = 0.9  # at 0.19 of the range
    found = snippet.outline(maps, (6, 8), 0.2)
    assert found.box.tolist() == [[2, 1, 5, 3]]
    assert found.mask.sum() == 6
    assert snippet.outline(maps, (6, 8), 0.5).box.tolist() == [[6, 4, 7, 5]]
    assert snippet.outline(3 * maps + 7, (6, 8), 0.2).box.tolist() == [[2, 1, 5, 3]]  # scale and offset do not matter


def test_what_outlines_nothing_is_refused():
    with pytest.raises(ValueError, match="threshold must be at least 0 and below 1"):
        snippet.outline(torch.rand(1, 4, 4), (8, 8), 1.0)
    with pytest.raises(ValueError, match="outlines nothing"):
        snippet.outline(torch.ones(1, 4, 4), (8, 8), 0.1)


def test_the_box_is_that_of_the_map():
    model, x = rough_model(), pictures(tiny(2, img_size=(32, 48)))
    target = torch.tensor([2, 2])
    found = snippet.localise(model, x, target, threshold=0.6)
    expected = snippet.outline(snippet.explain(model, x, target), (32, 48), 0.6)
    assert torch.equal(found.box, expected.box)
    for mask, (left, top, right, bottom) in zip(found.mask, found.box.tolist(), strict=True):
        assert mask.sum() == mask[top:bottom, left:right].sum()


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = weakly_supervised(ID, monkeypatch)
    masks_of_both(ID, measured, proof, iou=0.4, gain=0.2)
    for creatures in (1, 2):
        what = f"boxes that overlap the true one by half, {creatures} in a scene"
        value = measured[f"box_found_{creatures}"]
        proof(ID, what, value, at_least=0.6, kind="ground truth", oracle="200 glyph scenes")


def test_each_class_is_found_where_it_is(proof):
    """Of two creatures, the map of a class lies on its own: its peak is in its mask, not in the other's."""
    on_own = peaks_on_its_own(snippet.explain, models.load("ts-cam-glyph").model)
    what = "of two creatures, the map peaks on the one asked about"
    proof(ID, what, on_own, at_least=0.7, kind="ground truth", oracle="100 glyph scenes")
