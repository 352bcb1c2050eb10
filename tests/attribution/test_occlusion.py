import pytest
import torch
import vitx
from captum.attr import Occlusion
from helpers import pictures, relative_error, tiny

ID = "occlusion"


@pytest.mark.parametrize(("depth", "window"), [(2, 1), (3, 1), (2, 2)])
def test_captum(depth, window, proof):
    model = tiny(depth, img_size=(24, 32))
    x, target = pictures(model), torch.tensor([4, 2])
    side = 8 * window
    theirs = Occlusion(lambda images: model(images).softmax(-1)).attribute(x, (3, side, side), (3, 8, 8), target=target)
    error = relative_error(vitx.load(ID)(model, x, target, window=window), theirs[:, 0, ::8, ::8].detach())
    oracle = "captum Occlusion (accumulates in float32)"
    proof(ID, f"patches, window {window}, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_one_forward_pass_a_window(proof):
    model = tiny(2, img_size=(24, 32))
    x, target = pictures(model, 1), 3
    total, count = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4)
    with torch.no_grad():
        whole = model(x).softmax(-1)[0, target]
        for i in range(2):
            for j in range(3):
                covered = x.clone()
                covered[:, :, 8 * i : 8 * i + 16, 8 * j : 8 * j + 16] = 0
                total[i : i + 2, j : j + 2] += whole - model(covered).softmax(-1)[0, target]
                count[i : i + 2, j : j + 2] += 1
    error = relative_error(vitx.load(ID)(model, x, torch.tensor([target]), window=2)[0], total / count)
    proof(ID, "patches, window 2", error, at_most=1e-12, kind="parity", oracle="one forward pass a window, in loops")


def test_dropping_tokens_is_a_forward_pass_without_them(proof):
    model = tiny(2, img_size=(24, 32))
    x = pictures(model, 1)
    ours = vitx.load(ID)(model, x, torch.tensor([2]), removal="drop", score="logit")
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))
        theirs = []
        for patch in range(12):
            rest = torch.cat([tokens[:, : 1 + patch], tokens[:, 2 + patch :]], 1)
            theirs.append(model(x)[0, 2] - model.forward_head(model.norm(model.blocks(rest)))[0, 2])
    error = relative_error(ours.flatten(), torch.stack(theirs))
    proof(ID, "dropped tokens", error, at_most=1e-9, kind="parity", oracle="one forward pass a patch, token cut out")


def test_covering_nothing_new_changes_nothing():
    """A patch that already has the grey of the square does not matter."""
    model = tiny(2)
    x = pictures(model)
    x[:, :, :8, :8] = 0
    relevance = vitx.load(ID)(model, x)
    assert relevance[:, 0, 0].abs().max() < 1e-12
    assert relevance[:, 1, 1].abs().min() > 0


@pytest.mark.parametrize(
    "options", [{"window": 3}, {"window": 0}, {"window": 2, "removal": "drop"}, {"removal": "blur"}, {"score": "x"}]
)
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match=r"window|removal"):
        vitx.load(ID)(model, pictures(model), **options)
