"""The interpretation of TraP-VQA on glyph questions: Grad-CAM, attention and Shapley values against loops and truth."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, roughen, training_script
from timm.models.vision_transformer import VisionTransformer
from vitx import glyphs, load_module, models, vit
from vitx.vit import UnsupportedModel

ID = "pathology-vqa-transformer"
snippet = load_module(ID)
tower = load_module("generic-attention-co-attention")
QUESTIONS = ["who is red", "a cat", "is a red cat"]
LXMERT = ("cross", "self", "cross", "self")


def tiny_model(fusion: tuple[str, ...] = LXMERT, seed: int = 0) -> Any:
    settings: dict[str, Any] = {"embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = VisionTransformer(img_size=(16, 24), patch_size=8, num_classes=0, **settings)
        text = tower.Question(("who", "is", "red", "a", "cat"), 6, 8, 1, 2)
        model = tower.QuestionAnswering(image, text, ("felix", "tom", "yes", "no"), 2, fusion, "who is a cat")
    return roughen(model, seed)


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.image.forward_features(x)[:, 1:]


@pytest.mark.parametrize("fusion", [LXMERT, ("merged", "merged")])
def test_the_words_equal_the_mean_over_all_orders(fusion, proof):
    """Shapley's first definition: the gain of a word when it comes in, over every order of the words."""
    model = tiny_model(fusion)
    x, tokens = pictures(model.image, 1), model.text.tokenize(["is a red cat"])
    X, found = features(model, x), snippet.explain(model, x, tokens, answers=["no"])

    def value(words: tuple[int, ...]) -> float:
        some = tokens.clone()
        for place in range(4):
            if place not in words:
                some[0, 1 + place] = 0
        with torch.no_grad():
            return float(model.fuse(X, some)[0, 3])

    truth, orders = np.zeros(4), list(itertools.permutations(range(4)))
    for order in orders:
        for place, word in enumerate(order):
            truth[word] += (value(order[: place + 1]) - value(order[:place])) / len(orders)
    error = relative_error(found.text[0], truth)
    oracle = "mean over all orders of the words"
    proof(ID, f"Shapley values, {fusion[0]} attention", error, at_most=1e-9, kind="parity", oracle=oracle)


def test_the_words_add_up_to_what_the_question_changes(proof):
    model = tiny_model()
    found = snippet.explain(model, pictures(model.image, 3), QUESTIONS)
    error = (found.text.sum(1) - (found.score - found.wordless)).abs().max()
    proof(ID, "sum of the Shapley values, and the logit with less that without words", error, at_most=1e-12,
          kind="closed form")  # fmt: skip


def test_a_word_that_is_never_seen_has_no_value():
    """The token that is answered from sees patches alone, and no word has reached it before."""
    model = tiny_model(("cross",))
    with torch.no_grad():
        for block in model.text.blocks:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    found = snippet.explain(model, pictures(model.image, 2), QUESTIONS[:2])
    assert found.text.abs().max() < 1e-12


def test_grad_cam_equals_the_equation_with_gradients_by_finite_differences(proof):
    model = tiny_model()
    x, tokens = pictures(model.image, 1), model.text.tokenize(["who is red"])
    X, step = features(model, x), 1e-5
    gradient = np.zeros(X.shape[1:])
    with torch.no_grad():
        for place in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = X.clone()
                moved[(0, *place)] += sign * step
                ends.append(float(model.fuse(moved, tokens)[0, 1]))
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
    cam = np.zeros(6)
    for p in range(6):
        cam[p] = sum(gradient[:, k].mean() * float(X[0, p, k]) for k in range(8))
    signed = snippet.explain(model, x, tokens, answers=["tom"], relu=False).image.flatten()
    error = relative_error(signed, cam)
    oracle = "equation in loops, gradients by finite differences"
    proof(ID, "Grad-CAM of the picture features", error, at_most=1e-6, kind="parity", oracle=oracle)
    positive = snippet.explain(model, x, tokens, answers=["tom"]).image.flatten()
    assert torch.equal(positive, signed.clamp(min=0))


def test_attention_is_that_of_the_last_layer_that_sees_patches():
    model = tiny_model()
    x, tokens = pictures(model.image, 3), model.text.tokenize(QUESTIONS)
    found = snippet.explain(model, x, tokens)
    with torch.no_grad(), vit.capture(model, "attention") as record:
        model.answer(x, tokens)
    torch.testing.assert_close(found.attention.flatten(1), record["attention"][2].mean(1)[:, 0, tokens.shape[1] :])
    torch.testing.assert_close(found.attention.sum((1, 2)), torch.ones(3).double())
    torch.testing.assert_close(found.score, model.answer(x, tokens).max(1).values.detach())


def test_a_batch_equals_singles_and_leaves_no_trace():
    model = tiny_model().requires_grad_(False)
    x = pictures(model.image, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = snippet.explain(model, x, QUESTIONS)
    assert batch.heatmap() is batch.image
    assert batch.image.shape == batch.attention.shape == (3, 2, 3)
    assert (batch.text[1, 2:] == 0).all()
    for row in range(3):
        alone = snippet.explain(model, x[row : row + 1], QUESTIONS[row : row + 1])
        for field in ("image", "attention", "score", "wordless"):
            torch.testing.assert_close(getattr(alone, field)[0], getattr(batch, field)[row])
        torch.testing.assert_close(alone.text[0], batch.text[row, : alone.text.shape[1]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_target_by_class_and_refusals():
    model = tiny_model()
    x = pictures(model.image, 2)
    by_class = snippet.explain(model, x, torch.tensor([1, 0]))
    assert by_class.answers == ("tom", "felix")
    torch.testing.assert_close(by_class.score, model(x)[[0, 1], [1, 0]].detach())
    for target, options, message in (
        (["a rde cat"] * 2, {}, "does not know the word 'rde'"),
        (["a cat"], {}, "there are 1 captions for 2 pictures"),
        (None, {"answers": ["maybe"] * 2}, "never answers 'maybe'; it knows felix, tom, yes, no"),
        (torch.tensor([0, 4]), {}, "class 4 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            snippet.explain(model, x, target, **options)
    with pytest.raises(UnsupportedModel, match="VisionTransformer answers no questions"):
        snippet.explain(model.image, x)


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------

SEED = 800_000


@pytest.fixture(scope="module")
def found():
    """Explanations of questions for two parts of 12 creatures with free parts, and the patches of the part."""
    script, model = training_script("vqa_glyph"), models.load("vqa-glyph").model
    scenes = script.drawn(12, SEED + 70, 1, 0, False)
    images, explained, truth = glyphs.normalise(scenes.images), [], []
    for part in ("crest", "tail"):
        explained.append(snippet.explain(model, images, [f"which {part} does the creature have"] * 12))
        mask = scenes.part_masks[:, 0, glyphs.PARTS.index(part)]
        truth.append(glyphs.patch_fraction(mask, (14, 14)) > 0)
    return explained, truth


@pytest.mark.parametrize("field", ["image", "attention"])
def test_maps_lie_on_the_part_that_is_asked_about(field, found, proof):
    shares, chance = [], []
    for explained, inside in zip(*found, strict=True):
        maps = getattr(explained, field)
        shares.append((maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-12))
        chance.append(inside.float().mean((1, 2)))
    mass, even = float(torch.cat(shares).mean()), float(torch.cat(chance).mean())
    name = {"image": "Grad-CAM", "attention": "attention of the last layer"}[field]
    what = f"share of {name} on the part that is asked about, over chance ({even:.3f})"
    proof(ID, what, mass / even, at_least=2, kind="ground truth", oracle="24 questions to 12 glyph scenes")


def test_the_word_that_names_the_part_speaks_most_for_the_answer(found, proof):
    best = torch.cat([explained.text.argmax(1) == 1 for explained in found[0]]).float().mean()
    what = "questions in which the word for the part has the largest Shapley value (chance 0.17)"
    proof(ID, what, best, at_least=0.6, kind="ground truth", oracle="24 questions to 12 glyph scenes")
