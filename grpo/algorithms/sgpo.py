"""SGPO, stepwise guided policy optimisation (arXiv:2505.11595).

A group without a right answer teaches GRPO nothing. Here a judge names the first wrong step of
each of its answers, and the share of the reasoning before it takes the place of the reward 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import (
    adaptation,
    advantage,
    aggregation,
    first_errors,
    plans,
    ratios,
    spans,
    stored,
    token_weights,
)
from grpo.algorithms.options import (
    StandardizedConfig,
    clipped_objective,
    length_terms,
    outcome_terms,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer, without_step_scorer
from grpo.first_errors import Scope, Shaping, TruncatedLength, Unit
from grpo.objective import Objective
from grpo.pipeline import Advantage, Pipeline, Reward


class Config(StandardizedConfig):
    """Settings of SGPO. The paper's slope and threshold are not known; these are ours."""

    step_scorer: str | None = Field(
        None,
        description="the scorer that judges steps; it is no part of the reward, whatever its "
        "weight; null: no judge, which is GRPO",
    )
    outcome_scorer: str | None = Field(
        None,
        description="the scorer that says whether an answer is right (above 0) or wrong; null: "
        "that of the largest weight",
    )
    scope: Scope = Field(
        "all_wrong",
        description="whose steps are judged: of groups without a right answer, or of every_wrong "
        "answer, which can put a wrong answer above its group's mean",
    )
    min_step_chars: int = Field(
        20, ge=1, description="a shorter step joins its neighbour; see grpo/steps.py"
    )
    unit: Unit = Field("steps", description="the right share counts steps, or their tokens")
    truncated_length: TruncatedLength = Field(
        "produced",
        description="length of a cut-off answer: what it produced, or the median of its group if "
        "that is longer",
    )
    max_unjudged: float = Field(
        0.5,
        ge=0,
        le=1,
        description="a group keeps its outcomes if the judge found no step that it can judge in "
        "more than this share of it; else such an answer has the right share 0",
    )
    shaping: Shaping = Field(
        "logistic",
        description="from the right share to the reward; none: the share itself; "
        "logistic_as_transcribed: with the opposite sign, to compare with",
    )
    slope: float = Field(5.0, gt=0, description="of the logistic (paper: beta)")
    threshold: float = Field(0.5, description="share with the reward 1/2 (paper: gamma)")
    all_wrong_scale: float = Field(
        1.0, gt=0, description="factor of the advantages of groups without a right answer"
    )
    offline: bool = Field(
        False,
        description="train on a fixed set of judged answers: data.train is a file of groups "
        "(`covey schema group`), and nothing is sampled; the ratio is taken to the stored "
        "log-probabilities",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO, but wrong answers in scope are rewarded for the steps before their first mistake."""
    answers = without_step_scorer(outcomes, named=config.step_scorer, setting="step_scorer")
    plain = Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=(),
        rewards=reward_terms(config, answers),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        trained=(token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=aggregation.sequence_mean,
        adapt=adaptation.unchanged,
    )
    if config.step_scorer is None:
        return _offline(plain) if config.offline else plain
    task = task_scorer(answers, named=config.outcome_scorer, setting="outcome_scorer")
    judge, scope, unit = config.step_scorer, config.scope, config.unit
    judged = replace(
        plain,
        spans=partial(
            spans.outcome_then_steps,
            task_scorer=task,
            step_scorer=judge,
            scope=scope,
            min_chars=config.min_step_chars,
        ),
        rewards=_rewards(config, answers, task=task, judge=judge),
        advantage=_advantage(config, task),
        metrics=(
            partial(
                first_errors.judge_metrics, scorer=task, step_scorer=judge, scope=scope, unit=unit
            ),
        ),
    )
    return _offline(judged) if config.offline else judged


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set; offline from the stored log-probs."""
    if not config.offline:
        return clipped_objective(config)
    # The ratio is to the policy that sampled: there is no other to correct for.
    online = clipped_objective(config, log_ratio=ratios.behaviour_log_ratio)
    return replace(online, gates=())


def _offline(pipeline: Pipeline) -> Pipeline:
    """Stored answers in place of sampled ones; scorers are asked for what is not stored."""
    return replace(
        pipeline,
        plan=stored.stored_answers,
        spans=partial(stored.unjudged_only, spans=pipeline.spans),
    )


def _rewards(
    config: Config, answers: Mapping[str, float], *, task: str, judge: str
) -> tuple[Reward, ...]:
    """The task's outcome with its wrong answers shaped, and the other scorers as ever."""
    weight = answers[task]
    if weight == 0:
        raise ValueError(
            f"scorer {task!r} says which answers are right, but its weight is 0, so reasoning "
            "would not be rewarded: give it a weight, or name another one as outcome_scorer"
        )
    others = {scorer: weight for scorer, weight in answers.items() if scorer != task}
    stepwise = partial(
        first_errors.stepwise_outcome,
        scorer=task,
        weight=weight,
        step_scorer=judge,
        scope=config.scope,
        unit=config.unit,
        truncated_length=config.truncated_length,
        max_unjudged=config.max_unjudged,
        shaping=config.shaping,
        slope=config.slope,
        threshold=config.threshold,
    )
    terms: tuple[Reward, ...] = (stepwise, *(outcome_terms(others) if any(others.values()) else ()))
    return terms + length_terms(config, answers)


def _advantage(config: Config, task: str) -> Advantage:
    ddof, eps, scale = config.std_ddof, config.std_eps, config.all_wrong_scale
    if scale == 1:
        return partial(advantage.standardized, ddof=ddof, eps=eps)
    return partial(
        first_errors.standardized_all_wrong_scaled, ddof=ddof, eps=eps, scorer=task, scale=scale
    )
