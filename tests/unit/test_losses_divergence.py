"""TW-GRPO: the disagreement of a group by position, the weights made of it, and part marks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo import divergence
from grpo.divergence import divergence_weight, position_divergence
from grpo.errors import UserError
from grpo.option_sets import option_share, share_of
from tests.unit.family_cases import (
    differing_points,
    halves,
    loss_and_gradient,
    points,
    row_inputs,
    rows_of,
)
from tests.unit.grpo_groups import flat, loss_inputs, rollout, scored
from tests.unit.output_layers import LinearLayer, TabledLayer, random_rows
from tests.unit.scored_groups import written_group

P0 = [[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.6, 0.2, 0.2]]
P1 = [[0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]


def toy(layer, *, second=P1):
    return [layer.row(range(len(p)), p) for p in (P0, second)]


def measured(*streams):
    """A group whose rollouts carry these divergences."""
    rollouts = [
        replace(rollout(i, len(s)), measured={"divergence": np.array(s, np.float32)})
        for i, s in enumerate(streams)
    ]
    return scored(rollouts, answer=[float(i) for i in range(len(streams))])


@pytest.mark.parametrize("chunk_tokens", [2, 4, 100])
@pytest.mark.parametrize(
    ("mode", "second", "expected", "weights"),
    [
        ("code", P1, [0, 0.213594, 0.739529], [1, 1.202177, 1.7]),
        ("kl", P1, [0, 0.066414, 0.203928], [1, 1.227973, 1.7]),
        # the second answer has ended: its third distribution counts as uniform
        ("code", P1[:2], [0, 0.213594, 0.109090], [1, 1.7, 1.357512]),
        ("code", P0, [0, 0, 0], [1, 1, 1]),
        ("kl", P0, [0, 0, 0], [1, 1, 1]),
    ],
)
def test_divergence_and_weights_are_those_worked_by_hand(
    mode, second, expected, weights, chunk_tokens
):
    layer = TabledLayer(chunk_tokens=chunk_tokens)
    found = position_divergence(toy(layer, second=second), layer, mode=mode, ended="uniform")
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[: len(second)], atol=1e-6)
    group = measured(*[stream.tolist() for stream in found])
    factors = divergence_weight(group, None, alpha=1.7)
    np.testing.assert_allclose(factors[0], weights, atol=1e-6)
    np.testing.assert_allclose(factors[1], weights[: len(second)], atol=1e-6)


@pytest.mark.parametrize("mode", ["code", "kl"])
def test_an_answer_that_has_ended_can_be_left_out(mode):
    layer = TabledLayer()
    whole = position_divergence(toy(layer), layer, mode=mode, ended="excluded")
    cut = position_divergence(toy(layer, second=P1[:2]), layer, mode=mode, ended="excluded")
    np.testing.assert_allclose(cut[0][:2], whole[0][:2], atol=1e-9)
    assert cut[0][2] == pytest.approx(0.0, abs=1e-9)  # alone it disagrees with nobody


def test_a_group_of_one_agrees_with_itself():
    rows = random_rows(0, lengths=[5], labels=[1], vocabulary=6, size=3)
    layer = LinearLayer(weight=torch.randn(3, 6, dtype=torch.float64))
    (found,) = position_divergence(rows, layer, mode="code", ended="uniform")
    assert found.tolist() == [0.0] * 5
    assert divergence_weight(measured(found.tolist()), None, alpha=1.7)[0].tolist() == [1.0] * 5


@pytest.mark.parametrize("mode", ["code", "kl"])
@pytest.mark.parametrize("ended", ["uniform", "excluded"])
def test_streaming_over_positions_and_the_order_of_answers_change_nothing(mode, ended):
    rows = random_rows(1, lengths=[5, 9, 2, 9], labels=[1, 0, 0, 1], vocabulary=7, size=4)
    weight = torch.randn(4, 7, dtype=torch.float64)
    wide, narrow = (LinearLayer(weight=weight, chunk_tokens=n) for n in (100, 1))
    found = position_divergence(rows, wide, mode=mode, ended=ended)
    others = [
        position_divergence(rows, narrow, mode=mode, ended=ended),
        position_divergence(rows[::-1], wide, mode=mode, ended=ended)[::-1],
    ]
    for other in others:
        for left, right in zip(found, other, strict=True):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)
    for stream in found:  # one value per position
        torch.testing.assert_close(stream, found[1][: len(stream)])


def test_a_large_vocabulary_of_equal_answers_is_no_disagreement():
    torch.manual_seed(0)
    weight = torch.randn(8, 5000)
    rows = [
        replace(row, hidden=torch.ones(3, 8))
        for row in random_rows(0, lengths=[3, 3, 3], labels=[1, 0, 0], vocabulary=9, size=8)
    ]
    found = position_divergence(rows, LinearLayer(weight=weight), mode="code", ended="uniform")
    assert max(float(stream.max()) for stream in found) < 1e-6


def test_the_loss_is_the_one_worked_by_hand():
    # token losses -1 (first answer) and 0.5 (second, which ends after two): -0.541502
    pipeline, objective = halves("tw_grpo", num_generations=2, importance_cap=None)
    group = measured([0, 0.213594, 0.109090], [0, 0.213594])
    rows = [
        replace(row, advantages=np.full(len(row.tokens), a, np.float32))
        for row, a in zip(rows_of(pipeline, [group]), [1.0, -0.5], strict=True)
    ]
    behaviour = flat([row.behaviour_log_probs for row in rows])
    log_probs = torch.tensor(behaviour, requires_grad=True)
    loss, _ = loss_and_gradient(
        objective, loss_inputs(rows, log_probs=log_probs, proximal=behaviour)
    )
    assert loss == pytest.approx(-0.541502, abs=1e-6)


def test_no_weights_are_grpo_with_a_token_mean():
    assert differing_points(points("tw_grpo", alpha=1.0), points("grpo")) == {"aggregation"}
    pipeline, objective = halves("tw_grpo", alpha=1.0)
    assert pipeline.measures == objective.measures == ()


def test_the_weights_carry_no_gradient():
    pipeline, objective = halves("tw_grpo", num_generations=2)
    rows = rows_of(pipeline, [measured([0.0, 1.0], [0.0, 1.0, 0.5])])
    weighed = loss_and_gradient(objective, row_inputs(objective, rows))[1]
    plain = [replace(row, policy_weights=np.ones_like(row.policy_weights)) for row in rows]
    unweighed = loss_and_gradient(objective, row_inputs(objective, plain))[1]
    factors = flat([row.policy_weights for row in rows])
    np.testing.assert_allclose(weighed, factors * unweighed, rtol=1e-12)


@pytest.mark.parametrize(
    ("stated", "share"),
    [("A", 1 / 3), ("A,C", 2 / 3), ("A,C,D", 1), ("d, c ,a", 1), ("A,B", 0), ("", 0), (" , ", 0)],
)
def test_naming_some_of_the_right_options_earns_a_part(stated, share):
    assert share_of(stated, "A,C,D") == pytest.approx(share)


def test_options_are_read_between_the_marks_of_the_last_answer():
    texts = ["so <answer>A</answer>", "<answer>B</answer> no, <answer>A, C</answer>.", "A,C,D"]
    group = written_group(texts, reference="A,C,D")
    marks = {"opening": "<answer>", "closing": "</answer>"}
    found = option_share(group, None, coefficient=3.0, column=None, **marks)
    np.testing.assert_allclose(found, [1, 2, 0])
    other = written_group(texts, columns={"options": "A"})
    found = option_share(other, None, coefficient=1.0, column="options", **marks)
    np.testing.assert_allclose(found, [1, 0, 0])


def test_a_prompt_without_right_options_is_the_users_mistake():
    group = written_group(["A"], reference=None)
    with pytest.raises(UserError, match="option_column"):
        option_share(group, None, coefficient=1.0, column=None, opening="x", closing=None)


def test_part_marks_are_one_more_reward():
    rewards = points("tw_grpo", option_coef=1.0)["rewards"]
    assert any(text.startswith("option_share(coefficient=1") for text in rewards)
    assert not any("option_share" in text for text in points("tw_grpo")["rewards"])


def test_the_measure_is_named_as_the_pipeline_asks_for_it():
    pipeline, objective = halves("tw_grpo", divergence="kl")
    assert [m.name for m in pipeline.measures] == [m.name for m in objective.measures]
    assert objective.measures[0].name == divergence.NAME


def test_the_weights_begin_at_one_where_the_disagreement_is_least():
    # 0.3 lies 1/5 of the way from 0.2 to 0.7
    found = divergence_weight(measured([0.2, 0.3], [0.2, 0.3, 0.7]), None, alpha=1.7)
    np.testing.assert_allclose(found[0], [1.0, 1.14], atol=1e-6)
    np.testing.assert_allclose(found[1], [1.0, 1.14, 1.7], atol=1e-6)
