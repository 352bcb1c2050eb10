"""What criteria read: every quantity is computed once, when it is first asked for, and shared by all that read it.

A quantity is a function below, and so is the ``score`` of a criterion's snippet: the names of their parameters say what
they read. ``Study`` looks each name up among what it was given and what it can compute. ``measure`` is for a reader's
own model and pictures; ``rows`` is what the benchmark runs.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitx import cache_dir, catalog, cost, data, execute, glyphs, load, load_module, models, removal, retest
from vitx.data import SEED
from vitx.metrics import rank_correlation
from vitx.plot import heatmap
from vitx.vit import grid, target_classes

BASELINES = ("random", "object-mask")  # the floor and the ceiling
SET_SIZES, SET_REPEATS = 8, 32  # random sets of patches: 256 passes for each picture
SIDE = 3  # groups of patches whose exact Shapley values are computed: 3 x 3, 512 passes for each picture
BANDS = 10
COPIES = 4  # noisy ones of each picture
CHUNK = 16  # pictures explained at once
POOL = 64  # scenes among which every one has another of its class


class Unavailable(ValueError):
    """A criterion cannot be computed here; the message says why in one sentence."""


# --- quantities of the pictures --------------------------------------------------------------------------------------


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B, C)."""
    with torch.inference_mode():
        return model(images)


def patches(model: Any, images: Tensor) -> int:
    """Number of patches of a picture."""
    rows, columns = grid(model, images)
    return rows * columns


def empty_logits(model: Any, images: Tensor, patches: int, masking: str) -> Tensor:
    """(B, C) with all patches hidden."""
    hidden = torch.ones(1, 1, patches, dtype=torch.bool, device=images.device)
    return removal.hidden_logits(model, images, hidden, masking)[:, 0]


def single(model: Any, images: Tensor, patches: int, masking: str) -> removal.Single:
    """Every patch hidden alone."""
    return removal.single(model, images, patches, masking)


def sets(model: Any, images: Tensor, patches: int, masking: str) -> removal.Sets:
    """The same random sets of patches hidden in every picture."""
    hidden = removal.random_sets(patches, SET_SIZES, SET_REPEATS, SEED).to(images.device)
    return removal.Sets(hidden, removal.hidden_logits(model, images, hidden[None], masking))


def shapley(model: Any, images: Tensor, target: Tensor, masking: str) -> removal.Groups:
    """Exact Shapley values of SIDE x SIDE groups of patches."""
    group = removal.shapley_groups(grid(model, images), SIDE).to(images.device)
    return removal.shapley(model, images, target, group, masking)


def other_target(logits: Tensor, target: Tensor) -> Tensor:
    """The most probable of the other classes: (B,)."""
    return logits.scatter(1, target[:, None], -torch.inf).argmax(1)


def parts(model: nn.Module, scenes: glyphs.Scenes, target: Tensor, logits: Tensor, images: Tensor) -> removal.Parts:
    """What each part of the creature is worth: the fall of the target's logit when it is painted out."""
    inside = glyphs.patch_fraction(scenes.part_masks[:, 0], grid(model, images))  # type: ignore[arg-type]
    falls = []
    with torch.inference_mode():
        for part in glyphs.PARTS:
            without = model(glyphs.normalise(glyphs.without_part(scenes, part)).to(images))
            falls.append((logits - without).gather(1, target[:, None])[:, 0])
    return removal.Parts(inside.to(images), torch.stack(falls, 1))


# --- quantities of the map -------------------------------------------------------------------------------------------


def relevance(explain: Callable, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """(B, gh, gw), the map that is judged."""
    return heatmap(explain(model, images, target))


def order(relevance: Tensor) -> Tensor:
    """Patches (B, P) from most to least relevant."""
    return removal.ranking(relevance)


def most_first(
    model: Any, images: Tensor, order: Tensor, steps: int, masking: str, logits: Tensor, empty_logits: Tensor
) -> removal.Curve:
    """Patches hidden from the most relevant on."""
    return removal.removal_curve(model, images, order, steps, masking, logits, empty_logits)


def least_first(
    model: Any, images: Tensor, order: Tensor, steps: int, masking: str, logits: Tensor, empty_logits: Tensor
) -> removal.Curve:
    """Patches hidden from the least relevant on."""
    return removal.removal_curve(model, images, order.flip(1), steps, masking, logits, empty_logits)


def bands(model: Any, images: Tensor, order: Tensor, masking: str) -> removal.Bands:
    """Tenths of the order, each hidden alone."""
    return removal.bands(model, images, order, BANDS, masking)


def imputed(model: Any, images: Tensor, order: Tensor) -> removal.Curve:
    """The most relevant tenths filled by noisy linear imputation."""
    return removal.imputed_curve(model, images, order, SEED)


def multiplied_logits(model: Any, images: Tensor, relevance: Tensor) -> Tensor:
    """(B, C) of the pictures times their maps."""
    return removal.multiplied_logits(model, images, relevance)


# --- quantities of explaining again ----------------------------------------------------------------------------------


def noisy(explain: Callable, model: Any, images: Tensor, target: Tensor) -> retest.Noisy:
    """Noisy copies of each picture, explained for the same class."""
    return retest.noisy_maps(_maps(explain), model, images, target, copies=COPIES, generator=_generator())


def randomised(explain: Callable, model: Any, images: Tensor, target: Tensor) -> retest.Cascade:
    """Maps of the model as its weights are randomised from the head down."""
    return retest.randomised(_maps(explain), model, images, target, generator=_generator())


def _maps(explain: Callable) -> Callable[..., Tensor]:
    return lambda model, images, target: heatmap(explain(model, images, target))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def other_relevance(explain: Callable, model: nn.Module, images: Tensor, other_target: Tensor) -> Tensor:
    """(B, gh, gw), the map for another class."""
    return heatmap(explain(model, images, other_target))


def memorised_relevance(explain: Callable, twin: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """(B, gh, gw), the map of the twin of the model that learned random labels."""
    return heatmap(explain(twin, images, target))


def mosaic(
    explain: Callable, model: nn.Module, mosaic_images: Tensor, mosaic_cells: Tensor, target: Tensor
) -> removal.Mosaic:
    """Maps of mosaics of four pictures, for the class of one of them."""
    return removal.Mosaic(heatmap(explain(model, mosaic_images, target)), mosaic_cells)


def double_mosaic(
    explain: Callable, model: nn.Module, double_images: Tensor, double_cells: Tensor, target: Tensor
) -> removal.Mosaic:
    """Maps of mosaics of four pictures, for the class of two of them."""
    return removal.Mosaic(heatmap(explain(model, double_images, target)), double_cells)


def pair(
    explain: Callable, model: nn.Module, pair_images: Tensor, pair_target: Tensor, pair_inside: Tensor
) -> removal.Pair:
    """Maps of scenes with two creatures, for the class of the first."""
    return removal.Pair(heatmap(explain(model, pair_images, pair_target)), pair_inside)


def passes(explain: Callable, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """(B,): operations of explaining one picture over those of one forward pass, counted on the first."""
    with cost.counted_operations(model) as plain, torch.no_grad():
        model(images[:1])
    with cost.counted_operations(model) as all_of_it:
        explain(model, images[:1], target[:1])
    return torch.full((len(images),), all_of_it.total / plain.total)


# --- series, for charts ----------------------------------------------------------------------------------------------


def curve_most_first(most_first: removal.Curve, target: Tensor) -> Tensor:
    """(B, S + 1): probability of the target as the most relevant patches are hidden."""
    return removal.target_probabilities(most_first.logits, target)


def curve_least_first(least_first: removal.Curve, target: Tensor) -> Tensor:
    """(B, S + 1): probability of the target as the least relevant patches are hidden."""
    return removal.target_probabilities(least_first.logits, target)


def cascade(relevance: Tensor, randomised: retest.Cascade) -> Tensor:
    """(B, L): rank correlation of the map with those of the model with more and more random weights."""
    return torch.stack([rank_correlation(relevance.flatten(1), m.flatten(1)) for m in randomised.maps.unbind(1)], 1)


def maps(relevance: Tensor) -> Tensor:
    """(B, P): the map itself, by which methods are compared with each other."""
    return relevance.flatten(1)


SERIES = {f.__name__: f for f in (curve_most_first, curve_least_first, cascade, maps)}
SHARED: dict[str, Callable] = {f.__name__: f for f in (logits, empty_logits, single, sets, shapley)}
AGAIN: dict[str, Callable] = {
    f.__name__: f for f in (noisy, randomised, other_relevance, memorised_relevance, mosaic, double_mosaic, pair)
}
QUANTITIES: dict[str, Callable] = {
    **SHARED,
    **AGAIN,
    **{
        f.__name__: f
        for f in (
            patches,
            other_target,
            parts,
            relevance,
            order,
            most_first,
            least_first,
            bands,
            imputed,
            multiplied_logits,
            passes,
        )
    },
}
MISSING = {
    "inside": "the place of the object is not known in these pictures",
    "scenes": "parts of the object can be painted out in the glyph world only",
    "twin": "there is no twin of this model that learned random labels",
    "mosaic_images": "no mosaics are made of these pictures",
    "double_images": "no mosaics are made of these pictures",
    "pair_images": "two objects with known places are in scenes of the glyph world only",
    "explain": "it explains again, and a finished map cannot",
}


def reads(function: Callable) -> tuple[str, ...]:
    """Names of what a quantity or a score reads: its parameters but for those that stand behind a star."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def needs(function: Callable) -> set[str]:
    """All names that it reads, directly or through others."""
    found: set[str] = set()
    queue = list(reads(function))
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += reads(QUANTITIES[name]) if name in QUANTITIES else ()
    return found


class Study:
    """What is known of some pictures and of one method's maps of them."""

    def __init__(self, **given: Any):
        self._known: dict[str, Any] = given

    def __call__(self, name: str) -> Any:
        """The quantity of that name. Raises Unavailable where neither it nor what it reads is given."""
        if name not in self._known:
            if name not in QUANTITIES:
                raise Unavailable(MISSING.get(name, f"{name} is not known"))
            try:
                self._known[name] = self.apply(QUANTITIES[name])
            except Unavailable as error:
                self._known[name] = error
            except ValueError as error:  # what a method refuses, in one sentence
                self._known[name] = Unavailable(str(error).rstrip("."))
        if isinstance(self._known[name], Unavailable):
            raise self._known[name]
        return self._known[name]

    def apply(self, function: Callable) -> Any:
        """The function's value for what it reads."""
        return function(**{name: self(name) for name in reads(function)})


def measure(
    id: str,
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    explain: Callable | None = None,
    relevance: Tensor | None = None,
    inside: Tensor | None = None,
    masking: str = "mean",
    steps: int = 28,
) -> Tensor:
    """The score (B,) of one criterion for the maps of your pictures.

    Args:
        id: of the criterion. model: a timm VisionTransformer in eval mode. images: (B, 3, H, W), normalised.
        target: (B,) classes; None means the predicted ones. explain: of a snippet, or any function with its arguments;
            relevance: or its finished maps (B, gh, gw). inside: (B, gh, gw), the share of each patch that the object
            covers, for criteria that need it. masking: how patches are hidden, see ``removal``. steps: of the curves.

    Raises:
        Unavailable: the criterion needs what was not given. catalog.UnknownId, catalog.NoSnippet: no such criterion.
    """
    score = load_module(id).score
    with torch.inference_mode():
        classes = target_classes(model(images), target)
    given = {"explain": explain, "relevance": relevance, "inside": inside}
    study = Study(
        model=model,
        images=images,
        target=classes.clone(),
        masking=masking,
        steps=steps,
        **{name: value for name, value in given.items() if value is not None},
    )
    try:
        return study.apply(score)
    except Unavailable as error:
        raise Unavailable(f"{id} cannot be measured: {error}.") from error


# --- the benchmark ---------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What is measured, on what, how."""

    data: str = "glyph"
    model: str = "glyph"
    pictures: int = 128  # explained once
    few: int = 16  # the first of them, explained again with noise, random weights, for other classes, in mosaics
    cheap: int = 20  # methods that take no more passes than this explain all of them again
    costly: int = 200  # methods that take more passes than this see a quarter of the pictures, and half of the few
    masking: str = "drop"
    steps: int = 28
    root: str | None = None
    download: bool = False


PHOTOGRAPHS = Settings(model="photo", pictures=120, few=16, cheap=0, costly=50, steps=7)
QUICK = Settings(pictures=8, few=2, costly=100, steps=14)


def settings(
    data: str,
    model: str | None,
    root: Path | None,
    download: bool,
    pictures: int | None,
    masking: str | None,
    quick: bool,
) -> Settings:
    """The settings that the command line asks for.

    Photographs cost thirty times as much as glyph scenes: their curves have a quarter of the steps.

    Raises:
        ValueError: the quick benchmark is one of glyph scenes.
    """
    if quick and data != "glyph":
        raise ValueError("--quick is for glyph scenes; name fewer --scenes instead")
    base = QUICK if quick else Settings() if data == "glyph" else PHOTOGRAPHS
    base = base._replace(data=data, model=model or base.model, root=root and str(root), download=download)
    count = pictures or base.pictures
    few = min(count, max(2, base.few * count // base.pictures))
    return base._replace(pictures=count, few=few, masking=masking or base.masking)


def count_passes(methods: Iterable[str]) -> None:
    """``explanation_passes`` of methods that nobody has counted yet, with a progress bar."""
    missing = [method for method in methods if method not in BASELINES and not _passes_file(method).is_file()]
    if missing:
        with Progress() as progress:
            for method in progress.track(missing, description="counting passes of an explanation"):
                explanation_passes(method)


def methods() -> list[str]:
    """Ids, in catalogue order, of the methods with a heat map that explain any model, and of the two baselines."""
    atlas = catalog.load()
    chosen = [m.id for m in atlas.methods.values() if m.snippet and m.model == "glyph" and m.output == "heatmap"]
    return [*chosen, *BASELINES]


def criteria() -> list[str]:
    """Ids, in catalogue order, of the criteria with a snippet."""
    return [entry.id for entry in catalog.load().criteria.values() if entry.snippet]


def function_of(criterion: str) -> Callable:
    """The score of a criterion, or the function of a series."""
    return SERIES[criterion] if criterion in SERIES else load_module(criterion).score


def series(criteria: Iterable[str]) -> list[str]:
    """The series that cost nothing beside criteria: all that they read is computed anyway."""
    read = {"relevance"}.union(*(needs(function_of(name)) for name in criteria))
    return [name for name, function in SERIES.items() if needs(function) & QUANTITIES.keys() <= read]


def counts(method: str, settings: Settings) -> tuple[int, int]:
    """How many pictures a method explains once and again; at least two.

    It depends on its passes; but on its time in passes, as cost.json has it, where that is more than ten times as many,
    for a method that takes one pass and computes for long after it.
    """
    passes, time = explanation_passes(method), _time_in_passes().get(method, 0.0)
    passes = time if time > 10 * passes else passes
    if passes <= settings.cheap:
        return settings.pictures, settings.pictures
    if passes <= settings.costly:
        return settings.pictures, min(settings.few, settings.pictures)
    return max(2, settings.pictures // 4), max(2, min(settings.few // 2, settings.pictures // 4))


@cache
def _time_in_passes() -> dict[str, float]:
    """Measured time of an explanation of one picture over that of a forward pass, for methods that have cost rows."""
    rows = json.loads(cost.RESULT.read_text())["rows"] if cost.RESULT.is_file() else []
    ours = [row for row in rows if row["by"] == "vitx" and not row["options"] and "failed" not in row]
    return {row["method"]: row["forwards"]["1"] for row in ours if "1" in row["forwards"]}


def options(method: str) -> dict[str, Any]:
    """Arguments of explain in the benchmark: those by which pages show methods that take thousands of passes."""
    return {} if method in BASELINES else dict(catalog.get(catalog.load(), method).quick)


@cache
def explanation_passes(method: str) -> float:
    """Operations of explaining one glyph scene over those of a forward pass; counted once and kept."""
    if method in BASELINES:
        return 0.0
    path = _passes_file(method)
    if not path.is_file():
        model, scene = models.load("glyph").model, glyphs.scenes(1, SEED)
        images = glyphs.normalise(scene.images)
        count = passes(explainer(method), model, images, scene.labels[:, 0])[0].item()
        _keep(path, lambda beside: beside.write_text(json.dumps(round(count, 2))))
    return json.loads(path.read_text())


def _passes_file(method: str) -> Path:
    return cache_dir() / "benchmark" / "passes" / f"{method}-{execute.method_key(method)}.json"


def explainer(method: str) -> Callable:
    """``explain`` of a method with its arguments, or of a baseline."""
    if method == "random":
        return _random_map
    if method == "object-mask":
        return _refuse
    explain, arguments = load(method), options(method)
    return lambda model, images, target: explain(model, images, target, **arguments)


def _random_map(model: Any, images: Tensor, target: Tensor) -> Tensor:
    """Normal noise (B, gh, gw) that depends on picture, class and weights and on nothing else."""
    weights = sum(float(p.detach().double().sum()) for p in model.parameters())
    maps = []
    for image, label in zip(images, target.tolist(), strict=True):
        seed = hash((float(image.double().sum()), int(label), weights)) & 0x7FFFFFFF
        maps.append(torch.randn(grid(model, images), generator=torch.Generator().manual_seed(seed)))
    return torch.stack(maps).to(images)


def _refuse(*_: Any) -> Tensor:
    raise Unavailable("the true mask explains no model")


def given(settings: Settings, start: int, stop: int) -> dict[str, Any]:
    """What is known beforehand of pictures start to stop of the data set."""
    opened, loaded = opened_data(settings)
    every = {"images": opened.images, "target": opened.target}
    if opened.inside is not None:
        every["inside"] = opened.inside
    cut: dict[str, Any] = {name: values[start:stop] for name, values in every.items()}
    for name, of_target in (("mosaic", 1), ("double", 2)):
        try:
            made, cells = _mosaics(settings, of_target)
            cut |= {f"{name}_images": made[start:stop], f"{name}_cells": cells[start:stop]}
        except data.DataError as error:
            cut[f"{name}_images"] = Unavailable(str(error))
    if settings.data == "glyph":
        two = glyphs.scenes(stop - start, SEED + 1, creatures=2, start=start)
        shape = grid(loaded.model, opened.images)  # type: ignore[arg-type]
        cut |= {
            "scenes": glyphs.select(opened.scenes, torch.arange(start, stop)),  # type: ignore[arg-type]
            "pair_images": glyphs.normalise(two.images),
            "pair_target": two.labels[:, 0],
            "pair_inside": glyphs.patch_fraction(two.object_masks, shape),
        }
        if settings.model == "glyph":
            cut["twin"] = _model("random-labels-glyph", _device()).model
    cut = {name: value.to(_device()) if isinstance(value, Tensor) else value for name, value in cut.items()}
    model = _model(settings.model, _device()).model
    return cut | {"model": model, "masking": settings.masking, "steps": settings.steps}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(4)
def _model(name: str, device: str = "cpu") -> models.Loaded:
    return models.load(name, device=device)


@lru_cache(1)
def opened_data(settings: Settings) -> tuple[data.Data, models.Loaded]:
    """The pictures of the data set and the model; of glyph scenes at least POOL, for mosaics."""
    loaded = _model(settings.model)
    count = max(settings.pictures, POOL) if settings.data == "glyph" else settings.pictures
    return data.open_data(settings.data, loaded, count, root=settings.root, download=settings.download), loaded


@lru_cache(2)
def _mosaics(settings: Settings, of_target: int) -> tuple[Tensor, Tensor]:
    opened, loaded = opened_data(settings)
    return data.mosaics(opened, loaded, SEED, of_target)


def chunks(count: int, few: int) -> Iterator[tuple[int, int]]:
    """Ranges of pictures that end at multiples of CHUNK, at ``few`` and at ``count``."""
    ends = {*range(CHUNK, count, CHUNK), min(few, count), count}
    return pairwise(sorted({0} | ends))


_OF_PICTURES = {"single": "logits", "sets": "logits", "shapley": "values"}  # their field with a row for each picture


def shared_jobs(criteria: Iterable[str], settings: Settings) -> list[str]:
    """Names of the parts of what all methods share, and criteria read, that are not kept yet."""
    ranges = list(chunks(settings.pictures, settings.pictures))
    return [
        f"{name} {start}-{stop}"
        for name in _shared_names(criteria)
        for start, stop in ranges
        if not _shared_file(settings, name, start, stop).is_file()
    ]


def _shared_names(criteria: Iterable[str]) -> list[str]:
    read = set().union(*(needs(function_of(name)) for name in criteria))
    return [name for name in SHARED if name in read]


def share(job: str, settings: Settings) -> None:
    """Compute and keep one of ``shared_jobs``."""
    name, start, stop = re.fullmatch(r"(\w+) (\d+)-(\d+)", job).groups()  # pyright: ignore[reportOptionalMemberAccess]
    found = Study(**given(settings, int(start), int(stop)))(name)
    tensor = getattr(found, _OF_PICTURES[name]) if name in _OF_PICTURES else found
    kept = {name: tensor.clone().contiguous()}
    _keep(_shared_file(settings, name, int(start), int(stop)), lambda beside: save_file(kept, beside))


def shared(settings: Settings, name: str, start: int, stop: int) -> Any:
    """A quantity that all methods share, from what is kept."""
    path = _shared_file(settings, name, start, stop)
    if not path.is_file():
        share(f"{name} {start}-{stop}", settings)
    kept = load_file(path, device=_device())[name]
    opened, loaded = opened_data(settings)
    shape = grid(loaded.model, opened.images)  # type: ignore[arg-type]
    if name == "single":
        return removal.Single(kept)
    if name == "sets":
        hidden = removal.random_sets(shape[0] * shape[1], SET_SIZES, SET_REPEATS, SEED)
        return removal.Sets(hidden.to(_device()), kept)
    if name == "shapley":
        return removal.Groups(removal.shapley_groups(shape, SIDE).to(_device()), kept)
    return kept


def _shared_file(settings: Settings, name: str, start: int, stop: int) -> Path:
    opened, _ = opened_data(settings)
    about = f"{settings.model} {opened.sha256} {settings.masking}"
    key = execute.key(about, source=f"from vitx.evaluate import {name}, SIDE, SET_SIZES, SET_REPEATS")
    return cache_dir() / "benchmark" / "shared" / f"{name}-{key}-{start}-{stop}.safetensors"


@lru_cache(4)
def _of_data(settings: Settings) -> str:
    """The pictures and how they are hidden, in a line."""
    opened, _ = opened_data(settings)
    return f"{settings.model} {opened.sha256} {settings.masking} {settings.steps}"


def _keep(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")  # two workers may keep the same
    write(beside)
    beside.replace(path)


def rows(method: str, criteria: Iterable[str], settings: Settings) -> Iterator[tuple[str, list[list[float]] | str]]:
    """Measure one method by criteria and series: (name, one list of values for each picture), or (name, why not).

    The first picture's refusal counts for all: a criterion that cannot be computed is not computed for some.
    """
    wanted = {name: function_of(name) for name in criteria}
    again = {name for name, function in wanted.items() if needs(function) & AGAIN.keys()}
    count, few = counts(method, settings)
    found: dict[str, list[list[float]]] = {name: [] for name in wanted}
    names = _shared_names(wanted)
    refused: dict[str, str] = {}
    for start, stop in chunks(count, few):
        about = given(settings, start, stop)
        if method == "object-mask" and "inside" in about:
            about["relevance"] = about["inside"]
        study = Study(explain=explainer(method), **about, **_shared_part(settings, names, start, stop))
        for name, function in wanted.items():
            if name in refused or (name in again and start >= few):
                continue
            try:
                values = study.apply(function)
            except Unavailable as error:
                refused[name] = str(error)
                continue
            found[name] += values.view(stop - start, -1).double().tolist()
    for name in wanted:
        yield name, refused[name] if name in refused else found[name]


def _shared_part(settings: Settings, names: Iterable[str], start: int, stop: int) -> dict[str, Any]:
    """``shared`` of pictures start to stop, out of the chunk in which they were computed."""
    whole = next((a, b) for a, b in chunks(settings.pictures, settings.pictures) if a <= start and stop <= b)
    kept = {name: shared(settings, name, *whole) for name in names}
    cut = slice(start - whole[0], stop - whole[0])
    return {
        name: value._replace(**{_OF_PICTURES[name]: getattr(value, _OF_PICTURES[name])[cut]})
        if name in _OF_PICTURES
        else value[cut]
        for name, value in kept.items()
    }


def identity(method: str, criterion: str, settings: Settings) -> str:
    """Key of a row: the method, the criterion, the quantities between them, the pictures, the settings."""
    function = function_of(criterion)
    names = sorted(needs(function) & QUANTITIES.keys())
    script = load_module(criterion).__file__ if criterion not in SERIES else None
    about = [_of_data(settings), str(counts(method, settings))]
    about.append(method if method in BASELINES else execute.method_key(method))
    source = f"from vitx.evaluate import {', '.join([*names, criterion] if criterion in SERIES else names)}"
    source += f"\n{Path(script).read_text()}" if script else ""
    if {"mosaic", "double_mosaic"} & set(names):
        source += "\nfrom vitx.data import mosaics"
    return execute.key(*about, source=source)


def plan(method: str, criteria: Iterable[str], settings: Settings) -> dict[str, float]:
    """Passes (forward passes, a backward one counting twice) that each quantity will take for a method, by name."""
    count, few = counts(method, settings)
    wanted = set().union(*(needs(function_of(name)) for name in criteria))
    loaded = _model(settings.model)
    known = given(settings, 0, 1)
    one = explanation_passes(method)
    per_picture = {
        "relevance": one,
        "most_first": settings.steps - 1,
        "least_first": settings.steps - 1,
        "bands": BANDS,
        "imputed": len(removal.ROAD_SHARES),
        "multiplied_logits": 1,
        "parts": len(glyphs.PARTS),
        "noisy": COPIES * (1 + one),
        "randomised": len(retest.weight_stages(loaded.model)) * one,
        "other_relevance": one,
        "memorised_relevance": one,
        "mosaic": one,
        "double_mosaic": one,
        "pair": one,
    }
    possible = [
        name
        for name in per_picture
        if name in wanted and all(_known(known, n) for n in needs(QUANTITIES[name]) - {"explain"})
    ]
    if method == "object-mask":
        possible = [name for name in possible if name not in AGAIN and name != "relevance"]
    return {name: per_picture[name] * (few if name in AGAIN else count) for name in possible}


def _known(given: dict[str, Any], name: str) -> bool:
    return name in QUANTITIES or not isinstance(given.get(name, Unavailable()), Unavailable)


def shared_passes(criteria: Iterable[str], settings: Settings) -> dict[str, float]:
    """Passes that what all methods share, and criteria read, will take, by name."""
    opened, loaded = opened_data(settings)
    rows, columns = grid(loaded.model, opened.images)  # type: ignore[arg-type]
    each = {
        "logits": 1,
        "empty_logits": 1,
        "single": rows * columns,
        "sets": SET_SIZES * SET_REPEATS,
        "shapley": 2 ** (SIDE * SIDE),
    }
    return {name: float(each[name] * settings.pictures) for name in _shared_names(criteria)}
