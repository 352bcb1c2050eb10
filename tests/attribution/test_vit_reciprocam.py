import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny

ID = "vit-reciprocam"
MODELS = {
    "class token": {},
    "registers and layer scale": {"reg_tokens": 4, "init_values": 0.5},
    "no qkv bias": {"qkv_bias": False},
    "qk-norm": {"qk_norm": True},
    "scaled attention norm": {"scale_attn_norm": True},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
}
KERNEL = [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]]


def whole_passes(model, x, target, layer, gaussian):
    """One pass of the whole model for every patch, with the output of one norm masked by a hook."""
    gh, gw = model.patch_embed.grid_size
    prefix = model.num_prefix_tokens
    maps = torch.zeros(len(x), gh, gw, dtype=x.dtype)
    for picture in range(len(x)):
        for i in range(gh):
            for j in range(gw):
                mask = torch.zeros(gh, gw, dtype=x.dtype)
                if not gaussian:
                    mask[i, j] = 1
                else:
                    for a in range(3):
                        for b in range(3):
                            if 0 <= i + a - 1 < gh and 0 <= j + b - 1 < gw:
                                mask[i + a - 1, j + b - 1] = KERNEL[a][b]
                mask = torch.cat([torch.ones(prefix, dtype=x.dtype), mask.flatten()])
                handle = model.blocks[layer].norm1.register_forward_hook(
                    lambda module, args, output, mask=mask: output * mask[:, None]
                )
                with torch.no_grad():
                    maps[picture, i, j] = model(x[picture : picture + 1]).softmax(-1)[0, target[picture]]
                handle.remove()
    return maps


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_of_the_whole_model_a_patch(name, layer, gaussian, proof):
    depth = 2 if gaussian else 3
    model = tiny(depth, img_size=(24, 32), **MODELS[name])
    x, target = pictures(model), torch.tensor([4, 2])
    theirs = whole_passes(model, x, target, layer, gaussian)
    theirs -= theirs.amin((1, 2), keepdim=True)
    ours = vitx.load(ID)(model, x, target, layer=layer, gaussian=gaussian, chunk=5)
    what = f"{name}, depth {depth}, block {layer}, {'3 x 3' if gaussian else 'one patch'}"
    error = relative_error(ours, theirs)
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="one pass of the whole model a patch, in loops")


@pytest.mark.parametrize("name", ["class token", "registers and layer scale", "no qkv bias", "scaled attention norm"])
def test_the_short_way_is_the_long_way(name, monkeypatch, proof):
    """Scaling scores instead of tokens, for the class token's row only, changes no number."""
    model = tiny(3, img_size=(24, 32), **MODELS[name])
    x = pictures(model)
    module = vitx.load_module(ID)
    assert module.is_linear(model.blocks[-1].attn)
    short = module.explain(model, x)
    monkeypatch.setattr(module, "is_linear", lambda attention: False)
    error = relative_error(short, module.explain(model, x))
    proof(ID, f"scores scaled instead of tokens: {name}", error, at_most=1e-12, kind="closed form")


def test_two_classes_mirror_each_other(proof):
    """What speaks for one of two classes speaks against the other: both maps add up to the range of the scores."""
    model = tiny(2, img_size=(24, 32), num_classes=2)
    x = pictures(model)
    first, second = (vitx.load(ID)(model, x, torch.tensor([c, c])) for c in range(2))
    error = relative_error(first + second, first.amax((1, 2), keepdim=True).expand_as(first))
    proof(ID, "two classes: the maps add up to a constant", error, at_most=1e-9, kind="closed form")


def test_a_block_that_does_not_attend_gives_nothing():
    """When the last block's attention brings nothing, every mask leaves the same prediction."""
    model = tiny(2, img_size=(24, 32))
    with torch.no_grad():
        model.blocks[-1].attn.proj.weight.zero_()
    assert vitx.load(ID)(model, pictures(model)).abs().max() < 1e-12


def test_windows_are_cut_off_at_the_border():
    windows = vitx.load_module(ID).windows((3, 4), gaussian=True).unflatten(0, (3, 4))
    assert torch.equal(windows.sum(-1)[1], torch.tensor([0.75, 1, 1, 0.75]))
    assert float(windows[0, 0].sum()) == 9 / 16
    assert torch.equal(vitx.load_module(ID).windows((3, 4), gaussian=False), torch.eye(12))


def test_layer_out_of_range():
    model = tiny(2)
    with pytest.raises(ValueError, match="has 2 blocks"):
        vitx.load(ID)(model, pictures(model), layer=2)
