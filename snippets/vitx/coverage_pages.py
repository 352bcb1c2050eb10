"""The page of coverage: what the catalogue holds, and which entry lacks what. No mkdocs, no torch, no files."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from vitx import contribute
from vitx.catalog import snippet_name, test_name
from vitx.contribute import entry_file, repository
from vitx.markup import code_block, heading, inline, link, table
from vitx.pages import Atlas, Page, entry_link, method_link, term_link
from vitx.schema import Method, Term

SNIPPET = "snippet"


class Gap(NamedTuple):
    """Something that an entry may lack."""

    field: str  # of the entry, as the file spells it
    label: str  # on the mark
    ask: str  # the question that a contribution answers
    how: str  # what to write, as Markdown
    lacks: Callable[[Atlas, Any], bool]


def _unrelated(atlas: Atlas, method: Method) -> bool:
    return not method.relations and method.id not in atlas.incoming


METHOD_GAPS = [
    Gap(
        SNIPPET,
        "code",
        "",
        "Write the snippet and its test, and in the entry `snippet` in place of `why_no_snippet`. "
        "[How](/contributing/) is told step by step.",
        lambda _, method: method.snippet is None,
    ),
    Gap(
        "authors",
        "all authors",
        "Who are all its authors, in printed order?",
        "All names as `Family, Given` under `paper`, without `others`.",
        lambda _, method: "others" in method.paper.authors,
    ),
    Gap(
        "identifier",
        "arXiv or DOI",
        "What is its arXiv identifier, or its DOI?",
        "`arxiv` or `doi` under `paper`.",
        lambda _, method: method.paper.arxiv is None and method.paper.doi is None,
    ),
    Gap(
        "venue",
        "venue",
        "Where did it appear, and in which year?",
        "`venue` under `paper`, such as `ICCV 2021`.",
        lambda _, method: method.paper.venue is None,
    ),
    Gap(
        "code",
        "official code",
        "Where is the authors' own code, and under which licence?",
        "`code`, with `url` and `licence`.",
        lambda _, method: method.code is None,
    ),
    Gap(
        "licence",
        "its licence",
        "Under which licence is the authors' code?",
        "`licence` under `code`: an SPDX identifier, or `none` where the repository has none.",
        lambda _, method: method.code is not None and method.code.licence is None,
    ),
    Gap(
        "class_specific",
        "class-specific",
        "Does the explanation change with the class asked about?",
        "`class_specific`: `true` or `false`. It stays `null` where the question has no meaning.",
        lambda _, method: method.class_specific is None,
    ),
    Gap(
        "relations",
        "relations",
        "Which entries does it extend, compare itself with, supersede, apply or use?",
        "`relations`, to the ids of other entries. An entry that others point to does not lack any.",
        _unrelated,
    ),
    Gap(
        "reported",
        "reported values",
        "Which values does the paper report: of which model, on which data, in which table?",
        "`reported`, each with its table.",
        lambda _, method: not method.reported,
    ),
    Gap(
        "in_survey",
        "in the survey",
        "Is it covered by Kashefi et al. (arXiv 2311.06786), and in which section?",
        '`in_survey`: `"yes"` or `"no"`.',
        lambda _, method: method.in_survey == "unknown",
    ),
]
CRITERION_GAPS = [
    METHOD_GAPS[0],
    Gap(
        "paper",
        "paper",
        "Which publication proposed it?",
        "`paper` of the criterion. It stays `null` where no single work proposed it.",
        lambda _, criterion: criterion.paper is None,
    ),
]
VERIFIED = Gap(
    "verified",
    "a source seen",
    "In which source can it be seen?",
    "Name the source in `sources` and write `verified: true`.",
    lambda _, record: not record.verified,
)
TOOL_GAPS = [
    VERIFIED,
    Gap(
        "licence",
        "licence",
        "Under which licence is it?",
        "",  # as of official code
        lambda _, tool: tool.licence is None,
    ),
]


def stock(method: Method) -> bool:
    """Does it run on a stock model, with neither training nor another architecture, and give a heat map?"""
    return method.output == "heatmap" and not {"training", "changed-architecture"} & {*method.needs}


def _gaps(atlas: Atlas, gaps: Iterable[Gap], entry: Any) -> list[Gap]:
    return [gap for gap in gaps if gap.lacks(atlas, entry)]


# --- links -------------------------------------------------------------------------------------------------------


def _mark(atlas: Atlas, gap: Gap, id: str, entry: Any = None) -> str:
    """A gap as a link that opens the form for it; without an address of the repository it leads to what to write."""
    base = repository(atlas.citation)
    if not base:
        address = f"#gap-{gap.field}"
    elif gap.field == SNIPPET:
        address = contribute.snippet(base, entry)
    else:
        address = contribute.fact(base, id, gap.field)
    return f'<a class="vx-gap" href="{escape(address)}">{escape(gap.label)}</a>'


def _marks(atlas: Atlas, gaps: Iterable[Gap], id: str, entry: Any = None) -> str:
    return " ".join(_mark(atlas, gap, id, entry) for gap in gaps) or "nothing"


def _file(atlas: Atlas, file: str) -> str:
    """Where to mend it: a link to the editor of the repository, else the path to copy."""
    base = repository(atlas.citation)
    return link(contribute.edit(base, file), "edit") if base else f"<code>{escape(file)}</code>"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# --- counts ------------------------------------------------------------------------------------------------------


def summary(atlas: Atlas) -> str:
    """The state of the catalogue in one sentence."""
    methods, criteria = atlas.catalog.methods.values(), atlas.catalog.criteria.values()
    bare = [method for method in methods if method.snippet is None]
    asked = [gap for gap in METHOD_GAPS if gap.field != SNIPPET]
    gaps = sum(len(_gaps(atlas, asked, method)) for method in methods)
    known = 1 - gaps / (len(methods) * len(asked)) if methods else 1
    return (
        f"Of {_count(len(methods), 'method')} {len(methods) - len(bare)} run here and {len(bare)} wait for their code, "
        f"{sum(map(stock, bare))} of which ask for nothing but a stock model; "
        f"of {_count(len(criteria), 'criterion', 'criteria')} {sum(one.snippet is not None for one in criteria)} run "
        f"here; and of the {len(asked)} facts that this page asks of every method {known:.1%} are known."
    )


def _axis_table(label: str, rows: Sequence[tuple[str, int, int]]) -> str:
    """``rows``: HTML of the term, methods, those of them with code."""
    most = max((total for _, total, _ in rows), default=0) or 1
    cells = [
        (
            term,
            f'<span class="vx-share" style="--runs:{100 * runs / most:.1f}%;--all:{100 * total / most:.1f}%"></span>',
            str(total),
            str(runs),
            str(total - runs),
        )
        for term, total, runs in rows
    ]
    heads = (label, '<span class="vx-hidden">As a bar</span>', "All", "Code", "No code")
    return table(heads, cells, label, "vx-axis")


def axes(atlas: Atlas) -> str:
    """Methods by each axis of classification, with and without code."""
    taxonomy, methods = atlas.catalog.taxonomy, atlas.catalog.methods.values()
    vocabularies: list[tuple[str, str, Sequence[Term], Callable[[Method], Iterable[str]]]] = [
        ("family", "Family", taxonomy.families, lambda method: (method.family,)),
        ("subfamily", "Branch", taxonomy.subfamilies, lambda method: (method.subfamily,)),
        ("motivation", "Motivation", taxonomy.motivations, lambda method: method.motivation.terms),
        ("task", "Task", taxonomy.tasks, lambda method: method.tasks),
        ("needs", "Needs", taxonomy.needs, lambda method: method.needs),
        ("output", "Gives", taxonomy.outputs, lambda method: (method.output,)),
    ]

    def count(words: Callable[[Method], Iterable[Any]]) -> tuple[Counter[Any], Counter[Any]]:
        every = Counter(word for method in methods for word in {*words(method)})
        return every, Counter(word for method in methods if method.snippet for word in {*words(method)})

    tables = []
    for name, label, terms, words in vocabularies:
        every, runs = count(words)
        rows = [(term_link(atlas, name, term.id), every[term.id], runs[term.id]) for term in terms]
        tables.append((name, label, rows))
    every, runs = count(lambda method: (method.paper.year,))
    years = [(link(f"/browse/?from={year}&to={year}", str(year)), every[year], runs[year]) for year in sorted(every)]
    tables.append(("year", "Year", years))
    return (
        '<ul class="vx-legend"><li><span class="vx-share" style="--runs:100%;--all:100%"></span> with code</li>'
        '<li><span class="vx-share" style="--runs:0%;--all:100%"></span> without</li></ul><div class="vx-columns">'
        + "".join(
            f"<section>{heading(3, f'by-{name}', label)}{_axis_table(label, rows)}</section>"
            for name, label, rows in tables
        )
        + "</div>"
    )


def matrix(atlas: Atlas) -> str:
    """How many methods of each family lack what."""
    methods = atlas.catalog.methods.values()
    groups = [
        (term_link(atlas, "family", term.id), [method for method in methods if method.family == term.id])
        for term in atlas.catalog.taxonomy.families
    ]
    groups.append(("All", [*methods]))

    def cell(gap: Gap, group: list[Method]) -> str:
        lacking = sum(gap.lacks(atlas, method) for method in group)
        share = 100 * lacking / len(group) if group else 0
        return f'<span class="vx-bar" style="--value:{share:.1f}%">{lacking}</span>'

    heads = ("Family", "Methods", *(link(f"#gap-{gap.field}", gap.label) for gap in METHOD_GAPS))
    rows = [(name, str(len(group)), *(cell(gap, group) for gap in METHOD_GAPS)) for name, group in groups]
    return table(heads, rows, "What methods lack, by family", "vx-matrix")


# --- entries -----------------------------------------------------------------------------------------------------


def _by_family(atlas: Atlas, prefix: str, heads: Sequence[str], row: Callable[[Method], tuple[str, ...] | None]) -> str:
    """A table for each family; ``row`` gives the cells of a method, or None to leave it out."""
    parts = []
    for term in atlas.catalog.taxonomy.families:
        found = (row(method) for method in atlas.catalog.methods.values() if method.family == term.id)
        rows = [cells for cells in found if cells]
        if rows:
            parts += [heading(3, f"{prefix}-{term.id}", term.label), table(heads, rows, term.label, "vx-lacks")]
    return "".join(parts) or '<p class="vx-missing">None.</p>'


def without_code(atlas: Atlas) -> str:
    """Methods that nothing computes yet, with the reason."""
    base = repository(atlas.citation)

    def row(method: Method) -> tuple[str, ...] | None:
        if method.snippet is not None:
            return None
        mark = '<span class="vx-stock">stock model</span> ' if stock(method) else ""
        start = (
            link(contribute.snippet(base, method), "Contribute it")
            if base
            else f"<code>{escape(snippet_name(method.id, method.family))}</code>"
        )
        return _name(atlas, method), mark + inline(method.why_no_snippet or ""), start

    return _by_family(atlas, "code", ("Method", "Why there is none yet", "Start" if base else "File to write"), row)


def _name(atlas: Atlas, method: Method) -> str:
    return f'{method_link(atlas, method.id)} <span class="vx-small">{method.paper.year}</span>'


def methods_table(atlas: Atlas) -> str:
    """What each method lacks."""

    def row(method: Method) -> tuple[str, ...]:
        marks = _marks(atlas, _gaps(atlas, METHOD_GAPS, method), method.id, method)
        return _name(atlas, method), marks, _file(atlas, entry_file("method", method.id, method.family))

    return _by_family(atlas, "lacks", ("Method", "Lacks", "Entry"), row)


def _other(atlas: Atlas, title: str, heads: Sequence[str], total: int, rows: list[tuple[str, ...]]) -> str:
    """A kind of entry of which only those that lack something are listed."""
    said = f"<p>{total - len(rows)} of {total} lack nothing.</p>"
    return (
        heading(3, f"lacks-{title.lower().replace(' ', '-')}", title)
        + said
        + (table(heads, rows, title, "vx-lacks") if rows else "")
    )


def others(atlas: Atlas) -> str:
    """What criteria, tools, rows of leaderboards and later papers lack."""
    catalog = atlas.catalog
    criteria, tools, boards, papers = [], [], [], []
    for one in catalog.criteria.values():
        if gaps := _gaps(atlas, CRITERION_GAPS, one):
            marks = _marks(atlas, gaps, one.id, one)
            why = f'<span class="vx-small">{inline(one.why_no_snippet)}</span>' if one.why_no_snippet else ""
            criteria.append((entry_link(atlas, one.id), marks + why, _file(atlas, entry_file("criterion", one.id))))
    for tool in catalog.tools.values():
        if gaps := _gaps(atlas, TOOL_GAPS, tool):
            name = link(f"/tools/#{tool.id}", tool.name)
            tools.append((name, _marks(atlas, gaps, tool.id), _file(atlas, entry_file("tool", tool.id))))
    for board in catalog.leaderboards.values():
        for record in board.rows:
            if gaps := _gaps(atlas, [VERIFIED], record):
                name = f"{link(f'/leaderboards/#{board.id}', board.name)}: {record.rank}. {escape(record.model)}"
                marks = _marks(atlas, gaps, f"{board.id}, rank {record.rank}")
                boards.append((name, marks, _file(atlas, entry_file("leaderboard", board.id))))
    for problem in catalog.perspectives.values():
        for place, paper in enumerate(problem.later_papers):
            if gaps := _gaps(atlas, [VERIFIED], paper):
                name = f"{link(f'/perspectives/#{problem.id}', problem.name)}: {escape(paper.title)}"
                marks = _marks(atlas, gaps, f"{problem.id}, later_papers[{place}]")
                papers.append((name, marks, _file(atlas, entry_file("perspective", problem.id))))
    rows_of_boards = sum(len(board.rows) for board in catalog.leaderboards.values())
    later = sum(len(problem.later_papers) for problem in catalog.perspectives.values())
    return (
        _other(atlas, "Criteria", ("Criterion", "Lacks", "Entry"), len(catalog.criteria), criteria)
        + _other(atlas, "Tools", ("Tool", "Lacks", "Entry"), len(catalog.tools), tools)
        + _other(atlas, "Rows of leaderboards", ("Row", "Lacks", "Entry"), rows_of_boards, boards)
        + _other(atlas, "Later papers", ("Paper", "Lacks", "Entry"), later, papers)
    )


# --- how ---------------------------------------------------------------------------------------------------------


def _how(atlas: Atlas) -> str:
    """What to write for each gap."""
    gaps = {gap.field: gap for gap in (*METHOD_GAPS, *CRITERION_GAPS, VERIFIED)}
    items = "".join(
        f'<div id="gap-{gap.field}"><dt>{escape(gap.label)}</dt><dd>{inline(gap.how)}'
        + (f'<span class="vx-small"> {escape(gap.ask)}</span>' if gap.ask else "")
        + "</dd></div>"
        for gap in gaps.values()
    )
    family, id = "<family>", "<id>"
    files = [entry_file("method", id, family), snippet_name(id, family), test_name(id, family)]
    return (
        "<p>Each fact stands in the file of its entry; name in <code>sources</code> where you saw it, and leave "
        "<code>null</code> what you have not seen. Code is three files, the last two with underscores for hyphens:</p>"
        f"{code_block(chr(10).join(files))}"
        "<p>What is wrong or left to do is then said by</p>"
        f"{code_block('vitx check', 'language-console')}"
        f'<dl class="vx-card">{items}</dl>'
        "<p>For a work that has no entry at all:</p>"
        f"{code_block('vitx new my-method', 'language-console')}"
    )


def coverage_page(atlas: Atlas) -> Page:
    """What the catalogue holds and what each entry lacks."""
    base = repository(atlas.citation)
    bare = [method for method in atlas.catalog.methods.values() if method.snippet is None]
    opens = (
        "Every mark below opens a form with the entry filled in, on another site."
        if base
        else 'Every mark below leads to <a href="#how">what to write</a>, and beside it stands the file.'
    )
    parts = [
        "<h1>Coverage</h1>",
        f'<p class="vx-lead">{summary(atlas)}</p>',
        heading(2, "counts", "What is here"),
        "<p>A method counts under each of its terms. Terms lead to their methods.</p>",
        axes(atlas),
        heading(2, "missing", "What is missing"),
        "<p>How many methods lack what; the bar is their share of the family. A fact that has no meaning for a method, "
        "such as the class asked about where there is none, counts as missing too.</p>",
        matrix(atlas),
        heading(2, "welcome", "Where code is most welcome"),
        f"<p>{_count(len(bare), 'method')} of which nothing runs here yet. {sum(map(stock, bare))} of them ask for "
        'neither training nor another architecture and give a heat map: <span class="vx-stock">stock model</span>, a '
        "good first contribution where the reason names no other obstacle.</p>",
        without_code(atlas),
        heading(2, "entries", "Entry by entry"),
        f"<p>{opens}</p>",
        methods_table(atlas),
        others(atlas),
        heading(2, "how", "How to fill a gap"),
        _how(atlas),
    ]
    description = "What the catalogue holds, and which entry lacks what: the places where a contribution is welcome."
    return Page("coverage/", "Coverage", description, "\n".join(parts), ("navigation",))


def render(atlas: Atlas) -> list[Page]:
    return [coverage_page(atlas)]
