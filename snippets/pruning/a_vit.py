# %% [markdown]
# # A-ViT: how many blocks does each patch need?
#
# Every token decides for itself when it has been thought about enough. Its first channel gives a halting score in each
# block $l$; once the scores of token $k$ add up to one, up to $\epsilon$, it leaves the sequence:
#
# $$h_k^l = \sigma(\gamma\, t_{k,1}^l + \beta),\quad h_k^L = 1,\qquad
# N_k = \min\Big\{n : \sum_{l \le n} h_k^l \ge 1 - \epsilon\Big\},\qquad r_k = 1 - \sum_{l < N_k} h_k^l .$$
#
# So $p_k^l$, which is $h_k^l$ before block $N_k$, $r_k$ in it and 0 after it, sums to one over the blocks. The class token of
# all blocks is averaged with these weights, $t_c = \sum_l p_c^l\, t_c^l$, and classified. The map is the depth $N_k / L$ of
# every patch. Catalogue entry: `a-vit`.

# %%
import math
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import UnsupportedModel, check, embed, grid, require_finite, stored


class AdaptiveTokenTransformer(VisionTransformer):
    """A Vision Transformer whose tokens halt by their first channel. It has no weights beyond those of a plain one.

    Args:
        scale: gamma. shift: beta. options: of timm's ``VisionTransformer``, with class token.
    """

    def __init__(self, scale: float = 5.0, shift: float = -10.0, **options: Any):
        super().__init__(**options)
        self.halting_scale, self.halting_shift = scale, shift

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, classes) of pictures (B, 3, H, W) by the averaged class token."""
        return self.forward_head(self.norm(halt(self, embed(self, x)).output))


class Halting(NamedTuple):
    """What ``halt`` makes of tokens (B, N, D)."""

    output: Tensor  # (B, 1, D): class token, averaged over the blocks with its probabilities
    scores: Tensor  # (B, L, N): h, 0 where the token was not computed; in the last block before it is set to one
    probabilities: Tensor  # (B, L, N): p, which sums to one over the blocks
    alive: Tensor  # (B, L, N) bool: the token went through the block


def halt(model: Any, x: Tensor, shift: float | None = None, epsilon: float = 0.01) -> Halting:
    """Send tokens (B, N, D) through the blocks; halted ones leave, so the sequence is as long as its longest picture."""
    blocks, (batch, count) = list(model.blocks), x.shape[:2]
    shift = model.halting_shift if shift is None else shift
    place = torch.arange(count, device=x.device).expand(batch, -1)  # (B, n): which token stands where
    valid = torch.ones_like(place, dtype=torch.bool)  # (B, n): False pads a picture with fewer tokens
    total = x.new_zeros(batch, count)  # (B, n): sum of the scores so far
    empty = x.new_zeros(batch, count)
    output, scores, probabilities = x.new_zeros(batch, 1, x.shape[-1]), [empty] * len(blocks), [empty] * len(blocks)
    alive = torch.zeros(batch, len(blocks), count, dtype=torch.bool, device=x.device)
    for index, block in enumerate(blocks):
        # A picture without any token left attends to its padding, so that no softmax is empty; nobody reads it.
        x = block(x, attn_mask=(valid | ~valid.any(1, keepdim=True))[:, None, None])
        h = torch.sigmoid(model.halting_scale * x[..., 0] + shift) * valid  # (B, n)
        reached = valid & (total + h >= 1 - epsilon) if index < len(blocks) - 1 else valid
        p = torch.where(reached, 1 - total, h) * valid
        output = output + ((p * (place == 0))[..., None] * x).sum(1, keepdim=True)
        scores[index], probabilities[index] = empty.scatter(1, place, h), empty.scatter(1, place, p)
        alive[:, index].scatter_(1, place, valid)
        going, total = valid & ~reached, total + h
        longest = int(going.sum(1).max())
        if longest == 0:
            break
        order = torch.argsort((~going).byte(), dim=1, stable=True)[:, :longest]  # those that go on, in their old order
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))  # (B, longest, D)
        place, total, valid = place.gather(1, order), total.gather(1, order), going.gather(1, order)
    return Halting(output, torch.stack(scores, 1), torch.stack(probabilities, 1), alive)


def prior(depth: int, centre: float) -> Tensor:
    """H^target (L,): a normal distribution of deviation 1 about block ``centre``, 0 the first, that sums to one."""
    return (-(torch.arange(depth, dtype=torch.float64) - centre).square() / 2).softmax(0)


def halting_losses(found: Halting, target: Tensor) -> tuple[Tensor, Tensor]:
    """L_ponder, the mean of N_k + r_k, and L_distr = KL(H || H^target), H the mean score of every block, normalised."""
    blocks = found.alive.sum(1)  # (B, N): N_k
    remainder = found.probabilities.gather(1, blocks[:, None] - 1)  # (B, 1, N): r_k
    level = found.scores.mean((0, 2)).clamp(min=1e-9)  # (L,)
    share = level / level.sum()
    return blocks.to(share.dtype).mean() + remainder.mean(), (share * (share / target).log()).sum()


class Depths(NamedTuple):
    """Which patches went through each block, and with which probability they halted there."""

    alive: Tensor  # (B, L, gh, gw) bool
    logits: Tensor  # (B, classes) of the pruned model
    halting: Tensor  # (B, L, gh, gw): p of the patches; sums to one over L
    class_halting: Tensor  # (B, L): p of the class token, the weights of its average

    def heatmap(self) -> Tensor:
        """N_k / L, the share of the blocks that a patch went through: (B, gh, gw), above 0 and up to 1."""
        return self.alive.to(self.logits.dtype).mean(1)


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    shift: float | None = None,
    epsilon: float = 0.01,
) -> Depths:
    """Run the model until every token has halted; the sequence really gets shorter.

    Args:
        model: an ``AdaptiveTokenTransformer`` in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: no token halts for a class.
        shift: beta. The lower, the more is kept; at -inf no token halts before the last block and the logits are those
            of the plain model. None is the one that the model was trained with.
        epsilon: a token halts when its scores add up to 1 - epsilon, at least 0 and below 1.

    Returns:
        ``Depths``; a patch that halts in a block is alive in it and in none after it.

    Raises:
        UnsupportedModel: a model that was not trained to halt, or without class token.
        ValueError: see ``vitx.vit.check``; an epsilon out of range, a shift that is no number.

    Source: Yin et al. 2022, as the authors' code computes it.
    """
    check(model, images, class_token=True)
    if not hasattr(model, "halting_scale"):  # not isinstance: in a notebook the class exists twice
        raise UnsupportedModel("this model was not trained to halt its tokens; a-vit-glyph was.")
    if not 0 <= epsilon < 1 or (shift is not None and math.isnan(shift)):
        raise ValueError(f"epsilon lies from 0 to below 1 and shift is a number; not {epsilon} and {shift}.")
    prefix, size = model.num_prefix_tokens, grid(model, images)
    with torch.no_grad():
        found = halt(model, embed(model, images), shift, epsilon)
        logits = require_finite(model, model.forward_head(model.norm(found.output)))
    alive, halting = (tokens[..., prefix:].unflatten(2, size) for tokens in (found.alive, found.probabilities))
    return Depths(alive, logits, halting, found.probabilities[..., 0])


def load_pretrained(path) -> AdaptiveTokenTransformer:
    """The model in a safetensors file, in eval mode; its metadata holds the arguments of the class."""
    metadata, weights = stored(path)
    options = metadata["backbone"] | {"num_classes": metadata["num_classes"]}
    model = AdaptiveTokenTransformer(*metadata["halting"], **options)
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper was not at hand beyond its abstract. The mechanism is that of the authors' code; the direction of the
#    divergence in $\mathcal L_{\mathrm{distr}}$ and the weights of the losses follow a retelling of the paper.
# 2. The authors' code masks halted tokens and keeps the sequence at its full length. Here they are taken out, with the same
#    result, and a batch is as long as its picture with the most tokens left.
# 3. In the code a halted token goes on having a score, which counts in $\mathcal H$, and the mean leaves out the first
#    picture of a batch; here the score is 0 and no picture is left out. As in the code, $\mathcal H$ takes the scores of the
#    last block as they were before they are set to one. The code also clamps $\mathcal H$, and scales its prior so that the
#    first eight blocks have 0.98 of it; here the prior sums to one over all blocks.
# 4. The paper trains DeiT for 100 epochs on ImageNet, by the authors' README with $\gamma = 10$, $\beta = -30$ (tiny) or $-75$
#    (small), 0.0005 times the ponder loss and 0.001 times the divergence from the prior. The model here is `glyph` after a few
#    hundred steps more, of six blocks, with $\gamma = 5$, $\beta = -10$, and with 0.02 and 0.1 in the place of these weights,
#    since the training is so short.
# 5. Channel 1 of `glyph` told creature from background before the training, because its patches had learned to name
#    creatures. So the small model cannot show that halting alone finds the object, only what it does with such a channel.
# 6. `shift` moves $\beta$ after the training, to compare this model at several rates. That is ours.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures, the depth of every patch, and the patches left for the last blocks."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        model = models.load("a-vit-glyph").model
        found = explain(model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
        depth, rows = found.alive.sum(1), []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row]]
            cells = [plot.Cell(picture, None, " and ".join(names))]
            cells.append(plot.Cell(picture, found.heatmap()[row], f"depth, {depth[row].float().mean():.1f} blocks"))
            for block in (3, 4, 5):
                alive = found.alive[row, block]
                cells.append(
                    plot.Cell(plot.hide(picture, alive), None, f"block {block + 1}: {int(alive.sum())} patches")
                )
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.1), "a-vit")

    show(seed=7)
