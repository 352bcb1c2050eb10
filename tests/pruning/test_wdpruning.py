"""WDPruning: masked layers and exits in plain loops, the smaller model, the rounding, the budget and its gradients."""

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
    training_script,
    twin_tokens,
    weights,
)
from safetensors.torch import save_file
from scipy.special import erf
from torch import Tensor, nn
from vitx import load_module
from vitx.vit import UnsupportedModel

ID = "wdpruning"
snippet = load_module(ID)
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "mlp_ratio": 2}
TINY |= {"depth": 3, "num_classes": 5}
SIZES = {"heads": 3, "attention_outputs": 12, "neurons": 24, "mlp_outputs": 12}


def wd_model() -> Any:
    """A rough model of three blocks with exits after the first and second, saliencies and thresholds that differ."""
    model = roughen(snippet.WdTransformer((1, 2), **TINY))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for kind in SIZES:
            shape = model.saliencies[kind].shape
            model.saliencies[kind].copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
            model.thresholds[kind].copy_(torch.randn(3, generator=generator, dtype=torch.float64))
    return model


def twin(model: Any, image: Tensor, masks: dict[str, np.ndarray], depth: int) -> np.ndarray:
    """Logits of one picture by the classifier after ``depth`` blocks; what a masked row gives is zero."""
    w, x = weights(model), twin_tokens(model, image)
    for index in range(depth):
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
        mask = {kind: values[index] for kind, values in masks.items()}
        qkv = layer_norm(x, of["norm1.weight"], of["norm1.bias"]) @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
        mixed = np.zeros_like(x)
        for head in range(3):
            q, k, v = (qkv[:, p * 12 + head * 4 : p * 12 + head * 4 + 4] * mask["heads"][head] for p in range(3))
            for i in range(len(x)):
                powers = np.array([math.exp(float(q[i] @ row) / 2) for row in k])
                mixed[i, head * 4 : head * 4 + 4] = powers / powers.sum() @ v
        x = x + (mixed @ of["attn.proj.weight"].T + of["attn.proj.bias"]) * mask["attention_outputs"]
        hidden = layer_norm(x, of["norm2.weight"], of["norm2.bias"]) @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        hidden = hidden * mask["neurons"]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        x = x + (hidden @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]) * mask["mlp_outputs"]
    if depth == len(model.blocks):
        return layer_norm(x[0], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]
    of = {n.removeprefix(f"shallow.{depth}."): t for n, t in w.items() if n.startswith(f"shallow.{depth}.")}
    centred = (x[0] - x[0].mean()) / np.sqrt(x[0].var() + 1e-5)
    return (centred * of["0.weight"] + of["0.bias"]) @ of["1.weight"].T + of["1.bias"]


class Exits(nn.Module):
    """All classifiers, so that parameters can be replaced for one call."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return snippet.exits(self.model, x)


def test_masks_and_exits_of_the_training(proof):
    model = wd_model()
    x, kept = pictures(model), snippet.keep(model)
    masks = {kind: mask.double() for kind, mask in kept.items()}
    named = {f"model.{name}": value for name, value in snippet.masked(model, masks).items()}
    ours = torch.func.functional_call(Exits(model), named, (x,))
    assert list(ours) == [1, 2, 3]
    gates = {kind: mask.numpy() for kind, mask in masks.items()}
    errors = [
        relative_error(row.detach(), twin(model, image, gates, depth))
        for depth, logits in ours.items()
        for row, image in zip(logits, x, strict=True)
    ]
    proof(ID, "masks and exits", max(errors), at_most=1e-9, kind="parity", oracle="masked transformer in plain loops")


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("keep_rate", [None, 0.7, 0.3])
def test_the_smaller_model_is_the_masked_one(keep_rate, depth, proof):
    model = wd_model()
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=keep_rate, depth=depth)
    gates = {kind: found.kept[kind].double().numpy() for kind in SIZES}
    pairs = zip(found.logits, x, strict=True)
    error = max(relative_error(row, twin(model, image, gates, depth)) for row, image in pairs)
    what = f"smaller model, {'learned widths' if keep_rate is None else f'budget {keep_rate}'}, depth {depth}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="masked transformer in plain loops")
    smaller = snippet.prune(model, keep_rate, depth)
    assert len(smaller.blocks) == depth == int(found.kept["blocks"].sum())
    for index, block in enumerate(smaller.blocks):
        heads, outputs, neurons, written = (int(found.kept[kind][index].sum()) for kind in SIZES)
        assert block.attn.num_heads == heads
        assert block.attn.qkv.weight.shape == (12 * heads, 12)
        assert block.attn.proj.weight.shape == (outputs, 4 * heads)
        assert block.mlp.fc1.weight.shape == (neurons, 12)
        assert block.mlp.fc2.weight.shape == (written, neurons)


def test_keeping_all_is_the_plain_model(proof):
    model, plain = wd_model(), tiny(**TINY)
    state = {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state)
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(kept.all() for kept in found.kept.values())
    assert torch.equal(model(x), plain(x))
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


def published_count(share: float, size: int) -> int:
    """How many units the authors' loop arrives at."""
    j = math.ceil(share * size)
    if j % 16 != 0 and size % 16 == 0:
        if j <= 16:
            return 16
        upper = 16
        while upper < j:
            upper += 16
        j = upper - 16 if j - (upper - 16) < upper - j else upper
    return min(j, size)


def test_a_budget_out_of_reach_is_refused():
    model = wd_model()
    least = float(snippet.remaining(model, {k: t.detach() - 60 for k, t in model.thresholds.items()}))
    assert 0 < least < 0.2
    with pytest.raises(
        ValueError, match=r"keep_rate must be at least .* where one unit of every kind is left; not 1e-05"
    ):
        snippet.prune(model, 1e-5)


def test_counts_follow_the_authors_rounding():
    shares = torch.linspace(0.01, 0.99, 197).double()
    for size in (256, 128, 48, 12, 3):
        assert snippet.counts(shares, size).tolist() == [published_count(float(share), size) for share in shares]
        assert snippet.counts(shares, size, 1).tolist() == [math.ceil(float(share) * size) for share in shares]


def test_the_largest_saliencies_of_every_layer_are_kept():
    model = wd_model()
    for kind, mask in snippet.keep(model).items():
        for row, saliency, threshold in zip(mask, model.saliencies[kind], model.thresholds[kind], strict=True):
            count = math.ceil(float(threshold.detach().sigmoid()) * SIZES[kind])
            best = sorted(((float(s), i) for i, s in enumerate(saliency.detach())), reverse=True)[:count]
            assert set(row.nonzero()[:, 0].tolist()) == {i for _, i in best}


def test_gradients_pass_the_mask(proof):
    """A saliency receives the gradient of its mask, a threshold the sum over the units that are kept."""
    saliencies = torch.tensor([[0.3, -1.0, 2.0, 0.1], [0.0, 1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    thresholds = torch.tensor([0.0, -1.5], dtype=torch.float64, requires_grad=True)  # 2 of 4, and 1 of 4
    mask = snippet.TopShare.apply(saliencies, thresholds, 16)
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=torch.float64)
    ours = torch.autograd.grad((mask * weight).sum(), (saliencies, thresholds))
    error = max(relative_error(ours[0], weight), relative_error(ours[1], [4.0, 6.0]))
    proof(ID, "gradients through the mask", error, at_most=1e-12, kind="closed form")


def test_what_remains_of_the_weights(proof):
    """R with shares that are met exactly, against the weights (not biases) of the smaller model's blocks."""
    model = wd_model()
    shares = {"heads": 2 / 3, "attention_outputs": 0.5, "neurons": 0.25, "mlp_outputs": 0.75}
    with torch.no_grad():
        for kind, share in shares.items():
            model.thresholds[kind].fill_(math.log(share / (1 - share)) - 1e-9)  # so that the ceiling is the share
    smaller = snippet.prune(model, multiple=1)

    def count(network: Any) -> int:
        return sum(p.numel() for n, p in network.blocks.named_parameters() if n.endswith("weight") and "norm" not in n)

    theirs = count(smaller) / count(model)
    error = abs(float(snippet.remaining(model, dict(model.thresholds.items())).detach()) - theirs) / theirs
    proof(ID, "share of the weights that remains", error, at_most=1e-6, kind="parity", oracle="weights counted")


@pytest.mark.parametrize("keep_rate", [0.9, 0.6, 0.25])
def test_thresholds_are_moved_alike(keep_rate):
    """The kept units at a budget are those of thresholds with one number added, found by scipy."""
    from scipy.optimize import brentq

    model = wd_model()
    thresholds = {kind: threshold.detach() for kind, threshold in model.thresholds.items()}

    def excess(shift: float) -> float:
        return float(snippet.remaining(model, {k: t + shift for k, t in thresholds.items()}).detach()) - keep_rate

    shift = float(brentq(excess, -30, 30, xtol=1e-14))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        expected = wd_model()
        for threshold in expected.thresholds.values():
            threshold.add_(shift)
    ours, theirs = snippet.keep(model, keep_rate), snippet.keep(expected)
    assert all(torch.equal(ours[kind], theirs[kind]) for kind in SIZES)


def test_the_budget_pulls_while_it_is_exceeded():
    """Descent lowers the thresholds and raises the multipliers above the budget, and leaves both alone below it."""
    script = training_script("wdpruning_glyph")
    for budget, excess in ((0.3, 0.2), (0.5, 0.0)):
        remains = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        multipliers = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        loss = script.budget_loss(multipliers, remains, budget)
        slopes = torch.autograd.grad(loss, (remains, multipliers))
        assert float(slopes[0]) == pytest.approx(2.0 + 6.0 * excess if excess else 0.0)
        assert slopes[1].tolist() == pytest.approx([-excess, -(excess**2)])


def test_what_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="this model has none"):
        snippet.explain(model, pictures(model))
    model = wd_model()
    with pytest.raises(UnsupportedModel, match="this model has none"):  # the saliencies are used up
        snippet.explain(snippet.prune(model, 0.5), pictures(model))
    for options in ({"keep_rate": 0.0}, {"keep_rate": 1.2}, {"depth": 0}, {"depth": 4}):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            snippet.explain(model, pictures(model), **options)


def test_a_file_gives_back_its_model(tmp_path):
    model = wd_model().float()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors", {"backbone": json.dumps(TINY), "exits": "[1, 2]"})
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    x = pictures(model)
    assert not again.training
    assert torch.equal(snippet.explain(again, x, depth=2).logits, snippet.explain(model, x, depth=2).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("wdpruning-glyph", monkeypatch, within=0.12)
    oracle = "100 glyph scenes"
    value = measured["top1_40"]
    proof(
        ID,
        "accuracy with a budget of 40% of the blocks' weights",
        value,
        at_least=0.8,
        kind="ground truth",
        oracle=oracle,
    )
    value -= measured["top1_40_random"]
    what = "accuracy above that of random saliencies, 40% kept"
    proof(ID, what, value, at_least=0.3, kind="sanity", oracle=oracle)
