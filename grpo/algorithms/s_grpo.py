"""S-GRPO, serial-group decaying-reward policy optimisation (arXiv:2505.07686).

The answers of a group are one full answer and early exits from it, asked for their answer half-way.
The earlier a right exit, the more it earns, so that the policy learns to stop when it knows.
Settings are as quoted by notes on the paper; no code was found. The phrase is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, early_exit
from grpo.algorithms.options import (
    ClippedConfig,
    LengthRewardConfig,
    answer_pipeline,
    clipped_objective,
    length_terms,
    outcome_terms,
)
from grpo.algorithms.task_scorer import task_scorer
from grpo.early_exit import Positions
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Reward

THINKING_END = "</think>"
EXIT_PHRASE = "\n\nThe time is up: no more thinking, now the answer.\n</think>\n\n"


class Config(ClippedConfig, LengthRewardConfig):
    """Settings of S-GRPO."""

    early_exits: bool = Field(
        True,
        description="one full answer and num_generations - 1 exits from it; false: all answers "
        "are independent and none decays",
    )
    positions: Positions = Field(
        "random",
        description="where to exit: drawn uniformly, as in the paper, or in equal parts, as in "
        "another port",
    )
    position_seed: int = Field(0, ge=0, description="of the positions, together with the group")
    exit_phrase: str = Field(
        EXIT_PHRASE, min_length=1, description="given to an exit, which then writes its answer"
    )
    thinking_end: str = Field(
        THINKING_END, min_length=1, description="exits lie before this text, if there is one"
    )
    exit_room: int = Field(
        64, ge=2, description="tokens that each exit has for the phrase and its answer"
    )
    decay: float = Field(
        0.5, gt=0, le=1, description="factor of the reward for each right exit before"
    )
    exit_prefix: Literal["trained", "masked"] = Field(
        "trained",
        description="what an exit keeps of the full answer: trained in each, as the paper's sum "
        "reads, or in the full answer alone",
    )
    outcome_scorer: str | None = Field(
        None, description="the scorer that says what is right; null: that of the largest weight"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards minus their mean over one full answer and its exits."""
    scorer = task_scorer(outcomes, named=config.outcome_scorer, setting="outcome_scorer")
    plain = answer_pipeline(
        config,
        rewards=outcome_terms(outcomes) + length_terms(config, outcomes),
        advantage=advantage.centred,
        aggregation=aggregation.sequence_mean,
    )
    if not config.early_exits:
        return plain
    longest = max_completion_length - config.exit_room
    if longest < 1:
        raise ValueError(
            f"exit_room is {config.exit_room}, but sampling.max_completion_length is "
            f"{max_completion_length}: no exit would have room; lower the one or raise the other"
        )
    masks = plain.trained
    if config.exit_prefix == "masked":
        masks += (early_exit.own_part_only,)
    return replace(
        plain,
        plan=partial(
            early_exit.full_then_exits,
            num_generations=config.num_generations,
            positions=config.positions,
            seed=config.position_seed,
            phrase=config.exit_phrase,
            thinking_end=config.thinking_end,
            max_prefix=longest,
            answer_tokens=config.exit_room,
        ),
        rewards=_rewards(config, outcomes, scorer) + length_terms(config, outcomes),
        trained=masks,
        metrics=(partial(early_exit.exit_metrics, scorer=scorer),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _rewards(config: Config, outcomes: Mapping[str, float], scorer: str) -> tuple[Reward, ...]:
    """The task's outcome decays from exit to exit; other scorers count as ever."""
    decaying = partial(
        early_exit.decaying_outcome, scorer=scorer, weight=outcomes[scorer], decay=config.decay
    )
    others = {name: weight for name, weight in outcomes.items() if name != scorer}
    return (decaying, *(outcome_terms(others) if any(others.values()) else ()))
