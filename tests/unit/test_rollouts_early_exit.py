"""S-GRPO: where answers are left, what an exit earns and what of it is trained."""

from __future__ import annotations

import numpy as np
import pytest

from grpo.batch import build_batch
from grpo.early_exit import even_places, random_places
from grpo.types import Origin
from orchestration.group_task import FinishedGroup
from tests.unit.family_cases import advantages_of, differing_points, halves, points, rows_of
from tests.unit.grpo_groups import scored
from tests.unit.scripted_groups import LOG_PROB, ScriptedEngine, TextScorer, grown_group
from tests.unit.seed_groups import a_rollout

SETTINGS = {
    "num_generations": 3,
    "positions": "even",
    "exit_phrase": "!",
    "thinking_end": "</t>",
    "exit_room": 4,
}


def brought(full: str, *, max_tokens: int = 96, exit_text: str = "A", **settings: object):
    pipeline, _ = halves("s_grpo", length=max_tokens, **{**SETTINGS, **settings})
    engine = ScriptedEngine(lambda context, given, place: exit_text if given else full)
    scorer = TextScorer("answer", lambda text: float(text.endswith("A")))
    outcome = grown_group(pipeline, engine, [scorer], max_tokens=max_tokens)
    assert isinstance(outcome, FinishedGroup)
    return pipeline, outcome.group


def serial_group(outcomes: list[float]):
    """The full answer first, then exits in order; outcomes are in the order of leaving."""
    *exits, full = outcomes
    rollouts = [a_rollout(0, range(9))]
    for place in range(len(exits)):
        tokens = [*range(place + 1), 99, 7]
        rollout = a_rollout(place + 1, tokens)
        origins = rollout.origins.copy()
        origins[place + 1] = Origin.GUIDANCE
        rollouts.append(_with(rollout, origins=origins))
    return scored(rollouts, answer=[full, *exits])


def _with(rollout, **changes):
    from dataclasses import replace

    return replace(rollout, **changes)


def test_exits_keep_the_beginning_get_the_phrase_and_go_on_by_themselves() -> None:
    _, group = brought("thought</t>A")
    # 7 characters of thinking: exits after round(7 / 3) = 2 and round(14 / 3) = 5.
    assert [answer.text for answer in group.rollouts] == ["thought</t>A", "th!A", "thoug!A"]
    first = group.rollouts[1]
    assert first.origins.tolist() == [Origin.POLICY] * 2 + [Origin.GUIDANCE] + [Origin.POLICY] * 2
    np.testing.assert_allclose(first.log_probs, [LOG_PROB, LOG_PROB, 0, LOG_PROB, LOG_PROB])
    assert first.versions.tolist() == [0, 0, -1, 0, 0]
    shared = [answer.lineage[0] for answer in group.rollouts]
    assert {piece.id for piece in shared} == {0}
    assert [piece.end for piece in shared] == [13, 2, 5]


def test_an_answer_without_the_mark_is_left_before_its_last_token() -> None:
    _, group = brought("abcdefghi", num_generations=12)
    # Ten tokens with the end: exits after 1 to 9 of them, each once.
    assert [answer.text for answer in group.rollouts[1:]] == [
        "abcdefghi"[:place] + "!A" for place in range(1, 10)
    ]


def test_exits_leave_room_for_phrase_and_answer() -> None:
    _, group = brought("x" * 50, max_tokens=20, exit_room=4, num_generations=30)
    lengths = [answer.text.index("!") for answer in group.rollouts[1:]]
    assert lengths == list(range(1, 17))
    assert all(answer.num_tokens <= 20 for answer in group.rollouts)


def test_an_answer_of_one_token_has_no_exit() -> None:
    _, group = brought("")
    assert len(group.rollouts) == 1


def test_drawn_places_are_different_in_order_and_the_same_for_the_same_group() -> None:
    drawn = [random_places(40, 5, seed=3, group=group) for group in range(200)]
    assert drawn == [random_places(40, 5, seed=3, group=group) for group in range(200)]
    assert all(len(set(places)) == 5 and places == sorted(places) for places in drawn)
    flat = np.concatenate(drawn)
    assert flat.min() == 1
    assert flat.max() == 40
    assert abs(flat.mean() - 20.5) < 1.5  # uniform: deviation of the mean is 0.36
    assert random_places(40, 5, seed=4, group=0) != drawn[0]
    assert random_places(0, 5, seed=0, group=0) == []
    assert even_places(9, 2) == [3, 6]


def test_the_earlier_a_right_exit_the_more_it_earns() -> None:
    # In the order of leaving 0, 1, 0, 1, 1 (the full answer): 0, 1, 0, 0.5, 0.25, mean 0.35.
    pipeline, _ = halves("s_grpo", num_generations=5)
    group = serial_group([0.0, 1.0, 0.0, 1.0, 1.0])
    built = build_batch(pipeline, [group], None, step=1, version=0, num_updates=1)
    assert built.rewarded[0].rewards.tolist() == [0.25, 0.0, 1.0, 0.0, 0.5]
    np.testing.assert_allclose(
        advantages_of(pipeline, [group]), [-0.1, -0.35, 0.65, -0.35, 0.15], atol=1e-7
    )
    assert built.metrics["early_exit/outcome_full"] == 1.0
    assert built.metrics["early_exit/outcome_exits"] == 0.5
    assert built.metrics["early_exit/first_right_share"] == pytest.approx(2 / 9)


def test_without_decay_every_right_answer_earns_the_same() -> None:
    pipeline, _ = halves("s_grpo", num_generations=3, decay=1.0)
    assert not advantages_of(pipeline, [serial_group([1.0, 1.0, 1.0])]).any()


def test_the_phrase_is_never_trained_and_the_kept_beginning_on_request() -> None:
    group = serial_group([1.0, 1.0, 0.0])
    trained, _ = halves("s_grpo", num_generations=3)
    masked, _ = halves("s_grpo", num_generations=3, exit_prefix="masked")
    found = [[(row.weights > 0).tolist() for row in rows_of(p, [group])] for p in (trained, masked)]
    assert found[0] == [[True] * 9, [True, False, True], [True, True, False, True]]
    assert found[1] == [[True] * 9, [False, False, True], [False, False, False, True]]


def test_another_scorer_counts_beside_the_task_and_does_not_decay() -> None:
    pipeline, _ = halves("s_grpo", outcomes={"answer": 1.0, "form": 0.5}, num_generations=3)
    group = serial_group([1.0, 1.0, 1.0])
    scores = scored(group.rollouts, answer=[1.0] * 3, form=[1.0] * 3)
    built = build_batch(pipeline, [scores], None, step=1, version=0, num_updates=1)
    assert built.rewarded[0].rewards.tolist() == [0.75, 1.5, 1.0]


def test_without_exits_it_is_grpo_with_centred_rewards() -> None:
    neutral = {"early_exits": False, "num_generations": 8}
    assert differing_points(points("s_grpo", **neutral), points("grpo")) == {"advantage"}


def test_exits_that_can_never_have_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exit_room is 64.*is 64: no exit"):
        halves("s_grpo", length=64, exit_room=64)
