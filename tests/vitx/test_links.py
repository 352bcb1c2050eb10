"""Dead links are told apart from slow, busy and forbidding hosts and from a missing network; against a local server."""

import shutil
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from vitx import ATLAS, links
from vitx.links import Answer, Place, State

SOON: Any = {"seconds": 5.0, "patience": 0.0}


@pytest.fixture(scope="module")
def server():
    """A server whose paths say what it does; ``asked`` counts (method, path)."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            path = self.path.split("?")[0]
            server.asked[self.command, path] += 1
            server.agents.add(self.headers["User-Agent"])
            status, headers = 200, {}
            if path == "/slow":
                released.wait()
                return
            if path in ("/301", "/307"):
                status, headers = int(path[1:]), {"Location": "/200"}
            elif path == "/moved-and-gone":
                status, headers = 302, {"Location": "/404"}
            elif path == "/loop":
                status, headers = 302, {"Location": "/loop"}
            elif path == "/to-file":
                status, headers = 302, {"Location": "file:///etc/passwd"}
            elif path == "/unicode":
                status, headers = 302, {"Location": "/caf\u00c3\u00a9"}  # UTF-8 as http.server writes it
            elif path in ("/405-on-head", "/403-on-head", "/500-on-head"):
                status = int(path[1:4]) if self.command == "HEAD" else 200
            elif path == "/busy-once":
                status = 503 if server.asked[self.command, path] == 1 else 200
                headers = {"Retry-After": "0"}
            elif path == "/429":
                status, headers = 429, {"Retry-After": "3600"}
            elif path[1:].isdecimal():
                status = int(path[1:])
            elif path == "/broken":
                self.wfile.write(b"this is no HTTP\r\n\r\n")
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET = answer

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def __init__(self, *words):
            super().__init__(*words)
            self.asked: Counter[tuple[str, str]] = Counter()
            self.agents: set[str] = set()

        def handle_error(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        released.set()
        server.shutdown()


@pytest.fixture
def url(server):
    server.asked.clear()
    return lambda path: f"http://127.0.0.1:{server.server_address[1]}{path}"


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/200", Answer(State.ALIVE)),
        ("/301", Answer(State.ALIVE)),
        ("/307", Answer(State.ALIVE)),
        ("/unicode", Answer(State.ALIVE)),
        ("/caf\u00e9?q=\u00e9#x", Answer(State.ALIVE)),
        ("/404", Answer(State.DEAD, "404 Not Found")),
        ("/410", Answer(State.DEAD, "410 Gone")),
        ("/500", Answer(State.DEAD, "500 Internal Server Error")),
        ("/moved-and-gone", Answer(State.DEAD, "404 Not Found")),
        ("/loop", Answer(State.DEAD, "leads on more than 5 times")),
        ("/to-file", Answer(State.DEAD, "leads to file:")),
        ("/405-on-head", Answer(State.ALIVE)),
        ("/403-on-head", Answer(State.ALIVE)),
        ("/500-on-head", Answer(State.ALIVE)),
        ("/403", Answer(State.UNDECIDED, "403 Forbidden")),
        ("/429", Answer(State.UNDECIDED, "429 Too Many Requests")),
        ("/503", Answer(State.UNDECIDED, "503 Service Unavailable")),
        ("/busy-once", Answer(State.ALIVE)),
    ],
)
def test_answers(url, path, answer, monkeypatch):
    monkeypatch.setattr(links.time, "sleep", lambda seconds: None)
    assert links.look_up_one(url(path), **SOON) == answer


def test_head_first_and_polite(url, server):
    links.look_up_one(url("/200"), **SOON)
    links.look_up_one(url("/404"), **SOON)
    links.look_up_one(url("/405-on-head"), **SOON)
    assert dict(server.asked) == {
        ("HEAD", "/200"): 1,
        ("HEAD", "/404"): 1,
        ("HEAD", "/405-on-head"): 1,
        ("GET", "/405-on-head"): 1,
    }
    assert all(agent.startswith("vitx/") for agent in server.agents)


def test_waits_as_long_as_it_is_asked_to_but_no_longer_than_it_likes(url, monkeypatch):
    waited = []
    monkeypatch.setattr(links.time, "sleep", waited.append)
    links.look_up_one(url("/429"), seconds=5, patience=60)
    links.look_up_one(url("/busy-once"), seconds=5, patience=60)
    links.look_up_one(url("/503"), seconds=5, patience=60)
    assert waited == [60, 60, 0, 5, 5]


def test_slow_closed_broken_and_unknown(url):
    assert links.look_up_one(url("/slow"), seconds=0.2) == Answer(State.DEAD, "no answer in 0.2 seconds", False)
    with socket.socket() as unused:  # bound and not listening
        unused.bind(("127.0.0.1", 0))
        answer = links.look_up_one(f"http://127.0.0.1:{unused.getsockname()[1]}/", **SOON)
    assert answer == Answer(State.DEAD, "the host refuses the connection")
    assert links.look_up_one(url("/broken"), **SOON).state == State.DEAD
    for odd in ("https://[x/", "https://", "http://127.0.0.1:99999/", "ftp://a/"):
        assert links.look_up_one(odd, **SOON).state == State.DEAD


def without_names(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_no_network_is_no_dead_link(monkeypatch):
    without_names(monkeypatch)
    urls = ["https://a.example/1", "https://b.example/", "https://a.example/2"]
    with pytest.raises(ValueError, match=r"there is no network: a\.example, b\.example cannot be reached"):
        links.look_up(urls, **SOON)
    with pytest.raises(ValueError, match="there is no network"):
        links.look_up(["https://a.example/"], **SOON)


def test_one_missing_host_is_a_dead_link(url, monkeypatch):
    real = socket.getaddrinfo

    def some(host, *words, **options):
        if host == "gone.example":
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *words, **options)

    monkeypatch.setattr(socket, "getaddrinfo", some)
    answers = links.look_up(["http://gone.example/", url("/200")], pause=0, **SOON)
    assert answers["http://gone.example/"].reason == "there is no such host"
    assert answers[url("/200")].state == State.ALIVE


def test_all_addresses_once_each_with_pauses(url, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: pauses.append(timeout) or False)
    urls = [url(f"/{name}") for name in ("a", "b", "404", "a")]
    done = []
    answers = links.look_up(urls, lambda: done.append(1), pause=7.5, **SOON)
    assert list(answers) == list(dict.fromkeys(urls))
    assert [answer.state for answer in answers.values()] == [State.ALIVE, State.ALIVE, State.DEAD]
    assert len(done) == 3
    assert pauses.count(7.5) == 2
    assert server.asked["HEAD", "/a"] == 1


def test_a_host_that_asks_to_wait_is_left_alone(url, server):
    answers = links.look_up([url("/200"), url("/429"), url("/b"), url("/c")], pause=0, **SOON)
    assert [answer.state for answer in answers.values()] == [State.ALIVE, *[State.UNDECIDED] * 3]
    assert not server.asked["HEAD", "/b"]


def test_a_doi_is_alive_where_it_leads_somewhere(monkeypatch):
    def ask(method, url, seconds):
        assert url.startswith("https://doi.org/"), "the publisher is not asked"
        headers = links.Message()
        if "gone" not in url:
            headers["Location"] = "https://publisher.example/"
        return (404 if "gone" in url else 302), headers

    monkeypatch.setattr(links, "_ask", ask)
    assert links.look_up_one("https://doi.org/10.1000/182") == Answer(State.ALIVE)
    assert links.look_up_one("https://doi.org/10.1000/gone").state == State.DEAD


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "catalog"
    (root / "methods" / "attention").mkdir(parents=True)
    shutil.copy(ATLAS / "catalog" / "taxonomy.yml", root)
    shutil.copy(ATLAS / "catalog" / "methods" / "attention" / "attention-rollout.yml", root / "methods" / "attention")
    return root


def test_addresses_with_their_places(root):
    file = "catalog/methods/attention/attention-rollout.yml"
    text = (root.parent / file).read_text().splitlines()
    found = links.addresses(root)

    def line(part):
        return next(number for number, line in enumerate(text, 1) if part in line)

    assert found["https://arxiv.org/abs/2005.00928"] == [Place(file, line("arxiv:"), "paper.arxiv")]
    assert found["https://doi.org/10.18653/v1/2020.acl-main.385"] == [Place(file, line("doi:"), "paper.doi")]
    repository = "https://github.com/samiraabnar/attention_flow"
    assert found[repository] == [Place(file, line("  url: https"), "code.url")]
    source = "https://samiraabnar.github.io/articles/2020-04/attention_flow"
    assert found[source] == [Place(file, line(source), "sources[2]")]


def test_every_address_of_the_entries_is_found():
    from vitx import catalog

    found, read = links.addresses(), catalog.load()
    for method in read.methods.values():
        paper = method.paper
        wanted = [paper.url, method.code and method.code.url, *(one.repository for one in method.differences)]
        assert {one for one in wanted if one} <= found.keys()
        assert not paper.arxiv or f"https://arxiv.org/abs/{paper.arxiv}" in found
    assert {tool.url for tool in read.tools.values()} <= found.keys()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("see https://a.example/x_y (README).", "https://a.example/x_y"),
        ("(https://a.example/x)", "https://a.example/x"),
        ("https://a.example/x_(y), and", "https://a.example/x_(y)"),
        ("[x](https://a.example/)", "https://a.example/"),
        ('"https://a.example/#b".', "https://a.example/#b"),
    ],
)
def test_an_address_in_a_sentence(text, url):
    assert links._urls(("sources", 0), text) == [url]


def test_report():
    first, second = Place("catalog/a.yml", 3, "code.url"), Place("catalog/b.yml", 12, "sources[0]")
    places = {"https://x/": [second, first], "https://y/": [first]}
    answers = {"https://x/": Answer(State.DEAD, "404 Not Found"), "https://y/": Answer(State.ALIVE)}
    assert links.report(places, answers, State.DEAD) == [
        "catalog/a.yml:3: code.url: https://x/: 404 Not Found",
        "catalog/b.yml:12: sources[0]: https://x/: 404 Not Found",
    ]
