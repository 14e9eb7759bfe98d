"""One line per group: what is in it, what is left out, and how numbers are written."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from grpo.pipeline import RewardedGroup
from grpo.types import (
    Dropped,
    FinishReason,
    Group,
    Piece,
    Prompt,
    Rollout,
    Score,
    Span,
    TrainRow,
)
from orchestration.group_file import from_record, groups_of
from orchestration.group_schema import BatchInput, GroupInput
from orchestration.group_task import DroppedGroup, GroupTimes
from orchestration.records import all_rounded, dropped_record, rounded, trained_record
from orchestration.run_directory import encode_line

CONTEXT = np.array([7, 8], np.int32)
PROMPT = Prompt(id="row-3", text="1+1", tokens=CONTEXT, reference="2", domain="sums")
TIMES = GroupTimes(admitted=10.0, generated=11.23456, scored=12.0)


def rollout(index: int, tokens: list[int], *, guidance: int = 0) -> Rollout:
    size = len(tokens)
    return Rollout(
        index=index,
        context=CONTEXT,
        tokens=np.array(tokens, np.int32),
        log_probs=np.full(size, -1 / 3, np.float32),
        origins=np.array([1] * guidance + [0] * (size - guidance), np.uint8),
        versions=np.array([-1] * guidance + [4] * (size - guidance - 1) + [5], np.int32),
        text="2",
        token_ends=np.ones(size, np.int32),
        finish_reason=FinishReason.STOP,
    )


def row(rollout: Rollout, advantages: list[float]) -> TrainRow:
    size = rollout.num_tokens
    return TrainRow(
        group=17,
        index=rollout.index,
        context=rollout.context,
        tokens=rollout.tokens,
        weights=np.full(size, 0.25, np.float32),
        advantages=np.array(advantages, np.float32),
        policy_weights=np.ones(size, np.float32),
        behaviour_log_probs=rollout.log_probs,
        versions=rollout.versions,
        origins=rollout.origins,
    )


ROLLOUTS = (rollout(0, [5, 6, 9]), rollout(2, [5, 9], guidance=1))
SCORES = (
    Score(scorer="answer", span=Span(rollout=0, start=0, end=3), value=1.0),
    Score(scorer="answer", span=Span(rollout=1, start=0, end=2), value=None),
    Score(scorer="steps", span=Span(rollout=0, start=0, end=1), value=0.5),
    Score(scorer="steps", span=Span(rollout=0, start=1, end=3), value=None, failure="it raised"),
)
GROUP = Group(id=17, prompt=PROMPT, rollouts=ROLLOUTS, scores=SCORES)


def record(rows: list[TrainRow], components: list[list[float]]) -> dict[str, object]:
    return trained_record(
        RewardedGroup(group=GROUP, components=np.array(components)),
        rows,
        terms=["answer", "length"],
        times=TIMES,
        trained=13.0,
    )


def recorded(rollout: Rollout, *, is_replayed: bool = False) -> dict[str, object]:
    """The record of a group of this rollout alone."""
    group = replace(GROUP, rollouts=(rollout,), scores=())
    rewarded = RewardedGroup(group=group, components=np.zeros((1, 1)))
    return trained_record(
        rewarded, [], terms=["answer"], times=TIMES, trained=13.0, is_replayed=is_replayed
    )


def test_a_trained_group_is_recorded_with_rewards_advantages_and_weights() -> None:
    rows = [row(ROLLOUTS[0], [0.7, 0.7, 0.7]), row(ROLLOUTS[1], [0.0, -0.5])]
    first, second = record(rows, [[1.0, -0.25], [np.nan, -0.5]])["rollouts"]
    assert first["rewards"] == {"answer": 1.0, "length": -0.25}
    assert first["reward"] == 0.75
    assert first["advantage"] == 0.7  # one number: all tokens share it
    assert first["weight"] == 0.25
    assert second["rewards"] == {"length": -0.5}  # a term that does not apply is absent
    assert second["advantage"] == [0.0, -0.5]  # per token, because it differs
    assert second["index"] == 2


def test_a_rollout_that_was_left_out_of_training_has_no_advantage() -> None:
    first, second = record([row(ROLLOUTS[0], [1, 1, 1])], [[1.0, 0.0], [0.0, 0.0]])["rollouts"]
    assert "advantage" in first
    assert "advantage" not in second
    assert "weight" not in second


def test_scores_of_answers_and_spans_and_failures_are_kept_apart() -> None:
    first, second = record([], [[1.0, 0.0], [0.0, 0.0]])["rollouts"]
    assert first["scores"] == {"answer": 1.0}
    assert first["span_scores"] == {"steps": [[0, 1, 0.5]]}
    assert first["failures"] == {"steps": "it raised"}
    assert second["scores"] == {"answer": None}
    assert "failures" not in second


def test_versions_are_those_of_sampled_tokens_only() -> None:
    first, second = record([], [[1.0, 0.0], [0.0, 0.0]])["rollouts"]
    assert first["versions"] == [4, 5]
    assert second["versions"] == [5, 5]  # its first token is guidance
    assert second["num_guidance_tokens"] == 1


def test_the_context_is_recorded_only_where_it_is_not_the_prompt() -> None:
    hinted = replace(ROLLOUTS[0], context=np.array([7, 8, 3], np.int32))
    group = replace(GROUP, rollouts=(hinted, ROLLOUTS[1]), scores=())
    rewarded = RewardedGroup(group=group, components=np.zeros((2, 1)))
    found = trained_record(rewarded, [], terms=["answer"], times=TIMES, trained=13.0)
    assert found["rollouts"][0]["context"] == [7, 8, 3]
    assert "context" not in found["rollouts"][1]


def test_how_a_rollout_of_several_waves_came_to_be_is_recorded_and_of_no_other() -> None:
    plain = recorded(ROLLOUTS[1])["rollouts"][0]
    assert {"origins", "lineage", "train_context", "measured"}.isdisjoint(plain)
    special = replace(
        ROLLOUTS[0],
        origins=np.array([0, 1, 0], np.uint8),
        lineage=(Piece(id=4, end=1), Piece(id=9, end=3)),
        train_context=np.array([7], np.int32),
        measured={
            "reference": np.array([-0.5, -1 / 3, 0], np.float32),
            "flat": np.ones(3, np.float32),
        },
    )
    found = recorded(special)["rollouts"][0]
    assert found["origins"] == ["policy", "guidance", "policy"]
    assert found["lineage"] == [{"id": 4, "end": 1}, {"id": 9, "end": 3}]
    assert found["train_context"] == [7]
    assert found["measured"] == {"reference": [-0.5, -0.3333333, 0.0], "flat": 1.0}


def test_a_record_of_a_run_is_a_group_that_explain_reads() -> None:
    special = replace(
        ROLLOUTS[0],
        origins=np.array([0, 1, 0], np.uint8),
        lineage=(Piece(id=4, end=1), Piece(id=9, end=3)),
        measured={"reference": np.array([-0.5, -1.5, 0], np.float32)},
    )
    group = GroupInput.model_validate(from_record(recorded(special)))
    (again,) = groups_of(BatchInput(groups=(group,)))
    (rollout,) = again.rollouts
    assert again.prompt.tokens.tolist() == CONTEXT.tolist()
    assert rollout.origins.tolist() == [0, 1, 0]
    assert rollout.lineage == special.lineage
    assert rollout.measured["reference"].tolist() == [-0.5, -1.5, 0.0]


def test_a_group_that_is_trained_on_again_says_so() -> None:
    assert recorded(ROLLOUTS[0], is_replayed=True)["replayed"] is True
    assert "replayed" not in recorded(ROLLOUTS[0])


def test_a_dropped_group_keeps_its_reason_and_what_came_to_be() -> None:
    dropped = Dropped(group=17, prompt="row-3", reason="constant_outcome", detail="all 1.0")
    found = dropped_record(DroppedGroup(group=GROUP, dropped=dropped, times=TIMES))
    assert (found["dropped"], found["detail"]) == ("constant_outcome", "all 1.0")
    assert found["prompt"]["id"] == "row-3"
    assert [r["tokens"] for r in found["rollouts"]] == [[5, 6, 9], [5, 9]]


def test_a_record_is_json_and_its_numbers_are_short() -> None:
    text = json.dumps(record([], [[1.0, 0.0], [0.0, 0.0]]), allow_nan=False)
    assert "-0.333333," in text  # float32's -1/3 would be -0.3333333432674408
    assert "11.235" in text


def test_a_line_begins_with_its_step_and_holds_the_record_as_it_is() -> None:
    found = record([row(ROLLOUTS[0], [0.1, 0.2, -1e-7])], [[1.0, 0.0], [0.0, 0.0]])
    found["prompt"]["text"] = 'a "quote", a line\n, \x00 and \u2028 and \u00e4'
    found["rollouts"][1]["log_probs"] = [float("-inf"), -0.5]
    line = encode_line(12, found)
    assert line.startswith(b'{"step":12,"group":17,')
    assert line.count(b"\n") == 1
    assert line.endswith(b"}\n")
    found["rollouts"][1]["log_probs"][0] = None  # what is not finite is no JSON
    assert json.loads(line) == {"step": 12, **found}


def test_an_array_is_rounded_as_its_numbers_are() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 4000)) * 10.0 ** np.arange(-14, 26).repeat(100)
    values = [*drawn.reshape(-1), 0.0, 1.0, -1 / 3, 9.9999999e-4, 123456789.0, 1e-30, 3e38]
    single = np.array(values, np.float32)
    expected = [rounded(value) for value in single.tolist()]
    assert all_rounded(single) == pytest.approx(expected, rel=2e-7, abs=0)
    usual = single[(np.abs(single) < 1e6) & (np.abs(single) > 1e-15)]
    assert max(len(repr(v).strip("-0.").split("e")[0]) for v in all_rounded(usual)) <= 8
    assert all_rounded(np.array([np.nan, 1.5, -np.inf], np.float32)) == [None, 1.5, None]


def test_rounding_keeps_seven_digits_of_small_numbers_and_makes_nan_absent() -> None:
    assert rounded(1.23456789e-6) == 1.234568e-6
    assert rounded(float("nan")) is None
