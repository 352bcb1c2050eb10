"""VTP: a model read through gates in plain loops, the smaller model, and the threshold."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    close_to_card,
    layer_norm,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    twin_tokens,
    weights,
)
from scipy.special import erf
from torch.func import functional_call
from vitx import load_module
from vitx.vit import UnsupportedModel

ID = "vtp"
snippet = load_module(ID)
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2}
TINY |= {"depth": 3, "num_classes": 5}


def vtp_model() -> Any:
    """A rough model of three blocks whose 3 * (8 + 8 + 8 + 16) scores all differ."""
    model = roughen(snippet.VtpTransformer(**TINY))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for score in model.scores.values():
            score.copy_(torch.randn(score.shape, generator=generator, dtype=torch.float64))
    return model


def twin(model: Any, image: torch.Tensor, gates: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of one picture when every linear layer of a block reads X diag(a), token by token, head by head."""
    w, x = weights(model), twin_tokens(model, image)
    for index in range(len(model.blocks)):
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
        gate = {kind: values[index] for kind, values in gates.items()}
        read = layer_norm(x, of["norm1.weight"], of["norm1.bias"]) * gate["attention_inputs"]
        qkv = read @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
        mixed = np.zeros_like(x)
        for head in range(2):
            q, k, v = (qkv[:, part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
            for i in range(len(x)):
                powers = np.array([math.exp(float(q[i] @ row) / 2) for row in k])
                mixed[i, head * 4 : head * 4 + 4] = powers / powers.sum() @ v
        x = x + (mixed * gate["attention_outputs"]) @ of["attn.proj.weight"].T + of["attn.proj.bias"]
        read = layer_norm(x, of["norm2.weight"], of["norm2.bias"]) * gate["mlp_inputs"]
        hidden = read @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))) * gate["neurons"]
        x = x + hidden @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]
    return layer_norm(x[0], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]


def test_scores_gate_what_the_linear_layers_read(proof):
    """Training: the soft gates, against X diag(a) written out."""
    model = vtp_model()
    x, scores = pictures(model), dict(model.scores.items())
    ours = functional_call(model, snippet.gated(model, scores), (x,)).detach()
    gates = {kind: score.detach().numpy() for kind, score in scores.items()}
    error = max(relative_error(row, twin(model, image, gates)) for row, image in zip(ours, x, strict=True))
    proof(ID, "soft gates", error, at_most=1e-9, kind="parity", oracle="gated transformer in plain loops")


@pytest.mark.parametrize("keep_rate", [0.8, 0.5, 0.2])
def test_the_smaller_model_is_the_masked_one(keep_rate, proof):
    model = vtp_model()
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=keep_rate)
    gates = {kind: kept.double().numpy() for kind, kept in found.kept.items()}
    error = max(relative_error(row, twin(model, image, gates)) for row, image in zip(found.logits, x, strict=True))
    oracle = "masked transformer in plain loops"
    proof(ID, f"smaller model, keep rate {keep_rate}", error, at_most=1e-9, kind="parity", oracle=oracle)
    smaller = snippet.prune(model, keep_rate)
    assert torch.equal(smaller(x).detach(), found.logits)
    for index, block in enumerate(smaller.blocks):
        sizes = [int(found.kept[kind][index].sum()) for kind in snippet.LAYERS]
        layers = [block.get_submodule(layer) for layer in snippet.LAYERS.values()]
        assert [layer.weight.shape[1] for layer in layers] == sizes  # columns
        assert [layer.weight.shape[0] for layer in layers] == [24, 8, sizes[3], 8]  # rows


def test_keeping_all_is_the_plain_model(proof):
    """The forward pass is timm's, and with all dimensions kept the smaller model has the same logits."""
    model, plain = vtp_model(), tiny(3)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("scores")})
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(kept.all() for kept in found.kept.values())
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.5, 0.3])
def test_one_threshold_for_the_whole_model(keep_rate):
    """Sorted in plain Python: the largest magnitudes are kept, whatever block and kind they belong to."""
    model = vtp_model()
    kept = snippet.explain(model, pictures(model, 1), keep_rate=keep_rate).kept
    scores = {
        (kind, *place): abs(float(score[place]))
        for kind, score in snippet.explain(model, pictures(model, 1)).scores.items()
        for place in np.ndindex(*score.shape)
    }
    best = sorted(scores, key=lambda place: -scores[place])[: math.ceil(round(keep_rate * 120, 6))]
    ours = {(kind, *map(int, place)) for kind, mask in kept.items() for place in mask.nonzero().tolist()}
    assert ours == set(best)


def test_no_layer_is_left_without_inputs():
    model = vtp_model()
    with torch.no_grad():
        model.scores["neurons"].mul_(1e-3)  # all below the threshold
    found = snippet.explain(model, pictures(model), keep_rate=0.5)
    assert found.kept["neurons"].sum(1).tolist() == [1, 1, 1]
    assert torch.equal(found.kept["neurons"].float().argmax(1), model.scores["neurons"].abs().argmax(1))


def test_the_penalty_lowers_scores_that_the_loss_does_not_need():
    """Two dimensions that nothing reads: descent leaves the others where the loss wants them and lets these fall."""
    model = vtp_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, :2] = 0
        for score in model.scores.values():
            score.fill_(1)
    x = pictures(model, 4)
    target = model(x).argmax(-1)
    scores = dict(model.scores.items())
    loss = torch.nn.functional.cross_entropy(functional_call(model, snippet.gated(model, scores), (x,)), target)
    (slope,) = torch.autograd.grad(loss + 0.01 * scores["neurons"].abs().sum(), scores["neurons"])
    assert torch.allclose(slope[1, :2], torch.full((2,), 0.01).double())  # the penalty alone
    assert (slope[1, 2:] - 0.01).abs().min() > 0


def test_a_model_without_scores_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="carries none"):
        snippet.explain(model, pictures(model))
    model = vtp_model()
    with pytest.raises(UnsupportedModel, match="carries none"):  # the scores are used up
        snippet.explain(snippet.prune(model, 0.5), pictures(model))
    for rate in (0.0, 1.2):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            snippet.explain(model, pictures(model), keep_rate=rate)


def test_a_file_gives_back_its_model(tmp_path):
    model = vtp_model().float()
    again = read_back(snippet, model, {"backbone": TINY}, tmp_path)
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("vtp-glyph", monkeypatch, within=0.12)
    value = measured["top1_60"]
    proof(
        ID, "accuracy with 60% of the dimensions", value, at_least=0.9, kind="ground truth", oracle="200 glyph scenes"
    )
    value = measured["top1_40"] - measured["top1_40_random"]
    what = "accuracy above that of random scores, 40% kept"
    proof(ID, what, value, at_least=0.3, kind="sanity", oracle="200 glyph scenes")
