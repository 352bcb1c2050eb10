"""SPViT: selectors and packages against loops, and the masked pass of training against the really shorter sequence."""

import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    layer_norm,
    pictures,
    relative_error,
    roughen,
    tiny,
    training_script,
    twin_block,
    twin_tokens,
    weights,
)
from safetensors.torch import save_file
from scipy.special import erf, log_softmax
from vitx import catalog, load_module, models
from vitx.vit import UnsupportedModel, gumbel_decisions

ID = "spvit-soft-token-pruning"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def soft_model(seed: int = 0, lift: float = 0.001, **options: Any) -> Any:
    """A rough model of 4 x 6 patches, five classes and four blocks, that packs before the second, third and fourth.

    lift: of the difference between keeping and dropping over its median among patches; 0 would leave a tie.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = roughen(snippet.SoftPrunedTransformer(num_classes=5, **(BACKBONE | options)), seed)
    medians: list[torch.Tensor] = []

    def keep_all(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        medians.append((scores[..., 1] - scores[..., 0]).median())
        return torch.ones_like(kept)

    with torch.no_grad():
        model.masked_forward(pictures(model, 6), keep_all)
        for selector, median in zip(model.selectors, medians, strict=True):
            selector.classify[4].bias[1] += lift - median
    return model


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def norm_of_torch(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """With torch's epsilon of 1e-5; timm's blocks have 1e-6."""
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weight + bias


def twin_selector(w: dict[str, np.ndarray], stage: int, tokens: list[np.ndarray]) -> tuple[list, list]:
    """(drop, keep) scores and probability to be kept of every token, one token and one head at a time."""

    def linear(x: np.ndarray, layer: str) -> np.ndarray:
        name = f"selectors.{stage}.{layer}"
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    norm = f"selectors.{stage}.project.0"
    heads, width = 2, len(tokens[0]) // 2
    scores, keeping = [np.zeros(2) for _ in tokens], [0.0 for _ in tokens]
    gates = []
    for token in tokens:
        means = np.array([token[m * width : (m + 1) * width].mean() for m in range(heads)])
        gates.append(1 / (1 + np.exp(-linear(gelu(linear(means, "gate.0")), "gate.2"))))
    for m in range(heads):
        projected = []
        for token in tokens:
            part = token[m * width : (m + 1) * width]
            projected.append(gelu(linear(norm_of_torch(part, w[f"{norm}.weight"], w[f"{norm}.bias"]), "project.1")))
        whole = sum(u[width // 2 :] for u in projected) / len(projected)
        for i, u in enumerate(projected):
            z = np.concatenate([u[: width // 2], whole])
            logarithms = log_softmax(linear(gelu(linear(gelu(linear(z, "classify.0")), "classify.2")), "classify.4"))
            scores[i] = scores[i] + gates[i][m] / gates[i].sum() * logarithms
            keeping[i] += gates[i][m] / gates[i].sum() * math.exp(logarithms[1])
    return scores, keeping


def twin(model: Any, image: torch.Tensor, keep_rate: float | None) -> tuple[np.ndarray, list[set[int]], list[int]]:
    """Logits, the patches alive after each block, and the lengths of the sequence, token by token."""
    w, first = weights(model), twin_tokens(model, image)
    head, patches, packages = first[0], list(first[1:]), []
    place, alive, lengths = list(range(len(patches))), [], []
    for index in range(len(model.blocks)):
        if index in model.stages:
            stage = model.stages.index(index)
            scores, keeping = twin_selector(w, stage, patches + packages)
            margin = [float(s[1] - s[0]) for s in scores[: len(patches)]]
            if keep_rate is None:
                kept = [i for i in range(len(patches)) if margin[i] > 0]
            else:
                best = sorted(range(len(patches)), key=lambda i: -margin[i])
                kept = sorted(best[: int(keep_rate ** (stage + 1) * 24 + 1e-6)])
            gone = [i for i in range(len(patches)) if i not in kept]
            if gone:
                mean = sum(keeping[i] * patches[i] for i in gone) / sum(keeping[i] for i in gone)
                packages = [*packages, mean]
            patches, place = [patches[i] for i in kept], [place[i] for i in kept]
        x = twin_block(model, index, np.stack([head, *patches, *packages]))["output"]
        lengths.append(len(x))
        head, patches, packages = x[0], list(x[1 : 1 + len(patches)]), list(x[1 + len(patches) :])
        alive.append(set(place))
    final = layer_norm(head, w["norm.weight"], w["norm.bias"])
    return w["head.weight"] @ final + w["head.bias"], alive, lengths


@pytest.mark.parametrize(("keep_rate", "lift"), [(None, 0.001), (None, 0.05), (None, -0.05), (0.7, 0.05), (0.4, 0.05)])
def test_token_by_token(keep_rate, lift, proof):
    model, errors, counts = soft_model(lift=lift), [], set()
    x = pictures(model, 4)
    ours = snippet.explain(model, x, keep_rate=keep_rate)
    for index, image in enumerate(x):
        logits, alive, _ = twin(model, image, keep_rate)
        errors.append(relative_error(ours.logits[index], logits))
        assert [{int(p) for p in layer.flatten().nonzero()} for layer in ours.alive[index]] == alive
        counts.add(tuple(len(layer) for layer in alive))
    assert (len(counts) > 1) == (keep_rate is None)  # only the selectors' own choice differs between pictures
    what = f"logits, keep rate {keep_rate}, keeping lifted by {lift:g}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="selectors and packages token by token in loops")


def test_keeping_all_is_the_plain_model(proof):
    """By a keep rate of 1, and by selectors that want to keep everything: then there is no package either."""
    model, plain = soft_model(), tiny(4, img_size=(32, 48), embed_dim=16)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("selectors")})
    x = pictures(model)
    theirs, errors = plain(x).detach(), []
    for greedy, rate in ((model, 1.0), (soft_model(lift=1e3), None)):
        found = snippet.explain(greedy, x, keep_rate=rate)
        assert found.alive.all()
        errors.append(relative_error(found.logits, theirs))
    proof(ID, "keeping every token is the plain model", max(errors), at_most=1e-12, kind="closed form")


def test_dropping_all_leaves_class_token_and_packages():
    model = soft_model(lift=-1e3)
    found = snippet.explain(model, pictures(model), keep_rate=None)
    assert found.alive[:, 0].all()
    assert not found.alive[:, 1:].any()
    assert found.logits.isfinite().all()


def test_pictures_that_keep_different_numbers_do_not_touch_each_other(proof):
    """A batch is as long as its longest picture; the padding of the others is seen by nobody."""
    model = soft_model()
    x = pictures(model, 6)
    batch = snippet.explain(model, x, keep_rate=None)
    assert len(batch.alive[:, 1].flatten(1).sum(1).unique()) > 1
    alone = [snippet.explain(model, image[None], keep_rate=None) for image in x]
    assert torch.equal(batch.alive, torch.cat([one.alive for one in alone]))
    error = relative_error(batch.logits, torch.cat([one.logits for one in alone]))
    proof(ID, "padding of a batch changes nothing", error, at_most=1e-9, kind="closed form")


def test_blocks_see_the_shorter_sequence():
    model, lengths = soft_model(), []
    x = pictures(model, 1)
    handles = [block.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1])) for block in model.blocks]
    snippet.explain(model, x, keep_rate=None)
    snippet.explain(model, x, keep_rate=0.5)
    for handle in handles:
        handle.remove()
    assert lengths[:4] == twin(model, x[0], None)[2]
    assert lengths[4:] == [25, 1 + 12 + 1, 1 + 6 + 2, 1 + 3 + 3]


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.3])
def test_counts_of_a_given_rate_are_rounded_down(keep_rate):
    model = soft_model()
    alive = snippet.explain(model, pictures(model, 3), keep_rate=keep_rate).alive
    wanted = [24, *(math.floor(keep_rate**stage * 24) for stage in (1, 2, 3))]
    assert alive.flatten(2).sum(-1).tolist() == [wanted] * 3
    assert (alive[:, 1:] <= alive[:, :-1]).all()  # a patch that was packed stays away


@pytest.mark.parametrize("lift", [0.001, 0.05, 1e3])
def test_the_mask_of_training_is_the_packing_of_inference(lift, proof):
    """With decisions that are not random the masked pass gives the logits of the really shorter sequence."""
    model = soft_model(lift=lift)
    x = pictures(model, 4)
    found = snippet.explain(model, x, keep_rate=None)
    tokens, decisions = model.masked_forward(x, lambda scores, kept: (scores[..., 1] > scores[..., 0]).double())
    for stage, kept in zip(model.stages, decisions, strict=True):
        assert torch.equal(found.alive[:, stage].flatten(1), kept > 0)
    error = relative_error(model.forward_head(tokens).detach(), found.logits)
    what = f"masked pass of training equals packing, keeping lifted by {lift:g}"
    proof(ID, what, error, at_most=1e-9, kind="closed form")


def test_a_package_is_a_mean_of_what_was_packed(proof):
    """Equal tokens pack to themselves, whatever their weights; nothing packs to zero."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(2, 1, 8, generator=generator, dtype=torch.float64)
    shares = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    error = relative_error(snippet.package(token.expand(-1, 5, -1), shares), token)
    assert not snippet.package(token, torch.zeros(2, 1, dtype=torch.float64)).any()
    proof(ID, "a package of equal tokens is that token", error, at_most=1e-12, kind="closed form")


def test_the_ratio_is_asked_of_the_batch():
    """Half of one picture and nothing of another is a quarter of the batch: no loss, though neither keeps a quarter."""
    decisions = [torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])]
    assert float(snippet.ratio_loss(decisions, [0.25])) == 0
    assert float(snippet.ratio_loss(decisions, [0.75])) == 0.25


def test_gradients_reach_the_selectors_through_decisions_and_packages():
    model = soft_model()
    uniform = torch.rand(1, 24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, decisions = model.masked_forward(pictures(model), lambda scores, kept: gumbel_decisions(scores, uniform))
    assert set(decisions[0].detach().round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    model.forward_head(tokens).sum().backward()
    for name, parameter in model.selectors.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("keep_rate", [0.0, 1.2])
def test_bad_rates_are_named(keep_rate):
    model = soft_model()
    with pytest.raises(ValueError, match="keep_rate lies above 0"):
        snippet.explain(model, pictures(model), keep_rate=keep_rate)


def test_a_model_without_selectors_is_refused():
    model = tiny(4)
    with pytest.raises(UnsupportedModel, match="no trained selectors"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = soft_model().float()
    about = {"backbone": json.dumps(BACKBONE), "num_classes": "5"}
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "x.safetensors", about)
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    assert not again.training
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    script, card = training_script("spvit_glyph"), catalog.load().models["spvit-glyph"]
    monkeypatch.setitem(script.measure_token_pruning.__globals__, "UNSEEN", 800_000)  # not of training or card
    run = partial(snippet.explain, models.load("spvit-glyph").model)
    settings = {name: script.SETTINGS[name] for name in ("own", "1.0", "0.7")}
    measured = script.measure_token_pruning(run, settings, 200)
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.05, name
    oracle = "200 glyph scenes"
    gain = measured["precision_0.7"] / measured["precision_1.0"]
    what = "share of the creature in kept patches over that in all, rate 0.7"
    proof(ID, what, gain, at_least=2, kind="ground truth", oracle=oracle)
    what = "share of the creature that is kept, rate 0.7"
    proof(ID, what, measured["recall_0.7"], at_least=0.9, kind="ground truth", oracle=oracle)
    what = "share of the creature in the patches that the selectors choose over that in all"
    gain = measured["precision_own"] / measured["precision_1.0"]
    proof(ID, what, gain, at_least=2, kind="ground truth", oracle=oracle)
