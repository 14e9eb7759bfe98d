"""Settings of one scorer: what judges, how it is batched, and what a failure does.

Light on purpose: importing it loads nothing of the scorers themselves.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from grpo.config import Schema

RuleName = Literal["exact", "numeric"]


class ScorerConfig(Schema):
    """One scorer of a recipe: a rule that ships with covey, or the user's own function."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="as metrics and rewards call it")
    rule: RuleName | None = Field(
        None,
        description="compare the completion's final answer with the reference answer: "
        "exact (as text) or numeric (as a number)",
    )
    function: str | None = Field(
        None,
        description="the user's own reward function, 'path.py:name' or 'module:name'; "
        "signature as in TRL, OpenRLHF or verl",
    )
    pattern: str | None = Field(
        None,
        description="rules: a regular expression that finds the final answer; its last match "
        "counts, group 1 if it has one; null: the usual markers",
    )
    require_marker: bool = Field(
        False,
        description="rules: only a marked answer counts ('answer: 7', '#### 7', '\\boxed{7}'); "
        "false: without a marker the last number (numeric) or the last line (exact) counts",
    )
    weight: float = Field(1.0, description="coefficient of this scorer in the reward")
    actors: int = Field(1, ge=1, description="processes that score side by side")
    cpus_per_actor: float = Field(0.0, ge=0, description="cores that the cluster sets aside each")
    batch_size: int = Field(64, ge=1, description="completions that one function call gets")
    max_wait_ms: float = Field(5.0, ge=0, description="how long a call waits to fill its batch")
    deadline_s: float = Field(
        60.0, gt=0, description="a function call that takes longer is killed and replaced"
    )
    retries: int = Field(1, ge=0, description="further tries of a group whose call failed")
    on_failure: Literal["drop", "stop"] = Field(
        "drop", description="a group that could not be scored: drop it, or end the run"
    )

    @property
    def needs_reference(self) -> bool:
        """Rules compare with the data set's answer; functions take what they want."""
        return self.rule is not None

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r".+:[A-Za-z_]\w*", value):
            raise ValueError(
                f"found {value!r}; expected 'path.py:name' or 'module:name', "
                "for example 'rewards.py:my_reward'"
            )
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _has_one_judge(self) -> Self:
        if (self.rule is None) == (self.function is None):
            found = "neither" if self.rule is None else "both"
            raise ValueError(
                f"scorer {self.name!r}: found {found} of rule and function; expected exactly one, "
                "for example rule: numeric, or function: 'rewards.py:my_reward'"
            )
        if self.rule is None and (self.pattern is not None or self.require_marker):
            raise ValueError(
                f"scorer {self.name!r}: pattern and require_marker belong to rules; "
                "remove them, or let the function read the answer itself"
            )
        return self
