"""The command line: list, show, cite, run, compare, bench, check, new. Only commands that need torch import it."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitx import catalog, cite

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
    as_json: Annotated[bool, typer.Option("--json", help="Print an array of whole entries.")] = False,
) -> None:
    """List methods, all or those that match every filter."""
    found = catalog.find(catalog.load(), family=family, motivation=motivation, task=task, needs=needs, year=year)
    if as_json:
        typer.echo(json.dumps([method.model_dump(mode="json") for method in found], indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "year", "family", "subfamily", "output", "runs"):
        table.add_column(column, no_wrap=column == "id")
    for method in found:
        runs = "yes" if method.snippet else "no"
        table.add_row(method.id, str(method.paper.year), method.family, method.subfamily, method.output, runs)
    console.print(table)
    console.print(f"{len(found)} of {len(catalog.load().methods)} methods", style="dim")


@app.command()
def show(id: Id) -> None:
    """Show one entry: paper, classification, motivation, mechanism."""
    method = catalog.get(catalog.load(), id)
    console.print(f"[bold]{_plain(method.name)}[/bold]  ({method.id})")
    console.print(_plain(cite.apa(method)), soft_wrap=True)
    rows = {
        "family": f"{method.family} / {method.subfamily}",
        "motivation": f"{', '.join(method.motivation.terms)}. {method.motivation.text}",
        "tasks": ", ".join(method.tasks),
        "needs": ", ".join(method.needs),
        "class-specific": {True: "yes", False: "no", None: "unknown"}[method.class_specific],
        "output": method.output,
        "in the survey": method.in_survey,
        "code": f"{method.code.url} ({method.code.licence or 'licence unknown'})" if method.code else "unknown",
        "relations": ", ".join(f"{relation.type} {relation.id}" for relation in method.relations) or "none",
        "snippet": method.snippet or f"none: {method.why_no_snippet}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, _plain(value))
    console.print(table)
    console.print()
    console.print(_plain(method.mechanism), soft_wrap=True)


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)


@app.command("cite")
def cite_methods(
    ids: Annotated[list[str] | None, typer.Argument(help="Catalogue ids.")] = None,
    family: Annotated[str | None, typer.Option(help="All methods of a family.")] = None,
    format: Annotated[str, typer.Option(help="bibtex, csl-json or apa.")] = "bibtex",
) -> None:
    """Print citations of methods, of a family, or of the whole catalogue."""
    loaded = catalog.load()
    methods = [catalog.get(loaded, id) for id in ids or []]
    if family or not ids:
        methods += [method for method in catalog.find(loaded, family=family) if method not in methods]
    if format == "bibtex":
        typer.echo(cite.bibtex(methods), nl=False)
    elif format == "csl-json":
        typer.echo(cite.csl_json(methods), nl=False)
    elif format == "apa":
        typer.echo("\n".join(cite.apa(method) for method in methods))
    else:
        raise ValueError(f'the format is bibtex, csl-json or apa, not "{format}"')


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


@app.command()
def bench(
    methods: Annotated[str | None, typer.Option(help="Ids, with commas between; all that apply if left out.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Glyph scenes of each kind.")] = 128,
    cost: Annotated[bool, typer.Option("--cost", help="Measure time, memory and operations instead.")] = False,
    differences: Annotated[
        bool, typer.Option("--differences", help="Measure what the official code's behaviour changes instead.")
    ] = False,
    pruned: Annotated[bool, typer.Option("--pruned", help="Measure what pruning keeps and saves instead.")] = False,
    balance: Annotated[
        bool, typer.Option("--balance", help="Measure models that explain themselves: accuracy and truth instead.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method for --cost and --pruned.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write; in catalog/results/ if left out.")] = None,
) -> None:
    """Score heat maps against the known evidence of glyph scenes, or measure costs, differences or pruned models."""
    if cost + differences + pruned + balance > 1:
        raise typer.BadParameter("give one of --cost, --differences, --pruned and --balance.")
    ids = [id.strip() for id in methods.split(",") if id.strip()] if methods else None
    for id in ids or []:
        catalog.snippet_path(id)
    from vitx import bench
    from vitx import cost as costs

    if cost:
        path = out or costs.RESULT
        result = costs.measure(ids or costs.measured_methods(), repeats, path)
        columns = ("method", "by", "options", "forwards", "operations", "memory", "failed")
    elif differences:
        path = out or bench.RESULT.with_name("differences.json")
        result = bench.differences(ids or list(catalog.load().methods), path=path)
        columns = ("method", "options", "glyph", "photo")
    elif pruned:
        from vitx import pruned as pruning

        path = out or pruning.RESULT
        result = pruning.measure(ids or pruning.measured_methods(), repeats=repeats, path=path)
        columns = ("method", "options", "accuracy", "operations", "time", "recall", "agreement")
    elif balance:
        path = out or bench.RESULT.with_name("balance.json")
        result = bench.balance(ids or bench.self_explaining_methods(), scenes, path=path)
        columns = ("method", "accuracy", "mass_inside", "pointing_game", "parts")
    else:
        path = out or bench.RESULT
        result = bench.glyph_truth(ids or bench.heat_map_methods(), scenes, path=path)
        columns = ("method", "mass_inside", "pointing_game", "mass_on_target", "seconds")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "by", "options") else "right")
    for row in result["rows"]:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console.print(table)
    console.print(f"wrote {path}", highlight=False)


# --- contributing --------------------------------------------------------------------------------------------------


@app.command()
def check(
    run: Annotated[bool, typer.Option("--run", help="Also execute every snippet that has changed.")] = False,
) -> None:
    """Check the catalogue and what belongs to it; every problem is one line with file and line."""
    problems = catalog.check()
    for problem in problems:
        typer.echo(problem)
    if problems:
        typer.echo(f"{len(problems)} problem{'s' * (len(problems) > 1)}", err=True)
        raise typer.Exit(1)
    methods = catalog.load().methods
    console.print(f"{len(methods)} methods, no problems", highlight=False)
    if run:
        from vitx import execute

        notebooks = execute.notebooks([id for id, method in methods.items() if method.snippet])
        console.print(f"{len(notebooks)} snippets run", highlight=False)


@app.command()
def new(
    id: Annotated[str, typer.Argument(help="Id of the new method: lower case, words joined by hyphens.")],
    family: Annotated[str, typer.Option(help="attribution, attention, pruning, inherent or tasks.")],
) -> None:
    """Write the skeleton of an entry, a snippet and a test; `vitx check` lists what is left to fill in."""
    from vitx import scaffold

    for path in scaffold.new(id, family):
        console.print(f"wrote {path}", highlight=False)
    console.print("`vitx check` lists what is left to do, with file and line", highlight=False)
