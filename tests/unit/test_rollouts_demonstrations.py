"""LUFFY: a known solution among the answers, its statistics, its shaping and its mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo.batch import build_batch
from grpo.demonstrations import whole_solution
from grpo.types import FinishReason, Origin
from orchestration.group_task import FinishedGroup
from tests.fakes import FakeTokenizer
from tests.unit.family_cases import advantages_of, halves, loss_and_gradient, points, rows_of
from tests.unit.grpo_groups import flat, loss_inputs, random_groups, rollout, scored
from tests.unit.scripted_groups import ScriptedEngine, TextScorer, a_question, grown_group

# The learner's gates see given tokens as certain; `loss_inputs` does not know which are given.
NEVER = {"entropy_coef": 0.0, "importance_cap": None}
PAPER = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # the first is the demonstration


def brought(solution: str, *, max_tokens: int = 96, **settings: object):
    settings = {"num_generations": 3, "end_token": 2, **settings}
    pipeline, _ = halves("luffy", length=max_tokens, **settings)
    engine = ScriptedEngine(lambda context, given, place: f"own{place}")
    outcome = grown_group(
        pipeline,
        engine,
        [TextScorer("answer", lambda text: float(text.startswith("ri")))],
        prompt=a_question(solution_tokens=FakeTokenizer().encode_text(solution)),
        max_tokens=max_tokens,
    )
    assert isinstance(outcome, FinishedGroup)
    return pipeline, outcome.group


def demonstrated_group(rewards: list[float]):
    rollouts = [rollout(i, 2, guidance=2 if i == 0 else 0) for i in range(len(rewards))]
    return scored(rollouts, answer=list(rewards))


def test_the_first_answer_is_the_solution_with_its_end_and_the_others_are_own() -> None:
    _, group = brought("right")
    assert [answer.text for answer in group.rollouts] == ["right", "own1", "own2"]
    first = group.rollouts[0]
    assert first.tokens.tolist() == [*map(ord, "right"), 2]
    assert set(first.origins.tolist()) == {Origin.GUIDANCE}
    assert first.finish_reason is FinishReason.STOP


def test_the_policy_ends_a_solution_without_an_end_token() -> None:
    _, group = brought("right", end_token=None)
    assert group.rollouts[0].text == "rightown0"
    assert group.rollouts[0].origins.tolist() == [Origin.GUIDANCE] * 5 + [Origin.POLICY] * 5


@pytest.mark.parametrize(
    ("solution", "end_token", "max_tokens", "is_given"),
    [
        ("right", 2, 6, True),
        ("right", 2, 5, False),
        ("", 2, 9, False),
        # Without an end token the policy still needs one token to end it.
        ("right", None, 6, True),
        ("right", None, 5, False),
    ],
)
def test_a_solution_that_is_missing_or_does_not_fit_is_not_given(
    solution: str, end_token: int | None, max_tokens: int, is_given: bool
) -> None:
    _, group = brought(solution, max_tokens=max_tokens, end_token=end_token)
    assert len(group.rollouts) == 3
    assert group.rollouts[0].text.startswith("right") is is_given


def test_an_end_that_is_there_is_not_doubled() -> None:
    solution = np.array([5, 2], np.int32)
    assert whole_solution(solution, end_token=2).tolist() == [5, 2]
    assert whole_solution(solution, end_token=9).tolist() == [5, 2, 9]


def test_advantages_are_centred_over_all_answers_or_over_the_own_ones() -> None:
    pipeline, _ = halves("luffy")
    np.testing.assert_allclose(
        advantages_of(pipeline, [demonstrated_group(PAPER)]),
        np.where(np.array(PAPER) > 0, 0.75, -0.25),
    )
    split, _ = halves("luffy", statistics="own")
    found = advantages_of(split, [demonstrated_group(PAPER)])
    np.testing.assert_allclose(found, np.where(np.array(PAPER) > 0, 0.857143, -0.142857), atol=1e-6)


@pytest.mark.parametrize("statistics", ["all", "own"])
def test_a_group_in_which_all_are_right_teaches_nothing(statistics: str) -> None:
    pipeline, _ = halves("luffy", statistics=statistics)
    assert not advantages_of(pipeline, [demonstrated_group([1.0] * 4)]).any()


def test_the_shaped_probability_on_worked_cases() -> None:
    pipeline, objective = halves("luffy", num_generations=4, **NEVER)
    p = np.array([0.01, 0.1, 0.5, 1.0])
    group = scored([rollout(i, 1, guidance=1) for i in range(4)], answer=[1.0, 0, 0, 0])
    rows = [replace(row, advantages=np.ones(1, np.float32)) for row in rows_of(pipeline, [group])]
    rows = [replace(row, weights=np.ones(1, np.float32)) for row in rows]
    now = torch.tensor(np.log(p), requires_grad=True)
    loss, gradient = loss_and_gradient(
        objective, loss_inputs(rows, log_probs=now, proximal=now.detach().numpy())
    )
    assert loss == pytest.approx(-(0.090909 + 0.5 + 0.833333 + 0.909091), abs=1e-6)
    np.testing.assert_allclose(gradient, [-0.082645, -0.25, -0.138889, -0.082645], atol=1e-6)


def test_the_loss_of_a_demonstration_and_an_own_answer_on_the_worked_case() -> None:
    # Sum over tokens / max_tokens / 2 rows; the released code does not divide by the rows of a
    # micro-batch: 0.220833. A token mean would be 0.126190.
    pipeline, objective = halves("luffy", length=4, num_generations=2, **NEVER)
    group = scored([rollout(0, 3, guidance=3), rollout(1, 4)], answer=[1.0, 0.0])
    proximal = flat([np.log([0.1, 0.5, 0.9]), [-1.0] * 4])
    ratios = np.log([1.0, 1.0, 1.0, 1.2, 0.8, 1.0, 1.0])
    now = torch.tensor(proximal + ratios, requires_grad=True)
    loss, gradient = loss_and_gradient(
        objective, loss_inputs(rows_of(pipeline, [group]), log_probs=now, proximal=proximal)
    )
    assert 2 * loss == pytest.approx(0.220833, abs=1e-6)
    # Own tokens: 0.5 * ratio / (4 * 2), not clipped.
    np.testing.assert_allclose(gradient[3:], np.array([1.2, 0.8, 1, 1]) * 0.5 / 8, atol=1e-6)


@pytest.mark.parametrize(("clip", "slope"), [(True, 0.0), (False, -1.5 * 0.5 / (2 * 96))])
def test_own_answers_are_clipped_on_request(clip: bool, slope: float) -> None:
    pipeline, objective = halves("luffy", clip=clip, num_generations=2, **NEVER)
    rows = rows_of(pipeline, [scored([rollout(0, 1), rollout(1, 1)], answer=[1.0, 0.0])])
    now = torch.tensor([-1.0 + np.log(1.5), -1.0], requires_grad=True, dtype=torch.float64)
    _, gradient = loss_and_gradient(
        objective, loss_inputs(rows, log_probs=now, proximal=np.array([-1.0, -1.0]))
    )
    assert gradient[0] == pytest.approx(slope, rel=1e-6)


def test_without_demonstrations_and_with_clipping_it_is_dr_grpo() -> None:
    assert points("luffy", num_demonstrations=0, clip=True, **NEVER) == points(
        "dr_grpo", importance_cap=None
    )
    groups = random_groups(5, num_groups=2, num_generations=8)
    (ours, _), (theirs, _) = halves("luffy", num_demonstrations=0), halves("dr_grpo")
    for one, other in zip(rows_of(ours, groups), rows_of(theirs, groups), strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
        np.testing.assert_array_equal(one.advantages, other.advantages)


def test_metrics_tell_given_and_own_answers_apart() -> None:
    pipeline, _ = halves("luffy")
    built = build_batch(
        pipeline, [demonstrated_group(PAPER)], None, step=1, version=0, num_updates=1
    )
    assert built.metrics["demonstrations/outcome_given"] == 1.0
    assert built.metrics["demonstrations/outcome_own"] == pytest.approx(1 / 7)
    assert built.metrics["demonstrations/frac_rollouts"] == 1 / 8


def test_some_answers_must_be_the_policys_own() -> None:
    with pytest.raises(ValidationError, match="no answer would be the policy's own"):
        halves("luffy", num_generations=2, num_demonstrations=2)
