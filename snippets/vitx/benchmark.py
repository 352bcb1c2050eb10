"""Measure methods by criteria, in processes of this machine or on Ray, and keep every row: a run that stops goes on.

What is measured is the business of a module such as ``vitx.evaluate``, called ``work`` here and given by its name, so
that workers can import it. It has
    Unavailable: an exception; its message says why something cannot be measured;
    plan(method, criteria, settings) -> {quantity: passes through the model}; may raise Unavailable;
    rows(method, criteria, settings): yields, for every criterion, its name and a list of values for each picture, or
        its name and a sentence that says why there are none; may raise Unavailable;
    identity(method, criterion, settings): a hash of all that the rows depend on, in letters and digits;
    shared_jobs(criteria, settings) -> names of what all methods share and nobody has computed yet; share(job, settings)
        computes and keeps one; shared_passes(criteria, settings) -> {quantity: passes} of all of them;
    perhaps skips(method, criteria, settings) -> {criterion: why not}, for what is known before anything is computed.
``settings`` is a NamedTuple with fields data and model. A criterion may also be a series of values, a curve say.

A shard is one method. Workers send rows to the process that runs the benchmark, and it alone writes them.
"""

import hashlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vitx import cache_dir

WORK = "vitx.evaluate"
TRIES = 2  # of a shard whose worker dies
PLACES = ("root", "download")  # settings that say where pictures come from, not what is measured
OBJECT_STORE = 100_000_000  # bytes for a Ray of our own: rows are small


class Stopped(RuntimeError):
    """The run was interrupted; the message says what is kept."""


class Shard(NamedTuple):
    """One method with the criteria whose rows are not there yet, or a job for what all methods share."""

    name: str
    criteria: tuple[str, ...]
    passes: float
    shared: bool = False
    tries: int = 0  # so far


class Plan(NamedTuple):
    """What a run would do."""

    shards: tuple[Shard, ...]  # most passes first
    shared: tuple[Shard, ...]  # jobs to be done before them
    paths: dict[tuple[str, str], Path]  # file of every method and criterion that can be measured
    skipped: dict[tuple[str, str], str]  # (method, criterion): why it cannot
    failed: dict[str, str]  # method: why it could not be planned


class Outcome(NamedTuple):
    """What is kept after a run, and what is not."""

    kept: dict[tuple[str, str], Path]  # (method, criterion): file of the rows, see ``read_rows``
    skipped: dict[tuple[str, str], str]  # (method, criterion): why there are none
    failed: dict[str, str]  # method (or shared job): what went wrong
    seconds: float


class Message(NamedTuple):
    """News of a shard: kind is started, rows, skipped, died (to be tried again), and at last ended or failed."""

    kind: str
    what: str = ""  # rows, skipped: the criterion; failed: a sentence
    content: Any = None  # rows: values (pictures, parts); skipped: why; failed: the traceback


class _Died(Exception):
    """A worker ended before its shard; the message says how."""


# --- what is kept ----------------------------------------------------------------------------------------------------


def folder(settings: Any) -> Path:
    """Where the rows of these settings are kept; other settings have other folders."""
    about = {name: value for name, value in settings._asdict().items() if name not in PLACES}
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:8]
    return cache_dir() / "benchmark" / _file_name(f"{settings.data}-{settings.model}-{digest}")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", ".", text)


def _parquet() -> ModuleType:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise RuntimeError('the benchmark keeps its rows with pyarrow: pip install "vitx[bench]"') from None


def write_rows(path: Path, values: np.ndarray) -> None:
    """Keep values (pictures, parts) as a table of picture, part and value; a score has one part for each picture.

    Raises:
        RuntimeError: pyarrow is missing. OSError: the file could not be written; then there is none.
    """
    parquet = _parquet()
    import pyarrow

    pictures, parts = values.shape
    columns = {
        "picture": np.repeat(np.arange(pictures, dtype=np.int32), parts),
        "part": np.tile(np.arange(parts, dtype=np.int32), pictures),
        "value": np.ascontiguousarray(values, dtype=np.float64).ravel(),
    }
    # Without from_pandas, not a number stays what it is and does not become null.
    table = pyarrow.table({name: pyarrow.array(column, from_pandas=False) for name, column in columns.items()})
    _write(path, lambda beside: parquet.write_table(table, beside))


def read_rows(path: Path) -> np.ndarray:
    """The values (pictures, parts) that ``write_rows`` kept, float64. Raises RuntimeError if pyarrow is missing."""
    table = _parquet().ParquetFile(path).read()
    pictures = int(table["picture"].to_numpy().max()) + 1
    return table["value"].to_numpy().reshape(pictures, -1)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, and remove what is left of earlier ones about the same criterion."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    about = path.name.rpartition("-")[0]  # what follows, a key and endings, has no hyphen
    for old in path.parent.iterdir():
        if old != path and old.name.rpartition("-")[0] == about:
            old.unlink(missing_ok=True)


def _reason_file(path: Path) -> Path:
    """Beside the rows: the sentence that says why there are none."""
    return path.with_suffix(".txt")


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(methods: Iterable[str], criteria: Iterable[str], settings: Any, work: str = WORK) -> Plan:
    """What is to be measured, what is kept already and what cannot be measured.

    Raises:
        Exception: what keeps every method from being planned, such as pictures that are not there.
    """
    module, methods, criteria = importlib.import_module(work), list(dict.fromkeys(methods)), tuple(criteria)
    skips = getattr(module, "skips", lambda *_: {})
    result = Plan((), (), {}, {}, {})
    shards = []
    for method in methods:
        try:
            reasons = dict(skips(method, criteria, settings))
            files = _files(method, [c for c in criteria if c not in reasons], settings, module)
            reasons |= {c: _reason_file(p).read_text() for c, p in files.items() if _reason_file(p).is_file()}
            missing = tuple(c for c, path in files.items() if c not in reasons and not path.is_file())
            passes = sum(module.plan(method, missing, settings).values()) if missing else 0.0
        except module.Unavailable as error:
            result.skipped.update({(method, criterion): str(error) for criterion in criteria})
            continue
        except Exception as error:
            result.failed[method] = _sentence(error)
            if len(result.failed) == len(methods) and len(set(result.failed.values())) == 1:
                raise
            continue
        result.paths.update({(method, c): path for c, path in files.items() if c not in reasons})
        result.skipped.update({(method, criterion): reason for criterion, reason in reasons.items()})
        if missing:
            shards.append(Shard(method, missing, passes))
    jobs = module.shared_jobs(criteria, settings) if shards else []
    each = sum(module.shared_passes(criteria, settings).values()) / len(jobs) if jobs else 0.0
    shared = tuple(Shard(job, (), each, shared=True) for job in jobs)
    return result._replace(shards=tuple(sorted(shards, key=lambda shard: -shard.passes)), shared=shared)


def _files(method: str, criteria: Iterable[str], settings: Any, module: ModuleType) -> dict[str, Path]:
    """By criterion, where the rows of a method belong."""
    home = folder(settings) / _file_name(method)
    return {c: home / f"{_file_name(c)}-{module.identity(method, c, settings)}.parquet" for c in criteria}


def kept(
    methods: Iterable[str], criteria: Iterable[str], settings: Any, work: str = WORK
) -> dict[tuple[str, str], Path]:
    """Files of the rows that are kept and still hold, by method and criterion; see ``read_rows``."""
    module, criteria = importlib.import_module(work), tuple(criteria)
    files = {(m, c): path for m in methods for c, path in _files(m, criteria, settings, module).items()}
    return {pair: path for pair, path in files.items() if path.is_file()}


def _kept(planned: Plan) -> dict[tuple[str, str], Path]:
    return {pair: path for pair, path in planned.paths.items() if path.is_file()}


def describe(planned: Plan, passes_per_second: float | None = None) -> Group:
    """The plan as tables: passes and criteria of every method, and why some are skipped.

    Args:
        passes_per_second: of all workers together, measured before; then the time that the run will take is told.
    """
    shards = {shard.name: shard for shard in planned.shards}
    have = _kept(planned)
    table = Table(box=None, pad_edge=False)
    for column in ("method", "passes", "to measure", "kept", "skipped"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    names = dict.fromkeys([*shards, *(method for method, _ in [*planned.paths, *planned.skipped])])
    for name in names:
        shard = shards.get(name, Shard(name, (), 0.0))
        counts = (
            len(shard.criteria),
            *(sum(method == name for method, _ in pairs) for pairs in (have, planned.skipped)),
        )
        table.add_row(name, f"{shard.passes:,.0f}", *map(str, counts))
    if planned.shared:
        table.add_row("shared by all", f"{sum(shard.passes for shard in planned.shared):,.0f}", "", "", "")
    total = _passes(planned)
    said = f"{total:,.0f} passes through the model"
    if passes_per_second:
        said += f", about {_duration(total / passes_per_second)}"
    parts: list[Any] = [table, Text(said)]
    reasons: dict[str, list[tuple[str, str]]] = {}
    for pair, reason in planned.skipped.items():
        reasons.setdefault(reason, []).append(pair)
    for reason, pairs in reasons.items():
        whose, which = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        by = "every method" if len(whose) == len(names) > 1 else ", ".join(whose)
        parts.append(Text(f"skipped for {by}: {', '.join(which)}: {reason}"))
    parts += [Text(f"{method} cannot be planned: {sentence}") for method, sentence in planned.failed.items()]
    return Group(*parts)


def _passes(planned: Plan) -> float:
    return sum(shard.passes for shard in (*planned.shared, *planned.shards))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


# --- the run ---------------------------------------------------------------------------------------------------------


def run(
    methods: Iterable[str],
    criteria: Iterable[str],
    settings: Any,
    engine: str = "local",
    workers: int | None = None,
    progress: bool = True,
    passes_per_second: float | None = None,
    work: str = WORK,
) -> Outcome:
    """Measure what is not kept yet; a method that fails stops no other.

    Args:
        engine: "local", processes of this machine; "ray", tasks on the cluster of ``RAY_ADDRESS``, or on a Ray of this
            machine that ends with the run. Both return the same rows.
        workers: methods that are measured at once; None is one for each core, or of Ray one for each of its GPUs where
            it has any. Workers of this machine share its cores evenly. progress: show plan and progress.
            passes_per_second: see ``describe``. work: name of the module that measures.

    Raises:
        Stopped: the user interrupted the run. ValueError: no such engine, or no worker.
        RuntimeError: pyarrow, or Ray for its engine, is not installed. OSError: rows could not be written.
    """
    if engine not in ENGINES:
        raise ValueError(f'the engine is {" or ".join(ENGINES)}, not "{engine}"')
    if workers is not None and workers < 1:
        raise ValueError(f"there must be at least one worker, not {workers}")
    _parquet()
    begin = time.perf_counter()
    planned = plan(methods, criteria, settings, work)
    if progress:
        Console().print(describe(planned, passes_per_second), highlight=False)
    failed = dict(planned.failed)
    skipped = dict(planned.skipped)
    try:
        if planned.shards:
            with _progress(_passes(planned), progress) as show, ENGINES[engine](settings, workers, work) as workplace:
                for stage in (planned.shared, planned.shards):
                    _carry_out(stage, workplace, planned, settings, skipped, failed, show)
    except KeyboardInterrupt:
        count, of = len(_kept(planned)), len(planned.paths)
        raise Stopped(
            f"stopped: {count} of {of} scores (methods by criteria) are kept; the same command goes on from there"
        ) from None
    return Outcome(_kept(planned), skipped, failed, time.perf_counter() - begin)


def _carry_out(
    stage: tuple[Shard, ...],
    workplace: "Workplace",
    planned: Plan,
    settings: Any,
    skipped: dict[tuple[str, str], str],
    failed: dict[str, str],
    show: Callable[[Shard, Message], None],
) -> None:
    """Have the shards of a stage computed, write what comes, and note what does not."""
    for shard, (kind, what, content) in _messages(stage, workplace):
        name = f"shared {shard.name}" if shard.shared else shard.name
        log = folder(settings) / _file_name(name) / "failed.txt"
        if kind == "rows":
            write_rows(planned.paths[shard.name, what], content)
        elif kind == "skipped":
            _write(_reason_file(planned.paths[shard.name, what]), lambda beside, text=content: beside.write_text(text))
            skipped[shard.name, what] = content
        elif kind == "failed":
            failed[name] = what
            if content:
                _write(log, lambda beside, text=content: beside.write_text(text))
                failed[name] += f" (traceback in {log})"
        elif kind == "ended":
            log.unlink(missing_ok=True)
        show(shard, Message(kind, what, content))


def _messages(stage: tuple[Shard, ...], workplace: "Workplace") -> Iterator[tuple[Shard, Message]]:
    """Every message with its shard. A shard whose worker dies is tried again, after the others."""
    queue, running = deque(stage), {}
    while queue or running:
        while queue and len(running) < workplace.workers:
            shard = queue.popleft()
            running[workplace.submit(shard)] = shard
            yield shard, Message("started")
        for job in workplace.wait(list(running)):
            shard = running.pop(job)
            try:
                message = workplace.receive(job)
            except _Died as death:
                shard = shard._replace(tries=shard.tries + 1)
                if not shard.shared and not shard.criteria:  # all had come
                    message = Message("ended")
                elif shard.tries < TRIES:
                    queue.append(shard)
                    message = Message("died")
                else:
                    sentence = f"its worker died {shard.tries} times, perhaps for want of memory: {death}"
                    message = Message("failed", sentence)
            yield shard, message
            if message.kind in ("rows", "skipped"):
                running[job] = shard._replace(criteria=tuple(c for c in shard.criteria if c != message.what))


@contextmanager
def _progress(total: float, shown: bool) -> Iterator[Callable[[Shard, Message], None]]:
    """A function that follows messages with a bar: what is running, passes done, time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[passes]}"),
        TimeRemainingColumn(),
    )
    left: dict[str, float] = {}  # passes of the shards that have started
    running: dict[str, None] = {}
    with Progress(*columns, speed_estimate_period=3600, disable=not shown) as progress:
        task = progress.add_task("", total=total, passes="")

        def show(shard: Shard, message: Message) -> None:
            before = left.setdefault(shard.name, shard.passes)
            if message.kind in ("rows", "skipped"):  # each criterion counts for its share of what is left
                left[shard.name] -= before / len(shard.criteria)
            elif message.kind in ("ended", "failed"):
                left[shard.name] = 0.0
            if message.kind in ("ended", "failed", "died"):
                running.pop(shard.name, None)
            else:
                running[shard.name] = None
            some, more = list(running)[:4], len(running) - 4
            description = ", ".join([*some, f"{more} more"] if more > 0 else some)
            progress.update(task, advance=before - left[shard.name], description=description)
            progress.update(task, passes=f"{progress.tasks[0].completed:,.0f} of {total:,.0f} passes")

        yield show


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


# --- the workers -----------------------------------------------------------------------------------------------------


def compute(work: str, shard: Shard, settings: Any) -> Iterator[Message]:
    """What a worker does with a shard; the last message says that it ended or failed, and nothing is raised."""
    warnings.filterwarnings("ignore")  # they would tear the progress bar
    try:
        module = importlib.import_module(work)
        if shard.shared:
            module.share(shard.name, settings)
        missing = list(shard.criteria)
        try:
            for criterion, values in module.rows(shard.name, shard.criteria, settings) if missing else ():
                if criterion not in missing:
                    raise ValueError(f"{work} gave rows of {criterion}, which were not asked for, or twice")
                missing.remove(criterion)
                if isinstance(values, str):
                    yield Message("skipped", criterion, values)
                else:
                    yield Message("rows", criterion, _matrix(criterion, values))
        except module.Unavailable as error:
            yield from (Message("skipped", criterion, str(error)) for criterion in missing)
            missing = []
        if missing:
            raise ValueError(f"{work} gave no rows of {', '.join(missing)}")
    except Exception as error:
        yield Message("failed", _sentence(error), traceback.format_exc())
    else:
        yield Message("ended")


def _matrix(criterion: str, values: list[list[float]]) -> np.ndarray:
    """(pictures, parts), float64."""
    if not values or not values[0] or len({len(row) for row in values}) > 1:
        raise ValueError(f"{criterion} needs as many values, one or more, for every picture")
    return np.array(values, dtype=np.float64)


class Workplace(NamedTuple):
    """Where shards are computed, as three functions."""

    workers: int
    submit: Callable[[Shard], Any]  # starts a shard and gives the job
    wait: Callable[[list[Any]], Iterable[Any]]  # those of the jobs that have a message, at least one
    receive: Callable[[Any], Message]  # the next message of a job; raises _Died


@contextmanager
def _local(settings: Any, workers: int | None, work: str) -> Iterator[Workplace]:
    """Processes of this machine, each with its share of the cores. They end with this one, however it ends."""
    workers = workers or _cores()
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Any] = {}  # by our end of the pipe
    idle: list[Any] = []

    def start() -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
        return ours

    def submit(shard: Shard) -> Any:
        pipe = idle.pop() if idle else start()
        with suppress(OSError):  # it has died: receive will tell
            pipe.send((shard, settings))
        return pipe

    def receive(pipe: Any) -> Message:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process = processes.pop(pipe)
            process.join()
            raise _Died(f"exit code {process.exitcode}") from None
        if message.kind in ("ended", "failed"):
            idle.append(pipe)
        return message

    with _environment(OMP_NUM_THREADS=str(max(1, _cores() // workers))):
        try:
            yield Workplace(workers, submit, multiprocessing.connection.wait, receive)  # type: ignore[arg-type]
        finally:
            for process in processes.values():
                process.kill()
            for process in processes.values():
                process.join()


def _cores() -> int:
    return os.cpu_count() or 1


def _serve(pipe: Any, work: str) -> None:
    """A process of ``_local``: shards in, messages out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        while True:
            for message in compute(work, *pipe.recv()):
                pipe.send(message)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however; for a thread. Nothing must outlive a run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ray(settings: Any, workers: int | None, work: str) -> Iterator[Workplace]:
    """Ray: one that runs in this process already, the cluster of RAY_ADDRESS, or one of our own that ends with us."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise RuntimeError('the engine ray needs Ray: pip install "vitx[bench,cluster]"') from None
    ours, alone = not ray.is_initialized(), not os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    around: AbstractContextManager = nullcontext()
    if ours and alone:
        threads = max(1, _cores() // (workers or _cores()))
        around = _environment(OMP_NUM_THREADS=str(threads), RAY_USAGE_STATS_ENABLED="0")
    tasks = set()
    with around:
        try:
            if ours and alone:
                own = {"num_cpus": workers or _cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
                ray.init(address="local", **own, **quiet)
            elif ours:
                ray.init(**quiet)
            found = ray.cluster_resources()
            gpus = found.get("GPU", 0)
            workers = workers or int(gpus or found.get("CPU", 1))
            # We try again ourselves: what has arrived is then not computed twice.
            task = ray.remote(num_cpus=1, num_gpus=min(1, gpus / workers), max_retries=0)(compute)

            def submit(shard: Shard) -> Any:
                job = task.remote(work, shard, settings)
                tasks.add(job)
                return job

            def wait(jobs: list[Any]) -> list[Any]:
                return ray.wait(jobs, num_returns=1, fetch_local=False)[0]

            def receive(job: Any) -> Message:
                try:
                    message = ray.get(next(job))
                except ray.exceptions.RayTaskError as error:  # before compute began: its machine lacks vitx, say
                    message = Message("failed", _sentence(error.cause), str(error))
                except ray.exceptions.RayError as error:
                    tasks.discard(job)
                    raise _Died(_sentence(error)) from None
                if message.kind in ("ended", "failed"):
                    tasks.discard(job)
                return message

            yield Workplace(workers, submit, wait, receive)
        finally:
            for job in tasks:
                with suppress(Exception):
                    ray.cancel(job, force=True)
            if ours:
                ray.shutdown()  # of a cluster that we joined: leaves it


ENGINES: dict[str, Callable[[Any, int | None, str], AbstractContextManager[Workplace]]] = {"local": _local, "ray": _ray}
