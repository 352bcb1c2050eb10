# %% [markdown]
# # TransPose: what a keypoint depends on
#
# A pose estimator says where each keypoint is. Which places of the picture told it? TransPose predicts a heat map for each
# keypoint with a transformer, so that the last attention layer can answer. The head reads the output $z_i$ of every place alone,
# and a keypoint is where its map is highest. What reaches that place from another one in the last layer has been weighted by
# attention, so with $v_j$ the values of place $j$ in one head of that layer,
#
# $$h_i^{(k)} = w_k^\top z_i + b_k,\qquad i^{*}_k = \operatorname*{arg\,max}_i\, h_i^{(k)},\qquad
# \frac{\partial h_i^{(k)}}{\partial v_j} = A_{ij}\, g_i^{(k)},\qquad D_k = \big(A_{i^{*}_k\,j}\big)_j .$$
#
# The factor $g_i^{(k)}$ is the same for all $j$. The row of the maximum therefore tells how strongly it responds to every place:
# it is the keypoint's dependency area $D_k$. Training raises $h$ at the true place, and inference looks for the place where $h$ is
# highest: the authors call this activation maximisation, over places of one picture instead of over pictures.
# Catalogue entry: `transpose`. As a map of attention alone it has the limits of `raw-attention`.

# %%
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, capture, check, grid, require_finite, stored, target_classes


class PoseTransformer(VisionTransformer):
    """A Vision Transformer whose patch tokens predict a heat map for each keypoint, at twice the resolution of the patches.

    Args:
        keypoints: K names. options: of timm's ``VisionTransformer``.
    """

    def __init__(self, keypoints: tuple[str, ...], **options: Any):
        super().__init__(num_classes=0, **options)
        self.class_names, self.num_classes = keypoints, len(keypoints)
        # Stride and size are equal: every value comes from one token, four values from each.
        self.keypoint_head = nn.ConvTranspose2d(self.embed_dim, len(keypoints), 2, stride=2)

    def heatmaps(self, tokens: Tensor) -> Tensor:
        """h (B, K, 2 gh, 2 gw) of final tokens (B, N, D) of pictures or of square crops of them."""
        patches = tokens[:, self.num_prefix_tokens :].mT  # (B, D, P)
        size = self.patch_embed.grid_size
        if patches.shape[2] != size[0] * size[1]:
            size = (round(patches.shape[2] ** 0.5),) * 2
        return self.keypoint_head(patches.unflatten(2, size))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """How high the maximum of each keypoint's map is, (B, K), of final tokens (B, N, D)."""
        return self.heatmaps(x).amax((2, 3))


class Pose(NamedTuple):
    """Keypoints, and the places that each of them depends on."""

    names: tuple[str, ...]  # K
    scores: Tensor  # (B, K): height of the maximum, about 1 where the model is sure
    attention: Tensor  # (B, K, gh, gw), at least 0: D, the dependency areas
    places: Tensor  # (B, K, 2): x and y of the keypoint in pixels
    chosen: Tensor  # (B,): the keypoint that was asked for

    def heatmap(self) -> Tensor:
        """(B, gh, gw): the dependency area of the keypoint that was asked for."""
        return self.attention[torch.arange(len(self.chosen)), self.chosen]


def explain(
    model: PoseTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    mode: str = "dependency",
) -> Pose:
    """Keypoints of a picture and the area that each depends on.

    Args:
        model: a ``PoseTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) indices of keypoints, for ``heatmap()``; None takes the keypoint with the highest maximum.
        layer: whose attention is shown. The argument above holds for the last.
        mode: "dependency" shows the row of the keypoint's place, from where it takes; "affect" the column, where it gives.

    Returns:
        Pose. Attention is averaged over the heads; what goes to the class token is left out, so an area may sum to less than 1.

    Raises:
        UnsupportedModel: a model without keypoint heat maps.
        ValueError: see ``vitx.vit.check``; no such layer or mode.

    Source: Yang et al. 2021, by the authors' code, visualize.py: inspect_atten_map_by_locations.
    """
    check(model, images)
    if not hasattr(model, "keypoint_head"):  # not isinstance: in a notebook PoseTransformer exists twice
        raise UnsupportedModel("this model predicts no keypoint heat maps: train it to, as pose-glyph was.")
    if mode not in ("dependency", "affect"):
        raise ValueError(f'mode must be "dependency" or "affect", not {mode!r}.')
    if not -len(model.blocks) <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is out of range: the model has {len(model.blocks)} blocks.")
    with torch.no_grad(), capture(model, "attention") as record:
        h = require_finite(model, model.heatmaps(model.forward_features(images)))  # (B, K, 2 gh, 2 gw)
    scores, best = h.flatten(2).max(2)  # (B, K)
    row, column = best // h.shape[3], best % h.shape[3]
    gh, gw = grid(model, images)
    at = (row // 2) * gw + column // 2  # (B, K): the patch of the maximum, i*
    prefix = model.num_prefix_tokens
    A = record["attention"][layer].mean(1)[:, prefix:, prefix:]  # (B, P, P)
    if mode == "affect":
        A = A.mT
    areas = A.gather(1, at[..., None].expand(-1, -1, A.shape[2]))  # (B, K, P)
    cell = torch.tensor([images.shape[3] / h.shape[3], images.shape[2] / h.shape[2]]).to(
        images
    )  # width, height in pixels
    return Pose(
        names=model.class_names,
        scores=scores,
        attention=areas.unflatten(2, (gh, gw)),
        places=(torch.stack([column, row], -1) + 0.5) * cell,
        chosen=target_classes(scores, target),
    )


def centres(masks: Tensor) -> Tensor:
    """x and y (..., 2) in pixels of the middle of masks (..., H, W): the true keypoints are those of a creature's parts."""
    weights = masks.float()
    total = weights.sum((-2, -1)).clamp(min=1)
    x, y = (torch.arange(size) + 0.5 for size in (masks.shape[-1], masks.shape[-2]))
    return torch.stack([(weights.sum(-2) * x).sum(-1), (weights.sum(-1) * y).sum(-1)], -1) / total[..., None]


def load_pretrained(path) -> PoseTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the keypoints and the backbone's arguments."""
    metadata, weights = stored(path)
    model = PoseTransformer(tuple(metadata["keypoints"]), **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Written from the authors' code, the abstract and the beginning of the introduction; the rest of the paper's text could not be
#    read. The derivative above is our way to say that the last layer aggregates what forms the maximum; it is exact.
# 2. The model. Patches of a Vision Transformer stand for the features of a convolutional network, and pre-norm blocks with a class
#    token for a post-norm encoder. The head gives $2 \times 2$ cells for each patch without overlap, so that a value of the heat
#    map comes from one token; TransPose-R has an overlapping transposed convolution there, TransPose-H a $1 \times 1$ one.
# 3. Keypoints are the middles of the maps' highest cells, of 4 pixels. The authors fit the top by a Taylor expansion and average
#    over the mirrored picture.
# 4. Attention is averaged over heads, as in the authors' figures. They show every layer and one threshold for display; here
#    `layer` chooses, and nothing is cut off. `mode="affect"` is theirs too.
#
# What the small model cannot show: people, joints that hide each other, a skeleton learned from many poses. A creature's parts
# have fixed places on it, up to tilt and mirroring, so that any part tells something of the others. On its card a keypoint's area
# is compared with the mean area of the other keypoints ("other"), with an even spread ("uniform") and with the area in another
# scene ("chance"). More than half of an area lies on the background, although all that can tell a keypoint is on the creature:
# here as elsewhere, attention is not evidence.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, metrics, models, plot

    def show(seed: int) -> None:
        """A scene, and the same scene without its tail: true (o) and found (x) keypoints, and what each depends on."""
        model: Any = models.load("pose-glyph").model
        scene = glyphs.scenes(1, seed)
        pictures = torch.cat([scene.images, glyphs.without_part(scene, "tail")])
        found, truth = explain(model, glyphs.normalise(pictures)), centres(scene.part_masks[0, 0])
        rows = []
        for row, name in enumerate(("all parts", "without its tail")):
            picture = pictures[row].permute(1, 2, 0).numpy()
            cells = [plot.Cell(picture, None, f"{name}: true o, found x")]
            for k, part in enumerate(found.names):
                cells.append(plot.Cell(picture, found.attention[row, k], f"{part}: {float(found.scores[row, k]):.2f}"))
            rows.append(cells)
        figure = plot.grid(rows, cell=2.1)
        for place, axes in enumerate(figure.axes):
            row, column = divmod(place, len(rows[0]))
            for k, colour in enumerate(("#e4002b", "#0072b2", "#f0e442", "#009e73", "#cc79a7")):
                if column in (0, k + 1):
                    axes.plot(*found.places[row, k].tolist(), "x", color=colour, markersize=7, markeredgewidth=2)
                if column == 0:
                    axes.plot(*truth[k].tolist(), "o", color=colour, markersize=7, markerfacecolor="none")
        demo.show(figure, "transpose")

    def count(scenes: int, seed: int) -> None:
        """Print how near the keypoints are, and how much of each area lies on its own part."""
        model: Any = models.load("pose-glyph").model
        drawn = glyphs.scenes(scenes, seed)
        found = explain(model, glyphs.normalise(drawn.images))
        error = (found.places - centres(drawn.part_masks[:, 0])).norm(dim=-1).mean(0)
        on_part = glyphs.patch_fraction(drawn.part_masks[:, 0], (14, 14))
        for k, part in enumerate(found.names):
            own = metrics.mass_inside(found.attention[:, k], on_part[:, k]).mean()
            even = on_part[:, k].mean()
            print(f"{part}: {error[k]:.1f} pixels off, {own:.0%} of its area on the part (spread evenly: {even:.0%})")

    show(seed=7)
    count(40, seed=8)
