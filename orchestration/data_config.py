"""The section `data` of a recipe: one data set or several, their columns and their order.

Light, as recipe.py. Refuses to know what the rows hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from grpo.config import Schema

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


class CurriculumConfig(Schema):
    """Training prompts from easy to hard, in the same order every epoch; each set by itself."""

    column: str = Field(description="column of the data that says how hard a row is")
    values: tuple[str, ...] = Field(
        (), description="its values, the easiest first; none: numbers, or text, in rising order"
    )


class EvaluationSet(Schema):
    """One of several data sets. What is left out is as the section `data` says."""

    source: str = Field(description="a .jsonl or .parquet file, or a Hugging Face data set id")
    name: str | None = Field(
        None, description="in metrics and prompt ids; null: the file's name without its ending"
    )
    domain: str | None = Field(
        None, description="of all its prompts; null: as domain_column says, else the set's name"
    )
    split: str | None = Field(None, description="of a Hugging Face data set")
    prompt_column: str | None = None
    answer_column: str | None = None
    solution_column: str | None = None
    domain_column: str | None = None

    @property
    def title(self) -> str:
        """The name in metrics: `maths` of `data/maths.jsonl` or `someone/maths`."""
        path = Path(self.source)
        found = path.stem if path.suffix in DATA_SUFFIXES else path.name
        return self.name or found

    @model_validator(mode="after")
    def _one_says_the_domain(self) -> Self:
        if self.domain is not None and self.domain_column is not None:
            raise ValueError(
                f"domain is {self.domain!r} for all prompts, and domain_column is "
                f"{self.domain_column!r}: give one of them"
            )
        return self


class TrainingSet(EvaluationSet):
    """One of several data sets that a run trains on."""

    weight: float = Field(
        1.0, gt=0, description="share of the groups, relative to the other sets' weights"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """A data set with everything that is needed to read it."""

    name: str
    source: str
    weight: float
    split: str
    prompt_column: str
    answer_column: str
    solution_column: str
    domain_column: str | None
    domain: str  # of rows whose column does not say
    id_prefix: str | None  # None: the file's name
    drops_long: bool  # else a prompt that is too long is an error


def _listed(value: object) -> object:
    """`a.jsonl` and `[a.jsonl, {source: b.jsonl}]` as a list of mappings."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str | dict | EvaluationSet) for item in items):
        raise ValueError(
            f"found {value!r:.80}; expected a file, the id of a Hugging Face data set, or a list "
            "of such and of sets as {source: maths.jsonl, weight: 2}"
        )
    return [{"source": item} if isinstance(item, str) else item for item in items]


def _as_written(sets: Sequence[EvaluationSet]) -> str | list[dict[str, object]]:
    """As short as a user would write it."""
    written = [item.model_dump(exclude_defaults=True) for item in sets]
    return sets[0].source if [list(item) for item in written] == [["source"]] else written


TrainingSets = Annotated[
    tuple[TrainingSet, ...],
    BeforeValidator(
        _listed, json_schema_input_type=str | TrainingSet | tuple[str | TrainingSet, ...]
    ),
    PlainSerializer(_as_written),
]
EvaluationSets = Annotated[
    tuple[EvaluationSet, ...],
    BeforeValidator(
        _listed, json_schema_input_type=str | EvaluationSet | tuple[str | EvaluationSet, ...]
    ),
    PlainSerializer(_as_written),
]


class DataConfig(Schema):
    """Where prompts come from and which column holds what."""

    train: TrainingSets = Field(
        description="a .jsonl or .parquet file, or a Hugging Face data set id; or a list of "
        "{source, weight, domain, ...}"
    )
    evaluation: EvaluationSets | None = Field(
        None, description="held-out prompts, one set or a list; null: no evaluation"
    )
    split: str = Field("train", description="of a Hugging Face data set")
    evaluation_split: str = Field("test", description="of a Hugging Face data set")
    prompt_column: str = Field("prompt", description="text, or a list of messages")
    answer_column: str = Field("answer", description="the reference answer; may be absent")
    solution_column: str = Field("solution", description="a worked solution; may be absent")
    domain_column: str | None = Field(None, description="groups metrics by kind of prompt")
    shuffle: bool = Field(True, description="a new order every epoch; false: as in the file")
    curriculum: CurriculumConfig | None = Field(
        None, description="an order from easy to hard; needs shuffle: false"
    )
    on_long_prompt: Literal["error", "drop"] = Field(
        "error", description="a prompt above sampling.max_prompt_length"
    )

    @property
    def training_sources(self) -> tuple[PromptSource, ...]:
        """`train` with everything filled in."""
        return tuple(
            self._source(item, self.split, item.weight, is_only=len(self.train) == 1)
            for item in self.train
        )

    @property
    def evaluation_sources(self) -> tuple[PromptSource, ...]:
        """`evaluation` with everything filled in; none: no evaluation."""
        sets = self.evaluation or ()
        return tuple(
            self._source(item, self.evaluation_split, 1.0, is_only=len(sets) == 1) for item in sets
        )

    @field_validator("train", "evaluation")
    @classmethod
    def _sets_differ(cls, sets: Sequence[EvaluationSet] | None) -> Sequence[EvaluationSet] | None:
        """Two sets under one name would share prompt ids, metrics and histories."""
        first: dict[str, int] = {}
        read: dict[tuple[str, str | None], int] = {}
        for place, item in enumerate(sets or ()):
            same = read.setdefault((item.source, item.split), place)
            if same != place:
                raise ValueError(
                    f"set {place} has the same source as set {same}, {item.source!r}: remove one; "
                    "a larger weight lets a set come more often"
                )
            other = first.setdefault(item.title, place)
            if other != place:
                raise ValueError(
                    f"sets {other} and {place} are both called {item.title!r}: give one a name, as "
                    f"{{source: {item.source}, name: ...}}"
                )
        return sets

    @model_validator(mode="after")
    def _order_is_one(self) -> Self:
        if self.curriculum is not None and self.shuffle:
            raise ValueError(
                f"curriculum orders the prompts by {self.curriculum.column!r}, but shuffle is "
                "true: set shuffle: false"
            )
        return self

    def _source(
        self, item: EvaluationSet, split: str, weight: float, *, is_only: bool
    ) -> PromptSource:
        column = item.domain_column or self.domain_column
        return PromptSource(
            name=item.title,
            source=item.source,
            weight=weight,
            split=item.split or split,
            prompt_column=item.prompt_column or self.prompt_column,
            answer_column=item.answer_column or self.answer_column,
            solution_column=item.solution_column or self.solution_column,
            domain_column=column if item.domain is None else None,
            domain=item.domain or ("default" if is_only else item.title),
            id_prefix=item.name,
            drops_long=self.on_long_prompt == "drop",
        )
