"""CLIP Surgery: equal to both surgeries in plain loops; the creature that the caption names stands out."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    REFUSED_CAPTIONS,
    TWO_TOWER,
    area_under_curve,
    layer_norm,
    pictures,
    relative_error,
    scenes_of_two,
    tiny_two_tower,
    twin_block,
    twin_tokens,
    weights,
)
from vitx import load_module
from vitx.vit import UnsupportedModel

ID = "clip-surgery"
snippet = load_module(ID)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def text_vectors(model: Any, captions: list[str]) -> np.ndarray:
    with torch.no_grad():
        return unit(model.text(model.text.tokenize(captions)).numpy())


# --- both surgeries in plain loops -----------------------------------------------------------------------------------


def twin_features(model: Any, image: torch.Tensor, layers: int) -> np.ndarray:
    """F (N, E): unit vectors, the class token's from the original path and the patches' from the second."""
    tower, x = model.image, twin_tokens(model.image, image)
    w, depth, second = weights(tower), len(model.image.blocks), None
    for index in range(depth):
        record = twin_block(tower, index, x)
        if index == depth - layers:
            second = x
        if second is not None:
            width = x.shape[1] // 2
            mixed = np.zeros_like(x)
            for m in range(2):
                v = record["qkv"][:, 2 * x.shape[1] + m * width : 2 * x.shape[1] + (m + 1) * width]
                for i in range(len(x)):
                    powers = [math.exp(float(v[i] @ v[j]) / math.sqrt(width)) for j in range(len(x))]
                    for j in range(len(x)):
                        mixed[i, m * width : (m + 1) * width] += powers[j] / sum(powers) * v[j]
            name = f"blocks.{index}.attn.proj"
            second = second + mixed @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        x = record["output"]
    final = x if second is None else np.concatenate([x[:1], second[1:]])
    return unit(layer_norm(final, w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"])


def twin_surgery(F: np.ndarray, T: np.ndarray) -> np.ndarray:
    """S (N, K), channel by channel."""
    powers = [math.exp(2 * float(F[0] @ t)) for t in T]
    p = [power / sum(powers) for power in powers]
    w = [value / (sum(p) / len(p)) for value in p]
    S = np.zeros((len(F), len(T)))
    for i, c in np.ndindex(F.shape):
        products = [w[a] * F[i, c] * T[a, c] for a in range(len(T))]
        for a in range(len(T)):
            S[i, a] += products[a] - sum(products) / len(T)
    return S


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_equals_both_surgeries_in_plain_loops(layers, proof):
    model = tiny_two_tower()
    x = pictures(model.image, 2)
    labels = ["a cat", "blue", "a red dog", "dog"]
    T = text_vectors(model, labels)
    errors = []
    for a, caption in enumerate(labels):
        found = snippet.explain(model, x, [caption] * 2, layers=layers, labels=labels)
        for row in range(2):
            S = twin_surgery(twin_features(model, x[row], layers), T)
            errors.append(relative_error(found[row].flatten(), S[1:, a]))
    what = f"map with {layers} layers of value-value attention"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="the authors' algorithm in plain loops")


def test_each_surgery_alone_in_plain_loops(proof):
    model = tiny_two_tower()
    x = pictures(model.image, 1)
    F, t = twin_features(model, x[0], 2), text_vectors(model, ["a blue dog"])[0]
    nothing = text_vectors(model, [""])[0]
    for redundant, truth in (("none", F @ t), ("empty", F @ (t - nothing))):
        found = snippet.explain(model, x, ["a blue dog"], layers=2, redundant=redundant)
        error = relative_error(found[0].flatten(), truth[1:])
        what = f"map with redundant={redundant}"
        proof(ID, what, error, at_most=1e-9, kind="parity", oracle="the authors' algorithm in plain loops")


def test_half_of_the_blocks_have_a_second_path_by_default():
    model = tiny_two_tower(5)
    x = pictures(model.image, 1)
    assert torch.equal(snippet.explain(model, x), snippet.explain(model, x, layers=2))


# --- what must hold --------------------------------------------------------------------------------------------------


def test_the_maps_of_a_label_set_sum_to_zero(proof):
    """What all labels share has been taken away from each."""
    model = tiny_two_tower()
    x = pictures(model.image, 3)
    maps = torch.stack([snippet.explain(model, x, torch.full((3,), index)) for index in range(3)])
    error = maps.sum(0).abs().max() / maps.abs().max()
    proof(ID, "sum of the maps of all labels, over the largest value", error, at_most=1e-12, kind="closed form")


def test_with_nothing_cut_it_is_the_raw_similarity_map(proof):
    model = tiny_two_tower()
    x = pictures(model.image, 3)
    with torch.no_grad():
        vectors = model.image.head(model.image.forward_features(x))
        text = model.text(model.class_tokens[[2, 0, 1]])
        raw = torch.cosine_similarity(vectors, text[:, None], dim=-1)[:, 1:]
    found = snippet.explain(model, x, torch.tensor([2, 0, 1]), layers=0, redundant="none")
    error = relative_error(found.flatten(1), raw)
    proof(ID, "layers=0, redundant=none: cosine of patch and caption", error, at_most=1e-12, kind="closed form")


def test_the_original_path_is_untouched():
    model = tiny_two_tower(init_values=0.3)
    x = pictures(model.image, 2)
    with torch.no_grad():
        tokens = snippet.surgery_tokens(model.image, x, 2)
        torch.testing.assert_close(model.image.norm(tokens)[:, 0], model.image.forward_features(x)[:, 0])


def test_value_attention_takes_no_notice_of_queries_and_keys():
    model = tiny_two_tower()
    x = pictures(model.image, 1)
    before = snippet.explain(model, x, ["dog"], layers=1, redundant="none")
    with torch.no_grad():
        model.image.blocks[-1].attn.qkv.weight[:16] += 1  # queries and keys of the last block
        model.image.blocks[-1].mlp.fc2.weight += 1
    torch.testing.assert_close(snippet.explain(model, x, ["dog"], layers=1, redundant="none"), before)
    changed = snippet.explain(model, x, ["dog"], layers=1)  # the class token weights the labels
    assert not torch.allclose(changed, before)


def test_a_caption_of_the_label_set_is_counted_once():
    model = tiny_two_tower()
    x = pictures(model.image, 2)
    by_class = snippet.explain(model, x, torch.tensor([2, 1]))
    captions = [TWO_TOWER[2], TWO_TOWER[1]]
    assert torch.equal(by_class, snippet.explain(model, x, captions))
    torch.testing.assert_close(by_class, snippet.explain(model, x, captions, labels=list(TWO_TOWER[::-1])))
    with_new = snippet.explain(model, x, ["blue", "blue"])
    torch.testing.assert_close(with_new, snippet.explain(model, x, ["blue", "blue"], labels=[*TWO_TOWER, "blue"]))
    best = model(x).argmax(1)
    assert torch.equal(snippet.explain(model, x), snippet.explain(model, x, best))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("redundant", ["labels", "empty", "none"])
def test_contract(redundant, dtype):
    model = tiny_two_tower(reg_tokens=2).to(dtype)
    x = pictures(model.image, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    captions = ["a red cat", "dog", "a blue red blue dog"]
    found = snippet.explain(model, x, captions, redundant=redundant)
    assert found.shape == (3, 2, 3)
    assert found.dtype == dtype
    assert not found.requires_grad
    for row in range(3):
        alone = snippet.explain(model, x[row : row + 1], captions[row : row + 1], redundant=redundant)
        torch.testing.assert_close(alone[0], found[row], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        *((target, {}, message) for target, message in REFUSED_CAPTIONS),
        (None, {"layers": 4}, "layers must lie between 0 and 3"),
        (None, {"redundant": "all"}, "redundant is"),
    ],
)
def test_what_is_refused(target, options, message):
    model = tiny_two_tower()
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), target, **options)


def test_other_models_are_refused():
    model = tiny_two_tower()
    with pytest.raises(UnsupportedModel, match="VisionTransformer has no text tower"):
        snippet.explain(model.image, pictures(model.image, 1))
    average = tiny_two_tower(global_pool="avg", class_token=True)
    with pytest.raises(UnsupportedModel, match="not its class token"):
        snippet.explain(average, pictures(average.image, 1))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return scenes_of_two(60)


def favours(maps: torch.Tensor, named: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n,) bool: the mean over the named creature's patches is higher than over the other's."""
    maps = maps.flatten(1)
    return (maps * named).sum(1) / named.sum(1) > (maps * other).sum(1) / other.sum(1)


def test_the_creature_that_the_caption_names_stands_out(world, proof):
    model, images, labels, named, other = world
    raw = snippet.explain(model, images, labels, layers=0, redundant="none")
    first = snippet.explain(model, images, labels, redundant="none")
    maps = snippet.explain(model, images, labels)
    oracle = "60 glyph scenes of two creatures, each asked for"
    what = "captions whose map favours the named creature (chance 0.5)"
    proof(ID, what, favours(maps, named, other).float().mean(), at_least=0.9, kind="ground truth", oracle=oracle)
    hit = named.gather(1, maps.flatten(1).argmax(1, keepdim=True)).float().mean()
    what = f"captions whose highest patch is on the named creature (chance {float(named.float().mean()):.2f})"
    proof(ID, what, hit, at_least=0.6, kind="ground truth", oracle=oracle)
    areas = [float(area_under_curve(one, named).mean()) for one in (raw, first, maps)]
    what = "area under the ROC curve of the named creature's patches (chance 0.5)"
    proof(ID, what, areas[2], at_least=0.6, kind="ground truth", oracle=oracle)
    what = "the same, less that of the raw similarity map: architecture surgery alone"
    proof(ID, what, areas[1] - areas[0], at_least=0.08, kind="ground truth", oracle=oracle)
    what = "the same, less that of the raw similarity map: both surgeries"
    proof(ID, what, areas[2] - areas[0], at_least=0.15, kind="ground truth", oracle=oracle)


def test_the_raw_map_of_this_model_is_opposite_too(world, proof):
    """The fault that the paper mends: the background is more similar to the caption than the creatures are."""
    model, images, labels, named, other = world
    raw = snippet.explain(model, images, labels, layers=0, redundant="none")
    what = "raw similarity map: area under the ROC curve of the patches of both creatures (chance 0.5)"
    oracle = "60 glyph scenes of two creatures, each asked for"
    proof(ID, what, area_under_curve(raw, named | other).mean(), at_most=0.45, kind="ground truth", oracle=oracle)
