# %% [markdown]
# # WDPruning: learned widths, and exits for the depth
#
# How wide must every layer of a Vision Transformer be, and how deep the whole? Each head and each output of the linear layers
# has a saliency $s_i$, each layer a threshold $\theta$: the share $\sigma(\theta)$ with the largest saliencies is kept,
# $m_i \in \{0, 1\}$. Both learn through the mask as if it were not there, with the weights, under a budget $R^*$ for the
# share of weights that remain, whose multipliers rise as long as it is exceeded:
#
# $$R = \frac1{L(4 + 2r)} \sum_{l=1}^{L} \big(3 a_l + a_l o_l + r f_l + r f_l g_l\big),\qquad
# \max_{\lambda} \min_{W,s,\theta} \sum_e \mathcal L_{\mathrm{CE}}^{(e)} + \lambda_1 (R - R^*)_+ + \lambda_2 (R - R^*)_+^2,$$
#
# with the shares $\sigma(\theta)$ of heads $a$, attention outputs $o$, neurons $f$ and MLP outputs $g$, and $r$ the MLP ratio.
# Shallow classifiers $e$ read the class token of earlier blocks; the model may end at one of them. Catalogue entry:
# `wdpruning`.

# %%
import math
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Units, UnsupportedModel, check, embed, require_finite, stored, without_units

# What is masked: rows of weight and bias of these layers; of qkv, whole heads.
LAYERS = {"heads": "attn.qkv", "attention_outputs": "attn.proj", "neurons": "mlp.fc1", "mlp_outputs": "mlp.fc2"}


class WdTransformer(VisionTransformer):
    """A Vision Transformer with saliencies, thresholds and shallow classifiers. Its forward pass masks nothing.

    Args:
        exits: numbers of blocks after which a shallow classifier stands. options: of timm's ``VisionTransformer``.
    """

    def __init__(self, exits: tuple[int, ...], **options: Any):
        super().__init__(**options)
        block, depth = cast(Any, self.blocks[0]), len(self.blocks)
        sizes = {kind: block.get_submodule(layer).out_features for kind, layer in LAYERS.items()}
        sizes |= {"heads": block.attn.num_heads}
        self.saliencies = nn.ParameterDict({kind: torch.zeros(depth, n) for kind, n in sizes.items()})
        self.thresholds = nn.ParameterDict({kind: torch.full((depth,), 10.0) for kind in sizes})
        self.shallow = nn.ModuleDict(
            {
                str(e): nn.Sequential(nn.LayerNorm(self.embed_dim), nn.Linear(self.embed_dim, self.num_classes))
                for e in exits
            }
        )


class TopShare(torch.autograd.Function):
    """Mask (L, n) of the largest saliencies of every row, sigmoid(thresholds) (L,) of them; gradients pass through it."""

    @staticmethod
    def forward(ctx: Any, saliencies: Tensor, thresholds: Tensor, multiple: int) -> Tensor:
        rank = saliencies.argsort(dim=1, descending=True, stable=True).argsort(1)
        mask = (rank < counts(thresholds.sigmoid(), saliencies.shape[1], multiple)[:, None]).to(saliencies.dtype)
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (mask,) = ctx.saved_tensors
        return gradients[0], (gradients[0] * mask).sum(1), None


def counts(shares: Tensor, size: int, multiple: int = 16) -> Tensor:
    """How many of ``size`` units the shares keep: rounded up, then to the nearest multiple where it divides the size."""
    kept = (shares.double() * size).ceil().clamp(1, size)
    if size % multiple == 0:
        kept = ((kept / multiple + 0.5).floor() * multiple).clamp(multiple, size)
    return kept.long()


def masked(model: WdTransformer, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with their rows masked, by name, for ``torch.func.functional_call``; masks by kind, (L, n)."""
    named = {}
    for kind, layer in LAYERS.items():
        for index, rows in enumerate(masks[kind]):
            name = f"blocks.{index}.{layer}"
            weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
            if kind == "heads":
                rows = rows.repeat_interleave(len(bias) // 3 // len(rows)).repeat(3)  # (3 h d,)
            named |= {f"{name}.weight": weight * rows[:, None], f"{name}.bias": bias * rows}
    return named


def remaining(model: WdTransformer, thresholds: dict[str, Tensor]) -> Tensor:
    """R: share of the blocks' weights that the thresholds leave, as a smooth function of them."""
    a, o, f, g = (thresholds[kind].sigmoid().clamp(min=1 / model.saliencies[kind].shape[1]) for kind in LAYERS)
    ratio = model.saliencies["neurons"].shape[1] / model.embed_dim
    return (3 * a + a * o + ratio * f + ratio * f * g).mean() / (4 + 2 * ratio)


def exits(model: WdTransformer, images: Tensor) -> dict[int, Tensor]:
    """Logits (B, classes) of every classifier, by the number of blocks before it; the model's own comes last."""
    x, found = embed(model, images), {}
    for number, block in enumerate(model.blocks, 1):
        x = block(x)
        if str(number) in model.shallow:
            found[number] = model.shallow[str(number)](x[:, 0])
    return found | {len(model.blocks): model.forward_head(model.norm(x))}


def moved(model: WdTransformer, keep_rate: float) -> dict[str, Tensor]:
    """The thresholds by kind, (L,), all moved by one number so that R is ``keep_rate``; infinite where nothing goes."""
    thresholds = {kind: threshold.detach() for kind, threshold in model.thresholds.items()}
    if keep_rate == 1:
        return {kind: torch.full_like(threshold, math.inf) for kind, threshold in thresholds.items()}
    low, high = -60.0, 60.0  # R rises with the shift
    least = float(remaining(model, {kind: threshold + low for kind, threshold in thresholds.items()}))
    if keep_rate < least:
        raise ValueError(
            f"keep_rate must be at least {least:.3g}, where one unit of every kind is left; not {keep_rate}."
        )
    for _ in range(60):
        middle = (low + high) / 2
        above = remaining(model, {kind: threshold + middle for kind, threshold in thresholds.items()}) > keep_rate
        low, high = (low, middle) if above else (middle, high)
    return {kind: threshold + high for kind, threshold in thresholds.items()}


def keep(model: WdTransformer, keep_rate: float | None = None, multiple: int = 16) -> dict[str, Tensor]:
    """Masks by kind, (L, n) bool, for the learned thresholds or for those ``moved`` to a share of the weights."""
    thresholds = dict(model.thresholds.items()) if keep_rate is None else moved(model, keep_rate)
    with torch.no_grad():
        masks = {k: TopShare.apply(score, thresholds[k], multiple) for k, score in model.saliencies.items()}
    return {kind: mask > 0 for kind, mask in masks.items()}  # type: ignore[operator]


class ChosenOutputs(nn.Linear):
    """A linear layer that computes only the chosen outputs, ``kept`` (out,) bool, of another; the others are zero."""

    def __init__(self, layer: nn.Linear, kept: Tensor):
        super().__init__(layer.in_features, int(kept.sum()), device="meta")  # draws no random weights
        self.weight, self.bias = nn.Parameter(layer.weight.detach()[kept]), nn.Parameter(layer.bias.detach()[kept])
        self.register_buffer("places", kept.nonzero()[:, 0])
        self.width = len(kept)

    def forward(self, input: Tensor) -> Tensor:
        outputs = nn.functional.linear(input, self.weight, self.bias)
        return outputs.new_zeros(*outputs.shape[:-1], self.width).index_copy(-1, self.get_buffer("places"), outputs)


def prune(
    model: WdTransformer, keep_rate: float | None = None, depth: int | None = None, multiple: int = 16
) -> VisionTransformer:
    """A smaller copy: narrower layers and no block behind the classifier; arguments and errors as ``explain``."""
    kept = _kept(model, keep_rate, depth, multiple)
    with torch.random.fork_rng(devices=[]):  # new layers draw weights
        smaller: Any = without_units(model, kept["heads"], kept["neurons"], kept["blocks"])
    for index, block in enumerate(smaller.blocks):
        block.attn.proj = ChosenOutputs(block.attn.proj, kept["attention_outputs"][index])
        block.mlp.fc2 = ChosenOutputs(block.mlp.fc2, kept["mlp_outputs"][index])
    if len(smaller.blocks) < len(model.blocks):
        smaller.norm, smaller.head = smaller.shallow[str(len(smaller.blocks))]
    del smaller.saliencies, smaller.thresholds, smaller.shallow
    return smaller


def _kept(model: Any, keep_rate: float | None, depth: int | None, multiple: int) -> dict[str, Tensor]:
    if not (hasattr(model, "saliencies") and hasattr(model, "shallow")):
        raise UnsupportedModel("WDPruning learns saliencies and shallow classifiers in training; this model has none.")
    places = [*map(int, model.shallow), len(model.blocks)]
    depth = places[-1] if depth is None else depth
    if depth not in places or not (keep_rate is None or 0 < keep_rate <= 1):
        raise ValueError(f"keep_rate lies above 0 and up to 1, depth is one of {places}; not {keep_rate} and {depth}.")
    return keep(model, keep_rate, multiple) | {"blocks": torch.arange(len(model.blocks)) < depth}


def explain(
    model: WdTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    keep_rate: float | None = None,
    depth: int | None = None,
    multiple: int = 16,
) -> Units:
    """Saliencies of heads, neurons and outputs, those that are kept, and what the narrower, shallower model says.

    Args:
        model: a ``WdTransformer`` in eval mode; its saliencies were learned in training and do not depend on the images.
        images: (B, 3, H, W), normalised.
        target: ignored: a unit is kept or pruned for all classes.
        keep_rate: share R of the blocks' weights that remain before numbers of units are rounded, up to 1 (all); None keeps
            what the thresholds say.
        depth: number of blocks, one that a classifier follows; None is all.
        multiple: layers keep a multiple of so many units, where it divides their size; 1 rounds up only.

    Returns:
        Units of "heads" (L, h), "attention_outputs" (L, D), "neurons" (L, hidden), "mlp_outputs" (L, D), and "blocks" (L,),
        scored by the share of the classifiers that stand behind them; logits (B, classes) of the smaller model.

    Raises:
        UnsupportedModel: a model without saliencies, and see ``vitx.vit.check``.
        ValueError: see ``vitx.vit.check``; a share or depth out of range.

    Source: Yu et al. 2022; the authors' code.
    """
    check(model, images, class_token=True)
    kept = _kept(model, keep_rate, depth, multiple)
    with torch.no_grad():
        logits = require_finite(model, prune(model, keep_rate, depth, multiple)(images))
    places = torch.tensor([*map(int, model.shallow), len(model.blocks)])
    behind = (places > torch.arange(len(model.blocks))[:, None]).to(logits.dtype).mean(1)  # (L,)
    return Units({k: s.detach().clone() for k, s in model.saliencies.items()} | {"blocks": behind}, kept, logits)


def load_pretrained(path) -> WdTransformer:
    """The model in a safetensors file, in eval mode; its metadata names timm's arguments and the exits."""
    metadata, weights = stored(path)
    model = WdTransformer(tuple(metadata["exits"]), **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Of the paper only the abstract and a review could be read; the mechanism is that of the authors' code, which is public:
#    among its details the rounding to multiples of 16, the gradient of a threshold (the sum over the units that are kept,
#    without the slope of the sigmoid), and no penalty once the budget is met.
# 2. The code has one budget for each training. `keep_rate` moves all thresholds by one number until $R$ is the share asked for,
#    so that the widths keep their learned order.
# 3. `wdpruning-glyph` learned its masks in a first stage of a short training, its thresholds starting at 3 and not
#    at 10. In the second, longer stage the saliencies stayed, and the weights went on with a budget drawn anew in every step, so that
#    one file serves all of them; the code trains everything together to the end.
# 4. The authors put one classifier behind the tenth of twelve blocks; the small model has three.
# 5. Outputs that are pruned add nothing to the tokens. The smaller model computes the others and adds zeros there.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    images = glyphs.normalise(glyphs.scenes(1, seed=7).images)
    model: Any = models.load("wdpruning-glyph").model
    demo.show(plot.units(explain(model, images)), "wdpruning")
