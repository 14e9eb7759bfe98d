"""Guide-GRPO: who gets a hint, what is trained of it and with which ratio."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo.hints import hint_metrics, ratio_scale
from grpo.pipeline import RewardedGroup
from grpo.types import Group
from orchestration.group_task import DroppedGroup, FinishedGroup
from tests.unit.family_cases import halves, loss_and_gradient, points, rows_of
from tests.unit.grpo_groups import flat, loss_inputs, rollout, scored
from tests.unit.scripted_groups import ScriptedEngine, TextScorer, a_question, grown_group

HINTED = a_question("7", columns={"hint": "add"})
SETTINGS = {"num_generations": 4, "template": "{prompt}?{hint}"}


def is_right(text: str) -> float:
    return float(text == "yes")


def brought(plain: list[str], hinted: list[str], *, prompt=HINTED, **settings: object):
    pipeline, _ = halves("guide", **{**SETTINGS, **settings})
    engine = ScriptedEngine(lambda context, given, place: [*plain, *hinted][place])
    outcome = grown_group(pipeline, engine, [TextScorer("answer", is_right)], prompt=prompt)
    return outcome, engine


def cross_group(ratios: list[float], rewards: list[float]) -> Group:
    """One token an answer, sampled with a hint; measured so that its ratio is as given."""
    rollouts = [
        replace(
            rollout(i, 1, log_probs=[-1.0]),
            train_context=np.array([1], np.int32),
            measured={"log_probs_now": np.array([-1.0 + np.log(ratio)], np.float64)},
        )
        for i, ratio in enumerate(ratios)
    ]
    return scored(rollouts, answer=list(rewards))


def test_a_mixed_group_gets_no_hint() -> None:
    outcome, engine = brought(["yes", "no", "no", "no"], [])
    assert isinstance(outcome, FinishedGroup)
    assert len(engine.asked) == 4
    assert all(rollout.train_context is None for rollout in outcome.group.rollouts)


def test_a_failed_group_is_replaced_by_hinted_answers_trained_after_the_plain_prompt() -> None:
    outcome, _ = brought(["no"] * 4, ["yes", "no", "no", "no"])
    assert isinstance(outcome, FinishedGroup)
    group = outcome.group
    assert [rollout.index for rollout in group.rollouts] == [0, 1, 2, 3]
    for answer in group.rollouts:
        assert "".join(map(chr, answer.context[1:])) == "7?add"
        np.testing.assert_array_equal(answer.train_context, group.prompt.tokens)
    measured = {"log_probs_now": np.zeros(4, np.float32)}
    group = replace(
        group,
        rollouts=tuple(
            replace(r, measured={k: v[: r.num_tokens] for k, v in measured.items()})
            for r in group.rollouts
        ),
    )
    pipeline, _ = halves("guide", **SETTINGS)
    rows = rows_of(pipeline, [group])
    assert all(row.is_cross_context for row in rows)
    np.testing.assert_array_equal(rows[0].context, group.prompt.tokens)
    found = [float(row.advantages[0]) for row in rows]
    np.testing.assert_allclose(found, [1.499997] + [-0.499999] * 3, atol=1e-6)


def test_pooled_hinted_answers_are_compared_with_the_failed_ones() -> None:
    outcome, _ = brought(["no"] * 4, ["yes", "no", "no", "no"], grouping="pool", gamma=0.5)
    assert isinstance(outcome, FinishedGroup)
    pipeline, _ = halves("guide", **SETTINGS, grouping="pool", gamma=0.5)
    found = [float(row.advantages[0]) for row in rows_of(pipeline, [outcome.group])]
    expected = [-0.353552] * 4 + [2.474867] + [-0.353552] * 3
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("plain", "hinted", "reason", "num_asked"),
    [
        (["yes"] * 4, [], "all_right", 4),
        (["no"] * 4, ["yes"] * 4, "all_right", 8),
        (["no"] * 4, ["no"] * 4, "failed_with_hint", 8),
    ],
)
def test_groups_without_both_kinds_of_answers_are_dropped(
    plain: list[str], hinted: list[str], reason: str, num_asked: int
) -> None:
    outcome, engine = brought(plain, hinted)
    assert isinstance(outcome, DroppedGroup)
    assert outcome.dropped.reason == reason
    assert len(engine.asked) == num_asked


@pytest.mark.parametrize("columns", [{}, {"hint": None}, {"hint": " "}])
def test_without_a_hint_there_is_no_second_try(columns: dict[str, object]) -> None:
    outcome, engine = brought(["no"] * 4, [], prompt=a_question("7", columns=columns))
    assert isinstance(outcome, DroppedGroup)
    assert outcome.dropped.reason == "failed_without_hint"
    assert len(engine.asked) == 4


def test_gamma_is_the_90th_percentile_of_the_groups_hinted_ratios() -> None:
    group = cross_group([0.2, 1.0, 0.5, 0.25], [1, 0, 0, 0])
    assert ratio_scale(group) == pytest.approx(0.85)
    assert ratio_scale(cross_group([1e-9, 1e-9], [1, 0])) == 1e-4
    assert ratio_scale(scored([rollout(0, 2)], answer=[1.0])) == 1.0


@pytest.mark.parametrize("gamma", ["p90", 0.85])
def test_hinted_tokens_have_the_shaped_ratio_across_contexts_and_no_clipping(gamma) -> None:
    ratios = [0.2, 1.0, 0.5, 0.25]
    pipeline, objective = halves("guide", gamma=gamma, num_generations=4)
    rows = rows_of(pipeline, [cross_group(ratios, [1, 0, 0, 0])])
    rows = [replace(row, advantages=np.ones(1, np.float32)) for row in rows]
    now = torch.tensor(-1.0 + np.log(ratios), requires_grad=True)
    # The policy at the start of the step plays no part: its ratio would be 1 everywhere.
    inputs = loss_inputs(rows, log_probs=now, proximal=now.detach().numpy())
    loss, gradient = loss_and_gradient(objective, inputs)
    shaped = [0.190476, 0.540541, 0.37037, 0.227273]
    slopes = [0.154195, 0.248356, 0.233196, 0.17562]
    assert loss == pytest.approx(-np.mean(shaped), abs=1e-6)
    np.testing.assert_allclose(gradient, -np.array(slopes) / 4, atol=1e-6)


@pytest.mark.parametrize("gamma", ["p90", 0.2])
def test_plain_tokens_beside_hinted_ones_keep_the_clipped_ratio(gamma) -> None:
    pipeline, objective = halves("guide", gamma=gamma, grouping="pool", num_generations=2)
    group = cross_group([0.2, 0.2], [1, 0])
    plain = scored([*group.rollouts, rollout(2, 1)], answer=[1.0, 0.0, 0.0])
    rows = [replace(row, advantages=np.ones(1, np.float32)) for row in rows_of(pipeline, [plain])]
    proximal = flat([[-1.0], [-1.0], [-1.0]])
    now = torch.tensor(proximal + np.log([0.2, 0.2, 1.5]), requires_grad=True)
    loss, gradient = loss_and_gradient(
        objective, loss_inputs(rows, log_probs=now, proximal=proximal)
    )
    assert loss == pytest.approx(-(0.5 * 2 + 1.2) / 3, abs=1e-6)
    assert gradient[2] == 0.0


def test_without_a_column_it_is_dapo_without_its_length_rules() -> None:
    neutral = points("guide", hint_column=None)
    base = points("grpo", std_eps=1e-6)
    assert {p for p in base if base[p] != neutral[p]} == {"select", "aggregation"}


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0.0},
        {"gamma": "p50"},
        {"min_accuracy": 0.5, "max_accuracy": 0.5},
        {"template": "{prompt}"},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        halves("guide", **settings)


def test_metrics_say_how_often_a_hint_was_needed_and_what_it_brought() -> None:
    groups = [
        cross_group([0.2, 1.0, 0.5, 0.25], [1, 0, 0, None]),
        cross_group([0.5], [0]),
        cross_group([0.55], [None]),
        scored([rollout(0, 2), rollout(1, 3)], answer=[1.0, 0.0]),
    ]
    items = [
        RewardedGroup(group=group, components=np.zeros((len(group.rollouts), 1)))
        for group in groups
    ]
    found = hint_metrics(items, None, scorer="answer", is_scaled=True)
    assert found == {
        "hints/frac_groups": 0.75,
        "hints/outcome_hinted": pytest.approx(1 / 6),  # 1/3 and 0; the third was not judged
        "hints/outcome_plain": 0.5,
        "hints/ratio_mean": pytest.approx(3 / 6),
        "hints/ratio_scale": pytest.approx((0.85 + 0.5 + 0.55) / 3),
    }
    assert set(hint_metrics(items[2:3], None, scorer="answer", is_scaled=False)) == {
        "hints/frac_groups"
    }
    assert hint_metrics(items[3:], None, scorer="answer", is_scaled=True) == {
        "hints/frac_groups": 0.0,
        "hints/outcome_plain": 0.5,
    }


def test_a_pooled_group_tells_what_the_hinted_answers_alone_earned() -> None:
    hinted = cross_group([0.5, 0.5], [1, 0])
    pooled = scored([*hinted.rollouts, rollout(2, 1)], answer=[1.0, 0.0, 0.0])
    item = RewardedGroup(group=pooled, components=np.zeros((3, 1)))
    found = hint_metrics([item], None, scorer="answer", is_scaled=False)
    assert found == {"hints/frac_groups": 1.0, "hints/outcome_hinted": 0.5}
