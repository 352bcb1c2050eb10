"""SAViT: gradients and interactions of gates against differences of the loss, the choice against all choices."""

import itertools
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
    tiny,
    twin_block,
    twin_tokens,
    variant,
    weights,
)
from scipy.special import erf
from torch.utils.flop_counter import FlopCounterMode
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel, embed, gated_units

ID = "savit"
snippet = load_module(ID)
KINDS = snippet.KINDS


def twin_loss(model: Any, image: torch.Tensor, target: int, gates: dict[str, np.ndarray]) -> float:
    """Cross-entropy of one picture with a gate on every unit, in plain numpy."""
    w, x = weights(model), twin_tokens(model, image) * gates["channels"]
    for index, block in enumerate(model.blocks):
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
        mixed, width = twin_block(model, index, x)["mixed"], block.attn.head_dim
        for head in range(block.attn.num_heads):
            mixed[:, head * width : (head + 1) * width] *= gates["heads"][index, head]
        x = (x + mixed @ of["attn.proj.weight"].T + of["attn.proj.bias"]) * gates["channels"]
        hidden = layer_norm(x, of["norm2.weight"], of["norm2.bias"]) @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        hidden = hidden * gates["neurons"][index]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        x = (x + hidden @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]) * gates["channels"]
    logits = w["head.weight"] @ layer_norm(x[0], w["norm.weight"], w["norm.bias"]) + w["head.bias"]
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def ones(model: Any) -> dict[str, np.ndarray]:
    depth = len(model.blocks)
    return {"heads": np.ones((depth, 2)), "neurons": np.ones((depth, 16)), "channels": np.ones(8)}


def test_importance_is_the_squared_slope_of_the_loss(proof):
    """Every gate of every unit moved up and down by itself."""
    model, step = tiny(2), 1e-5
    x, targets = pictures(model), torch.tensor([3, 0])
    found, errors = snippet.taylor(model, x, targets), []
    for row, (image, target) in enumerate(zip(x, targets.tolist(), strict=True)):
        for kind in KINDS:
            slopes = np.zeros_like(ones(model)[kind])
            for place in np.ndindex(slopes.shape):
                values = []
                for sign in (1, -1):
                    gates = ones(model)
                    gates[kind][place] += sign * step
                    values.append(twin_loss(model, image, target, gates))
                slopes[place] = (values[0] - values[1]) / (2 * step)
            errors.append(relative_error(found.scores[kind][row], slopes**2))
    oracle = "differences of the loss, numpy transformer with gates"
    proof(ID, "importance of all heads, neurons and channels", max(errors), at_most=1e-7, kind="parity", oracle=oracle)


def test_interactions_are_second_differences_of_the_loss(proof):
    """All gates of one kind, and of two kinds, moved at once: the sums over all pairs of blocks and units."""
    model, step = tiny(3), 1e-3
    x, targets = pictures(model, 1), torch.tensor([2])
    features = 3 * np.array([8, 16, 6 * 8])

    def at(**moves: float) -> float:
        gates = {kind: gate + moves.get(kind, 0) for kind, gate in ones(model).items()}
        return twin_loss(model, x[0], 2, gates)

    theirs = np.zeros((3, 3))
    for (i, first), (j, second) in itertools.product(enumerate(KINDS), enumerate(KINDS)):
        total = 0.0
        for s, t in itertools.product((step, -step), (step, -step)):
            moves = {first: s + t} if first == second else {first: s, second: t}
            total += math.copysign(1, s) * math.copysign(1, t) * at(**moves)
        theirs[i, j] = total / (4 * step**2) / (features[i] * features[j])
    error = relative_error(snippet.taylor(model, x, targets).interaction[0], theirs)
    proof(
        ID,
        "interactions of the three kinds",
        error,
        at_most=1e-3,
        kind="parity",
        oracle="second differences of the loss",
    )


def statistics_for(model: Any, seed: int = 3) -> Any:
    """Random statistics of two pictures; the interactions are indefinite, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    scores = {kind: torch.rand(2, *gate.shape, generator=generator).double() for kind, gate in ones(model).items()}
    square = torch.randn(2, 3, 3, generator=generator).double()
    return snippet.Statistics(scores, square + square.transpose(1, 2))


def operations(model: Any, heads: int, neurons: int, channels: int) -> float:
    """Multiply-adds of the blocks, token by token, when so many units are pruned of all."""
    depth, tokens, width, hidden = len(model.blocks), model.patch_embed.num_patches + 1, 8, 16
    a, b, c = 1 - heads / (2 * depth), 1 - neurons / (hidden * depth), 1 - channels / width
    qkv_and_proj = tokens * 4 * (width * a) * (width * c)
    mixing = 2 * tokens * tokens * (width * a)
    return depth * (qkv_and_proj + mixing + tokens * 2 * (hidden * b) * (width * c))


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.5, 0.35])
def test_the_choice_is_the_best_of_all(keep_rate):
    """Counts of the three kinds against a loop over all of them; units against sorting."""
    model = tiny(3)
    statistics = statistics_for(model)
    kept = snippet.chosen(model, statistics, keep_rate)
    budget = keep_rate * operations(model, 0, 0, 0)
    for row in range(2):
        best = (math.inf, 0, 0, 0)
        for heads, channels in itertools.product(
            range(4), range(8)
        ):  # one head of each block, one channel is protected
            for neurons in range(3 * 16 - 3 + 1):
                if operations(model, heads, neurons, channels) <= budget * (1 + 1e-9):
                    over = neurons == 0 and operations(model, heads, 0, channels) < budget * (1 - 1e-9)
                    shares = np.array([heads / 6, neurons / 48, channels / 8])
                    value = shares @ statistics.interaction[row].numpy() @ shares
                    best = best if over else min(best, (value, heads, neurons, channels))
                    break  # as few neurons as the budget lets go
        counts = [int((~kept[kind][row]).sum()) for kind in KINDS]
        assert counts == list(best[1:])
        for kind in KINDS:
            score = statistics.scores[kind][row]
            layers = score.view(-1, score.shape[-1])
            safe = {(layer, int(values.argmax())) for layer, values in enumerate(layers)}
            order = sorted(
                (float(layers[place]), place) for place in np.ndindex(*layers.shape) if tuple(place) not in safe
            )
            pruned = {place for _, place in order[: int((~kept[kind][row]).sum())]}
            gone = {tuple(place) for place in (~kept[kind][row]).view_as(layers).nonzero().tolist()}
            assert gone == pruned


def test_the_operations_counted_are_those_of_the_smaller_model(proof):
    """torch counts the blocks of the pruned model, which lacks whole heads, neurons and channels."""
    model = tiny(4, img_size=(32, 48), embed_dim=24, num_heads=4)
    x = pictures(model, 1)

    def counted(of: Any) -> int:
        for block in of.blocks:
            block.attn.fused_attn = False
        tokens = embed(of, x).detach()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            of.blocks(tokens)
        return counter.get_total_flops()

    shares = []
    for keep_rate in (0.8, 0.6):
        smaller = snippet.prune(model, keep_rate, snippet.taylor(model, x, torch.tensor([1])))
        shares.append(abs(counted(smaller) / counted(model) - keep_rate))
    what = "operations of the smaller model less the keep rate"
    proof(ID, what, max(shares), at_most=0.01, kind="parity", oracle="torch.utils.flop_counter")


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2, "init_values": 0.5}, {"class_token": False, "global_pool": "avg"}]
)
@pytest.mark.parametrize("keep_rate", [0.9, 0.6, 0.4])
def test_the_smaller_model_gives_the_same_logits(keep_rate, options, proof):
    model = tiny(3, img_size=(16, 24), **options)
    x = pictures(model, 3)
    found = snippet.explain(model, x, keep_rate=keep_rate)
    errors = []
    for row, image in enumerate(x):
        smaller = snippet.prune(model, keep_rate, snippet.taylor(model, image[None]))
        assert smaller.embed_dim == int(found.kept["channels"][row].sum())
        assert [b.attn.num_heads for b in smaller.blocks] == found.kept["heads"][row].sum(1).tolist()
        assert [b.mlp.fc1.out_features for b in smaller.blocks] == found.kept["neurons"][row].sum(1).tolist()
        errors.append(relative_error(found.logits[row], smaller(image[None])[0].detach()))
    what = f"smaller model against masks, keep rate {keep_rate}, {', '.join(options) or 'class token'}"
    proof(ID, what, max(errors), at_most=1e-9, kind="closed form")


def test_without_channels_norms_forget_them():
    """A channel that is pruned may hold anything: nothing reads it."""
    model, other = tiny(2), tiny(2)
    kept = {"heads": torch.ones(1, 2, 2), "neurons": torch.ones(1, 2, 16), "channels": torch.ones(1, 8)}
    kept["channels"][0, 3] = 0
    with torch.no_grad():
        other.pos_embed[..., 3] += 5
        other.blocks[0].mlp.fc2.bias[3] -= 7
    x = pictures(model, 1)
    assert torch.allclose(snippet.masked_logits(model, x, kept), snippet.masked_logits(other, x, kept), rtol=1e-12)
    assert not torch.allclose(model(x), other(x))


def test_heads_and_neurons_alone_are_the_gates_of_the_kit():
    model = tiny(2)
    x, generator = pictures(model), torch.Generator().manual_seed(1)
    heads, neurons = (torch.rand(2, 2, n, generator=generator) > 0.4 for n in (2, 16))
    ours = snippet.masked_logits(model, x, {"heads": heads, "neurons": neurons, "channels": torch.ones(2, 8)})
    with torch.no_grad(), gated_units(model, heads.double().transpose(0, 1), neurons.double().transpose(0, 1)):
        assert torch.allclose(ours, model(x), rtol=1e-12)


def test_keeping_all_is_the_plain_model(proof):
    model = tiny(3)
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(mask.all() for mask in found.kept.values())
    error = relative_error(found.logits, model(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


def test_a_model_with_stored_statistics():
    """The pictures then have no say, and the logits are those of the smaller model."""
    plain = tiny(2)
    model = snippet.SavitTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, num_classes=5
    )
    model = model.double().eval()
    model.load_state_dict(plain.state_dict())
    found = snippet.taylor(plain, pictures(plain, 4), torch.tensor([1, 2, 3, 4]))
    mean = snippet.batched(found)
    model.statistics = snippet.Statistics({kind: score[0] for kind, score in mean.scores.items()}, mean.interaction[0])
    x = pictures(plain, 3, seed=9)
    units, smaller = snippet.explain(model, x, keep_rate=0.6), snippet.prune(model, 0.6)
    assert smaller.statistics is None
    assert units.scores["heads"].shape == units.kept["heads"].shape == (2, 2)
    assert torch.equal(units.logits, smaller(x))
    with pytest.raises(ValueError, match="out of range"):
        snippet.explain(model, x, torch.tensor([0, 1, 5]))


def test_the_class_asked_about():
    """None is the predicted class; another has a loss of its own; one that is not there is refused."""
    model = tiny(2)
    x = pictures(model)
    predicted = model(x).argmax(-1)
    default, other = (snippet.explain(model, x, target).scores for target in (None, (predicted + 1) % 5))
    again = snippet.explain(model, x, predicted).scores
    for kind in KINDS:
        assert torch.equal(default[kind], again[kind])
        assert not torch.allclose(default[kind], other[kind])
    with pytest.raises(ValueError, match="out of range"):
        snippet.explain(model, x, torch.tensor([0, 5]))


def test_each_picture_keeps_what_its_class_hangs_on(proof):
    """Glyph scenes, pruned one by one: how many keep their class, beside those pruned by what another scene needs."""
    model: Any = models.load("glyph").model
    images, labels = glyphs.batch(8, 800_000, 1)
    x = glyphs.normalise(images)
    found = snippet.explain(model, x, labels[:, 0], keep_rate=0.7)
    swapped = {kind: mask.roll(1, 0) for kind, mask in found.kept.items()}
    chosen, others = (
        float((logits.argmax(-1) == labels[:, 0]).float().mean())
        for logits in (found.logits, snippet.masked_logits(model, x, swapped))
    )
    proof(ID, "8 scenes that keep their class at 0.7", chosen, at_least=0.5, kind="ground truth", oracle="glyph scenes")
    assert chosen >= others


def test_what_is_refused():
    model = tiny(2)
    for keep_rate in (0.0, 1.2, 0.01):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            snippet.explain(model, pictures(model), keep_rate=keep_rate)
    with pytest.raises(ValueError, match="no stored statistics"):
        snippet.prune(model)
    mapped = variant("no class token, attention pooling")
    with pytest.raises(UnsupportedModel, match="linear head"):
        snippet.explain(mapped, pictures(mapped))
    smaller = snippet.prune(model, 0.8, statistics_for(model))
    if len({block.mlp.fc1.out_features for block in smaller.blocks}) > 1:
        with pytest.raises(UnsupportedModel, match="pruned already"):
            snippet.explain(smaller, pictures(model))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("savit-glyph", monkeypatch, within=0.08)
    gain = measured["top1_at_0.8"] - measured["top1_by_chance_at_0.8"]
    proof(
        ID, "accuracy at 0.8 above units chosen by chance", gain, at_least=0.2, kind="ground truth", oracle="200 scenes"
    )
