"""ProtoViT: greedy matching against a search in plain loops, scores that sum to the logit, prototypes that are real."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close_to_card, pictures, relative_error, roughen, tiny, weights
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "protovit"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
HEAD: dict[str, Any] = {"classes": 3, "each": 2, "parts": 3, "radius": 1}


def rough_model(**changes: Any) -> Any:
    """24 patches, six prototypes of three parts, some of which are left out, three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.ProtoViT(VisionTransformer(**BACKBONE, num_classes=0), **(HEAD | changes)))


def images(count: int = 3) -> torch.Tensor:
    return pictures(tiny(1, img_size=(32, 48)), count)


def twin(model: Any, x: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines (M, S), patches (M, S) and logits (K,) of one picture; x (P, D)."""
    w = weights(model)
    prototypes, select, last = w["prototypes"], w["select"], w["last"]
    cosines, patches = np.zeros(prototypes.shape[:2]), np.zeros(prototypes.shape[:2], dtype=int)
    logits = np.zeros(len(last))
    for m, parts in enumerate(prototypes):
        left, used, previous = set(range(len(parts))), set(), None
        while left:
            best = (-math.inf, -1, -1)
            for s in left:
                for p in range(len(x)):
                    far = previous is not None and max(abs(p // 6 - previous // 6), abs(p % 6 - previous % 6)) > radius
                    if p in used or far:
                        continue
                    cosine = parts[s] @ x[p] / math.sqrt(parts[s] @ parts[s]) / math.sqrt(x[p] @ x[p])
                    best = max(best, (cosine, s, p))
            cosines[m, best[1]], patches[m, best[1]], previous = best[0], best[2], best[2]
            left.remove(best[1])
            used.add(best[2])
        kept = [s for s in range(len(parts)) if select[m, s] > 0] or [int(np.argmax(select[m]))]
        score = sum(cosines[m, s] for s in kept) * len(parts) / len(kept)
        logits += last[:, m] * score
    return cosines, patches, logits


@pytest.mark.parametrize("radius", [1, 2])
def test_greedy_matching_in_plain_loops(radius, proof):
    model, x = rough_model(radius=radius), images()
    found, errors = snippet.explain(model, x), []
    focus = model.focus(x).detach().numpy()
    for row in range(3):
        cosines, patches, logits = twin(model, focus[row], radius)
        assert found.patches[row].tolist() == patches.tolist()
        errors += [relative_error(found.cosines[row], cosines), relative_error(found.logits[row], logits)]
    assert (found.weights[0] == 0).any()  # some parts are left out
    oracle = "a search over all pairs in plain loops"
    proof(ID, f"matches and logits, r = {radius}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("target", [None, (2, 0, 1)])
def test_scores_sum_to_the_logit_and_the_map_to_those_of_the_class(target, proof):
    model, x = rough_model(), images()
    chosen = None if target is None else torch.tensor(target)
    found = snippet.explain(model, x, chosen)
    logits = model(x).detach()
    index = logits.argmax(-1) if chosen is None else chosen
    errors = [relative_error(found.scores.sum(1), logits.gather(1, index[:, None])[:, 0])]
    own = (found.scores * found.of_target).sum(1)
    errors.append(relative_error(found.heatmap().sum((1, 2)), own))
    assert found.of_target.nonzero()[:, 1].view(3, 2).div(2, rounding_mode="floor").tolist() == [[c, c] for c in index]
    what = "scores add up to the logit, the map to the class's own" + ("" if target is None else ", of any class")
    proof(ID, what, max(errors), at_most=1e-9, kind="closed form")


def test_a_prototype_finds_itself(proof):
    """Moved onto the patches that they were matched to, all parts have cosine one."""
    model, x = rough_model(radius=5), images(1)  # with r = 1 the order of the chain may lead elsewhere
    focus = model.focus(x).detach()
    found = snippet.explain(model, x)
    with torch.no_grad():
        model.prototypes.copy_(focus[0][found.patches[0]])
    again = snippet.explain(model, x)
    error = float((again.cosines - 1).abs().max())
    proof(ID, "a prototype matched to its own patches has cosine one", error, at_most=1e-9, kind="closed form")
    assert torch.equal(again.patches, found.patches)


def test_parts_are_neighbours_and_no_patch_serves_twice():
    found = snippet.explain(rough_model(), images())
    patches = found.patches.flatten(0, 1)
    assert all(len(set(row)) == 3 for row in patches.tolist())
    # Each step lies within one row and column of the one before, so three parts span two steps at most.
    rows, columns = patches // 6, patches % 6
    assert int((rows.amax(1) - rows.amin(1)).max()) <= 2
    assert int((columns.amax(1) - columns.amin(1)).max()) <= 2


def test_weights_of_the_parts(proof):
    model = rough_model()
    kept = snippet.kept_parts(model.select)
    error = float((model.weights().detach().sum(1) - 3).abs().max())
    proof(ID, "weights of a prototype's parts sum to their number", error, at_most=1e-12, kind="closed form")
    assert kept.any(1).all()
    assert torch.equal(model.weights() > 0, kept)
    assert snippet.kept_parts(torch.tensor([[-1.0, -3.0]])).tolist() == [[True, False]]  # one part always stays


def test_coherence_is_the_largest_cosine_distance(proof):
    prototypes = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = [max(1 - float(torch.cosine_similarity(a, b, dim=0)) for a in p for b in p) for p in prototypes]
    error = relative_error(snippet.incoherence(prototypes), theirs)
    proof(ID, "coherence loss", error, at_most=1e-12, kind="parity", oracle="pairs in plain loops")


def test_the_prototypes_of_the_class_are_shown_best_first():
    model = rough_model()
    model.sources = torch.arange(6 * 5).view(6, 5)  # seed, index, three patches
    found = snippet.explain(model, images(), torch.tensor([0, 1, 2]))
    for row in range(3):
        shown = found.likenesses(row)
        scores = [float(one.title) for one in shown]
        assert scores == sorted(scores, reverse=True)
        for one in shown:
            k = one.source[0] // 5  # which prototype this is
            assert k // 2 == row  # two of every class
            kept = (found.weights[row, k] > 0).tolist()
            assert one.patches == [p for p, keep in zip(found.patches[row, k].tolist(), kept, strict=True) if keep]
            assert one.source[2:] == [5 * k + 2 + s for s, keep in enumerate(kept) if keep]


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="has no prototypes of sub-patches"):
        snippet.explain(tiny(1, img_size=(32, 48)), images())
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 2"):
        snippet.explain(rough_model(), images(), torch.tensor([3, 0, 0]))


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    model.sources[:] = torch.arange(30).view(6, 5)
    about = {"backbone": BACKBONE, "head": HEAD, "sources": model.sources.tolist()}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "x.safetensors", metadata)
    again, x = snippet.load_pretrained(tmp_path / "x.safetensors"), images().float()
    assert not again.training
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.sources, model.sources)


# --- the model that ships ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("protovit-glyph").model


def test_every_prototype_is_patches_of_the_training_scene_that_it_names(shipped, proof):
    scenes = [glyphs.scenes(1, s, start=i) for s, i, *_ in shipped.sources.tolist()]
    x = glyphs.normalise(torch.cat([scene.images for scene in scenes]))
    with torch.no_grad():
        focus = shipped.focus(x)  # (M, P, D)
    index = shipped.sources[:, 2:, None].expand(-1, -1, focus.shape[2])
    error = relative_error(shipped.prototypes.detach(), focus.gather(1, index))
    oracle = "scenes drawn again from seed and index"
    what = "prototypes against the tokens of their training patches"
    proof(ID, what, error, at_most=1e-4, kind="ground truth", oracle=oracle)
    assert [int(s.labels[0, 0]) for s in scenes] == [k // 4 for k in range(48)]
    assert shipped.sources[:, 0].min() >= 2_000_000  # training scenes
    own = snippet.explain(shipped, x).cosines[range(48), range(48)]  # (M, S): each prototype in its own scene
    what = "cosine of a prototype's best part in its own scene"
    proof(ID, what, own.amax(1).min(), at_least=0.9999, kind="ground truth", oracle=oracle)


def test_the_card_holds_on_unseen_scenes(shipped, proof, monkeypatch):
    measured = close_to_card("protovit-glyph", monkeypatch, within=0.05)
    oracle = "200 glyph scenes"
    for name, what, floor in (
        ("map_on_creature", "share of the map on patches of the creature", 0.6),
        ("matches_on_creature", "share of the class's matched patches on the creature", 0.6),
        ("prototypes_on_creature", "share of the prototypes' training patches on the creature", 0.6),
    ):
        proof(ID, what, measured[name], at_least=floor, kind="ground truth", oracle=oracle)
