"""Explaining a captioner: parity with Captum, sums that are complete, and words that light up what they name."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from helpers import pictures, relative_error, roughen, training_script
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from vitx import catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "captioning-transformer-explanation"
snippet = load_module(ID)
IMAGE: dict[str, Any] = {
    "img_size": (16, 24),
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
DECODER: dict[str, Any] = {"words": ("a", "cat", "dog", "red", "blue"), "length": 7, "depth": 2, "heads": 2}
CLASSES = ("a cat", "a dog", "a red dog")
CAPTIONS = ["a red cat", "dog", "a blue red blue dog"]


def tiny_model(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = VisionTransformer(**IMAGE, num_classes=0)
        model = snippet.Captioner(image, class_captions=CLASSES, **DECODER)
    return roughen(model, seed)


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.features(x)


def test_integrated_gradients_equal_captum(proof):
    """Word by word, in Captum's midpoint rule; its weights are single precision, in which one eighth is exact."""
    model = tiny_model()
    x, tokens = pictures(model.image, 3), model.tokenize(CAPTIONS)
    X, found = features(model, x), snippet.explain(model, x, CAPTIONS, steps=8)
    errors = []
    for row, caption in enumerate(CAPTIONS):
        for place in range(len(caption.split())):

            def score(X: torch.Tensor, row: int = row, place: int = place) -> torch.Tensor:
                return model.likelihood(X, tokens[row : row + 1].expand(len(X), -1))[:, place]

            expected = IntegratedGradients(score).attribute(
                X[row : row + 1], torch.zeros_like(X[:1]), n_steps=8, method="riemann_middle"
            )
            errors.append(relative_error(found.maps[row, place].flatten(), expected[0].sum(-1)))
    proof(ID, "maps of all words", max(errors), at_most=1e-9, kind="parity", oracle="captum IntegratedGradients")


def test_saliency_equals_captum(proof):
    model = tiny_model()
    x, tokens = pictures(model.image, 1), model.tokenize(["a red cat"])
    X, found = features(model, x), snippet.explain(model, x, ["a red cat"], method="saliency")
    expected = Saliency(lambda X: model.likelihood(X, tokens)[:, 1]).attribute(X.requires_grad_())
    error = relative_error(found.maps[0, 1].flatten(), expected[0].norm(dim=-1))
    proof(ID, "saliency of a word", error, at_most=1e-9, kind="parity", oracle="captum Saliency")


def test_the_sum_over_the_picture_is_what_a_word_owes_it(proof):
    model = tiny_model()
    x = pictures(model.image, 3)
    found = snippet.explain(model, x, CAPTIONS, steps=400)
    error = relative_error(found.maps.sum((2, 3)), found.text)
    proof(ID, "sum of a map, and s(X) - s(0), at 400 steps", error, at_most=1e-3, kind="closed form")
    X, tokens = features(model, x), model.tokenize(CAPTIONS)
    with torch.no_grad():
        gain = model.likelihood(X, tokens) - model.likelihood(0 * X, tokens)
    torch.testing.assert_close(found.text[2], gain[2, :5])
    torch.testing.assert_close(found.likelihood[0, :3], model.likelihood(X, tokens)[0, :3].detach())


def test_a_decoder_that_does_not_look_owes_nothing():
    model = tiny_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.look.out.weight.zero_()
    for method in ("integrated-gradients", "saliency"):
        found = snippet.explain(model, pictures(model.image, 1), method=method)
        assert (found.maps == 0).all()
        assert (found.text == 0).all()


# --- the decoder -----------------------------------------------------------------------------------------------------


def test_the_decoder_equals_plain_loops(proof):
    """One layer of the decoder, head by head and word by word."""
    model = tiny_model()
    layer, X = model.layers[0], features(model, pictures(model.image, 1))
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def attend(module: Any, queries: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        rows = []
        for place, query in enumerate(queries):
            q, parts = module.query(query), []
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                pairs = [module.key_value(token) for token in seen[place]]
                scores = np.exp([float(q[part] @ pair[:8][part]) / 2 for pair in pairs])
                parts.append(sum(s * pair[8:][part] for s, pair in zip(scores / scores.sum(), pairs, strict=True)))
            rows.append(module.out(torch.cat(parts)))
        return torch.stack(rows)

    with torch.no_grad():
        y = layer.norm1(x[0])
        truth = x[0] + attend(layer.among, y, [y[: place + 1] for place in range(4)])
        truth = truth + attend(layer.look, layer.norm2(truth), [X[0]] * 4)
        truth = truth + layer.mlp(layer.norm3(truth))
        ahead = torch.full((4, 4), -torch.inf).double().triu(1)
        found, weights = layer(x, X, ahead)
    proof(ID, "a decoder layer", relative_error(found[0], truth), at_most=1e-9, kind="parity", oracle="plain loops")
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_no_word_sees_later_ones_and_filling_changes_nothing():
    model = tiny_model()
    X = features(model, pictures(model.image, 1))
    short, long = model.tokenize(["a cat"]), model.tokenize(["a cat", "a red blue dog"])[:1]
    with torch.no_grad():
        torch.testing.assert_close(model.likelihood(X, short), model.likelihood(X, long)[:, :3])
        logits = model(pictures(model.image, 2))
    every = [snippet.explain(model, pictures(model.image, 2), [caption] * 2) for caption in CLASSES]
    with torch.no_grad():
        X = features(model, pictures(model.image, 2))
        ends = [model.likelihood(X, model.tokenize([caption] * 2))[:, -1] for caption in CLASSES]
    expected = [one.likelihood.sum(1) + end for one, end in zip(every, ends, strict=True)]
    torch.testing.assert_close(logits, torch.stack(expected, 1))


def test_what_it_writes_is_the_likeliest_word_at_each_step():
    model = tiny_model()
    x = pictures(model.image, 4)
    tokens, X = model.write(x), features(model, x)
    with torch.no_grad():
        best = model.decode(X, tokens[:, :-1])[0].argmax(-1)
    for row, after in zip(tokens.tolist(), best.tolist(), strict=True):
        stop = row.index(1)
        assert row[1:stop] == after[: stop - 1]
        assert stop == len(row) - 1 or after[stop - 1] == 1
    assert all(
        torch.equal(model.write(x[k : k + 1])[0], tokens[k, : len(model.write(x[k : k + 1])[0])]) for k in range(4)
    )


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["integrated-gradients", "saliency", "attention"])
def test_a_batch_equals_singles_and_leaves_no_trace(method):
    model = tiny_model().requires_grad_(False)
    x = pictures(model.image, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = snippet.explain(model, x, CAPTIONS, method=method)
    assert batch.words == tuple(tuple(caption.split()) for caption in CAPTIONS)
    assert batch.maps.shape == (3, 5, 2, 3)
    assert torch.equal(batch.heatmap(), batch.maps.sum(1))
    for field in (batch.maps[1, 1:], batch.text[1, 1:], batch.likelihood[1, 1:]):
        assert (field == 0).all()
    for row in range(3):
        alone = snippet.explain(model, x[row : row + 1], CAPTIONS[row : row + 1], method=method)
        words = alone.maps.shape[1]
        torch.testing.assert_close(alone.maps[0], batch.maps[row, :words])
        torch.testing.assert_close(alone.text[0], batch.text[row, :words])
    assert not batch.maps.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_many_words_pass_the_decoder_in_parts(monkeypatch):
    model = tiny_model()
    x = pictures(model.image, 3)
    whole = snippet.explain(model, x, CAPTIONS)
    monkeypatch.setattr(snippet, "AT_ONCE", 4)
    torch.testing.assert_close(snippet.explain(model, x, CAPTIONS).maps, whole.maps)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (["a rde cat"] * 3, {}, "does not know the word 'rde'; nearest: red"),
        (["a cat"], {}, "there are 1 captions for 3 pictures"),
        (["a a a a a a"] * 3, {}, "a caption has 6 words, and the captioner writes at most 5"),
        (torch.tensor([0, 3, 0]), {}, "class 3 is out of range"),
        (None, {"method": "lime"}, "method must be one of integrated-gradients, saliency, attention"),
        (None, {"steps": 0}, "with at least one step"),
    ],
)
def test_what_is_refused(target, options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), target, **options)


def test_classes_stand_for_captions_and_other_models_are_refused():
    model = tiny_model()
    x = pictures(model.image, 2)
    found = snippet.explain(model, x, torch.tensor([2, 0]))
    assert found.words == (("a", "red", "dog"), ("a", "cat"))
    with pytest.raises(UnsupportedModel, match="VisionTransformer writes no captions"):
        snippet.explain(model.image, x)


def test_load_pretrained_restores_the_model(tmp_path):
    model = tiny_model().float()
    metadata = {key: json.dumps(value) for key, value in
                {"image": IMAGE, "decoder": DECODER, "class_captions": CLASSES}.items()}  # fmt: skip
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "x", metadata)
    loaded, images = snippet.load_pretrained(tmp_path / "x"), pictures(model.image, 2)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------

SEED = 800_000


@pytest.fixture(scope="module")
def script():
    return training_script("captioner_glyph")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("captioner-glyph").model


def test_the_card_holds_on_other_scenes(script, shipped):
    card = catalog.load().models["captioner-glyph"]
    scenes = script.scenes_of(None, 150, SEED, 0)
    true = glyphs.captions(scenes)
    written = shipped.write(glyphs.normalise(scenes.images)).tolist()
    texts = [" ".join(shipped.vocabulary[token] for token in row if token > 1) for row in written]
    exact = [a == b for a, b in zip(texts, true, strict=True)]
    words = [a == b for row, caption in zip(texts, true, strict=True)
             for a, b in zip(row.split(), caption.split(), strict=False) if b in script.PART_OF]  # fmt: skip
    for name, values in (("caption_right", exact), ("words_right", words)):
        expected = card.metrics[name]
        spread = 4 * np.sqrt(max(expected * (1 - expected), 0.005) / len(exact))
        assert abs(np.mean(values) - expected) < spread, (name, np.mean(values), expected)


@pytest.fixture(scope="module")
def shares(script, shipped):
    scenes = script.scenes_of(None, 16, SEED + 10, 0)
    images, captions = glyphs.normalise(scenes.images), glyphs.captions(scenes)
    return {
        method: script.on_evidence(snippet.explain(shipped, images, captions, method=method), scenes)
        for method in snippet.METHODS
    }


@pytest.mark.parametrize("method", ["integrated-gradients", "saliency", "attention"])
def test_words_light_up_what_they_name(method, shares, proof):
    mass, chance = (float(values.mean()) for values in shares[method])
    what = f"share of a word's map on the part that it names, over chance ({chance:.3f}): {method}"
    proof(ID, what, mass / chance, at_least=2, kind="ground truth", oracle="80 words of 16 glyph captions")


def test_words_that_follow_from_the_form_owe_the_picture_nothing(script, shipped, proof):
    scenes = script.scenes_of(None, 16, SEED + 10, 0)
    found = snippet.explain(shipped, glyphs.normalise(scenes.images), glyphs.captions(scenes), method="attention")
    named = torch.tensor([[word in script.PART_OF for word in words] for words in found.words])
    what = "nats that a filler word owes to the picture, over those of a word that names a variant"
    ratio = found.text[~named].abs().mean() / found.text[named].mean()
    proof(ID, what, ratio, at_most=0.3, kind="ground truth", oracle="16 glyph captions")
