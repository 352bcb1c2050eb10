"""Generic attention for two towers: equal to the equations in plain loops; words and patches that matter are found."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from helpers import REFUSED_CAPTIONS, relative_error
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from vitx import ATLAS, catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "generic-attention-two-tower"
snippet = load_module(ID)
FILE = ATLAS / "snippets" / "models" / "two-tower-glyph.safetensors"
IMAGE: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 12,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 6,
}
TEXT: dict[str, Any] = {
    "words": ("a", "cat", "dog", "red", "blue"),
    "length": 7,
    "width": 8,
    "depth": 2,
    "heads": 2,
    "outputs": 6,
}
CLASSES = ("a cat", "a dog", "a red dog")
CAPTIONS = ["a red cat", "dog", "a blue red blue dog"]


def random_model(seed: int = 0, dtype: torch.dtype = torch.float64):
    """Random biases and large weights: timm's own initialisation hides mistakes."""
    torch.manual_seed(seed)
    model = snippet.TwoTower(VisionTransformer(**IMAGE), snippet.TextTower(**TEXT), CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return model.to(dtype).eval()


def random_images(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- a slow twin of one tower, which also allows one attention weight to be changed -----------------------------------


def tower_in_loops(blocks, x: torch.Tensor, causal: bool, nudge=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens after the blocks (N, D) and the attention of each block (h, N, N), from tokens (N, D)."""
    attention = []
    for layer, block in enumerate(blocks):
        y = block.norm1(x)
        heads, width = block.attn.num_heads, block.attn.head_dim
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, heads, width)).permute(1, 2, 0, 3)  # (h, N, d) each
        weights = torch.zeros(heads, len(x), len(x), dtype=x.dtype)
        for h, i in itertools.product(range(heads), range(len(x))):
            last = i + 1 if causal else len(x)
            exponent = [math.exp(float(q[h, i] @ k[h, j]) / math.sqrt(width)) for j in range(last)]
            weights[h, i, :last] = torch.tensor(exponent, dtype=x.dtype) / sum(exponent)
        if nudge is not None and nudge[0] == layer:
            weights[nudge[1]] += nudge[2]
        attention.append(weights)
        x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return x, attention


@torch.no_grad()
def similarity_in_loops(model, image, tokens, image_nudge=None, text_nudge=None):
    """Similarity of one picture (3, H, W) and one caption (L,); also the attention of both towers."""
    x = model.image._pos_embed(model.image.patch_embed(image[None]))[0]
    x, image_attention = tower_in_loops(model.image.blocks, x, False, image_nudge)
    picture = model.image.head(model.image.norm(x)[0])
    y = model.text.embed(tokens) + model.text.pos_embed[: len(tokens)]
    y, text_attention = tower_in_loops(model.text.blocks, y, True, text_nudge)
    caption = model.text.head(model.text.norm(y)[tokens.tolist().index(1)])
    cosine = float(picture @ caption) / float(picture.norm() * caption.norm())
    return math.exp(float(model.log_scale)) * cosine, image_attention, text_attention


def test_equals_the_equations_in_plain_loops(proof):
    """Equations 5 and 6 with gradients by central differences, entry by entry."""
    model, images = random_model(), random_images(1)
    tokens = model.text.tokenize(["a red cat"])
    found = snippet.explain(model, images, tokens)
    similarity, *attention = similarity_in_loops(model, images[0], tokens[0])
    assert math.isclose(similarity, float(found.similarity), rel_tol=1e-9)

    for tower, layers in enumerate(attention):
        size = layers[0].shape[-1]
        R = torch.eye(size, dtype=torch.float64)
        for layer, A in enumerate(layers):
            A_bar = torch.zeros(size, size, dtype=torch.float64)
            for h, i, j in itertools.product(range(2), range(size), range(size)):
                if tower == 1 and j > i:
                    continue  # masked: its attention is zero
                ends = []
                for step in (1e-5, -1e-5):
                    nudges: list[Any] = [None, None]
                    nudges[tower] = (layer, (h, i, j), step)
                    ends.append(similarity_in_loops(model, images[0], tokens[0], *nudges)[0])
                gradient = (ends[0] - ends[1]) / 2e-5
                A_bar[i, j] += max(gradient * float(A[h, i, j]), 0) / 2
            R = R + A_bar @ R
        if tower == 0:
            what, error = "image map", relative_error(found.image.flatten(), R[0, 1:])
        else:
            what, error = "word relevance", relative_error(found.text[0], R[4, 1:4])
        oracle = "the equations in plain loops, gradients by finite differences"
        proof(ID, what, error, at_most=1e-6, kind="parity", oracle=oracle)


def test_relevance_of_one_layer_without_gradient_is_the_identity():
    A = torch.rand(2, 3, 4, 4, dtype=torch.float64).softmax(-1)
    assert torch.equal(snippet.relevance([A, A], [torch.zeros_like(A)] * 2), torch.eye(4).double().expand(2, 4, 4))
    assert torch.equal(snippet.relevance([A], [-torch.ones_like(A)]), torch.eye(4).double().expand(2, 4, 4))
    torch.testing.assert_close(snippet.relevance([A], [torch.ones_like(A)]), torch.eye(4) + A.mean(1))


def test_text_tower_is_causal_and_blind_to_filling():
    model = random_model()
    short, long = model.text.tokenize(["a cat"]), model.text.tokenize(["a cat", "a red red dog"])[:1]
    torch.testing.assert_close(model.text(short), model.text(long), rtol=1e-12, atol=1e-12)


def test_target_by_caption_by_tokens_by_class():
    model, images = random_model(), random_images()
    by_caption = snippet.explain(model, images, [CLASSES[2], CLASSES[0], CLASSES[1]])
    by_tokens = snippet.explain(model, images, model.text.tokenize([CLASSES[2], CLASSES[0], CLASSES[1]]))
    by_class = snippet.explain(model, images, torch.tensor([2, 0, 1]))
    assert by_caption.words == by_class.words == (("a", "red", "dog"), ("a", "cat"), ("a", "dog"))
    for one, other, third in zip(by_caption, by_tokens, by_class, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    logits = model(images)
    torch.testing.assert_close(by_class.similarity, logits.gather(1, torch.tensor([[2], [0], [1]]))[:, 0])
    best = snippet.explain(model, images)
    assert best.words == tuple(tuple(CLASSES[index].split()) for index in logits.argmax(1))
    torch.testing.assert_close(best.similarity, logits.max(1).values)


def test_start_layer_counts_the_last_layers_only():
    model, images = random_model(), random_images(1)
    tokens = model.text.tokenize(["a red cat"])
    _, image, text = similarity_in_loops(model, images[0], tokens[0])
    last = snippet.explain(model, images, tokens, start_layer=-1)
    # One layer: the map is the class token's row of gradient-weighted attention, so it is at most the gradient's share.
    assert not torch.allclose(last.image, snippet.explain(model, images, tokens).image)
    assert ((last.image.flatten() > 0) <= (image[-1][:, 0, 1:].max(0).values > 0)).all()
    assert ((last.text[0] > 0) <= (text[-1][:, 4, 1:4].max(0).values > 0)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contract(dtype):
    model, images = random_model(dtype=dtype), random_images(dtype=dtype)
    for parameter in model.image.parameters():
        parameter.requires_grad_(False)  # frozen towers have attention gradients too
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = snippet.explain(model, images, CAPTIONS)
    assert found.image.shape == (3, 2, 2)
    assert found.text.shape == (3, 5)
    assert found.heatmap() is found.image
    assert found.words == tuple(tuple(caption.split()) for caption in CAPTIONS)
    assert (found.text[0, 3:] == 0).all()
    assert (found.text[1, 1:] == 0).all()
    for tensor in (found.image, found.text, found.similarity):
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
    if dtype != torch.bfloat16:  # where the order of sums changes too much
        for index in range(3):
            alone = snippet.explain(model, images[index : index + 1], CAPTIONS[index : index + 1])
            torch.testing.assert_close(alone.image[0], found.image[index], rtol=1e-4, atol=1e-5)
            words = alone.text.shape[1]
            torch.testing.assert_close(alone.text[0], found.text[index, :words], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module.training for module in model.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match="VisionTransformer has no text tower"):
        snippet.explain(VisionTransformer(**IMAGE).eval(), random_images(dtype=torch.float32))


@pytest.mark.parametrize(("target", "message"), REFUSED_CAPTIONS)
def test_bad_targets(target, message):
    with pytest.raises(ValueError, match=message):
        snippet.explain(random_model(), random_images(), target)


def test_weights_that_are_not_finite_are_named():
    model, images = random_model(), random_images()
    with torch.no_grad():
        model.text.blocks[0].mlp.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.bias"):
        snippet.explain(model, images, CAPTIONS)


def test_load_pretrained_restores_the_model(tmp_path):
    model = random_model(dtype=torch.float32)
    metadata = {"image": json.dumps(IMAGE), "text": json.dumps(TEXT), "class_captions": json.dumps(CLASSES)}
    save_file(model.state_dict(), tmp_path / "x.safetensors", metadata)
    loaded = snippet.load_pretrained(tmp_path / "x.safetensors")
    images = random_images(dtype=torch.float32)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return models.load("two-tower-glyph").model


@pytest.fixture(scope="module")
def scenes():
    return glyphs.scenes(100, 32)


@pytest.fixture(scope="module")
def found(shipped, scenes):
    return snippet.explain(shipped, glyphs.normalise(scenes.images), glyphs.captions(scenes))


ATTRIBUTES = frozenset(itertools.chain(*glyphs.VARIANTS.values()))


def test_the_card_holds_on_other_scenes(shipped, scenes):
    card = catalog.load().models["two-tower-glyph"]
    captions = [every_caption(variants) for variants in itertools.product(range(3), repeat=5)]
    with torch.no_grad():
        similarity = shipped.similarity(glyphs.normalise(scenes.images), shipped.text.tokenize(captions))
        top1 = shipped(glyphs.normalise(scenes.images)).argmax(-1) == scenes.labels[:, 0]
    retrieved = [captions[index] for index in similarity.argmax(1)]
    exact = sum(a == b for a, b in zip(retrieved, glyphs.captions(scenes), strict=True)) / len(scenes.images)
    for name, value in (("caption_of_243", exact), ("top1", float(top1.float().mean()))):
        expected = card.metrics[name]
        assert abs(value - expected) < 4 * math.sqrt(expected * (1 - expected) / len(scenes.images)) + 0.01, name


def every_caption(variants: tuple[int, ...]) -> str:
    body, crest, tail, eyes, pattern = (
        names[index] for names, index in zip(glyphs.VARIANTS.values(), variants, strict=True)
    )
    return f"a {pattern} {body} {eyes} creature with a {crest} crest and a {tail} tail"


def test_words_that_name_a_part_matter_more_than_filling(found, proof):
    attribute = torch.tensor([[word in ATTRIBUTES for word in row] for row in found.words])  # (B, L)
    named, filling = found.text[attribute].mean(), found.text[~attribute].mean()
    what = "relevance of words that name a variant, over that of the other words"
    proof(ID, what, named / filling, at_least=2, kind="ground truth", oracle="100 glyph captions")
    first = attribute.gather(1, found.text.argmax(1, keepdim=True)).float().mean()
    what = "captions whose most relevant word names a variant"
    proof(ID, what, first, at_least=0.9, kind="ground truth", oracle="100 glyph captions")


def test_swapping_a_word_lowers_the_similarity_and_moves_relevance(shipped, scenes, found):
    images = glyphs.normalise(scenes.images)
    wrong = []
    for row in found.words:
        words = list(row)
        spot = next(i for i, word in enumerate(words) if word in glyphs.VARIANTS["tail"])
        names = glyphs.VARIANTS["tail"]
        words[spot] = names[(names.index(words[spot]) + 1) % 3]
        wrong.append(" ".join(words))
    swapped = snippet.explain(shipped, images, wrong)
    assert (swapped.similarity < found.similarity).float().mean() > 0.9
    spot = torch.tensor([[word in glyphs.VARIANTS["tail"] for word in row] for row in found.words])
    assert swapped.text[spot].mean() < found.text[spot].mean()  # the wrong word no longer supports the match


def test_map_lies_inside_the_creature_more_than_chance(found, scenes, proof):
    inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)) > 0
    share = (found.image * inside).sum((1, 2)) / found.image.sum((1, 2))
    what = "share of the map on patches of the creature, over that of a uniform map"
    proof(ID, what, share.mean() / inside.float().mean(), at_least=2, kind="ground truth", oracle="100 glyph scenes")


def test_of_two_creatures_the_caption_chooses_the_one_that_is_shown(shipped, proof):
    scenes = glyphs.scenes(60, 33, creatures=2)
    images = glyphs.normalise(scenes.images)
    captions = [caption.split(" and a ") for caption in glyphs.captions(scenes)]
    captions = [[f"{a} and a {b}", f"a {c} and a {d}"] for a, b, c, d in captions]
    inside = glyphs.patch_fraction(scenes.object_masks, (14, 14)) > 0  # (B, 2, 14, 14)
    shares = []
    for creature in (0, 1):
        image = snippet.explain(shipped, images, [both[creature] for both in captions]).image[:, None]
        shares.append((image * inside).sum((2, 3)))  # (B, 2): relevance in the first and in the second creature
    own = shares[0][:, 0] + shares[1][:, 1]
    other = shares[0][:, 1] + shares[1][:, 0]
    what = "scenes of two creatures in which each caption's map favours its own creature"
    proof(ID, what, (own > other).float().mean(), at_least=0.8, kind="ground truth", oracle="60 glyph scenes")
