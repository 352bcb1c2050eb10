# %% [markdown]
# # ViT-NeT: a decision tree of prototypes reads the patches
#
# Which questions led to this class, and what did each of them find in the picture? A binary tree stands on the patch tokens
# of a Vision Transformer. Every inner node $i$ holds a prototype $p_i$ and asks whether some patch $z$ looks like it:
#
# $$s_i(z) = \log\frac{\lVert z - p_i\rVert + 1}{\lVert z - p_i\rVert + \epsilon},\qquad
# r_i = \min\big(1, \max_z s_i(z)\big),$$
#
# and sends the picture to the left with probability $r_i$, to the right with $1 - r_i$. On every edge a context module mixes
# what the whole picture holds into each patch, $z \leftarrow \sigma(\operatorname{LN}(z + f(\sum_z a_z z)))$ with
# $a = \operatorname{softmax}_z(w^\top z)$, so that deeper nodes compare refined patches. A leaf $l$ reads the maximum over its
# patches and answers with a distribution $q_l$ over the classes; the answer of the tree is
#
# $$P(c) = \sum_l \pi_l\, q_l(c),\qquad \pi_l = \prod_{i \to \text{left}} r_i \prod_{i \to \text{right}} (1 - r_i).$$
#
# The explanation of a class is the path to the leaf that adds most to it. Catalogue entry: `vit-net`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Likeness, UnsupportedModel, check, grid, require_finite, stored, target_classes


class Context(nn.Module):
    """The context modules on the edges to one level of the tree, one for each of its n nodes."""

    def __init__(self, nodes: int, width: int):
        super().__init__()
        self.attend = nn.Parameter(torch.zeros(nodes, width))  # w
        self.first = nn.Parameter(torch.randn(nodes, width, width) * width**-0.5)  # f: linear, norm, GELU, linear
        self.second = nn.Parameter(torch.randn(nodes, width, width) * width**-0.5)
        self.biases = nn.Parameter(torch.zeros(2, nodes, width))
        self.gains = nn.Parameter(torch.ones(2, nodes, width))  # of the norm inside f, and of the one behind
        self.shifts = nn.Parameter(torch.zeros(2, nodes, width))

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, n, P, d) of the parents, each parent twice, to (B, n, P, d) in (0, 1)."""
        share = torch.einsum("bnpd,nd->bnp", patches, self.attend).softmax(-1)
        x = torch.einsum("bnp,bnpd->bnd", share, patches)
        x = torch.einsum("bnd,nde->bne", x, self.first) + self.biases[0]
        x = nn.functional.gelu(nn.functional.layer_norm(x, x.shape[-1:]) * self.gains[0] + self.shifts[0])
        x = torch.einsum("bnd,nde->bne", x, self.second) + self.biases[1]
        x = nn.functional.layer_norm(patches + x[:, :, None], x.shape[-1:])
        return (x * self.gains[1][:, None] + self.shifts[1][:, None]).sigmoid()


class Walk(NamedTuple):
    """All that happens in the tree. Inner nodes are numbered level by level; the children of i are 2i + 1 and 2i + 2."""

    similarity: Tensor  # (B, I, P) of every patch to the prototype of every inner node, I = 2 ** depth - 1
    left: Tensor  # (B, I) probability of going left
    reach: Tensor  # (B, L) probability of arriving at each leaf, L = 2 ** depth
    answers: Tensor  # (B, L, K) the distribution of each leaf


class ViTNeT(nn.Module):
    """A neural tree decoder on the patch tokens of a Vision Transformer.

    Args:
        backbone: its patch tokens after the final norm are read; its own head is not used.
        classes: K. depth: of the tree, which has 2 ** depth leaves. width: d, of patches inside the tree.
        shortcut: let a linear head on the class token add its logits to those of every leaf, past the tree.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, depth: int = 4, width: int = 32, shortcut=False):
        super().__init__()
        leaves = 2**depth
        self.backbone, self.depth = backbone, depth
        self.add_on = nn.Linear(backbone.embed_dim, width, bias=False)
        self.prototypes = nn.Parameter(0.5 + 0.1 * torch.randn(leaves - 1, width))
        self.contexts = nn.ModuleList(Context(2 ** (level + 1), width) for level in range(depth))
        self.leaf_weight = nn.Parameter(torch.randn(leaves, width, classes) * width**-0.5)
        self.leaf_bias = nn.Parameter(torch.zeros(leaves, classes))
        self.leaf_gain = nn.Parameter(torch.ones(leaves, classes))  # of the norm over the classes
        self.leaf_shift = nn.Parameter(torch.zeros(leaves, classes))
        self.shortcut = nn.Linear(backbone.embed_dim, classes) if shortcut else None
        # Where each prototype comes from: seed and index of a training scene, and the patch; -1 = nowhere.
        self.sources = torch.full((leaves - 1, 3), -1)

    def levels(self, tokens: Tensor) -> list[Tensor]:
        """Patches (B, 2 ** level, P, d) as the nodes of each level see them, the leaves last, from tokens (B, N, D)."""
        levels = [self.add_on(tokens[:, self.backbone.num_prefix_tokens :]).sigmoid()[:, None]]
        for context in self.contexts:
            levels.append(context(levels[-1].repeat_interleave(2, 1)))
        return levels

    def walk(self, tokens: Tensor) -> Walk:
        """Routes and answers from the tokens (B, N, D) of the backbone."""
        levels, reach, maps = self.levels(tokens), tokens.new_ones(len(tokens), 1), []
        for level, patches in enumerate(levels[:-1]):
            prototypes = self.prototypes[2**level - 1 : 2 ** (level + 1) - 1]  # (n, d)
            maps.append(similarity(patches, prototypes))  # (B, n, P)
            left = maps[-1].amax(-1).clamp(max=1)
            reach = torch.stack([reach * left, reach * (1 - left)], -1).flatten(1)  # (B, 2n)
        shortcut = 0 if self.shortcut is None else self.shortcut(tokens[:, 0])[:, None]
        return Walk(
            torch.cat(maps, 1),
            torch.cat(maps, 1).amax(-1).clamp(max=1),
            reach,
            self.answer(levels[-1].amax(2), shortcut),
        )

    def answer(self, pooled: Tensor, shortcut: Tensor | float = 0) -> Tensor:
        """Distributions (B, L, K) of the leaves, from the maxima (B, L, d) over their patches."""
        votes = torch.einsum("bld,ldk->blk", pooled, self.leaf_weight) + self.leaf_bias + shortcut
        votes = nn.functional.layer_norm(votes, votes.shape[-1:])
        return (votes * self.leaf_gain + self.leaf_shift).softmax(-1)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms (B, K) of the class probabilities of normalised images (B, 3, H, W)."""
        return log_answer(self.walk(self.backbone.forward_features(images)))


def similarity(patches: Tensor, prototypes: Tensor) -> Tensor:
    """s (B, n, P) of the patches (B, n, P, d) of n nodes to the prototypes (n, d) of these nodes."""
    distance = ((patches - prototypes[:, None]).square().sum(-1) + 1e-12).sqrt()
    return ((distance + 1) / (distance + 1e-4)).log()


def log_answer(walk: Walk) -> Tensor:
    """log P(c), (B, K)."""
    return (torch.einsum("bl,blk->bk", walk.reach, walk.answers) + 1e-12).log()


class Tree(NamedTuple):
    """The path to the leaf that adds most to the class, and what each node on it found."""

    path: Tensor  # (B, depth) inner nodes from the root down
    turns: Tensor  # (B, depth) bool: True where the path goes left, for the prototype was found
    probabilities: Tensor  # (B, depth) of these turns; their product is the probability of the leaf
    leaf: Tensor  # (B,) 0 to L - 1, from left to right
    answer: Tensor  # (B, K) distribution of that leaf
    share: Tensor  # (B,) what the leaf adds to the probability of the class, as a share of it
    maps: Tensor  # (B, depth, gh, gw) similarity of every patch to the prototype of each node on the path
    best: Tensor  # (B, depth) patch that is most similar
    sources: Tensor  # (B, depth, 3) seed and index of the training scene and the patch that the prototype is; -1 = none
    logits: Tensor  # (B, K) log-probabilities of the whole tree

    def heatmap(self) -> Tensor:
        """(B, gh, gw): mean similarity over the nodes where the path goes left, or over all where it never does."""
        found = torch.where(self.turns.any(1, keepdim=True), self.turns, True).to(self.maps.dtype)
        return torch.einsum("bi,biyx->byx", found / found.sum(1, keepdim=True), self.maps)

    def likenesses(self, row: int) -> list[Likeness]:
        """The nodes on the path of a picture, from the root down."""
        found = []
        for step, node in enumerate(self.path[row].tolist()):
            left, chance = bool(self.turns[row, step]), float(self.probabilities[row, step])
            title = f"node {node}: {'left' if left else 'right'}, p = {chance:.2f}"
            relation = "is like that" if left else "is not like that"
            found.append(Likeness(title, [int(self.best[row, step])], relation, self.sources[row, step].tolist()))
        return found


def explain(model: ViTNeT, images: Tensor, target: Tensor | None = None) -> Tree:
    """The path through the tree to the leaf that adds most to the probability of a class.

    Args:
        model: a ViTNeT in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        Tree; ``.heatmap()`` is the mean similarity to the prototypes found on the path, (B, gh, gw).

    Raises:
        UnsupportedModel: the model has no tree.
        ValueError: see ``vitx.vit.check``; also NaN in the weights.

    Source: Kim, Nam, Ko 2022 (ICML), as the authors' code computes it.
    """
    if not hasattr(model, "walk"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no tree of prototypes: the method explains only a ViTNeT, which was trained with "
            "one (the model vit-net-glyph)."
        )
    check(model.backbone, images)
    with torch.no_grad():
        walk = model.walk(model.backbone.forward_features(images))
        logits = require_finite(model, log_answer(walk))
        classes = target_classes(logits, target)  # (B,)
        rows = torch.arange(len(images), device=images.device)
        added = walk.reach * walk.answers[rows, :, classes]  # (B, L)
        leaf = added.argmax(1)
        place = leaf + walk.reach.shape[1] - 1  # number of the leaf when the nodes are counted on
        path, turns = [], []
        for _ in range(model.depth):  # from the leaf up
            turns.append(place % 2 == 1)
            place = (place - 1) // 2
            path.append(place)
        path, turns = torch.stack(path[::-1], 1), torch.stack(turns[::-1], 1)  # (B, depth)
        left, maps = walk.left.gather(1, path), walk.similarity[rows[:, None], path]  # (B, depth), (B, depth, P)
    return Tree(
        path=path,
        turns=turns,
        probabilities=torch.where(turns, left, 1 - left),
        leaf=leaf,
        answer=walk.answers[rows, leaf],
        share=added.amax(1) / added.sum(1),
        maps=maps.unflatten(-1, grid(model.backbone, images)),
        best=maps.argmax(-1),
        sources=model.sources.to(images.device)[path],
        logits=logits,
    )


def load_pretrained(path) -> ViTNeT:
    """The model in a safetensors file, in eval mode; its metadata names the arguments and the prototypes' sources."""
    about, weights = stored(path)
    model = ViTNeT(VisionTransformer(**about["backbone"], num_classes=0), **about["tree"])
    model.load_state_dict(weights)
    model.sources = torch.tensor(about["sources"])
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The backbone is a plain Vision Transformer of 196 patches; the authors' is a Swin Transformer. Tree of depth 4 as theirs.
# 2. Nothing goes past the tree. In the authors' code every leaf adds the logits of the backbone's own head to its own, so
#    that the tree need not decide much; `ViTNeT(..., shortcut=True)` does the same.
# 3. The routing probability is clipped to one. In the code $\log((d + 1) / (d + \epsilon))$ may exceed one, and the
#    probability of the other side is then negative.
# 4. Beside the cross-entropy a second loss maximises the mutual information of leaf and class, with which the leaves come to
#    hold few classes each within a short training. The code has no such loss.
# 5. After training every prototype is moved onto the nearest patch of a training scene, as that patch is seen at its node,
#    and the scene is stored (`sources`); then the leaves alone are trained on. The code shows the nearest patch without
#    moving the prototype.
#
# What the small model shows, and cannot show: it is as accurate along one path as with the whole tree, but many of its
# prototypes are patches of the background, and are found there. The patches have seen the whole picture, twice over:
# through the backbone and through the context modules, so that any of them can hold what the class is. How many of the
# prototypes lie on creatures, and how much more often than by chance they are found there, is among the proofs on this
# page. Twelve classes need few questions, where the authors' trees sort two hundred birds.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.prototypes(explain, "vit-net", lambda found, row: f"leaf {found.leaf[row]}, share {found.share[row]:.2f}")
