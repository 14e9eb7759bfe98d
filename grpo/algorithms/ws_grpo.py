"""WS-GRPO, weakly supervised GRPO (arXiv:2602.17025).

A preference model, trained beforehand on pairs of right and wrong answers, says of each step
whether the answer is better with it than without. The mean over an answer's steps is added to its
outcome, and answers with too few or too many steps pay. One advantage per answer, as in GRPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import (
    adaptation,
    advantage,
    aggregation,
    early_stop,
    plans,
    spans,
    step_preference,
    token_weights,
)
from grpo.algorithms.options import (
    StandardizedConfig,
    clipped_objective,
    judging,
    length_terms,
)
from grpo.algorithms.task_scorer import without_step_scorer
from grpo.early_stop import StopRule
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Reward
from grpo.step_preference import Reduction


class Config(StandardizedConfig):
    """Settings of WS-GRPO. Coefficients and range are the paper's; the penalty's size is ours."""

    preference_scorer: str | None = Field(
        None,
        description="the scorer that gives each prefix its utility; it is no part of the outcome, "
        "whatever its weight; null: no step preferences",
    )
    preference_coef: float = Field(
        1.0, ge=0, description="of the preference of an answer's steps (paper: lambda1)"
    )
    outcome_coef: float = Field(5.0, gt=0, description="of the outcome (paper: lambda2)")
    range_penalty: float = Field(
        0.5, ge=0, description="for each step outside of min_steps..max_steps; 0: prefixes alone"
    )
    min_steps: int = Field(3, ge=0, description="fewer are penalised")
    max_steps: int = Field(6, ge=1, description="more are penalised")
    min_step_chars: int = Field(
        8, ge=1, description="a shorter step joins its neighbour; see grpo/steps.py"
    )
    literal_order: bool = Field(
        False,
        description="compare (before, after) as the paper prints it, by which its own model "
        "prefers bad steps; to compare with",
    )
    step_reduction: Reduction = Field(
        "mean", description="over an answer's steps; a sum pays for every further step"
    )
    ws_only_mixed: bool = Field(
        False,
        description="groups whose outcomes are equal teach nothing, as in GRPO; false: they are "
        "told apart by their steps alone",
    )
    truncated_is_wrong: bool = Field(
        True, description="the outcome of a cut-off answer is 0, whatever its scorer found"
    )

    early_stop: bool = Field(
        False,
        description="beyond the paper: write answers in segments, and do not continue one whose "
        "last steps the preference model finds not worth taking",
    )
    segment_tokens: int = Field(64, ge=1, description="early_stop: tokens between two decisions")
    stop_below: float = Field(
        0.5, gt=0, lt=1, description="early_stop: a lower preference says: not worth taking"
    )
    stop_patience: int = Field(
        2, ge=1, description="early_stop: so many such steps in a row stop an answer"
    )
    stop_phrase: str = Field(
        "",
        description="early_stop: given to a stopped answer, which then writes its result; empty: "
        "it ends where it is, as cut off",
    )
    stop_room: int = Field(32, ge=2, description="early_stop: tokens for the phrase and the result")

    @model_validator(mode="after")
    def _stopping_needs_a_judge(self) -> Self:
        if self.early_stop and self.preference_scorer is None:
            raise ValueError(
                "early_stop is true, but preference_scorer is null: nothing says which steps are "
                "worth taking; name a scorer"
            )
        return self

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps is {self.min_steps}, above max_steps {self.max_steps}: every answer "
                "would be penalised; lower the one or raise the other"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO on preference_coef * steps + outcome_coef * outcome - penalty."""
    scorer = config.preference_scorer
    answers = judging(without_step_scorer(outcomes, named=scorer, setting="preference_scorer"))
    if not answers:
        raise ValueError(
            f"no scorer beside the preference model has a weight other than 0 (found: "
            f"{dict(outcomes)}), so nothing says which answers are right: add one under scorers"
        )
    plain = Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=(),
        rewards=_rewards(config, answers) + length_terms(config, answers),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        trained=(token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=aggregation.sequence_mean,
        adapt=adaptation.unchanged,
        metrics=(
            partial(
                step_preference.step_metrics,
                scorer=scorer,
                outcomes=answers,
                literal_order=config.literal_order,
                reduction=config.step_reduction,
                at_least=config.min_steps,
                at_most=config.max_steps,
                min_chars=config.min_step_chars,
            ),
        ),
    )
    if scorer is None:
        return plain
    prefixes = partial(
        spans.answers_and_prefixes, prefix_scorer=scorer, min_chars=config.min_step_chars
    )
    judged = replace(plain, spans=prefixes)
    if not config.early_stop:
        return judged
    return _stopping(config, judged, scorer=scorer, max_tokens=max_completion_length)


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _stopping(config: Config, judged: Pipeline, *, scorer: str, max_tokens: int) -> Pipeline:
    """Segment by segment, with scores in between."""
    rule = StopRule(
        scorer=scorer,
        segment_tokens=config.segment_tokens,
        below=config.stop_below,
        patience=config.stop_patience,
        phrase=config.stop_phrase,
        answer_tokens=config.stop_room,
        max_tokens=max_tokens,
        min_chars=config.min_step_chars,
        literal_order=config.literal_order,
    )
    return replace(
        judged,
        plan=partial(
            early_stop.segment_by_segment, num_generations=config.num_generations, rule=rule
        ),
        spans=partial(early_stop.spans_of_segments, rule=rule),
        scores_between_waves=True,
        metrics=(*judged.metrics, partial(early_stop.early_stop_metrics, rule=rule)),
    )


def _rewards(config: Config, answers: Mapping[str, float]) -> tuple[Reward, ...]:
    """The outcome, and the terms that the config switches on."""
    scorer, only_mixed = config.preference_scorer, config.ws_only_mixed
    terms: tuple[Reward, ...] = (
        partial(
            step_preference.finished_outcome,
            scorer=scorer,
            outcomes=answers,
            coefficient=config.outcome_coef,
            truncated_is_wrong=config.truncated_is_wrong,
        ),
    )
    if scorer is not None and config.preference_coef > 0:
        terms += (
            partial(
                step_preference.step_preference,
                scorer=scorer,
                outcomes=answers,
                coefficient=config.preference_coef,
                literal_order=config.literal_order,
                reduction=config.step_reduction,
                only_mixed=only_mixed,
            ),
        )
    if config.range_penalty > 0:
        terms += (
            partial(
                step_preference.steps_out_of_range,
                scorer=scorer,
                outcomes=answers,
                coefficient=config.range_penalty,
                at_least=config.min_steps,
                at_most=config.max_steps,
                min_chars=config.min_step_chars,
                only_mixed=only_mixed,
            ),
        )
    return terms
