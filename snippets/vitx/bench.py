"""Measure heat-map methods on glyph scenes, whose evidence is known, and write the numbers with their provenance."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from vitx import ATLAS, catalog, glyphs, load, metrics, models
from vitx.data import SEED
from vitx.plot import heatmap

RESULT = ATLAS / "catalog" / "results" / "glyph.json"
BASELINES = ("random", "object-mask")
# Beside models that explain themselves: methods that explain the plain model glyph.
POST_HOC = ("input-x-gradient", "grad-cam", "attention-rollout", "generic-attention-explainability")
CODE = "from vitx import glyphs, metrics"  # what decides, beside the snippet, whether a row still holds


def heat_map_methods() -> list[str]:
    """Ids, in catalogue order, of the methods with a snippet whose result has a heat map of a creature."""
    atlas = catalog.load()
    return [
        entry.id
        for entry in atlas.methods.values()
        if entry.snippet and entry.output != "units" and catalog.names_creatures(atlas, entry)
    ]


def glyph_truth(ids: list[str], scenes: int = 128, batch: int = 16, path: Path | None = None) -> dict[str, Any]:
    """Score methods on scenes of one creature and on scenes of two, where the first one is asked for.

    Args:
        ids: catalogue ids. scenes: of each kind; a row of the same code and more scenes is kept. batch: pictures
            explained at once. path: of the result; None is ``RESULT``.

    Returns:
        see ``measure_rows``; a row for each method and for the floor ("random": normal noise) and the ceiling
        ("object-mask": the truth itself):
        mass_inside: share of positive relevance inside the creature; pointing_game: how often the most relevant patch
        hits it; mass_on_target: of the positive relevance on the two creatures, the share on the one asked for.
    """
    from vitx import execute

    one, two = glyphs.scenes(scenes, SEED), glyphs.scenes(scenes, SEED + 1, creatures=2)
    jobs = []
    for name in [*ids, *BASELINES]:
        identity = execute.key(execute.method_key(name) if name in ids else name, source=CODE)
        jobs.append(({"method": name, "key": identity, "scenes": scenes}, partial(_score, name, one, two, batch)))
    return measure_rows("glyph ground truth", jobs, path or RESULT, {"seed": SEED})


def _score(name: str, one: glyphs.Scenes, two: glyphs.Scenes, batch: int) -> dict[str, Any]:
    """The numbers of ``glyph_truth`` for one method."""
    started = time.perf_counter()
    single, double = maps(name, one, batch), maps(name, two, batch)
    grid = single.shape[-2], single.shape[-1]
    inside = glyphs.patch_fraction(one.object_masks[:, 0], grid)
    target, other = glyphs.patch_fraction(two.object_masks, grid).unbind(1)
    on_target, on_other = metrics.mass_inside(double, target), metrics.mass_inside(double, other)
    on_either = on_target + on_other
    share = (on_target / on_either.clamp(min=1e-12))[on_either > 0]
    return {
        "mass_inside": metrics.mass_inside(single, inside).mean().item(),
        "pointing_game": metrics.pointing_game(single, inside).mean().item(),
        "mass_on_target": share.mean().item() if len(share) else None,
        "seconds": time.perf_counter() - started,
    }


def differences(ids: list[str], scenes: int = 32, path: Path | None = None) -> dict[str, Any]:
    """How far the map of the official code, where it differs from the paper, is from the paper's.

    Args:
        ids: catalogue ids. scenes: glyph scenes; the five sample photographs are added for methods that explain any
            model. Methods whose entries have ``quick`` arguments see a quarter of the scenes and one photograph.
            path: of the result; None is differences.json beside ``RESULT``.

    Returns:
        see ``measure_rows``; a row for each difference that has an option: method, options, and for "glyph" and "photo"
        the mean and the smallest Pearson correlation of the two maps over the pictures.
    """
    from vitx import compare, execute

    drawn = glyphs.scenes(scenes, SEED)
    pictures = {"glyph": glyphs.normalise(drawn.images), "photo": compare.photographs_tensor()}
    few = {"glyph": pictures["glyph"][: max(1, scenes // 4)], "photo": pictures["photo"][:1]}
    plain: dict[tuple[str, str], Tensor] = {}

    def of(id: str) -> dict[str, Tensor]:
        entry = catalog.get(catalog.load(), id)
        seen = few if entry.quick else pictures
        return seen if entry.model == "glyph" else {"glyph": seen["glyph"]}

    def correlations(id: str, options: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for world, x in of(id).items():
            own = catalog.get(catalog.load(), id).model
            explain, model = load(id), models.load(own if world == "glyph" else world).model
            if (id, world) not in plain:
                plain[id, world] = heatmap(explain(model, x))
            values = metrics.correlation(plain[id, world], heatmap(explain(model, x, **options)))
            row[world] = {"mean": round(values.mean().item(), 4), "smallest": round(values.min().item(), 4)}
        return row

    jobs = []
    for id in ids:
        identity = execute.key(execute.method_key(id), str(scenes), source="from vitx import compare, glyphs")
        for difference in catalog.get(catalog.load(), id).differences:
            if difference.options is not None:
                row = {"method": id, "options": dict(difference.options), "key": identity}
                row |= {"scenes": len(of(id)["glyph"]), "photographs": len(of(id).get("photo", []))}
                jobs.append((row, partial(correlations, id, row["options"])))
    about = {"seed": SEED, "scenes": scenes, "photographs": len(pictures["photo"])}
    return measure_rows("differences", jobs, path or RESULT.with_name("differences.json"), about)


def balance(ids: list[str], scenes: int = 128, batch: int = 16, path: Path | None = None) -> dict[str, Any]:
    """How accurate models are that explain themselves, and how true their explanations.

    Args:
        ids: catalogue ids, each measured on the model of its entry. scenes, batch: as in ``glyph_truth``. path: of the
            result; None is balance.json beside ``RESULT``.

    Returns:
        see ``measure_rows``; a row for each method. On scenes of one creature, of which the model is asked for the
        right class: accuracy of the model; mass_inside, pointing_game: as in ``glyph_truth``; parts: over the five
        parts of the creature, mean rank correlation of the relevance on each with the fall of the model's own
        log-probability of the class when that part is painted out.
    """
    from vitx import execute

    drawn = glyphs.scenes(scenes, SEED)
    jobs = []
    for id in ids:
        identity = execute.key(execute.method_key(id), source=CODE)
        jobs.append(({"method": id, "key": identity, "scenes": scenes}, partial(_balance, id, drawn, batch)))
    path = path or RESULT.with_name("balance.json")
    return measure_rows("accuracy and explanation", jobs, path, {"seed": SEED})


def self_explaining_methods() -> list[str]:
    """Ids, in catalogue order, of the inherently explainable methods with a snippet, after some that explain glyph."""
    entries = catalog.load().methods.values()
    return [*POST_HOC, *(entry.id for entry in entries if entry.snippet and entry.family == "inherent")]


def _balance(id: str, drawn: glyphs.Scenes, batch: int) -> dict[str, Any]:
    model = models.load(catalog.get(catalog.load(), id).model).model
    labels = drawn.labels[:, :1]
    relevance = maps(id, drawn, batch)
    on_parts = torch.einsum("byx,bpyx->bp", relevance, glyphs.patch_fraction(drawn.part_masks[:, 0], (14, 14)))
    with torch.inference_mode():

        def logits(images: Tensor) -> Tensor:
            return torch.cat([model(part) for part in glyphs.normalise(images).split(batch)])

        whole = logits(drawn.images)
        without = [logits(glyphs.without_part(drawn, part)) for part in glyphs.PARTS]
        falls = torch.stack(
            [(whole.log_softmax(1) - part.log_softmax(1)).gather(1, labels)[:, 0] for part in without], 1
        )
    inside = glyphs.patch_fraction(drawn.object_masks[:, 0], (14, 14))
    return {
        "accuracy": (whole.argmax(1) == labels[:, 0]).float().mean().item(),
        "mass_inside": metrics.mass_inside(relevance, inside).mean().item(),
        "pointing_game": metrics.pointing_game(relevance, inside).mean().item(),
        "parts": metrics.rank_correlation(on_parts, falls).mean().item(),
    }


def measure_rows(
    what: str, jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]], path: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Measure rows of a result file one by one, and write it after each: a run that was stopped goes on.

    A row of the file holds if its key is the same and, where it counts scenes, it has as many. Rows that nobody asks
    for are kept; those of methods that are no longer in the catalogue are not.

    Args:
        what: for the progress bar. jobs: what names a row (method, options, by), the key of its code and perhaps its
            scenes, each with the function that measures the rest. about: settings for the provenance.

    Returns:
        {"provenance": ..., "rows": [...]}, in the order of the catalogue. Each row says at which commit it was made;
        the provenance is that of the last one.
    """
    order = [*catalog.load().methods, *BASELINES]
    before = json.loads(path.read_text()) if path.is_file() else {"provenance": provenance(**about), "rows": []}
    rows = {_name(row): row for row in before["rows"] if row["method"] in order}
    result = before | {"rows": list(rows.values())}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(what, total=len(jobs))
        for row, measure in jobs:
            progress.update(task, description=f"{what}: " + " ".join(str(part) for part in _name(row) if part))
            old = rows.get(_name(row), {})
            if old.get("key") != row["key"] or old.get("scenes", 0) < row.get("scenes", 0):
                origin = provenance(**about)
                values = {k: round(v, 4) if isinstance(v, float) else v for k, v in measure().items()}
                rows[_name(row)] = row | values | {"commit": origin["commit"]}
                result = {
                    "provenance": origin,
                    "rows": sorted(rows.values(), key=lambda row: order.index(row["method"])),
                }
                write(result, path)
            progress.advance(task)
    return result


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row is about: method, who runs it, options."""
    options = row.get("options")
    return row["method"], row.get("by", ""), json.dumps(options, sort_keys=True) if options else ""


def maps(name: str, scenes: glyphs.Scenes, batch: int) -> Tensor:
    """Heat maps (B, gh, gw) of one method for the first creature of every scene."""
    target = scenes.labels[:, 0]
    if name == "random":
        return torch.randn(len(target), 14, 14, generator=torch.Generator().manual_seed(SEED))
    if name == "object-mask":
        return glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14))
    entry = catalog.get(catalog.load(), name)
    explain, loaded = load(name), models.load(entry.model)
    images = glyphs.normalise(scenes.images)
    parts = zip(images.split(batch), target.split(batch), strict=True)
    return torch.cat([heatmap(explain(loaded.model, x, goal)) for x, goal in parts])


def provenance(**settings: Any) -> dict[str, Any]:
    """What a reader needs to repeat a measurement: versions, commit, model hashes, machine, settings."""
    git = subprocess.run(["git", "-C", str(ATLAS), "describe", "--always", "--dirty"], capture_output=True, text=True)
    weights = sorted((ATLAS / "snippets" / "models").glob("*.safetensors"))
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in ("vitx", "torch", "timm", "numpy")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "models": {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights},
        "settings": settings,
    }


def write(result: dict[str, Any], path: Path = RESULT) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(path)
