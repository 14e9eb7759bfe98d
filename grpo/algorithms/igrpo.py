"""iGRPO, iterative GRPO (arXiv:2602.09000): GRPO on refinements of the policy's own best draft.

Drafts are sampled from the prompt and scored; the best is shown to the answers that are trained.
No code was found: equations and settings are as quoted by notes on the paper, the template is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field, field_validator

from grpo import advantage, aggregation, refinement
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline
from grpo.templates import filled, require_fields

TEMPLATE = """{prompt}

An earlier attempt, which may be wrong:
{draft}

Find what is wrong in it, and solve the problem."""


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of iGRPO. The paper keeps num_drafts + num_generations as large as GRPO's group."""

    num_generations: int = Field(4, ge=2, description="G, refinements per prompt")
    num_drafts: int = Field(
        4, ge=0, description="answers of which the best is refined (paper: N); 0: GRPO"
    )
    template: str = Field(
        TEMPLATE,
        description="the prompt of a refinement, with {prompt} and {draft}; prompt and draft "
        "together count in sampling.max_prompt_length's room",
    )
    max_draft_chars: int | None = Field(
        None, ge=1, description="a longer draft loses its end; null: shown in full"
    )

    @field_validator("template")
    @classmethod
    def _has_both_fields(cls, value: str) -> str:
        if not filled(value, {"prompt": "", "draft": ""}):
            raise ValueError(
                f"template is {value!r}: after an empty draft it would be the plain prompt, "
                "and the refinement a draft; put some text between the two"
            )
        return require_fields(value, ("prompt", "draft"), setting="template")


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO on the refinements; drafts are scored, logged and not trained."""
    standardized = partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps)
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=standardized,
        aggregation=aggregation.sequence_mean,
    )
    count = config.num_drafts
    if count == 0:
        return plain
    return replace(
        plain,
        plan=partial(
            refinement.draft_then_refine,
            num_drafts=count,
            num_generations=config.num_generations,
            template=config.template,
            max_draft_chars=config.max_draft_chars,
            weights=judging(outcomes),
        ),
        scores_between_waves=True,
        advantage=partial(refinement.among_refinements, advantage=standardized),
        trained=(*plain.trained, refinement.refinements_only),
        aggregation=partial(aggregation.of_trained_rows, aggregation=aggregation.sequence_mean),
        metrics=(refinement.refinement_metrics,),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
