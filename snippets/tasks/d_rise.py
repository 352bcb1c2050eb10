# %% [markdown]
# # D-RISE: the mean of random masks, weighted by how well the object is still detected
#
# What must be visible for the detector to find this object as it did? D-RISE asks the detector alone, not its inside. The
# picture $I$ is shown through $N$ random smooth masks $M_i$, and each mask counts as much as the best of the proposals
# $f(I \odot M_i)$ resembles the detection $d_t$ that is explained:
#
# $$S(\lambda) = \frac{1}{p\, N} \sum_{i=1}^{N} \max_{d_j \in f(I \odot M_i)} s(d_t, d_j)\; M_i(\lambda),\qquad
# s(d_t, d_j) = \operatorname{IoU}(L_t, L_j)\cdot \frac{P_t \cdot P_j}{\lVert P_t \rVert\, \lVert P_j \rVert}\cdot O_j$$
#
# with $L$ the box, $P$ the class probabilities and $O$ the objectness of a detection. A mask begins as a grid of cells, each
# open with probability $p$; it is enlarged bilinearly to one cell more than the picture and cut out at a random shift.
# Catalogue entry: `d-rise`; for classifiers `rise`. The same detector is explained by `generic-attention-detr` and `odam`.

# %%
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from vitx.vit import UnsupportedModel, check, pool_patches, random_masks, require_finite, to_grid


class Explained(NamedTuple):
    """One detected object of each picture, and what speaks for it."""

    relevance: Tensor  # (B, gh, gw), or (B, H, W) with ``pool=None``
    query: Tensor  # (B,) which object query
    label: Tensor  # (B,) the class by which it was asked for
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
    masks: int = 5000,
    cells: int = 16,
    probability: float = 0.5,
    chunk: int = 32,
    pool: str | None = "patch",
    generator: torch.Generator | None = None,
) -> Explained:
    """Mean similarity to a detected object, over masks, of what is detected where a patch is visible.

    Args:
        model: a detector in eval mode, such as ``detector-glyph``.
        images: (B, 3, H, W), normalised; a masked pixel tends to zero, the mean colour of the training data.
        target: (B,) class indices: the surest detection of that class is explained; None explains the surest of all.
        query: (B,) indices of object queries, to ask for a detection by its number.
        masks: N, the number of masks. cells: of the coarse grid along each side. probability: p, that a cell is open.
        chunk: pictures per forward pass; bounds the memory.
        pool: "patch" sums over every patch; None keeps the pixels, whose values are similarities.
        generator: draws the masks, the same for all pictures; None is a new one seeded 0.

    Returns:
        Explained; values of at least 0. Only differences within a map mean something: it is as high everywhere as the object
        is found through half of the picture.

    Raises:
        UnsupportedModel: the model is no detector.
        ValueError: see ``vitx.vit.check``; a number out of range, no such class or query, NaN in the weights.

    Source: Petsiuk et al. 2021, as other authors describe and implement it.
    """
    if not hasattr(model, "detect"):
        raise UnsupportedModel(
            f"{type(model).__name__} is no detector with object queries: the method explains one detected object "
            "(the model detector-glyph)."
        )
    check(model.encoder, images)
    mask_of = random_masks(images, masks, cells, probability, generator)
    total = torch.zeros_like(images[:, 0])  # (B, H, W)
    one = torch.arange(len(images), device=images.device)
    with torch.inference_mode():
        probabilities, boxes = model.detect(images)  # (B, Q, K + 1), (B, Q, 4)
        require_finite(model, probabilities)
        asked, label = model.ask(probabilities, target, query)
        box, classes = boxes[one, asked], probabilities[one, asked, :-1]  # L_t (B, 4), P_t (B, K)
        for pair in torch.arange(masks * len(images)).split(chunk):
            row, picture = pair // len(images), (pair % len(images)).to(images.device)
            mask = mask_of(row)  # (n, H, W)
            found = model.detect(images[picture] * mask[:, None])
            alike = similarity(found.probabilities, found.boxes, box[picture], classes[picture])  # (n,)
            total.index_add_(0, picture, alike[:, None, None] * mask)
    saliency = total / (probability * masks)  # E[M] = p
    patches = to_grid(model.encoder, images, pool_patches(model.encoder, saliency))  # (B, gh, gw)
    score = probabilities[one, asked, label].clone()
    return Explained(saliency if pool is None else patches, asked.clone(), label.clone(), score, box.clone())


def similarity(probabilities: Tensor, boxes: Tensor, box: Tensor, classes: Tensor) -> Tensor:
    """How much the best of the proposals is like the detection that is explained: (n,), from 0 to 1.

    Args:
        probabilities: (n, Q, K + 1) of the proposals, the last one for "no object". boxes: (n, Q, 4) left, top, right, bottom.
        box: L_t (n, 4). classes: P_t (n, K).
    """
    corner = torch.minimum(boxes[..., 2:], box[:, None, 2:]), torch.maximum(boxes[..., :2], box[:, None, :2])
    shared = (corner[0] - corner[1]).clamp(min=0).prod(-1)  # (n, Q)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, box[:, None])]
    iou = shared / (areas[0] + areas[1] - shared).clamp(min=torch.finfo(boxes.dtype).tiny)
    alike = cosine_similarity(probabilities[..., :-1], classes[:, None], dim=-1)  # (n, Q)
    return (iou * alike * (1 - probabilities[..., -1])).amax(1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The full text of the paper could not be read, and no code of its authors is known. The mechanism is that of its abstract and
#    its figure's caption; the three factors, the maximum over the proposals and the settings ($N = 5000$, $16 \times 16$ cells, $p = 0.5$)
#    are those on which implementations by others agree (they are named in the entry).
# 2. Objectness. A DETR has no such output: $O_j$ is one minus the probability of "no object". $P$ holds the probabilities of the
#    classes; the cosine does not care that they do not sum to one. All six queries are proposals, however unsure.
# 3. The masked picture darkens towards the mean colour of the training data. As in `rise` the grid of cells is mirrored at the border,
#    so that every pixel is visible with the same probability, and the sum is divided by $p N$, which changes no order.
# 4. The map of pixels is summed over every patch; `pool=None` gives the pixels.
#
# What the small model cannot show: it was trained with patches hidden at random, so masks surprise it less than they surprise a
# common detector. A cell of seven pixels is about one patch, and an object is a few dozen patches; with 500 masks the map is
# speckled, and a patch's value says less than its neighbourhood's.

# %%
if __name__ == "__main__":
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle
    from vitx import catalog, demo, glyphs, metrics, models, plot

    def frame(axes: Axes, box: Tensor, colour: str) -> None:
        left, top, right, bottom = box.tolist()
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.8))

    def show(scenes: glyphs.Scenes, options: dict[str, Any]) -> None:
        """Scenes of two creatures: true boxes in green, and for each creature its map and its detected box in red."""
        model: Any = models.load("detector-glyph").model
        images, pictures = glyphs.normalise(scenes.images), scenes.images.permute(0, 2, 3, 1).numpy()
        share = glyphs.patch_fraction(scenes.object_masks, (14, 14))
        rows = [[plot.Cell(picture, None, "true boxes")] for picture in pictures]
        boxes, hits = [], []
        for which, label in enumerate(scenes.labels.T):
            found = explain(model, images, label, **options)
            for row, cells in enumerate(rows):
                title = (
                    f"{glyphs.CLASS_NAMES[label[row]]}, query {int(found.query[row])}: {float(found.score[row]):.2f}"
                )
                cells.append(plot.Cell(pictures[row], found.relevance[row], title))
            boxes.append(found.box)
            hits.append(metrics.pointing_game(found.relevance, share[:, which]))
        settings = ", ".join(f"{name}={value}" for name, value in options.items())
        print(f"pointing game, {len(images)} scenes of two creatures, {settings}: {float(torch.cat(hits).mean()):.2f}")
        figure = plot.grid(rows, cell=2.4)
        for row in range(len(rows)):
            for which in (0, 1):
                frame(figure.axes[3 * row], scenes.boxes[row, which], "#009e73")
                frame(figure.axes[3 * row + 1 + which], boxes[which][row], "#e4002b")
        demo.show(figure, "d-rise")

    show(glyphs.scenes(3, 7, creatures=2), catalog.get(catalog.load(), "d-rise").quick)
