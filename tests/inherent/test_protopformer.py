"""ProtoPFormer: the logit is the sum of what the prototypes add, and every prototype is a token of a training scene."""

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
    twin_block,
    twin_tokens,
    weights,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "protopformer"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
}
HEAD: dict[str, Any] = {"classes": 3, "local": 2, "whole": 2, "width": 6, "keep": 10, "weight": 0.3}


def rough_model(**changes: Any) -> Any:
    """24 patches of which ten are kept, three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.ProtoPFormer(VisionTransformer(**BACKBONE, num_classes=0), **(HEAD | changes))
    return roughen(model)


def images(count: int = 2) -> torch.Tensor:
    return pictures(tiny(1, img_size=(32, 48)), count)


def twin(model: Any, image: torch.Tensor) -> dict[str, Any]:
    """All that happens to one picture, token by token."""
    backbone, w = model.backbone, weights(model)
    stream, row = twin_tokens(backbone, image), None
    rollout = np.eye(len(stream))
    for index in range(2):
        record = twin_block(backbone, index, stream)
        stream, fused = record["output"], record["attention"].mean(0)
        rollout = (0.5 * fused + 0.5 * np.eye(len(fused))) @ rollout  # the matrix, from the first block up
    row = rollout[0, 1:]
    kept = sorted(sorted(range(len(row)), key=lambda i: -row[i])[: model.keep])
    stream = twin_block(backbone, 2, stream[[0] + [i + 1 for i in kept]])["output"]
    stream = layer_norm(stream, w["backbone.norm.weight"], w["backbone.norm.bias"])
    tokens = []
    for x in stream:
        hidden = np.maximum(w["add_on.0.weight"] @ x + w["add_on.0.bias"], 0)
        tokens.append(1 / (1 + np.exp(-(w["add_on.2.weight"] @ hidden + w["add_on.2.bias"]))))

    def like(token: np.ndarray, prototype: np.ndarray) -> float:
        distance = sum((a - b) ** 2 for a, b in zip(token, prototype, strict=True))
        return math.log((distance + 1) / (distance + 1e-4))

    maps = [[like(token, p) for token in tokens[1:]] for p in w["local_prototypes"]]
    whole = [like(tokens[0], p) for p in w["global_prototypes"]]
    logits = []
    for label in range(3):
        logit = 0.0
        for k in range(6):
            vote = 1.0 if k // 2 == label else -0.5
            logit += vote * (0.3 * whole[k] + 0.7 * max(maps[k]))
        logits.append(logit)
    return {"kept": kept, "maps": maps, "logits": logits}


def test_equals_the_equations_in_plain_loops(proof):
    model, x = rough_model(), images()
    found, errors = snippet.explain(model, x), []
    for index, image in enumerate(x):
        theirs = twin(model, image)
        assert found.foreground[index].flatten().nonzero()[:, 0].tolist() == theirs["kept"]
        errors.append(relative_error(found.logits[index], theirs["logits"]))
        ours = found.maps[index].flatten(1)[:, theirs["kept"]]
        errors.append(relative_error(ours, theirs["maps"]))
        best = [theirs["kept"][int(np.argmax(row))] for row in theirs["maps"]]
        assert found.best[index].tolist() == best
    assert len({tuple(f.flatten().tolist()) for f in found.foreground}) == 2  # each picture has its own foreground
    oracle = "transformer, rollout and prototypes in plain loops"
    proof(ID, "logits and similarity maps", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("target", [None, (2, 0, 1)])
def test_scores_sum_to_the_logit(target, proof):
    model, x = rough_model(), images(3)
    chosen = None if target is None else torch.tensor(target)
    found = snippet.explain(model, x, chosen)
    logits = model(x).detach()
    index = (logits.argmax(-1) if chosen is None else chosen)[:, None]
    error = relative_error(found.scores.sum(1) + found.global_scores.sum(1), logits.gather(1, index)[:, 0])
    what = "scores of the prototypes add up to the logit" + ("" if target is None else ", of any class")
    proof(ID, what, error, at_most=1e-12, kind="closed form")
    assert found.of_target.sum(1).tolist() == [2, 2, 2]
    assert (found.scores[found.of_target] > 0).all()
    assert (found.scores[~found.of_target] < 0).all()


def test_with_every_patch_in_the_foreground_it_is_the_plain_transformer(proof):
    model, x = rough_model(keep=24), images()
    first, patches, kept = model.embed(x)
    tokens = model.add_on(model.backbone.forward_features(x))
    error = relative_error(torch.cat([first, patches], 1).detach(), tokens.detach())
    proof(ID, "with nothing dropped, tokens of the plain model", error, at_most=1e-12, kind="closed form")
    assert torch.equal(kept, torch.arange(24).expand(2, -1))


def test_a_patch_outside_the_foreground_changes_nothing_in_the_last_block():
    model, x = rough_model(), images(1)
    before = model.embed(x)
    seen: list[torch.Tensor] = []
    handle = model.backbone.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.embed(x)
    handle.remove()
    assert seen[0].shape == (1, 1 + 10, 8)  # a really shorter sequence
    assert torch.equal(before[2].sort().values, before[2])


def test_similarity_is_greatest_where_token_and_prototype_are_equal(proof):
    prototypes = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = snippet.similarity(prototypes[None], prototypes)[0]
    error = (found.diagonal() - math.log(1e4)).abs().max()
    proof(ID, "similarity of equals is log(1 / epsilon)", error, at_most=1e-9, kind="closed form")
    assert (found <= found.diagonal().max() + 1e-9).all()
    assert (found >= 0).all()


def test_concentration_of_two_lumps(proof):
    """Two maps of one patch each have no variance, and their means' distance is that of the patches."""
    places = torch.tensor([[float(i), float(j)] for i in range(5) for j in range(6)], dtype=torch.float64)[None]
    maps = torch.full((1, 2, 30), 0.0, dtype=torch.float64)
    maps[0, 0, 0], maps[0, 1, 1] = 3.0, 0.5  # neighbours
    spread, apart = snippet.concentration(maps, places)
    assert float(spread) == 0
    error = abs(float(apart) - (2 - 1) * 2 / 4)  # both orders, of m * m pairs
    proof(ID, "concentration loss of two neighbours", error, at_most=1e-6, kind="closed form")
    spread, apart = snippet.concentration(torch.ones(1, 2, 30, dtype=torch.float64), places)
    error = abs(float(spread) - ((25 - 1) / 12 + (36 - 1) / 12) / 2 + 1)  # variances of discrete uniform distributions
    proof(ID, "concentration loss of flat maps", error, at_most=1e-9, kind="closed form")
    assert abs(float(apart) - 2 * 2 / 4) < 1e-5


def test_the_prototypes_of_the_class_are_shown_best_first():
    model, x = rough_model(), images()
    count = len(model.local_prototypes)
    model.local_sources = torch.arange(3 * count).view(count, 3)  # seed, index, patch
    found = snippet.explain(model, x, torch.tensor([1, 0]))
    for row in range(2):
        shown = found.likenesses(row)
        scores = [float(one.title) for one in shown]
        assert scores == sorted(scores, reverse=True)
        assert [one.source[0] // 3 for one in shown] != []
        for one in shown:
            k = one.source[0] // 3
            assert found.of_target[row, k]
            assert one.patches == [int(found.best[row, k])]
        assert len(shown) == int(found.of_target[row].sum())


def test_what_is_refused():
    plain = tiny(2, img_size=(32, 48))
    with pytest.raises(UnsupportedModel, match="has no global and local prototypes"):
        snippet.explain(plain, images())
    model = rough_model()
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 2"):
        snippet.explain(model, images(), torch.tensor([3, 0]))
    with torch.no_grad():
        model.add_on[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"add_on\.0\.weight of the model holds NaN|not finite"):
        snippet.explain(model, images())


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    model.local_sources[:] = torch.arange(18).view(6, 3)
    about = {"backbone": BACKBONE, "head": HEAD, "local_sources": model.local_sources.tolist()}
    about["global_sources"] = model.global_sources.tolist()
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "x.safetensors", metadata)
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    x = images().float()
    assert not again.training
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.local_sources, model.local_sources)


# --- the model that ships ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("protopformer-glyph").model


def test_every_prototype_is_a_token_of_the_training_scene_that_it_names(shipped, proof):
    worst, labels = 0.0, []
    for sources, prototypes in (
        (shipped.local_sources, shipped.local_prototypes),
        (shipped.global_sources, shipped.global_prototypes),
    ):
        scenes = [glyphs.scenes(1, row[0], start=row[1]) for row in sources.tolist()]
        with torch.no_grad():
            first, patches, kept = shipped.embed(glyphs.normalise(torch.cat([s.images for s in scenes])))
            if sources.shape[1] == 3:
                assert (kept == sources[:, 2:]).any(1).all()  # the patch lies in the foreground of its scene
                tokens = patches[kept == sources[:, 2:]]
            else:
                tokens = first[:, 0]
            worst = max(worst, float((tokens - prototypes).square().sum(1).max()))
        labels.append([int(s.labels[0, 0]) for s in scenes])
        assert len(set(map(tuple, sources.tolist()))) == len(sources)  # no token twice
        assert sources[:, 0].min() >= 2_000_000  # seeds of training scenes
    oracle = "scenes drawn again from seed and index"
    proof(
        ID,
        "squared distance of a prototype to its training patch",
        worst,
        at_most=1e-7,
        kind="ground truth",
        oracle=oracle,
    )
    assert labels == [[k // 5 for k in range(60)], [k // 3 for k in range(36)]]  # scenes of the prototype's class


def test_a_training_scene_finds_its_own_prototype(shipped):
    """Shown the scene that a prototype was taken from, the model finds it at that very patch."""
    rows = [0, 23, 41, 59]
    scenes = torch.cat([glyphs.scenes(1, s, start=i).images for s, i, _ in shipped.local_sources[rows].tolist()])
    found = snippet.explain(shipped, glyphs.normalise(scenes))
    best = found.best[range(4), rows]
    assert torch.equal(best, shipped.local_sources[rows, 2])
    assert torch.equal(found.sources[0], shipped.local_sources)


def test_the_card_holds_on_unseen_scenes(shipped, proof, monkeypatch):
    measured = close_to_card("protopformer-glyph", monkeypatch, within=0.05)
    oracle = "200 glyph scenes"
    for name, what, floor in (
        ("creature_in_foreground", "share of the creature inside the foreground", 0.8),
        ("matches_on_creature", "share of best matches of the class's local prototypes on the creature", 0.8),
        ("prototypes_on_creature", "share of local prototypes whose training patch lies on the creature", 0.8),
    ):
        proof(ID, what, measured[name], at_least=floor, kind="ground truth", oracle=oracle)
    ratio = measured["matches_on_same_part"] / measured["matches_on_another_part"]
    what = "matches on the part that the prototype's patch shows, over matches on another part"
    proof(ID, what, ratio, at_least=1.3, kind="ground truth", oracle=oracle)


def test_prototypes_find_more_of_the_creature_than_the_foreground_holds(shipped, proof):
    """The foreground is mostly creature already: that matches lie on it is an achievement only beyond that share."""
    script = training_script("protopformer_glyph")
    scenes = glyphs.scenes(100, 800_000, 1)
    found = snippet.explain(shipped, glyphs.normalise(scenes.images), scenes.labels[:, 0])
    own = found.of_target.nonzero()[:, 1].view(100, -1)  # (B, m)
    foreground = found.foreground.flatten(1).nonzero()[:, 1].view(100, -1)  # (B, n)
    matched, chance = (
        float((script.covered_by(scenes, patches)[..., 5] > 0.1).float().mean())
        for patches in (found.best.gather(1, own), foreground)
    )
    what = "matches on the creature, over the share of the foreground that lies on it"
    proof(ID, what, matched / chance, at_least=1.02, kind="ground truth", oracle="100 glyph scenes")
