"""Settings of one scorer: what judges, how it is batched, and what a failure does.

Light on purpose: importing it loads nothing of the scorers themselves.
"""

from __future__ import annotations

import re
from typing import Literal, Self, get_args

from pydantic import Field, JsonValue, field_validator, model_validator

from grpo.config import Schema
from reward_services.model_config import ImplicitRewardConfig, ProcessRewardConfig
from reward_services.model_judge.config import ModelJudgeConfig
from reward_services.preference.config import PreferenceConfig
from reward_services.sandbox_config import SandboxConfig

AnswerRuleName = Literal["exact", "numeric", "choice", "math"]
FormRuleName = Literal["regex", "length", "repetition"]
RuleName = AnswerRuleName | FormRuleName | Literal["starter_steps"]

# Which settings belong to which rules; elsewhere they would be ignored without a word.
_RULE_SETTINGS: dict[str, tuple[RuleName, ...]] = {
    "pattern": ("exact", "numeric", "choice", "regex"),
    "require_marker": ("exact", "numeric", "choice"),
    "min_length": ("length",),
    "max_length": ("length",),
    "length_slack": ("length",),
    "length_unit": ("length",),
    "ngram": ("repetition",),
}


class ScorerConfig(Schema):
    """One scorer of a recipe: a rule, the user's own function, unit tests, or a server."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="as metrics and rewards call it")
    rule: RuleName | None = Field(
        None,
        description="compare the completion's final answer with the reference answer: "
        "exact (as text), numeric (as a number), choice (as a letter) or math (LaTeX and "
        "expressions); or judge its form: regex, length, repetition (1 is good); "
        "starter_steps: re-compute each step of an answer to a starter problem",
    )
    function: str | None = Field(
        None,
        description="the user's own reward function, 'path.py:name' or 'module:name'; "
        "signature as in TRL, OpenRLHF or verl",
    )
    options: dict[str, JsonValue] = Field(
        {}, description="function: keyword arguments that it gets with every call"
    )
    code: SandboxConfig | None = Field(
        None, description="run the program in the completion against the row's unit tests"
    )
    preference: PreferenceConfig | None = Field(
        None, description="the utility of each prefix, by a trained preference model"
    )
    judge: ModelJudgeConfig | None = Field(
        None, description="steps by a model that names the first wrong one; see also starter_steps"
    )
    process_reward: ProcessRewardConfig | None = Field(
        None, description="a reward model from Hugging Face, read at the end of each span"
    )
    implicit_reward: ImplicitRewardConfig | None = Field(
        None, description="PRIME's implicit process reward, which learns from each step's outcomes"
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="a server that answers OpenRLHF's POST /get_reward, with that path",
    )
    token_env: str | None = Field(
        None, description="url: the environment variable that holds the bearer token"
    )
    pattern: str | None = Field(
        None,
        description="rules: a regular expression that finds the final answer; its last match "
        "counts, group 1 if it has one; null: the usual markers. regex: what has to occur",
    )
    require_marker: bool = Field(
        False,
        description="rules: only a marked answer counts ('answer: 7', '#### 7', '\\boxed{7}'); "
        "false: without a marker the last number (numeric) or the last line (exact) counts",
    )
    min_length: int = Field(0, ge=0, description="length: the shortest that gets 1")
    max_length: int | None = Field(None, ge=0, description="length: the longest that gets 1")
    length_slack: int = Field(
        0, ge=0, description="length: the score falls to 0 over so many units; 0: at once"
    )
    length_unit: Literal["tokens", "words", "characters"] = Field(
        "tokens", description="length: what is counted"
    )
    ngram: int = Field(3, ge=1, description="repetition: words that count as one phrase")
    weight: float = Field(1.0, description="coefficient of this scorer in the reward")
    actors: int = Field(1, ge=1, description="processes that score side by side")
    cpus_per_actor: float = Field(0.0, ge=0, description="cores that the cluster sets aside each")
    gpus_per_actor: float = Field(
        0.0,
        ge=0,
        description="GPUs that the cluster sets aside each; 0.25: four actors share one, each with "
        "its own copy of its model",
    )
    batch_size: int = Field(64, ge=1, description="completions that one function call gets")
    max_wait_ms: float = Field(5.0, ge=0, description="how long a call waits to fill its batch")
    deadline_s: float = Field(
        60.0, gt=0, description="a function call that takes longer is killed and replaced"
    )
    retries: int = Field(1, ge=0, description="further tries of a group whose call failed")
    on_failure: Literal["drop", "stop"] = Field(
        "drop", description="a group that could not be scored: drop it, or end the run"
    )
    max_failure_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="with on_failure drop: share of the last groups that this scorer may fail, and "
        "above it the run ends; null: no bound of its own",
    )
    cache_size: int = Field(
        10_000, ge=0, description="scores that an actor remembers for identical texts; 0: none"
    )

    @property
    def needs_reference(self) -> bool:
        """Some rules compare with the data set's answer; the other judges take what they want."""
        return self.rule in get_args(AnswerRuleName)

    @property
    def marks_boundaries(self) -> bool:
        """Whether a score depends on where the spans before it end, not on their text alone."""
        return self.process_reward is not None or self.judge is not None

    @property
    def learns_from(self) -> str | None:
        """The scorer whose outcomes of each step change what this one says of the next groups."""
        if self.implicit_reward is not None:
            return self.implicit_reward.outcome
        if self.preference is not None and self.preference.refresh is not None:
            return self.preference.refresh.outcome
        return None

    @property
    def learns(self) -> bool:
        """Whether it has a model that is trained on the groups of each step."""
        return self.learns_from is not None

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
        judges = {
            "rule": self.rule,
            "function": self.function,
            "code": self.code,
            "preference": self.preference,
            "judge": self.judge,
            "process_reward": self.process_reward,
            "implicit_reward": self.implicit_reward,
            "url": self.url,
        }
        found = [name for name, value in judges.items() if value is not None]
        if len(found) != 1:
            said = f"found {' and '.join(found)}" if found else f"found none of {', '.join(judges)}"
            raise ValueError(
                f"scorer {self.name!r}: {said}; expected exactly one, for example rule: numeric, "
                "or function: 'rewards.py:my_reward'"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_the_judge(self) -> Self:
        fields, values = type(self).model_fields, dict(self)
        for name, rules_with_it in _RULE_SETTINGS.items():
            if values[name] != fields[name].default and self.rule not in rules_with_it:
                rules = " and ".join(rules_with_it)
                raise ValueError(
                    f"scorer {self.name!r}: {name} belongs to the rules {rules}; remove it, "
                    "or let a function read the answer itself"
                )
        if self.rule == "regex" and self.pattern is None:
            raise ValueError(f"scorer {self.name!r}: rule regex needs a pattern")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"scorer {self.name!r}: max_length {self.max_length} lies below min_length "
                f"{self.min_length}"
            )
        if self.learns and self.actors != 1:
            raise ValueError(
                f"scorer {self.name!r} learns and has {self.actors} actors, each of which would "
                "learn for itself: set actors: 1"
            )
        if self.max_failure_rate is not None and self.on_failure == "stop":
            raise ValueError(
                f"scorer {self.name!r}: on_failure stop ends the run at the first failure; "
                "remove max_failure_rate, or set on_failure: drop"
            )
        if self.options and self.function is None:
            raise ValueError(f"scorer {self.name!r}: options are a function's; remove them")
        if self.token_env is not None and self.url is None:
            raise ValueError(f"scorer {self.name!r}: token_env belongs to url; remove it")
        return self
