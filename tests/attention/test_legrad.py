"""LeGrad against torchcam on torchvision's Vision Transformer with the same weights, and against loops."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_forward, weights
from torchcam.methods import LeGrad
from torchvision.models.vision_transformer import VisionTransformer
from vitx.vit import capture, embed

ID = "legrad"


def torchvision_twin(model) -> VisionTransformer:
    """torchvision's model with the weights of a tiny timm one."""
    twin = VisionTransformer(16, 8, len(model.blocks), 2, 8, 16, num_classes=5).double().eval()
    w = model.state_dict()
    state = {
        "class_token": w["cls_token"],
        "encoder.pos_embedding": w["pos_embed"],
        "conv_proj.weight": w["patch_embed.proj.weight"],
        "conv_proj.bias": w["patch_embed.proj.bias"],
    }
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0"}
    for kind in ("weight", "bias"):
        state |= {f"encoder.ln.{kind}": w[f"norm.{kind}"], f"heads.head.{kind}": w[f"head.{kind}"]}
        for index in range(len(model.blocks)):
            ours, theirs = f"blocks.{index}", f"encoder.layers.encoder_layer_{index}"
            for a, b in (names | {"mlp.fc2": "mlp.3"}).items():
                state[f"{theirs}.{b}.{kind}"] = w[f"{ours}.{a}.{kind}"]
            state[f"{theirs}.self_attention.in_proj_{kind}"] = w[f"{ours}.attn.qkv.{kind}"]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize(("depth", "first"), [(2, 0), (3, 0), (3, -2)])
def test_torchcam_agrees(depth, first, proof):
    model = tiny(depth, seed=6)
    x, target = pictures(model), [3, 1]
    peer = torchvision_twin(model)
    assert relative_error(model(x).detach(), peer(x).detach()) < 1e-12
    names: list[torch.nn.Module | str] = [f"encoder.layers.encoder_layer_{k}" for k in range(depth)]
    with LeGrad(peer, names[first:]) as extractor:
        (theirs,) = extractor(target, peer(x), normalized=False)
    ours = vitx.load(ID)(model, x, torch.tensor(target), first=first)
    oracle = "torchcam 0.5 on torchvision's ViT with equal weights"
    error = relative_error(ours, theirs)
    proof(ID, f"depth {depth}, from block {first}", error, at_most=1e-9, kind="parity", oracle=oracle)


def score(model, layer: int, tokens: np.ndarray, target: int, change: tuple | None, class_token: bool) -> float:
    w = weights(model)
    z = twin_block(model, layer, tokens, change)["output"]
    z = layer_norm(z[0] if class_token else z.mean(0), w["norm.weight"], w["norm.bias"])
    return z @ w["head.weight"][target] + w["head.bias"][target]


@pytest.mark.parametrize("class_token", [False, True])
def test_the_papers_sum_in_loops(class_token, proof):
    model, step = tiny(2, seed=6), 1e-5
    x, target = pictures(model), [0, 2]
    theirs = []
    for image, label in zip(x, target, strict=True):
        total = np.zeros(5)
        for layer, record in enumerate(twin_forward(model, image)[0]):
            for place in np.ndindex(2, 5, 5):
                up, down = (
                    score(model, layer, record["input"], label, (*place, sign * step), class_token) for sign in (1, -1)
                )
                total[place[2]] += max((up - down) / (2 * step), 0) / (2 * 5) / 2
        theirs.append(total[1:].reshape(2, 2))
    ours = vitx.load(ID)(model, x, torch.tensor(target), class_token=class_token)
    check = "class token scored" if class_token else "mean token scored"
    oracle = "plain loops, gradients by finite differences"
    proof(ID, check, relative_error(ours, theirs), at_most=1e-6, kind="parity", oracle=oracle)


def test_later_layers_do_not_reach_back():
    """The map of one layer is the same whatever stands above it."""
    model = tiny(3)
    x, target = pictures(model), torch.tensor([2, 2])
    all_three, last_two = (vitx.load(ID)(model, x, target, first=first) for first in (0, 1))
    first_layer = 3 * all_three - 2 * last_two
    with torch.no_grad():
        for parameter in model.blocks[1:].parameters():
            parameter *= 1.5
    all_three, last_two = (vitx.load(ID)(model, x, target, first=first) for first in (0, 1))
    assert relative_error(3 * all_three - 2 * last_two, first_layer) < 1e-9


def test_attention_pooling_reads_every_layer():
    """One pooled prediction for each layer, differentiated by the pooling attention."""
    model = tiny(2, class_token=False, global_pool="map")
    x = pictures(model)
    tokens, total = embed(model, x), torch.zeros(2, 4, dtype=x.dtype)
    for block in model.blocks:
        tokens = block(tokens)
        with capture(model, "attention") as record:
            logits = model.forward_head(model.norm(tokens))
            (gradient,) = torch.autograd.grad(logits[:, 4].sum(), record["pool_attention"][0], retain_graph=True)
        total = total + gradient.clamp(min=0).mean(1)[:, 0] / 2
    ours = vitx.load(ID)(model, x, torch.tensor([4, 4]))
    assert relative_error(ours.flatten(1), total.detach()) < 1e-12


def test_blocks_that_are_not_there():
    model = tiny(2)
    with pytest.raises(ValueError, match="block 2 is out of range: the model has 2 blocks"):
        vitx.load(ID)(model, pictures(model), first=2)
