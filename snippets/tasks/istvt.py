# %% [markdown]
# # ISTVT: where and when a clip was forged
#
# A forged clip gives itself away in single frames or between them. ISTVT keeps the two apart. After a feature extractor, the
# tokens of $T$ frames of $P$ patches have a spatial class token in every frame and a temporal class token at every place, so they
# fill a $(T+1) \times (P+1)$ table. Every block attends along time at each place, then along space in each frame,
#
# $$x \leftarrow x + \operatorname{SA}(\operatorname{TA}(x)),\qquad x \leftarrow x + \operatorname{MLP}(x),$$
#
# and the token that is in both class rows is classified. Temporal attention takes its queries and keys from the
# change since the frame before, $r_t = z_t - z_{t-1}$ (self-subtract; the temporal token and the first frame stay as they are), its
# values from $z$. Since the two attentions are separate matrices, relevance has two maps. With $R$ the relevance that deep Taylor
# propagation brings to an attention matrix of block $b$, and $\nabla$ the gradient of the class logit,
#
# $$\bar A^{(b)} = I + \mathbb E_h\big[(\nabla A^{(b)} \odot R^{(b)})^{+}\big],\qquad C = \bar A^{(M)} \cdots \bar A^{(1)},$$
#
# once for the spatial matrices, where the spatial class token's row shows each frame's patches, and once for the temporal
# ones, where the temporal class token's row shows each patch's frames. The product is that of `transformer-attribution`.
# Catalogue entry: `istvt`.

# %%
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import (
    UnsupportedModel,
    check,
    embed,
    grid,
    linear_relevance,
    product_relevance,
    require_finite,
    stored,
    sum_relevance,
    target_classes,
)


class Steps(NamedTuple):
    """All that a block computes; S = T + 1 frames and temporal token, N = P + 1 patches and spatial token, h heads."""

    x: Tensor  # (B, S, N, D): its input
    z: Tensor  # (B, S, N, D): normalised, what temporal values are made of
    r: Tensor  # (B, S, N, D): z less the frame before, what temporal queries and keys are made of
    temporal: tuple[Tensor, ...]  # queries, keys, values (B, N, h, S, d), attention (B, N, h, S, S), mixed values
    u: Tensor  # (B, S, N, D): mixed values, heads joined, what temporal attention projects
    y: Tensor  # (B, S, N, D): its normalised output, what spatial attention reads
    spatial: tuple[Tensor, ...]  # queries, keys, values (B, S, h, N, d), attention (B, S, h, N, N), mixed values
    w: Tensor  # (B, S, N, D): as u, for spatial attention
    middle: Tensor  # (B, S, N, D): x plus both attentions
    inner: Tensor  # (B, S, N, D): normalised, what the MLP reads
    hidden: Tensor  # (B, S, N, 2 D): its activations
    output: Tensor  # (B, S, N, D)


class SpaceTimeBlock(nn.Module):
    """Temporal attention with self-subtract, spatial attention of what it gives, one residual sum over both; an MLP."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads = heads
        self.norm_t, self.norm_s, self.norm_m = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.qk, self.v = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)
        self.proj_t = nn.Linear(width, width)
        self.qkv, self.proj_s = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, int(ratio * width)), nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor) -> Steps:
        z = self.norm_t(x)
        r = torch.cat([z[:, :2], z[:, 2:] - z[:, 1:-1]], 1)
        q, k = split(self.qk(r), 2, self.heads).transpose(2, 4)  # (B, N, h, S, d) each
        (v,) = split(self.v(z), 1, self.heads).transpose(2, 4)
        temporal = attend(q, k, v)
        u = temporal[4].transpose(1, 3).flatten(3)
        y = self.norm_s(self.proj_t(u))
        spatial = attend(*split(self.qkv(y), 3, self.heads).transpose(3, 4))  # of (B, S, h, N, d) each
        w = spatial[4].transpose(2, 3).flatten(3)
        middle = x + self.proj_s(w)
        inner = self.norm_m(middle)
        hidden = nn.functional.gelu(self.fc1(inner))
        return Steps(x, z, r, temporal, u, y, spatial, w, middle, inner, hidden, middle + self.fc2(hidden))


def split(x: Tensor, parts: int, heads: int) -> Tensor:
    """(B, S, N, parts h d) to (parts, B, S, N, h, d)."""
    return x.unflatten(-1, (parts, heads, -1)).movedim(3, 0)


def join(x: Tensor) -> Tensor:
    """(parts, B, S, N, h, d) to (B, S, N, parts h d)."""
    return x.movedim(0, 3).flatten(3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values (..., n, d) as they are, attention (..., n, n), mixed values (..., n, d)."""
    A = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return q, k, v, A, A @ v


class VideoTransformer(nn.Module):
    """Frames through the first blocks of a Vision Transformer, then blocks of decomposed space-time attention.

    Args:
        class_names: of the classes. frames: T. depth: M, number of space-time blocks. extractor: arguments of timm's
            ``VisionTransformer``, with its own depth; its class token becomes the spatial class token of every frame.
    """

    def __init__(self, class_names: tuple[str, ...], frames: int, depth: int, extractor: dict[str, Any]):
        super().__init__()
        self.class_names, self.num_classes, self.frames = class_names, len(class_names), frames
        self.frame = VisionTransformer(num_classes=0, final_norm=False, **extractor)
        width, heads, scale = self.frame.embed_dim, extractor["num_heads"], extractor["mlp_ratio"]
        self.time_embed = nn.Parameter(0.02 * torch.randn(frames, 1, width))
        self.temporal_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(SpaceTimeBlock(width, heads, scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(class_names))

    def clips(self, images: Tensor) -> Tensor:
        """(B, T, 3, H, W); pictures (B, 3, H, W) become clips that stand still."""
        return images[:, None].expand(-1, self.frames, -1, -1, -1) if images.ndim == 4 else images

    def table(self, tokens: Tensor) -> Tensor:
        """The table of tokens (B, T + 1, N, D) that enters the first block, from tokens of the frames (B, T, N, D)."""
        first = self.temporal_token.expand(len(tokens), 1, tokens.shape[2], -1)
        return torch.cat([first.to(tokens), tokens + self.time_embed], 1)

    def features(self, images: Tensor) -> Tensor:
        """Tokens of the frames (B, T, N, D), of clips or pictures."""
        clips = self.clips(images)
        tokens = self.frame.blocks(embed(self.frame, clips.flatten(0, 1)))
        return tokens.unflatten(0, clips.shape[:2])

    def classify(self, table: Tensor) -> Tensor:
        """Logits (B, classes) of the last block's output (B, T + 1, N, D): of the token in both class rows."""
        return self.head(self.norm(table[:, 0, 0]))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, T, 3, H, W) or pictures (B, 3, H, W)."""
        table = self.table(self.features(images))
        for block in self.blocks:
            table = block(table).output
        return self.classify(table)


class Evidence(NamedTuple):
    """Relevance of every patch of every frame, in space and in time."""

    spatial: Tensor  # (B, T, gh, gw), at least 0: U_s, what each frame's class token gathers from its patches
    temporal: Tensor  # (B, T, gh, gw), at least 0: U_t, what the temporal token gathers at each place from the frames
    logits: Tensor  # (B, classes)

    def heatmap(self) -> Tensor:
        """(B, gh, gw): the temporal map, summed over the frames."""
        return self.temporal.sum(1)


def explain(model: VideoTransformer, images: Tensor, target: Tensor | None = None) -> Evidence:
    """Spatial and temporal relevance of a clip for one class.

    Args:
        model: a ``VideoTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: clips (B, T, 3, H, W), normalised; pictures (B, 3, H, W) are taken for clips that stand still.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        Evidence. The two maps have scales of their own.

    Raises:
        UnsupportedModel: a model without decomposed space-time attention.
        ValueError: see ``vitx.vit.check``; clips of another length.

    Source: Zhao et al. 2023, by the authors' code (vivit.py, module.py, visualize_rel.py); Chefer et al. 2021 (CVPR).
    """
    if not hasattr(model, "temporal_token"):  # not isinstance: in a notebook VideoTransformer exists twice
        raise UnsupportedModel("this model has no attention along time: the method needs one such as video-glyph.")
    clips = model.clips(images)
    if clips.ndim != 5 or clips.shape[1] != model.frames:
        raise ValueError(f"a clip must have shape (B, {model.frames}, 3, H, W), not {tuple(images.shape)}.")
    check(model.frame, clips.flatten(0, 1))
    with torch.no_grad():
        table = model.table(model.features(images))
    done: list[Steps] = []
    with torch.enable_grad():
        table = table.requires_grad_()
        for block in model.blocks:
            done.append(block(done[-1].output if done else table))
        logits = require_finite(model, model.classify(done[-1].output))  # (B, classes)
        classes = target_classes(logits, target)
        matrices = [steps.temporal[3] for steps in done] + [steps.spatial[3] for steps in done]
        gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), matrices)
    with torch.no_grad():
        relevance = class_relevance(model, done[-1].output, classes)
        (batch, rows, places), depth = table.shape[:3], len(done)
        time = (
            torch.eye(rows).to(table)[0].expand(batch, places, 1, rows)
        )  # the temporal token's row of C, at each place
        space = torch.eye(places).to(table)[0].expand(batch, rows, 1, places)  # the spatial token's row, in each frame
        for index in reversed(range(depth)):
            of_time, of_space, relevance = block_relevance(model.blocks[index], done[index], relevance)
            time = time + time @ (gradients[index] * of_time).clamp(min=0).mean(1)
            space = space + space @ (gradients[depth + index] * of_space).clamp(min=0).mean(2)
    size = grid(model.frame, clips[:, 0])
    return Evidence(
        spatial=require_finite(model, space[:, 1:, 0, 1:]).unflatten(2, size),
        temporal=require_finite(model, time[:, 1:, 0, 1:]).mT.unflatten(2, size),
        logits=logits.detach(),
    )


# %% [markdown]
# ## The way back
#
# Relevance starts as one at the class and goes back by the rules of `transformer-attribution`: a linear layer shares it by its
# positive terms, a product halves it, a sum shares it in proportion and keeps the total. Self-subtract is such a sum, of $z_t$
# and $-z_{t-1}$, so each frame gets relevance as itself and as the one before the next.


# %%
def class_relevance(model: VideoTransformer, output: Tensor, classes: Tensor) -> Tensor:
    """Relevance (B, S, N, D) of the last block's output when the class holds relevance one."""
    relevance = torch.zeros_like(output)
    one = nn.functional.one_hot(classes, model.num_classes).to(output)
    relevance[:, 0, 0] = linear_relevance(one, model.norm(output[:, 0, 0]), model.head.weight)
    return relevance


def attention_relevance(relevance: Tensor, steps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Relevance of the attention, and of queries, keys and values, from that of the mixed values."""
    q, k, v, A, mixed = steps
    of_A, of_v = product_relevance(relevance, A, v, mixed)
    of_q, of_k = product_relevance(of_A, q, k.mT, q @ k.mT)
    return of_A, of_q, of_k.mT, of_v


def block_relevance(block: Any, s: Steps, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of temporal attention (B, h, N, S, S), of spatial attention (B, S, h, N, N) and of the block's input."""
    stream, branch = sum_relevance(relevance, s.middle, s.output - s.middle)
    branch = linear_relevance(linear_relevance(branch, s.hidden, block.fc2.weight), s.inner, block.fc1.weight)
    stream, branch = sum_relevance(stream + branch, s.x, s.middle - s.x)
    mixed = split(linear_relevance(branch, s.w, block.proj_s.weight), 1, block.heads)[0].transpose(2, 3)
    of_space, *of_qkv = attention_relevance(mixed, s.spatial)
    branch = linear_relevance(join(torch.stack(of_qkv).transpose(3, 4)), s.y, block.qkv.weight)  # (B, S, N, D): of y
    mixed = split(linear_relevance(branch, s.u, block.proj_t.weight), 1, block.heads)[0].transpose(1, 3)
    of_time, of_q, of_k, of_v = attention_relevance(mixed, s.temporal)
    of_r = linear_relevance(join(torch.stack([of_q, of_k]).transpose(2, 4)), s.r, block.qk.weight)
    of_z = linear_relevance(join(of_v[None].transpose(2, 4)), s.z, block.v.weight)
    now, before = sum_relevance(of_r[:, 2:], s.z[:, 2:], -s.z[:, 1:-1])
    of_z = of_z + torch.cat([of_r[:, :2], now], 1)
    of_z[:, 1:-1] += before
    return of_time, of_space, stream + of_z


# %% [markdown]
# ## Clips whose evidence is known


# %%
class Film(NamedTuple):
    """What to render for B clips of T frames, and what is false in them."""

    shown: Any  # ``vitx.glyphs.Parameters`` of B T pictures
    whole: Any  # the same clips without their forgery
    label: Tensor  # (B,): 1 where a part is false
    frame: Tensor  # (B,): the frame in which it is
    part: Tensor  # (B,): the part


def film(parameters: Any, numbers: Tensor, frames: int) -> Film:
    """Let creatures drift and turn, and give one part another variant in one frame of every other clip.

    Args:
        parameters: ``vitx.glyphs.Parameters`` of B scenes with one creature. Its five parts get free variants, so that no
            single frame tells what is false.
        numbers: (B, 12) in [0, 1), which decide all. frames: T, at least 3; the first and the last are never false.
    """
    rows = torch.arange(len(numbers)).repeat_interleave(frames)  # (B T,)
    p = type(parameters)(parameters.size, *(field[rows] for field in parameters[1:]))
    time = torch.linspace(-0.5, 0.5, frames).repeat(len(numbers))[:, None, None]  # (B T, 1, 1)
    drift, angle = (
        16 * (numbers[rows, None, :2] - 0.5),
        0.4 * (numbers[rows, None, 2] - 0.5) * time[..., 0],
    )  # pixels, radians
    radius, (cos, sin) = p.radii[..., None], p.turns.unbind(-1)
    whole = p._replace(
        centres=torch.minimum(torch.maximum(p.centres + drift * time, radius), p.size - radius),
        turns=torch.stack([cos * angle.cos() - sin * angle.sin(), sin * angle.cos() + cos * angle.sin()], -1),
        variants=(3 * numbers[rows, None, 3:8]).long(),
    )
    label = (numbers[:, 8] < 0.5).long()
    frame = 1 + ((frames - 2) * numbers[:, 9]).long()
    part = (5 * numbers[:, 10]).long()
    other = 1 + (2 * numbers[:, 11]).long()
    false = (torch.arange(frames) == frame[:, None]) & (label[:, None] == 1)  # (B, T)
    change = nn.functional.one_hot(part, 5)[:, None] * (false * other[:, None])[..., None]  # (B, T, 5)
    variants = (whole.variants + change.flatten(0, 1)[:, None]) % 3
    return Film(whole._replace(variants=variants), whole, label, frame, part)


def load_pretrained(path) -> VideoTransformer:
    """The model in a safetensors file, in eval mode; its metadata holds the arguments of ``VideoTransformer``."""
    metadata, weights = stored(path)
    names: tuple[str, ...] = tuple(metadata.pop("class_names"))
    model = VideoTransformer(names, **metadata)
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Written from the abstract and the authors' code. The paper's full text could not be read, and their repository lacks the
#    module that propagates relevance: what remains of it is how it is called and shown (visualize_rel.py), with the method
#    "transformer_attribution" of Chefer et al., a spatial and a temporal map of $19 \times 19$ places for each of six frames. The rules
#    here are therefore those of `transformer-attribution`, and the one for self-subtract is ours. Whether the authors show the spatial
#    rows of the six frames or begin with the temporal token's cannot be seen; here they are those of the frames.
# 2. The network. Two blocks of `glyph` stand for the first part of an Xception network, three blocks of space-time attention for
#    twelve. Block, class tokens, self-subtract and read-out follow the authors' code: one residual sum spans both attentions, the
#    temporal token has no position of its own, queries and keys of time have no bias. Positions in space are added below the
#    first block, with one more for each frame, where the authors learn one for every token of the clip. Two logits replace their one.
# 3. `heatmap()` sums the temporal map over the frames, for a single picture that can be compared. A picture in place of a clip is
#    taken for a clip that stands still: nothing in it is inconsistent, and its map says little.
# 4. Relevance stops at the features that enter the first space-time block, as the authors' maps do.
#
# What is found. The frame after a false one differs from its predecessor as much as the false one does, so self-subtract cannot
# tell the two apart: the temporal map is highest in one of them nearly always, and in the false one half the time. In the false
# frame most of it lies on what is false. The spatial map lies there too, more than by chance but no more than before training
# ("untrained" on the card): in this model what betrays a clip is gathered along time.
#
# What the small model cannot show: faces, compression, forgeries that differ from those of training. All clips have one kind of
# flaw, known to the pixel and frame: a part that is another one for a frame. No single frame gives it away, so a plain image model
# could not tell the clips apart.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, metrics, models, plot

    def clips(count: int, seed: int, spliced: bool) -> tuple[Film, Tensor, Tensor]:
        """Clips, all spliced or none: what was done to them, pictures (B, T, 3, S, S), and pixels that are false (B, T, S, S)."""
        labels, parameters = glyphs.draw(count, seed)
        numbers = torch.rand(count, 12, generator=torch.Generator().manual_seed(seed))
        numbers[:, 8] = 0.0 if spliced else 1.0
        done = film(parameters, numbers, 6)
        shown, whole = (
            glyphs.render(p, labels.repeat_interleave(6, 0)).images.unflatten(0, (count, 6))
            for p in (done.shown, done.whole)
        )
        return done, shown, (shown != whole).any(2)

    def show(seed: int) -> None:
        """A spliced clip, what is false in it, and both maps; each row has one scale for all frames."""
        done, images, false = clips(1, seed, spliced=True)
        model: Any = models.load("video-glyph").model
        found = explain(model, glyphs.normalise(images), torch.tensor([1]))
        strip = images[0].permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, T W, 3)
        truth = glyphs.patch_fraction(false[0], (14, 14))
        rows = {
            f"the clip; frame {int(done.frame) + 1} has a false {glyphs.PARTS[int(done.part)]}": None,
            "what is false": truth,
            "temporal relevance for spliced": found.temporal[0],
            "spatial relevance for spliced": found.spatial[0],
        }
        figure = Figure(figsize=(10, 7.6), layout="constrained")
        for axes, (title, maps) in zip(figure.subplots(4, 1), rows.items(), strict=True):
            plot.overlay(axes, strip, None if maps is None else maps.transpose(0, 1).flatten(1), title)
        demo.show(figure, "istvt")

    def count(number: int, seed: int) -> None:
        """Print how often clips are told apart, and where the maps of the spliced ones lie."""
        model: Any = models.load("video-glyph").model
        done, images, false = clips(number, seed, spliced=True)
        images = glyphs.normalise(images)
        found = explain(model, images, torch.ones(number, dtype=torch.long))
        genuine = model(glyphs.normalise(clips(number, seed + 1, spliced=False)[1])).argmax(1) == 0
        print(
            f"spliced clips found: {(found.logits.argmax(1) == 1).float().mean():.0%}, genuine ones: {genuine.float().mean():.0%}"
        )
        rows = torch.arange(number)
        truth = glyphs.patch_fraction(false[rows, done.frame], (14, 14))
        for name, maps in (("temporal", found.temporal), ("spatial", found.spatial)):
            late = maps.sum((2, 3)).argmax(1) - done.frame
            here, near = ((late == 0).float().mean(), ((late == 0) | (late == 1)).float().mean())
            inside = metrics.mass_inside(maps[rows, done.frame], truth).mean()
            print(f"{name} map: highest in the false frame in {here:.0%}, in it or the next in {near:.0%}", end="; ")
            print(f"in that frame {inside:.0%} of it on the false pixels (spread evenly: {truth.mean():.0%})")

    show(seed=11)
    count(24, seed=12)
