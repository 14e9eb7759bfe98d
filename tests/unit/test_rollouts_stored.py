"""SGPO offline: a file of judged groups in place of sampling, and the ratio to what it stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.errors import UserError
from grpo.pipeline import RewardedGroup
from grpo.types import FinishReason, Origin
from orchestration.config import DataConfig
from orchestration.group_task import DroppedGroup, FinishedGroup, GroupTimes
from orchestration.prompts import load_prompts
from orchestration.records import trained_record
from tests.unit.family_cases import advantages_of, halves, loss_and_gradient, points, rows_of
from tests.unit.grpo_groups import flat, loss_inputs
from tests.unit.scripted_groups import (
    CharacterTokenizer,
    ScriptedEngine,
    TextScorer,
    a_question,
    grown_group,
)

OUTCOMES = {"answer": 1.0, "judge": 0.0}
SETTINGS = {"offline": True, "step_scorer": "judge", "outcome_scorer": "answer"}


def stored(text: str, log_prob: float, *, is_cut_off: bool = False) -> dict[str, object]:
    tokens = [*map(ord, text)] + ([] if is_cut_off else [2])
    return {"tokens": tokens, "text": text, "log_probs": [log_prob] * len(tokens)}


def judged_group() -> dict[str, object]:
    """Two wrong answers of two steps: the first goes wrong at once, the other in its last step."""
    return {
        "prompt": {"text": "7", "reference": "9"},
        "rollouts": [stored("aa\nbb", -0.5), stored("cc\ndd", -0.7, is_cut_off=True)],
        "outcomes": {"answer": [0, 0]},
        "scores": [
            {"scorer": "judge", "rollout": 0, "start": 0, "end": 3, "value": 0},
            {"scorer": "judge", "rollout": 0, "start": 3, "end": 6, "value": 1},
            {"scorer": "judge", "rollout": 1, "start": 0, "end": 3, "value": 1},
            {"scorer": "judge", "rollout": 1, "start": 3, "end": 5, "value": 0},
        ],
    }


def loaded(tmp_path: Path, *groups: dict[str, object]):
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    (source,) = DataConfig(train=str(path)).training_sources
    return load_prompts(source, CharacterTokenizer(), max_prompt_length=9).prompts


def brought(prompt, **settings: object):
    pipeline, _ = halves("sgpo", outcomes=OUTCOMES, **{**SETTINGS, **settings})
    engine = ScriptedEngine(lambda context, given, place: "sampled")
    scorers = [TextScorer("answer", lambda text: 0.25), TextScorer("judge", lambda text: 0.0)]
    return grown_group(pipeline, engine, scorers, prompt=prompt), scorers, engine


def finished(tmp_path: Path, group: dict[str, object]):
    (prompt,) = loaded(tmp_path, group)
    outcome, scorers, engine = brought(prompt)
    assert isinstance(outcome, FinishedGroup)
    assert engine.asked == []
    return outcome.group, scorers


def test_stored_answers_take_the_place_of_sampled_ones(tmp_path: Path) -> None:
    group, scorers = finished(tmp_path, judged_group())
    assert group.prompt.tokens.tolist() == [1, ord("7")]
    assert [rollout.text for rollout in group.rollouts] == ["aa\nbb", "cc\ndd"]
    assert [rollout.finish_reason for rollout in group.rollouts] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    for rollout, log_prob in zip(group.rollouts, (-0.5, -0.7), strict=True):
        np.testing.assert_allclose(rollout.log_probs, log_prob)
        assert set(rollout.origins.tolist()) == {Origin.POLICY}
        assert set(rollout.versions.tolist()) == {-1}  # no weights of this run: never too old
    assert all(not scorer.asked for scorer in scorers)


def test_stored_judgements_shape_the_reward(tmp_path: Path) -> None:
    group, _ = finished(tmp_path, judged_group())
    pipeline, _ = halves("sgpo", outcomes=OUTCOMES, **SETTINGS, shaping="none", std_eps=0.0)
    # Right shares 0 and 1/2: standardised with the sample deviation.
    np.testing.assert_allclose(advantages_of(pipeline, [group]), [-0.707107, 0.707107], atol=1e-6)


def test_scorers_are_asked_for_what_is_not_stored_and_for_nothing_else(tmp_path: Path) -> None:
    group = judged_group()
    group["scores"] = group["scores"][:1]  # one step of the first answer, cut in its own way
    _, (answers, judge) = finished(tmp_path, group)
    assert answers.asked == []
    assert {place for place, _ in judge.asked} == {1}
    del group["outcomes"]
    _, (answers, _) = finished(tmp_path, group)
    assert [place for place, _ in answers.asked] == [0, 1]


def test_the_ratio_is_to_the_stored_log_probs_and_is_clipped(tmp_path: Path) -> None:
    group, _ = finished(tmp_path, judged_group())
    pipeline, objective = halves("sgpo", outcomes=OUTCOMES, **SETTINGS)
    rows = rows_of(pipeline, [group])
    rows = [
        replace(
            row,
            advantages=np.ones(len(row.tokens), np.float32),
            weights=np.ones(len(row.tokens), np.float32),
        )
        for row in rows
    ]
    behaviour = flat([row.behaviour_log_probs for row in rows])
    ratios = np.where(np.arange(len(behaviour)) < 6, 1.1, 1.5)
    now = torch.tensor(behaviour + np.log(ratios), requires_grad=True)
    # Where the policy was at the start of the step is of no importance, and corrects nothing.
    inputs = loss_inputs(rows, log_probs=now, proximal=now.detach().numpy() + 3.0)
    loss, gradient = loss_and_gradient(objective, inputs)
    assert loss == pytest.approx(-(6 * 1.1 + 5 * 1.2), abs=1e-5)
    np.testing.assert_allclose(gradient, [-1.1] * 6 + [0.0] * 5, atol=1e-6)


def test_a_prompt_without_stored_answers_is_dropped_with_the_remedy() -> None:
    outcome, _, _ = brought(a_question("7"))
    assert isinstance(outcome, DroppedGroup)
    assert "set offline: false, or name a file of groups" in outcome.dropped.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": [{"tokens": [3]}]}, "line 1: rollout 0 has no log_probs"),
        ({"rollouts": [{"token_texts": ["a"], "log_probs": -1}]}, "rollout 0 has no tokens"),
        ({"rollouts": [{"tokens": [3], "log_probs": [-1, -2]}]}, "log_probs has 2 entries"),
        ({"prompt": {"text": " "}}, "neither text nor tokens"),
        ({"rollouts": [{"tokens": [3], "log_probs": 0, "num_guidance_tokens": 1}]}, "were given"),
        ({"rollouts": [{"tokens": [3], "log_probs": 0, "context": [1]}]}, "another prompt"),
        ({"typo": 1}, "typo"),
    ],
)
def test_a_bad_group_is_named_with_its_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    group = {**judged_group(), "outcomes": {}, "scores": [], **change}
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, group)


def test_the_groups_that_a_run_recorded_are_such_a_file(tmp_path: Path) -> None:
    group, _ = finished(tmp_path, judged_group())
    rewarded = RewardedGroup(group=group, components=np.zeros((2, 1)))
    times = GroupTimes(admitted=0.0, generated=0.0, scored=0.0)
    record = trained_record(rewarded, [], terms=["answer"], times=times, trained=0.0)
    (prompt,) = loaded(tmp_path, {**record, "step": 1})
    older = {**record, "prompt": {k: v for k, v in record["prompt"].items() if k != "tokens"}}
    (from_text,) = loaded(tmp_path, older)
    assert from_text.tokens.tolist() == prompt.tokens.tolist()
    assert prompt.tokens.tolist() == group.prompt.tokens.tolist()
    again, _, _ = brought(prompt)
    assert again.group.scores == group.scores
    for ours, theirs in zip(again.group.rollouts, group.rollouts, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-6)


def test_tokens_of_the_prompt_win_over_its_text(tmp_path: Path) -> None:
    (prompt,) = loaded(tmp_path, {**judged_group(), "prompt": {"text": "7", "tokens": [4, 5]}})
    assert prompt.tokens.tolist() == [4, 5]


def test_online_is_the_default_and_offline_changes_sampling_and_the_ratio_alone() -> None:
    base = {"step_scorer": "judge", "outcomes": OUTCOMES}
    on, off = points("sgpo", offline=True, **base), points("sgpo", **base)
    assert {p for p in off if off[p] != on[p]} == {"plan", "spans", "log_ratio", "gates"}
