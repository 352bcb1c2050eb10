"""The comparison figure: pictures in rows, methods in columns, on photographs and on glyph scenes with their truth."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vitx import catalog, glyphs, images, load, models, plot, vit
from vitx.plot import heatmap

PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket", "motorcycle")
GLYPH_SEED, GLYPH_SCENES = 41, 5  # two creatures each


def photograph_maps(id: str) -> Tensor:
    """Maps (pictures, gh, gw) of one method for the class that ``photo`` predicts for each sample photograph."""
    loaded = models.load("photo")
    x = torch.stack([loaded.preprocess(images.open_image(name)) for name in PHOTOGRAPHS])
    return heatmap(load(id)(loaded.model, x))


def scene_maps(id: str) -> Tensor:
    """Maps (2 scenes, gh, gw) of one method: every scene of two creatures, asked for the first, then for the second."""
    loaded = models.load("glyph")
    scenes = glyphs.scenes(GLYPH_SCENES, GLYPH_SEED, creatures=2)
    x = glyphs.normalise(scenes.images).repeat_interleave(2, 0)
    return heatmap(load(id)(loaded.model, x, scenes.labels.flatten()))


def photographs(maps: dict[str, Tensor]) -> Figure:
    """Sample photographs by methods; ``maps`` from ``photograph_maps``."""
    loaded = models.load("photo")
    x = torch.stack([loaded.preprocess(images.open_image(name)) for name in PHOTOGRAPHS])
    with torch.inference_mode():
        predicted = loaded.model(x).argmax(-1)
    rows = []
    for index, (normalised, label) in enumerate(zip(x, predicted, strict=True)):
        picture = images.to_array(normalised, loaded.mean, loaded.std)
        title = f"{PHOTOGRAPHS[index]}: {loaded.class_names[label]}"
        rows.append(_row(picture, None, title, {id: m[index] for id, m in maps.items()}, named=index == 0))
    return plot.grid(rows)


def scenes(maps: dict[str, Tensor]) -> Figure:
    """Glyph scenes by methods, each scene asked for both of its creatures; ``maps`` from ``scene_maps``."""
    loaded = models.load("glyph")
    drawn = glyphs.scenes(GLYPH_SCENES, GLYPH_SEED, creatures=2)
    grid = vit.grid(loaded.model, drawn.images)  # type: ignore[arg-type]
    rows = []
    for index in range(2 * GLYPH_SCENES):
        scene, creature = divmod(index, 2)
        picture = drawn.images[scene].permute(1, 2, 0).numpy()
        title = f"asked for {glyphs.CLASS_NAMES[drawn.labels[scene, creature]]}"
        truth = glyphs.patch_fraction(drawn.object_masks[scene, creature], grid)
        rows.append(_row(picture, truth, title, {id: m[index] for id, m in maps.items()}, named=index == 0))
    return plot.grid(rows)


def _row(picture, truth: Tensor | None, title: str, maps: dict[str, Tensor], named: bool) -> list[plot.Cell]:
    methods = catalog.load().methods
    cells = [plot.Cell(picture, None, title)]
    if truth is not None:
        cells.append(plot.Cell(picture, truth, "truth" if named else ""))
    return cells + [plot.Cell(picture, m, short_name(methods[id].name) if named else "") for id, m in maps.items()]


def short_name(name: str) -> str:
    """A method's name without what stands in brackets, broken in two lines where it is long."""
    words = name.split(" (")[0].split()
    middle = (len(words) + 1) // 2
    return " ".join(words) if len(" ".join(words)) < 18 else " ".join(words[:middle]) + "\n" + " ".join(words[middle:])
