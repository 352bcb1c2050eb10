"""DynamicViT: predictors and dropping against loops, and the masked pass of training against real dropping."""

import math
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
    twin_block,
    twin_tokens,
    weights,
)
from scipy.special import erf
from vitx import catalog, load_module, models
from vitx.vit import UnsupportedModel, gumbel_decisions, masked_block

ID = "dynamicvit"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def dynamic_model(seed: int = 0, **options: Any) -> Any:
    """A rough model of 4 x 6 patches, five classes and four blocks, that drops before the second, third and fourth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return roughen(snippet.DynamicTransformer(num_classes=5, **(BACKBONE | options)), seed)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def twin_predictor(w: dict[str, np.ndarray], stage: int, patches: np.ndarray) -> np.ndarray:
    """Probability of every token (n, D) to be kept, token by token; all n are left."""

    def linear(x: np.ndarray, layer: str) -> np.ndarray:
        name = f"predictors.{stage}.{layer}"
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    norm = f"predictors.{stage}.project.0"
    projected = [
        gelu(linear(layer_norm_5(token, w[f"{norm}.weight"], w[f"{norm}.bias"]), "project.1")) for token in patches
    ]
    half = patches.shape[1] // 2
    whole = sum(u[half:] for u in projected) / len(projected)
    scores = []
    for u in projected:
        z = np.concatenate([u[:half], whole])
        powers = np.exp(linear(gelu(linear(gelu(linear(z, "classify.0")), "classify.2")), "classify.4"))
        scores.append(powers[1] / powers.sum())
    return np.array(scores)


def layer_norm_5(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """With torch's epsilon of 1e-5; timm's blocks have 1e-6."""
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weight + bias


def twin(model: Any, image: torch.Tensor, keep_rate: float) -> tuple[np.ndarray, list[set[int]]]:
    """Logits, and the patches alive after each block, token by token."""
    w, x = weights(model), twin_tokens(model, image)
    place, alive = list(range(len(x) - 1)), []
    for index in range(len(model.blocks)):
        if index in model.stages:
            stage = model.stages.index(index)
            scores = twin_predictor(w, stage, x[1:])
            best = sorted(range(len(place)), key=lambda i: -scores[i])[: int(keep_rate ** (stage + 1) * 24 + 1e-6)]
            best.sort()
            x, place = np.stack([x[0], *(x[1 + i] for i in best)]), [place[i] for i in best]
        x = twin_block(model, index, x)["output"]
        alive.append(set(place))
    final = layer_norm(x[0], w["norm.weight"], w["norm.bias"])
    return w["head.weight"] @ final + w["head.bias"], alive


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.4])
def test_token_by_token(keep_rate, proof):
    model, errors = dynamic_model(), []
    x = pictures(model, 3)
    ours = snippet.explain(model, x, keep_rate=keep_rate)
    for index, image in enumerate(x):
        logits, alive = twin(model, image, keep_rate)
        errors.append(relative_error(ours.logits[index], logits))
        assert [{int(p) for p in layer.flatten().nonzero()} for layer in ours.alive[index]] == alive
    assert not torch.equal(ours.alive[0], ours.alive[1])  # what is kept depends on the picture
    what = f"logits, keep rate {keep_rate}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="predictors and dropping token by token in loops")


def test_keeping_all_is_the_plain_model(proof):
    model, plain = dynamic_model(), tiny(4, img_size=(32, 48))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("predictors")})
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert found.alive.all()
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.55, 0.4])
def test_kept_counts_follow_the_papers_rounding(keep_rate):
    """floor(rho^s N) after stage s, whatever the picture; and a patch that is gone stays away."""
    model = dynamic_model()
    alive = snippet.explain(model, pictures(model, 3), keep_rate=keep_rate).alive
    wanted = [24, *(math.floor(keep_rate**stage * 24) for stage in (1, 2, 3))]
    assert alive.flatten(2).sum(-1).tolist() == [wanted] * 3
    assert (alive[:, 1:] <= alive[:, :-1]).all()


def test_a_product_that_is_whole_loses_nothing_to_rounding():
    """0.7 ** 2 * 100 is 48.99999999999999 in floating point."""
    model = dynamic_model(img_size=[80, 80])
    assert snippet.explain(model, pictures(model, 1), keep_rate=0.7).alive.flatten(2).sum(-1).tolist() == [
        [100, 70, 49, 34]
    ]


def test_blocks_see_the_shorter_sequence():
    model, lengths = dynamic_model(), []
    handles = [block.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1])) for block in model.blocks]
    snippet.explain(model, pictures(model), keep_rate=0.5)
    for handle in handles:
        handle.remove()
    assert lengths == [25, 13, 7, 4]


def test_the_mask_of_training_is_the_dropping_of_inference(proof):
    """With the same decisions the masked pass gives the logits of the really shorter sequence."""
    model = dynamic_model()
    x = pictures(model, 3)
    found = snippet.explain(model, x, keep_rate=0.6)
    after = iter([found.alive[:, stage].flatten(1).double() for stage in model.stages])
    tokens, decisions = model.masked_forward(x, lambda logarithms, kept: next(after))
    assert [int(kept[0].sum()) for kept in decisions] == [14, 8, 5]
    error = relative_error(model.forward_head(tokens).detach(), found.logits)
    proof(ID, "masked pass of training equals dropping", error, at_most=1e-9, kind="closed form")


def test_a_predictor_of_training_ignores_what_was_dropped(proof):
    """Its mean runs over the tokens that are left: others may hold anything."""
    model = dynamic_model()
    predictor, generator = model.predictors[1], torch.Generator().manual_seed(2)
    patches = torch.randn(2, 10, 8, generator=generator, dtype=torch.float64)
    kept = (torch.rand(2, 10, generator=generator) < 0.6).double()
    kept[:, 0] = 1
    other = torch.where(kept[..., None] > 0, patches, 1e3 * patches)
    first, second = (predictor(p, kept).detach() for p in (patches, other))
    left = kept > 0
    short = torch.cat(
        [
            predictor(row[here][None], row.new_ones(1, int(here.sum())))[0]
            for row, here in zip(patches, left, strict=True)
        ]
    )
    error = max(relative_error(first[left], second[left]), relative_error(first[left], short.detach()))
    proof(ID, "predictors see kept tokens only", error, at_most=1e-12, kind="closed form")


def test_masked_attention_in_loops(proof):
    """Equations of attention masking, one weight at a time."""
    model = dynamic_model()
    block, x = model.blocks[1], torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    record = twin_block(model, 1, x[0].numpy())
    w = {n.removeprefix("blocks.1."): t for n, t in weights(model).items() if n.startswith("blocks.1.")}
    mixed = np.zeros((6, 8))
    for m in range(2):
        values = record["qkv"][:, 16 + 4 * m : 20 + 4 * m]
        for i in range(6):
            gate = [1.0 if j == i else float(kept[0, j]) for j in range(6)]
            whole = sum(g * a for g, a in zip(gate, record["attention"][m, i], strict=True))
            for j in range(6):
                mixed[i, 4 * m : 4 * m + 4] += gate[j] * record["attention"][m, i, j] / whole * values[j]
    middle = x[0].numpy() + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    hidden = gelu(layer_norm(middle, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    theirs = middle + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    error = relative_error(masked_block(block, x, kept)[0].detach(), theirs)
    proof(ID, "a masked block", error, at_most=1e-9, kind="parity", oracle="attention masking in plain loops")


def test_decisions_follow_their_probabilities(proof):
    """Gumbel-softmax draws 1 as often as pi says, and its gradient reaches the predictor."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    logarithms = torch.stack([1 - probability, probability], -1).log().expand(20_000, -1, -1).clone().requires_grad_()
    uniform = torch.rand(20_000, 3, 2, generator=generator, dtype=torch.float64)
    drawn = gumbel_decisions(logarithms, uniform)
    assert set(drawn.detach().round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    drawn.sum().backward()
    assert logarithms.grad is not None
    assert (logarithms.grad[..., 1] > 0).all()
    error = (drawn.detach().mean(0) - probability).abs().max()
    proof(ID, "share of ones among 20,000 decisions", error, at_most=0.015, kind="closed form")


def test_the_ratio_loss_is_the_published_one(proof):
    generator = torch.Generator().manual_seed(1)
    decisions = [(torch.rand(3, 10, generator=generator, dtype=torch.float64) < 0.5).double() for _ in range(2)]
    rates, theirs = [0.7, 0.49], 0.0
    for kept, rate in zip(decisions, rates, strict=True):
        for row in kept:
            theirs += (rate - sum(row.tolist()) / 10) ** 2
    error = abs(float(snippet.ratio_loss(decisions, rates)) - theirs / 6) / theirs
    proof(ID, "ratio loss", error, at_most=1e-12, kind="parity", oracle="loops")


@pytest.mark.parametrize("keep_rate", [0.0, 1.2, 0.2, math.nan, math.inf])
def test_bad_rates_are_named(keep_rate):
    """0.2 would leave no patch of 24 after the third stage."""
    model = dynamic_model()
    with pytest.raises(ValueError, match="keep_rate lies above 0"):
        snippet.explain(model, pictures(model), keep_rate=keep_rate)


def test_a_model_without_predictors_is_refused():
    model = tiny(4)
    with pytest.raises(UnsupportedModel, match="no trained predictors"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = dynamic_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    x = pictures(model)
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    script, card = training_script("dynamicvit_glyph"), catalog.load().models["dynamicvit-glyph"]
    monkeypatch.setitem(script.measure_token_pruning.__globals__, "UNSEEN", 800_000)  # not of training or card
    run = partial(snippet.explain, models.load("dynamicvit-glyph").model)
    measured = script.measure_token_pruning(run, {str(rate): {"keep_rate": rate} for rate in (1.0, 0.7, 0.5)}, 200)
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.05, name
    oracle = "200 glyph scenes"
    precision, chance = measured["precision_0.7"], measured["precision_1.0"]
    proof(
        ID,
        "share of the creature in kept patches over that in all",
        precision / chance,
        at_least=1.5,
        kind="ground truth",
        oracle=oracle,
    )
    proof(
        ID,
        "share of the creature that is kept, rate 0.7",
        measured["recall_0.7"],
        at_least=0.8,
        kind="ground truth",
        oracle=oracle,
    )


def test_two_blocks_have_two_stages():
    """Not one of them twice: the second predictor of a block would never be asked."""
    model = snippet.DynamicTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    assert model.stages == (0, 1)
    assert len(model.predictors) == 2
