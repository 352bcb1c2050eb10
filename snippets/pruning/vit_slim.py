# %% [markdown]
# # ViT-Slim: one search for every size of model
#
# Which dimensions of the heads, neurons and patches does a Vision Transformer need? ViT-Slim multiplies each with a soft mask
# $z$ and trains masks and weights once, under an $\ell_1$ penalty with a factor for each of the three:
#
# $$\mathcal L = \mathcal L_{\mathrm{CE}} + w_1 \lVert z^{\mathrm{attn}} \rVert_1 + w_2 \lVert z^{\mathrm{mlp}} \rVert_1
# + w_3 \lVert \tanh \zeta \rVert_1 .$$
#
# The masks, ranked over all blocks, are the answer for every budget: the best share stays, the rest goes, and the model is
# trained again. Query, key and value share $z^{\mathrm{attn}}_{l,h,i}$, so each head gets a width of its own; a patch that
# some block needs must also live in all blocks before it. Catalogue entry: `vit-slim`.

# %%
import copy
import math
from functools import partial
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vitx.vit import Units, UnsupportedModel, check, require_finite, stored


class SlimTransformer(VisionTransformer):
    """A Vision Transformer with a soft mask for every dimension of its heads, neuron and patch; ``options`` are timm's.

    Its forward pass is that of the plain model, without any mask.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        depth, block = len(self.blocks), cast(Any, self.blocks[0])
        self.masks = nn.ParameterDict(
            {
                "head_dimensions": torch.ones(depth, block.attn.num_heads, block.attn.head_dim),  # (L, h, d)
                "neurons": torch.ones(depth, block.mlp.fc1.out_features),  # (L, hidden)
                "patches": torch.full((depth, self.patch_embed.num_patches), 3.0),  # (L, P), before the tanh
            }
        )

    def scores(self) -> dict[str, Tensor]:
        """z by kind; patches through a tanh."""
        return {k: mask.tanh() if k == "patches" else mask for k, mask in self.masks.items()}


def gated(model: SlimTransformer, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the gates of heads and neurons multiplied in, by name, for ``torch.func.functional_call``.

    A head's dimension is a row of the queries, of the keys and of the values; a neuron is a column of fc2.
    """
    named = {}
    for index, (dimensions, neurons) in enumerate(zip(gates["head_dimensions"], gates["neurons"], strict=True)):
        name, rows = f"blocks.{index}.attn.qkv", dimensions.flatten().repeat(3)  # (3 h d,)
        named[f"{name}.weight"] = model.get_parameter(f"{name}.weight") * rows[:, None]
        named[f"{name}.bias"] = model.get_parameter(f"{name}.bias") * rows
        name = f"blocks.{index}.mlp.fc2.weight"
        named[name] = model.get_parameter(name) * neurons
    return named


def gate_patches(model: SlimTransformer, gates: Tensor) -> list[RemovableHandle]:
    """Multiply what attention and MLP read of every patch with its gate, (L, P); remove the handles to take it back."""
    gates = nn.functional.pad(gates, (model.num_prefix_tokens, 0), value=1.0)[..., None]  # (L, N, 1)
    return [
        block.get_submodule(name).register_forward_pre_hook(partial(_multiply, gate))
        for block, gate in zip(model.blocks, gates, strict=True)
        for name in ("attn", "mlp")
    ]


def _multiply(gate: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * gate, *args[1:])


def drop_patches(model: SlimTransformer, alive: Tensor) -> list[RemovableHandle]:
    """Let every block see only the patches alive in it, (L, P) bool, never more than before: a shorter sequence."""
    alive = nn.functional.pad(alive, (model.num_prefix_tokens, 0), value=True)  # (L, N)
    before = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])
    places = [now[past].nonzero()[:, 0] for now, past in zip(alive, before, strict=True)]  # among those still there
    pairs = zip(model.blocks, places, strict=True)
    return [block.register_forward_pre_hook(partial(_take, place)) for block, place in pairs]


def _take(places: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args if len(places) == args[0].shape[1] else (args[0][:, places], *args[1:])


def keep(scores: dict[str, Tensor], keep_rate: float, keep_patches: float) -> dict[str, Tensor]:
    """The best of every kind over all blocks, bool, by kind; the number is rounded up.

    Heads and neurons: a block that would be left without keeps its best one. Patches: alive up to the last block that
    needs them.
    """
    kept = {}
    for kind, score in scores.items():
        flat = score.detach().flatten()
        count = math.ceil(round((keep_patches if kind == "patches" else keep_rate) * len(flat), 6))
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:count]] = True
        chosen, rows = chosen.view(len(score), -1), score.flatten(1)
        if kind == "patches":
            chosen = chosen.flip(0).cummax(0).values.flip(0)  # or in any later block
        else:
            chosen = chosen | nn.functional.one_hot(rows.argmax(1), rows.shape[1]).bool()
        kept[kind] = chosen.view(score.shape)
    return kept


def prune(model: SlimTransformer, keep_rate: float = 0.6, keep_patches: float | None = None) -> SlimTransformer:
    """A smaller copy without the dimensions, heads, neurons and patches that go; arguments and errors as ``explain``."""
    kept = _kept(model, keep_rate, keep_patches)
    smaller: Any = copy.deepcopy(model)
    for block, dimensions, neurons in zip(smaller.blocks, kept["head_dimensions"], kept["neurons"], strict=True):
        _narrow(block.attn, dimensions)
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        _resize(fc1, fc1.weight[neurons], fc1.bias[neurons])
        _resize(fc2, fc2.weight[:, neurons], fc2.bias)
    drop_patches(smaller, kept["patches"])
    del smaller.masks
    return smaller


def _narrow(attention: Any, kept: Tensor) -> None:
    """Leave the kept dimensions (h, d) of the heads. Heads without any go; the others are as wide as the widest."""
    heads, width, wide = kept.any(1).nonzero()[:, 0], kept.shape[1], int(kept.sum(1).max())
    order = kept[heads].long().argsort(dim=1, descending=True, stable=True)[:, :wide]  # (h', m): kept ones first
    rows = (heads[:, None] * width + order).flatten()  # (h' m,)
    weight, bias = attention.qkv.weight.unflatten(0, (3, -1)), attention.qkv.bias.unflatten(0, (3, -1))
    real = kept.flatten()[rows].to(weight.dtype)  # 0 where a narrow head is padded
    weight, bias = weight[:, rows] * real[:, None], bias[:, rows] * real  # (3, h' m, D)
    rescale = weight.new_tensor([math.sqrt(wide / width), 1, 1])  # the layer divides by sqrt(m), not by sqrt(d)
    _resize(attention.qkv, (weight * rescale[:, None, None]).flatten(0, 1), (bias * rescale[:, None]).flatten())
    _resize(attention.proj, attention.proj.weight[:, rows], attention.proj.bias)
    attention.num_heads, attention.head_dim = len(heads), wide
    attention.attn_dim, attention.scale = len(heads) * wide, wide**-0.5


def _resize(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    layer.out_features, layer.in_features = weight.shape


def _kept(model: Any, keep_rate: float, keep_patches: float | None) -> dict[str, Tensor]:
    if not (
        hasattr(model, "masks") and hasattr(model, "scores")
    ):  # not isinstance: in a notebook the class exists twice
        raise UnsupportedModel("ViT-Slim learns its masks in training, and this model carries none.")
    keep_patches = keep_rate if keep_patches is None else keep_patches
    if not (0 < keep_rate <= 1 and 0 < keep_patches <= 1):
        raise ValueError(f"shares to keep lie above 0 and up to 1, not {keep_rate} and {keep_patches}.")
    return keep(model.scores(), keep_rate, keep_patches)


def explain(
    model: SlimTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    keep_rate: float = 0.6,
    keep_patches: float | None = None,
) -> Units:
    """Masks of head dimensions, neurons and patches, what a budget keeps, and what the smaller model says.

    Args:
        model: a ``SlimTransformer`` in eval mode; its masks were learned in training and do not depend on the images.
        images: (B, 3, H, W), normalised.
        target: ignored: a unit is kept or pruned for all classes.
        keep_rate: share of the head dimensions, and of the neurons, that are kept; above 0 and up to 1 (all).
        keep_patches: share of the patches of all blocks that are kept before those are added that a later block needs;
            None is ``keep_rate``.

    Returns:
        Units of "head_dimensions" (L, h, d), "neurons" (L, hidden) and "patches" (L, P), patches of the grid row by row;
        logits (B, classes) of the smaller model on the shorter sequence.

    Raises:
        UnsupportedModel: a model without masks, and see ``vitx.vit.check``.
        ValueError: see ``vitx.vit.check``; a share out of range.

    Source: Chavan et al. 2022; the authors' code.
    """
    check(model, images, class_token=True)
    kept = _kept(model, keep_rate, keep_patches)
    with torch.no_grad():
        logits = require_finite(model, prune(model, keep_rate, keep_patches)(images))
    return Units({kind: score.detach().clone() for kind, score in model.scores().items()}, kept, logits)


def load_pretrained(path) -> SlimTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the arguments of timm's class."""
    about, weights = stored(path)
    model = SlimTransformer(**about["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Of the paper only abstract and introduction could be read; the mechanism is that of the authors' code, which is public.
# 2. The code never takes anything out: a pruned unit is multiplied with zero. A pruned patch is still attended to there, with
#    the biases as its key and value. Here it leaves the sequence. The class token, which the code can prune too, never goes.
# 3. Heads of different widths do not fit into one tensor: narrow ones are padded with zeros to the widest of their block, so
#    the saved share of the attention is less than that of its dimensions. Uniform and whole-head search are left out.
# 4. The code trains the model again for each budget. `vit-slim-glyph` was trained once more with budgets drawn anew in every
#    step, the masks of heads and neurons multiplied into the weights before, so that one file serves all budgets.
# 5. The code searches DeiT for 50 epochs with factors of about 0.0001; the small model, for minutes with larger ones, and
#    $\zeta$ starting at 1.5. Its creatures stand anywhere, so that no place of the picture is idle always.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    images = glyphs.normalise(glyphs.scenes(1, seed=7).images)
    model: Any = models.load("vit-slim-glyph").model
    demo.show(plot.units(explain(model, images)), "vit-slim")
