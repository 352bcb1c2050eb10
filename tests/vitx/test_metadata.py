"""What a host or a BibTeX file says becomes a clean record of limited size; the network is replaced by texts."""

import http.client
import json
import socket
import urllib.error
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitx import catalog, cite, metadata
from vitx.metadata import NoAnswer, UnknownWork, Work

ATOM = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom">
  <title>arXiv Query</title>
  <entry>
    <id>http://arxiv.org/abs/2005.00928v2</id>
    <published>2020-05-02T21:45:27Z</published>
    <title>Quantifying Attention
  Flow in  Transformers</title>
    <author><name>Samira Abnar</name></author>
    <author><name>Luc Van Gool</name></author>
    <author><name>{name}</name></author>
    {more}
  </entry>
</feed>"""


def atom(name: str = "Willem Zuidema", more: str = "") -> bytes:
    return ATOM.format(name=name, more=more).encode()


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("2005.00928", "2005.00928"),
        (" 2005.00928v2 ", "2005.00928"),
        ("arXiv:2005.00928", "2005.00928"),
        ("https://arxiv.org/abs/2005.00928v2", "2005.00928"),
        ("http://www.arxiv.org/pdf/2005.00928v12.pdf", "2005.00928"),
        ("https://arxiv.org/abs/2005.00928?context=cs#top", "2005.00928"),
        ("https://export.arxiv.org/abs/cs/0601001v1/", "cs/0601001"),
        ("cs.CV/0601001", "cs.CV/0601001"),
        ("10.48550/arXiv.2005.00928", "2005.00928"),
        ("https://doi.org/10.48550/arXiv.2005.00928", "2005.00928"),
    ],
)
def test_arxiv_identifiers(text, id):
    assert metadata.arxiv_id(text) == id
    assert metadata.identify(text) == Work(arxiv=id)


@pytest.mark.parametrize(
    ("text", "doi"),
    [
        ("10.18653/v1/2020.acl-main.385", "10.18653/v1/2020.acl-main.385"),
        ("https://doi.org/10.18653/v1/2020.acl-main.385", "10.18653/v1/2020.acl-main.385"),
        ("http://dx.doi.org/10.1016%2Fs0140-6736(20)30001-3", "10.1016/s0140-6736(20)30001-3"),
        ("DOI: 10.1000/182.", "10.1000/182"),
    ],
)
def test_dois(text, doi):
    assert metadata.doi_name(text) == doi
    assert metadata.identify(text) == Work(doi=doi)


@pytest.mark.parametrize(
    "text",
    ["", "2005", "https://arxiv.org/", "2005.00928\n&id_list=x", "10.1/x", '10.1000/"x', "10.1000/x\x00", "?" * 5000],
)
def test_what_is_no_identifier(text):
    with pytest.raises(ValueError, match="neither an arXiv identifier") as caught:
        metadata.identify(text)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_arxiv():
    work = metadata.from_atom(atom(), "2005.00928")
    assert work.title == "Quantifying Attention Flow in Transformers"
    assert work.authors == ("Abnar, Samira", "Van Gool, Luc", "Zuidema, Willem")
    assert (work.year, work.venue, work.arxiv, work.doi) == (2020, "arXiv 2020", "2005.00928", None)
    assert work.source == "https://arxiv.org/abs/2005.00928"
    assert work.unsure == ("authors", "venue"), "Van Gool is a guess"
    more = "<arxiv:doi>10.18653/v1/2020.acl-main.385</arxiv:doi><arxiv:journal_ref>ACL 2020</arxiv:journal_ref>"
    work = metadata.from_atom(atom(more=more), "2005.00928")
    assert (work.venue, work.doi) == ("ACL 2020", "10.18653/v1/2020.acl-main.385")
    assert metadata.from_atom(atom(more="<arxiv:doi>nonsense</arxiv:doi>"), "2005.00928").doi is None


@pytest.mark.parametrize(
    ("name", "catalogued"),
    [
        ("Samira Abnar", "Abnar, Samira"),
        ("Wouter van der Berg", "van der Berg, Wouter"),
        ("Sammy Davis Jr.", "Davis Jr., Sammy"),
        ("Martin Luther King, Jr.", "King Jr., Martin Luther"),
        ("OpenAI", "OpenAI"),
        ("van Gogh", "Gogh, van"),
    ],
)
def test_names_in_one_piece(name, catalogued):
    assert metadata.family_first(name) == catalogued


def test_arxiv_does_not_know_it():
    with pytest.raises(UnknownWork, match=r"arXiv knows no 2005\.00929"):
        metadata.from_atom(atom(), "2005.00929")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "answer",
    [
        atom("&b;").replace(b"<feed", BOMB.encode() + b"<feed"),
        atom("&x;").replace(b"<feed", b'<!docTYPE x SYSTEM "file:///etc/passwd"><feed'),
        atom("&b;").replace(b"<feed", BOMB.encode() + b"<feed").decode().encode("utf-16"),
        atom("&undefined;"),
        b"<feed>" * 5000,
        b"<html><body>Log in to this network</body></html>",
        b"",
        b"\xff\xfe",
        atom()[:-20],
    ],
)
def test_hostile_or_broken_xml(answer):
    with pytest.raises(NoAnswer, match="cannot be read"):
        metadata.from_atom(answer, "2005.00928")


CSL = {
    "title": ["On &lt;b&gt; <i>ViT</i>s"],
    "author": [
        {"family": "Gogh", "non-dropping-particle": "van", "given": "V.", "suffix": "Jr."},
        {"literal": "A Consortium"},
        {"family": "Plato"},
    ],
    "issued": {"date-parts": [[2021, 10]]},
    "container-title": "2021 IEEE/CVF International Conference on Computer Vision (ICCV)",
    "DOI": "10.1109/XYZ",
}


def test_doi():
    work = metadata.from_csl(json.dumps(CSL).encode(), "10.1109/xyz")
    assert work.title == "On <b> ViTs", "text that looks like HTML stays text"
    assert work.authors == ("van Gogh, V. Jr.", "A Consortium", "Plato")
    assert (work.year, work.venue, work.doi) == (2021, "ICCV 2021", "10.1109/xyz")
    assert work.source == "https://doi.org/10.1109/xyz"


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a": 1}', b"\xff", b'"title"']
)
def test_broken_json(answer):
    with pytest.raises(NoAnswer, match="cannot be read"):
        metadata.from_csl(answer, "10.1000/182")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(title=JSON, author=JSON | st.lists(st.dictionaries(st.sampled_from(["family", "given"]), JSON)), issued=JSON)
def test_fields_of_any_form_are_unknown_or_clean(title, author, issued):
    item = {"title": title, "author": author, "issued": issued, "container-title": title}
    work = metadata.from_csl(json.dumps(item).encode(), "10.1000/182")
    for text in (work.title, work.venue, *work.authors):
        assert text is None or (text and "\n" not in text and not catalog._ODD_CHARACTER.search(text))
        assert text is None or len(text.encode()) <= 5000
    assert work.year is None or 1950 <= work.year < 2100


@pytest.mark.parametrize(
    ("container", "venue"),
    [
        ("Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics", "ACL 2021"),
        ("2021 IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)", "CVPR 2021"),
        ("Advances in Neural Information Processing Systems 34", "NeurIPS 2021"),
        ("International Conference on Pattern Recognition", "ICPR 2021"),
        ("ICML", "ICML 2021"),
        ("ICCV Workshops (ICCVW)", "ICCV Workshops (ICCVW) 2021"),
        ("IEEE Transactions on Image Processing", "IEEE Transactions on Image Processing 2021"),
        ("arXiv preprint arXiv:2005.00928", None),
        ("CoRR", None),
        (None, None),
    ],
)
def test_venues(container, venue):
    assert metadata._venue(container, 2021) == venue


BIBTEX = r"""
% a comment
@string{acl = {Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics}}
@inproceedings{abnar,
    title = "{Quantifying {A}ttention Flow --- in $\alpha$ \& Transformers}",
    author = "Abnar, Samira  and
      Willem {Van Zuidema} and {Barnes and Noble, Inc.} and K{\"o}ln, Jos{\'e} and de la Cruz, Jr, Ana and others",
    booktitle = acl,
    month = jul,
    year = "2020",
    url = "https://aclanthology.org/2020.acl-main.385",
    doi = "https://doi.org/10.18653/v1/2020.acl-main.385",
    eprint = {2005.00928v2}, archivePrefix = {arXiv},
}
"""


def test_bibtex():
    assert metadata.from_bibtex(BIBTEX) == Work(
        title=r"Quantifying Attention Flow — in $\alpha$ & Transformers",
        authors=(
            "Abnar, Samira",
            "Van Zuidema, Willem",
            "Barnes and Noble Inc.",
            "Köln, José",
            "de la Cruz, Ana Jr",
            "others",
        ),
        year=2020,
        venue="ACL 2020",
        arxiv="2005.00928",
        doi="10.18653/v1/2020.acl-main.385",
        url="https://aclanthology.org/2020.acl-main.385",
        source="the paper's BibTeX",
    )


@pytest.mark.parametrize(
    "fields",
    [
        "journal = {arXiv preprint arXiv:2005.00928}",
        "journal = {CoRR}, volume = {abs/2005.00928}",
        "url = {https://arxiv.org/abs/2005.00928v1}",
        "url = {\\url{http://arxiv.org/pdf/2005.00928.pdf}}",
        "doi = {10.48550/arXiv.2005.00928}",
        "eprint = {2005.00928}, eprinttype = {arXiv}",
    ],
)
def test_where_bibtex_holds_the_identifier(fields):
    work = metadata.from_bibtex(f"@misc{{x, title = {{T}}, year = 2020, {fields}}}")
    assert (work.arxiv, work.doi, work.url, work.venue) == ("2005.00928", None, None, None)


def test_round_trip_of_the_catalogue():
    """What vitx writes as BibTeX, it reads as it was; a sample, since each takes a moment."""
    entries = [one for one in catalog.load().methods.values() if one.paper.title.isprintable()][::8]
    for entry in entries:
        work = metadata.from_bibtex(cite.bibtex([entry]))
        assert work.title == " ".join(entry.paper.title.replace("’", "'").split())
        assert work.authors == tuple(name.replace("’", "'") for name in entry.paper.authors)
        assert (work.arxiv, work.doi) == (entry.paper.arxiv, entry.paper.doi)


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"{\'e}\'{e}\'e{\'{e}}", "éééé"),
        (r"\"{\i} O{\'\i} {\v{c}} \v c \r{a} \k{a} \=a {\.I} \~n", "ï Oí č č å ą ā İ ñ"),
        (r"{\ss} stra\ss e {\O}ystein \L{}ukasz {\AA} {\ae} {\DJ}", "ß straße Øystein Łukasz Å æ Đ"),
        (r"50\% of A \& B\_1 \#2 a~b", "50% of A & B_1 #2 a b"),
        (r"1--2 --- ``quoted''", "1–2 — “quoted”"),
        (r"$O(n^{2})$ and $\hat{a}$", r"$O(n^{2})$ and $\hat{a}$"),
        (r"\omega \emph{much} \textit{more}", r"\omega much more"),
        (r"{\textbackslash}{\textbraceleft}\}", r"\{}"),
    ],
)
def test_latex(latex, text):
    assert metadata.from_latex(latex) == text


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs", "Mn")), max_size=30))
def test_latex_is_the_reverse_of_cite(text):
    plain = metadata.clean("".join(c for c in text if c not in "`'’‘“”-–—\"~")) or ""
    assert metadata.clean(metadata.from_latex(cite._latex(plain))) == metadata.clean(plain)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no entry"),
        ("not BibTeX", "holds no entry"),
        ("@article{x, title={T}} @misc{y, title={U}}", "holds 2 entries"),
        ("@article{x, title = foo}", "'foo' stands without quotes or braces"),
        ("@article{x, title=" + "{" * 5000 + "}" * 5000 + "}", "cannot be read"),
        ("@article{x, title={" + "a" * 30_000 + "}}", "longer than"),
    ],
)
def test_bibtex_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        metadata.from_bibtex(text)
    assert "\n" not in str(caught.value)


def test_hostile_bibtex_is_cleaned():
    title = "a\x00b\u202ec\n--- \nfoo: [bar]"
    work = metadata.from_bibtex(f"@x{{y, title={{{title}}}, author={{a\\}}, year={{20x}}, url={{javascript:x}}}}")
    assert work.title == "a b c — foo: [bar]"
    assert (work.year, work.url, work.arxiv) == (None, None, None)


def test_bibtex_files(tmp_path):
    path = tmp_path / "x.bib"
    path.write_bytes(b"\xef\xbb\xbf" + BIBTEX.encode())
    assert metadata.read_bibtex(path) == metadata.from_bibtex(BIBTEX)
    path.write_bytes(b"@misc{x, title={\xe9}}")
    with pytest.raises(ValueError, match="not UTF-8"):
        metadata.read_bibtex(path)
    path.write_bytes(b" " * 50_000)
    with pytest.raises(ValueError, match="larger than"):
        metadata.read_bibtex(path)
    with pytest.raises(OSError, match="absent"):
        metadata.read_bibtex(tmp_path / "absent.bib")


def test_sizes_are_limited():
    names = "".join(f"<author><name>A{n} B</name></author>" for n in range(1000))
    work = metadata.from_atom(atom(more=names), "2005.00928")
    assert len(work.authors) == metadata.MAX_AUTHORS + 1
    assert work.authors[-1] == "others"
    long = "x" * (metadata.MAX_TEXT + 1)
    assert metadata.clean(long) is None, "half a title would be a wrong title"
    assert metadata.from_atom(atom(long), "2005.00928").authors == ("Abnar, Samira", "Van Gool, Luc", "others")


def test_by_hand():
    work = metadata.by_hand(" A\tTitle ", "Abnar, Samira; Zuidema, Willem;", "2020")
    assert work == Work(title="A Title", authors=("Abnar, Samira", "Zuidema, Willem"), year=2020)
    assert metadata.by_hand(None, None, "soon") == Work()


# ----------------------------------------------------------------------------------------------------- the network


class Response:
    """An answer in pieces."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read1(self, _size):
        return next(self.pieces, b"")


@pytest.fixture
def network(monkeypatch):
    """network(answer): what every host says from now on; an exception is raised. Returns the requests made."""
    requests = []

    def say(answer):
        def respond(_self, request, *_, **options):
            requests.append((request, options["timeout"]))
            if isinstance(answer, Exception):
                raise answer
            return Response(answer)

        monkeypatch.setattr(urllib.request.OpenerDirector, "open", respond)
        return requests

    return say


def test_what_is_asked(network):
    requests = network([atom()[:100], atom()[100:]])
    assert metadata.complete(Work(arxiv="2005.00928")).year == 2020
    request, timeout = requests[0]
    assert request.full_url == "https://export.arxiv.org/api/query?id_list=2005.00928"
    assert request.get_header("User-agent").startswith("vitx/")
    assert timeout == metadata.SECONDS
    requests = network([json.dumps(CSL).encode()])
    assert metadata.complete(Work(doi="10.1000/a(b)#c")).year == 2021
    request = requests[-1][0]
    assert request.full_url == "https://doi.org/10.1000/a%28b%29%23c"
    assert request.get_header("Accept") == "application/vnd.citationstyles.csl+json"


def http_error(code):
    return urllib.error.HTTPError("https://doi.org/10.1000/182", code, "?", http.client.HTTPMessage(), None)


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        (
            urllib.error.URLError(socket.gaierror(-3, "x")),
            NoAnswer,
            "there is no network, or it does not reach doi.org",
        ),
        (urllib.error.URLError(TimeoutError()), NoAnswer, "doi.org takes more than 15 seconds to answer"),
        (TimeoutError(), NoAnswer, "doi.org takes more than 15 seconds to answer"),
        (ConnectionResetError(104, "reset"), NoAnswer, "doi.org cannot be reached"),
        (http.client.IncompleteRead(b""), NoAnswer, "doi.org cannot be reached"),
        (http_error(503), NoAnswer, "doi.org answers with error 503"),
        (http_error(404), UnknownWork, "doi.org knows no 10.1000/182"),
        ([b"x" * 65536] * 100, NoAnswer, "doi.org answers with more than"),
    ],
)
def test_what_goes_wrong(network, failure, kind, sentence):
    network(failure)
    with pytest.raises(kind, match=sentence):
        metadata.by_doi("10.1000/182")


def test_a_slow_answer_ends(network, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(metadata.time, "monotonic", lambda: next(clock))
    network([b"x"] * 1000)
    with pytest.raises(NoAnswer, match="takes more than 15 seconds"):
        metadata.by_doi("10.1000/182")


def test_only_https(network):
    with pytest.raises(ValueError, match="not an https address"):
        metadata.fetch("http://example.org/", "text/plain")
    request = urllib.request.Request("https://doi.org/x")
    redirect = metadata._OnlyHttps().redirect_request
    with pytest.raises(NoAnswer, match="not https"):
        redirect(request, None, 302, "Found", {}, "http://example.org/")
    with pytest.raises(NoAnswer, match="not https"):
        redirect(request, None, 302, "Found", {}, "file:///etc/passwd")
    assert redirect(request, None, 302, "Found", {}, "https://example.org/").full_url == "https://example.org/"
