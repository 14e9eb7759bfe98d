"""Guide-GRPO (arXiv:2506.13923): groups that fail get a second try with a hint.

The hinted answers are trained as if the hint had not been there: their ratio goes from the policy
that read it to the policy that did not, and is shaped, not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from grpo import advantage, aggregation, hints, measures, ratios, surrogates
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer
from grpo.objective import Measure, Objective
from grpo.pipeline import Measured, Pipeline
from grpo.templates import require_fields

TEMPLATE = """{prompt}

A hint, for you alone:
{hint}

Start from scratch, and do not mention the hint."""


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of Guide-GRPO; defaults are those of the released code, the template is ours."""

    std_eps: float = Field(1e-6, ge=0, description="added to the group's standard deviation")
    hint_column: str | None = Field(
        "hint",
        description="column of the data with the hint; a row without one gets no second try; "
        "null: no hints at all, which is GRPO with a token mean on mixed groups",
    )
    template: str = Field(
        TEMPLATE, description="the prompt of the second try, with {hint} and usually {prompt}"
    )
    grouping: Literal["replace", "pool"] = Field(
        "replace",
        description="hinted answers take the place of the failed ones, as released, or join them "
        "in one group",
    )
    gamma: float | Literal["p90"] = Field(
        "p90",
        description="of the shaping r / (r + gamma); p90: the 90th percentile of the ratios of "
        "the group's hinted tokens (released code: of a micro-batch)",
    )
    min_accuracy: float = Field(
        0.001, ge=0, description="a group up to this mean outcome has failed"
    )
    max_accuracy: float = Field(
        0.999, gt=0, description="a group above this mean outcome is dropped: all is right"
    )
    outcome_scorer: str | None = Field(
        None,
        description="the scorer whose mean outcome is meant; null: that of the largest weight",
    )

    @field_validator("template")
    @classmethod
    def _shows_the_hint(cls, value: str) -> str:
        return require_fields(value, ("hint",), setting="template")

    @field_validator("gamma")
    @classmethod
    def _is_positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value <= 0:
            raise ValueError(f"gamma is {value:g}; expected a number above 0, or p90")
        return value

    @model_validator(mode="after")
    def _some_accuracy_is_kept(self) -> Self:
        if self.min_accuracy >= self.max_accuracy:
            raise ValueError(
                f"min_accuracy is {self.min_accuracy:g} and max_accuracy is "
                f"{self.max_accuracy:g}: every group would be dropped; lower the one or raise the "
                "other"
            )
        return self

    @property
    def is_scaled(self) -> bool:
        """Whether gamma has to be measured in each step."""
        return self.hint_column is not None and self.gamma == "p90"


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with a token mean on mixed groups, failed ones sampled again with a hint."""
    scorer = task_scorer(outcomes, named=config.outcome_scorer, setting="outcome_scorer")
    mixed = partial(
        hints.drop_if_accuracy_outside,
        scorer=scorer,
        low=config.min_accuracy,
        high=config.max_accuracy,
    )
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.token_mean,
        select=(mixed,),
    )
    if config.hint_column is None:
        return plain
    return replace(
        plain,
        plan=partial(
            hints.plain_then_hinted,
            num_generations=config.num_generations,
            scorer=scorer,
            fails_up_to=config.min_accuracy,
            column=config.hint_column,
            template=config.template,
        ),
        scores_between_waves=True,
        select=(hints.hinted_if_any, mixed) if config.grouping == "replace" else (mixed,),
        token_weight=(hints.ratio_scales,) if config.is_scaled else (),
        measures=(Measured(name="log_probs_now"),) if config.is_scaled else (),
        metrics=(partial(hints.hint_metrics, scorer=scorer, is_scaled=config.is_scaled),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip on plain answers, the shaped ratio on hinted ones."""
    plain = clipped_objective(config)
    if config.hint_column is None:
        return plain
    gamma = config.gamma if isinstance(config.gamma, float) else None
    now = Measure(name="log_probs_now", fn=measures.log_probs_now)
    return replace(
        plain,
        log_ratio=ratios.cross_context_log_ratio,
        surrogate=partial(
            surrogates.by_context,
            same=plain.surrogate,
            other=partial(surrogates.shaped_ratio, gamma=gamma),
        ),
        measures=(now,) if config.is_scaled else (),
    )
