"""Do the addresses of the catalogue still lead somewhere?

Each is asked for its head, and only where a host refuses that for its body, of which nothing is read. Hosts are asked
one address at a time with a pause between, several hosts at once.
"""

import errno
import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from vitx import ATLAS
from vitx.catalog import Location, _dotted, _line_of, _read_all
from vitx.metadata import USER_AGENT

SECONDS = 20.0  # that a host may take
PAUSE = 1.0  # seconds between two requests to a host
PATIENCE = 60.0  # seconds to wait where a host asks for it
HOSTS = 8  # at once
REDIRECTS = 5


class State(StrEnum):
    """What a look-up found."""

    ALIVE = "alive"
    DEAD = "dead"
    UNDECIDED = "undecided"  # the host refuses programs, or asked again and again to wait


class Answer(NamedTuple):
    """What a look-up found, and why."""

    state: State
    reason: str = ""
    reached: bool = True  # some host answered, if only by closing the door


class Place(NamedTuple):
    """Where the catalogue holds an address, in sorting order."""

    file: str
    line: int
    field: str


def addresses(root: Path = ATLAS / "catalog") -> dict[str, list[Place]]:
    """Every address of the catalogue: arXiv identifiers, DOIs, and all that starts with https:// in any text.

    Sound or not, a file counts as far as it can be read.
    """
    found: dict[str, list[Place]] = {}
    for file, document in sorted(_read_all(root).documents.items()):
        for location, text in _texts(document.data, ()):
            for url in _urls(location, text):
                place = Place(file, _line_of(location, document.lines), _dotted(location))
                found.setdefault(url, []).append(place)
    return found


def _texts(value: Any, here: Location) -> Iterator[tuple[Location, str]]:
    if isinstance(value, str):
        yield here, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, (*here, key))


_URL = re.compile(r"https?://[^\s<>\"'`\\{}]+")


def _urls(location: Location, text: str) -> list[str]:
    if location[-1] == "arxiv":
        return [f"https://arxiv.org/abs/{quote(text, safe='/')}"]
    if location[-1] == "doi":
        return [f"https://doi.org/{quote(text, safe='/')}"]
    return [_without_tail(url) for url in _URL.findall(text)]


def _without_tail(url: str) -> str:
    """The address without what belongs to the sentence around it: full stops, a bracket that it did not open."""
    while url[-1] in ".,;:!?*_]" or (url[-1] == ")" and url.count(")") > url.count("(")):
        url = url[:-1]
    return url


# ----------------------------------------------------------------------------------------------------- one address


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # urllib then raises the answer as an HTTPError


_opener = urllib.request.build_opener(_NoRedirect)


def _ask(method: str, url: str, seconds: float) -> tuple[int, Message]:
    """(status, headers); a redirect is an answer."""
    ascii_only = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(ascii_only, method=method, headers={"User-Agent": USER_AGENT, "Accept": "*/*"})
    try:
        with _opener.open(request, timeout=seconds) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, error.headers


def look_up_one(url: str, seconds: float = SECONDS, patience: float = PATIENCE) -> Answer:
    """Whether an address leads somewhere. Raises nothing.

    Args:
        seconds: that an answer may take.
        patience: longest time to wait, twice at most, where a host asks for it.
    """
    try:
        for _ in range(REDIRECTS + 1):
            status, headers = _ask_politely(url, seconds, patience)
            target = headers.get("Location")
            if status not in (301, 302, 303, 307, 308) or not target:
                return _judge(status)
            if urlsplit(url).hostname == "doi.org":
                return Answer(State.ALIVE)  # it exists; the publisher behind it seldom lets a program in
            url = urljoin(url, target.encode("latin-1", "replace").decode("utf-8", "replace"))
            if urlsplit(url).scheme not in ("http", "https"):
                return Answer(State.DEAD, f"leads to {urlsplit(url).scheme}:")
        return Answer(State.DEAD, f"leads on more than {REDIRECTS} times")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _failure(error, seconds)


def _ask_politely(url: str, seconds: float, patience: float) -> tuple[int, Message]:
    """HEAD, where it is refused GET, and again after a while where the host asks to wait."""
    for attempt in range(3):
        status, headers = _ask("HEAD", url, seconds)
        if status >= 400 and status not in (404, 410, 429, 503):
            status, headers = _ask("GET", url, seconds)
        if status not in (429, 503) or attempt == 2:
            break
        asked = headers.get("Retry-After", "")
        time.sleep(min(patience, float(asked) if asked.isdecimal() else 5.0))
    return status, headers


def _judge(status: int) -> Answer:
    if status < 400:
        return Answer(State.ALIVE)
    said = f"{status} {http.client.responses.get(status, '')}".strip()
    refused = status in (401, 403, 405, 406, 418, 429, 451, 503, 999)
    return Answer(State.UNDECIDED if refused else State.DEAD, said)


_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}


def _failure(error: Exception, seconds: float) -> Answer:
    reason: Any = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):
        return Answer(State.DEAD, "there is no such host", reached=False)
    if isinstance(reason, TimeoutError):
        return Answer(State.DEAD, f"no answer in {seconds:g} seconds", reached=False)
    if isinstance(reason, OSError) and (reason.errno in _NO_ROUTE or str(reason).startswith("Tunnel connection")):
        return Answer(State.DEAD, "the host cannot be reached", reached=False)
    if isinstance(reason, ConnectionRefusedError):
        return Answer(State.DEAD, "the host refuses the connection")
    return Answer(State.DEAD, " ".join(str(reason).split())[:200] or type(reason).__name__)


# ------------------------------------------------------------------------------------------------------------- all


def look_up(
    urls: Iterable[str],
    done: Callable[[], object] = lambda: None,
    seconds: float = SECONDS,
    pause: float = PAUSE,
    patience: float = PATIENCE,
) -> dict[str, Answer]:
    """What is behind each address.

    Args:
        done: called after each address, from several threads.
        pause: seconds between two requests to a host.

    Raises:
        ValueError: there is no network: not one of the first hosts, those with most addresses, was reached.
    """
    hosts: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        hosts.setdefault(_host(url), []).append(url)
    queues = sorted(hosts.values(), key=len, reverse=True)
    answers: dict[str, Answer] = {}
    stop = threading.Event()

    def work_off(queue: list[str]) -> None:
        busy = False
        for number, url in enumerate(queue):
            if stop.is_set():
                return
            if url not in answers:
                if number:
                    stop.wait(pause)
                answer = Answer(State.UNDECIDED, "not asked, since the host asks to wait") if busy else one(url)
                busy = busy or answer.reason.startswith("429")
                answers[url] = answer
            done()

    def one(url: str) -> Answer:
        return look_up_one(url, seconds, patience)

    with ThreadPoolExecutor(HOSTS) as pool:
        try:
            first = [queue[0] for queue in queues[:3]]
            answers |= zip(first, pool.map(one, first), strict=True)
            if first and not any(answers[url].reached for url in first):
                names = ", ".join(map(_host, first))
                raise ValueError(f"there is no network: {names} cannot be reached; no link was checked")
            list(pool.map(work_off, queues))
        finally:
            stop.set()
    return {url: answers[url] for queue in queues for url in queue}


def _host(url: str) -> str:
    """Host and port of an address; empty where they cannot be read."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def report(places: Mapping[str, list[Place]], answers: Mapping[str, Answer], state: State) -> list[str]:
    """A line for each place that holds an address of this state: file:line: field: address: reason."""
    found = sorted((place, url) for url, answer in answers.items() if answer.state == state for place in places[url])
    return [f"{place.file}:{place.line}: {place.field}: {url}: {answers[url].reason}" for place, url in found]
