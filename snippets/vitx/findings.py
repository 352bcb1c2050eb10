"""What a benchmark says, as sentences made from its numbers: no number in them is typed."""

from collections.abc import Sequence
from html import escape
from typing import Any

from vitx.benchmark_pages import CHANCE, judging, result, rows_of
from vitx.markup import number, table
from vitx.pages import BASELINES, Atlas, entry_link

HEADLINES = (
    "deletion",
    "insertion",
    "saco",
    "shapley-agreement",
    "part-importance",
    "pointing-game",
    "attribution-localisation",
    "pair-discrimination",
)
NAMED = 8  # criteria named of a method that is like chance
SHOWN = 3  # best methods named for a criterion
KEPT = 0.5  # rank correlation from which on a map has kept its order
APART = 0.2  # rank correlation below which two criteria hardly agree


def findings(atlas: Atlas, data: str) -> str:
    """Best methods, methods like chance, criteria that disagree, maps that do not need the weights: HTML."""
    rows = {(row["method"], row["criterion"]): row for row in rows_of(atlas, data)}
    parts = [_winners(atlas, data, rows), _overall(atlas, data), _chance(atlas, data, rows)]
    parts += [_disagreement(atlas, data), _weights(atlas, data), _mask(atlas, rows)]
    return "".join(filter(None, parts))


def _two(value: float) -> str:
    return number(float(f"{value:.2g}")) if abs(value) < 10 else f"{value:,.0f}"


def _links(atlas: Atlas, ids: Sequence[str]) -> str:
    return ", ".join(entry_link(atlas, id) for id in ids)


def _some(atlas: Atlas, ids: Sequence[str]) -> str:
    """The first of many."""
    more = len(ids) - NAMED
    return _links(atlas, ids[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _judged(atlas: Atlas, data: str, rows: dict[tuple[str, str], Any]) -> list[str]:
    """Criteria over which methods are ranked, in the order of the catalogue."""
    measured = {criterion for _, criterion in rows}
    judging = result(atlas, data)["judging"]
    return [one.id for one in atlas.catalog.criteria.values() if one.id in measured and one.category in judging]


def _winners(atlas: Atlas, data: str, rows: dict[tuple[str, str], Any]) -> str:
    """The best methods of the headline criteria, with random map and true mask, and who is not told apart."""
    ranks = {one["criterion"]: one for one in result(atlas, data).get("ranks", ())}
    lines = []
    for id in HEADLINES:
        found = [row for (method, criterion), row in rows.items() if criterion == id and method not in BASELINES]
        if not found:
            continue
        down = atlas.catalog.criteria[id].better == "down"
        found.sort(key=lambda row: row["mean"] if down else -row["mean"])
        best = [f"{entry_link(atlas, row['method'])} {_two(row['mean'])}" for row in found[:SHOWN]]
        base = [_two(rows[name, id]["mean"]) if (name, id) in rows else "" for name in BASELINES]
        rank = ranks.get(id)
        alike = ""
        if rank:
            first = min(rank["mean_ranks"], key=rank["mean_ranks"].get)
            together = [clique for clique in rank["cliques"] if first in clique]
            alike = f"{max(map(len, together), default=1)} of {len(rank['mean_ranks'])}"
        lines.append((entry_link(atlas, id), ", ".join(best), *base, alike))
    heads = ("Criterion", "Best means", *BASELINES.values(), "Not told apart from the best rank")
    return table(heads, lines, "Best methods by criterion", "vx-findings") if lines else ""


def _overall(atlas: Atlas, data: str) -> str:
    found = [one for one in result(atlas, data).get("ranks", ()) if one["criterion"] == "all"]
    if not found:
        return ""
    known = {id: rank for id, rank in found[0]["mean_ranks"].items() if id in atlas.catalog.methods}
    order = sorted(known, key=lambda id: known[id])
    named = [f"{entry_link(atlas, id)} ({_two(known[id])})" for id in order]
    return (
        f"<p><strong>Over all {escape(judging(atlas, data))}</strong> the best mean ranks of {len(order)} methods are "
        f"those of {', '.join(named[:5])}, the worst those of {', '.join(named[-3:])}. Ranks that differ by less than "
        f"{_two(found[0]['critical_difference'])} are not told apart.</p>"
    )


def _chance(atlas: Atlas, data: str, rows: dict[tuple[str, str], Any]) -> str:
    """On how many criteria each method was not shown to be better than the random map."""
    criteria = _judged(atlas, data, rows)
    like: dict[str, list[str]] = {}
    measured: dict[str, int] = {}
    for (method, criterion), row in rows.items():
        if criterion in criteria and row["p"] is not None:
            measured[method] = measured.get(method, 0) + 1
            like.setdefault(method, []).extend([criterion] if row["p"] >= CHANCE else [])
    if not like:
        return ""
    order = sorted(like, key=lambda id: (-len(like[id]) / measured[id], id))
    lines = [
        (entry_link(atlas, id), f"{len(like[id])} of {measured[id]}", _some(atlas, like[id]))
        for id in order
        if len(like[id]) > measured[id] / 4
    ]
    few = [id for id in order if len(like[id]) <= 1]
    said = f"<p>Better than the random map on all of these criteria but one at most: {_links(atlas, sorted(few))}.</p>"
    heads = ("Method", "Not shown better than random", "Criteria")
    shown = table(heads, lines, "Methods like chance", "vx-findings") if lines else ""
    return (
        "<p><strong>No better than random</strong> on more than a quarter of these criteria (one-sided Wilcoxon test "
        f"over pictures, corrected after Holm over methods, p ≥ {CHANCE}; methods that saw fewer pictures have less of "
        f"a chance to be told apart):</p>{shown}{said if few else ''}"
    )


def _disagreement(atlas: Atlas, data: str) -> str:
    """Pairs of criteria that order the methods differently."""
    found = result(atlas, data).get("agreement", {}).get("criteria", {})
    ids, matrix = found.get("ids", ()), found.get("matrix", ())
    judging = result(atlas, data)["judging"]
    criteria = atlas.catalog.criteria
    chosen = [n for n, id in enumerate(ids) if id in criteria and criteria[id].category in judging]
    pairs = [(matrix[a][b], ids[a], ids[b]) for a in chosen for b in chosen if a < b and matrix[a][b] is not None]
    if not pairs:
        return ""
    pairs.sort()
    low = [f"{entry_link(atlas, a)} and {entry_link(atlas, b)} ({_two(value)})" for value, a, b in pairs[:4]]
    apart = sum(value < APART for value, _, _ in pairs)
    mean = {
        ids[n]: sum(others) / len(others)
        for n in chosen
        if (others := [matrix[n][m] for m in chosen if m != n and matrix[n][m] is not None])
    }
    order = sorted(mean, key=lambda id: mean[id])
    lone = [f"{entry_link(atlas, id)} ({_two(mean[id])})" for id in order[:3]]
    shared = [f"{entry_link(atlas, id)} ({_two(mean[id])})" for id in order[-3:][::-1]]
    return (
        f"<p><strong>Criteria disagree.</strong> Of {len(pairs)} pairs of criteria, {apart} order the methods with a "
        f"rank correlation below {APART}. The least alike are {', '.join(low)}. On average over the others, "
        f"{', '.join(lone)} agree least with the rest, {', '.join(shared)} most.</p>"
    )


def _weights(atlas: Atlas, data: str) -> str:
    """Methods whose maps keep their order when the weights are random."""
    cascade = result(atlas, data).get("cascade", {})
    ends = {
        id: values[-1]
        for id, values in cascade.get("methods", {}).items()
        if id in atlas.catalog.methods and values and values[-1] is not None
    }
    if not ends:
        return ""
    kept = sorted((id for id in ends if ends[id] >= KEPT), key=lambda id: -ends[id])
    named = ", ".join(f"{entry_link(atlas, id)} ({_two(ends[id])})" for id in kept)
    said = f"keep at least {KEPT}: {named}" if kept else f"keeps {KEPT} or more"
    return (
        f"<p><strong>Without learnt weights</strong>, all of them drawn anew, the maps of {len(kept) or 'no'} of "
        f"{len(ends)} methods {said}, in rank correlation with the map of the trained model.</p>"
    )


def _mask(atlas: Atlas, rows: dict[tuple[str, str], Any]) -> str:
    """Criteria by which the mask of the object is no better than the random map, or beaten by most methods."""
    worse, beaten = [], []
    for one in atlas.catalog.criteria.values():
        mask, random = (rows.get((name, one.id)) for name in ("object-mask", "random"))
        if mask is None or random is None or one.better == "neither" or one.category in ("complexity", "cost"):
            continue
        sign = -1 if one.better == "down" else 1
        if sign * (mask["mean"] - random["mean"]) <= 0:
            worse.append(one.id)
        means = [row["mean"] for (id, criterion), row in rows.items() if criterion == one.id and id not in BASELINES]
        if sum(sign * (mean - mask["mean"]) > 0 for mean in means) > len(means) / 2:
            beaten.append(one.id)
    parts = []
    if worse:
        parts.append(f"The true mask scores no better than random numbers by {_links(atlas, worse)}.")
    if beaten:
        parts.append(f"More than half of the methods beat it by {_links(atlas, beaten)}.")
    return f"<p><strong>The mask is not the truth about the model.</strong> {' '.join(parts)}</p>" if parts else ""
