"""From the rows of a benchmark to its result file: means with intervals, tests, ranks, curves and agreements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vitx import ATLAS, benchmark, catalog, evaluate, retest, summary
from vitx.bench import provenance, write

FOLDER = ATLAS / "catalog" / "results"
# Shown in a terminal, where all would not fit.
HEADLINES = ("deletion", "insertion", "saco", "pointing-game", "pair-discrimination", "part-importance", "mprt")
# Categories whose criteria make up the ranks over criteria: what a map says of the model, not how it looks or costs.
JUDGING = ("faithfulness", "localisation", "ground-truth")
Table = dict[tuple[str, str], np.ndarray]  # (method, criterion or series): (pictures, parts)


def result_path(settings: evaluate.Settings) -> Path:
    """Where the result of a data set is committed."""
    return FOLDER / f"benchmark-{settings.data}.json"


def build(
    methods: Sequence[str], criteria: Sequence[str], settings: evaluate.Settings, outcome: benchmark.Outcome
) -> dict[str, Any]:
    """What catalog/results/benchmark-<data>.json holds: see ``docs/benchmark.md`` for how to read it.

    Args:
        methods, criteria: in the order of the catalogue. outcome: of ``benchmark.run`` for them and all
            ``evaluate.series`` of them.

    Returns:
        provenance; methods; criteria; explained: by method, passes of an explanation, pictures seen once and again,
        arguments; rows: method, criterion, count, mean with its 95 % interval, p of being better than the random map
        (Wilcoxon, corrected after Holm over methods); skipped; failed; curves; cascade; ranks: mean ranks over pictures
        by criterion, and over the criteria of the categories ``judging`` ("all"); agreement of methods (of their maps)
        and of criteria (of their means).
        Criteria of which neither end is better have no p, no ranks and no agreement.
    """
    table = {pair: benchmark.read_rows(path) for pair, path in outcome.kept.items()}
    entries = catalog.load().criteria
    sign = {criterion: {"up": 1.0, "down": -1.0, "neither": 0.0}[entries[criterion].better] for criterion in criteria}
    opened, loaded = evaluate.opened_data(settings)
    about = {"name": opened.name, "source": opened.source, "sha256": opened.sha256, "pictures": settings.pictures}
    present = [method for method in methods if any((method, criterion) in table for criterion in criteria)]
    rows = [row for criterion in criteria for row in _rows(present, criterion, table, sign[criterion])]
    read = [*criteria, *evaluate.series(criteria)]
    planned = {method: sum(evaluate.plan(method, read, settings).values()) for method in present}
    passes = sum(planned.values()) + sum(evaluate.shared_passes(read, settings).values())
    place = {name: value for name, value in settings._asdict().items() if name not in benchmark.PLACES}
    return {
        "provenance": provenance(**place) | {"data": about, "passes": round(passes)},
        "methods": present,
        "criteria": list(criteria),
        "explained": {method: _explained(method, settings) for method in present},
        "rows": sorted(rows, key=lambda row: present.index(row["method"])),
        "skipped": [
            {"method": method, "criterion": criterion, "why": why}
            for (method, criterion), why in sorted(outcome.skipped.items())
            if criterion in sign
        ],
        "failed": outcome.failed,
        "curves": _curves(present, table),
        "cascade": {
            "stages": list(retest.weight_stages(loaded.model)),
            "methods": _means(present, "cascade", table),
        },
        "judging": list(JUDGING),
        "ranks": _ranks(present, criteria, table, sign),
        "agreement": {
            "methods": _maps_agree(present, table),
            "criteria": _criteria_agree(present, criteria, table, sign),
        },
    }


def _explained(method: str, settings: evaluate.Settings) -> dict[str, Any]:
    once, again = evaluate.counts(method, settings)
    passes = evaluate.explanation_passes(method)
    return {"passes": passes, "pictures": once, "again": again, "options": evaluate.options(method)}


def _rows(methods: Sequence[str], criterion: str, table: Table, sign: float) -> list[dict[str, Any]]:
    values = {method: table[method, criterion][:, 0] for method in methods if (method, criterion) in table}
    p: dict[str, float] = {}
    judged = [method for method in values if method not in evaluate.BASELINES]
    if "random" in values and judged and sign:
        random = values["random"]
        padded = np.full((len(random), len(judged)), np.nan)
        for column, method in enumerate(judged):
            padded[: len(values[method]), column] = values[method][: len(random)]
        p = dict(zip(judged, summary.beats_random(sign * padded, sign * random).p.tolist(), strict=True))
    rows = []
    for method, found in values.items():
        mean, low, high = summary.bootstrap(found)
        count = int(np.isfinite(found).sum())
        numbers = {"mean": _round(mean), "low": _round(low), "high": _round(high), "p": _round(p.get(method, np.nan))}
        rows.append({"method": method, "criterion": criterion, "count": count} | numbers)
    return rows


def _round(value: float) -> float | None:
    """Four significant digits; None for what has no value, since JSON has no nan."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _means(methods: Sequence[str], series: str, table: Table) -> dict[str, list[float | None]]:
    found = {method: table[method, series] for method in methods if (method, series) in table}
    return {method: [_round(value) for value in values.mean(0).tolist()] for method, values in found.items()}


def _curves(methods: Sequence[str], table: Table) -> dict[str, Any]:
    curves = {}
    for order in ("most_first", "least_first"):
        means = _means(methods, f"curve_{order}", table)
        steps = max((len(values) for values in means.values()), default=1) - 1
        curves[order] = {"shares": [_round(n / steps) if steps else 0.0 for n in range(steps + 1)], "methods": means}
    return curves


def _ranks(methods: Sequence[str], criteria: Sequence[str], table: Table, sign: dict[str, float]) -> list[dict]:
    """Of each criterion over pictures, of the methods that saw all of them; over those of JUDGING, of their means."""
    entries = catalog.load().criteria
    judged = [method for method in methods if method not in evaluate.BASELINES]
    result, means = [], []
    for criterion in (criterion for criterion in criteria if sign[criterion]):
        scores = {method: table[method, criterion][:, 0] for method in judged if (method, criterion) in table}
        most = max((len(values) for values in scores.values()), default=0)
        full = {method: values for method, values in scores.items() if len(values) == most}
        if entries[criterion].category in JUDGING:
            means.append([sign[criterion] * _mean(scores, method) for method in judged])
        result += _ranking(criterion, list(full), sign[criterion] * np.stack(list(full.values()), 1)) if full else []
    over = np.array(means)  # (criteria, methods)
    whole = [column for column in range(len(judged)) if len(over) and np.isfinite(over[:, column]).mean() > 0.8]
    return result + (_ranking("all", [judged[column] for column in whole], over[:, whole]) if whole else [])


def _mean(scores: dict[str, np.ndarray], method: str) -> float:
    """Mean of what a method scored, without nan; nan where it scored nothing."""
    finite = scores[method][np.isfinite(scores[method])] if method in scores else np.empty(0)
    return float(finite.mean()) if len(finite) else np.nan


def _ranking(criterion: str, methods: list[str], scores: np.ndarray) -> list[dict[str, Any]]:
    try:
        found = summary.ranks(scores)
    except ValueError:  # too few methods or pictures
        return []
    return [
        {
            "criterion": criterion,
            "blocks": found.blocks,
            "p": _round(found.p),
            "critical_difference": _round(found.critical_difference),
            "mean_ranks": {method: _round(rank) for method, rank in zip(methods, found.mean.tolist(), strict=True)},
            "cliques": [[methods[index] for index in clique] for clique in found.cliques],
        }
    ]


def _maps_agree(methods: Sequence[str], table: Table) -> dict[str, Any]:
    """Mean over pictures of the rank correlation between the maps of two methods."""
    ids = [method for method in methods if (method, "maps") in table]
    ranked = []
    for method in ids:
        ranks = stats.rankdata(table[method, "maps"], axis=1)
        centred = ranks - ranks.mean(1, keepdims=True)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        ranked.append(np.divide(centred, length, out=np.zeros_like(centred), where=length > 0))
    matrix = []
    for one in ranked:
        common = [min(len(one), len(other)) for other in ranked]
        matrix.append([_round((one[:n] * other[:n]).sum(1).mean()) for n, other in zip(common, ranked, strict=True)])
    return {"ids": ids, "matrix": matrix}


def _criteria_agree(
    methods: Sequence[str], criteria: Sequence[str], table: Table, sign: dict[str, float]
) -> dict[str, Any]:
    """Rank correlation of criteria over the methods' means, each turned so that up is better."""
    judged = [method for method in methods if method not in evaluate.BASELINES]
    criteria = [criterion for criterion in criteria if sign[criterion]]

    columns = []
    for criterion in criteria:
        scores = {method: table[method, criterion][:, 0] for method in judged if (method, criterion) in table}
        columns.append([sign[criterion] * _mean(scores, method) for method in judged])
    over = np.array(columns).T  # (methods, criteria)
    found = summary.agreement(over).correlation if len(judged) else np.zeros((len(criteria), len(criteria)))
    return {"ids": list(criteria), "matrix": [[_round(value) for value in row] for row in found.tolist()]}


def save(result: dict[str, Any], path: Path) -> Path:
    """Write the result whole or not at all."""
    write(result, path)
    return path
