"""X-Pruner: masks for each class in plain loops, learned thresholds, and a smaller model with the same logits."""

import math
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

ID = "x-pruner"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [16, 24],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2,
}


def masked() -> Any:
    """A rough model of 2 x 3 patches, three blocks, 4 heads and 16 neurons each and five classes; masks at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = roughen(snippet.MaskedTransformer(**BACKBONE, num_classes=5))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in model.masks.values.values():
            values.copy_(torch.randn(values.shape, generator=generator, dtype=values.dtype))
        for thresholds in model.masks.thresholds.values():
            thresholds.copy_(0.8 + 0.2 * torch.randn(thresholds.shape, generator=generator, dtype=thresholds.dtype))
    return model


def twin(model: Any, image: torch.Tensor, heads: np.ndarray, neurons: np.ndarray) -> np.ndarray:
    """Logits when every head's and every neuron's output is multiplied with its own number, in loops."""
    w, x = weights(model), twin_tokens(model, image)
    for index in range(3):
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
        qkv = layer_norm(x, of["norm1.weight"], of["norm1.bias"]) @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
        added = np.zeros_like(x) + of["attn.proj.bias"]
        for head in range(4):
            q, k, v = (qkv[:, 8 * part + 2 * head : 8 * part + 2 * head + 2] for part in range(3))
            for i in range(len(x)):
                powers = [math.exp(float(q[i] @ k[j]) / math.sqrt(2)) for j in range(len(x))]
                mixed = sum(p / sum(powers) * v[j] for j, p in enumerate(powers))
                added[i] += heads[index, head] * of["attn.proj.weight"][:, 2 * head : 2 * head + 2] @ mixed
        x = x + added
        hidden = layer_norm(x, of["norm2.weight"], of["norm2.bias"]) @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        active = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        added = np.zeros_like(x) + of["mlp.fc2.bias"]
        for neuron in range(16):
            added += neurons[index, neuron] * np.outer(active[:, neuron], of["mlp.fc2.weight"][:, neuron])
        x = x + added
    return layer_norm(x[0], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]


def test_masks_of_the_class_unit_by_unit(proof):
    """Each picture of the batch is multiplied with the masks of its own class."""
    model = masked()
    x, errors = pictures(model, 3), []
    classes = torch.tensor([4, 0, 2])
    with torch.no_grad(), gated_units(model, *(model.masks.gates(classes)[kind] for kind in snippet.KINDS)):
        ours = model(x)
    values = {kind: tensor.detach().numpy() for kind, tensor in model.masks.values.items()}
    for index, label in enumerate(classes):
        theirs = twin(model, x[index], values["heads"][label], values["neurons"][label])
        errors.append(relative_error(ours[index], theirs))
    assert relative_error(ours, model(x).detach()) > 0.01
    proof(ID, "logits under the masks of a class", max(errors), at_most=1e-9, kind="parity", oracle="units in loops")


@pytest.mark.parametrize("keep_rate", [None, 0.8, 0.5, 0.2])
def test_the_pruned_model_unit_by_unit(keep_rate, proof):
    model = masked()
    x, errors = pictures(model, 2), []
    found = snippet.explain(model, x, keep_rate=keep_rate)
    assert not found.kept["heads"].all()
    assert not found.kept["neurons"].all()
    for index, image in enumerate(x):
        theirs = twin(model, image, *(found.kept[kind].numpy() for kind in snippet.KINDS))
        errors.append(relative_error(found.logits[index], theirs))
    smaller = snippet.prune(model, keep_rate)
    errors.append(relative_error(smaller(x).detach(), found.logits))
    for index, block in enumerate(smaller.blocks):
        assert block.attn.num_heads == int(found.kept["heads"][index].sum())
        assert block.mlp.fc1.out_features == int(found.kept["neurons"][index].sum())
    what = "logits of the pruned and of the smaller model, " + (f"rate {keep_rate}" if keep_rate else "thresholds")
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="units in loops")


def test_keeping_all_is_the_plain_model(proof):
    model = masked()
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(stays.all() for stays in found.kept.values())
    whole = model(x).detach()
    error = max(relative_error(found.logits, whole), relative_error(snippet.prune(model, 1.0)(x).detach(), whole))
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


def test_scores_and_class_masks():
    model = masked()
    x, classes = pictures(model, 2), torch.tensor([3, 1])
    found = snippet.explain(model, x, classes)
    for kind, values in model.masks.values.items():
        table = values.detach().numpy()
        total = np.array([[sum(abs(v) for v in column) for column in layer.T] for layer in table.transpose(1, 0, 2)])
        np.testing.assert_allclose(found.scores[kind].detach().numpy(), total, rtol=1e-12)
        for index, label in enumerate(classes):
            assert torch.equal(found.of_class[kind][index], values[label].detach())
        assert not found.scores[kind].requires_grad
        assert not found.of_class[kind].requires_grad


def test_no_class_is_the_predicted_one_and_none_beyond_the_last_is_accepted():
    model = masked()
    x = pictures(model)
    found = snippet.explain(model, x)
    assert torch.equal(found.of_class["heads"], snippet.explain(model, x, found.logits.argmax(-1)).of_class["heads"])
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_thresholds_decide_layer_by_layer():
    model = masked()
    kept = snippet.kept_units(model)
    for kind, scores in model.masks.scores().items():
        for layer, threshold in enumerate(model.masks.thresholds[kind]):
            threshold = threshold * scores[layer].mean()
            for unit, score in enumerate(scores[layer]):
                assert bool(kept[kind][layer, unit]) == bool(score > threshold or score == scores[layer].max())


@pytest.mark.parametrize("keep_rate", [0.1, 0.34, 0.5, 0.9])
def test_kept_counts_and_order(keep_rate):
    """The share is rounded up, no block is emptied, and who stays is further above its threshold than who goes."""
    model = masked()
    kept = snippet.kept_units(model, keep_rate)
    for kind, margins in model.masks.margins().items():
        stays = kept[kind]
        assert int(stays.sum()) == max(math.ceil(keep_rate * stays.numel()), 3)
        assert stays.any(1).all()
        best = margins.argmax(1)
        spare = stays.clone()
        spare[torch.arange(3), best] = False
        if spare.any() and not stays.all():
            assert margins[spare].min() > margins[~stays].max()


def test_gates_are_hard_with_a_smooth_gradient(proof):
    """Forward 0 or 1; backward the derivative of (1 + tanh n (S - theta)) / 2."""
    model = masked()
    gates = model.masks.soft_gates()
    error = 0.0
    for kind, gate in gates.items():
        margin = model.masks.margins()[kind].detach()
        assert torch.equal(gate.detach().round(), (margin > 0).double())
        assert float((gate.detach() - gate.detach().round()).abs().max()) < 1e-12
        (slope,) = torch.autograd.grad(gate.sum(), model.masks.thresholds[kind])
        theirs = -(snippet.STEEPNESS / 2 / np.cosh(snippet.STEEPNESS * margin.numpy()) ** 2).sum(1)
        error = max(error, relative_error(slope, theirs))
    proof(ID, "gradient of the thresholds", error, at_most=1e-9, kind="closed form")


def test_the_pruned_share_counts_weights():
    """Against the parameters that a smaller model really lacks; biases of single units are left out of the count."""
    model = masked()
    for rate in (0.8, 0.5):
        kept = snippet.kept_units(model, rate)
        share = snippet.pruned_share({kind: stays.double() for kind, stays in kept.items()}, model)
        sizes = []
        for network in (model, snippet.prune(model, rate)):
            names = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
            sizes.append(sum(p.numel() for n, p in network.named_parameters() if n.split(".", 2)[-1] in names))
        assert float(share) == pytest.approx(1 - sizes[1] / sizes[0], rel=1e-12)


def test_thresholds_fall_and_multipliers_rise_when_too_little_is_pruned():
    pruned = torch.tensor(0.3, requires_grad=True)
    multipliers = torch.tensor([2.0, 1.0], requires_grad=True)
    loss = snippet.share_loss(pruned, 0.5, multipliers)
    assert float(loss.detach()) == pytest.approx(2 * 0.04 + 0.2)
    down, up = torch.autograd.grad(loss, (pruned, multipliers))
    assert float(down) == pytest.approx(-2 * 2 * 0.2 - 1)  # a step down the gradient prunes more
    assert up.tolist() == pytest.approx([0.04, 0.2])  # and one up it makes the shortfall dearer


@pytest.mark.parametrize("keep_rate", [0.0, 1.2])
def test_bad_rates_are_named(keep_rate):
    model = masked()
    for call in (
        lambda: snippet.explain(model, pictures(model), keep_rate=keep_rate),
        lambda: snippet.prune(model, keep_rate),
    ):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            call()


def test_a_stock_model_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="has no masks for its heads and neurons"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = masked().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    script, card = training_script("x_pruner_glyph"), catalog.load().models["x-pruner-glyph"]
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(models.load("x-pruner-glyph").model, 200)
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < (0.5 if name.startswith("fall") else 0.12), name
    oracle = "200 glyph scenes"
    gain = measured["top1_at_0.5"] - measured["top1_at_0.5_reversed"]
    proof(
        ID,
        "accuracy with the better half of the units less that with the worse",
        gain,
        at_least=0.2,
        kind="ground truth",
        oracle=oracle,
    )
    ratio = measured["fall_own"] / max(measured["fall_other"], 1e-3)
    proof(
        ID,
        "fall of the class logit without the class's own neurons, over that without another class's",
        ratio,
        at_least=1.5,
        kind="ground truth",
        oracle=oracle,
    )
