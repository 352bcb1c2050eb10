"""What the engine of the benchmark is tested on: rows of pure numpy, and behaviour that files in a folder decide.

Folder: ``$TOY_FOLDER``. Files, where <m> is a method and <c> a criterion:
    log                 a line for each computation: method, criterion, process, threads
    version-<c>         its text counts as the code of the criterion
    wait-<m>-<c>        say so on standard output, write to waiting-<m>-<c> what Ctrl-C would do, wait until killed
    die-<m>-<c>         the process kills itself as often as its text says
    raise-<m>-<c>       raise its text
    refuse-<m>          the method cannot be measured, for the reason in its text
    refuse-<m>-<c>      the criterion cannot be measured
    crash-plan-<m>      the plan of the method raises
    shared              if there: names of shared jobs to do; done-<job> marks one as done
"""

import hashlib
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PASSES = {"costly": 900.0, "middling": 90.0, "cheap": 9.0}
PICTURES = 5


class Unavailable(ValueError):
    pass


class Settings(NamedTuple):
    data: str = "toy"
    model: str = "tiny"
    seed: int = 0
    root: str | None = None


def said(name: str) -> str | None:
    """The text of a file in the folder, or None."""
    path = Path(os.environ["TOY_FOLDER"]) / name
    return path.read_text() if path.is_file() else None


def note(name: str, text: str) -> None:
    with (Path(os.environ["TOY_FOLDER"]) / name).open("a") as file:
        file.write(text + "\n")


def identity(method: str, criterion: str, settings: Settings) -> str:
    text = f"{method} {criterion} {settings._replace(root=None)} {said(f'version-{criterion}')}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(method: str, criteria: Iterable[str], settings: Settings) -> dict[str, float]:
    if (reason := said(f"refuse-{method}")) is not None:
        raise Unavailable(reason)
    if (error := said(f"crash-plan-{method}")) is not None:
        raise KeyError(error)
    return {"maps": PASSES.get(method, 1.0), "curves": float(len(list(criteria)))}


def shared_jobs(criteria: Iterable[str], settings: Settings) -> list[str]:
    return [job for job in (said("shared") or "").split() if said(f"done-{job}") is None]


def shared_passes(criteria: Iterable[str], settings: Settings) -> dict[str, float]:
    return {"single": 1000.0}


def share(job: str, settings: Settings) -> None:
    happen("shared", job)
    note(f"done-{job}", "")


def happen(method: str, criterion: str) -> None:
    """Note that something is computed, after doing what the files say."""
    about = f"{method}-{criterion}"
    if said(f"wait-{about}") is not None:
        note(f"waiting-{about}", repr(signal.getsignal(signal.SIGINT)))
        print(f"waiting {about}", flush=True)
        threading.Event().wait()
    if (times := said(f"die-{about}")) is not None and len((said(f"died-{about}") or "").split()) < int(times):
        note(f"died-{about}", "once")
        os.kill(os.getpid(), signal.SIGKILL)
    if (error := said(f"raise-{about}")) is not None:
        raise ArithmeticError(error)
    note("log", f"{method} {criterion} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")


def rows(method: str, criteria: Iterable[str], settings: Settings) -> Iterator[tuple[str, list[list[float]] | str]]:
    """One value for each picture, and of criteria named curve three."""
    for criterion in criteria:
        happen(method, criterion)
        if (reason := said(f"refuse-{method}-{criterion}")) is not None:
            yield criterion, reason
            continue
        rng = np.random.default_rng([zlib.crc32(f"{method} {criterion}".encode()), settings.seed])
        values = rng.normal(size=(PICTURES, 3 if criterion.startswith("curve") else 1))
        values[0, 0] = np.nan  # a picture for which the criterion has no value
        yield criterion, values.tolist()
