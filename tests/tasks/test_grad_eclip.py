"""Grad-ECLIP: equal to its equation with finite differences, and to the gradient by the attention it replaces."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    REFUSED_CAPTIONS,
    TWO_TOWER,
    area_under_curve,
    pictures,
    relative_error,
    scenes_of_two,
    tiny_two_tower,
    twin_block,
    twin_tokens,
    weights,
)
from scipy.special import erf
from vitx import glyphs, load_module, vit
from vitx.vit import UnsupportedModel

ID = "grad-eclip"
snippet = load_module(ID)
CAPTIONS = ["a red cat", "dog", "a blue red blue dog"]
ORACLE = "the equation in plain loops, gradients by finite differences"


# --- the equation in plain loops -------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(float(x @ x))


def block_of_one_head(w: dict, name: str, x: np.ndarray, causal: bool, nudge=None) -> dict[str, np.ndarray]:
    """One pre-norm block whose attention has one head; ``nudge`` = (row, channel, amount) acts on its output o."""
    normed = layer_norm_of(w, f"{name}.norm1", x)
    q, k, v = np.split(normed @ w[f"{name}.attn.qkv.weight"].T + w[f"{name}.attn.qkv.bias"], 3, 1)
    o = np.zeros_like(x)
    for i in range(len(x)):
        last = i + 1 if causal else len(x)
        powers = [math.exp(float(q[i] @ k[j]) / math.sqrt(x.shape[1])) for j in range(last)]
        for j in range(last):
            o[i] += powers[j] / sum(powers) * v[j]
    if nudge is not None:
        o[nudge[0], nudge[1]] += nudge[2]
    middle = x + o @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
    hidden = layer_norm_of(w, f"{name}.norm2", middle) @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    activated = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    output = middle + activated @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    return {"q": q, "k": k, "v": v, "output": output}


def layer_norm_of(w: dict, name: str, x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return (x - x.mean(-1, keepdims=True)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def twin_map(tower: Any, x: np.ndarray, first: int, row: int, visible: range, causal: bool, other: np.ndarray):
    """Signed maps (layers, N) and S, from the tokens (N, D) at the input of block ``first``."""
    w, depth, epsilon = weights(tower), len(tower.blocks), tower.norm.eps

    def run(at: int = -1, nudge=None) -> tuple[float, list[dict]]:
        tokens, records = x, []
        for index in range(first, depth):
            records.append(block_of_one_head(w, f"blocks.{index}", tokens, causal, nudge if index == at else None))
            tokens = records[-1]["output"]
        vector = layer_norm_of(w, "norm", tokens, epsilon)[row] @ w["head.weight"].T + w["head.bias"]
        return float(unit(vector) @ other), records

    S, records = run()
    maps = []
    for index, record in enumerate(records, first):
        ends = [[run(index, (row, c, step))[0] for step in (1e-5, -1e-5)] for c in range(x.shape[1])]
        w_c = [(up - down) / 2e-5 for up, down in ends]
        cosine = [float(unit(record["q"][row]) @ unit(record["k"][i])) for i in range(len(x))]
        low, high = min(cosine[i] for i in visible), max(cosine[i] for i in visible)
        w_i = [(value - low) / (high - low) for value in cosine]
        maps.append([sum(w_c[c] * w_i[i] * record["v"][i, c] for c in range(x.shape[1])) for i in range(len(x))])
    return np.array(maps), S


def twin_input(model: Any, image: torch.Tensor, layers: int) -> np.ndarray:
    """Tokens (N, D) at the input of the last layers; those below keep their heads."""
    x = twin_tokens(model.image, image)
    for index in range(len(model.image.blocks) - layers):
        x = twin_block(model.image, index, x)["output"]
    return x


@pytest.mark.parametrize("layers", [1, 2])
def test_the_picture_equals_the_equation_in_plain_loops(layers, proof):
    model = tiny_two_tower(3, 3)
    x = pictures(model.image, 1)
    found = snippet.explain(model, x, ["a red cat"], image_layers=layers)
    with torch.no_grad():
        other = unit(model.text(model.text.tokenize(["a red cat"]))[0].numpy())
    maps, S = twin_map(model.image, twin_input(model, x[0], layers), 3 - layers, 0, range(1, 7), False, other)
    truth = np.maximum(maps, 0).sum(0)[1:]
    error = max(relative_error(found.image.flatten(), truth), abs(float(found.differentiated[0, 0]) - S))
    proof(ID, f"image map of {layers} layers", error, at_most=1e-6, kind="parity", oracle=ORACLE)


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_the_words_equal_the_equation_in_plain_loops(layers, proof):
    model = tiny_two_tower(2, 3)
    x, tokens = pictures(model.image, 1), model.text.tokenize(["a blue dog"])
    found = snippet.explain(model, x, ["a blue dog"], text_layers=layers)
    counted = min(layers, 3)
    with torch.no_grad():
        other = unit(model.image(x)[0].numpy())
        y = model.text.embed(tokens) + model.text.pos_embed[:5]
        mask = torch.full((5, 5), -torch.inf).double().triu(1)
        for block in model.text.blocks[: 3 - counted]:
            y = block(y, attn_mask=mask)
    maps, S = twin_map(model.text, y[0].numpy(), 3 - counted, 4, range(5), True, other)
    truth = np.maximum(maps.sum(0), 0)[1:4]
    error = max(relative_error(found.text[0], truth), abs(float(found.differentiated[0, 1]) - S))
    proof(ID, f"word relevance of {layers} layers", error, at_most=1e-6, kind="parity", oracle=ORACLE)


# --- what must hold --------------------------------------------------------------------------------------------------


def with_one_head(model: Any) -> Any:
    """The model with one head as wide as the tokens in its last picture layer and in its text layers."""
    model = copy.deepcopy(model)
    for block in (model.image.blocks[-1], *model.text.blocks):
        attention: Any = block.attn
        attention.num_heads, attention.head_dim = 1, attention.attn_dim
        attention.scale = attention.attn_dim**-0.5
    return model


def test_it_is_the_gradient_by_the_attention_that_is_loosened(proof):
    """o = sum of A_i v_i, so dS / dA_i = sum over channels of w_c v_ic: only the weight w_i is new."""
    model = with_one_head(tiny_two_tower(2, 3))
    x = pictures(model.image, 3)
    found = snippet.explain(model, x, CAPTIONS)
    tokens = model.text.tokenize(CAPTIONS)
    with torch.enable_grad(), vit.capture(model.image, "attention", "attn.qkv") as record:
        S = torch.cosine_similarity(model.image(x), model.text(tokens).detach())
        (gradient,) = torch.autograd.grad(S.sum(), record["attention"][-1:])
    q, k, _ = record["attn.qkv"][-1].chunk(3, -1)
    cosine = torch.cosine_similarity(q[:, :1], k[:, 1:], dim=-1)
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    truth = (gradient[:, 0, 0, 1:] * (cosine - low) / (high - low)).clamp(min=0)
    error = relative_error(found.image.flatten(1), truth.detach())
    what = "map, and the gradient by the attention weights times the loosened ones"
    proof(ID, what, error, at_most=1e-9, kind="closed form", oracle="autograd through the attention matrix")
    torch.testing.assert_close(found.differentiated[:, 0], S.detach())


def test_one_head_only_matters_where_there_are_more():
    model = tiny_two_tower(2, 3)
    x = pictures(model.image, 3)
    single = with_one_head(model)
    for options in ({"text_layers": 3}, {"projected": True}):
        changed = snippet.explain(model, x, CAPTIONS, **options)
        plain = snippet.explain(single, x, CAPTIONS, one_head=False, **options)
        torch.testing.assert_close(snippet.explain(single, x, CAPTIONS, **options).image, plain.image)
        assert not torch.allclose(changed.image, snippet.explain(model, x, CAPTIONS, one_head=False, **options).image)
    own = snippet.explain(model, x, CAPTIONS, one_head=False)
    torch.testing.assert_close(own.differentiated, own.similarity[:, None].expand(-1, 2))
    assert not torch.allclose(changed.differentiated, changed.similarity[:, None].expand(-1, 2))


def test_projected_queries_and_keys_give_another_map():
    model = tiny_two_tower(2, 3)
    x = pictures(model.image, 1)
    with torch.no_grad():
        model.image.blocks[-1].attn.proj.weight.copy_(torch.eye(8))
        model.image.blocks[-1].attn.proj.bias.zero_()
    plain, projected = (snippet.explain(model, x, ["dog"], projected=value) for value in (False, True))
    torch.testing.assert_close(plain.image, projected.image)
    with torch.no_grad():
        model.image.blocks[-1].attn.proj.bias += 1
    plain, projected = (snippet.explain(model, x, ["dog"], projected=value) for value in (False, True))
    assert not torch.allclose(plain.image, projected.image)


def test_target_by_caption_by_tokens_by_class():
    model = tiny_two_tower(2, 3)
    x = pictures(model.image, 3)
    captions = [TWO_TOWER[2], TWO_TOWER[0], TWO_TOWER[1]]
    by_caption = snippet.explain(model, x, captions)
    by_tokens = snippet.explain(model, x, model.text.tokenize(captions))
    by_class = snippet.explain(model, x, torch.tensor([2, 0, 1]))
    assert by_caption.words == by_class.words == (("a", "red", "dog"), ("a", "cat"), ("a", "dog"))
    for one, other, third in zip(by_caption, by_tokens, by_class, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    best = snippet.explain(model, x)
    assert best.words == tuple(tuple(TWO_TOWER[index].split()) for index in model(x).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contract(dtype):
    model = tiny_two_tower(2, 3, reg_tokens=2).to(dtype).requires_grad_(False)  # frozen towers have gradients too
    x = pictures(model.image, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = snippet.explain(model, x, CAPTIONS)
    assert found.image.shape == (3, 2, 3)
    assert found.text.shape == (3, 5)
    assert found.heatmap() is found.image
    assert found.words == tuple(tuple(caption.split()) for caption in CAPTIONS)
    assert (found.text[0, 3:] == 0).all()
    assert (found.text[1, 1:] == 0).all()
    for tensor in (found.image, found.text, found.similarity, found.differentiated):
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
    assert found.image.min() >= 0
    assert found.text.min() >= 0
    if dtype == torch.float64:
        for row in range(3):
            alone = snippet.explain(model, x[row : row + 1], CAPTIONS[row : row + 1])
            torch.testing.assert_close(alone.image[0], found.image[row])
            torch.testing.assert_close(alone.text[0], found.text[row, : alone.text.shape[1]])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_one_word_and_one_patch_have_a_map():
    """All that is seen is alike, so the scaling from 0 to 1 has nothing to scale."""
    model = tiny_two_tower(2, 3)
    with torch.no_grad():
        model.image.blocks[-1].attn.qkv.weight[8:16] = 0  # all keys are the bias
    found = snippet.explain(model, pictures(model.image, 1), ["dog"])
    assert (found.image == 0).all()
    assert found.text.shape == (1, 1)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        *((target, {}, message) for target, message in REFUSED_CAPTIONS),
        (None, {"image_layers": 0}, "at least one layer of each tower must count"),
    ],
)
def test_what_is_refused(target, options, message):
    model = tiny_two_tower(2, 3)
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), target, **options)


def test_other_models_are_refused():
    model = tiny_two_tower(2, 3)
    with pytest.raises(UnsupportedModel, match="VisionTransformer has no text tower"):
        snippet.explain(model.image, pictures(model.image, 1))
    normed = tiny_two_tower(2, 3, qk_norm=True)
    with pytest.raises(UnsupportedModel, match="without a gate or norms inside"):
        snippet.explain(normed, pictures(normed.image, 1))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return scenes_of_two(40)


@pytest.fixture(scope="module")
def found(world):
    """Explanations with one head and with the model's own."""
    model, images, labels, *_ = world
    return {one_head: snippet.explain(model, images, labels, one_head=one_head) for one_head in (True, False)}


@pytest.mark.parametrize("one_head", [True, False])
def test_the_creature_that_the_caption_names_stands_out(one_head, world, found, proof):
    model, images, labels, named, other = world
    maps = found[one_head].image.flatten(1)
    with torch.no_grad():
        vectors, text = model.image.head(model.image.forward_features(images)), model.text(model.class_tokens[labels])
        raw = torch.cosine_similarity(vectors, text[:, None], dim=-1)[:, 1:]
    oracle = "40 glyph scenes of two creatures, each asked for"
    options = "" if one_head else ", one_head=False"
    share = ((maps * named).sum(1) > (maps * other).sum(1)).float().mean()
    what = f"captions whose map favours the named creature (chance 0.5){options}"
    proof(ID, what, share, at_least=0.85, kind="ground truth", oracle=oracle)
    hit, chance = named.gather(1, maps.argmax(1, keepdim=True)).float().mean(), float(named.float().mean())
    what = f"captions whose most relevant patch is on the named creature (chance {chance:.2f}){options}"
    proof(ID, what, hit, at_least=0.7, kind="ground truth", oracle=oracle)
    what = f"area under the ROC curve of the named creature's patches (chance 0.5){options}"
    proof(ID, what, area_under_curve(maps, named).mean(), at_least=0.62, kind="ground truth", oracle=oracle)
    what = f"the same, less that of the raw similarity map{options}"
    gain = area_under_curve(maps, named).mean() - area_under_curve(raw, named).mean()
    proof(ID, what, gain, at_least=0.15, kind="ground truth", oracle=oracle)


def test_words_that_name_a_part_matter_more_than_filling(found, proof):
    named = {word for names in glyphs.VARIANTS.values() for word in names}
    attribute = torch.tensor([[word in named for word in row] for row in found[True].words])
    ratio = found[True].text[attribute].mean() / found[True].text[~attribute].mean()
    what = "relevance of words that name a variant, over that of the other words"
    proof(ID, what, ratio, at_least=2, kind="ground truth", oracle="80 glyph captions")


def test_one_head_answers_for_another_similarity(found):
    """What the page says: the cosine that is differentiated is not the model's."""
    gap = (found[True].differentiated[:, 0] - found[True].similarity).abs().mean()
    assert 0.08 < gap < 0.17
    assert 0.6 < found[True].similarity.mean() < 0.8
    torch.testing.assert_close(found[False].differentiated[:, 0], found[False].similarity)
