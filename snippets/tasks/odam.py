# %% [markdown]
# # ODAM: the gradient of one detection, place by place
#
# Which places made the detector say this class, or draw this side of the box, for this object and no other? Grad-CAM gives each
# channel of a feature map one weight, the mean of its gradient, and so shows all objects of the class. ODAM keeps a weight for
# every place: with $A_k$ the channels of the features between backbone and head, and $Y$ one number that the head says of
# one object,
#
# $$H = \operatorname{ReLU}\Big(\sum_k \Phi\Big(\frac{\partial Y}{\partial A_k}\Big) \odot A_k\Big)$$
#
# where $\Phi$ smooths each channel's gradient over neighbouring places. $Y$ is the probability of the class or one side of the
# box. Catalogue entry: `odam`. The same detector is explained by `generic-attention-detr` and `d-rise`; the classifiers'
# relative is `grad-cam`.

# %%
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vitx.vit import UnsupportedModel, check, grid, require_finite, to_grid

ATTRIBUTES = ("class", "left", "top", "right", "bottom")


class Explained(NamedTuple):
    """One detected object of each picture, and what speaks for it."""

    relevance: Tensor  # (B, gh, gw), at least 0
    query: Tensor  # (B,) which object query
    label: Tensor  # (B,) the class that is explained, or by which the box was asked for
    score: Tensor  # (B,) its probability
    box: Tensor  # (B, 4): left, top, right, bottom in pixels

    def heatmap(self) -> Tensor:
        """(B, gh, gw)."""
        return self.relevance


def explain(
    model: Any,
    images: Tensor,
    target: Tensor | None = None,
    *,
    query: Tensor | None = None,
    attribute: str = "class",
    smoothing: float = 1.0,
) -> Explained:
    """Gradient times feature of every patch, for one attribute of one detected object.

    Args:
        model: a detector in eval mode, such as ``detector-glyph``.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices: the surest detection of that class is explained; None explains the surest of all.
        query: (B,) indices of object queries, to ask for a detection by its number.
        attribute: "class" explains the probability of the class; "left", "top", "right" or "bottom" what moves that side of
            the box outwards.
        smoothing: standard deviation, in patches, of the Gaussian by which each channel's gradient is smoothed; 0 leaves it
            as it is, as the authors' code does.

    Returns:
        Explained; ``.heatmap()`` is H.

    Raises:
        UnsupportedModel: the model is no detector.
        ValueError: see ``vitx.vit.check``; no such class, query or attribute, negative smoothing, NaN in the weights.

    Source: Zhao, Chan 2023, by the figure of the framework and the authors' code.
    """
    if not hasattr(model, "detect"):
        raise UnsupportedModel(
            f"{type(model).__name__} is no detector with object queries: the method explains one detected object "
            "(the model detector-glyph)."
        )
    check(model.encoder, images)
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute must be one of {', '.join(ATTRIBUTES)}, not {attribute!r}.")
    if smoothing < 0:
        raise ValueError(f"smoothing must be at least 0, not {smoothing}.")
    one = torch.arange(len(images), device=images.device)
    with torch.no_grad():  # nothing below the features needs a graph
        features = model.memory(model.encoder.forward_features(images))  # (B, P, D): what the queries search
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        logits, boxes = model.read(model.decode(features).states[-1])
        require_finite(model, logits)
        probabilities, sides = logits.softmax(-1), model.pixels(boxes)  # (B, Q, K + 1), (B, Q, 4)
        asked, label = model.ask(probabilities.detach(), target, query)
        if attribute == "class":
            Y = probabilities[one, asked, label]  # (B,)
        else:
            side = ATTRIBUTES.index(attribute) - 1
            Y = sides[one, asked, side] * (-1 if side < 2 else 1)  # outwards is left, up, right, down
        (gradient,) = torch.autograd.grad(Y.sum(), features)
    rows, columns = grid(model.encoder, images)
    A, G = (t.detach().unflatten(1, (rows, columns)) for t in (features, gradient))  # (B, gh, gw, D)
    weights = torch.einsum("yi,bijk,xj->byxk", gaussian(rows, smoothing, A), G, gaussian(columns, smoothing, A))
    H = (weights * A).sum(-1).clamp(min=0)  # (B, gh, gw)
    return Explained(
        relevance=to_grid(model.encoder, images, H.flatten(1)),
        query=asked,
        label=label,
        score=probabilities.detach()[one, asked, label],
        box=sides.detach()[one, asked],
    )


def gaussian(size: int, deviation: float, like: Tensor) -> Tensor:
    """(size, size): a line of places to their means under a Gaussian, cut off at four deviations; the ends are repeated."""
    reach = int(4 * deviation + 0.5)
    offset = torch.arange(-reach, reach + 1)
    bell = torch.exp(-0.5 * (offset / max(deviation, 1e-9)) ** 2)
    place = (torch.arange(size)[:, None] + offset).clamp(0, size - 1)  # (size, 2 reach + 1)
    return torch.zeros(size, size).scatter_add_(1, place, (bell / bell.sum()).expand(size, -1)).to(like)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The full text of the paper could not be read. The map is that of its figure of the framework, with $\Phi$ named there a local
#    smoothing operation; a Gaussian and its width of one patch are choices made here. The authors' code smooths nothing: `smoothing=0`.
# 2. $Y$. The authors' code differentiates the score of the class, and the distances of the four sides from the place that predicts
#    them; so does this, with the probability, and with each side's position outwards, since a query has no place.
# 3. $A$. The authors take a level of the feature pyramid of FCOS or Faster R-CNN. Here the features between backbone and head are what
#    the queries search: the patch tokens behind the encoder's last norm, each with its place added. Without the places the maps of
#    the classes are as good, but those of the sides lie on the wrong side of the box: that a token lies left is half of what it says.
# 4. Maps are raw, where the code scales each to its largest value. The training by which the authors make the maps of neighbouring
#    objects differ (Odam-Train), and suppression by maps (Odam-NMS), are not here.
#
# What the small model cannot show: crowds, for which the method was made. Tokens have seen the whole picture through six layers, so a
# map's place is that of the token, not always of what it knows.

# %%
if __name__ == "__main__":
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle
    from vitx import demo, glyphs, metrics, models, plot

    def frame(axes: Axes, box: Tensor, colour: str) -> None:
        left, top, right, bottom = box.tolist()
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.8))

    def count(model: Any, scenes: glyphs.Scenes, smoothing: float) -> None:
        """Prints how well the maps of the creatures' classes fit what is known of them."""
        images, share = glyphs.normalise(scenes.images), glyphs.patch_fraction(scenes.object_masks, (14, 14))
        rows = []
        for which in (0, 1):
            found = explain(model, images, scenes.labels[:, which], smoothing=smoothing)
            own, other = (metrics.mass_inside(found.relevance, share[:, i]) for i in (which, 1 - which))
            rows.append(torch.stack([own, other, metrics.pointing_game(found.relevance, share[:, which])]))
        own, other, hit = torch.cat(rows, 1).mean(1).tolist()
        print(
            f"{len(images)} scenes of two creatures, smoothing={smoothing:g}: share of the map on the one asked about {own:.2f}, "
            f"on the other {other:.2f}; pointing game {hit:.2f}"
        )

    def show(model: Any, scenes: glyphs.Scenes) -> None:
        """Scenes of two creatures: the map of each class, and of two sides of the first box; true boxes in green."""
        images, pictures = glyphs.normalise(scenes.images), scenes.images.permute(0, 2, 3, 1).numpy()
        rows = [[plot.Cell(picture, None, "true boxes")] for picture in pictures]
        boxes = []
        for which, attribute in ((0, "class"), (1, "class"), (0, "left"), (0, "bottom")):
            found = explain(model, images, scenes.labels[:, which], attribute=attribute)
            for row, cells in enumerate(rows):
                title = f"{glyphs.CLASS_NAMES[scenes.labels[row, which]]}: {attribute}"
                cells.append(plot.Cell(pictures[row], found.relevance[row], title))
            boxes.append(found.box)
        figure = plot.grid(rows, cell=2.1)
        for row in range(len(rows)):
            for which in (0, 1):
                frame(figure.axes[5 * row], scenes.boxes[row, which], "#009e73")
            for column in range(4):
                frame(figure.axes[5 * row + 1 + column], boxes[column][row], "#e4002b")
        demo.show(figure, "odam")

    detector = models.load("detector-glyph").model
    for smoothing in (1.0, 0.0):
        count(detector, glyphs.scenes(100, 31, creatures=2), smoothing)
    show(detector, glyphs.scenes(3, 7, creatures=2))
