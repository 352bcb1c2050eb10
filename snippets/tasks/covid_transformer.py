# %% [markdown]
# # Grad-CAM on the pictures of a screening model
#
# A Vision Transformer is trained to tell chest X-rays of healthy, of COVID-19 and of otherwise infected lungs apart, and
# Grad-CAM is drawn over each picture, so that a radiologist can see where the finding is said to be and follow it as the
# disease goes on. With the patch tokens as positions and the channels $A^k$ of one layer,
#
# $$\alpha_k^c = \frac1P \sum_{p} \frac{\partial y^c}{\partial A^k_{p}},\qquad
# L^c_p = \mathrm{ReLU}\Big(\sum_k \alpha_k^c A^k_p\Big).$$
#
# The map is `grad-cam`'s; what is asked of it here is whether it lies on the lesion, and whether it grows with it.
# Catalogue entry: `covid-transformer`.

# %%
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, features_and_gradient, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, layer: int = -1) -> Tensor:
    """Grad-CAM of the class that the screening model sees.

    Args:
        model: timm VisionTransformer in eval mode, such as the model lesion.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.

    Returns:
        (B, gh, gw); values of at least 0. All zero when nothing in the layer speaks for the class.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; no such layer.

    Source: Shome et al. 2021, abstract; Grad-CAM is that of Selvaraju et al. 2017, equations 1 and 2.
    """
    check(model, images)
    features, gradient = features_and_gradient(model, images, target, layer)  # (B, P, D): A and dy/dA
    weights = gradient.mean(1, keepdim=True)  # (B, 1, D): alpha_k
    return to_grid(model, images, (weights * features).sum(-1).relu())


def course(model: VisionTransformer, visits: Tensor, target: Tensor) -> Tensor:
    """Total relevance of the class at every visit of each patient: (B, T).

    Args:
        visits: (B, T, 3, H, W), normalised pictures of the same place over time. target: (B,) class indices.
    """
    maps = explain(model, visits.flatten(0, 1), target.repeat_interleave(visits.shape[1]))
    return maps.sum((1, 2)).unflatten(0, visits.shape[:2])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. **Nothing here is medical.** The paper's model reads chest X-rays, 30,000 of them from three collections. The model
#    `lesion` reads invented eyes with painted blots (`vitx.lesions`); the demo's last row is scikit-image's photograph of a
#    retina on which a blot is painted. No number here says anything about lungs, patients or a disease.
# 2. Taken over: classification of whole pictures by a Vision Transformer and Grad-CAM over them. Which layer the paper
#    reads, and the rest of its text, could not be looked up: we read the input of the last block's attention, the last
#    place where the patches still reach the head of a class-token model.
# 3. The paper says that the maps can be used to follow a disease and leaves this to the eye. `course` is our reading of it:
#    the same eye with its lesions painted ever larger, and the total relevance beside the true area. On 60 invented eyes
#    the total does not follow the area (rank correlation -0.2; of the share of patches above half the peak, 0.3), so a
#    Grad-CAM map must not be read as the size of a lesion. Nor is it always on the lesion: its peak is in 3 of 5 pictures
#    with bright specks and 4 of 5 with pale patches, but in 1 of 7 with dark blots, which the model names all the same.
# 4. What the small model cannot show: whether maps over X-rays lie on the lung's changes or on marks and borders, for which
#    such collections are known. Here the lesion is the only thing that tells the classes apart.

# %%
if __name__ == "__main__":
    from skimage import data
    from vitx import demo, glyphs, images, lesions, metrics, models, plot

    def show(seed: int) -> None:
        """Where the maps lie, how they grow with the lesions, and pictures of both."""
        loaded = models.load("lesion")
        model: Any = loaded.model
        labels = torch.arange(60) % 3 + 1
        scenes = lesions.scenes(60, seed, labels=labels)
        maps = explain(model, glyphs.normalise(scenes.images), labels)
        grades, chance = lesions.grade(maps, scenes.masks), lesions.grade(maps.roll(1, 0), scenes.masks)
        for name, values in grades._asdict().items():
            print(f"{name}: {float(values.mean()):.2f}, by chance {float(getattr(chance, name).mean()):.2f}")

        steps = [lesions.scenes(60, seed, labels=labels, scale=scale) for scale in (0.5, 0.75, 1.0, 1.25, 1.5)]
        visits = glyphs.normalise(torch.stack([step.images for step in steps], 1))
        area = torch.stack([step.masks.flatten(1).sum(1) for step in steps], 1).float()
        agreement = metrics.rank_correlation(course(model, visits, labels), area)
        print(f"rank correlation of total relevance and true area over five sizes: {float(agreement.mean()):.2f}")

        retina = loaded.preprocess(images.Image.fromarray(data.retina()))
        plain = torch.as_tensor(images.to_array(retina, loaded.mean, loaded.std)).permute(2, 0, 1)[None]
        painted = lesions.paint(plain, torch.tensor([1]), seed)
        shown = lesions.Scenes(*(torch.cat([a[:3], b]) for a, b in zip(scenes, painted, strict=True)))
        x = glyphs.normalise(shown.images)
        with torch.no_grad():
            predicted = [lesions.CLASS_NAMES[label] for label in model(x).argmax(1)]
        maps, rows = explain(model, x, shown.labels), []
        for row, picture in enumerate(shown.images.permute(0, 2, 3, 1).numpy()):
            what = "photograph, painted: " if row == 3 else "invented: "
            cells = [
                plot.Cell(picture, None, what + lesions.CLASS_NAMES[shown.labels[row]]),
                plot.Cell(picture, glyphs.patch_fraction(shown.masks[row], (56, 56)), "truth"),
                plot.Cell(picture, maps[row], f"Grad-CAM (predicts {predicted[row]})"),
            ]
            if row < 3:
                for at in (0, 4):
                    later = steps[at].images[row].permute(1, 2, 0).numpy()
                    found = explain(model, visits[row : row + 1, at], labels[row : row + 1])[0]
                    title = f"{'small' if at == 0 else 'large'}: total {float(found.sum()):.1f}"
                    cells.append(plot.Cell(later, found, title))
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.2), "covid-transformer")

    show(seed=11)
