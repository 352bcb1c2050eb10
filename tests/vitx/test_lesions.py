"""The lesion world is a function of integers, and its masks are where the lesions were painted."""

import pytest
import torch
from torch.nn.functional import max_pool2d
from vitx import lesions


def test_a_scene_is_the_same_whatever_its_batch():
    whole = lesions.scenes(9, 3)
    parts = [lesions.scenes(count, 3, start) for start, count in ((0, 1), (1, 3), (4, 5))]
    for expected, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(expected, torch.cat(pieces))


def test_seeds_and_indices_give_different_scenes():
    images = torch.cat([lesions.scenes(4, seed).images for seed in (0, 1)])
    distance = torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(8) * 1e3
    assert distance.min() > 5


def test_shapes_and_ranges():
    scenes = lesions.scenes(40, 4)
    assert scenes.images.shape == (40, 3, 112, 112)
    assert scenes.images.dtype == torch.float32
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert scenes.masks.dtype == torch.bool
    assert torch.equal(scenes.masks.flatten(1).any(1), scenes.labels > 0)


def test_all_classes_are_about_as_frequent():
    labels = torch.cat([lesions.scenes(500, 6, start).labels for start in (0, 500)])
    assert (torch.bincount(labels, minlength=4) - 250).abs().max() < 70  # five standard deviations


@pytest.mark.parametrize("label", [1, 2, 3])
def test_only_the_lesion_changes_and_all_of_it(label):
    """Against the same eye without lesions: nothing else changed, and what the mask holds did."""
    scenes = lesions.scenes(30, 8, labels=torch.full((30,), label))
    healthy = lesions.scenes(30, 8, labels=torch.zeros(30, dtype=torch.long))
    assert not healthy.masks.any()
    change = (scenes.images - healthy.images).abs().amax(1)
    near = max_pool2d(scenes.masks.float(), 7, 1, 3) > 0  # a soft edge reaches two pixels beyond the outline
    assert change[~near].max() == 0
    share = torch.stack([(c[m] > 0.02).float().mean() for c, m in zip(change, scenes.masks, strict=True)])
    assert share.min() > 0.8  # a speck on the bright disc would hardly show
    darker = (scenes.images - healthy.images).mean(1)[scenes.masks].mean()
    assert (darker < 0) == (label == 1)


def test_lesions_lie_in_the_field_of_view_and_off_the_disc():
    labels = 1 + torch.arange(60) % 3
    masks = lesions.scenes(60, 12, labels=labels).masks
    draw = lesions._drawing(60, 12, 0, 0)
    draw(0, 1)  # the labels come first
    disc = lesions._eyes(draw)[1]
    y, x = torch.meshgrid(lesions._AXIS, lesions._AXIS, indexing="ij")
    for mask, (disc_x, disc_y) in zip(masks, disc.tolist(), strict=True):
        assert ((x[mask] - 56) ** 2 + (y[mask] - 56) ** 2).max() < 50**2
        assert ((x[mask] - disc_x) ** 2 + (y[mask] - disc_y) ** 2).min() > 4**2


def test_scale_is_that_of_the_lesions():
    labels = torch.ones(30, dtype=torch.long)
    areas = [lesions.scenes(30, 9, labels=labels, scale=s).masks.sum((1, 2)) for s in (0.5, 1.0, 1.5)]
    assert (areas[0] < areas[1]).all()
    assert (areas[1] < areas[2]).all()
    assert 3 < (areas[1].float() / areas[0]).median() < 5  # the area goes with the square


def test_one_speck_group_in_plain_loops():
    """The mask of bright specks is a union of discs, pixel by pixel."""
    draw, label = lesions._drawing(1, 21, 0, 100), torch.tensor([2])
    scene = lesions.paint(torch.full((1, 3, 112, 112), 0.5), label, 21)
    places = lesions._places(draw, None)[0].tolist()
    present = 1 + int(draw(0, lesions.MOST))
    for shape in ((3,), (3, 2), (3, 2)):  # radii, bumps and phases, of blots
        draw(0, 1, *shape)
    offsets, sizes = draw(-7, 7, 3, 7, 2)[0].tolist(), draw(1.3, 2.6, 3, 7)[0].tolist()
    for row in range(112):
        for column in range(112):
            inside = any(
                (column + 0.5 - places[k][0] - offsets[k][s][0]) ** 2
                + (row + 0.5 - places[k][1] - offsets[k][s][1]) ** 2
                <= sizes[k][s] ** 2
                for k in range(present)
                for s in range(7)
            )
            assert inside == bool(scene.masks[0, row, column])


def test_painting_on_any_picture():
    pictures = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    scenes = lesions.paint(pictures, torch.tensor([0, 1, 3]), 5)
    assert torch.equal(scenes.images[0], pictures[0])
    assert not scenes.masks[0].any()
    assert scenes.masks[1:].flatten(1).any(1).all()


def test_grades_of_known_maps():
    """One lesion of 2 x 3 pixels on a grid of 4 x 4 patches of 28 pixels: it touches two patches."""
    masks = torch.zeros(3, 112, 112, dtype=torch.bool)
    masks[:, 30:32, 54:57] = True
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 1:3] = torch.tensor([2.0, 1.0])  # both patches, and nothing else
    maps[1, 0, 0], maps[1, 1, 1] = 3.0, 1.0  # one elsewhere, one on it
    maps[2] = -1.0
    maps[2, 1, 2] = 5.0
    grades = lesions.grade(maps, masks)
    assert grades.pointing.tolist() == [1, 0, 1]
    assert grades.mass.tolist() == [1, 0.25, 1]
    assert grades.iou[:2].tolist() == pytest.approx([1, 1 / 3])


def test_what_is_refused():
    with pytest.raises(ValueError, match="count of at least 1"):
        lesions.scenes(0, 1)
    with pytest.raises(ValueError, match="one of 0 to 3 for each of 2 pictures"):
        lesions.scenes(2, 1, labels=torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="pictures \\(B, 3, 112, 112\\)"):
        lesions.paint(torch.rand(1, 3, 64, 64), torch.tensor([1]), 1)
