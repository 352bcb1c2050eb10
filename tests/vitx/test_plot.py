"""Pictures of explanations hold what the results say."""

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from vitx import glyphs, plot
from vitx.vit import Likeness, Selection, Units


def shades(axes) -> np.ndarray:
    """Colours (H, W, 4) of the picture drawn last."""
    return np.asarray(axes.images[-1].get_array())


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


PICTURE = np.full((28, 28, 3), 0.5)


def test_a_map_without_negative_values_is_drawn_from_its_smallest():
    relevance = torch.rand(14, 14, generator=torch.Generator().manual_seed(0))
    near, far = (Figure().subplots() for _ in range(2))
    plot.overlay(near, PICTURE, relevance)
    plot.overlay(far, PICTURE, relevance + 100)
    assert np.allclose(shades(near), shades(far), atol=1e-3)
    assert shades(near)[..., 3].min() < 0.01
    assert shades(near)[..., 3].max() > 0.8


def test_a_map_of_both_signs_is_symmetric():
    relevance = torch.zeros(14, 14)
    relevance[2:5, 2:5], relevance[9:12, 9:12] = 1, -1
    axes = Figure().subplots()
    plot.overlay(axes, PICTURE, relevance)
    colours = shades(axes)
    most, least = colours[7, 7], colours[21, 21]
    assert most[0] > most[2]  # red for
    assert least[2] > least[0]  # blue against
    assert np.isclose(most[3], least[3])
    assert colours[7, 21, 3] < 0.01


def test_units_show_scores_in_order_and_grey_for_the_pruned():
    scores = {"heads": torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 4.0]])}
    kept = {"heads": torch.tensor([[False, True, True], [True, True, False]])}
    figure = plot.explanation(Units(scores, kept, torch.zeros(1, 2)), PICTURE)
    assert titles(figure) == ["heads: 4 of 6 kept"]
    drawn = shades(figure.axes[0])  # (blocks, units, 4), best first
    grey = np.isclose(drawn[..., :3], 0.85).all(-1)
    assert grey.tolist() == [[False, False, True], [False, True, False]]
    assert np.allclose(drawn[1, 0], (0.993248, 0.906157, 0.143936, 1))  # the best of all is the brightest


def test_units_of_one_picture_of_several():
    scores = {"heads": torch.arange(6.0).view(2, 1, 3)}  # (B, L, h)
    kept = {"heads": torch.tensor([[[True, True, True]], [[False, False, True]]])}
    assert titles(plot.units(Units(scores, kept, torch.zeros(2, 2)), row=1)) == ["heads: 1 of 3 kept"]


def test_a_selection_shows_each_change():
    alive = torch.ones(1, 4, 2, 2, dtype=torch.bool)
    alive[0, 1:, 0, 0] = False
    alive[0, 3, 1] = False
    figure = plot.explanation(Selection(alive, torch.zeros(1, 2)), PICTURE, "ours")
    assert titles(figure) == [
        "",
        "ours",
        "after block 1: 4 patches",
        "after block 2: 3 patches",
        "after block 4: 1 patches",
    ]
    hidden = np.asarray(figure.axes[3].images[0].get_array())  # after block 2
    assert (hidden[:14, :14] > 0.8).all()
    assert (hidden[14:] == 0.5).all()


def test_prototypes_stand_over_the_scene_that_they_come_from():
    class Found(NamedTuple):
        map: Tensor

        def heatmap(self) -> Tensor:
            return self.map

        def likenesses(self, row: int) -> list[Likeness]:
            return [Likeness("+1.00", [15, 30], "is like that", [9, row, 100])]

    pictures = [PICTURE, PICTURE]
    figure = plot.prototypes(Found(torch.rand(2, 14, 14)), pictures, ["first", "second"])
    assert titles(figure) == ["first", "+1.00", "where", "is like that", "second", "+1.00", "where", "is like that"]
    here, there = figure.axes[5], figure.axes[7]  # of the second picture

    def corners(axes) -> list[tuple[float, float]]:
        return [box.get_xy() for box in axes.patches if isinstance(box, Rectangle)]

    assert corners(here) == [(2, 2), (4, 4)]  # patches 15 and 30 of 14 x 14, two pixels each
    assert corners(there) == [(16, 56)]  # patch 100: row 7, column 2, of eight pixels
    scene = glyphs.scenes(1, 9, start=1).images[0].permute(1, 2, 0).numpy()
    assert np.allclose(np.asarray(there.images[0].get_array()), scene)
