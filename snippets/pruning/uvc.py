# %% [markdown]
# # UVC: what a budget makes a Vision Transformer give up
#
# Heads, MLP neurons and whole blocks compete for one budget of operations while the model learns. In block $l$, the $s$ groups
# of weights with the smallest norms must become zero, and a pair of logits decides whether the block is skipped. Multipliers
# turn both demands into prices: $z$ of the budget, $y$ of weight that is to vanish,
#
# $$\min_{W,\,s,\,g}\ \max_{y,\,z\ge0}\ \mathcal L(W,g)
# + \sum_{l,k} y^{(l,k)}\,\big\|W^{(l,k)}\big\|^2_{\lceil s^{(l,k)}\rceil,\downarrow}
# + z\,\big(R(s,g)-R_{\mathrm{budget}}\big),$$
#
# where $\|\cdot\|^2_{s,\downarrow}$ sums the $s$ smallest squared norms of the columns that heads ($k=1$) and neurons ($k=3$)
# write with, and $R$ is the share of operations left. At the solution a unit $u$ survives if $y\,\|w_u\|^2$ exceeds $z$ times
# what it costs: its price is what it is worth to the model. Catalogue entry: `uvc`.

# %%
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Units, UnsupportedModel, check, plain_blocks, require_finite, stored, target_classes, without_units

KINDS = ("heads", "neurons")


class UvcTransformer(VisionTransformer):
    """A Vision Transformer with the variables of its compression: s, y and z, and the logits of skipping its blocks.

    Args:
        options: of timm's ``VisionTransformer``; the blocks are plain.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        depth = len(plain_blocks(self))
        self.skip_gates = nn.Parameter(torch.tensor([-1.0, 1.0]).repeat(depth, 1))  # (L, 2): skip, keep
        self.register_buffer("pruned", torch.zeros(depth, 2))  # s: numbers of heads and neurons, not yet rounded up
        self.register_buffer("y", torch.ones(depth, 2))
        self.register_buffer("z", torch.zeros(()))


def group_norms(model: Any) -> dict[str, Tensor]:
    """Squared norm of the columns with which each head (L, h) and each neuron (L, hidden) writes into the tokens."""
    columns = [[layer.weight.detach().square().sum(0) for layer in (b.attn.proj, b.mlp.fc2)] for b in model.blocks]
    heads, neurons = (torch.stack(kind) for kind in zip(*columns, strict=True))
    return {"heads": heads.unflatten(1, (model.blocks[0].attn.num_heads, -1)).sum(2), "neurons": neurons}


def unit_costs(model: Any) -> dict[str, float]:
    """Share of the operations of all blocks that one head, and one neuron, takes."""
    tokens, width = model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim
    block = model.blocks[0]
    of_head = (4 * width + 2 * tokens) * block.attn.head_dim
    of_neuron = 2 * width
    total = len(model.blocks) * (of_head * block.attn.num_heads + of_neuron * block.mlp.fc1.out_features)
    return {"heads": of_head / total, "neurons": of_neuron / total}


def smallest(norms: Tensor, count: Tensor) -> Tensor:
    """Mask of the ``count`` (L,) smallest groups of every block, (L, units) bool."""
    return norms.argsort(dim=1, stable=True).argsort(1) < count[:, None]


def resource(model: Any, keep: Tensor) -> Tensor:
    """R: the share of operations left when blocks run with probability ``keep`` (L,)."""
    costs, norms = unit_costs(model), group_norms(model)
    left = [costs[kind] * (norms[kind].shape[1] - model.pruned[:, i].ceil()) for i, kind in enumerate(KINDS)]
    return (keep * (left[0] + left[1])).sum()


@torch.no_grad()
def primal_dual(
    model: Any, keep: Tensor, budget: float, rate: float, s_rate: float, y_rate: float, z_rate: float
) -> None:
    """One step on W (towards zero, for the groups to be pruned), s, y and z, after a step on the loss.

    Args:
        keep: (L,) probability that a block runs. rate: of the step on the loss.
        s_rate: step of s as a share of all units of a block. y_rate, z_rate: steps of the multipliers.
    """
    costs, z = unit_costs(model), float(model.z)
    for i, (kind, norms) in enumerate(group_norms(model).items()):
        s, y, most = model.pruned[:, i], model.y[:, i], norms.shape[1]
        bottom = smallest(norms, s.ceil())  # (L, units)
        shrink = 1 / (1 + 2 * rate * y[:, None] * bottom)  # the proximal step of y * squared norm
        for block, factor in zip(model.blocks, shrink, strict=True):
            layer = block.attn.proj if kind == "heads" else block.mlp.fc2
            layer.weight.mul_(factor.repeat_interleave(layer.in_features // most))
        following = norms.masked_fill(bottom, torch.inf).min(1).values  # the norm that one more unit would add
        slope = y * following - z * keep * costs[kind]  # by s
        y += y_rate * (norms * bottom).sum(1)
        s.sub_(s_rate * most**2 * slope).clamp_(0, most - 1)
    model.z.add_(z_rate * (resource(model, keep) - budget)).clamp_(min=0)


def explain(model: UvcTransformer, images: Tensor, target: Tensor | None = None, *, keep_rate: float = 1.0) -> Units:
    """Prices of heads and neurons, log-odds of blocks, and the logits with what the budget leaves.

    Args:
        model: a ``UvcTransformer`` in eval mode.
        images: (B, 3, H, W), normalised.
        target: checked, and without effect: the units serve all classes.
        keep_rate: share of the operations of all blocks that may stay. What training left always fits 1; below it the
            cheapest heads and neurons of all blocks go too, but one of each stays in a block that runs.

    Returns:
        Units of the kinds "heads" (L, h), "neurons" (L, hidden) and "blocks" (L,). The score of a head or neuron is the
        price z at which it goes, y * squared norm / cost, and 0 if training took it; that of a block is the logit of
        running it.

    Raises:
        UnsupportedModel: a model that was not compressed this way.
        ValueError: see ``vitx.vit.check``; a keep rate that is not above 0 and up to 1, or out of reach.

    Source: Yu et al. 2022 (ICLR); the authors' code (VITA-Group/UVC), uvc_utils.py and uvc_optimizer.py.
    """
    check(model, images)
    kept = chosen(model, keep_rate)
    target_classes(images.new_empty(len(images), model.num_classes), target)
    with torch.no_grad():
        logits = without_units(model, kept["heads"], kept["neurons"], kept["blocks"])(images)
    return Units(scores_of(model), kept, require_finite(model, logits))


def scores_of(model: Any) -> dict[str, Tensor]:
    """Prices of heads and neurons that training left, and logits of running the blocks."""
    if not hasattr(model, "skip_gates"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} was not compressed under a budget: the method explains a UvcTransformer, such as "
            "the model uvc-glyph."
        )
    costs = unit_costs(model)
    prices = {
        kind: model.y[:, i, None] * norms / costs[kind] * ~smallest(norms, model.pruned[:, i].ceil())
        for i, (kind, norms) in enumerate(group_norms(model).items())
    }
    return prices | {"blocks": (model.skip_gates[:, 1] - model.skip_gates[:, 0]).detach()}


def chosen(model: Any, keep_rate: float) -> dict[str, Tensor]:
    """Masks of what stays: "heads" (L, h), "neurons" (L, hidden), "blocks" (L,), bool."""
    scores, costs = scores_of(model), unit_costs(model)
    runs = scores["blocks"] > 0  # (L,)
    kept = {
        kind: ~smallest(norms, model.pruned[:, i].ceil()) for i, (kind, norms) in enumerate(group_norms(model).items())
    }
    prices, cost = [], []
    for kind in KINDS:
        of_runs = kept[kind] & runs[:, None]
        best = torch.zeros_like(of_runs).scatter(1, scores[kind].argmax(1, keepdim=True), True)
        prices.append(scores[kind].masked_fill(~of_runs, -1).masked_fill(best & of_runs, torch.inf).flatten())
        cost.append(of_runs.flatten() * costs[kind])
    price, cost = torch.cat(prices), torch.cat(cost).double()
    order = price.argsort(stable=True)
    left = cost.sum() - cost[order].cumsum(0)  # operations left when this unit and all cheaper ones are gone
    gone = (left + cost[order] > keep_rate + 1e-9) & (price[order] < torch.inf)
    if not 0 < keep_rate <= 1 or cost.sum() - cost[order][gone].sum() > keep_rate + 1e-9:
        raise ValueError(
            f"keep_rate lies above 0 and up to 1, within reach when all blocks keep a head and a neuron; not {keep_rate}."
        )
    stays = torch.ones_like(gone).scatter(0, order, ~gone)
    parts = zip(kept.items(), stays.split([mask.numel() for mask in kept.values()]), strict=True)
    return {kind: mask & part.view_as(mask) for (kind, mask), part in parts} | {"blocks": runs}


def prune(model: Any, keep_rate: float = 1.0) -> VisionTransformer:
    """The smaller model, without skipped blocks and without the units that go at this rate."""
    kept = chosen(model, keep_rate)
    smaller: Any = without_units(model, kept["heads"], kept["neurons"], kept["blocks"])
    del smaller.skip_gates, smaller.pruned, smaller.y, smaller.z  # they belong to the full model
    return smaller


@torch.no_grad()
def bury(model: Any) -> None:
    """Set to zero what the solution takes away: columns of pruned units, and all that skipped blocks write."""
    kept = chosen(model, 1.0)
    for index, block in enumerate(model.blocks):
        for kind, layer in (("heads", block.attn.proj), ("neurons", block.mlp.fc2)):
            stays = (kept[kind][index] & kept["blocks"][index]).to(layer.weight)
            layer.weight.mul_(stays.repeat_interleave(layer.in_features // len(stays)))
            layer.bias.mul_(kept["blocks"][index])


def load_pretrained(path) -> UvcTransformer:
    """The model in a safetensors file, in eval mode."""
    about, weights = stored(path)
    model = UvcTransformer(**about["backbone"], num_classes=about["num_classes"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper also prunes dimensions inside a head, with variables $r$ of their own, and its code drops patches; here only
#    heads, neurons and blocks can go, and $R$ counts no more than the blocks.
# 2. The equations are those of the abstract and the authors' code; the paper's method section could not be read.
# 3. The authors train DeiT models for 30 epochs of ImageNet under the budget and 120 more after it; `uvc-glyph` learns for
#    minutes. Steps of $s$ are therefore plain gradient steps in shares of a block's units (the code: Adam, 0.02 units), and
#    $y$ starts at 1 (the code: 0.001), so that weights vanish in time.
# 4. Which groups are to vanish is decided anew at every step; the code does so once an epoch.
# 5. Keep rates below the trained budget go on along the same prices with the weights as they are. The paper trains once for
#    every budget.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    model = models.load("uvc-glyph").model
    found = explain(model, glyphs.normalise(glyphs.scenes(1, seed=7).images))  # pyright: ignore[reportArgumentType]
    demo.show(plot.units(found), "uvc")
