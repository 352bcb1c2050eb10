"""Multi-dimensional compression: dependence in loops, the Gaussian process solved directly, shorter sequences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close_to_card, pictures, relative_error, tiny, twin_forward
from scipy.integrate import quad
from torch.utils.flop_counter import FlopCounterMode
from vitx import load_module
from vitx.vit import UnsupportedModel, embed

ID = "md-vit"
snippet = load_module(ID)


def md_vit_model(depth: int = 4, **options: Any) -> Any:
    """A rough model with random scores and two policies."""
    settings = {
        "img_size": (32, 40),
        "patch_size": 8,
        "embed_dim": 16,
        "num_heads": 4,
        "mlp_ratio": 1,
        "num_classes": 5,
    }
    model: Any = snippet.MdVitTransformer(2, **settings | options, depth=depth).double().eval()
    plain = tiny(depth, img_size=(32, 40), embed_dim=16, num_heads=4, mlp_ratio=1, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    model.heads.copy_(torch.rand(depth, 4, generator=generator))
    model.neurons.copy_(torch.rand(depth, 16, generator=generator))
    model.rates.copy_(torch.tensor([0.6, 0.4]))
    model.policies.copy_(torch.rand(2, 2 * depth + 1, generator=generator) * 0.5)
    return model


def twin_gram(rows: np.ndarray, gaussian: bool) -> np.ndarray:
    """H K H for vectors in rows, entry by entry."""
    n = len(rows)
    k = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if gaussian:
                square = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
                k[i, j] = sum(math.exp(-square / (2 * sigma**2)) for sigma in (1, 2, 4, 8, 16)) / 5
            else:
                k[i, j] = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
    h = np.eye(n) - np.ones((n, n)) / n
    return h @ k @ h


def test_scores_are_traces_of_centred_gram_matrices(proof):
    """The whole transformer in numpy, and every unit by itself."""
    model = tiny(2)
    x = pictures(model, 6)
    ours = snippet.dependence_scores(model, x)
    runs = [twin_forward(model, image) for image in x]
    answers = []
    for _, logits in runs:
        powers = np.exp(logits - logits.max())
        answers.append(powers / powers.sum())
    of_answers, errors = twin_gram(np.stack(answers), gaussian=False), []
    for layer in range(2):
        mixed = np.stack([records[layer]["mixed"] for records, _ in runs])  # (B, N, 8)
        heads = [twin_gram(mixed[:, :, 4 * m : 4 * m + 4].mean(2), gaussian=True) for m in range(2)]
        cross = np.trace(heads[0] @ heads[1])
        errors.append(relative_error(ours["heads"][layer], [np.trace(g @ of_answers) - 0.1 * cross for g in heads]))
        hidden = np.stack([records[layer]["activated"] for records, _ in runs])  # (B, N, 16)
        relevance = np.array([np.trace(twin_gram(hidden[:, :, j], gaussian=True) @ of_answers) for j in range(16)])
        size = np.array([np.abs(hidden[:, :, j]).sum() for j in range(16)])
        scaled = [(v - v.min()) / (v.max() - v.min()) for v in (relevance, size)]
        errors.append(relative_error(ours["neurons"][layer], 0.1 * scaled[0] + 0.9 * scaled[1]))
    proof(ID, "scores of heads and neurons", max(errors), at_most=1e-9, kind="parity", oracle="kernels in plain loops")


def test_independence_scores_nothing_and_dependence_something():
    """A feature that is a function of the answer, of any shape, against one that has nothing to do with it."""
    generator = torch.Generator().manual_seed(0)
    answer = torch.rand(200, 1, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.rand(200, 1, generator=generator, dtype=torch.float64) * 2 - 1
    gram_of_answer = snippet.gram(answer.abs(), "linear")
    related, unrelated = ((snippet.gram(v, "gaussian") * gram_of_answer).sum() for v in (answer, noise))
    assert related > 20 * unrelated.abs()
    correlation = torch.corrcoef(torch.cat([answer, answer.abs()], 1).T)[0, 1]
    assert abs(float(correlation)) < 0.2  # which would miss it


def test_expected_improvement_is_the_mean_of_improvements(proof):
    """Posterior by a plain inverse, the length by trying all, and the expectation by integration."""
    generator = np.random.default_rng(1)
    tried, candidates = generator.random((7, 3)), generator.random((5, 3))
    found = np.sin(3 * tried.sum(1)) / 2
    ours = snippet.expected_improvement(tried, found, candidates)

    def matern(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
        distances = [[math.sqrt(3) * math.dist(p, q) / length for q in b] for p in a]
        return np.array([[(1 + d) * math.exp(-d) for d in row] for row in distances])

    def likelihood(length: float) -> float:
        k = matern(tried, tried, length) + 1e-5 * np.eye(7)
        return float(-0.5 * found @ np.linalg.inv(k) @ found - 0.5 * math.log(np.linalg.det(k)))

    length = max(np.logspace(-1.5, 1.5, 31), key=likelihood)
    inverse = np.linalg.inv(matern(tried, tried, length) + 1e-5 * np.eye(7))
    theirs = []
    for candidate in candidates:
        k = matern(candidate[None], tried, length)[0]
        mean, deviation = k @ inverse @ found, math.sqrt(1 - k @ inverse @ k)
        top = max(found)

        def gain(v: float, mean: float = mean, deviation: float = deviation, top: float = top) -> float:
            density = math.exp(-(((v - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
            return (v - top) * density

        theirs.append(quad(gain, top, max(top, mean) + 12 * deviation, limit=200)[0])
    error = relative_error(ours, theirs)
    proof(
        ID, "expected improvement", error, at_most=1e-6, kind="parity", oracle="posterior by inverse, scipy integration"
    )


def test_the_sequence_shortens_by_the_attention_of_the_class_token(proof):
    """Token by token; the class token stays first and the others that go become their mean."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    attention = torch.rand(3, 9, generator=generator, dtype=torch.float64)
    errors = []
    for ratio in (0.1, 0.3, 0.5):
        ours, kept = snippet.shortened(x, attention, ratio), int(9 * (1 - ratio))
        assert ours.shape[1] == kept + 1
        for row in range(3):
            order = [0, *sorted(range(1, 9), key=lambda i, row=row: -float(attention[row, i]))]
            mean = torch.stack([x[row, i] for i in order[kept:]]).mean(0)
            errors.append(relative_error(ours[row], torch.stack([*(x[row, i] for i in order[:kept]), mean])))
    proof(ID, "shorter sequences", max(errors), at_most=1e-12, kind="parity", oracle="token by token")


@pytest.mark.parametrize("keep_rate", [0.6, 0.4])
def test_operations_and_logits_of_the_smaller_model(keep_rate, proof):
    """torch counts the operations of the smaller model, which shortens the sequence too."""
    model = md_vit_model()
    x = pictures(model, 3)
    found, smaller = snippet.explain(model, x, keep_rate=keep_rate), snippet.prune(model, keep_rate)
    policy = snippet.policy_of(model, keep_rate)

    def counted(of: Any) -> int:
        for block in of.blocks:
            block.attn.fused_attn = False
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            of.forward_features(x)
        with torch.no_grad(), FlopCounterMode(display=False) as before:
            embed(of, x)
        return counter.get_total_flops() - before.get_total_flops()

    ours, theirs = snippet.operations(model, policy[None].numpy())[0], counted(smaller) / counted(model)
    oracle = "torch.utils.flop_counter"
    proof(ID, f"operations of a policy, {keep_rate}", abs(ours - theirs), at_most=1e-6, kind="parity", oracle=oracle)
    error = relative_error(found.logits, smaller(x).detach())
    proof(ID, f"smaller model, keep rate {keep_rate}", error, at_most=1e-12, kind="closed form")


def test_pruned_units_are_as_if_silenced(proof):
    """Without a shorter sequence: the full model whose units are silenced by hooks on their outputs."""
    model = md_vit_model()
    model.policies[:, -1] = 0
    x = pictures(model, 2)
    found = snippet.explain(model, x, keep_rate=0.4)
    assert not found.kept["heads"].all()
    handles = []
    for index, block in enumerate(model.blocks):
        heads = found.kept["heads"][index].double().repeat_interleave(4)
        for layer, gate in ((block.attn.proj, heads), (block.mlp.fc2, found.kept["neurons"][index].double())):
            handles.append(layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,)))
    with torch.no_grad():
        silenced = model(x)
    for handle in handles:
        handle.remove()
    error = relative_error(found.logits, silenced)
    proof(ID, "smaller model against silenced units", error, at_most=1e-12, kind="closed form")


def test_nothing_pruned_is_the_plain_model(proof):
    model, plain = md_vit_model(), tiny(4, img_size=(32, 40), embed_dim=16, num_heads=4, mlp_ratio=1)
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(mask.all() for mask in found.kept.values())
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


def test_kept_counts_are_whole_numbers_below():
    scores = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    kept = snippet.kept_units(scores, torch.tensor([0.0, 0.25, 0.99]))
    assert kept.sum(1).tolist() == [10, 7, 1]
    assert scores[1][kept[1]].min() > scores[1][~kept[1]].max()


def test_what_is_refused():
    model = md_vit_model()
    x = pictures(model)
    with pytest.raises(ValueError, match=r"keep rates 1, 0\.6, 0\.4; not 0\.5"):
        snippet.explain(model, x, keep_rate=0.5)
    with pytest.raises(ValueError, match="out of range"):
        snippet.explain(model, x, torch.tensor([0, 5]))
    with pytest.raises(UnsupportedModel, match="MdVitTransformer"):
        snippet.explain(tiny(2), pictures(tiny(2)))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("md-vit-glyph", monkeypatch, within=0.08)
    what = "accuracy with six tenths of the operations"
    proof(ID, what, measured["top1_at_0.6"], at_least=0.75, kind="ground truth", oracle="200 scenes")
