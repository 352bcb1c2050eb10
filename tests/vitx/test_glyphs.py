"""The glyph world is a function of integers, and its ground truth is what the pictures show."""

import itertools

import pytest
import torch
from vitx import glyphs

ONE = {"creatures": 1, "size": 112}
SMALL = {"creatures": 1, "size": 56}
TWO = {"creatures": 2, "size": 112}


def tensors(scenes):
    return [*scenes[:-1], *scenes.parameters[1:]]


@pytest.mark.parametrize("kind", [ONE, SMALL, TWO])
def test_a_scene_is_the_same_whatever_its_batch(kind):
    whole = glyphs.scenes(9, 3, **kind)
    parts = [glyphs.scenes(n, 3, start=start, **kind) for start, n in ((0, 1), (1, 3), (4, 5))]
    for expected, *pieces in zip(tensors(whole), *map(tensors, parts), strict=True):
        assert torch.equal(expected, torch.cat(pieces))
    images, labels = glyphs.batch(4, 3, start=5, **kind)
    assert torch.equal(images, whole.images[5:])
    assert torch.equal(labels, whole.labels[5:])


def test_seeds_and_indices_give_different_scenes():
    images = torch.cat([glyphs.scenes(4, 0).images, glyphs.scenes(4, 1).images])
    distance = torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(8) * 1e3
    assert distance.min() > 5


@pytest.mark.parametrize("kind", [ONE, SMALL, TWO])
def test_shapes_and_ranges(kind):
    size, n = kind["size"], 5
    scenes = glyphs.scenes(n, 4, **kind)
    assert scenes.images.shape == (n, 3, size, size)
    assert scenes.images.dtype == torch.float32
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert scenes.labels.shape == (n, 2)
    assert scenes.object_masks.shape == (n, 2, size, size)
    assert scenes.part_masks.shape == (n, 2, 5, size, size)
    assert scenes.boxes.shape == (n, 2, 4)
    second = kind["creatures"] == 2
    assert bool((scenes.labels[:, 1] >= 0).all()) is second
    assert bool(scenes.object_masks[:, 1].any()) is second
    assert bool((scenes.boxes[:, 1] > 0).any()) is second


def test_crops_are_small_scenes():
    assert torch.equal(glyphs.crops(3, 5).images, glyphs.scenes(3, 5, size=56).images)


def test_classes_are_a_code_of_distance_three():
    rows = glyphs.CLASS_PARTS
    assert len(rows) == len(set(glyphs.CLASS_NAMES)) == 12
    for a, b in itertools.combinations(rows, 2):
        assert sum(x != y for x, y in zip(a, b, strict=True)) >= 3
    for column, part in enumerate(glyphs.PARTS):
        values = [row[column] for row in rows]
        assert [values.count(v) for v in range(len(glyphs.VARIANTS[part]))] == [4, 4, 4]
    for columns in itertools.combinations(range(5), 2):
        assert len({tuple(row[c] for c in columns) for row in rows}) < 12
    for columns in itertools.combinations(range(5), 3):
        assert len({tuple(row[c] for c in columns) for row in rows}) == 12


def test_the_table_in_the_docstring_is_the_table():
    lines = [line.split() for line in (glyphs.__doc__ or "").splitlines()]
    table = {words[0]: words[1:] for words in lines if words and words[0] in glyphs.CLASS_NAMES}
    for name, row in zip(glyphs.CLASS_NAMES, glyphs.CLASS_PARTS, strict=True):
        assert table[name] == [glyphs.VARIANTS[p][v] for p, v in zip(glyphs.PARTS, row, strict=True)]


def test_all_classes_are_about_as_frequent():
    labels, _ = glyphs.draw(12_000, 6, creatures=2)
    for column in labels.unbind(1):
        assert (torch.bincount(column, minlength=12) - 1000).abs().max() < 150  # five standard deviations
    assert (labels[:, 0] != labels[:, 1]).all()


@pytest.mark.parametrize("creatures", [1, 2])
def test_only_the_variants_tell_the_class(creatures):
    """Colours, places, sizes, background and distractors have the same mean in each class."""
    n = 4000
    labels, parameters = glyphs.draw(n, 7, creatures=creatures)
    for name, field in parameters._asdict().items():
        if name in ("size", "variants"):
            continue
        values = field.reshape(n, -1).double()
        values = torch.cat([values, values**2], 1)
        values = (values - values.mean(0)) / values.std(0).clamp(min=1e-9)
        share = torch.zeros(values.shape[1], dtype=torch.float64)  # of the variance, explained by the class
        for label in range(12):
            rows = labels[:, 0] == label
            share += rows.double().mean() * values[rows].mean(0) ** 2
        # By chance 11 / n = 0.003 on average; the largest of a thousand stays below 0.009.
        assert share.max() < 0.011, name


@pytest.mark.parametrize("kind", [ONE, SMALL, TWO])
def test_masks_and_boxes_agree(kind):
    scenes = glyphs.scenes(6, 8, **kind)
    assert torch.equal(scenes.part_masks.any(2), scenes.object_masks)
    for masks, boxes in zip(scenes.object_masks, scenes.boxes, strict=True):
        for creature in range(kind["creatures"]):
            y, x = masks[creature].nonzero().T
            expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert boxes[creature].tolist() == [float(value) for value in expected]


def test_every_part_of_a_lone_creature_shows():
    scenes = glyphs.scenes(300, 9)
    pixels = scenes.part_masks[:, 0].flatten(2).sum(2)  # (B, P)
    assert pixels.min() > 25
    assert not scenes.part_masks[:, 1].any()
    sides = (scenes.boxes[:, 0, 2:] - scenes.boxes[:, 0, :2]).amax(1)
    assert sides.min() > 30
    assert sides.max() < 68


@pytest.mark.parametrize("kind", [ONE, SMALL, TWO])
@pytest.mark.parametrize("part", glyphs.PARTS)
def test_without_a_part_only_its_pixels_change(kind, part):
    scenes = glyphs.scenes(8, 10, **kind)
    for creature in range(kind["creatures"]):
        mask = scenes.part_masks[:, creature, glyphs.PARTS.index(part)]
        changed = (glyphs.without_part(scenes, part, creature) != scenes.images).any(1)
        assert not (changed & ~mask).any()
        assert (changed & mask).sum() > 0.95 * mask.sum()


@pytest.mark.parametrize("part", ["crest", "tail", "eyes", "pattern"])
def test_another_variant_changes_that_part_alone(part):
    scenes = glyphs.scenes(8, 11)
    column = glyphs.PARTS.index(part)
    variants = scenes.parameters.variants.clone()
    variants[..., column] = (variants[..., column] + 1) % 3
    other = glyphs.render(scenes.parameters._replace(variants=variants), scenes.labels)
    either = scenes.part_masks[:, 0, column] | other.part_masks[:, 0, column]
    changed = (other.images != scenes.images).any(1)
    assert not (changed & ~either).any()
    assert (changed.flatten(1).sum(1) > 10).all()


def test_two_creatures_overlap_little():
    scenes = glyphs.scenes(300, 12, creatures=2)
    p = scenes.parameters
    alone = p._replace(
        **{
            name: getattr(p, name)[:, :1]
            for name in ("variants", "centres", "radii", "turns", "flips", "colours", "gaze")
        }
    )
    whole = glyphs.render(alone, scenes.labels).object_masks[:, 0].flatten(1).sum(1)
    visible = scenes.object_masks[:, 0].flatten(1).sum(1) / whole
    assert visible.max() <= 1
    assert visible.min() > 0.6
    assert visible.mean() > 0.97


def test_what_the_second_creature_hides_is_not_visible():
    scenes = glyphs.scenes(8, 18, creatures=2)
    centres = scenes.parameters.centres
    centres = torch.stack([centres[:, 0], centres[:, 0] + 8], 1).clamp(30, 82)
    crowded = glyphs.render(scenes.parameters._replace(centres=centres), scenes.labels)
    for column, part in enumerate(glyphs.PARTS):
        mask = crowded.part_masks[:, 0, column]
        changed = (glyphs.without_part(crowded, part) != crowded.images).any(1)
        assert not (changed & ~mask).any()
        assert (changed & mask).sum() > 0.9 * mask.sum(), part


def test_captions_name_the_variants():
    scenes = glyphs.scenes(40, 13, creatures=2)
    for caption, labels in zip(glyphs.captions(scenes), scenes.labels.tolist(), strict=True):
        assert set(caption.split()) <= set(glyphs.CAPTION_WORDS)
        for phrase, label in zip(caption.split(" tail and "), labels, strict=True):
            for part, variant in zip(glyphs.PARTS, glyphs.CLASS_PARTS[label], strict=True):
                named = [name for name in glyphs.VARIANTS[part] if name in phrase.split()]
                assert named == [glyphs.VARIANTS[part][variant]]
    bado = glyphs.scenes(60, 14)
    index = int((bado.labels[:, 0] == 0).nonzero()[0])
    assert glyphs.captions(bado)[index] == "a spotted round one-eyed creature with a spiked crest and a forked tail"


@pytest.mark.parametrize("creatures", [1, 2])
def test_a_clip_starts_at_the_scene_and_moves_only_the_creatures(creatures):
    scenes = glyphs.scenes(4, 15, creatures=creatures)
    film = glyphs.clip(scenes, 5)
    assert film.shape == (4, 5, 3, 112, 112)
    assert torch.allclose(film[:, 0], scenes.images, atol=1e-4)
    moved = (film[:, 1:] - film[:, :-1]).abs().amax((1, 2)) > 1e-3
    assert moved.flatten(1).any(1).all()
    # What changes is where a creature was or is; its visible area stays about the same.
    area = scenes.object_masks.flatten(1).sum(1)
    assert (moved.flatten(2).sum(2) < 2.3 * area[:, None]).all()
    assert torch.equal(glyphs.clip(glyphs.select(scenes, torch.tensor([2])), 5)[0], film[2])


def test_select_takes_whole_scenes():
    scenes = glyphs.scenes(6, 16, creatures=2)
    rows = torch.tensor([4, 1])
    chosen = glyphs.select(scenes, rows)
    assert torch.equal(chosen.images, scenes.images[rows])
    assert torch.equal(glyphs.without_part(chosen, "tail"), glyphs.without_part(scenes, "tail")[rows])


def test_patch_fraction_is_the_mean_of_each_patch():
    masks = glyphs.scenes(3, 17, creatures=2).part_masks
    share = glyphs.patch_fraction(masks, (14, 7))
    assert share.shape == (3, 2, 5, 14, 7)
    assert share[1, 0, 2, 6, 3] == masks[1, 0, 2, 48:56, 48:64].float().mean()
    assert torch.allclose(share.sum((-1, -2)) * 8 * 16, masks.sum((-1, -2)).float())
    with pytest.raises(ValueError, match="does not divide"):
        glyphs.patch_fraction(masks, (13, 14))


def test_normalise():
    images = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (glyphs.MEAN, glyphs.STD))
    assert torch.allclose(glyphs.normalise(images) * std + mean, images, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"seed": -1}, {"start": -1}, {"creatures": 3}, {"size": 40}, {"creatures": 2, "size": 56}]
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=r"scene|pixels"):
        glyphs.scenes(**{"n": 1, "seed": 0, **wrong})


def test_wrong_parts_are_refused():
    scenes = glyphs.scenes(1, 0)
    with pytest.raises(ValueError, match="no part 'wing'"):
        glyphs.without_part(scenes, "wing")
    with pytest.raises(ValueError, match="no creature 1"):
        glyphs.without_part(scenes, "body", 1)
