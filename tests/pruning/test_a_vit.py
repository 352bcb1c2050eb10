"""A-ViT: tokens that halt one by one, against a twin that keeps a list of them; scores that sum to one."""

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
    twin_block,
    twin_tokens,
    weights,
)
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from vitx import catalog, load_module, models
from vitx.vit import UnsupportedModel

ID = "a-vit"
snippet = load_module(ID)
OPTIONS: dict[str, Any] = {"patch_size": 8, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}


def halting(depth: int = 4, shift: float = -1.0, size: tuple[int, int] = (40, 56)) -> Any:
    """A rough model of 35 patches whose tokens halt after one block up to all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.AdaptiveTokenTransformer(0.8, shift, img_size=size, depth=depth, **OPTIONS)
    return roughen(model)


def twin(model: Any, image: torch.Tensor, epsilon: float = 0.01) -> dict[str, Any]:
    """Every token on its own, with a list of those that are left."""
    w, stream, depth = weights(model), twin_tokens(model, image), len(model.blocks)
    left, total = list(range(len(stream))), [0.0] * len(stream)
    p, scores = np.zeros((depth, len(stream))), np.zeros((depth, len(stream)))
    output, blocks = np.zeros(stream.shape[1]), [0] * len(stream)
    state = {k: stream[k] for k in left}
    for index in range(depth):
        if not left:
            break
        after = twin_block(model, index, np.stack([state[k] for k in left]))["output"]
        still = []
        for row, k in enumerate(left):
            state[k] = after[row]
            h = 1 / (1 + math.exp(-(model.halting_scale * state[k][0] + model.halting_shift)))
            scores[index, k], blocks[k] = h, index + 1
            if index == depth - 1 or total[k] + h >= 1 - epsilon:
                p[index, k] = 1 - total[k]
            else:
                p[index, k], total[k] = h, total[k] + h
                still.append(k)
            if k == 0:
                output = output + p[index, k] * state[k]
        left = still
    final = layer_norm(output, w["norm.weight"], w["norm.bias"])
    logits = final @ w["head.weight"].T + w["head.bias"]
    return {"logits": logits, "p": p, "scores": scores, "blocks": blocks}


@pytest.mark.parametrize(("shift", "epsilon"), [(-2.0, 0.01), (-1.0, 0.01), (0.5, 0.01), (-1.0, 0.3)])
def test_token_by_token(shift, epsilon, proof):
    model, errors = halting(shift=shift), []
    x = pictures(model, 3)
    ours = snippet.explain(model, x, epsilon=epsilon)
    depths = set()
    for row, image in enumerate(x):
        theirs = twin(model, image, epsilon)
        errors.append(relative_error(ours.logits[row], theirs["logits"]))
        errors.append(relative_error(ours.halting[row].flatten(1), theirs["p"][:, 1:]))
        errors.append(relative_error(ours.class_halting[row], theirs["p"][:, 0]))
        assert ours.alive[row].sum(0).flatten().tolist() == theirs["blocks"][1:]
        depths |= set(theirs["blocks"])
    assert len(depths) > 2  # else there would be nothing to tell apart
    what = f"logits and halting probabilities, shift {shift:g}, epsilon {epsilon:g}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="halting token by token in loops")


@pytest.mark.parametrize("shift", [-math.inf, -3.0, -1.0, 0.0, 2.0, 50.0])
def test_halting_scores_sum_to_one(shift, proof):
    model = halting()
    found = snippet.explain(model, pictures(model, 4), shift=shift)
    sums = torch.cat([found.halting.flatten(2).sum(1), found.class_halting.sum(1, keepdim=True)], 1)
    assert (found.halting >= 0).all()
    assert (found.halting[~found.alive] == 0).all()
    error = (sums - 1).abs().max()
    proof(ID, f"halting scores of a token sum to one, shift {shift:g}", error, at_most=1e-12, kind="closed form")


def test_without_halting_it_is_the_plain_model(proof):
    model = halting()
    plain = VisionTransformer(img_size=(40, 56), depth=4, **OPTIONS).double().eval()
    plain.load_state_dict(model.state_dict())  # not a weight more
    x = pictures(model)
    found = snippet.explain(model, x, shift=-math.inf)
    assert found.alive.all()
    assert (found.heatmap() == 1).all()
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "shift -inf is the plain model", error, at_most=1e-12, kind="closed form")


def test_a_high_shift_stops_everything_after_the_first_block(proof):
    """Then the class token of the first block is all that is classified."""
    model = halting()
    x = pictures(model)
    found = snippet.explain(model, x, shift=math.inf)
    assert found.alive[:, 0].all()
    assert not found.alive[:, 1:].any()
    first = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    theirs = model.forward_head(model.norm(first)).detach()
    error = relative_error(found.logits, theirs)
    proof(ID, "halting at once leaves the first block", error, at_most=1e-12, kind="closed form")


def test_the_sequence_really_gets_shorter():
    """No block sees more tokens than the picture with the most of them has, and the model's own pass is the same."""
    model, seen = halting(), []
    x = pictures(model, 3)
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for block in model.blocks]
    found = snippet.explain(model, x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        tokens = snippet.halt(model, model._pos_embed(model.patch_embed(x))).alive  # with the class token
    assert seen == tokens.sum(2).amax(0).tolist()[: len(seen)]
    assert seen[-1] < seen[0] == 36
    assert not tokens[:, len(seen) :].any()
    assert torch.equal(model(x).detach(), found.logits)


def test_a_halted_patch_never_returns_and_a_lower_shift_keeps_more():
    model = halting(6)
    x = pictures(model, 4)
    kept = []
    for shift in (-4.0, -2.0, -1.0, 0.0, 1.0):
        alive = snippet.explain(model, x, shift=shift).alive
        assert (alive[:, 1:] <= alive[:, :-1]).all()
        kept.append(float(alive.double().mean()))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_pictures_that_have_finished_do_not_disturb_the_others(proof):
    """At a shift where one picture halts whole and another goes on, a batch equals its pictures."""
    model = halting(size=(16, 16))  # four patches
    x = pictures(model, 6)
    for shift in np.linspace(-1, 4, 51).tolist():
        together = snippet.explain(model, x, shift=shift)
        blocks = together.alive.flatten(2).any(2).sum(1)
        if blocks.min() < blocks.max():
            break
    assert blocks.min() < blocks.max()
    alone = [snippet.explain(model, image[None], shift=shift) for image in x]
    errors = [relative_error(together.logits, torch.cat([single.logits for single in alone]))]
    errors.append(relative_error(together.halting, torch.cat([single.halting for single in alone])))
    assert torch.equal(together.alive, torch.cat([single.alive for single in alone]))
    what = "a batch of pictures of other lengths equals its pictures"
    proof(ID, what, max(errors), at_most=1e-12, kind="closed form")


def test_the_losses_in_plain_loops(proof):
    model, target = halting(), snippet.prior(4, 2.0)
    x = pictures(model, 3)
    with torch.no_grad():
        found = snippet.halt(model, model._pos_embed(model.patch_embed(x)))
    ponder, distribution = snippet.halting_losses(found, target)
    twins = [twin(model, image) for image in x]
    rho = []
    for each in twins:
        for k, blocks in enumerate(each["blocks"]):
            rho.append(blocks + 1 - sum(each["scores"][: blocks - 1, k]))  # N_k + r_k
    level = np.mean([each["scores"].mean(1) for each in twins], 0)
    share = level / level.sum()
    theirs = stats.entropy(share, target.numpy())
    errors = [abs(float(ponder) - np.mean(rho)) / np.mean(rho), abs(float(distribution) - theirs) / theirs]
    proof(ID, "ponder and prior losses", max(errors), at_most=1e-9, kind="parity", oracle="loops, scipy.stats.entropy")


def test_the_prior_is_a_normal_distribution(proof):
    density = stats.norm.pdf(np.arange(6), loc=3.0, scale=1)
    error = relative_error(snippet.prior(6, 3.0), density / density.sum())
    proof(ID, "prior over the blocks", error, at_most=1e-12, kind="parity", oracle="scipy.stats.norm")


def test_the_ponder_loss_teaches_tokens_to_halt():
    """Its gradient raises the first channel of some token, by way of the remainder."""
    model = halting()
    x = model._pos_embed(model.patch_embed(pictures(model))).detach().requires_grad_()
    ponder, _ = snippet.halting_losses(snippet.halt(model, x), snippet.prior(4, 2.0))
    (slope,) = torch.autograd.grad(ponder, x)
    assert slope.isfinite().all()
    with torch.no_grad():
        lower, _ = snippet.halting_losses(snippet.halt(model, x - 1e-4 * slope), snippet.prior(4, 2.0))
    assert float(slope.abs().max()) > 0
    assert float(lower) < float(ponder.detach())


@pytest.mark.parametrize("options", [{"epsilon": 1.0}, {"epsilon": -0.1}, {"shift": math.nan}])
def test_bad_options_are_named(options):
    model = halting(2)
    with pytest.raises(ValueError, match="epsilon lies from 0"):
        snippet.explain(model, pictures(model), **options)


def test_a_model_that_cannot_halt_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="not trained to halt"):
        snippet.explain(model, pictures(model))


def test_a_file_gives_back_its_model(tmp_path):
    model = halting(2).float()
    backbone = {key: value for key, value in OPTIONS.items() if key != "num_classes"} | {
        "img_size": [40, 56],
        "depth": 2,
    }
    about = {"backbone": backbone, "num_classes": 5, "halting": [0.8, -1.0]}
    again = read_back(snippet, model, about, tmp_path)
    x = pictures(model)
    assert torch.equal(again(x), model(x))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    script, card = training_script("a_vit_glyph"), catalog.load().models["a-vit-glyph"]
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(models.load("a-vit-glyph").model, models.load("glyph").model, 200)
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.05, name
    top1 = measured["top1"]
    proof(ID, "accuracy of the halting model", top1, at_least=0.9, kind="ground truth", oracle="200 glyph scenes")
    for creatures in (1, 2):
        chance = measured[f"creature_area_{creatures}"]
        lift = measured[f"kept_to_the_end_on_creature_{creatures}"] / chance
        what = f"patches kept to the end lie on the creature, times their share of the picture, {creatures} in a scene"
        proof(ID, what, lift, at_least=1.5, kind="ground truth", oracle="200 glyph scenes")
