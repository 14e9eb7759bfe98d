"""DisCO, discriminative constrained optimisation (arXiv:2505.12366): right answers score higher.

No clipping: right answers are raised alike, wrong ones by how likely they are, and the policy is
held near the start of the step by a squared hinge on the KL divergence. Not the DISCO of
arXiv:2505.15074. The released code's defects (a log-mean-exp without its value, a variant that
cannot run) are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, penalties, sequence_scores, surrogates
from grpo.algorithms.options import (
    GroupConfig,
    RightAnswerConfig,
    answer_pipeline,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective, Penalty
from grpo.pipeline import Pipeline
from grpo.sequence_scores import Form, Score

TAU = {"log_likelihood": 10.0, "ratio": 1.0}
SURROGATES = {"log_likelihood": surrogates.log_likelihood, "ratio": surrogates.unclipped}
CONSTRAINTS = {"k1": penalties.k1_from_start, "k3": penalties.k3_from_start}


class Config(GroupConfig, RightAnswerConfig):
    """Settings of DisCO; the released ones. The KL is a mean over answers of means over tokens."""

    score: Score = Field(
        "log_likelihood",
        description="of an answer: its mean log-probability (log-L), or its mean ratio (L-ratio)",
    )
    form: Form = Field(
        "disco", description="disco: likely wrong answers sink most; disco_b: all wrong ones alike"
    )
    tau: float | None = Field(
        None,
        gt=0,
        description="temperature over the wrong answers; null: 10 (log_likelihood) or 1 (ratio)",
    )
    constraint_coef: float = Field(
        1000.0, ge=0, description="of half the squared excess of the KL over its limit; 0: none"
    )
    constraint_limit: float = Field(
        1e-4, ge=0, description="KL from the start of the step that costs nothing (paper: delta)"
    )
    constraint_estimator: Literal["k1", "k3"] = Field(
        "k1", description="of the KL per token: log start - log now, or r - 1 - log r"
    )

    @model_validator(mode="after")
    def _labels_are_no_advantages(self) -> Self:
        if self.negative_scale != 1:
            raise ValueError(
                f"negative_scale is {self.negative_scale:g}, but what DisCO sends to the learner "
                "are labels, not advantages: leave it at 1"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Labels: 1 for right, -1 for wrong answers of mixed groups; every answer weighs 1/B."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.right_or_wrong, threshold=config.right_above),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """The scores, weighed as the objective's gradient says, and the hinge on the KL."""
    plain = plain_objective(config, surrogate=SURROGATES[config.score])
    tau = TAU[config.score] if config.tau is None else config.tau
    term = partial(sequence_scores.discriminated, score=config.score, form=config.form, tau=tau)
    constraint = Penalty(
        name="kl_from_start",
        coefficient=config.constraint_coef,
        fn=CONSTRAINTS[config.constraint_estimator],
        scale=partial(penalties.beyond, limit=config.constraint_limit),
    )
    held = (constraint,) if config.constraint_coef > 0 else ()
    return replace(plain, group_term=term, penalties=(*plain.penalties, *held))
