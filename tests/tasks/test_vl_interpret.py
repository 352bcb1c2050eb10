"""VL-InterpreT: head statistics against plain loops, rows that sum to one, and heads that see what is asked about."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, roughen, training_script
from scipy.stats import zscore
from timm.models.vision_transformer import VisionTransformer
from vitx import catalog, glyphs, load_module, models, vit
from vitx.vit import UnsupportedModel

ID = "vl-interpret"
snippet = load_module(ID)
tower = load_module("generic-attention-co-attention")
QUESTIONS = ["who is red", "a cat", "is a red cat"]
MERGED = ("merged", "merged", "merged")


def tiny_model(fusion: tuple[str, ...] = MERGED, seed: int = 0) -> Any:
    settings: dict[str, Any] = {"embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = VisionTransformer(img_size=(16, 24), patch_size=8, num_classes=0, **settings)
        text = tower.Question(("who", "is", "red", "a", "cat"), 6, 8, 1, 2)
        model = tower.QuestionAnswering(image, text, ("felix", "tom", "yes", "no"), 2, fusion, "who is a cat")
    return roughen(model, seed)


def attention_of(model: Any, x: torch.Tensor, tokens: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad(), vit.capture(model, "attention") as record:
        model.answer(x, tokens)
    return [layer.numpy() for layer in record["attention"]]


def test_statistics_equal_plain_loops(proof):
    model = tiny_model()
    x, tokens = pictures(model.image, 3), model.text.tokenize(QUESTIONS)
    found = snippet.explain(model, x, QUESTIONS)
    length, patches = tokens.shape[1], range(tokens.shape[1], tokens.shape[1] + 6)
    truth = np.zeros((3, 5, 3, 2))
    for row, question in enumerate(QUESTIONS):
        words = range(1, 1 + len(question.split()))
        pairs = (
            [(t, i) for t in words for i in patches],
            [(i, t) for i in patches for t in words],
            [(i, j) for i in patches for j in patches],
            [(i, j) for i in patches for j in patches if i != j],
            [(t, u) for t in words for u in words],
        )
        for layer, A in enumerate(attention_of(model, x, tokens)):
            for head in range(2):
                for kind, which in enumerate(pairs):
                    truth[row, kind, layer, head] = np.mean([A[row, head, q, k] for q, k in which])
    oracle = "means over lists of pairs"
    proof(ID, "means", relative_error(found.means, truth), at_most=1e-12, kind="parity", oracle=oracle)

    z = found.standardised()
    expected = np.asarray(zscore(truth, axis=2))
    cross = np.asarray(zscore(expected[:, :2].mean(1), axis=1))
    intra = np.asarray(zscore(expected[:, [2, 4]].mean(1), axis=1))
    expected = np.concatenate([expected, cross[:, None], intra[:, None]], 1)
    proof(ID, "standardised", relative_error(z, expected), at_most=1e-9, kind="parity", oracle="scipy.stats.zscore")
    assert len(snippet.SUMMARIES) == z.shape[1]
    assert length == 6


def test_rows_share_one_between_words_patches_and_the_rest(proof):
    """What is not image-to-text or text-to-text of a word's attention lies on the tokens before and behind the text."""
    model = tiny_model()
    x, tokens = pictures(model.image, 1), model.text.tokenize(["is a red cat"])
    found = snippet.explain(model, x, tokens)
    A = np.stack(attention_of(model, x, tokens))[:, 0]  # (L, h, N, N)
    image_to_text, text_to_image, image_to_image, _, text_to_text = found.means[0].numpy()
    rest = A[..., [0, 5]].sum(-1)  # (L, h, N)
    words = 6 * image_to_text + 4 * text_to_text + rest[:, :, 1:5].mean(-1)
    patches = 4 * text_to_image + 6 * image_to_image + rest[:, :, 6:].mean(-1)
    error = max(abs(words - 1).max(), abs(patches - 1).max())
    proof(ID, "parts of a row, which sum to one", error, at_most=1e-12, kind="closed form")


def test_uniform_attention_is_one_over_all_tokens_everywhere(proof):
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
            block.attn.qkv.bias[:16] = 0
    found = snippet.explain(model, pictures(model.image, 1), ["is a red cat"])
    error = max(float((found.means - 1 / 12).abs().max()), float((found.image - 1 / 12).abs().max()))
    proof(ID, "uniform attention", error, at_most=1e-12, kind="closed form")
    assert found.standardised().abs().max() < 3  # rounding alone may differ between the layers


def test_the_head_and_the_word_can_be_chosen():
    model = tiny_model()
    x, tokens = pictures(model.image, 3), model.text.tokenize(QUESTIONS)
    A = attention_of(model, x, tokens)
    free = snippet.explain(model, x, QUESTIONS)
    for row in range(3):
        assert divmod(int(free.means[row, 0].argmax()), 2) == tuple(free.chosen[row].tolist())
    one = snippet.explain(model, x, QUESTIONS, layer=1, head=-1, word=1)
    assert one.chosen.tolist() == [[1, 1]] * 3
    np.testing.assert_allclose(one.image.flatten(1).numpy(), A[1][:, 1, 2, 6:])
    np.testing.assert_allclose(one.text[2].numpy(), A[1][2, 1, 6:, 1:5].mean(0))
    assert (one.text[1, 2:] == 0).all()
    several = snippet.explain(model, x, QUESTIONS, layer=0)
    assert (several.chosen[:, 0] == 0).all()
    every = torch.stack([snippet.explain(model, x, QUESTIONS, layer=2, head=0, word=k).image[0] for k in range(2)])
    third = A[2][0, 0, 3, 6:].reshape(2, 3)
    mean = snippet.explain(model, x, QUESTIONS, layer=2, head=0).image[0]
    np.testing.assert_allclose(mean.numpy(), (every.sum(0).numpy() + third) / 3)


def test_states_are_those_of_the_model():
    model = tiny_model()
    x, tokens = pictures(model.image, 2), model.text.tokenize(QUESTIONS[:2])
    found = snippet.explain(model, x, tokens)
    assert found.states.shape == (2, 4, tokens.shape[1] + 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(found.states[:, 0, : tokens.shape[1]], model.text(tokens))
        logits = model.head(model.norm(found.states[:, -1, 0]))
        torch.testing.assert_close(logits, model.answer(x, tokens))


def test_a_batch_equals_singles_and_leaves_no_trace():
    model = tiny_model().requires_grad_(False)
    x = pictures(model.image, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = snippet.explain(model, x, QUESTIONS)
    for row in range(3):
        alone = snippet.explain(model, x[row : row + 1], QUESTIONS[row : row + 1])
        torch.testing.assert_close(alone.means[0], batch.means[row])
        torch.testing.assert_close(alone.image[0], batch.image[row])
    assert batch.image.shape == (3, 2, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer 3 is out of range: the model has 3"),
        ({"head": -3}, "head -3 is out of range: the model has 2"),
        ({"word": 2}, "word 2 is out of range: the shortest question has 2 words"),
    ],
)
def test_what_is_refused(options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), QUESTIONS, **options)


@pytest.mark.parametrize("fusion", [("cross", "self"), None])
def test_other_models_are_refused(fusion):
    model = tiny_model(fusion or MERGED)
    with pytest.raises(UnsupportedModel, match="words and patches share one attention"):
        snippet.explain(model if fusion else model.image, pictures(model.image, 1))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------

SEED = 800_000


@pytest.fixture(scope="module")
def script():
    return training_script("vqa_glyph")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("vqa-merged-glyph").model


def test_the_card_holds_on_other_scenes(script, shipped):
    card = catalog.load().models["vqa-merged-glyph"]
    right: dict[str, list[bool]] = {}
    with torch.no_grad():
        for scenes, rows in script.unseen(25, 0, SEED):
            images = glyphs.normalise(scenes.images)[[row for row, _ in rows]]
            best = shipped.answer(images, shipped.text.tokenize([asked.text for _, asked in rows])).argmax(1)
            for index, (_, asked) in zip(best.tolist(), rows, strict=True):
                for kind in (f"{asked.kind}_right", "right"):
                    right.setdefault(kind, []).append(shipped.answers[index] == asked.answer)
    for kind, values in right.items():
        expected = card.metrics[kind]
        spread = 4 * np.sqrt(max(expected * (1 - expected), 0.01) / len(values))
        assert abs(np.mean(values) - expected) < spread, (kind, np.mean(values), expected)


def on_evidence(model: Any, seed: int) -> torch.Tensor:
    """(L, h): attention of the word for a part to that part, over what its share of the picture would have."""
    shares = []
    for part in ("crest", "tail"):
        scenes = glyphs.scenes(20, seed)
        images, inside = glyphs.normalise(scenes.images), scenes.part_masks[:, 0, glyphs.PARTS.index(part)]
        inside = glyphs.patch_fraction(inside, (14, 14)) > 0
        tokens = model.text.tokenize([f"which {part} does the creature have"] * 20)
        with torch.no_grad(), vit.capture(model, "attention") as record:
            model.answer(images, tokens)
        seen = torch.stack(record["attention"], 1)[:, :, :, 2, tokens.shape[1] :]  # (B, L, h, P)
        on = (seen * inside.flatten(1)[:, None, None]).sum(-1) / seen.sum(-1)
        shares.append((on / inside.float().mean((1, 2))[:, None, None]).mean(0))
    return torch.stack(shares).mean(0)


def test_a_head_that_sees_what_is_asked_about_sees_it_in_other_scenes_too(shipped, proof):
    """Heads are found on some scenes and judged on others."""
    found = on_evidence(shipped, SEED + 50)
    best = divmod(int(found.argmax()), 4)
    again = on_evidence(shipped, SEED + 60)
    what = "attention of the word for a part to that part in the head that is best at it, over chance"
    proof(ID, what, again[best], at_least=2, kind="ground truth", oracle="20 glyph scenes, two questions to each")
    what = "the same over all heads"
    proof(ID, f"{what}, rank correlation of two sets of scenes", rank_correlation(found, again), at_least=0.7,
          kind="ground truth", oracle="20 glyph scenes, two questions to each")  # fmt: skip


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
