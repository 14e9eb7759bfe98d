"""WS-GRPO's option to stop answers while they are written: segments, judgements, what is saved."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.batch import build_batch
from grpo.early_stop import is_stopped
from grpo.types import FinishReason, Origin
from orchestration.group_task import FinishedGroup
from tests.unit.family_cases import differing_points, halves, points
from tests.unit.scripted_groups import LOG_PROB, ScriptedEngine, TextScorer, grown_group

OUTCOMES = {"answer": 1.0, "pref": 0.0}
SETTINGS = {
    "num_generations": 2,
    "preference_scorer": "pref",
    "early_stop": True,
    "segment_tokens": 5,
    "stop_patience": 1,
    "min_step_chars": 1,
}
GOOD, BAD = "+1\n+2\n+3\n+4\nok", "+1\n-2\n-3\n-4\nok"


def utility(text: str) -> float:
    """Steps that begin with a plus raise it, others lower it."""
    return float(text.count("+") - text.count("-"))


def brought(texts: list[str], *, max_tokens: int = 40, **settings: object):
    settings = {**SETTINGS, **settings}
    pipeline, _ = halves("ws_grpo", outcomes=OUTCOMES, length=max_tokens, **settings)

    def answer(context: str, given: str, place: int) -> str:
        return "ok" if "!" in given else texts[place][len(given) :]

    engine = ScriptedEngine(answer)
    scorers = [TextScorer("answer", lambda text: float("ok" in text)), TextScorer("pref", utility)]
    outcome = grown_group(pipeline, engine, scorers, max_tokens=max_tokens)
    assert isinstance(outcome, FinishedGroup)
    return pipeline, outcome.group, engine, scorers


def test_an_answer_that_gets_better_is_written_to_its_end_in_segments() -> None:
    _, group, engine, _ = brought([GOOD, GOOD])
    whole = [*map(ord, GOOD), 2]
    for rollout in group.rollouts:
        assert rollout.tokens.tolist() == whole
        assert rollout.finish_reason is FinishReason.STOP
        np.testing.assert_allclose(rollout.log_probs, LOG_PROB)
        assert set(rollout.origins.tolist()) == {Origin.POLICY}
    # 15 tokens in segments of 5: two answers, three segments each.
    assert len(engine.asked) == 6
    assert [request.sampling.max_tokens for request in engine.asked] == [5, 5, 10, 10, 15, 15]


def test_an_answer_whose_last_step_was_not_worth_taking_is_not_continued() -> None:
    _, group, _, _ = brought([GOOD, BAD])
    good, bad = group.rollouts
    assert good.finish_reason is FinishReason.STOP
    # After "+1\n-2" only the first step is complete; after "+1\n-2\n-3\n-" the last one is bad.
    assert bad.text == BAD[:10]
    assert bad.finish_reason is FinishReason.LENGTH


def test_all_complete_steps_are_judged_and_the_last_of_them_decides() -> None:
    late = "+1\n+2\n-3\n-4\nok"
    _, group, _, _ = brought([GOOD, late])
    # After 10 tokens "+1", "+2" and "-3" are complete.
    assert group.rollouts[1].text == late[:10]


def test_patience_waits_for_more_steps_in_a_row() -> None:
    _, group, _, _ = brought([BAD, BAD], stop_patience=3, segment_tokens=3)
    # Complete after 12 tokens: +1, -2, -3. After 15 ("+1\n-2\n-3\n-4\nok" and the end) it is done.
    assert {rollout.text for rollout in group.rollouts} == {BAD}
    assert is_stopped(np.array([0.6, 0.4, 0.3]), below=0.5, patience=2)
    assert not is_stopped(np.array([0.4, 0.6]), below=0.5, patience=2)
    assert not is_stopped(np.array([0.4]), below=0.5, patience=2)
    assert not is_stopped(np.array([np.nan]), below=0.5, patience=1)


def test_a_stopped_answer_can_be_asked_for_its_result() -> None:
    _, group, _, _ = brought([GOOD, BAD], stop_phrase="!", stop_room=4)
    bad = group.rollouts[1]
    assert bad.text == BAD[:10] + "!ok"
    assert bad.finish_reason is FinishReason.STOP
    assert np.flatnonzero(bad.origins == Origin.GUIDANCE).tolist() == [10]
    np.testing.assert_allclose(bad.log_probs[:10], LOG_PROB)


def test_a_stopped_answer_that_does_not_come_to_an_end_is_asked_once() -> None:
    _, group, engine, _ = brought([GOOD, BAD], stop_phrase="!", stop_room=2)
    # "ok" fills the room, so that the end is missing.
    assert group.rollouts[1].text == BAD[:10] + "!ok"
    assert group.rollouts[1].is_truncated
    assert sum("!" in "".join(map(chr, request.guidance)) for request in engine.asked) == 1


def test_a_stopped_answer_without_room_for_its_result_ends_where_it_is() -> None:
    # 10 tokens are written: a room of 10 just fits.
    for room, text in ((10, BAD[:10] + "!ok"), (11, BAD[:10])):
        _, group, _, _ = brought([GOOD, BAD], stop_phrase="!", stop_room=room, max_tokens=20)
        assert group.rollouts[1].text == text


def test_the_budget_ends_an_answer_as_ever() -> None:
    _, group, _, _ = brought([GOOD, GOOD], max_tokens=12)
    assert {rollout.text for rollout in group.rollouts} == {GOOD[:12]}
    assert all(rollout.is_truncated for rollout in group.rollouts)


def test_a_finished_answer_is_judged_as_without_stopping_and_whole_answers_once() -> None:
    _, group, _, (answers, _) = brought([GOOD, BAD])
    _, plain, _, _ = brought([GOOD, BAD[:10]], early_stop=False)

    def said(found, place):
        spans = [s for s in found.scores if s.span.rollout == place]
        return sorted((s.scorer, s.span.start, s.span.end, s.value) for s in spans)

    assert said(group, 0) == said(plain, 0)
    assert [place for place, _ in answers.asked] == [1, 0]
    # The stopped one: the same prefixes as an answer that ends there, without its end token.
    ends = [s.span.end for s in group.scores if s.scorer == "pref" and s.span.rollout == 1]
    assert sorted(ends) == [0, 3, 6, 9, 10]


def test_metrics_say_how_much_of_the_budget_was_saved() -> None:
    pipeline, group, _, _ = brought([GOOD, BAD])
    metrics = build_batch(pipeline, [group], None, step=1, version=0, num_updates=1).metrics
    assert metrics["early_stop/frac_stopped"] == 0.5
    assert metrics["early_stop/tokens_saved"] == (40 - 10) / 2
    assert metrics["early_stop/budget_saved"] == (40 - 10) / 2 / 40


def test_the_option_is_off_and_changes_sampling_and_metrics_alone() -> None:
    base = {"preference_scorer": "pref", "outcomes": OUTCOMES}
    on, off = points("ws_grpo", early_stop=True, **base), points("ws_grpo", **base)
    assert differing_points(off, on) == {"plan", "spans", "metrics"}
    assert "scores_between_waves" in on
    assert "scores_between_waves" not in off


def test_stopping_without_a_judge_is_refused() -> None:
    with pytest.raises(ValidationError, match="early_stop is true, but preference_scorer is null"):
        halves("ws_grpo", early_stop=True)
