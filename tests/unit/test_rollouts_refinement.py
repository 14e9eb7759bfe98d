"""iGRPO: drafts, the best of them, refinements of it, and what of all that is trained."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.aggregation import of_trained_rows, sequence_mean
from grpo.algorithms import grpo
from grpo.algorithms.igrpo import Config
from grpo.refinement import best_draft
from grpo.templates import filled
from orchestration.group_task import FinishedGroup
from tests.unit.family_cases import halves, points, rows_of
from tests.unit.grpo_groups import random_groups
from tests.unit.scripted_groups import ScriptedEngine, TextScorer, a_question, grown_group

TEMPLATE = "{prompt}|{draft}"


def worth(text: str) -> float:
    """The number of plus signs."""
    return float(text.count("+"))


def refined(drafts: list[str], refinements: list[str], **settings: object):
    """A finished group and the requests that made it."""
    settings = {"num_drafts": len(drafts), "num_generations": len(refinements), **settings}
    pipeline, _ = halves("igrpo", template=TEMPLATE, **settings)
    engine = ScriptedEngine(lambda context, given, place: [*drafts, *refinements][place])
    outcome = grown_group(
        pipeline, engine, [TextScorer("answer", worth)], prompt=a_question("7{b}")
    )
    assert isinstance(outcome, FinishedGroup)
    return pipeline, outcome.group, engine


def test_refinements_see_the_prompt_and_the_first_best_draft() -> None:
    # Rewards 0, 1, 2, 2: the draft at place 2.
    _, group, engine = refined(["a", "b+", "c++ ", "d++"], ["r"] * 3)
    contexts = ["".join(map(chr, request.context[1:])) for request in engine.asked]
    assert contexts == ["7{b}"] * 4 + ["7{b}|c++"] * 3
    assert [rollout.train_context for rollout in group.rollouts] == [None] * 7


def test_a_draft_is_shown_even_if_all_have_failed_and_may_be_cut() -> None:
    _, _, engine = refined(["abc", "def"], ["r"] * 2, max_draft_chars=2)
    assert "".join(map(chr, engine.asked[-1].context[1:])) == "7{b}|ab"


def test_only_refinements_are_trained_and_compared_with_each_other() -> None:
    pipeline, group, _ = refined(["++++", "+"], ["++", "+", "++", ""], std_eps=1e-6, num_drafts=2)
    rows = rows_of(pipeline, [group])
    assert [bool(row.weights.any()) for row in rows] == [False] * 2 + [True] * 4
    # Rewards 2, 1, 2, 0: mean 1.25, sample deviation 0.957427.
    found = [float(row.advantages[0]) for row in rows]
    np.testing.assert_allclose(found, [0, 0, 0.783349, -0.261116, 0.783349, -1.305581], atol=1e-6)
    for row in rows[2:]:
        np.testing.assert_allclose(row.weights.sum(), 1 / 4, rtol=1e-6)


def test_metrics_say_what_refining_brought() -> None:
    pipeline, group, _ = refined(["", "+", "++"], ["++", "+++"])
    from grpo.batch import build_batch

    metrics = build_batch(pipeline, [group], None, step=1, version=0, num_updates=1).metrics
    assert metrics["drafts/reward"] == 1.0
    assert metrics["drafts/best_reward"] == 2.0
    assert metrics["refinements/reward"] == 2.5
    assert metrics["refinements/improvement"] == 0.5
    assert metrics["refinements/frac_copied"] == 0.5


@pytest.mark.parametrize(("p", "count", "expected"), [(0.1, 4, 0.3439), (0.3, 8, 0.942352)])
def test_the_best_draft_is_right_unless_all_are_wrong(
    p: float, count: int, expected: float
) -> None:
    # The exact expectation over all outcomes: 1 - (1 - p)^N.
    total = 0.0
    for case in range(2**count):
        rewards = np.array([case >> place & 1 for place in range(count)], np.float64)
        chance = float(np.prod(np.where(rewards > 0, p, 1 - p)))
        total += chance * rewards[best_draft(rewards)]
    assert total == pytest.approx(expected, abs=1e-6)


def test_the_best_draft_has_a_reward_if_any_has() -> None:
    assert best_draft(np.array([np.nan, -1.0, np.nan])) == 1
    assert best_draft(np.array([np.nan, np.nan])) == 0


def test_without_drafts_it_is_grpo() -> None:
    settings = {"num_generations": 8}
    assert points("igrpo", num_drafts=0, **settings) == points("grpo", **settings)
    groups = random_groups(3, num_groups=2, num_generations=8)
    base = grpo.pipeline(grpo.Config(), outcomes={"answer": 1.0}, max_completion_length=96)
    neutral, _ = halves("igrpo", num_drafts=0, **settings)
    for ours, theirs in zip(rows_of(neutral, groups), rows_of(base, groups), strict=True):
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(ours.advantages, theirs.advantages)


def test_a_mean_of_trained_rows_takes_no_notice_of_others() -> None:
    masks = [[np.ones(1, bool), np.zeros(5, bool)], [np.ones(3, bool)]]
    found = of_trained_rows(masks, aggregation=sequence_mean)
    assert [row.tolist() for group in found for row in group] == [[0.5], [0.0] * 5, [1 / 6] * 3]
    assert [len(group) for group in found] == [2, 1]


def test_a_template_is_filled_once_and_must_name_its_fields() -> None:
    assert filled("{a} then {b}", {"a": "{b}", "b": "2"}) == "{b} then 2"
    assert filled("{a} of {1}, {}", {"a": "x"}) == "x of {1}, {}"
    with pytest.raises(ValidationError, match=r"lacks \{draft\}"):
        Config(template="{prompt}!")
    with pytest.raises(ValidationError, match="put some text between"):
        Config(template="{prompt}{draft}")
