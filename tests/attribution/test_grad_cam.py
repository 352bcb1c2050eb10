import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, variant
from pytorch_grad_cam import GradCAM
from vitx.vit import capture

ID = "grad-cam"


@pytest.mark.parametrize(("depth", "prefix", "block"), [(2, 1, -1), (3, 1, -1), (2, 5, -1), (3, 1, 0)])
def test_pytorch_grad_cam(depth, prefix, block, proof):
    model = tiny(depth, reg_tokens=prefix - 1)
    x, target = pictures(model), torch.tensor([4, 2])
    layer = model.blocks[block].norm1
    oracle = GradCAM(model, [layer], reshape_transform=lambda t: t[:, prefix:].unflatten(1, (2, 2)).permute(0, 3, 1, 2))
    scores = oracle.activations_and_grads(x).gather(1, target[:, None])
    scores.sum().backward()
    activations = oracle.activations_and_grads.activations[0].numpy()
    gradients = oracle.activations_and_grads.gradients[0].numpy()
    signed = oracle.get_cam_image(x, layer, [], activations, gradients, False)
    oracle.activations_and_grads.release()
    explain = vitx.load(ID)
    error = max(
        relative_error(explain(model, x, target, layer=block, relu=False), signed),
        np.abs(explain(model, x, target, layer=block).numpy() - np.maximum(signed, 0)).max() / np.abs(signed).max(),
    )
    what = f"map of block {block % depth}, depth {depth}, {prefix} prefix token{'s' * (prefix > 1)}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="grad-cam GradCAM")


def test_the_last_output_would_be_empty():
    """Why norm1 of the last block is read: a class-token head reads no patch token of the last block's output."""
    model = tiny(2)
    x = pictures(model)
    with capture(model, "block_output") as record:
        (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), record["block_output"][-1])
    assert gradient[:, 1:].abs().max() == 0
    assert vitx.load(ID)(model, x, relu=False).abs().min() > 0


def test_no_graph_below_the_layer():
    """The cost of the backward pass is that of the blocks above the layer."""
    model = tiny(3)
    modes = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        vitx.load(ID)(model, pictures(model), layer=1)
    assert modes == [False, True, True]


def test_a_linear_head_on_the_mean_is_explained_exactly(proof):
    """With one block of uniform attention and average pooling Grad-CAM is CAM: it adds up to the logit."""
    model = tiny(1, class_token=False, global_pool="avg")
    with torch.no_grad():
        block = model.blocks[0]
        block.norm1, model.fc_norm = torch.nn.Identity(), torch.nn.Identity()
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        block.attn.qkv.weight[16:] = torch.eye(8)  # no queries, no keys; values are the features themselves
        block.attn.proj.weight.copy_(torch.eye(8))
    x, target = pictures(model), torch.tensor([3, 1])
    total = vitx.load(ID)(model, x, target, relu=False).sum((1, 2))
    # Uniform attention hands every token the mean feature, so the logit's part that came by attention is w . mean.
    tokens = model._pos_embed(model.patch_embed(x))
    theirs = (tokens.mean(1) @ model.head.weight.T).gather(1, target[:, None])[:, 0]
    proof(
        ID,
        "linear model: CAM adds up to the logit",
        relative_error(total, theirs.detach()),
        at_most=1e-9,
        kind="closed form",
    )


def test_layer_out_of_range():
    model = variant("qk-norm")
    with pytest.raises(ValueError, match="has 4 blocks"):
        vitx.load(ID)(model, pictures(model), layer=4)
