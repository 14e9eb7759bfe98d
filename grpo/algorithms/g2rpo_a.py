"""G2RPO-A, guided GRPO with adaptive guidance (arXiv:2508.13023).

GRPO in which the first few rollouts of each group continue the beginning of a known solution, so
that hard prompts give some reward. How much is given follows the outcomes: more after a step that
is worse than the recent ones, less after a better one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import adaptation, advantage, aggregation, guidance, plans, spans, token_weights
from grpo.adaptation import Direction, OnZero
from grpo.algorithms.options import StandardizedConfig, clipped_objective, reward_terms
from grpo.algorithms.task_scorer import task_scorer
from grpo.objective import Objective
from grpo.pipeline import Adapt, Pipeline

MEANS = {"sequence_mean": aggregation.sequence_mean, "token_mean": aggregation.token_mean}


class Config(StandardizedConfig):
    """Settings of G2RPO-A; defaults are those of the released trainer."""

    num_generations: int = Field(12, ge=2, description="G, rollouts per prompt")
    guided_fraction: float = Field(
        1 / 6,
        ge=0,
        le=1,
        description="share of each group's rollouts that get guidance, rounded down to at least "
        "one rollout (paper: alpha); 0: GRPO",
    )
    guidance_in_loss: bool = Field(
        True,
        description="train on given tokens with a ratio of 1, as released; false: on what the "
        "policy wrote alone",
    )
    aggregation: Literal["sequence_mean", "token_mean"] = Field(
        "sequence_mean", description="sequence_mean: as released; token_mean: a reproduction's"
    )
    length_rule: Literal["cycle3", "sliding", "fixed", "linear_decay"] = Field(
        "cycle3",
        description="how the guidance's length moves: every third step as released, every step "
        "against the last `history`, never, or on a line to 0 at step `decay_steps`",
    )
    max_guidance_length: int = Field(3072, ge=1, description="tokens that are never exceeded")
    initial_guidance_length: int | None = Field(
        None, ge=1, description="tokens in the first step; null: max_guidance_length"
    )
    history: int = Field(2, ge=1, description="sliding: steps that the present one is held against")
    length_ratio: Direction = Field(
        "average_over_current",
        description="factor of the length; current_over_average is how one reader quotes the "
        "paper's formula, against its words and its code",
    )
    on_zero: OnZero = Field(
        "keep", description="length after a step without a right answer: keep, or grow by half"
    )
    decay_steps: int | None = Field(
        None, ge=2, description="linear_decay: the step in which no guidance is left"
    )
    max_solution_share: float = Field(
        0.9, gt=0, lt=1, description="share of a solution that may be given at most"
    )
    end_tokens: tuple[int, ...] = Field(
        (),
        description="ids before the first of which guidance stops, such as those of </think> and "
        "of the end of sequence; they also end what max_solution_share counts",
    )
    progress_scorer: str | None = Field(
        None,
        description="scorer whose mean outcome moves the length; null: that of the largest weight",
    )

    @property
    def first_length(self) -> int:
        """initial_guidance_length, or the maximum where it is not set."""
        if self.initial_guidance_length is None:
            return self.max_guidance_length
        return self.initial_guidance_length

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.first_length > self.max_guidance_length:
            raise ValueError(
                f"initial_guidance_length is {self.first_length}, above max_guidance_length "
                f"{self.max_guidance_length}: lower the one or raise the other"
            )
        if (self.length_rule == "linear_decay") != (self.decay_steps is not None):
            raise ValueError(
                f"length_rule is {self.length_rule} and decay_steps is {self.decay_steps}: "
                "linear_decay needs decay_steps, usually the run's steps; no other rule takes it"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with guided rollouts in the plan and a guidance length that adapts."""
    scorer = task_scorer(outcomes, named=config.progress_scorer, setting="progress_scorer")
    return Pipeline(
        plan=partial(
            plans.guided,
            num_generations=config.num_generations,
            fraction=config.guided_fraction,
            share=config.max_solution_share,
            end_tokens=config.end_tokens,
            max_tokens=max_completion_length - 1,  # something must be left to write
        ),
        spans=spans.whole_answer,
        select=(),
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        trained=() if config.guidance_in_loss else (token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=MEANS[config.aggregation],
        adapt=_adapt(config, scorer),
        metrics=(partial(guidance.guidance_metrics, scorer=scorer),),
        initial_state=guidance.GuidanceState(length=float(config.first_length)),
    )


def objective(config: Config) -> Objective:
    """PPO-clip; the released code has one update per step and hence no clipping to speak of."""
    return clipped_objective(config)


def _adapt(config: Config, scorer: str) -> Adapt:
    longest, direction, on_zero = config.max_guidance_length, config.length_ratio, config.on_zero
    rule: Adapt = adaptation.unchanged
    if config.length_rule == "linear_decay":
        assert config.decay_steps is not None
        first, last = config.first_length, config.decay_steps
        rule = partial(adaptation.guidance_decay, initial_length=first, num_steps=last)
    if config.length_rule == "cycle3":
        rule = partial(
            adaptation.guidance_cycle,
            scorer=scorer,
            max_length=longest,
            direction=direction,
            on_zero=on_zero,
        )
    if config.length_rule == "sliding":
        rule = partial(
            adaptation.guidance_window,
            scorer=scorer,
            max_length=longest,
            history=config.history,
            direction=direction,
            on_zero=on_zero,
        )
    return rule
