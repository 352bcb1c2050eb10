"""AdaViT: decisions and skipping against loops, against a model that computes everything, and against the kit."""

import itertools
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    layer_norm,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    training_script,
    twin_tokens,
    weights,
)
from scipy.special import erf
from vitx import catalog, load_module, models
from vitx.vit import UnsupportedModel, gated_units

ID = "adavit"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 5,
    "num_heads": 3,
    "mlp_ratio": 2,
}
NOTHING_LESS = {"threshold": 0.0, "head_threshold": 0.0, "sublayer_threshold": 0.0}


def adaptive_model(seed: int = 0, **options: Any) -> Any:
    """A rough model of 4 x 6 patches, five classes, five blocks and three heads, whose decisions differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return roughen(snippet.AdaptiveTransformer(num_classes=5, **(BACKBONE | options)), seed)


def twin(model: Any, image: torch.Tensor, thresholds: tuple[float, float, float]) -> tuple[np.ndarray, list[tuple]]:
    """Logits, and for each block the patches, heads and sublayers used; token by token and head by head."""
    w, x, history = weights(model), twin_tokens(model, image), []
    for index, block in enumerate(model.blocks):
        own = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}

        def chosen(kind: str, x: np.ndarray, limit: float, index: int = index) -> list[bool]:
            name = f"decisions.{index}.{kind}"
            odds = [row @ x + bias for row, bias in zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True)]
            return [1 / (1 + math.exp(-value)) > limit for value in odds]

        normed = np.stack([layer_norm(token, own["norm1.weight"], own["norm1.bias"]) for token in x])
        tokens = [0] + [i for i in range(1, len(x)) if chosen("patches", normed[i], thresholds[0])[0]]
        heads = chosen("heads", x[0], thresholds[1]) if index else [True] * block.attn.num_heads
        attends, feeds = chosen("sublayers", x[0], thresholds[2]) if index else [True, True]
        width = x.shape[1] // len(heads)
        if attends:
            after = x.copy()
            for i in tokens:
                mixed = np.zeros(x.shape[1])
                for m in [m for m, runs in enumerate(heads) if runs]:
                    q, k, v = (
                        own["attn.qkv.weight"][p * x.shape[1] + m * width :][:width] @ normed.T
                        + own["attn.qkv.bias"][p * x.shape[1] + m * width :][:width, None]
                        for p in range(3)
                    )  # (d, N) each
                    powers = [math.exp(q[:, i] @ k[:, j] / math.sqrt(width)) for j in tokens]
                    for j, power in zip(tokens, powers, strict=True):
                        mixed[m * width : (m + 1) * width] += power / sum(powers) * v[:, j]
                after[i] = x[i] + own["attn.proj.weight"] @ mixed + own["attn.proj.bias"]
            x = after
        if feeds:
            for i in tokens:
                hidden = own["mlp.fc1.weight"] @ layer_norm(x[i], own["norm2.weight"], own["norm2.bias"])
                hidden = hidden + own["mlp.fc1.bias"]
                active = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
                x[i] = x[i] + own["mlp.fc2.weight"] @ active + own["mlp.fc2.bias"]
        patches = {i - 1 for i in tokens[1:]} if attends or feeds else set()
        history.append((patches, [runs and attends for runs in heads], [attends, feeds]))
    return w["head.weight"] @ layer_norm(x[0], w["norm.weight"], w["norm.bias"]) + w["head.bias"], history


@pytest.mark.parametrize("thresholds", [(0.5, 0.5, 0.5), (0.3, 0.6, 0.4), (0.7, 0.3, 0.6), (0.95, 0.95, 0.3)])
def test_token_by_token(thresholds, proof):
    model, errors = adaptive_model(), []
    x = pictures(model, 4)
    ours = snippet.explain(
        model, x, threshold=thresholds[0], head_threshold=thresholds[1], sublayer_threshold=thresholds[2]
    )
    for row, image in enumerate(x):
        logits, history = twin(model, image, thresholds)
        errors.append(relative_error(ours.logits[row], logits))
        for index, (patches, heads, sublayers) in enumerate(history):
            assert {int(p) for p in ours.alive[row, index].flatten().nonzero()} == patches
            assert ours.heads[row, index].tolist() == heads
            assert ours.sublayers[row, index].tolist() == sublayers
    what = f"logits, thresholds {', '.join(f'{value:g}' for value in thresholds)}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="decisions and skipping in loops, token by token")


def test_the_pictures_of_these_tests_differ():
    """Else batches, heads and sublayers would not be tested at all."""
    model = adaptive_model()
    found = snippet.explain(model, pictures(model, 4))
    for kind in (found.alive.flatten(2), found.heads[:, 1:], found.sublayers[:, 1:]):
        assert kind.any()
        assert not kind.all()
        assert not torch.equal(kind, kind[:1].expand_as(kind))
    assert len(set(found.alive.flatten(2).sum(-1).flatten().tolist())) > 4  # sequences of many lengths
    assert (found.alive[:, 1:] & ~found.alive[:, :-1]).any()  # a patch that one block passes over can come back


def test_using_everything_is_the_plain_model(proof):
    model, plain = adaptive_model(), tiny(5, img_size=(32, 48), embed_dim=12, num_heads=3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decisions")})
    x = pictures(model)
    found = snippet.explain(model, x, **NOTHING_LESS)
    assert found.alive.all()
    assert found.heads.all()
    assert found.sublayers.all()
    assert (found.heatmap() == 1).all()
    wanted = plain(x).detach()
    assert torch.equal(model(x).detach(), wanted)  # called as it is, too
    error = relative_error(found.logits, wanted)
    proof(ID, "thresholds of zero give the plain model", error, at_most=1e-12, kind="closed form")


def test_heads_alone_are_gates_of_the_kit(proof):
    """Every patch and every sublayer used, a head that is left out is one whose output is multiplied by zero."""
    model = adaptive_model()
    x = pictures(model, 4)
    found = snippet.explain(model, x, threshold=0.0, sublayer_threshold=0.0)
    assert not found.heads.all()
    with gated_units(model, heads=found.heads.transpose(0, 1).double()):
        wanted = model(x).detach()
    error = relative_error(found.logits, wanted)
    proof(ID, "heads alone", error, at_most=1e-12, kind="parity", oracle="vitx.vit.gated_units on timm's own blocks")


def test_computing_less_changes_nothing(proof):
    """timm's own blocks at full length, their updates multiplied with the decisions: all is computed, in vain."""
    model = adaptive_model()
    x = pictures(model, 4)
    found = snippet.explain(model, x)
    # A block that skips its attention still runs its MLP on the patches chosen, so alive tells both.
    used = torch.nn.functional.pad(found.alive.flatten(2), (1, 0), value=True)  # (B, L, N)
    tokens = model._pos_embed(model.patch_embed(x))
    with ExitStack() as stack:
        stack.enter_context(gated_units(model, heads=found.heads.transpose(0, 1).double()))
        for index, block in enumerate(model.blocks):
            for part, layer in enumerate((block.ls1, block.ls2)):
                gate = (used[:, index] & found.sublayers[:, index, part, None])[..., None]
                handle = layer.register_forward_hook(lambda _, __, update, gate=gate: update * gate)
                stack.callback(handle.remove)
        for index, block in enumerate(model.blocks):
            tokens = block(tokens, attn_mask=used[:, index, None, None])
    wanted = model.forward_head(model.norm(tokens)).detach()
    error = relative_error(found.logits, wanted)
    what = "what is not computed is what would be multiplied by zero"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="timm's blocks at full length, updates masked")


def test_the_mask_of_training_is_the_skipping_of_inference(proof):
    """With the same decisions the masked pass gives the logits of the model that computes less."""
    model = adaptive_model()
    x = pictures(model, 4)
    found = snippet.explain(model, x)
    tokens, decisions = model.masked_forward(x, lambda odds: (odds > 0).double())
    assert [tuple(kind.shape) for kind in decisions] == [(4, 5, 24), (4, 5, 3), (4, 5, 2)]
    runs = decisions[2] > 0
    assert torch.equal(runs, found.sublayers)
    assert torch.equal((decisions[0] > 0) & runs.any(-1, keepdim=True), found.alive.flatten(2))
    assert torch.equal((decisions[1] > 0) & runs[..., :1], found.heads)
    error = relative_error(model.forward_head(tokens).detach(), found.logits)
    proof(ID, "masked pass of training equals skipping", error, at_most=1e-9, kind="closed form")


def test_what_is_not_used_is_not_computed():
    """The attention has a row for each head used, as long as the longest picture; the MLP sees used tokens only."""
    model, attended, fed = adaptive_model(), [], []
    x = pictures(model, 4)
    handles = []
    for block in model.blocks:
        handles.append(block.attn.q_norm.register_forward_pre_hook(lambda _, a: attended.append(a[0].shape[:2])))
        handles.append(block.mlp.register_forward_pre_hook(lambda _, a: fed.append(a[0].shape[0])))
    found = snippet.explain(model, x)
    for handle in handles:
        handle.remove()
    tokens = 1 + found.alive.flatten(2).sum(-1)  # (B, L), with the class token
    expected = []
    for index in range(5):
        runs = found.sublayers[:, index, 0]
        if runs.any():
            expected.append((int(found.heads[:, index].sum()), int(tokens[runs, index].max())))
    assert [tuple(shape) for shape in attended] == expected
    assert fed == (tokens * found.sublayers[..., 1]).sum(0).tolist()
    assert sum(fed) < 4 * 5 * 25


def test_a_batch_equals_its_pictures(proof):
    model = adaptive_model()
    x = pictures(model, 6)
    together, errors = snippet.explain(model, x), []
    for row, image in enumerate(x):
        alone = snippet.explain(model, image[None])
        errors.append(relative_error(alone.logits[0], together.logits[row]))
        for name in ("alive", "heads", "sublayers"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])
    proof(ID, "a batch of ragged pictures equals its pictures", max(errors), at_most=1e-12, kind="closed form")


def test_when_no_head_is_left_only_the_bias_moves_the_tokens(proof):
    """Heads can all be off while the attention runs: what remains of it is the bias of its projection."""
    model = adaptive_model()
    x = pictures(model)
    found = snippet.explain(model, x, threshold=0.0, head_threshold=1 - 1e-12, sublayer_threshold=0.0)
    assert not found.heads[:, 1:].any()
    tokens = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    for block in list(model.blocks)[1:]:
        tokens = tokens + block.attn.proj.bias
        tokens = tokens + block.mlp(block.norm2(tokens))
    error = relative_error(found.logits, model.forward_head(model.norm(tokens)).detach())
    proof(ID, "without heads the attention adds its bias", error, at_most=1e-12, kind="closed form")


def test_when_every_block_is_skipped_the_first_one_remains(proof):
    model = adaptive_model()
    x = pictures(model)
    found = snippet.explain(model, x, threshold=0.0, sublayer_threshold=1 - 1e-12)
    assert found.alive[:, 0].all()
    assert not found.alive[:, 1:].any()
    assert torch.equal(found.heatmap(), torch.full((2, 4, 6), 0.2, dtype=torch.float64))
    tokens = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    error = relative_error(found.logits, model.forward_head(model.norm(tokens)).detach())
    proof(ID, "skipped blocks leave the first one", error, at_most=1e-12, kind="closed form")


def test_a_higher_threshold_uses_less_of_the_picture():
    """In the first block, whose tokens do not depend on any decision."""
    model = adaptive_model()
    x = pictures(model, 4)
    first = [snippet.explain(model, x, threshold=value).alive[:, 0] for value in (0.0, 0.3, 0.5, 0.7, 0.9)]
    assert all((higher <= lower).all() for lower, higher in itertools.pairwise(first))
    counts = [int(alive.sum()) for alive in first]
    assert counts[0] == 96 > counts[2] > counts[-1]


def test_decisions_follow_their_probabilities(proof):
    """Gumbel-softmax draws 1 as often as m says, whatever the temperature, and its gradient reaches the log-odds."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    log_odds = probability.logit().expand(20_000, -1).clone().requires_grad_()
    uniform = torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
    drawn = snippet.gumbel_decisions(log_odds, uniform)
    assert torch.equal(drawn.detach().round(), snippet.gumbel_decisions(log_odds, uniform, 0.1).detach().round())
    assert set(drawn.detach().round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    drawn.sum().backward()
    assert log_odds.grad is not None
    assert (log_odds.grad > 0).all()
    error = (drawn.detach().mean(0) - probability).abs().max()
    proof(ID, "share of ones among 20,000 decisions", error, at_most=0.015, kind="closed form")


def test_the_soft_decision_is_gumbel_softmax_of_two_choices(proof):
    """Its slope is that of softmax((log pi + g) / tau), where the difference of the two g is logistic."""
    uniform = torch.rand(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gumbel = -(-uniform.log()).log()  # (50, 2)
    log_odds = torch.linspace(-3, 3, 50, dtype=torch.float64).requires_grad_()
    two = torch.stack([log_odds.sigmoid(), 1 - log_odds.sigmoid()], 1).log()
    (theirs,) = torch.autograd.grad(((two + gumbel) / 5).softmax(1)[:, 0].sum(), log_odds)
    logistic = (gumbel[:, 0] - gumbel[:, 1]).sigmoid()
    (ours,) = torch.autograd.grad(snippet.gumbel_decisions(log_odds, logistic).sum(), log_odds)
    error = relative_error(ours, theirs)
    proof(ID, "gradient of decisions", error, at_most=1e-9, kind="parity", oracle="Gumbel-softmax written out")


def test_the_usage_loss_in_loops(proof):
    generator = torch.Generator().manual_seed(1)
    decisions = [(torch.rand(3, 4, n, generator=generator, dtype=torch.float64) < 0.5).double() for n in (10, 3, 2)]
    decisions[2][0, 1] = 0  # a skipped block, whose heads do not count
    budgets, shares = (0.4, 0.9, 0.7), ([], [], [])
    for b in range(3):
        for block in range(4):
            shares[0].extend(decisions[0][b, block].tolist())
            if block:
                shares[2].extend(decisions[2][b, block].tolist())
                if sum(decisions[2][b, block].tolist()) > 0:
                    shares[1].extend(decisions[1][b, block].tolist())
    off = [sum(share) / len(share) - budget for share, budget in zip(shares, budgets, strict=True)]
    theirs = off[0] ** 2 + abs(off[1]) + abs(off[2])
    error = abs(float(snippet.usage_loss(decisions, budgets)) - theirs) / theirs
    proof(ID, "usage loss", error, at_most=1e-12, kind="parity", oracle="loops")


def test_the_usage_loss_teaches_every_decision():
    """Its gradient reaches all three kinds of layers of every block that has them."""
    model = adaptive_model()
    x = pictures(model, 4)
    parameters = dict(model.decisions.named_parameters())
    uniform = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, decisions = model.masked_forward(x, lambda odds: snippet.gumbel_decisions(odds, uniform(odds.shape)))
    slopes = torch.autograd.grad(snippet.usage_loss(decisions, (0.0, 0.0, 0.0)), list(parameters.values()))
    for name, slope in zip(parameters, slopes, strict=True):
        assert slope.isfinite().all(), name
        assert slope.abs().max() > 0, name


def test_a_decision_learns_from_its_own_update_only(proof):
    """No gradient flows through what other tokens see of a patch; its own slope is its update times the output's."""
    model = adaptive_model()
    block, generator = model.blocks[1], torch.Generator().manual_seed(3)
    x = torch.randn(1, 6, 12, generator=generator, dtype=torch.float64)
    used = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    heads, attention_only = torch.ones(1, 3).double(), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    after = snippet.masked_block(block, x, used, heads, attention_only)
    errors = []
    for i in range(6):
        (slope,) = torch.autograd.grad(after[0, i].sum(), used, retain_graph=True)
        others = [0] if i in (2, 4) else [j for j in (0, 1, 3, 5) if j != i]
        assert (slope[0, others] == 0).all()
        seen = [i] if i in (2, 4) else [0, 1, 3, 5]  # an unused token sees itself alone
        mask = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(seen), True)
        update = block.attn(block.norm1(x), attn_mask=mask[None, None, None])[0, i].detach()
        errors.append(relative_error(slope[0, i], update.sum()))
    proof(ID, "slope of a patch's decision is its update", max(errors), at_most=1e-9, kind="closed form")


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"head_threshold": -0.1}, {"sublayer_threshold": math.nan}])
def test_bad_thresholds_are_named(options):
    model = adaptive_model()
    with pytest.raises(ValueError, match="thresholds lie from 0 to below 1"):
        snippet.explain(model, pictures(model), **options)


def test_a_model_without_decision_networks_is_refused():
    model = tiny(4)
    with pytest.raises(UnsupportedModel, match="no decision networks"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = adaptive_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    script, card = training_script("adavit_glyph"), catalog.load().models["adavit-glyph"]
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    settings = {name: script.THRESHOLDS[name] for name in ("all", "0.5")}
    measured = script.measure(partial(snippet.explain, models.load("adavit-glyph").model), settings, 200)
    for name, value in measured.items():
        share = card.metrics[name]
        sure = 3 * math.sqrt(share * (1 - share) * (1 / 200 + 1 / 400)) if name.startswith(("top1", "both")) else 0
        assert abs(value - share) < max(0.05, sure), name  # an accuracy near one half of so few scenes is not sure
    oracle = "200 glyph scenes"
    lift = measured["precision_0.5"] / measured["precision_all"]
    what = "share of the creature in the patches used over that in all"
    proof(ID, what, lift, at_least=1.5, kind="ground truth", oracle=oracle)
    what = "accuracy with what it decides to use"
    proof(ID, what, measured["top1_0.5"], at_least=0.85, kind="ground truth", oracle=oracle)  # chance is 0.083
