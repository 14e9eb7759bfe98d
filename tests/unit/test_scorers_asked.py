"""What models are asked: each rollout once, steps where they end, rows that fit into a pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo.types import Score, Span
from reward_services.asked_rollouts import asked_rollouts, judged_rollouts, span_boundaries
from reward_services.batches import joined, span_keys
from reward_services.config import ScorerConfig
from reward_services.token_rows import padded, passes
from reward_services.user_functions import Verdict, packed_verdicts, unpacked_verdicts
from tests.unit.scored_groups import whole, written_group


def a_span(rollout: int, start: int, end: int) -> Span:
    return Span(rollout=rollout, start=start, end=end)


def test_spans_of_one_rollout_go_together_and_come_back_in_their_order() -> None:
    group = written_group(["abcdef", "xy"])
    spans = [a_span(0, 2, 6), a_span(1, 0, 2), a_span(0, 0, 2), a_span(0, 2, 6)]
    asked = asked_rollouts([(group, span) for span in spans], scorer="prm")
    assert [rollout.text for rollout in asked.rollouts] == ["abcdef", "xy"]
    assert asked.rollouts[0].spans == ((2, 6), (0, 2))
    assert asked.rollouts[0].boundaries == asked.rollouts[0].characters == (2, 6)
    assert asked.places == ((0, 0), (1, 0), (0, 1), (0, 0))


def test_equal_rollouts_of_a_prompt_are_one_and_of_two_prompts_are_two() -> None:
    group = written_group(["abc", "abc"])
    items = [(group, span) for span in whole(group)]
    assert len(asked_rollouts(items, scorer="prm").rollouts) == 1
    other = replace(group, prompt=replace(group.prompt, text="7 -5"))
    items += [(other, span) for span in whole(other)]
    assert len(asked_rollouts(items, scorer="prm").rollouts) == 2


def test_equal_rollouts_that_were_cut_differently_are_two() -> None:
    group = written_group(["abc", "abc"])
    items = [(group, a_span(0, 0, 3)), (group, a_span(1, 0, 1)), (group, a_span(1, 1, 3))]
    assert len(asked_rollouts(items, scorer="prm").rollouts) == 2


def test_steps_that_were_scored_before_still_end_where_they_ended() -> None:
    scores = (
        Score(scorer="prm", span=a_span(0, 0, 3), value=1.0),
        Score(scorer="answer", span=a_span(0, 0, 5), value=1.0),
    )
    assert span_boundaries([a_span(0, 3, 7)], scores, "prm") == {0: (3, 7)}
    assert span_boundaries([a_span(0, 5, 7)], (), "prm") == {0: (5, 7)}
    group = replace(written_group(["abcdefg"]), scores=scores)
    (rollout,) = asked_rollouts([(group, a_span(0, 3, 7))], scorer="prm").rollouts
    assert rollout.boundaries == (3, 7) and rollout.spans == ((3, 7),)


def test_only_answers_with_an_outcome_are_learned_from() -> None:
    group = written_group(["ab", "cd", "ef"])
    scores = tuple(
        Score(scorer="answer", span=span, value=value)
        for span, value in zip(whole(group), (1.0, None, 0.0), strict=True)
    )
    found = judged_rollouts([replace(group, scores=scores)], outcome="answer")
    assert [(r.tokens.tolist(), r.outcome) for r in found] == [([97, 98], 1.0), ([101, 102], 0.0)]


@pytest.mark.parametrize(
    ("at_most", "expected"), [(9, [[1], [2, 0]]), (100, [[1, 2, 0]]), (1, [[1], [2], [0]])]
)
def test_a_pass_holds_as_many_rows_as_fit_with_their_padding(
    at_most: int, expected: list[list[int]]
) -> None:
    assert list(passes([3, 9, 4], at_most=at_most)) == expected


def test_rows_are_padded_on_the_right_and_the_padding_is_masked() -> None:
    ids, mask = padded([torch.tensor([5, 6, 7]), torch.tensor([8])], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_verdicts_arrive_as_they_were_sent() -> None:
    verdicts = [Verdict(value=0.5), Verdict(value=None), Verdict(value=None, failure="no")]
    assert unpacked_verdicts(packed_verdicts(verdicts)) == verdicts


def test_a_batch_gives_each_completion_its_own_tokens_back() -> None:
    group = written_group(["abc", "", "de"])
    batch = joined([(group, span) for span in [*whole(group), a_span(0, 1, 2)]])
    assert batch.completion_ids == [[97, 98, 99], [], [100, 101], [98]]
    assert batch.tokens.dtype == np.int32


def test_keys_tell_apart_what_a_judge_could_tell_apart() -> None:
    group = written_group(["abcd", "abcd", "abXd"])
    spans = [a_span(0, 0, 2), a_span(1, 0, 2), a_span(2, 0, 2), a_span(0, 1, 2), a_span(0, 0, 4)]
    first, second, third, later, longer = span_keys(group, spans)
    assert first == second == third
    assert len({first, later, longer}) == 3
    for changed in ({"reference": "13"}, {"text": "7 +6"}, {"id": "other"}):
        other = replace(group, prompt=replace(group.prompt, **changed))  # type: ignore[arg-type]
        assert span_keys(other, spans[:1]) != [first]


LEARNS = {"name": "prime", "implicit_reward": {"model": "m", "outcome": "answer"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**LEARNS, "actors": 2}, "learns and has 2 actors.*set actors: 1"),
        ({**LEARNS, "on_failure": "stop", "max_failure_rate": 0.1}, "remove max_failure_rate"),
        ({**LEARNS, "rule": "exact"}, "found rule and implicit_reward"),
        ({"name": "p", "process_reward": {"model": "m", "head": "value"}}, "token_classification"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ScorerConfig.model_validate(settings)


def test_a_scorer_learns_from_the_outcome_that_it_names() -> None:
    assert ScorerConfig.model_validate(LEARNS).learns_from == "answer"
    refreshed = {"folder": "f", "refresh": {"outcome": "right"}}
    config = ScorerConfig.model_validate({"name": "p", "preference": refreshed})
    assert config.learns and config.learns_from == "right"
    frozen = ScorerConfig.model_validate({"name": "p", "preference": {"folder": "f"}})
    assert not frozen.learns
