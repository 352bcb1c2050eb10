# %% [markdown]
# # AdaViT: every block decides which patches, heads and sublayers this picture needs
#
# Not every picture needs the whole model. Before block $l$ a decision network of three linear layers looks at the tokens
# $Z_l$ that come in: at each patch $z_i$ for itself, after the norm, and at the class token for the rest,
#
# $$m_i^p = \sigma\big(w^p \cdot \mathrm{LN}(z_i) + b^p\big),\qquad m^h = \sigma(W^h z_{\mathrm{cls}} + b^h) \in (0, 1)^H,\qquad
# m^b = \sigma(W^b z_{\mathrm{cls}} + b^b) \in (0, 1)^2 ,$$
#
# and $M = 1[m > \tfrac12]$ says what the block computes. Patches with $M_i^p = 0$ are passed on as they are and nobody
# attends to them, heads with $M_k^h = 0$ are left out, and the two switches $M^b$ skip the attention or the MLP:
#
# $$z_i' = z_i + M_1^b\,M_i^p \Big(b_o + \sum_{k:\,M_k^h = 1} W_o^k\,\mathrm{head}_k(z_i)\Big),\qquad
# z_i'' = z_i' + M_2^b\,M_i^p\,\mathrm{FFN}(z_i') .$$
#
# A patch that one block passes over can be used by the next. In training $M$ is drawn by Gumbel-softmax, and a loss pulls
# the mean use of patches, heads and sublayers to a budget. Catalogue entry: `adavit`, not to be taken for `a-vit`.

# %%
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, check, embed, grid, require_finite, stored


class DecisionNetwork(nn.Module):
    """Log-odds that a block uses each patch, each head, and its attention and its MLP.

    Args:
        width: D, channels of a token. heads: H. first: of the first block, which decides about patches only.
    """

    def __init__(self, width: int, heads: int, first: bool):
        super().__init__()
        self.patches = nn.Linear(width, 1)
        self.heads = None if first else nn.Linear(width, heads)
        self.sublayers = None if first else nn.Linear(width, 2)
        self.count = heads

    def forward(self, patches: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P), (B, H) and (B, 2) from normalised patches (B, P, D) and the class token (B, D); inf is always used."""
        chosen = self.patches(patches)[..., 0]
        if self.heads is None or self.sublayers is None:
            always = class_token.new_full((len(class_token), self.count + 2), math.inf)
            return chosen, always[:, 2:], always[:, :2]
        return chosen, self.heads(class_token), self.sublayers(class_token)


class AdaptiveTransformer(VisionTransformer):
    """A Vision Transformer with a decision network before each block. Called as it is, it uses all that it has.

    Args:
        options: of timm's ``VisionTransformer``, with class token and plain attention.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        block: Any = self.blocks[0]
        networks = (DecisionNetwork(self.embed_dim, block.attn.num_heads, i == 0) for i in range(len(self.blocks)))
        self.decisions = nn.ModuleList(networks)

    def log_odds(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of patches (B, P), heads (B, H) and sublayers (B, 2) of one block, from the tokens (B, N, D) that it is given."""
        block: Any = self.blocks[index]
        return self.decisions[index](block.norm1(x)[:, self.num_prefix_tokens :], x[:, 0])

    def masked_forward(self, images: Tensor, decide: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The pass of training: everything is computed, and multiplied with decisions that gradients flow into.

        Args:
            images: (B, 3, H, W), normalised.
            decide: from log-odds of any shape, the decisions M, ones and zeros.

        Returns:
            normalised final tokens (B, N, D), and M of patches (B, L, P), heads (B, L, H) and sublayers (B, L, 2).
        """
        x, made = embed(self, images), []
        for index, block in enumerate(self.blocks):
            patches, heads, sublayers = (decide(odds) for odds in self.log_odds(index, x))
            used = nn.functional.pad(patches, (self.num_prefix_tokens, 0), value=1.0)  # (B, N)
            x = masked_block(block, x, used, heads, sublayers)
            made.append((patches, heads, sublayers))
        return self.norm(x), [torch.stack(kind, 1) for kind in zip(*made, strict=True)]


def masked_block(block: Any, x: Tensor, used: Tensor, heads: Tensor, sublayers: Tensor) -> Tensor:
    """A block in which tokens (B, N, D), heads and sublayers count by M (B, N), (B, H) and (B, 2).

    Unused tokens see themselves only. No gradient flows through what used tokens see of them.
    """
    attention = block.attn
    queries, keys, values = (
        attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )  # (B, H, N, d) each
    scores = (attention.q_norm(queries) * attention.scale) @ attention.k_norm(keys).mT  # (B, H, N, N)
    seen = (used[:, :, None] * used[:, None] > 0.5) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    mixed = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ values * heads[..., None, None]
    update = block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
    x = x + (sublayers[:, :1] * used)[..., None] * update
    return x + (sublayers[:, 1:] * used)[..., None] * block.ls2(block.mlp(block.norm2(x)))


def gumbel_decisions(log_odds: Tensor, uniform: Tensor, temperature: float = 5.0) -> Tensor:
    """M, one with the probability m, drawn with uniform numbers in (0, 1) of the same shape.

    Its gradient is that of the soft decision: the Gumbel-softmax of two choices, in which the difference of two Gumbel
    numbers is a logistic one.

    Args:
        temperature: tau, which softens the gradient and moves no decision.
    """
    soft = ((log_odds + uniform.logit()) / temperature).sigmoid()
    return (soft > 0.5).to(soft) - soft.detach() + soft


def usage_loss(decisions: list[Tensor], budgets: tuple[float, float, float]) -> Tensor:
    """How far the mean use lies from the budgets gamma: squared for patches, absolute for heads and for sublayers.

    The first block has no choice of heads and sublayers and does not count there; nor do heads of skipped blocks.

    Args:
        decisions: of ``masked_forward``. budgets: shares of patches, heads and sublayers, from 0 to 1.
    """
    patches, heads, sublayers = decisions[0], decisions[1][:, 1:], decisions[2][:, 1:]
    runs = (sublayers.sum(-1, keepdim=True) > 0.5).to(heads).expand_as(heads)  # (B, L - 1, H)
    share = (heads * runs).sum() / runs.sum().clamp(min=1)
    off = [patches.mean() - budgets[0], share - budgets[1], sublayers.mean() - budgets[2]]
    return off[0].square() + off[1].abs() + off[2].abs()


class Usage(NamedTuple):
    """What each block used of the picture and of itself."""

    alive: Tensor  # (B, L, gh, gw) bool: patches that the block computed, in its attention, its MLP or both
    heads: Tensor  # (B, L, H) bool: heads that ran
    sublayers: Tensor  # (B, L, 2) bool: whether attention and MLP ran
    logits: Tensor  # (B, classes)

    def heatmap(self) -> Tensor:
        """Share of the blocks that use a patch: (B, gh, gw), from 0 to 1."""
        return self.alive.to(self.logits.dtype).mean(1)


def explain(
    model: AdaptiveTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    threshold: float = 0.5,
    head_threshold: float = 0.5,
    sublayer_threshold: float = 0.5,
) -> Usage:
    """Run the model as it decides for each picture; what a block does not use is not computed.

    Args:
        model: an ``AdaptiveTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: ignored: the decisions are made for no class.
        threshold: a block uses the patches whose m lies above it, from 0 (all) to below 1.
        head_threshold: the same for heads. sublayer_threshold: the same for attention and MLP.

    Returns:
        Usage(alive (B, L, gh, gw), heads (B, L, H), sublayers (B, L, 2), logits (B, classes)).

    Raises:
        UnsupportedModel: the model has no decision networks, or no class token.
        ValueError: see ``vitx.vit.check``; a threshold out of range.

    Source: Meng et al. 2022, by the abstract, the figure and the code of the authors.
    """
    check(model, images, class_token=True)
    if not hasattr(model, "decisions"):  # not isinstance: in a notebook AdaptiveTransformer exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no decision networks: the method runs an AdaptiveTransformer, such as the model "
            "adavit-glyph."
        )
    thresholds = (threshold, head_threshold, sublayer_threshold)
    if not all(0 <= value < 1 for value in thresholds):
        raise ValueError(f"thresholds lie from 0 to below 1, and {thresholds} do not.")
    least = [math.log(value / (1 - value)) if value else -math.inf for value in thresholds]
    used = []
    with torch.inference_mode():
        x, prefix = embed(model, images), model.num_prefix_tokens  # (B, N, D); no token ever leaves for good
        for index, block in enumerate(model.blocks):
            log_odds = model.log_odds(index, x)
            patches, heads, sublayers = (odds > limit for odds, limit in zip(log_odds, least, strict=True))
            tokens = nn.functional.pad(patches, (prefix, 0), value=True)  # (B, N): prefix tokens are always used
            x = attend(block, x, tokens, heads & sublayers[:, :1], sublayers[:, 0])
            x = feed_forward(block, x, tokens & sublayers[:, 1:])
            used.append((patches & sublayers.any(1, keepdim=True), heads & sublayers[:, :1], sublayers))
        logits = require_finite(model, model.forward_head(model.norm(x)))
    alive, heads, sublayers = (torch.stack(kind, 1).clone() for kind in zip(*used, strict=True))
    return Usage(alive.unflatten(2, grid(model, images)), heads, sublayers, logits.clone())


def attend(block: Any, x: Tensor, used: Tensor, heads: Tensor, runs: Tensor) -> Tensor:
    """Tokens x (B, N, D) after the attention of a block, by the used tokens and heads of the pictures that run it.

    The sequence is as long as its longest picture (b of B run, n of N tokens), and every head of every picture that is
    used is one of M rows: nothing is computed for the others.

    Args:
        used: (B, N) bool. heads: (B, H) bool. runs: (B,) bool.
    """
    attention, rows = block.attn, runs.nonzero()[:, 0]  # (b,)
    if not len(rows):
        return x
    order = (~used[rows]).byte().argsort(dim=1, stable=True)[:, : int(used[rows].sum(1).max())]  # (b, n): used first
    real, places = used[rows].gather(1, order), order[..., None].expand(-1, -1, x.shape[-1])
    short = x[rows].gather(1, places)  # (b, n, D)
    picture, head = heads[rows].nonzero(as_tuple=True)  # (M,) each
    into = attention.qkv.weight.unflatten(0, (3, attention.num_heads, -1)).transpose(0, 1).flatten(1, 2)  # (H, 3 d, D)
    bias = attention.qkv.bias.unflatten(0, (3, attention.num_heads, -1)).transpose(0, 1).flatten(1)  # (H, 3 d)
    out = attention.proj.weight.unflatten(1, (attention.num_heads, -1)).permute(1, 2, 0)  # (H, d, D)
    queries, keys, values = torch.baddbmm(bias[head, None], block.norm1(short)[picture], into[head].mT).chunk(3, -1)
    scores = (attention.q_norm(queries) * attention.scale) @ attention.k_norm(keys).mT  # (M, n, n)
    mixed = scores.masked_fill(~real[picture, None], -math.inf).softmax(-1) @ values  # (M, n, d)
    update = attention.proj.bias.expand_as(short).index_add(0, picture, mixed @ out[head])  # (b, n, D)
    short = short + block.ls1(update) * real[..., None]
    return x.index_copy(0, rows, x[rows].scatter(1, places, short))


def feed_forward(block: Any, x: Tensor, used: Tensor) -> Tensor:
    """Tokens x (B, N, D) after the MLP of a block, which sees only those that are used (B, N)."""
    tokens = x[used]  # (used, D)
    return x.masked_scatter(used[..., None], tokens + block.ls2(block.mlp(block.norm2(tokens))))


def load_pretrained(path) -> AdaptiveTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = AdaptiveTransformer(num_classes=metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Of the paper only the abstract and its figure could be read, and retellings of it. The rest is the authors' code as they
#    evaluate it: what the three layers read, the first block that has no choice of heads and sublayers, the losses.
# 2. The code computes everything and multiplies with the decisions. Here patches, heads and sublayers that are not used
#    are not computed; the result is the same, and a batch is as long as its picture with the most patches.
# 3. In the code a head that is off also closes the input channels of the MLP that have its index. The figure has nothing
#    of that, and these channels belong to no head, so the MLP here reads all of them.
# 4. The code compares $m^p$ with 0.6, and in training a soft decision, which $\tau = 5$ has drawn towards 0.5. Here all
#    thresholds are 0.5, in training as afterwards, so that what is drawn in training is decided later.
# 5. A head is multiplied with its decision once, where it leaves the attention; in the code three times over, with its
#    queries, keys and values, and with the projection. The result is the same, the gradients are not.
# 6. The thresholds of `explain` are ours; the paper trains one model for each budget. The code has budgets of 0.5 and
#    hundreds of epochs for 12 and 19 blocks. `adavit-glyph` was fine-tuned from `glyph` for minutes, with the budgets on its
#    card, and pays with accuracy. Six blocks and four heads have little to spare: in this training one block alone learned
#    to leave out heads, and nearly always the same. What depends on the picture are the patches.
# 7. No gradient tells a patch what others lose when they cannot see it, only what it gains itself by being used (so it is in
#    the code). In the last block it gains nothing, since the class token alone is read after it; yet that block finds the
#    creatures too. For the budget alone presses first on what most patches have in common, which is background. So the small
#    model cannot show how much of its choice the classification taught.
# 8. The glyph world is small and its creatures stand out; how the method fares on photographs this model cannot show.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes, the patches that some blocks use, and for how many blocks each patch is used."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        found = explain(models.load("adavit-glyph").model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row]]
            cells = [plot.Cell(picture, None, " and ".join(names))]
            for block in (1, 2, 3, 4):
                patches, heads = found.alive[row, block], int(found.heads[row, block].sum())
                parts = [
                    name for name, runs in zip(("attention", "MLP"), found.sublayers[row, block], strict=True) if runs
                ]
                title = f"block {block + 1}: {int(patches.sum())} patches\n{heads} of 4 heads, {' and '.join(parts) or 'skipped'}"
                cells.append(plot.Cell(picture, patches.float(), title))
            rows.append([*cells, plot.Cell(picture, found.heatmap()[row], "share of blocks that use it")])
        demo.show(plot.grid(rows, cell=2.1), "adavit")

    show(seed=7)
