"""A tiny atlas with odd and hostile text in every field, and its site.

``python tests/site/tiny.py FOLDER`` builds the site into FOLDER/site without torch: executed notebooks, figures and
results are made up here. Other tests take ``catalog()`` from this file with runpy.
"""

import json
import sys
import types
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image
from vitx.schema import (
    KINDS,
    Catalog,
    Code,
    Criterion,
    Difference,
    LaterPaper,
    Leaderboard,
    LeaderboardRow,
    Method,
    ModelCard,
    Motivation,
    Paper,
    Perspective,
    Relation,
    Reported,
    Runs,
    Subfamily,
    Taxonomy,
    Term,
    Tool,
)

ROOT = Path(__file__).resolve().parents[2]
# What must come out as text wherever it goes in. 不 and é check that unicode survives.
NASTY = """<img src=x onerror="alert(1)"><script>alert(2)</script> '" & &lt; </title> {{ 7*7 }} 不 é"""
NASTY_MARKDOWN = (
    NASTY + " [press](javascript:alert(3)) [me](java&#115;cript:alert(4)) ![](https://elsewhere.example/x.png)"
)


def _terms(nasty: str, *ids: str) -> tuple[Term, ...]:
    return tuple(
        Term(
            id=id,
            label=id.title() + nasty,
            label_zh="中" + id + nasty,
            order=place,
            definition="About " + id + nasty,
            definition_zh="关于" + nasty,
        )
        for place, id in enumerate(ids)
    )


def _reported(nasty: str) -> tuple[Reported, ...]:
    """Numbers of two metrics, one of them of no criterion, from places of three kinds."""
    numbers = (
        ("Del. AUC", "deletion", 0.25, "https://code.example/a&b"),
        ("Top 1", None, 79.8, "github:some/code:README.md"),
        ("Del. AUC", "deletion", 12345.5, "seen"),
    )
    return tuple(
        Reported(
            metric=metric + nasty,
            criterion=criterion,
            value=value,
            unit="%" + nasty if place == 1 else None,
            model=f"Model {place}" + nasty,
            data=("Glyph", "ImageNet")[place == 1] + nasty,
            where="Table 1" + nasty,
            source=source + (nasty if place else ""),
            note="By others. " + (NASTY_MARKDOWN if nasty else "") if place == 2 else None,
        )
        for place, (metric, criterion, value, source) in enumerate(numbers)
    )


def catalog(count: int = 4, nasty: str = NASTY) -> Catalog:
    """``count`` methods, at least four, in two families and four branches. The first three have a snippet."""
    families = _terms(nasty, "attribution", "attention")
    branches = tuple(
        Subfamily(**term.model_dump(), family=family)
        for family, ids in (("attribution", ("gradient", "occlusion")), ("attention", ("weights", "flow")))
        for term in _terms(nasty, *ids)
    )
    taxonomy = Taxonomy(
        families=families,
        subfamilies=branches,
        motivations=_terms(nasty, "faithfulness", "speed"),
        tasks=_terms(nasty, "classification", "detection"),
        needs=_terms(nasty, "forward-pass", "gradients"),
        outputs=_terms(nasty, "heatmap", "boxes"),
        categories=_terms(nasty, "faithfulness", "cost"),
    )

    def method(place: int) -> Method:
        branch = branches[place % 4]
        return Method(
            id=f"m-{place}",
            name=f"Method {place}{nasty}",
            paper=Paper(
                title=f"On {place}{nasty}",
                authors=("Lovelace" + nasty, "Turing, Alan", "others"),
                year=2010 + place % 15,
                venue="Journal" + nasty,
                arxiv="2005.00928",
                doi="10.1000/a;b'c(1)",
                url=None,
            ),
            code=Code(url="https://code.example/a&b", licence="MIT" + nasty) if place % 2 else None,
            family=branch.family,
            subfamily=branch.id,
            motivation=Motivation(
                terms=("faithfulness", "speed")[: 1 + place % 2], text="Because. " + (NASTY_MARKDOWN if nasty else "")
            ),
            tasks=("classification",) if place % 3 else ("classification", "detection"),
            needs=("forward-pass",) if place % 2 else ("gradients",),
            class_specific=(True, False, None)[place % 3],
            output="heatmap",
            mechanism="Take $a<b$ and $$\\bar A = \\tfrac12 A$$ as in `m-0`. " + (NASTY_MARKDOWN if nasty else ""),
            relations=(Relation(type="extends", id="m-0"),) if 0 < place < 4 else (),
            in_survey=("yes", "no", "unknown")[place % 3],
            snippet=f"snippets/{branch.family}/m_{place}.py" if place < 3 else None,
            passes="1 forward" + nasty if place < 2 else None,
            differences=(
                Difference(
                    paper="Says $a$. " + nasty,
                    code="Does $b$. " + nasty,
                    repository="https://code.example/a",
                    commit="0123456789",
                    function="a.py: run" + nasty,
                    options={"order": "x" + NASTY},
                ),
                Difference(
                    paper="Says.",
                    code="Does.",
                    repository="https://code.example/a",
                    commit="0123456789",
                    function="a.py: run",
                    options=None,
                    why_not_measured="Because " + nasty,
                ),
            )
            if place == 0
            else (),
            reported=_reported(nasty) if place == 0 else (),
            why_no_snippet=None if place < 3 else "Nobody wrote it." + nasty,
            sources=("seen" + nasty,),
            note="Note. " + nasty if place % 2 else None,
            formerly=("m-one", "m-uno") if place == 1 else (),
        )

    card = ModelCard(
        id="glyph",
        name="Glyph" + nasty,
        architecture="a" + nasty,
        parameters=10,
        input_size=112,
        classes=2,
        licence="MIT",
        training="t" + nasty,
        command="python train.py" + nasty,
        seed=0,
        minutes=1.5,
        sha256="0" * 64,
        metrics={"top1": 0.98},
        limits="l" + nasty,
        source="s" + nasty,
    )

    def criterion(id: str, category: str, better: Literal["up", "down", "neither"], snippet: bool) -> Criterion:
        return Criterion(
            id=id,
            name=id.title() + nasty,
            paper=method(0).paper if snippet else None,
            category=category,
            definition="Take $a.b$ away. Then see `m-0` and `insertion`. " + (NASTY_MARKDOWN if nasty else ""),
            better=better,
            implemented_in=("quantus.X" + nasty,) if snippet else (),
            in_survey="unknown",
            snippet=f"snippets/evaluation/{id.replace('-', '_')}.py" if snippet else None,
            why_no_snippet=None if snippet else "It needs people." + nasty,
            relations=(Relation(type="uses", id="insertion"),) if id == "deletion" else (),
            sources=("seen" + nasty,),
            note="Note. " + nasty if snippet else None,
        )

    criteria = [
        criterion("deletion", "faithfulness", "down", True),
        criterion("insertion", "faithfulness", "up", True),
        criterion("pointing-game", "cost", "up", True),
        criterion("human-study", "cost", "neither", False),
    ]
    order = [branch.id for branch in branches]
    methods = sorted(map(method, range(count)), key=lambda one: (order.index(one.subfamily), one.paper.year, one.id))
    return Catalog(
        taxonomy,
        {one.id: one for one in methods},
        {"glyph": card},
        {one.id: one for one in criteria},
        *reference(nasty),
    )


def reference(nasty: str) -> tuple[dict[str, Tool], dict[str, Leaderboard], dict[str, Perspective]]:
    """Two tools, a leaderboard of one row of each architecture, and two perspectives, one of them empty."""
    markdown = NASTY_MARKDOWN if nasty else ""

    def tool(id: str, answer: Literal["partly", "unknown"], known: bool) -> Tool:
        return Tool(
            id=id,
            name=id.title() + nasty,
            url="https://code.example/a&b",
            licence="MIT" + nasty if known else None,
            methods=("one" + nasty, "two"),
            evaluates=True if known else None,
            vit_support="Some. " + markdown,
            runs_on_stock_timm=Runs(answer=answer, reason="Tried. " + markdown),
            implements=("m-0", "deletion") if known else (),
            sources=("seen" + nasty, "there"),
            verified=known,
            note="Note. " + markdown if known else None,
        )

    rows: tuple[tuple[Literal["transformer", "hybrid", "cnn"], float, bool], ...] = (
        ("transformer", 92.5, True),
        ("hybrid", 91.0, False),
        ("cnn", 91.0, True),
    )
    board = Leaderboard(
        id="board",
        name="Board" + nasty,
        metric="accuracy" + nasty,
        unit="%" + nasty,
        as_of="2023-11",
        rows=tuple(
            LeaderboardRow(
                rank=rank,
                model=f"Model {rank}{nasty}",
                score=score,
                year=2023,
                architecture=architecture,
                arxiv="2005.00928" if rank == 1 else None,
                sources=("seen" + nasty,),
                verified=verified,
                note="Row. " + markdown if rank == 2 else None,
            )
            for rank, (architecture, score, verified) in enumerate(rows, 1)
        ),
        note="Caution. " + markdown,
    )

    def paper(place: int) -> LaterPaper:
        return LaterPaper(
            title=f"Later {place}{nasty}",
            authors="Wu et al." + nasty if place else None,
            year=2024,
            venue="Venue 2024" + nasty if place else None,
            arxiv=("2404.99999", "2005.00928", None)[place],  # the second is that of the methods
            how="By magic. " + markdown,
            entry="insertion" if place == 2 else None,
            sources=("seen" + nasty,),
            verified=place != 1,
        )

    full = Perspective(
        id="full",
        name="Full" + nasty,
        description="Open. " + markdown,
        survey_wording_seen=False,
        later_papers=tuple(map(paper, range(3))),
        entries=("m-1", "m-3", "human-study"),
        here="See [the cost](/cost/). " + markdown,
        note="Note. " + markdown,
    )
    bare = Perspective(id="bare", name="Bare", description="Open.", survey_wording_seen=True, later_papers=())
    return (
        {"one": tool("one", "partly", True), "two": tool("two", "unknown", False)},
        {"board": board},
        {"bare": bare, "full": full},
    )


def png() -> bytes:
    """A grey picture of 4 x 3 pixels."""
    buffer = BytesIO()
    Image.new("L", (4, 3), 128).save(buffer, "png")
    return buffer.getvalue()


def notebook() -> str:
    """An executed snippet, as the text of an .ipynb."""
    from base64 import b64encode

    from nbformat import v4, writes

    markdown = (
        "# Title\nSee `m-1`; $x_i < 1$ and\n\n$$\\sum_i x_i$$\n\n## The equation\n\nA [link](/methods/m-1/#cite)."
    )
    source = 'def explain(model, images, target=None):\n    return "a < b" and {"href": "/x/"}'
    outputs = [
        v4.new_output("stream", name="stdout", text="predicted <b>star</b> & more\n"),
        v4.new_output("stream", name="stderr", text="a warning with a /private/path\n"),
        v4.new_output("display_data", {"image/png": b64encode(png()).decode(), "text/plain": "<Figure>"}),
    ]
    book = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": ""}})
    book.cells = [
        v4.new_markdown_cell(markdown, id="one"),
        v4.new_code_cell(source, id="two"),
        v4.new_code_cell("demo()", id="three", execution_count=1, outputs=outputs),
    ]
    return writes(book)


def benchmark() -> dict:
    """A made-up result with hostile text, a method and a criterion that the catalogue does not know, and gaps."""
    methods = ["m-0", "m-1", "gone", "random", "object-mask"]
    criteria = ["deletion", "insertion", "pointing-game", "lost"]
    means = {"m-0": 0.25, "m-1": 0.5, "gone": 0.9, "random": 0.125, "object-mask": 1.0}
    rows = [
        {
            "method": method,
            "criterion": criterion,
            "count": 128,
            "mean": mean,
            "low": mean - 0.0625,
            "high": mean + 0.125,
        }
        | {"p": None if method in methods[3:] else 0.5 if (method, criterion) == ("m-0", "insertion") else 1e-9}
        for method, mean in means.items()
        for criterion in criteria
        if (method, criterion) != ("m-1", "pointing-game")
    ]
    rows.append(
        {"method": "m-1", "criterion": "pointing-game", "count": 0} | dict.fromkeys(("mean", "low", "high", "p"))
    )
    series = {id: [mean, mean / 2, None if id == "m-0" else 0.0] for id, mean in means.items()}
    rank = {"blocks": 3, "p": 0.01, "critical_difference": 0.75, "mean_ranks": {"m-0": 1.5, "m-1": 2.0, "gone": 2.5}}
    rank["cliques"] = [["m-0", "m-1"], ["m-1", "gone"]]
    return {
        "provenance": {"date": "2026-01-01" + NASTY, "passes": 12800, "data": {"name": NASTY, "pictures": 128}},
        "methods": methods,
        "criteria": criteria,
        "explained": {
            id: {"passes": passes, "pictures": 128, "again": 32, "options": {"steps": 3} if id == "m-1" else {}}
            for id, passes in zip(methods, (2.0, 64.0, 8.0, 0.0, 0.0), strict=True)
        },
        "rows": rows,
        "skipped": [{"method": id, "criterion": "human-study", "why": "nobody to ask" + NASTY} for id in methods]
        + [{"method": "m-1", "criterion": "deletion" + NASTY, "why": "x" + NASTY}],
        "failed": {"m-2": "it broke" + NASTY, "gone" + NASTY: "it went"},
        "curves": {key: {"shares": [0.0, 0.5, 1.0], "methods": series} for key in ("most_first", "least_first")},
        "cascade": {"stages": ["head" + NASTY, "block", "embedding"], "methods": series},
        "judging": ["faithfulness"],
        "ranks": [{"criterion": criterion} | rank for criterion in ("deletion", "all")],
        "agreement": {
            "methods": {"ids": ["m-0", "m-1"], "matrix": [[1.0, -0.5], [-0.5, 1.0]]},
            "criteria": {"ids": [c + NASTY for c in criteria], "matrix": [[1.0, None, -1.0, 0.2]] * 4},
        },
    }


def results() -> dict:
    grades = [("random", 0.1), ("object-mask", 0.9), ("m-0", 0.5), ("m-1", 0.7)]
    return {
        "glyph": {
            "provenance": {"date": "2026-01-01" + NASTY},
            "rows": [
                {"method": id, "mass_inside": value, "pointing_game": value, "mass_on_target": None, "scenes": 64}
                for id, value in grades
            ],
        },
        "proof": {
            "provenance": {},
            "rows": [
                {
                    "method": "m-0",
                    "check": "uniform" + NASTY,
                    "oracle": "paper" + NASTY,
                    "kind": kind,
                    "value": 1e-17,
                    "bound": 1e-6,
                    "passed": kind == "contract",
                }
                for kind in ("parity", "closed form", "contract")
            ]
            + [
                {"method": "deletion", "check": "line" + NASTY, "oracle": "quantus" + NASTY, "kind": "parity"}
                | {"value": 1e-9, "bound": 1e-6, "passed": True}
            ],
        },
        "differences": {
            "provenance": {},
            "rows": [
                {"method": "m-0", "options": {"order": "x" + NASTY}}
                | {world: {"mean": 0.5, "smallest": 0.25} for world in ("glyph", "photo")}
            ],
        },
        "shapley": {
            "provenance": {},
            "rows": [
                {"method": name, "samples": samples}
                | {"correlation": 0.875, "correlation_deviation": 0.03125}
                | {"relative_error": 0.5, "relative_error_deviation": 0.0}
                for name, samples in (("m-0" + NASTY, 32), ("m-0" + NASTY, 64), ("m-1", 2))
            ],
        },
        "balance": {
            "provenance": {"date": "2026-01-01" + NASTY},
            "rows": [
                {"method": f"m-{i}", "accuracy": 0.9 + 0.02 * i, "parts": 0.3, "mass_inside": 0.5, "pointing_game": 0.8}
                for i in range(2)
            ],
        },
        "pruned": {
            "provenance": {},
            "rows": [
                {
                    "method": "m-0",
                    "options": {"keep" + NASTY: rate},
                    "accuracy": rate,
                    "plain_accuracy": 1.0,
                    "time": 0.7,
                }
                | {"operations": rate, "agreement": 0.5, "tokens": rate, "precision": 0.25, "recall": 0.125}
                for rate in (0.5, 1.0)
            ]
            + [
                {"method": "m-1", "options": {}, "accuracy": 0.5, "plain_accuracy": 1.0, "time": 0.7}
                | {"operations": 0.5, "agreement": 0.5}
            ],
        },
        "benchmark-glyph": benchmark(),
        "cost": {
            "provenance": {},
            "rows": [
                *(
                    {"method": id, "by": "vitx", "options": options, "operations": 3.1}
                    | {name: {"1": 2.5, "8": 2.25} for name in ("forwards", "memory", "seconds")}
                    for id, options in (("m-0", {}), ("m-0", {"a": "b" + NASTY}), ("m-1", {"a": "b" + NASTY}))
                ),
                {"method": "m-0", "by": "peer" + NASTY, "options": {}, "failed": "no" + NASTY},
            ],
        },
    }


def build(folder: Path, fault: str = "") -> None:
    """Build the site with the real hooks, theme and prose, and with this catalogue in place of the real one.

    ``fault``: "notebook" leaves out the notebook of m-0, "result" truncates results/glyph.json.
    """
    import vitx
    import vitx.catalog

    atlas = folder / "atlas"
    (atlas / "catalog" / "results").mkdir(parents=True)
    (atlas / "catalog" / "schema").mkdir()
    for kind in KINDS:
        (atlas / "catalog" / "schema" / f"{kind}.json").write_text("{}")
    for name, result in results().items():
        (atlas / "catalog" / "results" / f"{name}.json").write_text(json.dumps(result))
    if fault == "result":
        (atlas / "catalog" / "results" / "glyph.json").write_text("{")
    (atlas / "CITATION.cff").write_text(
        'title: "vitx: an atlas"\nauthors:\n  - name: Us\nversion: 0.1.0\ndate-released: "2026-01-01"\n'
    )
    content = catalog()
    notebooks = {}
    for id, entry in {**content.methods, **content.criteria}.items():
        if entry.snippet:
            (atlas / entry.snippet).parent.mkdir(parents=True, exist_ok=True)
            (atlas / entry.snippet).write_text("def score(relevance, most_first, *, kind=1):\n    pass\n")
            if (fault, id) != ("notebook", "m-0"):
                notebooks[id] = folder / f"{id}-executed.ipynb"
                notebooks[id].write_text(notebook())
    picture = folder / "figure.png"
    picture.write_bytes(png())

    execute = types.ModuleType("vitx.execute")
    execute.notebooks = lambda ids: notebooks  # type: ignore[attr-defined]
    execute.figures = lambda: {"compare-photo": picture, "maps-m-0": picture}  # type: ignore[attr-defined]
    execute.ExecutionError = RuntimeError  # type: ignore[attr-defined]
    sys.modules["vitx.execute"] = vitx.execute = execute  # type: ignore[attr-defined]
    vitx.ATLAS = atlas
    vitx.catalog.load = lambda *_: content

    from mkdocs.__main__ import cli

    cli(["build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder / "site")])


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
