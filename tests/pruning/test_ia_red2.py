"""IA-RED²: interpreters and shorter sequences in plain loops, and the policy gradient against all possible draws."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    close_to_card,
    layer_norm,
    pictures,
    relative_error,
    roughen,
    tiny,
    twin_block,
    twin_tokens,
    weights,
)
from safetensors.torch import save_file
from torch import nn
from vitx import load_module
from vitx.vit import UnsupportedModel, embed

ID = "ia-red2"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2,
}
PATCHES = 24


def interpreted(groups: int = 2, **changes: Any) -> Any:
    """A rough model of 4 x 6 patches, four blocks and five classes, whose interpreters disagree about the patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.InterpretedTransformer(groups, **(BACKBONE | changes), num_classes=5)
    return roughen(model)


def twin(model: Any, image: torch.Tensor, threshold: float) -> tuple[np.ndarray, list[set[int]], np.ndarray]:
    """Logits, the patches alive after each block and the scores (groups, P), patch by patch, of one picture."""
    w, x, place = weights(model), list(twin_tokens(model, image)), list(range(-1, PATCHES))
    size, alive, table = len(model.blocks) // len(model.interpreters), [], []
    for group in range(len(model.interpreters)):
        of = {
            kind: (w[f"interpreters.{group}.{kind}.weight"], w[f"interpreters.{group}.{kind}.bias"])
            for kind in ("query", "key")
        }

        def linear(kind: str, token: np.ndarray, of: dict = of) -> np.ndarray:
            normed = (token - token.mean()) / math.sqrt(token.var() + 1e-5)
            return of[kind][0] @ normed + of[kind][1]

        asked, row, kept = linear("query", x[0]), np.zeros(PATCHES), [0]
        for index in range(1, len(x)):
            answer, votes = linear("key", x[index]), []
            for head in range(2):
                product = float(asked[4 * head : 4 * head + 4] @ answer[4 * head : 4 * head + 4])
                votes.append(1 / (1 + math.exp(-product / 2)))  # the square root of 4 is 2
            row[place[index]] = sum(votes) / 2
            if row[place[index]] > threshold:
                kept.append(index)
        x, place = [x[index] for index in kept], [place[index] for index in kept]
        table.append(row)
        for block in range(group * size, (group + 1) * size):
            x = list(twin_block(model, block, np.stack(x))["output"])
            alive.append({p for p in place if p >= 0})
    final = layer_norm(x[0], w["norm.weight"], w["norm.bias"])
    return final @ w["head.weight"].T + w["head.bias"], alive, np.stack(table)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.45, 0.5])
def test_patch_by_patch(threshold, proof):
    model = interpreted()
    x, errors = pictures(model, 3), []
    ours = snippet.explain(model, x, threshold=threshold)
    for index, image in enumerate(x):
        logits, alive, scores = twin(model, image, threshold)
        assert [{int(p) for p in layer.flatten().nonzero()} for layer in ours.alive[index]] == alive
        errors += [
            relative_error(ours.logits[index], logits),
            relative_error(ours.scores[index].flatten(1), scores),
        ]
    counts = ours.alive.flatten(2).sum(-1)
    assert threshold == 0 or (len(counts[:, -1].unique()) > 1 and counts.max() < PATCHES)  # pictures differ
    oracle = "interpreters and shorter sequences in loops"
    proof(ID, f"scores and logits, threshold {threshold}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_hiding_instead_of_dropping(proof):
    """As the authors' tool does it: every token stays in the sequence, and dropped ones are hidden from attention."""
    model = interpreted()
    x = pictures(model, 3)
    ours = snippet.explain(model, x)
    tokens = embed(model, x)
    with torch.no_grad():
        for block, alive in zip(model.blocks, ours.alive.transpose(0, 1), strict=True):
            mask = nn.functional.pad(alive.flatten(1), (1, 0), value=True)
            tokens = block(tokens, attn_mask=mask[:, None, None])
        theirs = model.forward_head(model.norm(tokens))
    error = relative_error(ours.logits, theirs)
    proof(ID, "dropping equals hiding", error, at_most=1e-12, kind="parity", oracle="attention masks at full length")


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"keep_rate": 1.0}])
def test_keeping_all_is_the_plain_model(options, proof):
    model = interpreted()
    x = pictures(model)
    ours = snippet.explain(model, x, **options)
    assert ours.alive.all()
    error = relative_error(ours.logits, model(x).detach())
    proof(ID, f"{options} is the plain model", error, at_most=1e-12, kind="closed form")


def test_kept_counts():
    model = interpreted()
    alive = snippet.explain(model, pictures(model, 3), keep_rate=0.7).alive.flatten(2).sum(-1)
    first = math.ceil(0.7 * PATCHES)
    second = math.ceil(0.7 * first)
    assert alive.tolist() == [[first, first, second, second]] * 3


def test_a_share_keeps_the_best():
    model = interpreted()
    found = snippet.explain(model, pictures(model, 3), keep_rate=0.5)
    for scores, alive in zip(found.scores[:, 0], found.alive[:, 0], strict=True):
        assert scores[alive].min() > scores[~alive].max()


def test_a_dropped_patch_never_returns_and_has_no_score():
    model = interpreted()
    found = snippet.explain(model, pictures(model, 3))
    assert (found.alive[:, 1:] <= found.alive[:, :-1]).all()
    assert ((found.scores[:, 1] > 0) == found.alive[:, 1]).all()
    assert torch.equal(found.heatmap(), found.scores[:, 1])


def test_a_batch_equals_single_pictures(proof):
    """Also where one picture of the batch keeps nothing at all, and so the class token stands alone."""
    model = interpreted()
    x = pictures(model, 4)
    scores = snippet.explain(model, x).scores[:, 0].flatten(1).amax(1)
    errors = []
    for threshold in (0.5, float(scores.sort().values[:2].mean()), 1.0):
        batch = snippet.explain(model, x, threshold=threshold)
        for index in range(4):
            alone = snippet.explain(model, x[index : index + 1], threshold=threshold)
            assert torch.equal(alone.alive[0], batch.alive[index])
            errors.append(relative_error(batch.logits[index], alone.logits[0]))
    assert not batch.alive.any()
    proof(ID, "a batch of pictures of different lengths", max(errors), at_most=1e-12, kind="contract")


def test_the_reward():
    kept, correct = torch.tensor([1.0, 0.5, 0.0, 0.5]), torch.tensor([True, True, True, False])
    assert snippet.reward(kept, correct, 5.0).tolist() == [0.0, 0.75, 1.0, -5.0]


def test_the_policy_gradient_is_that_of_the_expected_reward(proof):
    """All sixteen draws of four patches, weighted with their chances; the baseline must not change the sum."""
    model = interpreted(1, img_size=[16, 16], depth=2)
    x, penalty = pictures(model, 2), 2.0
    tokens = model.start(x)
    draws = torch.tensor(list(itertools.product([False, True], repeat=4)))  # (16, 4)
    rewards = []
    for draw in draws:
        kept = model.run_group(model.drop(tokens, draw.expand(2, -1)), 0)
        logits = model.forward_head(model.norm(kept.x))
        correct = logits.argmax(-1) == torch.tensor([0, 1])
        rewards.append(snippet.reward(draw.double().mean().expand(2), correct, penalty))
    rewards = torch.stack(rewards, 1).detach()  # (2, 16)
    assert (rewards < 0).any()
    assert (rewards > 0).any()
    scores = model.scores(tokens, 0)  # (2, 4)
    leaf = scores.detach().requires_grad_()
    chances = torch.where(draws, leaf[:, None], 1 - leaf[:, None]).prod(-1)  # (2, 16)
    (exact,) = torch.autograd.grad((chances * rewards).sum(1).mean(), leaf)
    greedy = [int((draws == row).all(1).nonzero()) for row in scores > 0.5]
    baseline = rewards[[0, 1], greedy]
    estimate = torch.zeros_like(leaf)
    for index, draw in enumerate(draws):
        advantage = (rewards[:, index] - baseline) * chances[:, index].detach()
        loss = snippet.policy_loss(leaf, draw.expand(2, -1), advantage, tokens.real)
        estimate -= 4 * torch.autograd.grad(loss, leaf)[0]  # the loss is per patch
    error = relative_error(estimate, exact)
    oracle = "derivative of the expected reward over all 16 draws"
    proof(ID, "the policy gradient is unbiased", error, at_most=1e-9, kind="closed form", oracle=oracle)


def test_tokens_that_were_not_there_do_not_count():
    scores = torch.rand(2, 5, dtype=torch.float64).requires_grad_()
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    loss = snippet.policy_loss(scores, scores > 0.5, torch.ones(2), real)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert ((gradient != 0) == real).all()


@pytest.mark.parametrize("options", [{"threshold": -0.1}, {"threshold": 1.1}, {"keep_rate": 0.0}, {"keep_rate": 1.2}])
def test_bad_options_are_named(options):
    model = interpreted()
    with pytest.raises(ValueError, match="threshold lies from 0 to 1, keep_rate above 0"):
        snippet.explain(model, pictures(model), **options)


def test_a_stock_model_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="no trained interpreters"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = interpreted().float()
    about = {"backbone": json.dumps(BACKBONE), "num_classes": "5", "groups": "2"}
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "x.safetensors", about)
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    assert not again.training
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("ia-red2-glyph", monkeypatch, 0.05)
    oracle = "200 glyph scenes"
    gain = measured["on_creature"] / measured["creature"]
    proof(
        ID,
        "share of the creature in what is kept, over its share of the picture",
        gain,
        at_least=1.5,
        kind="ground truth",
        oracle=oracle,
    )
    proof(
        ID, "share of the creature that is kept", measured["covered"], at_least=0.6, kind="ground truth", oracle=oracle
    )
