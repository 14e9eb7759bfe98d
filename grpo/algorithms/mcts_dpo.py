"""MCTS and iterative preference learning (arXiv:2405.00451): DPO on steps that a search compares.

Per prompt a tree search looks for a good answer step by step. At each step of it the best and the
worst way to go on are a pair, which DPO trains on after every `dpo_every` steps, with the policy
before that as the reference. Nothing else is trained unless `outcome_coef` says so (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, pairs, search, token_weights, trees
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
from grpo.algorithms.task_scorer import without_step_scorer
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, PreferenceStageConfig):
    """Settings of the search and of DPO, the released code's where it is readable.

    Its 64 iterations for the first step can be read as 64 and four times as many, too.
    """

    num_generations: int = Field(2, ge=2, description="ways to go on from each node")
    max_step_tokens: int = Field(128, ge=1, description="tokens of a step")
    num_iterations: int = Field(16, ge=1, description="of the search for each step of the answer")
    root_factor: int = Field(4, ge=1, description="times as many for the first step")
    search_depth: int = Field(3, ge=1, description="steps that the search looks ahead")
    exploration: float = Field(1.0, ge=0, description="weight of the prior in the choice of nodes")
    discount: float = Field(1.0, ge=0, le=1, description="of what comes after a step")
    right_value: float = Field(
        1.25, description="of a right answer; the code has 5/4 unless it copies the known one"
    )
    wrong_value: float = Field(-1.0, description="of a wrong answer")
    value_scorer: str | None = Field(
        None,
        description="the scorer that says how good an unfinished answer is, in the paper the "
        "policy itself; it is no part of the outcome; null: finished answers alone",
    )
    outcome_coef: float = Field(
        0.0, ge=0, description="of GRPO on the finished answers of the search; 0: DPO alone"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """A search instead of independent answers, and its pairs for the stage."""
    judge = config.value_scorer
    answers = without_step_scorer(outcomes, named=judge, setting="value_scorer")
    settings = _settings(config, judging(answers), max_completion_length)
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, answers),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    finished = partial(search.finished_answers_only, max_tokens=max_completion_length)
    collected = partial(
        pairs.step_pair_rows, settings=settings, pairs_per_update=config.dpo_pairs_per_update
    )
    is_dpo_alone = config.outcome_coef == 0
    return replace(
        plain,
        plan=partial(search.search_plans, settings=settings),
        spans=partial(
            search.answers_and_nodes, value_scorer=judge, max_tokens=max_completion_length
        ),
        scores_between_waves=True,
        trained=(*plain.trained, token_weights.no_token if is_dpo_alone else finished),
        loss_weight=(partial(token_weights.constant, value=config.outcome_coef),),
        metrics=(trees.shape_metrics, partial(search.search_metrics, settings=settings)),
        stage=preference_stage(config, collected),
    )


def objective(config: Config) -> Objective:
    """PPO-clip on finished answers, if they are trained on; DPO in the stage."""
    return replace(clipped_objective(config), stage=preference_objective(config))


def _settings(
    config: Config, outcomes: Mapping[str, float], max_tokens: int
) -> search.SearchSettings:
    return search.SearchSettings(
        num_actions=config.num_generations,
        max_step_tokens=config.max_step_tokens,
        num_iterations=config.num_iterations,
        root_factor=config.root_factor,
        search_depth=config.search_depth,
        exploration=config.exploration,
        discount=config.discount,
        right_value=config.right_value,
        wrong_value=config.wrong_value,
        max_tokens=max_tokens,
        outcomes=dict(outcomes),
        value_scorer=config.value_scorer,
    )
