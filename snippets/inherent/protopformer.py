# %% [markdown]
# # ProtoPFormer: this looks like those, as a whole and in its parts
#
# Which training examples does the model recognise in the picture, and where? Two kinds of prototypes are compared with the
# tokens of a Vision Transformer: *global* ones $p^g$ with the class token $z_0$, *local* ones $p^l$ with the patch tokens
# $z_i$. Patches outside the foreground never meet a prototype: the rollout of the class token's attention through the blocks
# before the last chooses the $n$ patches $\mathcal F$ that go on (the foreground-preserving mask). With
#
# $$s(z, p) = \log\frac{\lVert z - p\rVert^2 + 1}{\lVert z - p\rVert^2 + \epsilon},\qquad
# y = \lambda\,W^g s(z_0, p^g) + (1 - \lambda)\,W^l \max_{i \in \mathcal F} s(z_i, p^l)$$
#
# the logits are a weighted sum of similarities; $W$ is fixed at 1 for prototypes of the class and $-\tfrac12$ for others.
# Training adds the prototypical part concentration loss: each prototype's similarity map is to be narrow, and the maps of a
# class apart from each other. Catalogue entry: `protopformer`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import (
    Likeness,
    UnsupportedModel,
    capture,
    check,
    embed,
    grid,
    keep_tokens,
    require_finite,
    stored,
    target_classes,
)


class ProtoPFormer(nn.Module):
    """A Vision Transformer that classifies by its similarity to global and local prototypes.

    Args:
        backbone: with a class token; its own head is not used.
        classes: K. local, whole: prototypes of a class for patches and for the class token. width: d, of a prototype.
        keep: n, patches in the foreground. weight: lambda, of the global prototypes.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, local=5, whole=3, width=64, keep=81, weight=0.5):
        super().__init__()
        self.backbone, self.classes, self.keep, self.weight = backbone, classes, keep, weight
        self.add_on = nn.Sequential(
            nn.Linear(backbone.embed_dim, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid()
        )
        self.local_prototypes = nn.Parameter(torch.rand(classes * local, width))  # p^l, class by class
        self.global_prototypes = nn.Parameter(torch.rand(classes * whole, width))  # p^g
        # Where each prototype comes from: seed and index of a training scene and, for local ones, the patch; -1 = nowhere.
        self.local_sources = torch.full((classes * local, 3), -1)
        self.global_sources = torch.full((classes * whole, 2), -1)

    def votes(self, prototypes: Tensor) -> Tensor:
        """W transposed (M, K): 1 for the class of a prototype, -1/2 for the others."""
        own = torch.eye(self.classes, device=prototypes.device, dtype=prototypes.dtype)
        return (1.5 * own - 0.5).repeat_interleave(len(prototypes) // self.classes, 0)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class token (B, 1, d) and foreground patches (B, n, d) as the prototypes see them, and which patches (B, n)."""
        backbone = self.backbone
        blocks, prefix = list(backbone.blocks), backbone.num_prefix_tokens
        tokens = embed(backbone, images)  # (B, N, D)
        with capture(backbone, "attention") as record:
            for block in blocks[:-1]:
                tokens = block(tokens)
        kept = foreground([weights.detach() for weights in record["attention"]], prefix, self.keep)  # (B, n)
        tokens = backbone.norm(blocks[-1](keep_tokens(backbone, tokens, kept)))  # (B, prefix + n, D)
        return self.add_on(tokens[:, :1]), self.add_on(tokens[:, prefix:]), kept

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, 3, H, W)."""
        first, patches, _ = self.embed(images)
        return self.classify(similarity(first, self.global_prototypes), similarity(patches, self.local_prototypes))

    def classify(self, whole: Tensor, local: Tensor) -> Tensor:
        """Logits (B, K) from similarities of the class token (B, 1, Mg) and of the patches (B, n, Ml)."""
        of_whole = whole[:, 0] @ self.votes(self.global_prototypes)
        return self.weight * of_whole + (1 - self.weight) * local.amax(1) @ self.votes(self.local_prototypes)


def foreground(attention: list[Tensor], prefix: int, keep: int) -> Tensor:
    """The patches (B, keep) in ascending order that the class token's rollout through attention (B, h, N, N) is largest on."""
    row = torch.zeros_like(attention[0][:, 0, :1])  # (B, 1, N)
    row[..., 0] = 1
    for weights in reversed(attention):
        row = (row @ weights.mean(1) + row) / 2
    return row[:, 0, prefix:].topk(keep).indices.sort(-1).values


def similarity(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """s (B, n, M) of tokens (B, n, d) and prototypes (M, d): from nearly 0 to log(1 / epsilon) where they are equal."""
    squares = tokens.square().sum(-1, keepdim=True) + prototypes.square().sum(-1)
    distance = (squares - 2 * tokens @ prototypes.T).clamp(min=0)  # squared
    return ((distance + 1) / (distance + 1e-4)).log()


def concentration(maps: Tensor, places: Tensor, spread: float = 1.0, apart: float = 2.0) -> tuple[Tensor, Tensor]:
    """The two parts of the concentration loss, of the prototypes of one class in each picture.

    Args:
        maps: (B, m, n), similarity of m prototypes to n patches. places: (B, n, 2), row and column of these patches.
        spread: variance (patches squared) up to which a map costs nothing.
        apart: distance of two maps' means (patches) from which on they cost nothing.

    Returns:
        Excess of the variances, and lack of distance between the means.
    """
    share = maps / maps.sum(-1, keepdim=True)
    means = share @ places  # (B, m, 2)
    variance = (share * (places[:, None] - means[:, :, None]).square().sum(-1)).sum(
        -1
    ) / 2  # mean of rows' and columns'
    distance = (means[:, :, None] - means[:, None]).square().sum(-1).add(1e-12).sqrt()  # (B, m, m)
    others = 1 - torch.eye(maps.shape[1], device=maps.device, dtype=maps.dtype)
    return (variance - spread).relu().mean(), ((apart - distance).relu() * others).mean()


class Prototypes(NamedTuple):
    """What each prototype added to the logit, where it was found, and which training patch it is."""

    scores: Tensor  # (B, Ml) of the local prototypes: with global_scores they sum to the logit
    global_scores: Tensor  # (B, Mg)
    maps: Tensor  # (B, Ml, gh, gw) similarity of every foreground patch, 0 elsewhere
    best: Tensor  # (B, Ml) patch that is most similar, 0 to gh * gw - 1
    foreground: Tensor  # (B, gh, gw) bool
    of_target: Tensor  # (B, Ml) bool: prototypes of the class asked about
    sources: Tensor  # (B, Ml, 3) seed and index of the training scene and the patch that the prototype is; -1 = none
    logits: Tensor  # (B, K)

    def heatmap(self) -> Tensor:
        """(B, gh, gw): mean similarity to the local prototypes of the class, 0 outside the foreground."""
        own = self.of_target.to(self.maps.dtype)
        return torch.einsum("bm,bmyx->byx", own, self.maps) / own.sum(1)[:, None, None]

    def likenesses(self, row: int) -> list[Likeness]:
        """The local prototypes of the class in a picture, those that added most first."""
        own = self.of_target[row].nonzero()[:, 0].tolist()
        return [
            Likeness(f"{score:+.2f}", [int(self.best[row, k])], "is like that", self.sources[row, k].tolist())
            for score, k in sorted(((float(self.scores[row, k]), k) for k in own), reverse=True)
        ]


def explain(model: ProtoPFormer, images: Tensor, target: Tensor | None = None) -> Prototypes:
    """The logit of a class as a sum over prototypes, and where each local one was found.

    Args:
        model: a ProtoPFormer in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        Prototypes; ``.heatmap()`` is the mean similarity map of the class, (B, gh, gw).

    Raises:
        UnsupportedModel: the model has no prototypes.
        ValueError: see ``vitx.vit.check``; also NaN in the weights.

    Source: Xue et al. 2024 (IJCAI), as the authors' code computes it.
    """
    if not hasattr(model, "global_prototypes"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no global and local prototypes: the method explains only a ProtoPFormer, "
            "which was trained with them (the model protopformer-glyph)."
        )
    check(model.backbone, images, class_token=True)
    with torch.no_grad():
        first, patches, kept = model.embed(images)
        whole, local = similarity(first, model.global_prototypes), similarity(patches, model.local_prototypes)
        logits = require_finite(model, model.classify(whole, local))
        classes = target_classes(logits, target)  # (B,)
        highest, where = local.max(1)  # (B, Ml)
        votes_local, votes_whole = model.votes(model.local_prototypes), model.votes(model.global_prototypes)
        gh, gw = grid(model.backbone, images)
        index = kept[:, None].expand(-1, local.shape[2], -1)  # (B, Ml, n)
        maps = local.new_zeros(len(local), local.shape[2], gh * gw).scatter(2, index, local.transpose(1, 2))
        inside = torch.zeros(len(local), gh * gw, dtype=torch.bool, device=local.device).scatter(1, kept, True)
    return Prototypes(
        scores=(1 - model.weight) * highest * votes_local.T[classes],
        global_scores=model.weight * whole[:, 0] * votes_whole.T[classes],
        maps=maps.unflatten(2, (gh, gw)),
        best=kept.gather(1, where),
        foreground=inside.unflatten(1, (gh, gw)),
        of_target=votes_local.T[classes] > 0,
        sources=model.local_sources.to(images.device).expand(len(images), -1, -1).clone(),
        logits=logits,
    )


def load_pretrained(path) -> ProtoPFormer:
    """The model in a safetensors file, in eval mode; its metadata names the arguments and the prototypes' sources."""
    about, weights = stored(path)
    model = ProtoPFormer(VisionTransformer(**about["backbone"], num_classes=0), **about["head"])
    model.load_state_dict(weights)
    model.local_sources = torch.tensor(about["local_sources"])
    model.global_sources = torch.tensor(about["global_sources"])
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Each prototype is moved, after training, onto the nearest token of a training scene of its class, and the scene and patch
#    are stored with it, so that it can be shown (`sources`). The authors' code keeps the prototypes where training left them
#    and shows the patches that are most similar; the move is ProtoPNet's. A cluster loss of small weight, which pulls a patch
#    to each prototype of the class, makes it a short one.
# 2. Five local prototypes of a class, one for each part that a creature has, and three global ones, of 64 channels; the
#    authors train ten and ten of 192. The foreground has 30 of 196 patches, where they keep 81: a creature is smaller in its
#    picture than their birds, and the foreground would be background for the most part.
# 3. The rollout is the plain one, $(\bar A + I) / 2$ in each block. The authors' code sets the weakest nine tenths of each
#    attention matrix to zero and gives the identity the weight 0.2; their sparse masks need the deeper DeiT.
# 4. Patches outside the foreground are dropped before the last block, so the sequence is really shorter. The code masks them
#    in that block's softmax, which gives the kept tokens the same values up to its $\epsilon$ of $10^{-6}$.
# 5. The variance is the plain weighted one over the patches of the foreground; the code's is over the whole grid with an
#    $N / (N - 1)$, which is the same up to that factor.
# 6. The local prototypes must also name the class by themselves, in a cross-entropy of their own: the class token of the
#    model glyph, which is trained already, would otherwise leave them nothing to learn.
# 7. The backbone stays as it is, so that its attention goes on choosing the foreground. The authors fine-tune it.
#
# What the small model cannot show: twelve classes of drawn creatures that share their parts need no fine distinctions, and a
# backbone that had learned to see the parts makes easy work for prototypes. A token has seen the whole picture, so that the
# patch that is shown need not hold all that the prototype stands for. Most of the foreground lies on the creature anyway, so
# that most matches would by chance; by how much they exceed it is among the proofs on this page.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.prototypes(explain, "protopformer")
