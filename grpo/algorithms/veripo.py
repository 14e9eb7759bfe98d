"""VerIPO (arXiv:2505.19000): GRPO that searches, and a DPO stage that learns what it found.

Answers of each group that are right, consistent, not repetitive and of a fair length are preferred
to those that are not; DPO trains on such pairs after every `dpo_every` steps. Reconstructed: no
training code, and neither the paper's thresholds nor its verifier were found; its pairs of
self-correcting answers are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, history, pairs
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.algorithms.preference_stage import (
    PreferenceStageConfig,
    preference_objective,
    preference_stage,
)
from grpo.algorithms.task_scorer import task_scorer, without_step_scorer
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, PreferenceStageConfig):
    """Settings of VerIPO. Its first GRPO phase has learning rate 1e-6, its DPO 5e-7."""

    dpo: bool = Field(True, description="false: no stage, which is GRPO")
    dpo_every: int = Field(50, ge=1, description="steps from one stage of DPO to the next")
    dpo_learning_rate_scale: float = Field(
        0.5, gt=0, description="learning rate of DPO over that of the step before"
    )
    consistency_scorer: str | None = Field(
        None,
        description="the scorer that says (1 or 0) whether an answer follows from its reasoning; "
        "it is no part of the outcome; null: every answer does",
    )
    repetition_ngram: int = Field(8, ge=1, description="tokens of a run that may be repeated")
    max_repetition: float = Field(
        0.3, ge=0, le=1, description="more repeated runs than this share make an answer repetitive"
    )
    min_answer_tokens: int = Field(1, ge=1, description="a shorter answer is too short")
    skip_solved_share: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="share of the prompts whose answers were all right the last time that is "
        "skipped, other ones after each stage",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO, and the pairs that its groups leave."""
    judge = config.consistency_scorer
    answers = without_step_scorer(outcomes, named=judge, setting="consistency_scorer")
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, answers),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    if config.dpo:
        collected = partial(
            pairs.answer_pair_rows,
            outcomes=judging(answers),
            consistency_scorer=judge,
            ngram=config.repetition_ngram,
            max_repetition=config.max_repetition,
            min_tokens=config.min_answer_tokens,
            pairs_per_update=config.dpo_pairs_per_update,
        )
        plain = replace(
            plain,
            metrics=(partial(pairs.pair_metrics, collect=collected),),
            stage=preference_stage(config, collected),
        )
    if config.skip_solved_share == 0:
        return plain
    task = task_scorer(judging(answers), named=None, setting="scorers")
    return replace(
        plain,
        skip=(
            partial(
                history.some_solved_last_time,
                share=config.skip_solved_share,
                round_steps=config.dpo_every,
            ),
        ),
        adapt=partial(history.remember_solved, scorer=task),
        initial_state=history.PromptHistory(),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set; DPO in the stage."""
    plain = clipped_objective(config)
    return replace(plain, stage=preference_objective(config)) if config.dpo else plain
