# %% [markdown]
# # SPViT: soft token pruning
#
# Which patches does each picture need, and what becomes of the others? A selector scores every token once per attention
# head $m$, from the head's share of its channels $x_i^m$, and a small gate weighs the heads:
#
# $$t_i^m = \operatorname{softmax}\!\big(\mathrm{MLP}([\,u_i^m,\ \overline{v^m}\,])\big),\qquad
# a_i = \sigma\big(\mathrm{MLP}(\bar x_i^1, \dots, \bar x_i^h)\big),\qquad
# s_i = \frac{\sum_m a_i^m\, t_i^m}{\sum_m a_i^m} .$$
#
# $u$ and $v$ are two halves of one small layer's output, the second averaged over the tokens that are left, and $\bar x_i^m$
# is the mean of $x_i^m$. Tokens more likely to be dropped than kept leave the sequence, however many they are in this picture,
# or those that rank last where a rate is given. They are not lost but packed into one token, their mean weighted by $s_{i,\mathrm{keep}}$:
#
# $$x_{\mathrm{package}} = \frac{\sum_{i \notin \mathcal K} s_{i,\mathrm{keep}}\, x_i}{\sum_{i \notin \mathcal K} s_{i,\mathrm{keep}}} .$$
#
# Catalogue entry: `spvit-soft-token-pruning`.

# %%
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Selection, UnsupportedModel, check, embed, grid, masked_block, require_finite, stored


class Selector(nn.Module):
    """Scores of tokens, by heads that share one MLP and are weighed for each token by a gate.

    Args:
        width: D, channels of a token. heads: h, of the model's attention.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, part = heads, width // heads  # d
        self.project = nn.Sequential(nn.LayerNorm(part), nn.Linear(part, part), nn.GELU())  # u, then v
        self.classify = nn.Sequential(
            nn.Linear(part, part // 2), nn.GELU(), nn.Linear(part // 2, part // 4), nn.GELU(), nn.Linear(part // 4, 2)
        )
        self.gate = nn.Sequential(nn.Linear(heads, heads // 2), nn.GELU(), nn.Linear(heads // 2, heads), nn.Sigmoid())

    def forward(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Scores from tokens (B, n, D) and the decisions so far (B, n), ones and zeros.

        Returns:
            (B, n, 2), for dropping and keeping, that decide: the gated mean of the heads' log-probabilities; and (B, n), the
            gated mean of their probabilities to keep, which weighs what is packed.
        """
        parts = tokens.unflatten(-1, (self.heads, -1))  # (B, n, h, d)
        own, spread = self.project(parts).chunk(2, -1)  # (B, n, h, d / 2) each
        share = kept / kept.sum(1, keepdim=True)  # (B, n)
        whole = torch.einsum("bn,bnhd->bhd", share, spread)[:, None]  # (B, 1, h, d / 2)
        logarithms = self.classify(torch.cat([own, whole.expand_as(own)], -1)).log_softmax(-1)  # (B, n, h, 2)
        gates = self.gate(parts.mean(-1))  # (B, n, h), a
        gates = (gates / gates.sum(-1, keepdim=True))[..., None]  # (B, n, h, 1)
        return (gates * logarithms).sum(2), (gates * logarithms.exp()).sum(2)[..., 1]


def package(patches: Tensor, weights: Tensor) -> Tensor:
    """The mean of patches (B, n, D) by weights (B, n): (B, 1, D); zero where all weights are."""
    total = weights.sum(1)[:, None, None].clamp(min=1e-6)
    return (weights[..., None] * patches).sum(1, keepdim=True) / total


class SoftPrunedTransformer(VisionTransformer):
    """A Vision Transformer with selectors before some blocks. Called as it is, it keeps every token.

    Args:
        stages: blocks before which tokens are packed, 0 the first; None is the 4th, 7th and 10th of 12, or the same
            shares of any depth. options: of timm's ``VisionTransformer``, with a class token.
    """

    def __init__(self, stages: tuple[int, ...] | None = None, **options: Any):
        super().__init__(**options)
        block: Any = self.blocks[0]
        depth, heads = len(self.blocks), block.attn.num_heads
        self.stages = tuple(sorted({depth * i // 4 for i in (1, 2, 3)}) if stages is None else stages)
        self.selectors = nn.ModuleList(Selector(self.embed_dim, heads) for _ in self.stages)

    def masked_forward(self, images: Tensor, decide: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The pass of training: all tokens stay in the sequence, and packed ones are cut off from the others.

        Args:
            images: (B, 3, H, W), normalised.
            decide: from scores (B, P, 2) and the decisions so far (B, P), the new decisions (B, P).

        Returns:
            normalised final tokens (B, prefix + P + stages, D), and the decisions after each stage, (B, P) each.
        """
        x, prefix = embed(self, images), self.num_prefix_tokens
        count = x.shape[1] - prefix
        live, decisions = x.new_ones(len(x), count), []  # live: (B, P + packages)
        for index, block in enumerate(self.blocks):
            if index in self.stages:
                kept = live[:, :count]
                scores, weights = self.selectors[len(decisions)](x[:, prefix:], live)
                decision = kept * decide(scores[:, :count], kept)
                packed = weights[:, :count] * (kept - decision)
                x = torch.cat([x, package(x[:, prefix : prefix + count], packed)], 1)
                some = (kept > decision).any(1, keepdim=True).to(live)  # an empty package is cut off too
                live = torch.cat([decision, live[:, count:], some], 1)
                decisions.append(decision)
            x = masked_block(block, x, nn.functional.pad(live, (prefix, 0), value=1.0))
        return self.norm(x), decisions


def ratio_loss(decisions: list[Tensor], rates: list[float]) -> Tensor:
    """Mean over stages of the squared distance of the share kept in the whole batch from the wanted one."""
    return torch.stack([(rate - kept.mean()).square() for kept, rate in zip(decisions, rates, strict=True)]).mean()


def explain(
    model: SoftPrunedTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    keep_rate: float | None = None,
) -> Selection:
    """Run the model with its selectors; tokens that they do not keep leave the sequence for one package token a stage.

    Pictures of a batch keep different numbers of tokens; the sequence is as long as the longest needs.

    Args:
        model: a ``SoftPrunedTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: ignored: the selectors serve no class in particular.
        keep_rate: None lets the selectors decide, as published. A number rho, above 0 and up to 1 (nothing is packed), keeps
            the best floor(rho^s P) patches after stage s, of every picture.

    Returns:
        Selection(alive (B, L, gh, gw) bool, logits (B, classes)).

    Raises:
        UnsupportedModel: the model has no trained selectors.
        ValueError: see ``vitx.vit.check``; a keep rate out of range.

    Source: Kong et al. 2022, by the abstract and the authors' code.
    """
    if not hasattr(model, "selectors"):  # not isinstance: in a notebook SoftPrunedTransformer exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no trained selectors: the method runs a SoftPrunedTransformer, such as the model "
            "spvit-glyph."
        )
    check(model, images, class_token=True)
    if keep_rate is not None and not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate lies above 0 and up to 1, or is None; not {keep_rate}.")
    gh, gw = grid(model, images)
    alive = []
    with torch.inference_mode():
        x, prefix = embed(model, images), model.num_prefix_tokens  # (B, N, D)
        place = torch.arange(gh * gw, device=x.device).expand(len(x), -1)  # (B, n): patch of each token
        live = torch.ones_like(place, dtype=torch.bool)  # (B, n + packages): not padding
        for index, block in enumerate(model.blocks):
            if index in model.stages:
                stage, count = model.stages.index(index), place.shape[1]
                scores, weights = model.selectors[stage](x[:, prefix:], live.to(x.dtype))
                patches, here = x[:, prefix : prefix + count], live[:, :count]
                margin = (scores[:, :count, 1] - scores[:, :count, 0]).masked_fill(~here, -torch.inf)  # (B, n)
                if keep_rate is None:
                    kept = margin > 0
                else:
                    best = math.floor(round(keep_rate ** (stage + 1) * gh * gw, 6))
                    ranks = margin.argsort(dim=1, descending=True, stable=True)[:, :best]
                    kept = torch.zeros_like(here).scatter_(1, ranks, True)
                gone = here & ~kept
                packed = package(patches, weights[:, :count] * gone)  # (B, 1, D)
                order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]  # kept first, in place
                patches = patches.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))  # (B, k, D)
                place, live = place.gather(1, order), torch.cat([kept.gather(1, order), live[:, count:]], 1)
                x = torch.cat([x[:, :prefix], patches, x[:, prefix + count :]], 1)
                if gone.any():  # an empty package is padding
                    x, live = torch.cat([x, packed], 1), torch.cat([live, gone.any(1, keepdim=True)], 1)
            seen = nn.functional.pad(live, (prefix, 0), value=True)[:, None, None]  # (B, 1, 1, N)
            x = block(x) if live.all() else block(x, attn_mask=seen)
            left = torch.zeros(len(x), gh * gw, dtype=torch.bool, device=x.device)
            alive.append(left.scatter_(1, place, live[:, : place.shape[1]]))
        logits = require_finite(model, model.forward_head(model.norm(x)))
    return Selection(torch.stack(alive, 1).unflatten(2, (gh, gw)).clone(), logits.clone())


def load_pretrained(path) -> SoftPrunedTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = SoftPrunedTransformer(num_classes=metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper is about latency: tables measured on a phone and on an FPGA turn a latency into keep rates for each block, and
#    selectors are put in from the last block to the first as long as accuracy holds. Here three selectors stand before the
#    2nd, 4th and 5th of six blocks, at the shares of the depth where the authors' code has them, with fixed rates.
# 2. The paper was read by its abstract, the rest is from the authors' code: one MLP for all heads, decisions from the mean of
#    log-probabilities, packages that stay in the sequence for good and are seen by later selectors. One of its files sums the
#    packed tokens by their scores and another takes their plain mean; here the package is the mean by scores.
# 3. The code draws decisions at random at test time too. Here a token stays if keeping scores higher than dropping, so that
#    the same picture always keeps the same patches. A picture that drops nothing gets no package.
# 4. The model below, `spvit-glyph`, was fine-tuned from `glyph` for minutes, where the paper fine-tunes DeiT, LV-ViT, PiT and
#    Swin on ImageNet for tens of epochs. `keep_rate` is ours: it lets the ranking decide at a given rate, as in `dynamicvit`,
#    so that one model can be compared at several.
# 5. The glyph world cannot show what packages save on photographs, where the background matters too.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of one and two creatures, what is left after each stage, and for how many blocks each patch lived."""
        model = models.load("spvit-glyph").model
        rows = []
        for creatures in (1, 2):
            scenes = glyphs.scenes(2, seed, creatures)
            found = explain(model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
            for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
                names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row, :creatures]]
                cells = [plot.Cell(picture, None, " and ".join(names))]
                for stage in model.stages:  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
                    left = found.alive[row, stage]
                    title = f"from block {stage + 1}: {int(left.sum())} patches"
                    cells.append(plot.Cell(plot.hide(picture, left), None, title))
                rows.append([*cells, plot.Cell(picture, found.heatmap()[row], "share of blocks lived")])
        demo.show(plot.grid(rows, cell=2.1), "spvit-soft-token-pruning")

    show(seed=7)
