"""TW-GRPO (arXiv:2505.24718): tokens weigh more where the answers of a group disagree.

The disagreement at a position is taken over the whole vocabulary. Beside it a part mark for
questions with several right options. Its question-answer inversion (the negated question with the
complement of the options) is a change of the data, to be made before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, divergence, option_sets
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.divergence import Ended, Mode
from grpo.objective import Measure, Objective, Signal
from grpo.pipeline import Measured, Pipeline, Reward


class Config(StandardizedConfig):
    """Settings of TW-GRPO, from the released code."""

    alpha: float = Field(
        1.7,
        ge=1,
        description="weight where answers disagree most; 1: no weights. 1.7 in the released "
        "script, 1.4 is its program's default",
    )
    divergence: Mode = Field(
        "code",
        description="code: the released sum over the vocabulary, not weighted by probability; kl: "
        "the mean KL to the mean distribution, as the paper describes it",
    )
    ended: Ended = Field(
        "uniform",
        description="what an answer that has ended says: uniform: everything alike, as released, "
        "which looks like disagreement; excluded: nothing",
    )
    option_coef: float = Field(
        0.0,
        ge=0,
        description="of a reward for the share of right options that an answer names (paper: 1), "
        "beside the scorers'; 0: none",
    )
    option_column: str | None = Field(
        None, description="column of the data with the right options; null: the reference answer"
    )
    answer_opening: str = Field("<answer>", min_length=1, description="what the options follow")
    answer_closing: str | None = Field(
        "</answer>", min_length=1, description="what follows the options; null: the text's end"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages, weighed by position; every token of an update counts the same."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes) + _option_terms(config),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.token_mean,
    )
    if config.alpha == 1:
        return plain
    return replace(
        plain,
        token_weight=(partial(divergence.divergence_weight, alpha=config.alpha),),
        measures=(Measured(name=divergence.NAME),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    measured = partial(divergence.position_divergence, mode=config.divergence, ended=config.ended)
    measure = Measure(name=divergence.NAME, fn=measured, needs=frozenset({Signal.HIDDEN}))
    return replace(clipped_objective(config), measures=() if config.alpha == 1 else (measure,))


def _option_terms(config: Config) -> tuple[Reward, ...]:
    if config.option_coef == 0:
        return ()
    share = partial(
        option_sets.option_share,
        coefficient=config.option_coef,
        column=config.option_column,
        opening=config.answer_opening,
        closing=config.answer_closing,
    )
    return (share,)
