"""Generic attention for a DETR: its rules in loops, the loss of the detector against libraries, and ground truth."""

import itertools
import json
import math
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
from skimage.filters import threshold_otsu
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from torchvision import ops
from vitx import catalog, glyphs, load_module, metrics, models
from vitx.vit import UnsupportedModel

ID = "generic-attention-detr"
snippet = load_module(ID)
script = training_script("detector_glyph")
ENCODER: dict[str, Any] = {
    "img_size": [16, 24], "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2,
}  # fmt: skip
DECODER: dict[str, Any] = {"classes": 5, "queries": 3, "layers": 2, "heads": 2}


def rough_detector(seed: int = 0) -> Any:
    """2 x 3 patches, three queries, five classes, two layers of two heads on either side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return roughen(snippet.Detector(VisionTransformer(**ENCODER, num_classes=0), **DECODER), seed)


@pytest.fixture(scope="module")
def model():
    return rough_detector()


@pytest.fixture(scope="module")
def x(model):
    return pictures(model.encoder, 3)


# --- the detector and the rules in plain loops -----------------------------------------------------------------------


def norm(w: dict, name: str, z: np.ndarray) -> np.ndarray:
    centred = z - z.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: dict, name: str, z: np.ndarray) -> np.ndarray:
    return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(w: dict, name: str, query: np.ndarray, key: np.ndarray, value: np.ndarray, change: tuple | None):
    """(Q, D) and the attention (2, Q, N); ``change`` = (head, query, key, amount)."""
    q, k, v = (linear(w, f"{name}.{part}", z) for part, z in (("query", query), ("key", key), ("value", value)))
    attention, mixed = np.zeros((2, len(q), len(k))), np.zeros_like(q)
    for head, i in itertools.product(range(2), range(len(q))):
        own = slice(4 * head, 4 * head + 4)
        powers = [math.exp(float(q[i, own] @ k[j, own]) / 2) for j in range(len(k))]
        attention[head, i] = np.array(powers) / sum(powers)
        if change is not None and change[:2] == (head, i):
            attention[head, i, change[2]] += change[3]
        for j in range(len(k)):
            mixed[i, own] += attention[head, i, j] * v[j, own]
    return linear(w, f"{name}.out", mixed), attention


def twin(model: Any, image: torch.Tensor, change: tuple | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (Q, 6), and attention in encoder, among queries, to patches; ``change`` = (which, head, row, key, by)."""

    def of(which: int) -> tuple | None:
        return change[1:] if change is not None and change[0] == which else None

    w, encoder = weights(model), model.encoder
    attention: list[Any] = [None] * 6
    tokens = twin_tokens(encoder, image)
    for index in range(2):
        record = twin_block(encoder, index, tokens, of(index))
        tokens, attention[index] = record["output"], record["attention"]
    tokens = layer_norm(tokens, w["encoder.norm.weight"], w["encoder.norm.bias"])
    memory = tokens[1:] + model.memory.places.numpy()
    queries = w["queries"]
    z = np.zeros_like(queries)
    for index in range(2):
        name = f"layers.{index}"
        told, attention[2 + index] = attend(w, f"{name}.among", z + queries, z + queries, z, of(2 + index))
        z = norm(w, f"{name}.norm1", z + told)
        found, attention[4 + index] = attend(w, f"{name}.search", z + queries, memory, memory, of(4 + index))
        z = norm(w, f"{name}.norm2", z + found)
        hidden = np.maximum(linear(w, f"{name}.mlp.0", z), 0)
        z = norm(w, f"{name}.norm3", z + linear(w, f"{name}.mlp.2", hidden))
    return linear(w, "classify", norm(w, "norm", z)), attention


def rules_in_loops(gathered: list[np.ndarray]) -> np.ndarray:
    """R^qi (3, 7), entry by entry."""

    def plus_product(R: np.ndarray, A: np.ndarray, other: np.ndarray) -> np.ndarray:
        new = R.copy()
        for i, j, k in itertools.product(range(len(A)), range(other.shape[1]), range(A.shape[1])):
            new[i, j] += A[i, k] * other[k, j]
        return new

    def bar(R: np.ndarray) -> np.ndarray:
        new = np.eye(len(R))
        for i in range(len(R)):
            row = [R[i, k] - (i == k) for k in range(len(R))]
            for k in range(len(R)):
                new[i, k] += row[k] / sum(row) if sum(row) > 0 else 0
        return new

    R_ii, R_qq, R_qi = np.eye(7), np.eye(3), np.zeros((3, 7))
    for A in gathered[:2]:
        R_ii = plus_product(R_ii, A, R_ii)
    for A_qq, A_qi in zip(gathered[2:4], gathered[4:], strict=True):
        R_qi, R_qq = plus_product(R_qi, A_qq, R_qi), plus_product(R_qq, A_qq, R_qq)
        left, right, new = bar(R_qq), bar(R_ii), R_qi.copy()
        for q, i, s, p in itertools.product(range(3), range(7), range(3), range(6)):
            new[q, i] += left[s, q] * A_qi[s, p] * right[1 + p, i]  # the class token stands before the patches
        R_qi = new
    return R_qi


def test_equals_the_rules_in_plain_loops(model, x, proof):
    """Gradients by central differences, rules entry by entry."""
    found = snippet.explain(model, x[:1], torch.tensor([3]))
    query = int(found.query)
    logits, attention = twin(model, x[0])
    theirs = model.read(model.decode(model.memory(model.encoder.forward_features(x[:1]))).states[-1])[0]
    assert relative_error(theirs[0].detach(), logits) < 1e-9
    gathered = []
    for which, A in enumerate(attention):
        gradient = np.zeros_like(A)
        for place in np.ndindex(A.shape):
            up, down = (twin(model, x[0], (which, *place, step))[0][query, 3] for step in (1e-5, -1e-5))
            gradient[place] = (up - down) / 2e-5
        gathered.append(np.maximum(gradient * A, 0).mean(0))
    expected = rules_in_loops(gathered)[query, 1:].reshape(2, 3)
    oracle = "detector and rules in plain loops, gradients by finite differences"
    proof(ID, "map", relative_error(found.relevance[0], expected), at_most=1e-6, kind="parity", oracle=oracle)


def test_without_self_attention_the_layers_add_up(proof):
    """With nothing gathered in encoder and among queries, both normalised maps are the identity."""
    generator = torch.Generator().manual_seed(0)
    search = [torch.rand(2, 3, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    none = [torch.zeros(2, 7, 7).double()] * 2, [torch.zeros(2, 3, 3).double()] * 2
    found = snippet.relevance(*none, search)
    what = "without self-attention: the sum of the layers' cross-attention"
    proof(ID, what, relative_error(found[:, :, 1:], search[0] + search[1]), at_most=1e-12, kind="closed form")
    assert (found[:, :, 0] == 0).all()


def test_normalised_rows_weigh_two():
    R = torch.eye(4).double() + torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(snippet.normalised(R).sum(-1), torch.full((2, 4), 2.0).double())
    torch.testing.assert_close(snippet.normalised(5 * (R - torch.eye(4)) + torch.eye(4)), snippet.normalised(R))
    assert torch.equal(snippet.normalised(torch.eye(4)[None]), torch.eye(4)[None])


def test_which_object_is_asked_for(model, x):
    probabilities = model.detect(x).probabilities
    sure = probabilities[..., :-1].flatten(1).argmax(1)
    found = snippet.explain(model, x)
    assert torch.equal(found.query, sure // 5)
    assert torch.equal(found.label, sure % 5)
    assert torch.equal(found.label, model(x).argmax(1))
    torch.testing.assert_close(found.score.log(), model(x).amax(1))
    asked = snippet.explain(model, x, torch.tensor([4, 0, 2]))
    assert torch.equal(asked.query, torch.stack([probabilities[i, :, c].argmax() for i, c in enumerate((4, 0, 2))]))
    by_number = snippet.explain(model, x, torch.tensor([4, 0, 2]), query=asked.query)
    assert all(torch.equal(a, b) for a, b in zip(by_number, asked, strict=True))
    named = snippet.explain(model, x, query=torch.tensor([2, 1, 0]))
    assert torch.equal(named.label, probabilities[range(3), [2, 1, 0], :-1].argmax(-1))
    torch.testing.assert_close(named.box, model.detect(x).boxes[range(3), [2, 1, 0]])
    others = snippet.explain(model, x, query=torch.tensor([0, 2, 1]))
    assert not torch.allclose(others.relevance, named.relevance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.tensor([0, 5, 1])}, "class 5 is out of range: the model has classes 0 to 4"),
        ({"target": torch.tensor([0])}, "one class index for each of the 3 pictures"),
        ({"query": torch.tensor([0, 3, 1])}, "the detector has queries 0 to 2"),
        ({"query": torch.tensor([0])}, "query must hold one index for each of the 3 pictures"),
    ],
)
def test_bad_targets(model, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, x, **arguments)


def test_what_is_refused(model, x):
    with pytest.raises(UnsupportedModel, match="VisionTransformer is no detector"):
        snippet.explain(tiny(1), pictures(tiny(1)))
    with pytest.raises(ValueError, match="reads pictures of 16 x 24 pixels"):
        snippet.explain(model, x[..., :16])
    spoilt = rough_detector()
    with torch.no_grad():
        spoilt.layers[1].search.key.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.search\.key\.bias of the model holds NaN"):
        snippet.explain(spoilt, x)


def test_frozen_weights(model, x):
    expected, frozen = snippet.explain(model, x), rough_detector().requires_grad_(False)
    with torch.no_grad():
        found = snippet.explain(frozen, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(parameter.grad is None for parameter in frozen.parameters())
    with torch.inference_mode():
        target = frozen(x).argmax(-1)
    assert torch.equal(snippet.explain(frozen, x, target).relevance, expected.relevance)


def test_a_file_gives_back_its_model(model, x, tmp_path):
    about = {"encoder": json.dumps(ENCODER), "decoder": json.dumps(DECODER)}
    state = {key: value.float().contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors", about)
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    assert not again.training
    torch.testing.assert_close(again(x.float()).double(), model(x), rtol=1e-4, atol=1e-4)


def test_masks_by_otsu(proof):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(40, 14, 14, generator=generator) ** torch.linspace(0.3, 9, 40)[:, None, None]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    levels = (255 * ((maps - low) / (high - low))).numpy().astype(np.uint8)
    theirs = np.stack([one > threshold_otsu(one) for one in levels])
    wrong = (snippet.segment(maps, (14, 14)).numpy() != theirs).mean()
    proof(ID, "patches inside Otsu's mask", wrong, at_most=0, kind="parity", oracle="skimage.filters.threshold_otsu")
    large = snippet.segment(maps, (28, 28))
    assert torch.equal(large[:, ::2, ::2], snippet.segment(maps, (14, 14)))


# --- the loss and the measurements -----------------------------------------------------------------------------------


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Middles and sides, inside the picture."""
    generator = torch.Generator().manual_seed(seed)
    middle = 0.3 + 0.4 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([middle, 0.1 + 0.5 * torch.rand(*shape, 2, generator=generator)], -1)


def random_case(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits (4, 3, 13), boxes (4, 3, 4), labels (4, 2) and true boxes (4, 2, 4); two scenes of one creature."""
    logits = torch.randn(4, 3, 13, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([[3, 7], [0, -1], [11, 2], [5, -1]])
    return logits, random_boxes(4, 3, seed=seed), labels, random_boxes(4, 2, seed=seed + 1)


def test_overlap_of_boxes(proof):
    one, other = (script.corners(random_boxes(50, seed=seed)).double() for seed in (0, 1))
    iou, giou = script.overlap(one[:, None], other[None])
    error = max(relative_error(iou, ops.box_iou(one, other)), relative_error(giou, ops.generalized_box_iou(one, other)))
    what = "intersection over union, plain and generalised"
    proof(ID, what, error, at_most=1e-6, kind="parity", oracle="torchvision.ops")
    full = snippet.Detector(VisionTransformer(**script.BACKBONE, num_classes=0), **script.DECODER)
    torch.testing.assert_close(script.middles(full.pixels(one.float())), one.float())


def test_cost_and_matching_in_loops(proof):
    """The cost entry by entry; of all ways to give the creatures queries, the cheapest."""
    errors, wrong = [], 0
    for seed in range(10):
        logits, boxes, labels, true = random_case(seed)
        cost = script.costs(logits, boxes, labels, true)
        queries = script.matched(cost, labels)
        for b in range(4):
            creatures = int((labels[b] >= 0).sum())
            for q, c in itertools.product(range(3), range(creatures)):
                probability = math.exp(float(logits[b, q, labels[b, c]])) / float(logits[b, q].exp().sum())
                far = sum(abs(float(boxes[b, q, i] - true[b, c, i])) for i in range(4))
                ours, theirs = (script.corners(box[None]) for box in (boxes[b, q], true[b, c]))
                expected = 5 * far - probability - 2 * float(ops.generalized_box_iou(ours, theirs))
                errors.append(abs(float(cost[b, q, c]) - expected))
            ways = itertools.permutations(range(3), creatures)
            best = min(ways, key=lambda way, b=b, cost=cost: sum(float(cost[b, q, c]) for c, q in enumerate(way)))
            wrong += tuple(queries[b, :creatures].tolist()) != best
    proof(ID, "matching cost", max(errors), at_most=1e-5, kind="parity", oracle="DETR's cost in plain loops")
    proof(ID, "creatures matched otherwise", wrong, at_most=0, kind="parity", oracle="all matchings tried")


def test_the_loss_of_one_layer(proof):
    errors = []
    for seed in range(5):
        logits, boxes, labels, true = random_case(seed)
        queries = script.matched(script.costs(logits, boxes, labels, true), labels)
        wanted = torch.full((4, 3), script.CLASSES)
        far, apart = [], []
        for b, c in (labels >= 0).nonzero().tolist():
            wanted[b, queries[b, c]] = labels[b, c]
            mine = boxes[b, queries[b, c]]
            far.append((mine - true[b, c]).abs().sum())
            apart.append(ops.generalized_box_iou_loss(script.corners(mine), script.corners(true[b, c])))
        weight = torch.tensor([1.0] * script.CLASSES + [script.NOTHING])
        expected = cross_entropy(logits.transpose(1, 2), wanted, weight)
        expected = expected + 5 * torch.stack(far).mean() + 2 * torch.stack(apart).mean()
        errors.append(abs(float(script.detection_loss(logits, boxes, labels, true) / expected) - 1))
    oracle = "torch cross_entropy, torchvision generalized_box_iou_loss, object by object"
    proof(ID, "loss of one decoder layer", max(errors), at_most=1e-5, kind="parity", oracle=oracle)


def test_average_precision_in_loops(proof):
    """Detections in falling order of score, one by one; precision is the best at that recall or beyond."""
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(20):
        classes, scores = torch.randint(3, (30,), generator=generator), torch.rand(30, generator=generator)
        hits = torch.rand(30, generator=generator) < 0.5
        truths = torch.tensor([int((hits & (classes == c)).sum()) + 2 for c in range(3)])
        areas = []
        for c in range(3):
            order = sorted((i for i in range(30) if classes[i] == c), key=lambda i: -float(scores[i]))
            right, curve = 0, []
            for rank, i in enumerate(order, 1):
                right += bool(hits[i])
                curve.append((right / int(truths[c]), right / rank))
            area, before = 0.0, 0.0
            for place, (recall, _) in enumerate(curve):
                area += (recall - before) * max(precision for _, precision in curve[place:])
                before = recall
            areas.append(area)
        errors.append(abs(script.average_precision(classes, scores, hits, truths) - sum(areas) / 3))
    proof(ID, "average precision", max(errors), at_most=1e-12, kind="parity", oracle="its definition in plain loops")
    all_right = torch.ones(4, dtype=torch.bool)
    assert script.average_precision(torch.arange(4) % 2, torch.rand(4), all_right, torch.tensor([2, 2])) == 1


def test_one_detection_finds_a_creature():
    """Of two right boxes the surer one counts; a wrong class, or too little overlap, does not."""
    true = torch.tensor([[[10.0, 10, 50, 50], [60, 60, 100, 100]]])
    near, far = [12.0, 12, 50, 50], [30.0, 30, 70, 70]
    boxes = torch.tensor([[near, near, far, [60.0, 60, 100, 95], near]])
    classes, scores = torch.tensor([[4, 4, 4, 6, 6]]), torch.tensor([[0.5, 0.7, 0.9, 0.2, 0.9]])
    hits = script.successes(classes, scores, boxes, torch.tensor([[4, 6]]), true)
    assert hits.tolist() == [[False, True, False, True, False]]
    assert not script.successes(classes, scores, boxes, torch.tensor([[-1, -1]]), true).any()


def test_hidden_patches():
    seen = script.visible(200, 0)
    assert seen.shape == (200, 1, 112, 112)
    assert torch.equal(seen[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3), seen)
    hidden = 1 - seen.mean((1, 2, 3))
    assert abs(hidden.mean() - 0.3) < 0.03
    assert hidden.max() < 0.75


# --- the model that ships ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return models.load("detector-glyph").model


def favoured(model: Any, scenes: glyphs.Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """For both creatures of each scene: does its map have more mass on it than on the other; its pointing game."""
    images, share = glyphs.normalise(scenes.images), glyphs.patch_fraction(scenes.object_masks, (14, 14))
    own, hits = [], []
    for which in (0, 1):
        maps = snippet.explain(model, images, scenes.labels[:, which]).relevance
        mass = (maps[:, None] * share).sum((2, 3))
        own.append(mass[:, which] > mass[:, 1 - which])
        hits.append(metrics.pointing_game(maps, share[:, which]))
    return torch.cat(own).float(), torch.cat(hits)


def test_the_card_holds_on_unseen_scenes(shipped, proof, monkeypatch):
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured, card = script.measure(shipped, 100), catalog.load().models["detector-glyph"]
    assert measured.keys() == card.metrics.keys()
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.06, name
    for creatures in (1, 2):
        what = f"the detector's average precision at half overlap, {creatures} in a scene"
        value = measured[f"ap50_{creatures}"]
        proof(ID, what, value, at_least=0.8, kind="ground truth", oracle="100 glyph scenes")
        what = f"Otsu's mask of the map, {creatures} in a scene: IoU above that with another scene's creature"
        gain = measured[f"map_iou_{creatures}"] - measured[f"map_chance_{creatures}"]
        proof(ID, what, gain, at_least=0.15, kind="ground truth", oracle="100 glyph scenes")


def test_the_map_is_that_of_the_object_asked_for(shipped, proof):
    own, hits = favoured(shipped, glyphs.scenes(40, 31, creatures=2))
    oracle = "40 glyph scenes of two creatures"
    what = "maps with more mass on the object asked for than on the other"
    proof(ID, what, own.mean(), at_least=0.85, kind="ground truth", oracle=oracle)
    proof(ID, "pointing game, object asked for", hits.mean(), at_least=0.75, kind="ground truth", oracle=oracle)


def test_a_decoder_without_training_does_not_know_the_object(shipped, proof):
    """The same encoder under random queries: what is left is what the encoder alone outlines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = snippet.Detector(shipped.encoder, **script.DECODER).eval()
    own, _ = favoured(other, glyphs.scenes(40, 31, creatures=2))
    what = "the same with an untrained decoder, away from one half"
    proof(ID, what, (own.mean() - 0.5).abs(), at_most=0.2, kind="sanity", oracle="40 glyph scenes of two creatures")
