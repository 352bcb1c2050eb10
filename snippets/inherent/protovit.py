# %% [markdown]
# # ProtoViT: prototypes of sub-patches that adapt to the picture
#
# Which training example does this part look like, if the part may bend? A prototype is a handful of sub-prototypes
# $p_{j,1}, \dots, p_{j,S}$, each as large as one patch. They are matched one by one to patches $x_i = z_i - z_\text{cls}$ of
# the picture, greedily by cosine similarity: the best pair of any free sub-prototype and any free patch first, and each
# next patch within $r$ rows and columns of the one before. With the matched patches $i(s)$,
#
# $$g_j = \frac{S}{\sum_s v_{j,s}} \sum_{s=1}^{S} v_{j,s}\,\cos(p_{j,s}, x_{i(s)}),\qquad y = W g,$$
#
# where $v_{j,s}$ is one for the sub-prototypes that were kept and zero for the others, so that a prototype may have less than
# $S$ of them. $W$ starts at 1 for prototypes of the class and $-\tfrac12$ for others. A coherence loss keeps the parts of a
# prototype alike. Catalogue entry: `protovit`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Likeness, UnsupportedModel, check, grid, require_finite, stored, target_classes


class Match(NamedTuple):
    """What greedy matching found."""

    cosines: Tensor  # (B, M, S) of each sub-prototype and its patch
    patches: Tensor  # (B, M, S) these patches, 0 to P - 1, no two of a prototype alike


class ProtoViT(nn.Module):
    """A Vision Transformer that classifies by prototypes of adaptable sub-patches.

    Args:
        backbone: with a class token; its own head is not used.
        classes: K. each: prototypes of a class. parts: S. radius: r, in patches.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, each: int = 4, parts: int = 4, radius: int = 1):
        super().__init__()
        self.backbone, self.classes, self.radius = backbone, classes, radius
        self.prototypes = nn.Parameter(torch.randn(classes * each, parts, backbone.embed_dim))  # class by class
        self.select = nn.Parameter(torch.full((classes * each, parts), 0.1))  # a part is kept while it is positive
        own = torch.eye(classes).repeat_interleave(each, 1)  # (K, M)
        self.last = nn.Parameter(1.5 * own - 0.5)  # W
        # Where each prototype comes from: seed and index of a training scene, and S patches; -1 = nowhere.
        self.sources = torch.full((classes * each, 2 + parts), -1)

    def focus(self, images: Tensor) -> Tensor:
        """x (B, P, D): patch tokens less the class token."""
        tokens = self.backbone.forward_features(images)
        return tokens[:, self.backbone.num_prefix_tokens :] - tokens[:, :1]

    def match(self, x: Tensor, near: Tensor) -> Match:
        """Greedy matching of all prototypes to x (B, P, D); near (P, P) bool says which patches are neighbours."""
        unit = nn.functional.normalize
        cosines = torch.einsum("bpd,msd->bmsp", unit(x, dim=-1), unit(self.prototypes, dim=-1))  # (B, M, S, P)
        batch, count, parts, places = cosines.shape
        free_part = torch.ones(batch, count, parts, dtype=torch.bool, device=x.device)
        free_patch = torch.ones(batch, count, places, dtype=torch.bool, device=x.device)
        allowed = free_patch
        patches = torch.zeros(batch, count, parts, dtype=torch.long, device=x.device)
        for _ in range(parts):
            open_pairs = free_part[..., None] & (allowed & free_patch)[:, :, None]
            best = cosines.detach().masked_fill(~open_pairs, -torch.inf).flatten(2).argmax(-1)  # (B, M)
            part, patch = (best // places)[..., None], (best % places)[..., None]  # (B, M, 1)
            patches = patches.scatter(2, part, patch)
            free_part = free_part.scatter(2, part, False)
            free_patch = free_patch.scatter(2, patch, False)
            allowed = near[patch[..., 0]]
        return Match(cosines.gather(3, patches[..., None])[..., 0], patches)

    def weights(self) -> Tensor:
        """(M, S): v, scaled so that those of a prototype sum to S."""
        kept = kept_parts(self.select).to(self.select.dtype)
        return kept * kept.shape[1] / kept.sum(1, keepdim=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, 3, H, W)."""
        found = self.match(self.focus(images), neighbours(grid(self.backbone, images), self.radius, images.device))
        return (found.cosines * self.weights()).sum(-1) @ self.last.T


def kept_parts(select: Tensor) -> Tensor:
    """Which sub-prototypes are kept, (M, S) bool: the positive ones, and in any case the greatest."""
    return (select > 0) | (select == select.amax(1, keepdim=True))


def neighbours(shape: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """(P, P) bool: patches of a grid that lie at most ``radius`` rows and columns apart."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)  # (P, 2)
    return (places[:, None] - places).abs().amax(-1) <= radius


def incoherence(prototypes: Tensor) -> Tensor:
    """(M,): the coherence loss, largest cosine distance between two of a prototype's parts, from (M, S, D)."""
    unit = nn.functional.normalize(prototypes, dim=-1)
    return (1 - unit @ unit.transpose(1, 2)).flatten(1).amax(1)


class Prototypes(NamedTuple):
    """What each prototype added to the logit, where its parts were found, and which training patches they are."""

    scores: Tensor  # (B, M); they sum to the logit
    cosines: Tensor  # (B, M, S) of each part and its patch
    patches: Tensor  # (B, M, S) these patches, 0 to gh * gw - 1
    weights: Tensor  # (B, M, S) of the parts: 0 where a part was left out, and S in sum
    of_target: Tensor  # (B, M) bool: prototypes of the class asked about
    sources: Tensor  # (B, M, 2 + S) seed and index of the training scene, and the patches that the parts are; -1 = none
    map: Tensor  # (B, gh, gw) what the class's own prototypes added at each patch
    logits: Tensor  # (B, K)

    def heatmap(self) -> Tensor:
        """(B, gh, gw): what the class's own prototypes added to the logit at each patch; sums to their scores."""
        return self.map

    def likenesses(self, row: int) -> list[Likeness]:
        """The prototypes of the class in a picture, those that added most first, by the parts that were kept."""
        own, found = self.of_target[row].nonzero()[:, 0].tolist(), []
        for score, k in sorted(((float(self.scores[row, k]), k) for k in own), reverse=True):
            kept, (seed, index, *source) = self.weights[row, k] > 0, self.sources[row, k].tolist()
            places = [patch for patch, keep in zip(source, kept.tolist(), strict=True) if keep]
            patches = self.patches[row, k][kept].tolist()
            found.append(Likeness(f"{score:+.2f}", patches, "is like that", [seed, index, *places]))
        return found


def explain(model: ProtoViT, images: Tensor, target: Tensor | None = None) -> Prototypes:
    """The logit of a class as a sum over prototypes, their parts, and the patches these were matched to.

    Args:
        model: a ProtoViT in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        Prototypes; ``.heatmap()`` is what the prototypes of the class added at each patch, (B, gh, gw).

    Raises:
        UnsupportedModel: the model has no prototypes of sub-patches.
        ValueError: see ``vitx.vit.check``; also NaN in the weights.

    Source: Ma et al. 2024 (NeurIPS), as the authors' code computes it.
    """
    if not hasattr(model, "match"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no prototypes of sub-patches: the method explains only a ProtoViT, which was "
            "trained with them (the model protovit-glyph)."
        )
    check(model.backbone, images, class_token=True)
    with torch.no_grad():
        shape = grid(model.backbone, images)
        found = model.match(require_finite(model, model.focus(images)), neighbours(shape, model.radius, images.device))
        weights = model.weights()
        logits = require_finite(model, (found.cosines * weights).sum(-1) @ model.last.T)
        classes = target_classes(logits, target)  # (B,)
        parts = model.last[classes][..., None] * weights * found.cosines  # (B, M, S)
        each = len(model.prototypes) // model.classes
        own = torch.arange(len(model.prototypes), device=images.device) // each == classes[:, None]  # (B, M)
        places = shape[0] * shape[1]
        added = parts.new_zeros(len(images), places).scatter_add(
            1, found.patches.flatten(1), (parts * own[..., None]).flatten(1)
        )
    return Prototypes(
        scores=parts.sum(-1),
        cosines=found.cosines,
        patches=found.patches,
        weights=weights.expand(len(images), -1, -1).clone(),
        of_target=own,
        sources=model.sources.to(images.device).expand(len(images), -1, -1).clone(),
        map=added.unflatten(1, shape),
        logits=logits,
    )


def load_pretrained(path) -> ProtoViT:
    """The model in a safetensors file, in eval mode; its metadata names the arguments and the prototypes' sources."""
    about, weights = stored(path)
    model = ProtoViT(VisionTransformer(**about["backbone"], num_classes=0), **about["head"])
    model.load_state_dict(weights)
    model.sources = torch.tensor(about["sources"])
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Four prototypes of a class with four parts each; the authors have ten with four.
# 2. Which parts are kept is a yes or no here. During their second stage the authors train the slots $v$ through a steep
#    sigmoid; here they are trained in that way after the prototypes have been moved onto training patches, with everything
#    else fixed, and then rounded. Parts that are left out still take part in the matching, as in the authors' code.
# 3. The neighbours of a step are those of the patch matched just before, as in the code, so that the parts form a chain; with
#    $r = 1$ as in the authors' settings. Where two parts match equally well the order decides the chain, so that a prototype
#    need not find all of its own patches again, not even in its own scene.
# 4. The coherence loss compares every pair of parts. The code sums over the pairs, but hands on the distance to the last part
#    only.
# 5. The last layer is trained once more in the end with an L1 penalty on what it gives to other classes, as by the authors.
# 6. Prototypes begin as the patches of a scene to which the class token attends most, with their neighbours; the authors'
#    begin as random numbers. At random places of a scene they would begin in the background for the most part.
#
# What the small model cannot show: twelve classes of drawn creatures that share their parts need no fine distinctions. A
# patch token has seen the whole picture, and the class token is taken from it, so that the patches that are shown need not
# hold all that the prototype stands for.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.prototypes(explain, "protovit")
