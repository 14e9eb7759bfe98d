"""SRPO: which prompts are left out, what is remembered, and cut-off answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.history import PromptHistory, other_domain_first, solved_last_time
from grpo.pipeline import RewardedGroup
from grpo.types import Prompt, StepReport
from orchestration.checkpoint import decoded_state, encoded_state
from orchestration.group_task import DroppedGroup
from tests.unit.family_cases import advantages_of, differing_points, halves, points
from tests.unit.grpo_groups import rollout, scored
from tests.unit.scripted_groups import ScriptedEngine, TextScorer, a_question, grown_group

REPORT = StepReport(metrics={}, timings_s={})


def a_prompt(name: str, domain: str = "default") -> Prompt:
    return Prompt(id=name, text=name, tokens=np.zeros(1, np.int32), domain=domain)


def step_of(**outcomes: list[float | None]) -> list[RewardedGroup]:
    """One group per prompt with these outcomes."""
    groups = []
    for name, values in outcomes.items():
        group = scored([rollout(i, 2) for i in range(len(values))], answer=values)
        components = np.zeros((len(values), 1))
        groups.append(
            RewardedGroup(group=replace(group, prompt=a_prompt(name)), components=components)
        )
    return groups


def after(*steps: list[RewardedGroup], **settings: object) -> PromptHistory:
    pipeline, _ = halves("srpo", **settings)
    state = pipeline.initial_state
    for step in steps:
        state = pipeline.adapt(state, step, REPORT)
        assert decoded_state(pipeline.initial_state, encoded_state(state)) == state
    assert isinstance(state, PromptHistory)
    return state


def skipped(state: PromptHistory, names: str) -> list[str]:
    return [name for name in names if solved_last_time(a_prompt(name), state) is not None]


def test_solved_prompts_are_left_out_and_mixed_and_failed_ones_stay() -> None:
    state = after(step_of(a=[1, 1, 1, 1], b=[1, 0, 1, 1], c=[0, 0, 0, 0]))
    assert skipped(state, "abcd") == ["a"]
    assert state.num_steps == 1


def test_only_the_last_time_counts() -> None:
    state = after(step_of(a=[1, 1], b=[1, 0]), step_of(a=[1, 0], b=[1, 1]))
    assert skipped(state, "ab") == ["b"]


def test_if_everything_is_solved_nothing_is_left_out() -> None:
    assert skipped(after(step_of(a=[1, 1], b=[1, 1])), "ab") == []


def test_answers_that_nobody_judged_say_nothing() -> None:
    state = after(step_of(a=[1, None], b=[None, None], c=[0, 0]))
    assert skipped(state, "abc") == ["a"]
    assert "b" not in state.all_right


def test_a_skipped_prompt_is_not_sampled_and_counts_as_planned() -> None:
    pipeline, _ = halves("srpo", num_generations=2)
    engine = ScriptedEngine(lambda context, given, place: "x")
    outcome = grown_group(
        pipeline,
        engine,
        [TextScorer("answer", len)],
        prompt=a_question("a"),
        state=PromptHistory(all_right={"a": True, "b": False}),
    )
    assert isinstance(outcome, DroppedGroup)
    assert (outcome.dropped.reason, outcome.dropped.is_planned) == ("solved_last_time", True)
    assert engine.asked == []


def test_one_domain_can_come_first() -> None:
    settings = {"first_domains": ("maths",), "first_steps": 2, "skip_solved": False}
    pipeline, _ = halves("srpo", **settings)
    (skip,) = pipeline.skip
    code, maths = a_prompt("x", "code"), a_prompt("y", "maths")
    assert skip(maths, PromptHistory()) is None
    assert skip(code, PromptHistory(num_steps=1)) == "domain_of_a_later_stage"
    assert skip(code, PromptHistory(num_steps=2)) is None
    assert other_domain_first(code, PromptHistory(), domains=(), num_steps=0) is None


def test_a_cut_off_answer_has_no_advantage_but_counts_in_the_statistics() -> None:
    pipeline, _ = halves("srpo", std_eps=0.0)
    rollouts = [rollout(i, 2, truncated=i in (1, 3)) for i in range(4)]
    found = advantages_of(pipeline, [scored(rollouts, answer=[1, 1, 0, 0])], PromptHistory())
    np.testing.assert_allclose(found, [0.866025, 0, -0.866025, 0], atol=1e-6)


def test_metrics_count_what_is_known() -> None:
    pipeline, _ = halves("srpo")
    (metrics,) = pipeline.metrics
    assert metrics([], PromptHistory()) == {"history/num_prompts": 0.0}
    state = PromptHistory(all_right={"a": True, "b": False})
    assert metrics([], state) == {"history/num_prompts": 2.0, "history/frac_solved": 0.5}


def test_switched_off_it_is_grpo_with_a_token_mean() -> None:
    neutral = {"skip_solved": False, "truncated_advantage": True, "num_generations": 8}
    assert differing_points(points("srpo", **neutral), points("grpo")) == {"aggregation"}


def test_half_a_stage_is_refused() -> None:
    with pytest.raises(ValidationError, match="set both or neither"):
        halves("srpo", first_steps=3)
