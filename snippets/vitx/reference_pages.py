"""The pages of reference: tools, leaderboards, perspectives, as HTML text. No mkdocs, no torch, no files."""

from collections import Counter
from collections.abc import Iterable
from html import escape

from vitx import charts
from vitx.markup import Figure, captioned, heading, inline, link, markdown_html, number, picture, small, table
from vitx.pages import SURVEY, Atlas, Page, arxiv_link, entry_link, facts
from vitx.schema import LaterPaper, Leaderboard, LeaderboardRow, Perspective, Tool

ARCHITECTURES = {  # word -> (label of one, of several, class of its colour)
    "transformer": ("transformer", "transformers", "c2"),
    "hybrid": ("hybrid", "hybrids of convolutions and attention", "c5"),
    "cnn": ("CNN", "convolutional networks", "c1"),
}
EVALUATES = {True: "yes", False: "no", None: "unknown"}


def _entries(atlas: Atlas, ids: Iterable[str]) -> str:
    return ", ".join(entry_link(atlas, id) for id in ids)


def _join(parts: Iterable[str]) -> str:
    """One, two and three."""
    *rest, last = parts
    return f"{', '.join(rest)} and {last}" if rest else last


# --- tools -------------------------------------------------------------------------------------------------------


def tools_page(atlas: Atlas) -> Page:
    """What each framework holds and what of it runs on a stock timm model, vitx first; then the facts of each."""
    tools = atlas.catalog.tools.values()
    rows = [_vitx_row(atlas)]
    rows += [
        (
            link(f"#{tool.id}", tool.name),
            escape(tool.licence or "unknown"),
            escape(", ".join(tool.methods)),
            EVALUATES[tool.evaluates],
            tool.runs_on_stock_timm.answer,
            _entries(atlas, tool.implements) or "none",
        )
        for tool in tools
    ]
    heads = (
        "Tool",
        "Licence",
        "Holds",
        "Holds criteria of evaluation",
        "Runs on a stock timm model",
        "Entries of this catalogue",
    )
    answers = Counter(tool.runs_on_stock_timm.answer for tool in tools)
    said = _join(f"{answers[word]} {word}" for word in ("yes", "partly", "no", "unknown"))
    parts = [
        "<h1>Tools</h1>",
        f"<p><strong>{len(tools)}</strong> frameworks that explain or evaluate models, beside this one. Does it run on "
        f"an unmodified <code>VisionTransformer</code> of timm? {said}. "
        "<em>yes</em>: it takes such a model as it is; <em>partly</em>: some of its methods do, or the user writes an "
        "adapter; the reason for each, and whether it was tried or only read, stands below the table.</p>",
        table(heads, rows, "Tools", "vx-tools"),
    ]
    for tool in tools:
        parts += [heading(2, tool.id, tool.name), facts(_tool_facts(atlas, tool))]
    description = "Frameworks that explain Vision Transformers, and what of each runs on a stock timm model."
    return Page("tools/", "Tools", description, "\n".join(parts), ("navigation",))


def _vitx_row(atlas: Atlas) -> tuple[str, ...]:
    """This atlas, counted from its own catalogue."""
    methods, criteria = atlas.catalog.methods.values(), atlas.catalog.criteria.values()
    run = [method for method in methods if method.snippet]
    judge = sum(criterion.snippet is not None for criterion in criteria)
    stock = sum(
        method.model == "glyph" and not {"training", "changed-architecture"} & {*method.needs} for method in run
    )
    return (
        link("/", "vitx (this atlas)"),
        escape(str(atlas.citation.get("license") or "unknown")),
        f'code of {len(run)} of its {len(methods)} methods; <a href="/families/">all of them</a>',
        f'yes: code of {judge} of its {len(criteria)} <a href="/criteria/">criteria</a>',
        "partly",
        f"all that have code; {stock} of the {len(run)} take any timm <code>VisionTransformer</code> as it is, the "
        "others change it or need one trained for them; other architectures are refused",
    )


def _tool_facts(atlas: Atlas, tool: Tool) -> list[tuple[str, str]]:
    runs = tool.runs_on_stock_timm
    entries = [
        ("Address", link(tool.url, tool.url.removeprefix("https://"))),
        ("Licence", escape(tool.licence or "unknown")),
        ("Vision Transformers", inline(tool.vit_support)),
        ("Stock timm model", f"<strong>{runs.answer}</strong>. {inline(runs.reason)}"),
        ("Note", inline(tool.note or "")),
        ("Seen in", _seen(tool)),
    ]
    return [(name, value) for name, value in entries if value]


def _seen(record: Tool | LeaderboardRow | LaterPaper) -> str:
    return escape("; ".join(record.sources)) + ("" if record.verified else " <em>(not verified)</em>")


# --- leaderboards ------------------------------------------------------------------------------------------------


def _shares(rows: Iterable[LeaderboardRow]) -> str:
    """How many rows are of each architecture, in words; counted, not typed."""
    found = Counter(row.architecture for row in rows)
    return _join(f"{found[word]} {many if found[word] != 1 else one}" for word, (one, many, _) in ARCHITECTURES.items())


def leaderboards_page(atlas: Atlas) -> Page:
    """Who led the benchmarks of vision, by architecture: charts, tables, where each number was seen."""
    boards = atlas.catalog.leaderboards.values()
    rows = [row for board in boards for row in board.rows]
    legend = "".join(
        f'<li><span class="vx-dot {colour}" aria-hidden="true"></span>{one}</li>'
        for one, _, colour in ARCHITECTURES.values()
    )
    parts = ["<h1>Leaderboards</h1>"]
    if rows:
        unverified = sum(not row.verified for row in rows)
        share = sum(row.architecture == "transformer" for row in rows) / len(rows)
        parts += [
            f"<p>Why explain transformers? Look at who leads. The {len(rows)} models below are {_shares(rows)}: "
            f"{share:.0%} are transformers. The scores were collected, not measured here; {unverified} of them "
            f"{'was' if unverified == 1 else 'were'} not seen in any source.</p>",
            f'<ul class="vx-legend">{legend}</ul>',
        ]
    for board in boards:
        parts += _board(board)
    if not boards:
        parts.append('<p class="vx-missing">No entry yet.</p>')
    description = "The best models of benchmarks of vision, by architecture."
    return Page("leaderboards/", "Leaderboards", description, "\n".join(parts), ("navigation",))


def _board(board: Leaderboard) -> list[str]:
    measure = f"{board.metric} ({board.unit})"
    drawn = [
        (
            f"{row.rank}. {row.model}",
            row.score,
            row.score,
            row.score,
            ARCHITECTURES[row.architecture][2] + " hollow" * (not row.verified),
        )
        for row in board.rows
    ]
    rows = [
        (
            str(row.rank),
            escape(row.model) + small("", inline(row.note or "")),
            number(row.score),
            str(row.year),
            ARCHITECTURES[row.architecture][0],
            arxiv_link(row.arxiv) if row.arxiv else "unknown",
            _seen(row),
        )
        for row in board.rows
    ]
    heads = ("Rank", "Model", escape(measure), "Year", "Architecture", "Work", "Seen in")
    title = f"{board.name}: {measure}"
    return [
        heading(2, board.id, board.name),
        f"<p>As of {board.as_of}: {_shares(board.rows)}.</p>",
        captioned(
            charts.dots(drawn, measure, title, include_zero=False),
            "Colours are architectures, as above. Hollow: not verified. The axis does not begin at zero.",
        ),
        table(heads, rows, title, "vx-board"),
        f'<div class="vx-small">{markdown_html(board.note)}</div>' if board.note else "",
    ]


# --- perspectives ------------------------------------------------------------------------------------------------


def perspectives_page(atlas: Atlas) -> Page:
    """Open problems, the later papers that address them, and what of it runs here."""
    perspectives = atlas.catalog.perspectives.values()
    proposed: dict[str, list[str]] = {}  # arXiv identifier -> methods and criteria
    for work in (*atlas.catalog.methods.values(), *atlas.catalog.criteria.values()):
        if work.paper and work.paper.arxiv:
            proposed.setdefault(work.paper.arxiv, []).append(work.id)
    papers = sum(len(one.later_papers) for one in perspectives)
    seen = sum(one.survey_wording_seen for one in perspectives)
    parts = [
        "<h1>Perspectives</h1>",
        f"<p><strong>{len(perspectives)}</strong> problems that are open or were when the {link(SURVEY, 'survey')} "
        f"appeared, and <strong>{papers}</strong> papers that address them. The survey's own wording was at hand for "
        f"{seen} of the {len(perspectives)}; the descriptions are ours. "
        '<a href="/about/#the-survey">What the survey is</a>.</p>',
    ]
    for one in perspectives:
        parts += _perspective(atlas, one, proposed)
    if not perspectives:
        parts.append('<p class="vx-missing">No entry yet.</p>')
    description = "Open problems of explaining Vision Transformers, and what was done about them since."
    return Page("perspectives/", "Perspectives", description, "\n".join(parts), ("navigation",))


def _perspective(atlas: Atlas, perspective: Perspective, proposed: dict[str, list[str]]) -> list[str]:
    rows = []
    for paper in perspective.later_papers:
        ids = [paper.entry] if paper.entry else proposed.get(paper.arxiv or "", [])
        venue = paper.venue or "venue unknown"
        year = "" if str(paper.year) in venue else f", {paper.year}"
        rows.append(
            (
                f"<cite>{escape(paper.title)}</cite>" + small("", escape(paper.authors or "authors unknown")),
                escape(venue + year),
                inline(paper.how) + small("Seen in: ", _seen(paper)),
                arxiv_link(paper.arxiv) if paper.arxiv else "no identifier known",
                _entries(atlas, ids) or "no",
            )
        )
    heads = ("Paper", "Venue", "What it does about it", "Work", "Entry here")
    return [
        heading(2, perspective.id, perspective.name),
        markdown_html(perspective.description, atlas.places),
        table(heads, rows, f"Papers: {perspective.name}", "vx-papers") if rows else "",
        facts(_here(atlas, perspective)),
    ]


def example_page(atlas: Atlas, id: str, code: str | None, figure: Figure | None = None) -> Page:
    """The worked example of a perspective. ``code``: its executed snippet as HTML."""
    perspective = atlas.catalog.perspectives[id]
    parts = [
        '<nav class="vx-crumbs" aria-label="Breadcrumb"><a href="/perspectives/">Perspectives</a> › '
        f"{link(f'/perspectives/#{id}', perspective.name)}</nav>",
        f"<h1>{escape(perspective.name)}: a worked example</h1>",
        picture(figure, "Output of the code below.") if figure else "",
        markdown_html(perspective.description, atlas.places),
        heading(2, "code", "The code"),
        f"<p>One file, {link('/' + str(perspective.snippet), str(perspective.snippet))}, executed for this page.</p>",
        code if code is not None else '<p class="vx-missing">Not executed yet.</p>',
    ]
    description = f"{perspective.name}, a worked example: {perspective.description}"
    return Page(f"perspectives/{id}/", perspective.name, description, "\n".join(parts), ("navigation",))


def _here(atlas: Atlas, perspective: Perspective) -> list[tuple[str, str]]:
    """What of the problem can be run or read on this site."""
    works = {**atlas.catalog.methods, **atlas.catalog.criteria}
    run = [id for id in perspective.entries if works[id].snippet]
    described = [id for id in perspective.entries if not works[id].snippet]
    example = link(atlas.places[perspective.id], "worked example") if perspective.snippet else ""
    entries = [
        ("Runs here", ", ".join(filter(None, (example, _entries(atlas, run)))) or "nothing yet"),
        ("Described here", _entries(atlas, described)),
        ("On this site", inline(perspective.here or "")),
        ("Note", inline(perspective.note or "")),
    ]
    return [(name, value) for name, value in entries if value]


def render(atlas: Atlas) -> list[Page]:
    """Every page of reference."""
    return [tools_page(atlas), leaderboards_page(atlas), perspectives_page(atlas)]
