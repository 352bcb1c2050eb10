import math

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_tokens, variant, weights
from scipy.special import erf
from vitx import glyphs, models
from vitx.vit import UnsupportedModel

ID = "atman"
SIZE = (16, 24)  # 2 x 3 patches


def log_probability(model, image, label, factors, shift):
    """log p(y | image) in plain loops, every score multiplied by the factor of its key."""
    x = twin_tokens(model, image)
    for index in range(len(model.blocks)):
        w = {
            n.removeprefix(f"blocks.{index}."): t for n, t in weights(model).items() if n.startswith(f"blocks.{index}.")
        }
        heads, width = 2, x.shape[1] // 2
        qkv = layer_norm(x, w["norm1.weight"], w["norm1.bias"]) @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
        mixed = np.zeros_like(x)
        for m in range(heads):
            q, k, v = (qkv[:, p * heads * width + m * width :][:, :width] for p in range(3))
            for i in range(len(x)):
                scores = [float(q[i] @ k[j]) / math.sqrt(width) for j in range(len(x))]
                least = min(scores) if shift else 0
                powers = [math.exp((score - least) * factor) for score, factor in zip(scores, factors, strict=True)]
                for j in range(len(x)):
                    mixed[i, m * width : (m + 1) * width] += powers[j] / sum(powers) * v[j]
        x = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        hidden = layer_norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        x = x + (hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    w = weights(model)
    logits = layer_norm(x, w["norm.weight"], w["norm.bias"])[0] @ w["head.weight"].T + w["head.bias"]
    return logits[label] - math.log(np.exp(logits).sum())


def twin(model, image, label, f, threshold, shift):
    embeddings = twin_tokens(model, image)[1:] - weights(model)["pos_embed"][0, 1:]
    whole = log_probability(model, image, label, [1.0] * 7, False)
    rises = []
    for i in range(6):
        factors = [1.0] * 7
        for j in range(6):
            a, b = embeddings[i], embeddings[j]
            cosine = a @ b / math.sqrt((a @ a) * (b @ b))
            if i == j:
                factors[1 + j] = 1 - f
            elif threshold is not None and cosine >= threshold:
                factors[1 + j] = 1 - f * cosine
        rises.append(whole - log_probability(model, image, label, factors, shift))
    return np.array(rises).reshape(2, 3)


@pytest.mark.parametrize(
    ("depth", "f", "threshold", "shift"),
    [(2, 0.9, None, False), (3, 0.9, 0.1, False), (2, 0.6, 0.1, True), (3, 0.9, None, True)],
)
def test_loops(depth, f, threshold, shift, proof):
    model = tiny(depth, img_size=SIZE)
    x, target = pictures(model), torch.tensor([4, 2])
    theirs = [twin(model, image, int(label), f, threshold, shift) for image, label in zip(x, target, strict=True)]
    ours = vitx.load(ID)(model, x, target, suppression=f, threshold=threshold, shift=shift)
    if threshold is not None:  # the neighbours matter here
        assert (
            relative_error(vitx.load(ID)(model, x, target, suppression=f, threshold=None, shift=shift), theirs) > 0.01
        )
    what = f"f {f}, threshold {threshold}{', shifted' if shift else ''}, depth {depth}"
    proof(ID, what, relative_error(ours, theirs), at_most=1e-9, kind="parity", oracle="scores scaled in plain loops")


def test_no_suppression_changes_nothing(proof):
    for shift in (False, True):
        model = tiny(3)
        error = vitx.load(ID)(model, pictures(model), suppression=0.0, threshold=None, shift=shift).abs().max()
        proof(ID, f"f = 0 leaves the loss as it is, shift {shift}", error, at_most=1e-12, kind="closed form")


def test_scores_of_zero_cannot_be_suppressed(proof):
    """Without queries all scores are 0, and 0 times a factor is 0."""
    model = tiny(3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:8] = 0
            block.attn.qkv.bias[:8] = 0
    error = vitx.load(ID)(model, pictures(model)).abs().max()
    proof(ID, "uniform attention: no patch matters", error, at_most=1e-12, kind="closed form")


def test_equal_patches_are_suppressed_together():
    """With a threshold of 1 only copies of a patch are its neighbours, and copies share their value."""
    model = tiny(2, img_size=SIZE)
    x = pictures(model)
    x[:, :, 8:, 16:] = x[:, :, :8, :8]
    explain = vitx.load(ID)
    alone, together = explain(model, x, threshold=None), explain(model, x, threshold=1 - 1e-12)
    assert torch.allclose(together[:, 0, 0], together[:, 1, 2], rtol=1e-9)
    assert not torch.allclose(alone[:, 0, 0], alone[:, 1, 2])
    assert torch.allclose(together[:, 0, 1], alone[:, 0, 1], rtol=1e-9)


def test_cells_share_one_value():
    model = tiny(2, img_size=(24, 32))  # 3 x 4 patches: cells of two rows and one row
    relevance = vitx.load(ID)(model, pictures(model), cell=2, threshold=None)
    for rows in (slice(0, 2), slice(2, 3)):
        for columns in (slice(0, 2), slice(2, 4)):
            assert (relevance[:, rows, columns] == relevance[:, rows.start, columns.start, None, None]).all()
    assert relevance[0].unique().numel() == 4


def test_the_order_of_scaling_and_qk_norm():
    """Keys are scaled after their norm, which would undo it."""
    model = variant("qk-norm")
    x = pictures(model)
    ours = vitx.load(ID)(model, x, threshold=None)
    shares = []

    def scaled(module, query, key, value):
        scores = (query @ key.mT) * query.shape[-1] ** -0.5
        scores[..., 1] *= 0.1  # the first patch
        return scores.softmax(-1) @ value

    with torch.inference_mode():
        whole = model(x).log_softmax(-1)
        label = whole.argmax(-1, keepdim=True)
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            a = block.attn
            q, k, v = a.qkv(block.norm1(tokens)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = scaled(a, a.q_norm(q), a.k_norm(k), v).transpose(1, 2).flatten(2)
            tokens = tokens + a.proj(mixed)
            tokens = tokens + block.mlp(block.norm2(tokens))
        shares = (whole - model.forward_head(model.norm(tokens)).log_softmax(-1)).gather(1, label)[:, 0]
    assert relative_error(ours[:, 0, 0], shares) < 1e-9


def test_creatures_are_found(proof):
    loaded = models.load("glyph")
    scenes = glyphs.scenes(6, seed=31)
    relevance = vitx.load(ID)(loaded.model, glyphs.normalise(scenes.images))
    truth = glyphs.patch_fraction(scenes.object_masks[:, :1].any(1), (14, 14)) > 0.5
    gaps = [float(r[t].mean() / r.abs().mean()) for r, t in zip(relevance, truth, strict=True)]
    what = "mean relevance of the creature's patches over the mean magnitude of all"
    proof(ID, what, np.mean(gaps), at_least=1.5, kind="ground truth", oracle="6 glyph scenes")


def test_what_is_refused():
    model, pooled = tiny(2), tiny(2, class_token=False, global_pool="map")
    for options in ({"threshold": 1.5}, {"threshold": -0.1}, {"cell": 0}, {"cell": 3}):
        with pytest.raises(ValueError, match=r"threshold|cell"):
            vitx.load(ID)(model, pictures(model), **options)
    before = [len(m._forward_hooks) for m in pooled.modules()]
    with pytest.raises(UnsupportedModel, match="attention pooling"):
        vitx.load(ID)(pooled, pictures(pooled), shift=True)
    assert before == [len(m._forward_hooks) for m in pooled.modules()]
