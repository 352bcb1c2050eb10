"""The shape of every catalogue file, as frozen pydantic models.

The field descriptions are the documentation: ``python -m vitx.schema`` writes them as JSON Schema to
catalog/schema/, where editors find them and complete from them. What one file alone cannot tell (do the terms
exist, do the relations resolve) is checked in ``vitx.catalog``.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, str_strip_whitespace=True, allow_inf_nan=False)


Text = Annotated[str, StringConstraints(min_length=1)]
Id = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=80)]
Url = Annotated[str, StringConstraints(pattern=r"^https://[^\s<>\"'\\{}]+$")]
Arxiv = Annotated[str, StringConstraints(pattern=r"^([0-9]{4}\.[0-9]{4,5}|[a-z-]+(\.[A-Z]{2})?/[0-9]{7})$")]
Doi = Annotated[str, StringConstraints(pattern=r"^10\.[0-9]{4,9}/[^\s<>\"\\{}]+$")]
# YAML gives lists, so the tuples themselves are not strict; what they hold is.
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Ids = Annotated[tuple[Id, ...], Field(strict=False, min_length=1)]
FormerIds = Annotated[tuple[Id, ...], Field(strict=False)]


class Paper(_Record):
    """The publication that proposed it."""

    title: Text = Field(description="Title as printed, without a full stop.")
    authors: Texts = Field(
        description='Authors as "Family, Given" in printed order; "others" last if the list is incomplete.'
    )
    year: int = Field(
        ge=1950,
        le=2100,
        description="Year by which the work is dated, of its preprint or its venue; the venue carries its own.",
    )
    venue: Text | None = Field(description='Venue and year, such as "ICCV 2021"; null when unknown.')
    arxiv: Arxiv | None = Field(description='arXiv identifier in quotes, such as "2005.00928"; null when unknown.')
    doi: Doi | None = Field(description="DOI without the https://doi.org/ prefix; null when unknown.")
    url: Url | None = Field(description="Page of the paper where neither arXiv nor DOI leads; null when unknown.")

    @model_validator(mode="after")
    def _others_last(self) -> "Paper":
        if "others" in self.authors[:-1] or self.authors == ("others",):
            raise ValueError('"others" stands last in authors, after at least one name')
        return self


class Code(_Record):
    """The authors' own implementation."""

    url: Url = Field(description="Address of the authors' repository.")
    licence: Text | None = Field(
        description='SPDX identifier, such as "MIT"; "none" when none is given; null when unknown.'
    )


class Motivation(_Record):
    """Why the method was proposed."""

    terms: Ids = Field(description="Terms of the motivations vocabulary, the weightiest first.")
    text: Text = Field(description="One or two sentences: the shortcoming that the authors set out to mend.")


class Relation(_Record):
    """A directed link from this entry to another."""

    type: Literal["extends", "compares-with", "supersedes", "same-idea-as", "applies", "uses"] = Field(
        description=(
            "extends: generalises or refines it; compares-with: the paper measures itself against it; "
            "supersedes: its authors now recommend this one; same-idea-as: found independently; "
            "applies: carries it unchanged to another task; uses: contains it as a building block."
        )
    )
    id: Id = Field(description="Id of the other entry.")


class Difference(_Record):
    """One place where the authors' code does not do what their paper says."""

    paper: Text = Field(description="What the paper says, with its section or equation.")
    code: Text = Field(description="What the code does, in fact and without judgement.")
    repository: Url = Field(description="Repository that was read.")
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{7,40}$")] = Field(
        description="Commit that was read, in quotes."
    )
    function: Text = Field(description="File and function, such as ViT_LRP.py: VisionTransformer.relprop.")
    options: dict[Text, str | int | float | bool] | None = Field(
        description="Arguments of explain that do what the code does; vitx bench --differences measures their effect."
    )
    why_not_measured: Text | None = Field(
        default=None, description="Reason where there is no such option. Exactly one of the two is given."
    )

    @model_validator(mode="after")
    def _option_or_reason(self) -> "Difference":
        if (self.options is None) == (self.why_not_measured is None):
            raise ValueError("give exactly one of options and why_not_measured")
        return self


class Reported(_Record):
    """One number that a paper gives, as it was seen; what was not seen stays out."""

    metric: Text = Field(description="Name of the metric as the paper writes it, such as Negative perturbation AUC.")
    criterion: Id | None = Field(
        description="Id of the criterion of this catalogue that asks the same; null where none does. Steps, ways of "
        "hiding and scales may differ all the same."
    )
    value: float = Field(description="The number as printed, without its unit.")
    unit: Text | None = Field(description="Unit, such as %; null for a plain number.")
    model: Text = Field(description="The model, as it is named there.")
    data: Text = Field(description="Data on which it was measured, as named there.")
    where: Text = Field(description='Place in the paper or repository, such as "Table 2" or "README, Model zoo".')
    source: Text = Field(
        description="Where the number was seen: an address, or a place such as github:owner/name:file."
    )
    note: Text | None = Field(
        default=None, description="What a reader must know of this number: who measured it, at which setting."
    )


def _snippet_or_reason(entry: Any) -> Any:
    if (entry.snippet is None) == (entry.why_no_snippet is None):
        raise ValueError("give exactly one of snippet and why_no_snippet")
    return entry


class Method(_Record):
    """One surveyed work: catalog/methods/<family>/<id>.yml."""

    id: Id = Field(description="Equals the file name. Never changes: it is the address of the page.")
    name: Text = Field(description="The name that the field uses.")
    paper: Paper
    code: Code | None = Field(description="The authors' code; null when none is known.")
    family: Id = Field(description="Term of the families vocabulary; equals the folder.")
    subfamily: Id = Field(description="Term of the subfamilies vocabulary that belongs to the family.")
    motivation: Motivation
    tasks: Ids = Field(description="Terms of the tasks vocabulary on which the paper explains models.")
    needs: Ids = Field(description="Terms of the needs vocabulary: what the method asks of the model.")
    class_specific: bool | None = Field(
        description="Does the explanation change with the class asked about? null when unknown."
    )
    output: Id = Field(description="Term of the outputs vocabulary: the kind of thing that explain returns.")
    stochastic: bool = Field(default=False, description="Does explain draw random numbers (and so take generator)?")
    mechanism: Text = Field(
        description="How it works, enough to implement from. Markdown with $inline$ and $$display$$ LaTeX."
    )
    relations: Annotated[tuple[Relation, ...], Field(strict=False)] = Field(
        default=(), description="Links to other entries."
    )
    in_survey: Literal["yes", "no", "unknown"] = Field(
        description='Is it covered by Kashefi et al. (arXiv 2311.06786)? Quoted: "yes", "no" or "unknown".'
    )
    snippet: Annotated[str, StringConstraints(pattern=r"^snippets/[a-z]+/[a-z0-9_]+\.py$")] | None = Field(
        default=None, description="Path of the snippet from the repository root."
    )
    why_no_snippet: Text | None = Field(
        default=None,
        description="Reason, in one sentence, where there is no snippet. Exactly one of the two is given.",
    )
    model: Id = Field(default="glyph", description="Model on which the snippet runs when none is named.")
    quick: dict[Text, str | int | float | bool] = Field(
        default={},
        description="Arguments of explain for pictures on pages, where the default takes thousands of passes. "
        "Figures name them; measurements use the default or name what they use.",
    )
    rates: Annotated[tuple[dict[Text, str | int | float | bool | None], ...], Field(strict=False)] = Field(
        default=(),
        description="For a method that prunes: arguments of explain, or for units of prune, that take away least, "
        "then more and more. vitx bench --pruned measures each.",
    )
    passes: Text | None = Field(
        default=None,
        description='Passes through the model that the mathematics needs, such as "1 forward, 1 backward".',
    )
    differences: Annotated[tuple[Difference, ...], Field(strict=False)] = Field(
        default=(), description="Where the official code differs from the paper; sure before it is said."
    )
    reported: Annotated[tuple[Reported, ...], Field(strict=False)] = Field(
        default=(), description="Main numbers that the paper gives for the method, each seen in the source it names."
    )
    sources: Texts = Field(description="Where the facts of this entry were seen.")
    note: Text | None = Field(default=None, description="Anything a reader must know that fits nowhere else.")
    formerly: FormerIds = Field(
        default=(), description="Ids it had before; their addresses lead here, and commands name the new id."
    )

    _one_of_two = model_validator(mode="after")(_snippet_or_reason)


class Criterion(_Record):
    """One way to judge explanations: catalog/evaluation/<id>.yml."""

    id: Id = Field(
        description="Equals the file name, and is no method's. Never changes: it is the address of the page."
    )
    name: Text = Field(description="The name that the field uses.")
    paper: Paper | None = Field(
        description="The publication that proposed it; null where it was proposed here or by no single work."
    )
    category: Id = Field(description="Term of the categories vocabulary: what it asks of an explanation.")
    definition: Text = Field(
        description="What is computed, enough to implement from. Markdown with $inline$ and $$display$$ LaTeX."
    )
    better: Literal["up", "down", "neither"] = Field(
        description='Which way an explanation gets better as the number moves: "up", "down" or "neither".'
    )
    implemented_in: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        description="Where else it is implemented, such as quantus.Infidelity; empty when nowhere known."
    )
    in_survey: Literal["yes", "no", "unknown"] = Field(
        description='Is it covered by Kashefi et al. (arXiv 2311.06786)? Quoted: "yes", "no" or "unknown".'
    )
    snippet: Annotated[str, StringConstraints(pattern=r"^snippets/evaluation/[a-z0-9_]+\.py$")] | None = Field(
        default=None, description="Path of the snippet from the repository root."
    )
    why_no_snippet: Text | None = Field(
        default=None,
        description="Reason, in one sentence, where there is no snippet. Exactly one of the two is given.",
    )
    relations: Annotated[tuple[Relation, ...], Field(strict=False)] = Field(
        default=(), description="Links to other criteria."
    )
    sources: Texts = Field(description="Where the facts of this entry were seen.")
    note: Text | None = Field(default=None, description="Anything a reader must know that fits nowhere else.")
    formerly: FormerIds = Field(
        default=(), description="Ids it had before; their addresses lead here, and commands name the new id."
    )

    _one_of_two = model_validator(mode="after")(_snippet_or_reason)


class Term(_Record):
    """One term of a vocabulary."""

    id: Id = Field(description="The word that entries use.")
    label: Text = Field(description="English label.")
    label_zh: Text = Field(description="Chinese label.")
    order: int = Field(ge=0, description="Position in menus and in the mind map; unique within the vocabulary.")
    definition: Text = Field(description="One paragraph in our own words.")
    definition_zh: Text = Field(description="The same in Chinese, on one line: a line break would show as a space.")


class Subfamily(Term):
    """A branch of a family."""

    family: Id = Field(description="The family that it belongs to.")


Terms = Annotated[tuple[Term, ...], Field(strict=False, min_length=1)]
Subfamilies = Annotated[tuple[Subfamily, ...], Field(strict=False, min_length=1)]


class Taxonomy(_Record):
    """The vocabularies, which are the mind map: catalog/taxonomy.yml."""

    families: Terms = Field(description="What is explained with: the first level of the mind map.")
    subfamilies: Subfamilies = Field(description="The second level; order is unique within the family.")
    motivations: Terms = Field(description="Why methods are proposed.")
    tasks: Terms = Field(description="What the explained models do.")
    needs: Terms = Field(description="What a method asks of the model.")
    outputs: Terms = Field(description="What explain returns.")
    categories: Terms = Field(description="What criteria of evaluation ask of an explanation.")


class ModelCard(_Record):
    """A checkpoint that ships: catalog/models/<id>.yml."""

    id: Id = Field(description="Name under which vitx.models.load finds it; equals the file name.")
    name: Text = Field(description="Name for readers.")
    method: Id | None = Field(
        default=None,
        description="Entry whose snippet defines the network and loads the file; null for a network of timm.",
    )
    architecture: Text = Field(description="timm class and its arguments, in words.")
    parameters: int = Field(ge=1, description="Number of weights.")
    input_size: int = Field(ge=1, description="Height and width of the input, in pixels.")
    classes: int = Field(ge=1, description="Number of classes.")
    licence: Text = Field(description="SPDX identifier of the weights.")
    training: Text = Field(description="What was trained, on which data, how long.")
    command: Text = Field(description="The exact command that made the file.")
    seed: int = Field(ge=0, description="Seed of that command.")
    minutes: float = Field(ge=0, description="Training time in minutes on the machine that made the file.")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="SHA-256 of the safetensors file, in lower case."
    )
    metrics: dict[Text, float] = Field(description="Measured numbers, such as top1: 0.98. Fractions, not percent.")
    limits: Text = Field(description="What the model must not be used for.")
    source: Text = Field(description="Where its weights and data come from.")


class Runs(_Record):
    """Whether something runs on an unmodified VisionTransformer of timm, and why."""

    answer: Literal["yes", "partly", "no", "unknown"] = Field(
        description='Quoted: "yes" where all of it that explains or evaluates picture models does, "partly" where some '
        'of it does, "no", or "unknown" where nobody looked.'
    )
    reason: Text = Field(description="What runs and what does not, how it was found, and with which version.")


class Tool(_Record):
    """A framework that explains or evaluates models: catalog/tools/<id>.yml."""

    id: Id = Field(description="Equals the file name.")
    name: Text = Field(description="The name that the field uses.")
    url: Url = Field(description="Address of its repository, else of its package.")
    licence: Text | None = Field(
        description='SPDX identifier, such as "MIT"; "none" when none is given; null when unknown.'
    )
    methods: Texts = Field(description="What it holds, in its own names.")
    evaluates: bool | None = Field(description="Does it hold criteria of evaluation? null when unknown.")
    vit_support: Text = Field(description="What it says or does about Vision Transformers.")
    runs_on_stock_timm: Runs = Field(description="What of it runs on an unmodified VisionTransformer of timm.")
    implements: Annotated[tuple[Id, ...], Field(strict=False)] = Field(
        default=(), description="Ids of the methods and criteria of this catalogue that it holds."
    )
    sources: Texts = Field(description="Where the facts of this entry were seen.")
    verified: bool = Field(description="Were its repository or package and its licence seen?")
    note: Text | None = Field(default=None, description="Anything a reader must know that fits nowhere else.")


class LeaderboardRow(_Record):
    """One model of a leaderboard."""

    rank: int = Field(ge=1, description="Place, 1 the best; rows of equal score keep the order of the source.")
    model: Text = Field(description="Name of the model, with what it was combined with.")
    score: float = Field(description="Score in the unit of the leaderboard, the higher the better.")
    year: int = Field(ge=1950, le=2100, description="Year in which the work became public.")
    architecture: Literal["transformer", "cnn", "hybrid"] = Field(
        description="transformer, cnn, or hybrid where convolutions and attention share the work."
    )
    arxiv: Arxiv | None = Field(description="arXiv identifier of the work in quotes; null when unknown.")
    sources: Texts = Field(description="Where the score was seen.")
    verified: bool = Field(description="Was the score seen in one of the sources?")
    note: Text | None = Field(default=None, description="Anything a reader must know of this row.")


class Leaderboard(_Record):
    """The best models of one benchmark at one time: catalog/leaderboards/<id>.yml."""

    id: Id = Field(description="Equals the file name.")
    name: Text = Field(description="Task and data set.")
    metric: Text = Field(description="What is counted, such as top-1 accuracy.")
    unit: Text = Field(description="Unit of the scores, such as %.")
    as_of: Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}$")] = Field(
        description='Year and month that the ranking stands for, in quotes, such as "2023-11".'
    )
    rows: Annotated[tuple[LeaderboardRow, ...], Field(strict=False, min_length=1)] = Field(
        description="The models, the best first."
    )
    note: Text | None = Field(default=None, description="What a reader must know of the whole table.")

    @model_validator(mode="after")
    def _in_order(self) -> "Leaderboard":
        if [row.rank for row in self.rows] != list(range(1, len(self.rows) + 1)):
            raise ValueError("rows stand in order of rank: 1, 2, 3 and so on")
        if any(row.score < below.score for row, below in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError("no row has a higher score than the row above it")
        return self


class LaterPaper(_Record):
    """A paper that addresses an open problem."""

    title: Text = Field(description="Title as printed, without a full stop.")
    authors: Text | None = Field(description='Authors for reading, such as "Wu et al."; null when unknown.')
    year: int = Field(ge=1950, le=2100, description="Year by which the work is dated.")
    venue: Text | None = Field(description='Venue and year, such as "ICCV 2021"; null when unknown.')
    arxiv: Arxiv | None = Field(description="arXiv identifier in quotes; null when unknown.")
    how: Text = Field(description="What it does about the problem, in one sentence.")
    entry: Id | None = Field(
        default=None,
        description="Id of the method or criterion that the paper proposes, where no common arXiv identifier says it.",
    )
    sources: Texts = Field(description="Where the facts were seen.")
    verified: bool = Field(description="Were title and year, and authors or arXiv identifier, seen in a source?")


class Perspective(_Record):
    """An open problem and what was done about it: catalog/perspectives/<id>.yml."""

    id: Id = Field(description="Equals the file name.")
    name: Text = Field(description="The problem in a few words.")
    description: Text = Field(description="What is open, in our own words.")
    survey_wording_seen: bool = Field(description="Was the wording of the survey (arXiv 2311.06786) at hand?")
    later_papers: Annotated[tuple[LaterPaper, ...], Field(strict=False)] = Field(
        description="Papers that address it, in reading order."
    )
    entries: Annotated[tuple[Id, ...], Field(strict=False)] = Field(
        default=(), description="Ids of the methods and criteria of this catalogue that bear on it."
    )
    here: Text | None = Field(
        default=None,
        description="What else this site shows or runs about it. Markdown; links from the root, such as (/cost/).",
    )
    snippet: Annotated[str, StringConstraints(pattern=r"^snippets/perspectives/[a-z0-9_]+\.py$")] | None = Field(
        default=None, description="Path of a worked example from the repository root; it gets a page of its own."
    )
    note: Text | None = Field(default=None, description="Anything a reader must know that fits nowhere else.")


class Catalog(NamedTuple):
    """The whole catalogue, frozen."""

    taxonomy: Taxonomy
    methods: dict[str, Method]  # by id; sorted by family order, subfamily order, year, id
    models: dict[str, ModelCard]  # by id, sorted
    criteria: dict[str, Criterion]  # by id; sorted by category order, year (those without a paper last), id
    tools: dict[str, Tool]  # by id, sorted
    leaderboards: dict[str, Leaderboard]  # by id, sorted
    perspectives: dict[str, Perspective]  # by id, sorted


KINDS: dict[str, type[_Record]] = {
    "method": Method,
    "criterion": Criterion,
    "taxonomy": Taxonomy,
    "model": ModelCard,
    "tool": Tool,
    "leaderboard": Leaderboard,
    "perspective": Perspective,
}


def schemas() -> dict[str, str]:
    """File name -> JSON Schema text, for catalog/schema/."""
    texts = {}
    for kind, record in KINDS.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | record.model_json_schema()
        texts[f"{kind}.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    return texts


def write_schemas(folder: Path) -> list[Path]:
    """Write the JSON Schemas to ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in schemas().items():
        path, beside = folder / name, folder / (name + ".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    from vitx import ATLAS

    for written in write_schemas(ATLAS / "catalog" / "schema"):
        print(written.relative_to(ATLAS))
