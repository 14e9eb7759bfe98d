"""`covey explain` on the worked numbers of the references, through the command line."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.unit.explained import LITERAL, column, explain, rollout, toy, written

close = pytest.approx


def flat(rows):
    return np.concatenate([np.asarray(row, float) for row in rows])


@pytest.mark.parametrize(
    ("algorithm", "settings", "options", "loss"),
    [
        ("grpo", LITERAL, {}, 0.058749),
        ("bnpo", LITERAL, {}, 0.266724),
        # Advantages of half the size: rewards are centred and not divided.
        ("dr_grpo", ("importance_cap=null",), {"max_completion_length": 4}, 0.166702 / 2),
        ("gspo", LITERAL, {}, 0.042341),
        ("reinforce_rej", ("importance_cap=null",), {}, 0.266724),
        ("lambda_grpo_length", LITERAL, {}, 0.26672383),
        ("lambda_grpo_length", (*LITERAL, "initial_exponent=1"), {}, 0.32230609),
    ],
)
def test_the_toy_group_has_its_published_loss(
    tmp_path: Path, capsys, algorithm, settings, options, loss
):
    found = explain(capsys, algorithm, written(tmp_path, toy()), *settings, **options)
    assert found["loss"] == close(loss, abs=1e-6)
    assert sum(flat(column(found, "token_loss"))) == close(found["loss"], abs=1e-12)
    assert found["groups"][0]["loss"] == close(found["loss"], abs=1e-12)


def test_every_intermediate_of_grpo_is_the_one_worked_by_hand(tmp_path: Path, capsys):
    found = explain(capsys, "grpo", written(tmp_path, toy()), *LITERAL)
    assert column(found, "rewards") == [{"answer": value} for value in [1, 0, 0, 1]]
    assert column(found, "advantage") == [1, -1, -1, 1]
    coefficients = [1 / 12] * 3 + [1 / 8] * 2 + [1 / 16] * 4 + [1 / 4]
    assert flat(column(found, "coefficients")) == close(np.array(coefficients))
    ratios = np.exp(flat(column(found, "log_ratios")))
    worked = [1.105171, 0.740818, 1, 1, 1.221403, 1.491825, 1, 0.606531, 1, 1]
    assert ratios == close(np.array(worked), abs=1e-6)
    surrogate = [-1.105171, -0.740818, -1, 1, 1.221403, 1.491825, 1, 0.8, 1, -1]
    assert flat(column(found, "surrogate")) == close(np.array(surrogate), abs=1e-6)
    assert column(found, "clipped_low")[2] == [False, False, True, False]
    # d(-A r c)/d log p = -A r c, and 0 where clipping holds.
    signs = np.repeat([1, -1, -1, 1], [3, 2, 4, 1])
    gradient = -signs * ratios * coefficients
    gradient[7] = 0
    assert flat(column(found, "gradient")) == close(gradient)


def test_the_gradient_is_that_of_the_loss_when_a_log_prob_is_moved(tmp_path: Path, capsys):
    settings = ("beta=0.3", "importance_cap=2")
    group, step = toy(), 1e-6
    found = explain(capsys, "grpo", written(tmp_path, group), *settings)
    group["rollouts"][1]["current_log_probs"] = [-0.7 + step, -0.1]
    moved = explain(capsys, "grpo", written(tmp_path, group), *settings)
    slope = (moved["loss"] - found["loss"]) / step
    assert slope == close(column(found, "gradient")[1][0], abs=1e-6)
    assert slope != 0


def test_corrections_and_penalties_are_shown_token_by_token(tmp_path: Path, capsys):
    file = written(tmp_path, toy())
    found = explain(capsys, "bnpo", file, "std_ddof=0", "std_eps=0", "beta=0.5")
    assert column(found, "gates") == [
        close([1, 2, 1]),
        close([1, 1]),
        close([1, 1, 0.67032, 1], abs=1e-6),
        close([1.491825], abs=1e-6),
    ]
    kl = np.mean(flat([penalties["kl"] for penalties in column(found, "penalties")]))
    assert kl == close(0.0216028, abs=1e-7)
    assert found["metrics"]["kl"] == close(kl)


def test_the_learnable_scalar_moves_by_its_own_gradient(tmp_path: Path, capsys):
    file = written(tmp_path, toy())
    settings = (*LITERAL, "exponent_learning_rate=0.1")
    found = explain(capsys, "lambda_grpo_length", file, *settings)
    assert found["learnable"] == {"value": 0, "next_value": close(-0.00523190, abs=1e-8)}
    later = written(tmp_path, {"groups": [toy()], "learnable": 1.0})
    found = explain(capsys, "lambda_grpo_length", later, *settings)
    assert found["learnable"] == {"value": 1, "next_value": close(0.99404504, abs=1e-8)}
    weights = [values[0] for values in column(found, "learner_weights")]
    assert weights == close([1.044487, 0.945677, 1.153622, 0.856214], abs=1e-6)


def test_disco_weighs_wrong_answers_by_their_likelihood(tmp_path: Path, capsys):
    settings = ("score=ratio", "tau=1", "constraint_coef=0", "importance_cap=null")
    found = explain(capsys, "disco", written(tmp_path, toy()), *settings)
    slopes = [
        values[0] / 4 for values in column(found, "learner_advantages")
    ]  # each row weighs 1/4
    assert slopes == close([0.5, -0.521515, -0.478485, 0.5], abs=1e-6)


def test_ws_grpo_on_the_published_preferences(tmp_path: Path, capsys):
    preferences = [
        [0.6, 0.55, 0.52],
        [0.7, 0.4, 0.45, 0.5, 0.3, 0.35, 0.4],
        [0.5, 0.5],
        [0.62, 0.58, 0.6, 0.61],
    ]
    scores, rollouts = [], []
    for place, steps in enumerate(preferences):
        lines = ["a step" + "\n" * (number + 1 < len(steps)) for number in range(len(steps))]
        rollouts.append({"token_texts": lines})
        odds = np.log(np.array(steps) / (1 - np.array(steps)))
        utilities = [0.0, *np.cumsum(odds).tolist()]
        scores += [
            {"scorer": "useful", "rollout": place, "end": end, "value": value}
            for end, value in enumerate(utilities)
        ]
    group = {"rollouts": rollouts, "outcomes": {"answer": [1, 1, 0, 0]}, "scores": scores}
    settings = ("preference_scorer=useful", "min_step_chars=1", "std_ddof=0", "std_eps=0")
    file = written(tmp_path, group)
    found = explain(capsys, "ws_grpo", file, *settings, "range_penalty=0")
    assert found["groups"][0]["unscored"] == []
    assert column(found, "reward") == close([5.556667, 5.442857, 0.5, 0.6025], abs=1e-6)
    worked = [1.022754, 0.976767, -1.020469, -0.979052]
    assert column(found, "advantage") == close(worked, abs=1e-6)
    found = explain(capsys, "ws_grpo", file, *settings, "range_penalty=0.5")
    assert column(found, "reward") == close([5.556667, 4.942857, 0, 0.6025], abs=1e-6)


def test_sgpo_on_the_published_first_errors(tmp_path: Path, capsys):
    rollouts, scores = [], []
    for place, (wrong, size) in enumerate([(1, 5), (3, 4), (4, 6), (8, 8)]):
        rollouts.append({"token_texts": ["x = 1\n"] * size})
        scores += [
            {
                "scorer": "steps",
                "rollout": place,
                "start": number,
                "end": number + 1,
                "value": float(number + 1 != wrong),
            }
            for number in range(size)
        ]
    group = {"rollouts": rollouts, "outcomes": {"answer": [0] * 4}, "scores": scores}
    settings = ("step_scorer=steps", "min_step_chars=1", "std_ddof=0", "std_eps=0")
    found = explain(capsys, "sgpo", written(tmp_path, group), *settings)
    assert column(found, "reward") == close([0.075858, 0.5, 0.5, 0.867036], abs=1e-6)
    worked = [-1.463347, 0.050972, 0.050972, 1.361404]
    assert column(found, "advantage") == close(worked, abs=1e-6)


def test_lambda_grpo_divides_by_the_size_of_the_process_set(tmp_path: Path, capsys):
    rows = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [7, 8, 9]]
    group = {"rollouts": [rollout(row) for row in rows], "outcomes": {"answer": [1, 0, 0, 1]}}
    found = explain(capsys, "lambda_grpo_prm", written(tmp_path, group))
    sizes = [[1 / weight for weight in row] for row in column(found, "loss_weights")]
    assert sizes == [close(row) for row in ([3, 2, 1], [3, 2, 1, 1], [3, 1], [1, 1, 1])]
    terms = flat(column(found, "coefficients")) * flat(column(found, "advantages")) * 12
    worked = [0.288625, 0.432938, 0.865875, -0.288625, -0.432938, -0.865875, -0.865875]
    worked += [-0.288625, -0.865875, 0.865875, 0.865875, 0.865875]
    assert terms == close(np.array(worked), abs=1e-6)
    assert found["loss"] == close(-0.048104, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "given", "worked"),
    [
        ("guidance_in_loss=true", True, [0.043294, 0.054117, -0.027059, -0.072156]),
        ("guidance_in_loss=false", False, [0.108234, 0.054117, -0.043294, -0.072156]),
    ],
)
def test_g2rpo_a_with_and_without_given_tokens(tmp_path: Path, capsys, setting, given, worked):
    sizes = [(3, 2), (0, 4), (3, 5), (0, 3)]
    rollouts = [rollout(list(range(g + n)), num_guidance_tokens=g) for g, n in sizes]
    group = {"rollouts": rollouts, "outcomes": {"answer": [1, 1, 0, 0]}}
    group["state"] = {"length": 1000.0, "recent": [0.1, 0.2], "num_steps": 2}
    found = explain(capsys, "g2rpo_a", written(tmp_path, group), setting)
    terms = [
        row["coefficients"][-1] * row["advantages"][-1] for row in found["groups"][0]["rollouts"]
    ]
    assert terms == close(worked, abs=1e-6)
    assert column(found, "trained")[0][0] is given
    assert found["state"]["length"] == 1000
    assert found["next_state"]["num_steps"] == 3
    assert found["next_state"]["length"] != 1000  # the third step moves it


def test_pods_keeps_the_most_varied_rollouts(tmp_path: Path, capsys):
    rewards = [0.1, 0.9, 0.4, 0.5, 1.0, 0.0, 0.45, 0.95]
    group = {"rollouts": [rollout([1])] * 8, "outcomes": {"answer": rewards}}
    found = explain(capsys, "pods", written(tmp_path, group), "num_generations=8", "num_kept=4")
    rollouts = found["groups"][0]["rollouts"]
    assert [r["rollout"] for r in rollouts if r["kept"]] == [0, 4, 5, 7]
    assert "advantage" not in rollouts[1]


def test_dynamic_sampling_drops_what_teaches_nothing_and_no_step_follows(tmp_path: Path, capsys):
    groups = [toy(rewards=[1, 1, 1, 1]), toy(rewards=[1, 0, 0, 1])]
    found = explain(capsys, "dapo", written(tmp_path, groups))
    assert [group["kept"] for group in found["groups"]] == [False, True]
    assert found["groups"][0]["dropped"]["reason"] == "constant_outcome"
    alone = explain(capsys, "dapo", written(tmp_path, groups[:1]))
    assert (alone["loss"], alone["updates"], alone["metrics"]) == (0, [], {})


def test_a_step_can_be_cut_into_updates_of_whole_groups(tmp_path: Path, capsys):
    file = written(tmp_path, [toy(id=3), toy(id=8, rewards=[1, 0, 1, 1])])
    found = explain(capsys, "bnpo", file, *LITERAL, updates=2)
    assert [update["groups"] for update in found["updates"]] == [[3], [8]]
    assert found["updates"][0]["loss"] == close(0.266724, abs=1e-6)
    assert found["loss"] == close(np.mean([u["loss"] for u in found["updates"]]))


def test_thr_reads_hidden_states_and_an_output_layer(tmp_path: Path, capsys):
    group = {
        "rollouts": [
            rollout([0, 1], hidden=[[1, 0], [0, 1]]),
            rollout([2, 1], hidden=[[0.5, 0.5], [0, 1]]),
        ],
        "outcomes": {"answer": [1, 0]},
    }
    layer = [[1, 0], [0, 1], [0.5, 0.5]]
    found = explain(capsys, "thr", written(tmp_path, {"groups": [group], "output_layer": layer}))
    measured = [row["measured"]["hidden_reward"] for row in found["groups"][0]["rollouts"]]
    # s(token) = sum over right answers' tokens of <alpha, alpha'> <h, h'>, alpha = e_y - p.
    w, h = np.array(layer), [np.array([[1, 0], [0, 1]]), np.array([[0.5, 0.5], [0, 1]])]
    logits = [states @ w.T for states in h]
    p = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits]
    alpha = [np.eye(3)[[0, 1]] - p[0], np.eye(3)[[2, 1]] - p[1]]
    for place in (0, 1):
        worked = [
            sum((alpha[0][j] @ alpha[place][t]) * (h[0][j] @ h[place][t]) for j in (0, 1))
            for t in (0, 1)
        ]
        ours = measured[place]
        scale = ours[0] / worked[0]
        assert ours == close([value * scale for value in worked], rel=1e-5)
        assert scale > 0


def test_veripo_explains_its_second_stage(tmp_path: Path, capsys):
    logs = {"chosen": (-20.0, -22.0), "rejected": (-30.0, -27.0)}
    rollouts = [
        rollout([index], proximal_log_probs=old, current_log_probs=now, log_probs=old)
        for index, (now, old) in enumerate(logs.values())
    ]
    group = {"rollouts": rollouts, "outcomes": {"answer": [1, 0]}}
    found = explain(capsys, "veripo", written(tmp_path, group), "min_answer_tokens=1")
    rows = found["stage"]["rows"]
    assert len(rows) == 2
    # d/d log p of -log sigmoid(0.1 * ((-20 + 22) - (-30 + 27))): 0.1 * sigmoid(-0.5) = 0.037754.
    slopes = [row["gradient"][0] / row["coefficients"][0] for row in rows]
    assert slopes == close([-0.03775407, 0.03775407], rel=1e-5)


def test_shared_prefixes_of_one_process_set_are_worth_the_same(tmp_path: Path, capsys):
    rows = [[1, 2], [1, 3], [1, 3]]
    group = {"rollouts": [rollout(row) for row in rows], "outcomes": {"answer": [1, 0, 0]}}
    found = explain(capsys, "lambda_grpo_prm", written(tmp_path, group), "credit=process")
    first = [values[0] for values in column(found, "advantages")]
    assert first == close([first[0]] * 3)
    for a, b in itertools.pairwise(column(found, "advantages")[1:]):
        assert a == close(b)
