"""The command line, from list to diff. Only commands that need torch import it."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitx import catalog, cite, export
from vitx.schema import KINDS, Criterion, Leaderboard, Method, ModelCard, Perspective, Tool

if TYPE_CHECKING:
    from torch import Tensor

    from vitx.models import Loaded

app = typer.Typer(
    name="vitx",
    help="An executable atlas of Vision Transformer explainability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

Id = Annotated[str, typer.Argument(help="Catalogue id, such as attention-rollout.")]
Image = Annotated[str | None, typer.Option(help="A file; chelsea, coffee, astronaut, rocket, motorcycle; or sample.")]
Model = Annotated[str | None, typer.Option(help="glyph, photo, or any timm name of a VisionTransformer.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights of your own fine-tuned model (.safetensors, .pth).")]
Classes = Annotated[int | None, typer.Option(help="Number of classes of that checkpoint.")]
Target = Annotated[str | None, typer.Option(help="Class to explain, by index or name; the predicted one if left out.")]
Device = Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 2 (VITX_DEBUG=1: in a traceback)."""
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        sys.exit(0)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("VITX_DEBUG"):
            raise
        typer.echo(f"vitx: {error}", err=True)
        sys.exit(2)


# --- the catalogue -------------------------------------------------------------------------------------------------


@app.command("list")
def list_methods(
    family: Annotated[str | None, typer.Option(help="attribution, attention, pruning, inherent or tasks.")] = None,
    motivation: Annotated[str | None, typer.Option(help="Term of the motivations vocabulary.")] = None,
    task: Annotated[str | None, typer.Option(help="Term of the tasks vocabulary.")] = None,
    needs: Annotated[str | None, typer.Option(help="forward-pass, gradients, attention-weights, training, ...")] = None,
    year: Annotated[str | None, typer.Option(help="2021, or 2020-2022.")] = None,
    criteria: Annotated[bool, typer.Option("--criteria", help="List the criteria of evaluation instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array of whole entries.")] = False,
) -> None:
    """List methods, all or those that match every filter, or the criteria by which they are judged."""
    loaded = catalog.load()
    if criteria and any((family, motivation, task, needs, year)):
        raise ValueError("--criteria lists all criteria; the filters are for methods")
    columns = ("category", "better") if criteria else ("family", "subfamily", "output")
    methods = catalog.find(loaded, family=family, motivation=motivation, task=task, needs=needs, year=year)
    found = list(loaded.criteria.values()) if criteria else methods
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in found], indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "year", *columns, "runs"):
        table.add_column(column, no_wrap=column == "id")
    for entry in found:
        values = [getattr(entry, column) for column in columns]
        table.add_row(entry.id, str(entry.paper.year) if entry.paper else "", *values, "yes" if entry.snippet else "no")
    console.print(table)
    count = f"{len(found)} criteria" if criteria else f"{len(found)} of {len(loaded.methods)} methods"
    console.print(count, style="dim")


@app.command()
def show(id: Id) -> None:
    """Show what the catalogue says of an id: a method, criterion, tool, leaderboard, perspective or model."""
    for number, entry in enumerate(catalog.named(catalog.load(), id)):
        if number:
            console.print()
        kind = next(kind for kind, record in KINDS.items() if record is type(entry))
        console.print(f"[bold]{_plain(entry.name)}[/bold]  ({kind} {entry.id})")
        if isinstance(entry, Method | Criterion):
            console.print(_plain(cite.apa(entry)) if entry.paper else "no paper of its own", soft_wrap=True)
        rows, texts = _facts(entry)
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in rows.items():
            table.add_row(name, _plain(value))
        console.print(table)
        for text in filter(None, texts):
            console.print()
            console.print(_plain(text), soft_wrap=True)


_YES_NO = {True: "yes", False: "no", None: "unknown"}


def _facts(entry: Any) -> tuple[dict[str, str], list[str | None]]:
    """What ``show`` says of an entry: short facts by name, and texts."""
    if isinstance(entry, Tool):
        runs = entry.runs_on_stock_timm
        return {
            "address": entry.url,
            "licence": entry.licence or "unknown",
            "holds": ", ".join(entry.methods),
            "evaluates": _YES_NO[entry.evaluates],
            "on a stock timm model": f"{runs.answer}. {runs.reason}",
            "methods and criteria here": ", ".join(entry.implements) or "none",
        }, [entry.vit_support, entry.note]
    if isinstance(entry, Leaderboard):
        ranking = [
            f"{row.rank}. {row.model}: {row.score:g} {entry.unit} ({row.architecture}, {row.year})"
            for row in entry.rows
        ]
        return {"metric": f"{entry.metric}, {entry.unit}", "as of": entry.as_of}, ["\n".join(ranking), entry.note]
    if isinstance(entry, Perspective):
        papers = [
            f"{paper.title} ({f'{paper.authors}, ' if paper.authors else ''}{paper.year}). {paper.how}"
            for paper in entry.later_papers
        ]
        rows = {"entries": ", ".join(entry.entries) or "none", "later papers": str(len(papers) or "none")}
        return rows, [entry.description, "\n".join(papers), entry.here, entry.note]
    if isinstance(entry, ModelCard):
        return {
            "architecture": entry.architecture,
            "parameters": f"{entry.parameters:,}",
            "input": f"{entry.input_size} x {entry.input_size}, {entry.classes} classes",
            "measured": ", ".join(f"{name} {value:g}" for name, value in entry.metrics.items()),
            "licence": entry.licence,
        }, [entry.training, entry.limits]
    if isinstance(entry, Method):
        rows = {
            "family": f"{entry.family} / {entry.subfamily}",
            "motivation": f"{', '.join(entry.motivation.terms)}. {entry.motivation.text}",
            "tasks": ", ".join(entry.tasks),
            "needs": ", ".join(entry.needs),
            "class-specific": _YES_NO[entry.class_specific],
            "output": entry.output,
            "code": f"{entry.code.url} ({entry.code.licence or 'licence unknown'})" if entry.code else "unknown",
        }
    else:
        rows = {
            "category": entry.category,
            "better": entry.better,
            "implemented in": ", ".join(entry.implemented_in) or "nowhere known",
        }
    return rows | {
        "in the survey": entry.in_survey,
        "relations": ", ".join(f"{relation.type} {relation.id}" for relation in entry.relations) or "none",
        "snippet": entry.snippet or f"none: {entry.why_no_snippet}",
    }, [entry.mechanism if isinstance(entry, Method) else entry.definition]


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)


@app.command("cite")
def cite_methods(
    ids: Annotated[list[str] | None, typer.Argument(help="Catalogue ids.")] = None,
    family: Annotated[str | None, typer.Option(help="All methods of a family.")] = None,
    format: Annotated[str, typer.Option(help="bibtex, csl-json, apa or csv.")] = "bibtex",
) -> None:
    """Print citations of methods and criteria, of a family, or of all methods."""
    loaded = catalog.load()
    entries = [catalog.entry(loaded, id) for id in ids or []]
    if family or not ids:
        entries += [method for method in catalog.find(loaded, family=family) if method not in entries]
    if format == "bibtex":
        typer.echo(cite.bibtex(entries), nl=False)
    elif format == "csl-json":
        typer.echo(cite.csl_json(entries), nl=False)
    elif format == "apa":
        typer.echo("\n".join(cite.apa(entry) for entry in entries))
    elif format == "csv":
        typer.echo(export.csv_text(entries), nl=False)
    else:
        raise ValueError(f'the format is bibtex, csl-json, apa or csv, not "{format}"')


# --- running -------------------------------------------------------------------------------------------------------


@app.command()
def run(
    id: Id,
    image: Image = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    num_classes: Classes = None,
    target: Target = None,
    device: Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="PNG to write; the raw map goes beside it as .npy, scores of units as .npz.")
    ] = None,
) -> None:
    """Explain one picture with one method: prints the predicted classes, writes the picture and the raw map."""
    entry = catalog.get(catalog.load(), id)
    catalog.snippet_path(id)  # refuses entries without a snippet before anything heavy is loaded
    out = _png(out or Path(f"{id}.png"))
    with console.status("loading torch, model and picture"):
        loaded, x, picture, shown = _prepare(
            image, model or _default_model(entry.model, checkpoint), checkpoint, num_classes, device
        )
        # A method for pictures and words takes any caption or question.
        worded = {"image-text-matching", "visual-question-answering"} & set(entry.tasks)
        goal = [target] if worded and target and " " in target else _target(target, loaded)
        import torch

        from vitx import load, plot

        explain = load(id)
    if loaded.class_names:
        with torch.inference_mode():
            probabilities = loaded.model(x)[0].softmax(-1)
        for probability, index in zip(*probabilities.topk(min(5, len(probabilities))), strict=True):
            console.print(
                f"{float(probability):6.1%}  {_plain(loaded.class_names[int(index)])} ({int(index)})", highlight=False
            )
    with console.status(f"{id} on {shown}"):
        result = explain(loaded.model, x, goal)
    asked = f": {loaded.class_names[int(goal[0])]}" if isinstance(goal, torch.Tensor) else ""
    _write(out, plot.encode(plot.explanation(result, picture, entry.name + asked)))
    if entry.output == "units":
        numbers = out.with_suffix(".npz")
        _write_arrays(
            numbers,
            {f"{field}_{kind}": t for field in ("scores", "kept") for kind, t in getattr(result, field).items()},
        )
    else:
        numbers = out.with_suffix(".npy")
        _write_array(numbers, plot.heatmap(result)[0])
    console.print(f"wrote {out} and {numbers}", highlight=False)


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Ids, with commas between.")],
    image: Annotated[list[str] | None, typer.Option(help="A picture as in run; may be given several times.")] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    num_classes: Classes = None,
    target: Target = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("comparison.png"),
) -> None:
    """Explain pictures with several methods, side by side in one figure."""
    loaded_catalog = catalog.load()
    entries = [catalog.get(loaded_catalog, id.strip()) for id in methods.split(",") if id.strip()]
    if not entries:
        raise ValueError("name at least one method: --methods grad-cam,attention-rollout")
    for entry in entries:
        catalog.snippet_path(entry.id)
        if entry.output == "units":
            raise ValueError(
                f"{entry.id} scores parts of the model and has no heat map to compare: use vitx run {entry.id}"
            )
    out = _png(out)
    name = model or ("photo" if checkpoint is None else _default_model("glyph", checkpoint))
    import torch
    from rich.progress import Progress

    from vitx import load, plot
    from vitx.compare import short_name

    rows = []
    with Progress(transient=True, console=console) as progress:
        names = image or [None]
        task = progress.add_task("comparing", total=len(names) * len(entries))
        loaded: Loaded | None = None
        for row, given in enumerate(names):
            loaded, x, picture, shown = _prepare(given, name, checkpoint, num_classes, device, loaded)
            goal = _target(target, loaded)
            with torch.inference_mode():
                label = int(loaded.model(x)[0].argmax()) if goal is None else int(goal[0])
            cells = [plot.Cell(picture, None, f"{Path(shown).name}: {loaded.class_names[label]}")]
            for entry in entries:
                progress.update(task, description=f"{entry.id} on {shown}")
                relevance = plot.heatmap(load(entry.id)(loaded.model, x, goal))[0]
                cells.append(plot.Cell(picture, relevance, short_name(entry.name) if not row else ""))
                progress.advance(task)
            rows.append(cells)
    _write(out, plot.encode(plot.grid(rows)))
    console.print(f"wrote {out}", highlight=False)


def _default_model(name: str, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        raise ValueError(f"--checkpoint {checkpoint} needs --model, the timm name of its architecture")
    return name


def _prepare(
    image: str | None,
    model: str,
    checkpoint: Path | None,
    num_classes: int | None,
    device: str,
    loaded: "Loaded | None" = None,
) -> "tuple[Loaded, Tensor, Any, str]":
    """(model, normalised picture (1, 3, H, W), picture (H, W, 3) in [0, 1], the picture's name)."""
    from vitx import images, models

    own = "sample" if model.endswith("glyph") else f"lesion:{images.SAMPLE_SEED}" if model == "lesion" else "coffee"
    shown = image or own
    opened = images.open_image(shown)
    loaded = loaded or models.load(model, checkpoint, num_classes, device)
    x = loaded.preprocess(opened)[None].to(device)
    return loaded, x, images.to_array(x[0], loaded.mean, loaded.std), shown


def _target(target: str | None, loaded: "Loaded") -> "Tensor | None":
    """The class as a (1,) tensor. Raises ValueError with the nearest names, or the range."""
    import torch

    if target is None:
        return None
    device = next(loaded.model.parameters()).device
    names = [name.casefold() for name in loaded.class_names]
    if target.casefold() in names:
        return torch.tensor([names.index(target.casefold())], device=device)
    if target.lstrip("-").isdecimal():
        if not 0 <= int(target) < len(names):
            raise ValueError(f"class {target} is out of range: the model has classes 0 to {len(names) - 1}")
        return torch.tensor([int(target)], device=device)
    near = catalog.nearest(target, loaded.class_names)
    raise ValueError(f'the model has no class "{target}"' + (f"; nearest: {', '.join(near)}" if near else ""))


def _png(path: Path) -> Path:
    """The path, checked before anything is computed."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, not {path.name!r}")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder")
    return path


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _write_array(path: Path, values: "Tensor") -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    _write(path, buffer.getvalue())


def _write_arrays(path: Path, values: "dict[str, Tensor]") -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in values.items()}
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue())


class Masking(StrEnum):
    """How patches are hidden."""

    mean = "mean"
    blur = "blur"
    zero = "zero"
    attention = "attention"
    drop = "drop"


class Engine(StrEnum):
    """Who runs the shards of the benchmark."""

    local = "local"
    ray = "ray"


@app.command()
def bench(
    methods: Annotated[str | None, typer.Option(help="Ids, with commas between; all that apply if left out.")] = None,
    criteria: Annotated[str | None, typer.Option(help="Ids of criteria, with commas between; all if left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; glyph for glyph scenes, photo for all other data.")] = None,
    data: Annotated[str, typer.Option(help="glyph, caltech101, oxford-pet, imagenet-s or folder.")] = "glyph",
    root: Annotated[Path | None, typer.Option(help="Folder of the data, for those who have it.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data if it is not there.")] = False,
    scenes: Annotated[int | None, typer.Option(min=2, help="Pictures; 128 glyph scenes, 120 others.")] = None,
    masking: Annotated[Masking | None, typer.Option(help="How patches are hidden; drop if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few glyph scenes and coarse settings, in minutes.")] = False,
    engine: Annotated[Engine, typer.Option(help="Processes of this machine, or Ray.")] = Engine.local,
    workers: Annotated[int | None, typer.Option(min=1, help="Methods at once; one for each core if left out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")] = False,
    localisation: Annotated[
        bool, typer.Option("--localisation", help="Score all heat maps of glyph models on scenes of two instead.")
    ] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Measure time, memory and operations instead.")] = False,
    differences: Annotated[
        bool, typer.Option("--differences", help="Measure what the official code's behaviour changes instead.")
    ] = False,
    pruned: Annotated[bool, typer.Option("--pruned", help="Measure what pruning keeps and saves instead.")] = False,
    balance: Annotated[
        bool, typer.Option("--balance", help="Measure models that explain themselves: accuracy and truth instead.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time deletion and insertion beside plain passes and Quantus instead.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each for --cost, --pruned and --speed.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write; in catalog/results/ if left out.")] = None,
) -> None:
    """Measure methods by criteria of evaluation; or costs, differences, pruned models and others."""
    if localisation + cost + differences + pruned + balance + speed > 1:
        raise typer.BadParameter("give one of --localisation, --cost, --differences, --pruned, --balance and --speed.")
    ids = _ids(methods)
    from vitx import bench
    from vitx import cost as costs

    if not localisation + cost + differences + pruned + balance + speed:
        from vitx import evaluate

        known = _ids(criteria)
        unknown = next((id for id in known or [] if id not in evaluate.criteria()), None)
        if unknown:
            raise ValueError(f"{unknown} is no criterion with a snippet; `vitx list --criteria` shows them all")
        settings = evaluate.settings(data, model, root, download, scenes, masking and masking.value, quick)
        _benchmark(settings, ids, known, engine.value, workers, dry_run, out, write=not quick)
        return
    for id in ids or []:
        catalog.snippet_path(catalog.get(catalog.load(), id).id)
    if cost:
        path = out or costs.RESULT
        result = costs.measure(ids or costs.measured_methods(), repeats or 5, path)
        columns = ("method", "by", "options", "forwards", "operations", "memory", "failed")
    elif differences:
        path = out or bench.RESULT.with_name("differences.json")
        result = bench.differences(ids or list(catalog.load().methods), path=path)
        columns = ("method", "options", "glyph", "photo")
    elif pruned:
        from vitx import pruned as pruning

        path = out or pruning.RESULT
        result = pruning.measure(ids or pruning.measured_methods(), repeats=repeats or 5, path=path)
        columns = ("method", "options", "accuracy", "operations", "time", "recall", "agreement")
    elif balance:
        path = out or bench.RESULT.with_name("balance.json")
        result = bench.balance(ids or bench.self_explaining_methods(), scenes or 128, path=path)
        columns = ("method", "accuracy", "mass_inside", "pointing_game", "parts")
    elif speed:
        from vitx import speed as speeds

        path = out or speeds.RESULT
        result = speeds.measure(scenes or 64, repeats or 3, path)
        columns = ("by", "what", "masking", "pictures", "passes", "seconds", "over_passes")
    else:
        path = out or bench.RESULT
        result = bench.glyph_truth(ids or bench.heat_map_methods(), scenes or 128, path=path)
        columns = ("method", "mass_inside", "pointing_game", "mass_on_target", "seconds")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("method", "by", "what", "masking", "options") else "right"
        )
    for row in result["rows"]:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console.print(table)
    console.print(f"wrote {path}", highlight=False)


def _ids(text: str | None) -> list[str] | None:
    return [id.strip() for id in text.split(",") if id.strip()] if text else None


def _benchmark(
    settings: Any,
    methods: list[str] | None,
    criteria: list[str] | None,
    engine: str,
    workers: int | None,
    dry_run: bool,
    out: Path | None,
    write: bool,
) -> None:
    """Run the benchmark, show its means, and write the result where all methods and criteria were asked for."""
    from vitx import benchmark, evaluate, results

    whole = methods is None and criteria is None
    methods, criteria = methods or evaluate.methods(), criteria or evaluate.criteria()
    for id in methods:
        if id not in evaluate.methods():
            catalog.snippet_path(catalog.get(catalog.load(), id).id)
            raise ValueError(f"{id} gives no heat map of any classifier, so this benchmark cannot judge it")
    evaluate.count_passes(methods)
    wanted = [*criteria, *evaluate.series(criteria)]
    if dry_run:
        console.print(benchmark.describe(benchmark.plan(methods, wanted, settings)), highlight=False)
        return
    outcome = benchmark.run(methods, wanted, settings, engine, workers)
    result = results.build(methods, criteria, settings, outcome)
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    shown = criteria if len(criteria) <= 8 else [id for id in results.HEADLINES if id in criteria]
    for id in shown:
        table.add_column(id, justify="right", overflow="fold")
    means = {(row["method"], row["criterion"]): row["mean"] for row in result["rows"]}
    for method in result["methods"]:
        found = [means.get((method, id)) for id in shown]
        table.add_row(method, *("" if mean is None else f"{mean:.3g}" for mean in found))
    console.print(table)
    for method, sentence in outcome.failed.items():
        typer.echo(f"{method} failed: {sentence}", err=True)
    if out or (whole and write):
        path = results.save(result, out or results.result_path(settings))
        console.print(f"wrote {path}", highlight=False)
    else:
        console.print("a part of the benchmark is shown and not written; --out FILE.json writes it", highlight=False)
    if outcome.failed:
        raise typer.Exit(1)


# --- contributing --------------------------------------------------------------------------------------------------


@app.command()
def check(
    run: Annotated[bool, typer.Option("--run", help="Also execute every snippet that has changed.")] = False,
    links: Annotated[bool, typer.Option("--links", help="Also look every address up; takes minutes.")] = False,
) -> None:
    """Check the catalogue and what belongs to it; every problem is one line with file and line."""
    problems = catalog.check()
    for problem in problems:
        typer.echo(problem)
    if problems:
        typer.echo(f"{len(problems)} problem{'s' * (len(problems) > 1)}", err=True)
        raise typer.Exit(1)
    loaded = catalog.load()
    methods = loaded.methods
    console.print(f"{len(methods)} methods and {len(loaded.criteria)} criteria, no problems", highlight=False)
    if links:
        _check_links()
    if run:
        from vitx import execute

        entries = [*methods.values(), *loaded.criteria.values()]
        notebooks = execute.notebooks([entry.id for entry in entries if entry.snippet])
        console.print(f"{len(notebooks)} snippets run", highlight=False)


def _check_links() -> None:
    """Look up every address of the catalogue. Raises ``ValueError`` where there is no network."""
    from rich.progress import Progress

    from vitx import links

    places = links.addresses()
    with Progress(transient=True, console=console) as progress:
        task = progress.add_task("addresses", total=len(places))
        answers = links.look_up(list(places), lambda: progress.advance(task))
    for line in links.report(places, answers, links.State.DEAD):
        typer.echo(line)
    for line in links.report(places, answers, links.State.UNDECIDED):
        typer.echo(line, err=True)
    count = {state: sum(answer.state == state for answer in answers.values()) for state in links.State}
    console.print(
        f"{len(places)} addresses: {count[links.State.ALIVE]} answer, {count[links.State.DEAD]} are dead, "
        f"{count[links.State.UNDECIDED]} do not let a program decide",
        highlight=False,
    )
    if count[links.State.DEAD]:
        raise typer.Exit(1)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A folder catalog/, or a git revision of this repository.")],
    new: Annotated[str, typer.Argument(help="The same, of the later version.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the changes as JSON.")] = False,
) -> None:
    """Say what changed in vocabularies and entries between two versions, as Markdown for release notes."""
    from vitx import changes

    found = changes.compare(changes.read(old), changes.read(new))
    typer.echo(changes.as_json(found) if as_json else changes.markdown(found, old, new), nl=False)


@app.command()
def new(
    id: Annotated[str, typer.Argument(help="Id of the new entry: lower case, words joined by hyphens.")],
    family: Annotated[str | None, typer.Option(help="attribution, attention, pruning, inherent or tasks.")] = None,
    criterion: Annotated[bool, typer.Option("--criterion", help="A criterion of evaluation, not a method.")] = False,
    title: Annotated[str | None, typer.Option(help="Title of the paper.")] = None,
    arxiv: Annotated[str | None, typer.Option(help="arXiv identifier or address of the paper.")] = None,
    doi: Annotated[str | None, typer.Option(help="DOI or address of the paper.")] = None,
    bibtex: Annotated[Path | None, typer.Option(help="File with the BibTeX of the paper, one entry.")] = None,
) -> None:
    """Write the skeleton of an entry, a snippet and a test; `vitx check` lists what is left to fill in.

    At a terminal it asks for what is not given. arXiv or doi.org are asked for the facts of the paper.
    """
    from vitx import metadata, scaffold

    if sum(value is not None for value in (arxiv, doi, bibtex)) > 1:
        raise ValueError("give one of --arxiv, --doi and --bibtex")
    if criterion and family:
        raise ValueError("a criterion has no family; give either --family or --criterion")
    scaffold.check_new(id)
    asks = sys.stdin.isatty()
    if family is None and not criterion:
        families = [term.id for term in catalog.read_taxonomy().families]
        if not asks:
            raise ValueError(f"--family is missing; give one of {', '.join(families)}, or --criterion")
        family = typer.prompt(f"Family ({', '.join(families)})", value_proc=lambda word: _one_of(families, word))
    name = doi if arxiv is None else arxiv
    if asks and name is None and bibtex is None and title is None:
        name = _ask("arXiv identifier, DOI or BibTeX file of the paper")
        if name and Path(name).is_file():
            name, bibtex = None, Path(name)
    if bibtex is not None:
        work = metadata.read_bibtex(bibtex)
    elif name is not None:
        work = metadata.identify(name)
        scaffold.check_new(id, work=work)
        try:
            with console.status("asking for the facts of the paper"):
                work = metadata.complete(work)
        except metadata.NoAnswer as error:
            typer.echo(f"{error}; the entry keeps {work.arxiv or work.doi} and marks what to fill in")
    elif asks and title is None:
        names = "Authors, as Family, Given; Family, Given"
        work = metadata.by_hand(_ask("Title of the paper"), _ask(names), _ask("Year"))
    else:
        work = metadata.Work()
    if title:
        work = work._replace(title=metadata.clean(title))
    paths = scaffold.new_criterion(id, work=work) if criterion else scaffold.new(id, str(family), work=work)
    here = Path.cwd()
    for path in paths:
        console.print(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}", highlight=False)
    console.print("`vitx check` lists what is left to do, with file and line", highlight=False)


def _ask(text: str) -> str | None:
    """What is answered at the terminal; None for an empty line."""
    return typer.prompt(f"{text} (empty: not known)", default="", show_default=False).strip() or None


def _one_of(words: list[str], word: str) -> str:
    """The word; at the prompt it is asked for again where it is another."""
    if word not in words:
        raise typer.BadParameter(f'"{word}" is not one of them')
    return word
