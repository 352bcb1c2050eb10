from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_forward, twin_tokens, variant, weights
from sklearn.cluster import KMeans
from torch import nn
from vitx.vit import logits_of_visible

ID = "tis"


def first_points(count: int, clusters: int) -> np.ndarray:
    """The maps that the clusters of the default generator start from."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:clusters].numpy()


def lloyd(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """K-means, point by point, until nothing moves; an empty cluster stays where it is."""
    nearest = None
    while True:
        now = [min(range(len(centres)), key=lambda k: float(((p - centres[k]) ** 2).sum())) for p in points]
        if now == nearest:
            return centres
        nearest, centres = now, centres.copy()
        for k in range(len(centres)):
            members = [p for p, cluster in zip(points, nearest, strict=True) if cluster == k]
            if members:
                centres[k] = np.mean(members, axis=0)


def twin(model: Any, image, target: int, masks: int, ratio: float) -> np.ndarray:
    """The map of one picture: one forward pass a mask, in loops, on a sequence that lacks the other tokens."""
    records, _ = twin_forward(model, image)
    points = np.concatenate([record["output"][1:] for record in records], 1).T
    tokens, w = twin_tokens(model, image), weights(model)
    patches = len(tokens) - 1
    total, coverage = np.zeros(patches), np.zeros(patches)
    for centre in lloyd(points, points[first_points(len(points), masks)]):
        kept = sorted(range(patches), key=lambda i: -centre[i])[: int(ratio * patches)]
        x = tokens[[0] + [1 + i for i in kept]]
        for index in range(len(model.blocks)):
            x = twin_block(model, index, x)["output"]
        logits = layer_norm(x, w["norm.weight"], w["norm.bias"])[0] @ w["head.weight"].T + w["head.bias"]
        score = np.exp(logits[target]) / np.exp(logits).sum()
        for i in kept:
            total[i] += score
            coverage[i] += 1
    return np.array([t / c if c else 0.0 for t, c in zip(total, coverage, strict=True)])


@pytest.mark.parametrize(("depth", "masks", "ratio"), [(2, 5, 0.5), (3, 9, 0.5), (3, 9, 0.3)])
def test_one_pass_a_mask(depth, masks, ratio, proof):
    model, target = tiny(depth, img_size=(16, 24)), [4, 2]
    x = pictures(model)
    ours = vitx.load(ID)(model, x, torch.tensor(target), masks=masks, ratio=ratio, chunk=4).flatten(1)
    theirs = [twin(model, image, label, masks, ratio) for image, label in zip(x, target, strict=True)]
    oracle = "clusters, masks and passes in loops"
    check = f"patches, depth {depth}, {masks} masks of {ratio:.0%}"
    proof(ID, check, relative_error(ours, theirs), at_most=1e-12, kind="parity", oracle=oracle)


def test_scikit_learn_finds_the_same_clusters(proof):
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(2, 150, 6, generator=generator, dtype=torch.float64)
    start = torch.arange(0, 120, 10)
    ours = vitx.load_module(ID).cluster_centres(points, start)
    oracle: Any = KMeans
    settings = {"n_init": 1, "max_iter": 100, "tol": 0}
    theirs = [oracle(12, init=p[start].numpy(), **settings).fit(p.numpy()).cluster_centers_ for p in points]
    error = relative_error(ours, np.stack(theirs))
    proof(ID, "cluster centres", error, at_most=1e-12, kind="parity", oracle="scikit-learn KMeans")


def test_an_empty_cluster_keeps_its_centre():
    points = torch.tensor([[[3.0], [3.0], [7.0], [9.0]]])  # two equal points: the second of them attracts none
    centres = vitx.load_module(ID).cluster_centres(points, torch.tensor([0, 1, 2]))
    assert centres.flatten().tolist() == [3.0, 3.0, 8.0]


def test_dropping_is_hiding(proof):
    """A mask on a shorter sequence gives the score of the whole one with the other patches hidden."""
    model, target = variant("registers and layer scale"), torch.tensor([3, 1])
    x = pictures(model)
    ours = vitx.load(ID)(model, x, target, masks=1, ratio=0.5)  # one cluster: its centre is the mean map
    with torch.no_grad():
        visible = ours.flatten(1) > 0
        score = logits_of_visible(model, x, visible).softmax(-1).gather(1, target[:, None])
    assert visible.sum(1).tolist() == [8, 8]
    error = relative_error(ours.flatten(1), visible * score)
    proof(ID, "one mask", error, at_most=1e-12, kind="parity", oracle="the same patches masked in attention")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "no class token, attention pooling"])
def test_a_score_that_no_mask_moves_gives_an_even_map(name, proof):
    """The correction for coverage: where every mask has the same score, so has every patch."""
    model = variant(name)
    nn.init.zeros_(model.head.weight)
    x, target = pictures(model), torch.tensor([3, 0])
    ours = vitx.load(ID)(model, x, target, masks=40)
    score = model.head.bias.softmax(0)[target].detach()
    error = relative_error(ours, score[:, None, None].expand_as(ours))
    proof(ID, f"constant score: constant map ({name})", error, at_most=1e-12, kind="closed form")


def test_the_generator_decides_only_how_clusters_start():
    model = tiny(2, img_size=(16, 24))
    x = pictures(model)
    few, all_channels = (
        [vitx.load(ID)(model, x, masks=masks, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        for masks in (5, 1024)
    )
    assert torch.equal(few[0], vitx.load(ID)(model, x, masks=5))
    assert not torch.allclose(*few)
    assert torch.allclose(*all_channels, rtol=1e-12), "as many clusters as channels leave nothing to chance"


@pytest.mark.parametrize("options", [{"masks": 0}, {"ratio": 1.0}, {"ratio": 0.1}, {"chunk": 0}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="keep some of the 4 patches and leave some out"):
        vitx.load(ID)(model, pictures(model), **options)
