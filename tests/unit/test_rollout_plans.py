"""Waves of rollouts through the real group task: prefixes, guidance, suffixes, places, pieces."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from grpo.algorithms import ALGORITHMS
from grpo.pipeline import Pipeline, Plan
from grpo.types import (
    FinishReason,
    Group,
    Origin,
    Piece,
    Prefix,
    RolloutPlan,
    SampleRequest,
    Sampling,
)
from orchestration.group_task import (
    DroppedGroup,
    FinishedGroup,
    GroupRecipe,
    ScorerRole,
    rollout_seed,
    run_group,
)
from tests.fakes import FakeEngine, FakeScorer, FakeTokenizer, a_prompt

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16)


def a_pipeline(*waves: tuple[RolloutPlan, ...], **changes: object) -> Pipeline:
    """GRPO that asks for these waves of rollouts, one after the other."""
    algorithm = ALGORITHMS["grpo"]
    pipeline = algorithm.pipeline(
        algorithm.config(), outcomes={"answer": 1.0}, max_completion_length=16
    )
    return replace(pipeline, plan=in_turn(waves), **changes)  # type: ignore[arg-type]


def in_turn(waves: tuple[tuple[RolloutPlan, ...], ...]) -> Plan:
    left = list(waves)

    def plan(group: Group, state: object) -> tuple[RolloutPlan, ...]:
        return left.pop(0) if left else ()

    return plan


def ran(pipeline: Pipeline, engine: FakeEngine | None = None) -> FinishedGroup | DroppedGroup:
    common = GroupRecipe(
        pipeline=pipeline,
        sampling=SAMPLING,
        run_seed=7,
        engine=engine or FakeEngine(),
        tokenizer=FakeTokenizer(),
        scorers={"answer": ScorerRole(scorer=FakeScorer(), stop_on_failure=False)},
    )
    return asyncio.run(run_group(common, 5, a_prompt(0), None))


def rollouts_of(*waves: tuple[RolloutPlan, ...], engine: FakeEngine | None = None):  # type: ignore[no-untyped-def]
    done = ran(a_pipeline(*waves), engine)
    assert isinstance(done, FinishedGroup)
    return done.group.rollouts


def test_a_continuation_is_prefix_then_guidance_then_suffix_then_what_the_engine_writes() -> None:
    plan = RolloutPlan(
        continues=Prefix(rollout=0, end=2), guidance=np.array([70, 71], np.int32), suffix="ab"
    )
    parent, child = rollouts_of((RolloutPlan(),), (plan,))
    assert child.tokens[:2].tolist() == parent.tokens[:2].tolist()
    assert child.tokens[2:6].tolist() == [70, 71, ord("a"), ord("b")]
    assert child.num_tokens == 10  # and four of its own
    assert child.origins.tolist() == [Origin.POLICY] * 2 + [Origin.GUIDANCE] * 4 + [0] * 4
    assert child.log_probs.tolist() == [-1.0] * 2 + [0.0] * 4 + [-1.0] * 4
    assert child.text == FakeTokenizer().decode(child.tokens)[0]


def test_a_prefix_keeps_the_versions_that_it_was_sampled_with() -> None:
    engine = FakeEngine(version=3)
    sample = engine.sample

    async def newer_every_time(requests):  # type: ignore[no-untyped-def]
        engine.version += 1
        return await sample(requests)

    engine.sample = newer_every_time  # type: ignore[method-assign]
    plan = RolloutPlan(continues=Prefix(rollout=0, end=3), suffix="x")
    _, child = rollouts_of((RolloutPlan(),), (plan,), engine=engine)
    assert child.versions.tolist() == [4, 4, 4, -1, 5, 5, 5, 5]


def test_guidance_inside_a_prefix_stays_guidance() -> None:
    guided = RolloutPlan(guidance=np.array([70], np.int32))
    _, child = rollouts_of((guided,), (RolloutPlan(continues=Prefix(rollout=0, end=2)),))
    assert child.origins.tolist() == [Origin.GUIDANCE] + [Origin.POLICY] * 5
    assert child.log_probs.tolist() == [0.0] + [-1.0] * 5


def test_the_budget_of_a_wave_is_beyond_what_is_given_and_within_the_whole_budget() -> None:
    short = RolloutPlan(max_new_tokens=3)
    longer = RolloutPlan(continues=Prefix(rollout=0, end=3), max_new_tokens=2)
    first, second = rollouts_of((short,), (longer,))
    assert (first.num_tokens, second.num_tokens) == (3, 5)
    assert first.finish_reason is FinishReason.LENGTH
    engine = FakeEngine()
    rollouts_of((RolloutPlan(guidance=np.arange(14, dtype=np.int32) + 60),), engine=engine)
    assert engine.asked[0].sampling.max_tokens == 16
    rollouts_of((RolloutPlan(guidance=np.full(14, 60, np.int32), max_new_tokens=9),), engine=engine)
    assert engine.asked[1].sampling.max_tokens == 16


def test_a_rollout_that_replaces_takes_the_place_and_the_others_follow_in_order() -> None:
    wave = (
        RolloutPlan(),
        RolloutPlan(continues=Prefix(rollout=1, end=4), replaces=True),
        RolloutPlan(continues=Prefix(rollout=0, end=1)),
    )
    before = rollouts_of((RolloutPlan(), RolloutPlan()))
    after = rollouts_of((RolloutPlan(), RolloutPlan()), wave)
    assert [rollout.index for rollout in after] == [0, 1, 2, 3]
    assert after[0].tokens.tolist() == before[0].tokens.tolist()
    assert after[1].tokens[:4].tolist() == before[1].tokens.tolist()
    assert after[1].num_tokens == 8
    assert after[2].num_tokens == 4
    assert after[3].tokens[0] == before[0].tokens[0]


def test_pieces_say_which_tokens_rollouts_share() -> None:
    at_2 = RolloutPlan(continues=Prefix(rollout=0, end=2))
    at_3 = RolloutPlan(continues=Prefix(rollout=0, end=3))
    deep = RolloutPlan(continues=Prefix(rollout=1, end=4))
    parent, first, second, other, grandchild = rollouts_of(
        (RolloutPlan(),), (at_2, at_2, at_3), (deep,)
    )
    assert parent.lineage == (Piece(id=0, end=4),)
    assert first.lineage == (Piece(id=0, end=2), Piece(id=1, end=6))
    assert second.lineage == (Piece(id=0, end=2), Piece(id=2, end=6))
    assert other.lineage == (Piece(id=0, end=3), Piece(id=3, end=7))
    assert grandchild.lineage == (Piece(id=0, end=2), Piece(id=1, end=4), Piece(id=4, end=8))
    tokens = parent.tokens.tolist()
    assert [r.tokens[:2].tolist() for r in (first, second, grandchild)] == [tokens[:2]] * 3
    assert grandchild.tokens[:4].tolist() == first.tokens[:4].tolist()


def test_a_rollout_that_nobody_continues_has_no_lineage() -> None:
    cut_at_0 = RolloutPlan(continues=Prefix(rollout=0, end=0))
    first, second, again = rollouts_of((RolloutPlan(), RolloutPlan()), (cut_at_0,))
    assert first.lineage == (Piece(id=0, end=4),)
    assert second.lineage == ()
    assert again.lineage == (Piece(id=1, end=4),)  # shares nothing


def test_continuing_in_place_again_and_again_adds_pieces() -> None:
    def more(end: int) -> tuple[RolloutPlan, ...]:
        return (RolloutPlan(continues=Prefix(rollout=0, end=end), replaces=True),)

    (rollout,) = rollouts_of((RolloutPlan(),), more(4), more(8))
    assert rollout.lineage == (Piece(id=0, end=4), Piece(id=1, end=8), Piece(id=2, end=12))


def test_a_text_becomes_the_context_and_the_prompt_is_trained_on_where_that_is_asked() -> None:
    plain, own, hinted = rollouts_of(
        (RolloutPlan(), RolloutPlan(text="no"), RolloutPlan(text="hi", trains_on_prompt=True))
    )
    prompt = a_prompt(0).tokens.tolist()
    assert plain.context.tolist() == prompt
    assert own.context.tolist() == [1, ord("n"), ord("o")]
    assert own.train_context is None
    assert hinted.context.tolist() == [1, ord("h"), ord("i")]
    assert hinted.train_context is not None
    assert hinted.train_context.tolist() == prompt


def test_a_continuation_keeps_the_contexts_of_its_parent() -> None:
    hinted = RolloutPlan(text="hi", trains_on_prompt=True)
    parent, child = rollouts_of((hinted,), (RolloutPlan(continues=Prefix(rollout=0, end=2)),))
    assert child.context.tolist() == parent.context.tolist()
    assert child.train_context is parent.train_context


def test_guidance_that_ends_is_a_demonstration() -> None:
    engine = FakeEngine()
    (rollout,) = rollouts_of((RolloutPlan(guidance=np.array([70, 2], np.int32)),), engine=engine)
    assert rollout.tokens.tolist() == [70, 2]
    assert rollout.finish_reason is FinishReason.STOP


def test_a_rollout_of_a_file_asks_no_engine_and_counts_as_a_policys() -> None:
    log_probs = np.array([-0.5, -2.0, -0.25], np.float32)
    whole = RolloutPlan(
        guidance=np.array([70, 71, 2], np.int32), guidance_log_probs=log_probs, max_new_tokens=0
    )
    cut = replace(whole, guidance=np.array([70, 71, 72], np.int32))
    engine = FakeEngine()
    first, second = rollouts_of((whole, cut), engine=engine)
    assert engine.asked == []
    assert first.log_probs.tolist() == log_probs.tolist()
    assert first.origins.tolist() == [Origin.POLICY] * 3
    assert first.versions.tolist() == [-1] * 3
    assert first.text == "FG\x02"
    assert [r.finish_reason for r in (first, second)] == [FinishReason.STOP, FinishReason.LENGTH]


def test_seeds_follow_group_wave_and_place_so_that_a_retry_asks_for_the_same() -> None:
    waves = (
        (RolloutPlan(), RolloutPlan()),
        (
            RolloutPlan(),
            RolloutPlan(continues=Prefix(rollout=0, end=4), replaces=True),
            RolloutPlan(),
        ),
    )
    engine, again = FakeEngine(), FakeEngine()
    first, second = rollouts_of(*waves, engine=engine), rollouts_of(*waves, engine=again)
    assert [seed_of(request) for request in engine.asked] == [
        rollout_seed(7, 5, wave, index) for wave, index in [(0, 0), (0, 1), (1, 2), (1, 0), (1, 3)]
    ]
    assert [r.tokens.tolist() for r in first] == [r.tokens.tolist() for r in second]


def seed_of(request: SampleRequest) -> int:
    return request.seed


def test_scores_between_waves_reach_the_next_plan_and_nothing_is_scored_twice() -> None:
    seen: list[list[float | None]] = []

    def plan(group: Group, state: object) -> tuple[RolloutPlan, ...]:
        seen.append(group.outcomes("answer"))
        return (RolloutPlan(), RolloutPlan()) if len(seen) <= 2 else ()

    class Counting(FakeScorer):
        async def score(self, group, spans):  # type: ignore[no-untyped-def]
            counted.append([span.rollout for span in spans])
            return await super().score(group, spans)

    counted: list[list[int]] = []
    for between, expected in [(True, [[0, 1], [2, 3]]), (False, [[0, 1, 2, 3]])]:
        seen.clear()
        counted.clear()
        pipeline = replace(a_pipeline(), plan=plan, scores_between_waves=between)
        common = GroupRecipe(
            pipeline=pipeline,
            sampling=SAMPLING,
            run_seed=7,
            engine=FakeEngine(),
            tokenizer=FakeTokenizer(),
            scorers={"answer": ScorerRole(scorer=Counting(), stop_on_failure=False)},
        )
        done = asyncio.run(run_group(common, 5, a_prompt(0), None))
        assert isinstance(done, FinishedGroup)
        assert counted == expected
        assert [None in outcomes for outcomes in seen[1:]] == [not between] * 2
        assert None not in done.group.outcomes("answer")


def test_what_was_said_of_a_replaced_rollout_is_forgotten_and_the_new_one_is_scored() -> None:
    more = (RolloutPlan(continues=Prefix(rollout=0, end=4), replaces=True),)
    done = ran(a_pipeline((RolloutPlan(), RolloutPlan()), more, scores_between_waves=True))
    assert isinstance(done, FinishedGroup)
    spans = [(score.span.rollout, score.span.end) for score in done.group.scores]
    assert sorted(spans) == [(0, 8), (1, 4)]


def test_a_failed_score_between_waves_ends_the_group_before_the_next_wave() -> None:
    engine = FakeEngine()
    pipeline = a_pipeline((RolloutPlan(),), (RolloutPlan(),), scores_between_waves=True)
    common = GroupRecipe(
        pipeline=pipeline,
        sampling=SAMPLING,
        run_seed=7,
        engine=engine,
        tokenizer=FakeTokenizer(),
        scorers={
            "answer": ScorerRole(scorer=FakeScorer(failing=frozenset({5})), stop_on_failure=False)
        },
    )
    done = asyncio.run(run_group(common, 5, a_prompt(0), None))
    assert isinstance(done, DroppedGroup)
    assert done.dropped.reason == "failed_score"
    assert len(engine.asked) == 1


def test_a_prompt_that_is_skipped_costs_nothing() -> None:
    def known(prompt: object, state: object) -> str | None:
        return "all_right_last_time"

    def never(prompt: object, state: object) -> str | None:
        return None

    engine = FakeEngine()
    done = ran(a_pipeline((RolloutPlan(),), skip=(never, known)), engine)
    assert isinstance(done, DroppedGroup)
    assert (done.dropped.reason, done.dropped.is_planned) == ("all_right_last_time", True)
    assert engine.asked == []


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RolloutPlan(continues=Prefix(rollout=3, end=0)), "continues rollout 3"),
        (RolloutPlan(continues=Prefix(rollout=0, end=5)), "after 5 tokens; it has 4"),
    ],
)
def test_a_plan_that_continues_what_is_not_there_is_refused(
    plan: RolloutPlan, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rollouts_of((RolloutPlan(),), (plan,))


def test_two_plans_cannot_replace_the_same_rollout() -> None:
    plan = RolloutPlan(continues=Prefix(rollout=0, end=1), replaces=True)
    with pytest.raises(ValueError, match="only once"):
        rollouts_of((RolloutPlan(),), (plan, plan))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replaces": True}, "continues none"),
        ({"text": "hi", "continues": Prefix(rollout=0, end=1)}, "another prompt's tokens"),
        ({"trains_on_prompt": True}, "it has none"),
        ({"max_new_tokens": -1}, "expected 0 or more"),
        ({"guidance_log_probs": np.zeros(2, np.float32)}, "0 given tokens have 2"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutPlan(**settings)  # type: ignore[arg-type]
