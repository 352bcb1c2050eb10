"""ViT-NeT: the tree node by node in plain loops, paths that decide the class, prototypes that are training patches."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, roughen, tiny, training_script, weights
from safetensors.torch import save_file
from scipy.special import erf
from timm.models.vision_transformer import VisionTransformer
from vitx import catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "vit-net"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [16, 24],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
TREE: dict[str, Any] = {"classes": 5, "depth": 3, "width": 6}


def rough_model(**changes: Any) -> Any:
    """Six patches, seven inner nodes, eight leaves, five classes; both sides of the nodes are taken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = roughen(snippet.ViTNeT(VisionTransformer(**BACKBONE, num_classes=0), **(TREE | changes)))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        model.prototypes.copy_(2 * torch.rand(7, 6, generator=generator, dtype=torch.float64) - 0.5)
    return model


def images(count: int = 3) -> torch.Tensor:
    return pictures(tiny(1, img_size=(16, 24)), count)


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def twin(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, dict[int, dict]]:
    """Class probabilities by recursion from the root, and what happened at every node."""
    w, record = weights(model), {}

    def context(patches: list[np.ndarray], level: int, node: int) -> list[np.ndarray]:
        c = {name: w[f"contexts.{level}.{name}"] for name in ("attend", "first", "second", "biases", "gains", "shifts")}
        share = softmax(np.array([c["attend"][node] @ z for z in patches]))
        x = sum(a * z for a, z in zip(share, patches, strict=True))
        x = norm(x @ c["first"][node] + c["biases"][0, node]) * c["gains"][0, node] + c["shifts"][0, node]
        x = (x * 0.5 * (1 + erf(x / math.sqrt(2)))) @ c["second"][node] + c["biases"][1, node]
        return [sigmoid(norm(z + x) * c["gains"][1, node] + c["shifts"][1, node]) for z in patches]

    def visit(node: int, level: int, patches: list[np.ndarray], reach: float) -> np.ndarray:
        if level == 3:
            leaf = node - 7
            most = np.max(patches, axis=0)
            votes = norm(most @ w["leaf_weight"][leaf] + w["leaf_bias"][leaf])
            answer = softmax(votes * w["leaf_gain"][leaf] + w["leaf_shift"][leaf])
            record[node] = {"answer": answer, "reach": reach}
            return answer
        distances = [math.sqrt(sum((z - w["prototypes"][node]) ** 2)) for z in patches]
        likeness = [math.log((d + 1) / (d + 1e-4)) for d in distances]
        left = min(1.0, max(likeness))
        record[node] = {"likeness": likeness, "left": left}
        first, place = 2 * node + 1, 2 * (node - (2**level - 1))  # the children, counted in all and in their level
        sides = [
            visit(first + s, level + 1, context(patches, level, place + s), reach * (1 - left if s else left))
            for s in (0, 1)
        ]
        return left * sides[0] + (1 - left) * sides[1]

    patches = [sigmoid(w["add_on.weight"] @ token) for token in tokens]
    return visit(0, 0, patches, 1.0), record


def test_equals_a_recursion_from_the_root(proof):
    model, x = rough_model(), images()
    target = torch.tensor([3, 1, 4])
    found = snippet.explain(model, x, target)
    tokens = model.backbone.forward_features(x)
    walk = model.walk(tokens)
    errors, turned = [], set()
    for row in range(3):
        answer, record = twin(model, tokens[row, 1:].detach().numpy())
        errors.append(relative_error(found.logits[row].exp(), answer))
        errors.append(relative_error(walk.left[row].detach(), [record[i]["left"] for i in range(7)]))
        errors.append(relative_error(walk.reach[row].detach(), [record[i]["reach"] for i in range(7, 15)]))
        added = [record[i]["reach"] * record[i]["answer"][target[row]] for i in range(7, 15)]
        leaf = int(np.argmax(added))
        assert int(found.leaf[row]) == leaf
        errors.append(relative_error(found.share[row], added[leaf] / sum(added)))
        node, path = leaf + 7, []
        while node:
            path.append(((node - 1) // 2, node % 2 == 1))
            node = (node - 1) // 2
        path.reverse()
        assert found.path[row].tolist() == [node for node, _ in path]
        assert found.turns[row].tolist() == [left for _, left in path]
        for step, (node, left) in enumerate(path):
            errors.append(relative_error(found.maps[row, step].flatten(), record[node]["likeness"]))
            chance = record[node]["left"] if left else 1 - record[node]["left"]
            errors.append(abs(float(found.probabilities[row, step]) - chance))
            turned.add(left)
    assert turned == {True, False}
    proof(
        ID, "routes, leaves and answer", max(errors), at_most=1e-9, kind="parity", oracle="a recursion in plain loops"
    )


def test_probabilities_of_the_leaves_sum_to_one_and_those_of_the_path_are_one_of_them(proof):
    model, x = rough_model(), images()
    walk, found = model.walk(model.backbone.forward_features(x)), snippet.explain(model, x)
    error = float((walk.reach.sum(1) - 1).detach().abs().max())
    error = max(error, float((walk.reach[range(3), found.leaf] - found.probabilities.prod(1)).detach().abs().max()))
    proof(ID, "leaves sum to one; turns of the path multiply to its leaf", error, at_most=1e-12, kind="closed form")
    error = float((found.logits.exp().sum(1) - 1).abs().max())
    proof(ID, "class probabilities sum to one", error, at_most=1e-9, kind="closed form")


def test_a_prototype_that_is_in_the_picture_sends_it_left():
    model, x = rough_model(), images(1)
    levels = model.levels(model.backbone.forward_features(x))
    with torch.no_grad():
        model.prototypes[0] = levels[0][0, 0, 4]
        model.prototypes[2] = levels[1][0, 1, 1]  # the right child of the root
    walk = model.walk(model.backbone.forward_features(x))
    assert walk.left[0, 0] == walk.left[0, 2] == 1
    assert walk.similarity[0, 0].argmax() == 4
    assert walk.similarity[0, 2].argmax() == 1
    assert (walk.reach[0, 4:] == 0).all()  # nothing arrives on the other side


def test_what_is_not_on_the_path_does_not_count():
    """With certain turns, the answer is that of one leaf, and other nodes and leaves may be anything."""
    model, x = rough_model(), images(1)
    levels = model.levels(model.backbone.forward_features(x))
    with torch.no_grad():
        for level, node in enumerate((0, 1, 3)):  # left, left, left
            model.prototypes[node] = levels[level][0, 0, 0]
        before = snippet.explain(model, x)
        for node in (2, 4, 5, 6):
            model.prototypes[node] = torch.rand(6, dtype=torch.float64)
        for name in ("leaf_weight", "leaf_bias"):
            model.get_parameter(name)[1:] = 7.0
        after = snippet.explain(model, x)
    assert before.path.tolist() == [[0, 1, 3]]
    assert torch.equal(before.logits, after.logits)
    torch.testing.assert_close(before.logits.exp(), before.answer, rtol=1e-9, atol=1e-9)


def test_the_shortcut_adds_the_head_s_logits_at_every_leaf():
    model, x = rough_model(shortcut=True), images()
    tokens = model.backbone.forward_features(x)
    pooled = model.levels(tokens)[-1].amax(2)
    expected = model.answer(pooled, model.shortcut(tokens[:, 0])[:, None])
    assert torch.equal(model.walk(tokens).answers, expected)
    assert not torch.allclose(expected, model.answer(pooled))


def test_the_path_is_shown_from_the_root_down():
    model = rough_model()
    model.sources = torch.arange(3 * len(model.prototypes)).view(-1, 3)  # seed, index, patch
    found = snippet.explain(model, images())
    for row in range(3):
        shown = found.likenesses(row)
        assert [one.source[0] // 3 for one in shown] == found.path[row].tolist()
        assert shown[0].source[0] == 0  # the root
        assert [one.patches for one in shown] == found.best[row, :, None].tolist()
        assert ["not" not in one.relation for one in shown] == found.turns[row].tolist()


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="has no tree of prototypes"):
        snippet.explain(tiny(1), images())
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(rough_model(), images(), torch.tensor([5, 0, 0]))


def test_mutual_information(proof):
    """Every class in a leaf of its own: the entropy of the classes. The same leaf for all: nothing."""
    script = training_script("vit_net_glyph")
    labels = torch.arange(12)
    own = torch.eye(16)[:12]
    error = abs(float(script.information(own, labels)) - math.log(12))
    error = max(error, abs(float(script.information(torch.full((12, 16), 1 / 16), labels))))
    proof(ID, "mutual information of leaf and class", error, at_most=1e-5, kind="closed form")


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    model.sources[:] = torch.arange(21).view(7, 3)
    about = {"backbone": BACKBONE, "tree": TREE, "sources": model.sources.tolist()}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "x.safetensors", metadata)
    again, x = snippet.load_pretrained(tmp_path / "x.safetensors"), images().float()
    assert not again.training
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.sources, model.sources)


# --- the model that ships ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load("vit-net-glyph").model


def test_every_prototype_is_a_patch_of_the_training_scene_that_it_names(shipped, proof):
    scenes = torch.cat([glyphs.scenes(1, s, start=i).images for s, i, _ in shipped.sources.tolist()])
    with torch.no_grad():
        levels = shipped.levels(shipped.backbone.forward_features(glyphs.normalise(scenes)))
        walk = shipped.walk(shipped.backbone.forward_features(glyphs.normalise(scenes)))
    worst = 0.0
    for node, (seed, _, patch) in enumerate(shipped.sources.tolist()):
        level = (node + 1).bit_length() - 1
        token = levels[level][node, node + 1 - 2**level, patch]
        worst = max(worst, float((token - shipped.prototypes[node]).norm()))
        assert seed >= 2_000_000  # training scenes
        assert walk.left[node, node] == 1  # the scene that holds the prototype goes left there
        assert int(walk.similarity[node, node].argmax()) == patch
    oracle = "scenes drawn again from seed and index"
    proof(ID, "distance of a prototype to its training patch", worst, at_most=1e-3, kind="ground truth", oracle=oracle)


def test_the_card_holds_on_unseen_scenes(shipped, proof, monkeypatch):
    script, card = training_script("vit_net_glyph"), catalog.load().models["vit-net-glyph"]
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(shipped, 200)
    spread = 3 * (0.25 / 200 + 0.25 / 500) ** 0.5  # three standard errors of a share's difference, at most
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < (3 if name == "leaves_used" else spread), name
    oracle = "200 glyph scenes"
    for name, what, floor in (
        ("top1_of_one_path", "accuracy when every turn is taken for certain and one leaf answers", 0.85),
        ("top1_of_the_leaf_s_class", "accuracy when the leaf that is reached names its most common class", 0.6),
        ("other_side_of_root_changes_class", "scenes whose class changes when the root turns the other way", 0.3),
    ):
        proof(ID, what, measured[name], at_least=floor, kind="ground truth", oracle=oracle)


def test_prototypes_are_found_on_the_creature_more_often_than_by_chance(shipped, proof):
    scenes = glyphs.scenes(200, 800_000)
    found = snippet.explain(shipped, glyphs.normalise(scenes.images))
    share = glyphs.patch_fraction(scenes.object_masks[:, :1], (14, 14))
    near = torch.nn.functional.max_pool2d(share, 3, 1, 1).flatten(1) > 0  # (B, P): creature in the 3 x 3 patches around
    hit = near.gather(1, found.best)[found.turns].float().mean()
    what = "where the path goes left, the patch found is at the creature: share over chance"
    proof(ID, what, hit / near.float().mean(), at_least=1.5, kind="ground truth", oracle="200 glyph scenes")


def test_how_many_prototypes_are_patches_of_creatures(shipped, proof):
    scenes = [glyphs.scenes(1, seed, start=index) for seed, index, _ in shipped.sources.tolist()]
    share = (
        glyphs.patch_fraction(torch.cat([scene.object_masks[:, 0] for scene in scenes]), (14, 14)) > 0
    )  # (I, 14, 14)
    on = share.flatten(1)[range(len(scenes)), shipped.sources[:, 2]].float().mean()
    what = "share of the prototypes that are patches of creatures, over the creatures' share of all patches"
    proof(ID, what, on / share.float().mean(), at_least=1.5, kind="ground truth", oracle="the training scenes")
