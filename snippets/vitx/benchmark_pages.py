"""The parts of the page of the benchmark, as HTML text, made from its results. No mkdocs, no torch, no files."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vitx import charts
from vitx.markup import captioned, number, table
from vitx.pages import BASELINES, Atlas, entry_link, provenance
from vitx.schema import Criterion

BETTER = {
    "up": "Higher is better",
    "down": "Lower is better",
    "neither": "Neither end is better",
}
ARROW = {"up": "↑", "down": "↓", "neither": "↔"}
DATA = {"glyph": "Glyph scenes", "caltech101": "Photographs (Caltech-101)"}
CURVES = 10  # methods drawn as curves
CHANCE = 0.05  # from this p on, a method is no better than random


def _name(id: str) -> str:
    """What charts call a method: its id; a baseline has a name."""
    return BASELINES.get(id, id)


def _colour(atlas: Atlas, id: str) -> str:
    """Class of a method's family colour."""
    return "c0" if id in BASELINES else f"c{atlas.colours[atlas.catalog.methods[id].family]}"


def arrow(criterion: Criterion) -> str:
    return f'<span title="{BETTER[criterion.better]}">{ARROW[criterion.better]}</span>'


def result(atlas: Atlas, data: str) -> Mapping[str, Any]:
    return atlas.results.get(f"benchmark-{data}", {})


def rows_of(atlas: Atlas, data: str) -> list[dict[str, Any]]:
    """Measured rows of methods, baselines and criteria that are in the catalogue."""
    methods, criteria = atlas.catalog.methods, atlas.catalog.criteria
    return [
        row
        for row in result(atlas, data).get("rows", ())
        if (row["method"] in methods or row["method"] in BASELINES)
        and row["criterion"] in criteria
        and row["mean"] is not None
    ]


def _methods(atlas: Atlas, data: str) -> list[str]:
    """Methods of a result in its order, those that the catalogue still has, and the baselines."""
    return [id for id in result(atlas, data)["methods"] if id in atlas.catalog.methods or id in BASELINES]


def _by_chance(atlas: Atlas, row: Mapping[str, Any]) -> bool:
    """Whether the method was not shown to be better than the random map."""
    return atlas.catalog.criteria[row["criterion"]].better != "neither" and row["p"] is not None and row["p"] >= CHANCE


def _range(counts: Iterable[int]) -> str:
    known = sorted(set(counts))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def three(value: float) -> str:
    """Three digits."""
    return number(float(f"{value:.3g}"))


def scores(atlas: Atlas, data: str) -> str:
    """Methods by criteria, as a table that docs/assets/scores.js sorts, filters and saves.

    A cell shows the mean, <b> the best and <i> what is not shown to be better than random; its attribute ``data-v``
    holds low, high, count and p, 0 if below 0.0005.
    """
    rows = {(row["method"], row["criterion"]): row for row in rows_of(atlas, data)}
    measured = {criterion for _, criterion in rows}
    criteria = [one for one in atlas.catalog.criteria.values() if one.id in measured]
    methods = [id for id in _methods(atlas, data) if any((id, one.id) in rows for one in criteria)]
    best: dict[str, float] = {}
    for one in criteria:
        means = [rows[id, one.id]["mean"] for id in methods if id not in BASELINES and (id, one.id) in rows]
        if means and one.better != "neither":
            best[one.id] = (max if one.better == "up" else min)(means)

    def head(one: Criterion) -> str:
        return (
            f'<th scope="col" data-id="{one.id}" data-category="{one.category}" data-better="{one.better}">'
            f"{entry_link(atlas, one.id)} {arrow(one)}</th>"
        )

    def cell(id: str, one: Criterion) -> str:
        row = rows.get((id, one.id))
        if row is None:
            return "<td></td>"
        shown = three(row["mean"])
        if row["mean"] == best.get(one.id) and id not in BASELINES:
            shown = f"<b>{shown}</b>"
        if _by_chance(atlas, row):
            shown = f"<i>{shown}</i>"
        p = "" if row["p"] is None else " 0" if row["p"] < 5e-4 else f" {row['p']:.1g}"
        about = f"{three(row['low'])} {three(row['high'])} {row['count']}{p}"
        return f'<td data-v="{about}">{shown}</td>'

    def line(id: str) -> str:
        if id in BASELINES:
            said = {"random": "the floor", "object-mask": "the ceiling"}[id]
            about = f'class="vx-baseline" data-id="{id}"'
            name = f'{escape(BASELINES[id])}<span class="vx-small">{said}</span>'
        else:
            maps = atlas.figures.get(f"maps-{id}")
            about = f'data-id="{id}" data-family="{atlas.catalog.methods[id].family}"'
            shown = f'<a class="vx-small vx-maps-link" href="{escape(maps.src)}">maps</a>' if maps else ""
            name = entry_link(atlas, id) + shown
        return f'<tr {about}><th scope="row">{name}</th>{"".join(cell(id, one) for one in criteria)}</tr>'

    families = {atlas.catalog.methods[id].family for id in methods if id not in BASELINES}
    categories = {one.category for one in criteria}
    form = (
        '<form class="vx-score-form" hidden>'
        + _select("family", "Family", [t for t in atlas.catalog.taxonomy.families if t.id in families])
        + _select("category", "Criteria", [t for t in atlas.catalog.taxonomy.categories if t.id in categories])
        + '<label>Method <input type="search" name="text" placeholder="part of a name"></label>'
        '<button type="button" name="csv">Download CSV</button><output role="status"></output></form>'
    )
    legend = (
        "Means over pictures. ↑ higher is better, ↓ lower is better, ↔ neither. Bold: the best mean of a column, "
        "without the two baselines. <i>Grey italics</i>: not shown to be better than the "
        f"random map (Wilcoxon, Holm, p ≥ {CHANCE}). Empty: skipped, for the reason given below. "
        '<span class="vx-no-script">Sorting, filtering and the maps behind a number need JavaScript.</span>'
        "<span class=\"vx-script\"> Press a column's arrow to sort, a number to see its interval and the method's "
        "maps.</span>"
    )
    return (
        f'<div class="vx-score-block" data-name="{data}">{form}<p class="vx-small vx-score-legend">{legend}</p>'
        f'<div class="vx-scroll vx-tall" tabindex="0" role="region" aria-label="Scores, {escape(DATA[data])}">'
        f'<table class="vx-table vx-scores"><thead><tr><th scope="col">Method</th>{"".join(map(head, criteria))}</tr>'
        f"</thead><tbody>{''.join(map(line, methods))}</tbody></table></div></div>"
        + _reduced(atlas, data)
        + provenance(result(atlas, data))
    )


def _reduced(atlas: Atlas, data: str) -> str:
    """Which methods did not run at their default settings."""
    explained = result(atlas, data).get("explained", {})
    named = [
        f"{entry_link(atlas, id)} ({arguments(explained[id]['options'])})"
        for id in _methods(atlas, data)
        if explained.get(id, {}).get("options")
    ]
    return f'<p class="vx-small">Not at default settings: {", ".join(named)}.</p>' if named else ""


def arguments(options: Mapping[str, Any]) -> str:
    """Arguments of a method, as text."""
    return escape(", ".join(f"{name}={value}" for name, value in options.items()))


def _select(name: str, label: str, terms: Sequence[Any]) -> str:
    options = "".join(f'<option value="{term.id}">{escape(term.label)}</option>' for term in terms)
    return f'<label>{label} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _ranked(atlas: Atlas, data: str) -> list[str]:
    """Methods by their mean rank over criteria, the best first; without the baselines."""
    over_all = [one["mean_ranks"] for one in result(atlas, data).get("ranks", ()) if one["criterion"] == "all"]
    methods = [id for id in _methods(atlas, data) if id not in BASELINES]
    return sorted(methods, key=lambda id: over_all[0].get(id, float("inf"))) if over_all else methods


def curves(atlas: Atlas, data: str) -> str:
    """Probability of the class as patches are hidden, and as they are restored, for the methods with the best ranks."""
    chosen = [*_ranked(atlas, data)[:CURVES], *BASELINES]
    parts = []
    for key, title, axis, restored in (
        ("most_first", "Deletion", "Share of the patches hidden, most relevant first", False),
        ("least_first", "Insertion", "Share of the patches visible, most relevant first", True),
    ):
        curve = result(atlas, data).get("curves", {}).get(key)
        if not curve:
            continue
        series = {}
        for id in chosen:
            if id in curve["methods"]:
                points = [
                    pair for pair in zip(curve["shares"], curve["methods"][id], strict=True) if pair[1] is not None
                ]
                series[_name(id)] = sorted((1 - x if restored else x, y, 0.0) for x, y in points)
        caption = (
            f"{title}: mean probability of the class over pictures, for the methods with the best mean rank over "
            f"{escape(judging(atlas, data))} and for the baselines. The other methods are in the table of scores."
        )
        drawn = charts.curves(series, axis, "Probability of the class", f"{title}, {DATA[data]}", False, False)
        parts.append(captioned(drawn, caption))
    return "".join(parts)


def pareto(atlas: Atlas, data: str) -> str:
    """Insertion and pointing game against the passes that an explanation takes."""
    explained = result(atlas, data).get("explained", {})
    parts = []
    for id in ("insertion", "pointing-game"):
        rows = [row for row in rows_of(atlas, data) if row["criterion"] == id]
        points = [
            (row["method"], explained[row["method"]]["passes"], row["mean"], _colour(atlas, row["method"]))
            for row in rows
            if explained.get(row["method"], {}).get("passes", 0) > 0 and row["method"] not in BASELINES
        ]
        if not points:
            continue
        name = atlas.catalog.criteria[id].name
        lines = {BASELINES[row["method"]]: row["mean"] for row in rows if row["method"] in BASELINES}
        caption = (
            f"{escape(name)} (mean over pictures) against the operations of one explanation, as multiples of a forward "
            "pass. Joined and numbered: no cheaper method has as high a mean. Colours are families; point at a dot for "
            "its name."
        )
        drawn = charts.pareto(points, "Passes for one explanation", name, f"{name} against passes, {DATA[data]}", lines)
        parts.append(captioned(drawn, caption))
    return "".join(parts)


def judging(atlas: Atlas, data: str) -> str:
    """The criteria over which the result ranks methods, in words."""
    terms = (atlas.terms["category", id] for id in result(atlas, data)["judging"])
    return f"criteria ({', '.join(term.label.lower() for term in terms)})"


def ranks(atlas: Atlas, data: str) -> str:
    """The critical-difference diagram over criteria."""
    return _ranks(atlas, data, "all")


def _ranks(atlas: Atlas, data: str, criterion: str) -> str:
    """The critical-difference diagram of one criterion over pictures, or over criteria."""
    found = [one for one in result(atlas, data).get("ranks", ()) if one["criterion"] == criterion]
    every = found[0]["mean_ranks"] if found else {}
    mean_ranks = {id: every[id] for id in every if id in atlas.catalog.methods or id in BASELINES}
    if not mean_ranks:
        return ""
    whole = criterion == "all"
    over = judging(atlas, data) if whole else atlas.catalog.criteria[criterion].name
    blocks = f"{escape(over)}, by their means" if whole else "pictures"
    caption = (
        f"Mean ranks over {found[0]['blocks']} {blocks}, of the methods "
        f"that have a value for each; Friedman test p = {three(found[0]['p'])}. A bar at the right joins methods that "
        "are not told apart: their mean ranks differ by less than the critical difference of the Nemenyi test, or the "
        "Friedman test finds no difference at all."
    )
    classes = {id: _colour(atlas, id) for id in mean_ranks}
    title = f"Ranks by {over}, {DATA[data]}"
    drawn = charts.ranking(mean_ranks, found[0]["critical_difference"], found[0]["cliques"], title, classes)
    return captioned(drawn, caption)


def agreement(atlas: Atlas, data: str) -> str:
    """Rank correlation between criteria, and between methods."""
    said = {
        "criteria": "Rank correlation of two criteria over the means of all methods, each turned so that higher is "
        "better: 1 where they put the methods in the same order.",
        "methods": "Rank correlation of the maps of two methods, averaged over pictures.",
    }
    parts = []
    for key, caption in said.items():
        found = result(atlas, data).get("agreement", {}).get(key)
        if found and found["ids"]:
            ids = [_name(id) for id in found["ids"]]
            title = f"Agreement between {key}, {DATA[data]}"
            drawn = charts.matrix(ids, ids, found["matrix"], title, numbers=len(ids) <= 12)
            parts.append(captioned(drawn, f"{caption} A gap: not defined."))
    return "".join(parts)


def cascade(atlas: Atlas, data: str) -> str:
    """Rank correlation of maps with those of the model whose weights are randomised, stage after stage."""
    found = result(atlas, data).get("cascade", {"methods": {}, "stages": []})
    rows, stages = {id: found["methods"][id] for id in _methods(atlas, data) if id in found["methods"]}, found["stages"]
    if not rows:
        return ""
    rows = dict(sorted(rows.items(), key=lambda item: -(item[1][-1] or 0)))
    caption = (
        "Rank correlation of the map with that of the model after its weights were randomised from the head down to "
        "the stage named, averaged over pictures. The lower, the more the map depends on these weights. Sorted by the "
        "last column, in which all of them are random."
    )
    title = f"Maps of models with random weights, {DATA[data]}"
    drawn = charts.matrix([_name(id) for id in rows], stages, list(rows.values()), title, numbers=True)
    return captioned(drawn, caption)


def skipped(atlas: Atlas, data: str) -> str:
    """What was not measured, and why: one line for each criterion and reason, and for each method that failed."""
    whole = result(atlas, data)
    groups: dict[tuple[str, str], list[str]] = {}
    for row in whole.get("skipped", ()):
        groups.setdefault((row["criterion"], row["why"]), []).append(row["method"])
    everyone = set(whole["methods"])
    rows = [
        (
            entry_link(atlas, criterion) if criterion in atlas.catalog.criteria else escape(criterion),
            "all" if everyone <= set(ids) else ", ".join(_entry(atlas, id) for id in ids),
            escape(why),
        )
        for (criterion, why), ids in groups.items()
    ]
    rows += [
        ("all criteria", _entry(atlas, id), escape(f"failed: {why}")) for id, why in whole.get("failed", {}).items()
    ]
    if not rows:
        return "<p>Nothing was skipped, and nothing failed.</p>"
    return table(("Criterion", "Methods", "Why not"), rows, f"Skipped, {DATA[data]}", "vx-skipped")


def _entry(atlas: Atlas, id: str) -> str:
    return entry_link(atlas, id) if id in atlas.catalog.methods or id in BASELINES else escape(id)


def ranking(atlas: Atlas, data: str, id: str) -> str:
    """Means and intervals of all methods by one criterion, the best first."""
    rows = [row for row in rows_of(atlas, data) if row["criterion"] == id]
    if not rows:
        return ""
    better = atlas.catalog.criteria[id].better
    rows.sort(key=lambda row: (row["mean"] * (1 if better == "down" else -1), row["method"]))
    drawn = [
        (
            _name(row["method"]),
            row["mean"],
            row["low"],
            row["high"],
            _colour(atlas, row["method"]) + " hollow" * _by_chance(atlas, row),
        )
        for row in rows
    ]
    name = atlas.catalog.criteria[id].name
    title = f"{name}, {DATA[data]}"
    caption = (
        f"Mean and 95 % bootstrap interval over {_range(row['count'] for row in rows)} pictures. {BETTER[better]}. "
        f"Hollow: not shown to be better than the random map (p ≥ {CHANCE}). Colours are families."
    )
    return (
        captioned(charts.dots(drawn, f"{name} ({BETTER[better].lower()})", title), caption)
        + _ranks(atlas, data, id)
        + provenance(result(atlas, data))
    )
