import copy

import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny
from pytorch_grad_cam import ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.nn import functional
from torchcam.methods import ScoreCAM as TorchcamScoreCAM

ID = "score-cam"


def features(model, x, layer=-1):
    kept = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    gh, gw = model.patch_embed.grid_size
    return kept[0][:, model.num_prefix_tokens :].mT.unflatten(2, (gh, gw))  # (B, D, gh, gw)


@pytest.mark.parametrize("weights", ["softmax", "probability"])
@pytest.mark.parametrize(("depth", "layer"), [(2, -1), (3, -1), (3, 0)])
def test_one_pass_a_channel_in_loops(depth, layer, weights, proof):
    model = tiny(depth, img_size=(24, 32), reg_tokens=depth - 2)
    x, target = pictures(model), [4, 2]
    maps = []
    for image, channels, goal in zip(x, features(model, x, layer), target, strict=True):
        scores = []
        for channel in channels:
            mask = functional.interpolate(channel[None, None], size=(24, 32), mode="bilinear", align_corners=False)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            with torch.no_grad():
                logits = model(image[None] * mask)[0]
            scores.append(logits[goal] if weights == "softmax" else logits.softmax(0)[goal])
        alpha = torch.stack(scores)
        if weights == "softmax":
            alpha = torch.exp(alpha) / torch.exp(alpha).sum()
        maps.append(sum(a * channel for a, channel in zip(alpha, channels, strict=True)))
    ours = vitx.load(ID)(model, x, torch.tensor(target), layer=layer, weights=weights, relu=False, chunk=3)
    what = f"map of block {layer % depth}, depth {depth}, weights {weights}"
    error = relative_error(ours, torch.stack(maps))
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="one forward pass a channel, in loops")
    assert torch.equal(
        vitx.load(ID)(model, x, torch.tensor(target), layer=layer, weights=weights, chunk=3), ours.relu()
    )


def test_pytorch_grad_cam_and_torchcam(proof):
    """Both enlarge masks in another way, so patches are pixels here and nothing is enlarged."""
    model = tiny(2, img_size=4, patch_size=1)
    x, target = pictures(model), torch.tensor([4, 2])
    ours = vitx.load(ID)(model, x, target, relu=False)

    def fold(tokens):
        return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)

    with torch.no_grad(), TorchcamScoreCAM(model, "blocks.1.norm1", reshape_transform=fold) as extractor:
        model(x)
        (theirs,) = extractor(class_idx=target.tolist(), normalized=False)
    error = (ours.relu() - theirs).abs().max() / ours.abs().max()
    proof(ID, "map, depth 2", error, at_most=1e-6, kind="parity", oracle="torchcam ScoreCAM (adds 1e-8)")

    layer = model.blocks[-1].norm1
    oracle = ScoreCAM(model, [layer], reshape_transform=fold)
    oracle.activations_and_grads.release()
    targets = [ClassifierOutputTarget(goal) for goal in target.tolist()]
    signed = oracle.get_cam_image(x, layer, targets, features(model, x).numpy(), None, False)  # type: ignore[arg-type]
    error = relative_error(ours, signed)
    proof(ID, "map, depth 2", error, at_most=1e-5, kind="parity", oracle="grad-cam ScoreCAM (weights in float32)")


def test_a_mean_of_the_channels(proof):
    """The weights are positive and add up to one, so the map lies between the least and the greatest channel."""
    model = tiny(2, img_size=(24, 32))
    x = pictures(model)
    channels, cam = features(model, x), vitx.load(ID)(model, x, relu=False)
    outside = torch.maximum(channels.amin(1) - cam, cam - channels.amax(1)).max()
    proof(ID, "map less the nearest bound of a weighted mean", outside, at_most=0, kind="closed form")


class Twice(nn.Module):
    """Every channel of the first half again in the second half."""

    def forward(self, x):
        half = x[..., : x.shape[-1] // 2]
        return torch.cat([half, half], -1)


def test_skipping_duplicates_is_exact(proof):
    model = tiny(2, img_size=(24, 32))
    model.blocks[1].norm1 = nn.Sequential(model.blocks[1].norm1, Twice())
    x = pictures(model)
    passes = []
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    every = vitx.load(ID)(model, x, relu=False)
    of_all = sum(passes)
    half = vitx.load(ID)(model, x, relu=False, channels=4)
    handle.remove()
    assert (of_all, sum(passes) - of_all) == (2 * 8, 2 * 4)  # pictures times channels
    what = "half the channels are duplicates: half the passes, the same map"
    proof(ID, what, relative_error(half, every), at_most=1e-12, kind="closed form")


def test_the_tried_channels_lie_farthest_apart():
    """Four groups of masks: one of each is tried, and it stands for its own group."""
    spread = vitx.load_module(ID).spread
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    masks = corners.repeat(3, 1) + 0.01 * torch.arange(12)[:, None]
    tried, nearest = spread(torch.stack([masks, masks.flip(0)]), 4)
    assert [sorted(row.tolist()) for row in tried % 4] == [[0, 1, 2, 3]] * 2
    assert torch.equal(tried.gather(1, nearest) % 4, torch.arange(12).expand(2, -1) % 4)
    every, itself = spread(masks[None], 12)
    assert torch.equal(every, itself)


def test_half_the_channels_give_a_similar_map(proof):
    """An approximation: a few channels carry most of the weight, and a map suffers where one of them is skipped."""
    from vitx import glyphs, models

    model = models.load("glyph").model
    x = glyphs.normalise(glyphs.scenes(4, seed=4711).images)
    every, half = (vitx.load(ID)(model, x, relu=False, channels=n).flatten(1) for n in (None, 64))
    similarity = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(every, half, strict=True)])
    what = "64 of 128 channels: mean correlation with the exact map"
    proof(ID, what, similarity.mean(), at_least=0.8, kind="sanity", oracle="4 glyph scenes")


def test_a_constant_channel_hides_the_picture():
    model = tiny(2)
    module = vitx.load_module(ID)
    x = pictures(model, 1)
    flat = torch.full((1, 4), 3.0, dtype=torch.float64)
    assert module.enlarge(model, x, flat).abs().max() == 0
    one = module.enlarge(model, x, torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64))
    assert one.shape == (1, 1, 16, 16)
    assert (float(one.min()), float(one.max())) == (0, 1)


def test_pixels_beyond_the_last_whole_patch():
    """A model that reads 20 pixels in patches of 8 ignores the last four, masked or not."""
    model = tiny(2, img_size=20)
    other = copy.deepcopy(model)
    x = pictures(model)
    assert vitx.load(ID)(model, x).shape == (2, 2, 2)
    changed = x.clone()
    changed[..., 16:] = 5
    assert torch.equal(vitx.load(ID)(other, changed), vitx.load(ID)(model, x))


@pytest.mark.parametrize("options", [{"weights": "mean"}, {"channels": 0}, {"channels": 9}, {"layer": 2}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match=r"weights|channels|layer"):
        vitx.load(ID)(model, pictures(model), **options)
