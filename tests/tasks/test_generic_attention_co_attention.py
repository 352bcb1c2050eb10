"""Generic attention on co-attention: parity with the equations in plain loops, and the evidence of glyph questions."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_norm, pictures, relative_error, roughen, training_script, twin_tokens, weights
from safetensors.torch import save_file
from scipy.special import erf
from timm.models.vision_transformer import VisionTransformer
from vitx import catalog, glyphs, load_module, models, vit
from vitx.vit import UnsupportedModel

ID = "generic-attention-co-attention"
snippet = load_module(ID)
IMAGE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
TEXT: dict[str, Any] = {"words": ("who", "is", "red", "a", "cat"), "length": 6, "width": 8, "depth": 1, "heads": 2}
ANSWERS = ("felix", "tom", "yes", "no")
LXMERT = ("cross", "self", "cross", "self")
QUESTIONS = ["who is red", "a cat", "is a red cat"]


def tiny_model(fusion: tuple[str, ...] = LXMERT, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = VisionTransformer(**IMAGE, num_classes=0)
        model = snippet.QuestionAnswering(image, snippet.Question(**TEXT), ANSWERS, 2, fusion, "who is a cat")
    return roughen(model, seed)


# --- a twin of the network in which one attention weight can be changed ---------------------------------------------


def block(w: dict, name: str, x: np.ndarray, mask: np.ndarray, nudge: tuple | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens after a block (N, D), and its attention (h, N, N); ``nudge`` = (place in the attention, amount)."""
    w = {key.removeprefix(name): value for key, value in w.items() if key.startswith(name)}
    heads, width = 2, x.shape[1] // 2
    normed = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
    q, k, v = np.split(normed @ w["attn.qkv.weight"].T + w["attn.qkv.bias"], 3, 1)
    attention, mixed = np.zeros((heads, len(x), len(x))), np.zeros_like(x)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(width)) * mask
        attention[h] = scores / scores.sum(1, keepdims=True)
        if nudge is not None and nudge[0][0] == h:
            attention[nudge[0]] += nudge[1]
        mixed[:, part] = attention[h] @ v[:, part]
    x = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    hidden = layer_norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    return x + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"], attention


def forward(model: Any, first: np.ndarray, tokens: list[int], layer: int = -1, nudge: tuple | None = None):
    """Logits of one picture, given its tokens at the first block, and one question; attention of all layers."""
    w, attention = weights(model), []

    def run(name: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        x, found = block(w, name, x, mask, nudge if layer == len(attention) else None)
        attention.append(found)
        return x

    x, patches = first, len(first) - 1
    for index in range(len(model.image.blocks)):
        x = run(f"image.blocks.{index}.", x, np.ones((len(x), len(x))))
    x = layer_norm(x, w["image.norm.weight"], w["image.norm.bias"])[1:] + w["place"]
    real = np.array([token != 0 for token in tokens])
    y = w["text.embed.weight"][tokens] + w["text.pos_embed"][: len(tokens)]
    for index in range(len(model.text.blocks)):
        y = run(f"text.blocks.{index}.", y, np.broadcast_to(real, (len(tokens), len(tokens))))
    x = np.concatenate([y, x])
    of_text = np.array([True] * len(tokens) + [False] * patches)
    seen = np.concatenate([real, [True] * patches])
    same = of_text[:, None] == of_text
    for index, kind in enumerate(model.fusion):
        x = run(f"blocks.{index}.", x, seen * {"self": same, "cross": ~same, "merged": same | True}[kind])
    return layer_norm(x, w["norm.weight"], w["norm.bias"])[0] @ w["head.weight"].T + w["head.bias"], attention


def weighted(model: Any, first: np.ndarray, tokens: list[int], answer: int) -> list[np.ndarray]:
    """A_bar of every layer, equation 5, with gradients by central differences."""
    found, step = [], 1e-5
    for layer, attention in enumerate(forward(model, first, tokens)[1]):
        A_bar = np.zeros(attention.shape[1:])
        for place in zip(*attention.nonzero(), strict=True):
            ends = [forward(model, first, tokens, layer, (place, sign * step))[0][answer] for sign in (1, -1)]
            A_bar[place[1:]] += max((ends[0] - ends[1]) / (2 * step) * attention[place], 0) / len(attention)
        found.append(A_bar)
    return found


def rules(model: Any, A_bar: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the first token in R_ti and R_tt, with the four maps of equations 5 to 11 kept apart, entry by entry."""
    layers = iter(A_bar)
    patches = 4
    R_ii, R_tt = np.eye(1 + patches), np.eye(length)
    for _ in model.image.blocks:
        R_ii = R_ii + next(layers) @ R_ii
    for _ in model.text.blocks:
        R_tt = R_tt + next(layers) @ R_tt
    R_ii, R_ti, R_it = R_ii[1:, 1:], np.zeros((length, patches)), np.zeros((patches, length))

    def bar(R: np.ndarray) -> np.ndarray:
        R_hat = R - np.eye(len(R))
        sums = R_hat.sum(1)
        for m in range(len(R)):
            for n in range(len(R)):
                R_hat[m, n] = R_hat[m, n] / sums[m] if sums[m] > 0 else 0
        return R_hat + np.eye(len(R))

    def through(left: np.ndarray, A: np.ndarray, right: np.ndarray) -> np.ndarray:
        """left' A right."""
        result = np.zeros((left.shape[1], right.shape[1]))
        for a in range(left.shape[1]):
            for b in range(right.shape[1]):
                result[a, b] = sum(
                    left[m, a] * A[m, n] * right[n, b] for m in range(len(left)) for n in range(len(right))
                )
        return result

    for kind, A in zip(model.fusion, layers, strict=True):
        tt, ti, it, ii = A[:length, :length], A[:length, length:], A[length:, :length], A[length:, length:]
        if kind == "self":
            R_ti, R_tt, R_it, R_ii = R_ti + tt @ R_ti, R_tt + tt @ R_tt, R_it + ii @ R_it, R_ii + ii @ R_ii
        else:
            R_ti, R_tt, R_it, R_ii = (
                R_ti + through(bar(R_tt), ti, bar(R_ii)),
                R_tt + ti @ R_it,
                R_it + through(bar(R_ii), it, bar(R_tt)),
                R_ii + it @ R_ti,
            )
    return R_ti[0], R_tt[0]


def test_equals_the_equations_in_plain_loops(proof):
    model = tiny_model()
    images = pictures(model.image, 1)
    tokens = model.text.tokenize(["is a cat"])
    found = snippet.explain(model, images, tokens, answers=["no"])
    first = twin_tokens(model.image, images[0])
    logits = forward(model, first, tokens[0].tolist())[0]
    assert math.isclose(logits[3], float(found.score), rel_tol=1e-9)
    image, text = rules(model, weighted(model, first, tokens[0].tolist(), 3), tokens.shape[1])
    assert image.min() > 0
    oracle = "equations 5 to 11 in plain loops, gradients by finite differences"
    proof(ID, "image map", relative_error(found.image.flatten(), image), at_most=1e-6, kind="parity", oracle=oracle)
    proof(ID, "word relevance", relative_error(found.text[0], text[1:4]), at_most=1e-6, kind="parity", oracle=oracle)


# --- identities of the rules -----------------------------------------------------------------------------------------


def random_map(length: int, patches: int, kind: str, seed: int) -> torch.Tensor:
    A = torch.rand(1, length + patches, length + patches, generator=torch.Generator().manual_seed(seed)).double()
    of_text = torch.arange(length + patches) < length
    same = of_text[:, None] == of_text
    return A * (same if kind == "self" else ~same)


def test_first_co_attention_hands_over_the_attention_itself(proof):
    """With nothing gathered before it, equation 10 leaves A_bar, and equation 11 nothing."""
    A = random_map(3, 4, "cross", 0)
    R = snippet.co_attention(torch.eye(7).double()[None], A, 3)
    error = float((R - torch.eye(7) - A).abs().max())
    proof(ID, "one layer of co-attention alone, and its A_bar", error, at_most=1e-12, kind="closed form")


def test_what_is_gathered_counts_as_much_as_the_token_itself(proof):
    """Equations 8 and 9: rows of R_bar sum to two, or to one where nothing was gathered; scaling changes nothing."""
    eye, A = torch.eye(7).double()[None], random_map(3, 4, "cross", 1)
    gathered = random_map(3, 4, "self", 2)
    gathered[:, 1] = 0
    once, thrice = (snippet.co_attention(eye + c * gathered, A, 3) - eye - c * gathered for c in (1, 3))
    error = float((once - thrice).abs().max())
    proof(ID, "co-attention after self-attention of triple size", error, at_most=1e-12, kind="closed form")
    assert once.isfinite().all()
    plain = snippet.co_attention(eye + gathered, A, 3, normalised=False)
    R_tt, R_ii, A_ti = (eye + gathered)[0, :3, :3], (eye + gathered)[0, 3:, 3:], A[0, :3, 3:]
    torch.testing.assert_close(plain[0, :3, 3:], R_tt.T @ A_ti @ R_ii)
    assert torch.equal(snippet.co_attention(eye + gathered, A, 3, gathered=False)[0, :3, 3:], A_ti)


def test_self_attention_alone_tells_nothing_of_the_picture():
    model = tiny_model(("self", "self"))
    found = snippet.explain(model, pictures(model.image, 3), QUESTIONS)
    assert (found.image == 0).all()
    assert found.text.max() > 0


def test_merged_attention_follows_the_rule_for_one_kind_of_token(proof):
    """R = (I + A_L) ... (I + A_1) over words and patches together."""
    model = tiny_model(("merged", "merged"))
    x, tokens = pictures(model.image, 1), model.text.tokenize(["who is red"])
    found = snippet.explain(model, x, tokens)
    A = [
        torch.from_numpy(a)
        for a in weighted(
            model, twin_tokens(model.image, x[0]), tokens[0].tolist(), int(model.answer(x, tokens).argmax())
        )
    ]
    eye = torch.eye(5).double()
    R = torch.block_diag(torch.eye(5) + A[2], ((eye + A[1]) @ (eye + A[0]))[1:, 1:])
    R = (torch.eye(9) + A[4]) @ (torch.eye(9) + A[3]) @ R
    error = max(relative_error(found.image.flatten(), R[0, 5:]), relative_error(found.text[0], R[0, 1:4]))
    proof(ID, "merged attention", error, at_most=1e-6, kind="closed form", oracle="product of I + A_bar of all layers")


def test_words_and_patches_see_what_their_layer_lets_them():
    model = tiny_model(("cross", "self", "merged"))
    tokens = model.text.tokenize(QUESTIONS)
    with torch.no_grad(), vit.capture(model, "attention") as record:
        model.answer(pictures(model.image, 3), tokens)
    length = tokens.shape[1]
    cross, own, merged = record["attention"]
    assert (cross[..., :length, :length] == 0).all()
    assert (cross[..., length:, length:] == 0).all()
    assert (own[..., :length, length:] == 0).all()
    assert (own[..., length:, :length] == 0).all()
    assert (merged[0] > 0).sum() == 2 * (length + 4) * (length + 4 - 1)  # one place of filling
    for A in record["attention"]:
        assert (A[1, :, :, 4:6] == 0).all()  # nobody sees the filling behind "a cat"
        torch.testing.assert_close(A.sum(-1), torch.ones_like(A.sum(-1)))


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [LXMERT, ("merged", "merged")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contract(dtype, fusion):
    model = tiny_model(fusion).to(dtype).requires_grad_(False)  # frozen networks have attention gradients too
    x = pictures(model.image, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = snippet.explain(model, x, QUESTIONS)
    assert found.image.shape == (3, 2, 2)
    assert found.text.shape == (3, 4)
    assert found.heatmap() is found.image
    assert found.words == tuple(tuple(question.split()) for question in QUESTIONS)
    assert set(found.answers) <= set(ANSWERS)
    assert (found.text[1, 2:] == 0).all()
    for tensor in (found.image, found.text, found.score):
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
    assert found.image.min() >= 0
    assert found.text.min() >= 0
    if dtype == torch.float64:
        for row in range(3):
            alone = snippet.explain(model, x[row : row + 1], QUESTIONS[row : row + 1])
            torch.testing.assert_close(alone.image[0], found.image[row])
            torch.testing.assert_close(alone.text[0], found.text[row, : alone.text.shape[1]])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in model.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_target_by_question_by_tokens_by_class():
    model = tiny_model()
    x = pictures(model.image, 2)
    by_question = snippet.explain(model, x, ["Who is a cat?"] * 2, answers=["tom", "felix"])
    by_tokens = snippet.explain(model, x, model.text.tokenize(["who is a cat"] * 2), answers=["tom", "felix"])
    by_class = snippet.explain(model, x, torch.tensor([1, 0]))
    assert by_question.answers == by_tokens.answers == by_class.answers == ("tom", "felix")
    for one, other, third in zip(by_question, by_tokens, by_class, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    torch.testing.assert_close(by_class.score, model(x)[[0, 1], [1, 0]])
    own = snippet.explain(model, x)
    assert own.words == (("who", "is", "a", "cat"),) * 2
    best = model.answer(x, model.class_tokens)
    assert own.answers == tuple(ANSWERS[index] for index in best.argmax(1))
    other = snippet.explain(model, x, answers=["yes", "no"])
    assert not torch.allclose(other.image, by_class.image)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (["a rde cat"] * 3, {}, "does not know the word 'rde'; nearest: red"),
        (["a cat"], {}, "there are 1 captions for 3 pictures"),
        (["a a a a a a"] * 3, {}, "has 6 words"),
        (torch.tensor([0, 2, 0]), {}, "class 2 is out of range"),
        (None, {"answers": ["maybe"] * 3}, "never answers 'maybe'; nearest: "),
        (None, {"answers": ["yes"]}, "one class index for each of the 3 pictures"),
    ],
)
def test_what_is_refused(target, options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), target, **options)


def test_other_models_are_refused():
    model = tiny_model()
    with pytest.raises(UnsupportedModel, match="VisionTransformer answers no questions"):
        snippet.explain(model.image, pictures(model.image, 1))
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.blocks[1].mlp.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        snippet.explain(spoilt, pictures(model.image, 1))


def test_load_pretrained_restores_the_model(tmp_path):
    model = tiny_model().float()
    metadata = {"image": IMAGE, "text": TEXT, "answers": ANSWERS, "classes": 2, "fusion": LXMERT}
    metadata = {key: json.dumps(value) for key, value in (metadata | {"question": "who is a cat"}).items()}
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "x", metadata)
    loaded, images = snippet.load_pretrained(tmp_path / "x"), pictures(model.image, 2)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------

SEED = 800_000


@pytest.fixture(scope="module")
def script():
    return training_script("vqa_glyph")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("vqa-glyph").model


@pytest.fixture(scope="module")
def world(shipped, script):
    """The model and, for each kind of scene, scenes of seeds of their own with a question of each kind."""
    return shipped, script.unseen(15, 0, SEED)


def evidence(script, scenes, rows) -> torch.Tensor:
    masks = torch.stack([script.evidence(scenes, row, asked) for row, asked in rows])
    return glyphs.patch_fraction(masks, (14, 14)) > 0


def test_questions_are_true_of_their_scenes(script):
    """Answers agree with the captions, and the evidence of a part is where its removal changes the picture."""
    scenes = script.drawn(20, 5, 1, 0, True)
    for row, (asked, caption) in enumerate(
        zip(script.questions(scenes, True, 0), glyphs.captions(scenes), strict=True)
    ):
        assert {one.kind for one in asked} >= {"part", "whether", "name", "count"}
        for one in asked:
            if one.kind == "part" and "eyes" not in one.text:
                assert one.answer in caption.split()
            if one.kind == "whether":
                *_, first, last = one.text.split()
                assert (one.answer == "yes") == ((first if last in glyphs.PARTS else last) in caption.split())
            if one.kind == "name":
                assert one.answer == glyphs.CLASS_NAMES[int(scenes.labels[row, 0])]
    for part in glyphs.PARTS:
        changed = (glyphs.without_part(scenes, part) != scenes.images).any(1)
        mask = torch.stack([script.evidence(scenes, row, script.Asked("", "", "", ((0, part),))) for row in range(20)])
        assert (changed <= mask).all()


def test_words_and_answers_are_all_known(script):
    for creatures, named in ((1, True), (2, True), (2, False)):
        scenes = script.drawn(20, 6, creatures, 0, named)
        for asked in script.questions(scenes, named, 0):
            for one in asked:
                assert set(one.text.split()) <= set(script.WORDS)
                assert one.answer in script.ANSWERS
                assert len(one.text.split()) + 2 <= script.TEXT["length"]


def test_the_card_holds_on_other_scenes(script, world):
    card = catalog.load().models["vqa-glyph"]
    model, kinds = world
    right: dict[str, list[bool]] = {}
    with torch.no_grad():
        for scenes, rows in kinds:
            images = glyphs.normalise(scenes.images)[[row for row, _ in rows]]
            best = model.answer(images, model.text.tokenize([asked.text for _, asked in rows])).argmax(1)
            for index, (_, asked) in zip(best.tolist(), rows, strict=True):
                right.setdefault(asked.kind, []).append(model.answers[index] == asked.answer)
                right.setdefault("all", []).append(model.answers[index] == asked.answer)
        images, labels = glyphs.batch(100, SEED, 1)
        right["top1"] = (model(glyphs.normalise(images)).argmax(1) == labels[:, 0]).tolist()
    names = {"all": "right", "top1": "top1"}
    for kind, values in right.items():
        expected = card.metrics[names.get(kind, f"{kind}_right")]
        spread = 4 * math.sqrt(max(expected * (1 - expected), 0.01) / len(values))
        assert abs(np.mean(values) - expected) < spread, (kind, np.mean(values), expected)


@pytest.fixture(scope="module")
def shares(script, world):
    """{kind: (n, 3)}: shares of relevance, raw attention and picture on the evidence of what was rightly answered."""
    model, kinds = world
    last = max(layer for layer, kind in enumerate(model.fusion) if kind == "cross")
    found: dict[str, list] = {}
    for scenes, rows in kinds:
        images = glyphs.normalise(scenes.images)[[row for row, _ in rows]]
        asked = [one.text for _, one in rows]
        explained = snippet.explain(model, images, asked)
        tokens = model.text.tokenize(asked)
        with torch.no_grad(), vit.capture(model, "attention") as record:
            model.answer(images, tokens)
        raw = record["attention"][last].mean(1)[:, 0, tokens.shape[1] :].unflatten(1, (14, 14))
        inside = evidence(script, scenes, rows)
        columns = [(x * inside).sum((1, 2)) / x.sum((1, 2)) for x in (explained.image, raw, torch.ones_like(raw))]
        for row, (_, one) in enumerate(rows):
            if explained.answers[row] == one.answer:
                found.setdefault(one.kind, []).append([float(column[row]) for column in columns])
    return {kind: np.array(values) for kind, values in found.items()}


@pytest.mark.parametrize(("kinds", "what"), [(("part", "whether", "colour"), "of one part"), (("name",), "of a name")])
def test_relevance_lies_on_the_evidence(kinds, what, shares, proof):
    mass, raw, chance = np.concatenate([shares[kind] for kind in kinds]).mean(0)
    oracle = "questions to 60 glyph scenes, rightly answered"
    at = f"share of relevance on the evidence of questions {what}, over chance ({chance:.3f})"
    proof(ID, at, mass / chance, at_least=2, kind="ground truth", oracle=oracle)
    at = f"the same, over that of raw attention ({raw:.3f})"
    proof(ID, f"questions {what}: {at}", mass / raw, at_least=1, kind="ground truth", oracle=oracle)


def test_the_question_chooses_the_part(shipped, script, proof):
    """The same picture, asked for the crest and for the tail."""
    scenes = script.drawn(40, SEED + 20, 1, 0, False)
    inside = glyphs.patch_fraction(scenes.part_masks[:, 0], (14, 14)) > 0  # (B, 5, 14, 14)
    crest, tail = (inside[:, glyphs.PARTS.index(part)] for part in ("crest", "tail"))
    own, other = [], []
    for asked, mine, theirs in (("crest", crest & ~tail, tail & ~crest), ("tail", tail & ~crest, crest & ~tail)):
        questions = [f"which {asked} does the creature have"] * 40
        found = snippet.explain(shipped, glyphs.normalise(scenes.images), questions)
        own.append((found.image * mine).sum((1, 2)))
        other.append((found.image * theirs).sum((1, 2)))
    share = (torch.cat(own) > torch.cat(other)).float().mean()
    what = "questions for crest or tail whose map favours the one that is asked about (chance 0.5)"
    proof(ID, what, share, at_least=0.75, kind="ground truth", oracle="40 glyph scenes")


def test_without_its_most_relevant_word_the_answer_loses_more(shipped, script, proof):
    """The logit falls further when the word of most relevance is hidden than when another word is, on the average."""
    scenes = script.drawn(12, SEED + 30, 1, 0, False)
    images, falls = glyphs.normalise(scenes.images), []
    for question in ("which crest does the creature have", "how many eyes does the creature have"):
        found = snippet.explain(shipped, images, [question] * 12)
        tokens, words = shipped.text.tokenize([question] * 12), len(question.split())
        rows, chosen = torch.arange(12), torch.tensor([shipped.answers.index(answer) for answer in found.answers])
        fall = []
        for place in range(words):
            hidden = tokens.clone()
            hidden[:, 1 + place] = snippet.PAD
            with torch.no_grad():
                fall.append(found.score - shipped.answer(images, hidden)[rows, chosen])
        fall = torch.stack(fall, 1)  # (12, words)
        best = fall[rows, found.text.argmax(1)]
        falls.append(best > (fall.sum(1) - best) / (words - 1))
    share = torch.cat(falls).float().mean()
    what = "questions in which hiding the most relevant word costs more than hiding another (chance 0.5)"
    proof(ID, what, share, at_least=0.75, kind="ground truth", oracle="24 questions to 12 glyph scenes")
