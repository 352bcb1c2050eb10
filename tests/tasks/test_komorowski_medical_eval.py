"""The study's maps and measures against loops and closed forms; the model lesion against its card and true masks."""

import copy

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, read_back, relative_error, tiny, training_script, twin_forward
from scipy.stats import pearsonr
from torch import nn
from vitx import catalog, glyphs, lesions, load_module, models

ID = "komorowski-medical-eval"
snippet = load_module(ID)


def test_relevance_is_transformer_attribution(proof):
    model = tiny(3, img_size=(16, 24))
    x, target = pictures(model, 3), torch.tensor([4, 0, 2])
    error = relative_error(snippet.explain(model, x, target), vitx.load("transformer-attribution")(model, x, target))
    what = "relevance of three pictures"
    oracle = "transformer-attribution, which is held against plain loops"
    proof(ID, what, error, at_most=1e-12, kind="parity", oracle=oracle)


@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0.0), ("min", 0.0), ("max", 0.7)])
def test_rollout_in_plain_loops(fusion, discard, proof):
    model = tiny(3, img_size=(16, 24))
    x, errors = pictures(model), []
    for image, ours in zip(x, snippet.rollout(model, x, fusion, discard), strict=True):
        total = np.eye(7)
        for record in twin_forward(model, image)[0]:
            joined = getattr(np, fusion)(record["attention"], 0)
            order = sorted(np.ndindex(7, 7), key=lambda place, joined=joined: joined[place])
            for place in order[: int(discard * 49)]:
                if place != (0, 0):
                    joined[place] = 0
            for i in range(7):
                joined[i, i] += 1
                joined[i] /= joined[i].sum()
            total = joined @ total
        errors.append(relative_error(ours, total[0, 1:].reshape(2, 3)))
    what = f"rollout by {fusion} over heads, {discard:.0%} dropped"
    proof(ID, what, max(errors), at_most=1e-10, kind="parity", oracle="rollout in plain loops")


def test_plain_rollout_is_attention_rollout(proof):
    model = tiny(3)
    x = pictures(model)
    error = relative_error(snippet.rollout(model, x), vitx.load("attention-rollout")(model, x))
    proof(ID, "rollout by the mean", error, at_most=1e-12, kind="parity", oracle="attention-rollout")


def test_lime_marks_the_squares_of_a_least_squares_fit(proof):
    """The two squares of the largest positive coefficients, from an augmented system that numpy solves."""
    model = tiny(2, img_size=(32, 48))  # 4 x 6 patches, 2 x 3 squares
    x, target, samples = pictures(model), torch.tensor([1, 3]), 60
    marks = snippet.lime(model, x, target, samples=samples, generator=torch.Generator().manual_seed(4))
    z = (torch.rand(samples, 6, generator=torch.Generator().manual_seed(4)) < 0.5).numpy().astype(float)
    z[0] = 1
    errors = []
    for image, label, mark in zip(x, target, marks, strict=True):
        answers, proximity = np.zeros(samples), np.zeros(samples)
        for s in range(samples):
            seen = image.clone()
            for square in range(6):
                top, left = 16 * (square // 3), 16 * (square % 3)
                if not z[s, square]:
                    seen[:, top : top + 16, left : left + 16] = 0
            answers[s] = model(seen[None]).softmax(-1)[0, label].item()
            cosine = z[s].sum() / np.sqrt(6 * z[s].sum()) if z[s].any() else 0.0
            proximity[s] = np.exp(-((1 - cosine) ** 2) / (2 * 0.25**2))
        rows = np.concatenate([z, np.ones((samples, 1))], 1) * np.sqrt(proximity)[:, None]
        penalty = np.concatenate([np.eye(6), np.zeros((6, 1))], 1)  # none on the intercept
        system = np.concatenate([rows, penalty]), np.concatenate([answers * np.sqrt(proximity), np.zeros(6)])
        coefficients = np.linalg.lstsq(*system, rcond=None)[0][:6]
        ours = snippet.linear_model(torch.from_numpy(z), torch.from_numpy(answers)[None])[0]
        errors.append(relative_error(ours, coefficients))
        best = [s for s in np.argsort(-coefficients)[:2] if coefficients[s] > 0]
        expected = np.zeros((4, 6))
        for square in best:
            expected[2 * (square // 3) : 2 * (square // 3) + 2, 2 * (square % 3) : 2 * (square % 3) + 2] = 1
        assert np.array_equal(mark.numpy(), expected)
    what = "LIME's coefficients for squares of patches"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="numpy.linalg.lstsq on pictures hidden in loops")


# --- the measures --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The logit of class c is the sum of the picture times the weights of c."""

    def __init__(self):
        super().__init__()
        self.weights = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def forward(self, x):
        return torch.einsum("bijk,cijk->bc", x, self.weights)


def test_faithfulness_of_a_linear_model_is_one(proof):
    """A pixel that turns black takes away its weight times its distance from black; scale and offset do not matter."""
    model, target = Linear(), torch.tensor([1, 0])
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    black = x.amin((1, 2, 3), keepdim=True)
    lost = ((x - black) * model.weights[target]).sum(1)  # (2, 8, 10)
    sets, falls = snippet.blackened(model, x, target)
    score = snippet.faithfulness(3 * lost + 7, sets, falls)
    proof(ID, "faithfulness of the true losses", score.min(), at_least=1 - 1e-12, kind="closed form")
    assert torch.allclose(snippet.faithfulness(-lost, sets, falls), -torch.ones(2).double())
    assert (snippet.faithfulness(torch.ones_like(lost), sets, falls) == 0).all()


def test_faithfulness_in_plain_loops(proof):
    model = tiny(2)
    x, target = pictures(model), torch.tensor([2, 4])
    maps = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sets, falls = snippet.blackened(model, x, target, 12, torch.Generator().manual_seed(6))
    ours = snippet.faithfulness(maps, sets, falls)
    chosen = torch.rand(12, 256, generator=torch.Generator().manual_seed(6)).argsort(1)[:, :16]
    expected = []
    for image, label, relevance in zip(x, target, maps, strict=True):
        sums, lost = [], []
        for places in chosen.tolist():
            seen, total = image.clone(), 0.0
            for place in places:
                seen[:, place // 16, place % 16] = image.min()
                total += float(relevance[place // 16, place % 16])
            sums.append(total)
            lost.append((model(image[None]) - model(seen[None]))[0, label].item())
        expected.append(pearsonr(sums, lost)[0])
    error = relative_error(ours, expected)
    proof(ID, "faithfulness", error, at_most=1e-9, kind="parity", oracle="plain loops, scipy.stats.pearsonr")


def test_sensitivity(proof):
    """A map that is the picture itself, already spread over [0, 1], moves by the noise alone."""
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    x[:, :, 4:] = 10.0

    def clipped(images):  # far from the noise everywhere, so the scaled map stays
        return (images[:, 0] > 5).double()

    before = x[:, 0] / 10
    assert snippet.sensitivity(clipped, x, before) == 0
    assert snippet.sensitivity(lambda images: images[:, 0], x, before, radius=0.0) == 0
    ours = snippet.sensitivity(lambda images: images[:, 0], x, before, generator=torch.Generator().manual_seed(1))
    generator, moved = torch.Generator().manual_seed(1), []
    for _ in range(3):
        noisy = (x[0] + 0.33 * (2 * torch.rand(3, 8, 8, generator=generator, dtype=torch.float64) - 1))[0].numpy()
        scaled = (noisy - noisy.min()) / (noisy.max() - noisy.min())
        moved.append(np.linalg.norm(scaled - x[0, 0].numpy() / 10) / np.linalg.norm(x.numpy()))
    error = relative_error(ours, [np.mean(moved)])
    proof(ID, "sensitivity of a map that is the picture", error, at_most=1e-12, kind="closed form", oracle="numpy")


def test_complexity_counts_pixels():
    pixels = torch.tensor([[[0.0, 0.05, 0.1, 0.11], [0.5, 1.0, 0.0, 0.2]]])
    assert snippet.complexity(pixels).item() == 0.5  # 0.1 itself does not exceed the threshold


def test_the_scaled_map():
    images, maps = torch.zeros(2, 3, 16, 16), torch.tensor([[[1.0, 3.0], [1.0, 2.0]], [[4.0, 4.0], [4.0, 4.0]]])
    pixels = snippet.pixel_map(maps, images)
    assert pixels[0].min() == 0
    assert pixels[0].max() == 1
    assert (pixels[1] == 0).all()


def test_evaluate_is_the_three_measures_and_a_batch_is_its_pictures():
    model = tiny(2)
    x, target = pictures(model), torch.tensor([2, 4])

    def of(rows):
        explainers = {"relevance": lambda some: snippet.explain(model, some, target[rows])}
        return snippet.evaluate(model, x[rows], target[rows], explainers)["relevance"]

    whole, parts = of([0, 1]), [of([0]), of([1])]
    for name, values in whole._asdict().items():
        alone = torch.cat([getattr(part, name) for part in parts])
        assert torch.allclose(values, alone, atol=1e-9), name


def test_what_is_refused():
    model = tiny(1)
    with pytest.raises(ValueError, match="fusion is mean, min or max"):
        snippet.rollout(model, pictures(model), "median")
    with pytest.raises(ValueError, match="discard in"):
        snippet.rollout(model, pictures(model), discard=1.0)


def test_a_file_gives_back_its_model(tmp_path):
    backbone = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    model = tiny(2).float()
    again = read_back(snippet, model, {"backbone": backbone, "class_names": list("abcde")}, tmp_path)
    assert again.class_names == tuple("abcde")
    x = pictures(model)
    assert torch.equal(again(x), model(x))


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_pictures(proof):
    card, model = catalog.load().models["lesion"], models.load("lesion").model
    measured = training_script("lesion").measure(model, 400, 800_000)  # a seed of neither the training nor the card
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.06, name
    oracle = "400 invented pictures"
    proof(ID, "accuracy of the model lesion", measured["top1"], at_least=0.9, kind="ground truth", oracle=oracle)
    what = "lesion taken away: the model says healthy"
    proof(ID, what, measured["healthy_once_removed"], at_least=0.85, kind="ground truth", oracle=oracle)


def test_maps_lie_on_the_lesions(proof):
    labels = 1 + torch.arange(60) % 3
    scenes, model = lesions.scenes(60, 31, labels=labels), models.load("lesion").model
    x = glyphs.normalise(scenes.images)
    maps = snippet.explain(model, x, labels)
    grades, chance = lesions.grade(maps, scenes.masks), lesions.grade(maps.roll(1, 0), scenes.masks)
    oracle = "60 invented pictures"
    value = grades.pointing.mean()
    proof(ID, "the most relevant patch touches a lesion", value, at_least=0.5, kind="ground truth", oracle=oracle)
    for name in ("mass", "iou"):
        gain = getattr(grades, name).mean() / getattr(chance, name).mean()
        what = f"{name} on lesions, over that of another picture's map"
        proof(ID, what, gain, at_least=2, kind="ground truth", oracle=oracle)


def test_the_measures_tell_a_trained_model_from_a_map_of_nothing(proof):
    """Relevance is more faithful than the relevance of other pictures."""
    labels = 1 + torch.arange(12) % 3
    scenes, model = lesions.scenes(12, 47, labels=labels), models.load("lesion").model
    x = glyphs.normalise(scenes.images)
    maps = snippet.pixel_map(snippet.explain(model, x, labels), x)
    sets, falls = snippet.blackened(model, x, labels)
    own, other = (snippet.faithfulness(some, sets, falls) for some in (maps, maps.roll(1, 0)))
    what = "faithfulness, less that of another picture's map"
    proof(ID, what, (own - other).mean(), at_least=0.05, kind="ground truth", oracle="12 invented pictures")


def test_the_model_is_left_as_it_was():
    model = tiny(2)
    before = copy.deepcopy(model.state_dict())
    x = pictures(model)
    target = torch.tensor([0, 1])
    snippet.evaluate(model, x, target, {"LIME": lambda some: snippet.lime(model, some, target, samples=10)})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
