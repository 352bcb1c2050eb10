import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction
from torch import nn

ID = "eigen-cam"


def features(model, x, layer=-1):
    kept = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0][:, model.num_prefix_tokens :]


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("depth", "layer"), [(2, -1), (3, -1), (3, 1)])
def test_singular_vectors_of_the_loop_twin(depth, layer, centre, proof):
    model = tiny(depth, img_size=(24, 32))
    x = pictures(model)
    maps = []
    for image in x:
        matrix = twin_forward(model, image)[0][layer]["normed"][1:]  # (P, D)
        matrix = matrix - matrix.mean(0) * centre
        right = np.linalg.svd(matrix)[2][0]
        projection = np.array([row @ right for row in matrix])
        maps.append((projection * np.sign(projection[np.abs(projection).argmax()])).reshape(3, 4))
    error = relative_error(vitx.load(ID)(model, x, layer=layer, centre=centre), maps)
    what = f"map of block {layer % depth}, depth {depth}, {'centred' if centre else 'as published'}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="loops and numpy.linalg.svd")


def test_pytorch_grad_cam(proof):
    """That library centres, and returns single precision."""
    model = tiny(2, img_size=(24, 32))
    x = pictures(model)
    folded = features(model, x).unflatten(1, (3, 4)).permute(0, 3, 1, 2).numpy()
    theirs = get_2d_projection_with_sign_correction(folded)
    error = relative_error(vitx.load(ID)(model, x, centre=True), theirs)
    proof(ID, "map, depth 2, centred", error, at_most=1e-6, kind="parity", oracle="grad-cam, projection of EigenCAM")


def test_no_other_direction_carries_more(proof):
    model = tiny(2, img_size=(24, 32))
    x = pictures(model)
    matrix = features(model, x)  # (B, P, D)
    ours = vitx.load(ID)(model, x).flatten(1)
    directions = torch.randn(8, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy = (matrix @ (directions / directions.norm(dim=0))).square().sum(1).amax(1)
    proof(
        ID,
        "energy of 2000 random directions over that of the map",
        (energy / ours.square().sum(1)).max(),
        at_most=1,
        kind="closed form",
    )
    # The map spans the best approximation of rank one (Eckart, Young): what is left is orthogonal to it.
    unit = ours / ours.norm(dim=1, keepdim=True)
    rest = matrix - unit[..., None] * (unit[:, None] @ matrix)
    largest = torch.linalg.matrix_norm(rest, 2) / torch.linalg.matrix_norm(matrix, 2)
    second = torch.linalg.svdvals(matrix)[:, 1] / torch.linalg.svdvals(matrix)[:, 0]
    proof(
        ID,
        "rest of the rank-one approximation is the second singular value",
        relative_error(largest, second),
        at_most=1e-9,
        kind="closed form",
    )


def test_behind_a_relu_the_map_is_not_negative(proof):
    """The paper's case (Perron): a matrix without negative entries has a first singular vector without any."""
    model = tiny(2, img_size=(24, 32))
    model.blocks[1].norm1 = nn.Sequential(model.blocks[1].norm1, nn.ReLU())
    cam = vitx.load(ID)(model, pictures(model))
    proof(ID, "behind a ReLU: smallest value", cam.min(), at_least=-1e-12, kind="closed form")


def test_the_logits_do_not_matter():
    """No score enters: another head, the same map."""
    model = tiny(2)
    x = pictures(model)
    before = vitx.load(ID)(model, x)
    with torch.no_grad():
        model.head.weight.neg_()
        model.blocks[1].attn.qkv.weight.neg_()  # behind the layer that is read
    assert torch.equal(vitx.load(ID)(model, x), before)


def test_layer_out_of_range():
    model = tiny(2)
    with pytest.raises(ValueError, match="has 2 blocks"):
        vitx.load(ID)(model, pictures(model), layer=-3)
