"""What a step does beside training: measures, stages, replay, skipped prompts, learning scorers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo.batch import plain_rows
from grpo.errors import Fatal, StateLost, WorkerLost
from grpo.pipeline import Measured, RewardedGroup, Stage
from grpo.types import Float64, Group, Prompt, Span, TrainRow
from orchestration.measuring import measure_requests
from orchestration.scorer_pool import ScorerPool, ScorerWorker, scorer_metrics
from orchestration.stage import WaitingRows, stage_batch
from tests.fakes import FakeScorer
from tests.unit.driver_setting import Setting, a_pipeline, a_schedule, root
from tests.unit.grpo_groups import random_groups, rollout, scored
from tests.unit.pool_setting import started_pool


def measured_reward(group: Group, state: object) -> Float64:
    return np.array([rollout.measured["surprise"].mean() for rollout in group.rollouts])


def places(group: Group, state: object) -> Float64:
    return np.arange(len(group.rollouts)) / 100


def other_places(group: Group, state: object) -> Float64:
    return -np.arange(len(group.rollouts), dtype=np.float64)


def test_what_the_learner_measures_is_there_when_rewards_are_formed() -> None:
    pipeline = replace(
        a_pipeline(), measures=(Measured(name="surprise"),), rewards=(measured_reward,)
    )
    setting = Setting(a_schedule(steps=2), pipeline=pipeline)
    assert setting.run()
    for version, step in enumerate(setting.journal.steps):
        for item in step.built.rewarded:  # FakeLearner: version + place
            assert item.rewards.tolist() == [version + place for place in range(4)]
        for done in step.groups:  # and so the records can show it
            assert "surprise" in done.group.rollouts[0].measured
        assert step.metrics["timing_s/measure"] >= 0
    first = setting.learner.measured[0]
    assert [rows[0].group for rows in first.groups] == [0, 1, 2]
    assert all((row.weights == 1).all() for rows in first.groups for row in rows)
    assert all(np.isnan(labels).all() for labels in first.labels)


def test_a_known_reference_travels_with_the_rows() -> None:
    pipeline = replace(a_pipeline(), measures=(Measured(name="reference"),))
    setting = Setting(a_schedule(steps=1), pipeline=pipeline)
    setting.run()
    (update,) = setting.learner.batches[0].updates
    for row in update:
        assert row.reference_log_probs is not None
        assert row.reference_log_probs.tolist() == [row.index] * 4


def test_measures_share_one_request_for_each_way_to_label() -> None:
    pipeline = replace(
        a_pipeline(),
        measures=(
            Measured(name="a"),
            Measured(name="b", labels=places),
            Measured(name="c", labels=other_places),
            Measured(name="d", labels=places),
        ),
    )
    groups = random_groups(0, num_groups=2, num_generations=3)
    requests = measure_requests(pipeline, groups, None)
    assert [request.names for request in requests] == [("b", "d", "a"), ("c",)]
    assert requests[0].labels[1].tolist() == [0.0, 0.01, 0.02]
    assert requests[1].labels[1].tolist() == [0.0, -1.0, -2.0]
    assert measure_requests(a_pipeline(), groups, None) == []


def best_row(item: RewardedGroup, state: object) -> tuple[TrainRow, ...]:
    """The first two rollouts of every group, as a pair of its own."""
    return tuple(plain_rows(item.group)[:2])


def staged(every: int = 2, groups_per_update: int = 4) -> Stage:
    return Stage(
        every=every,
        collect=best_row,
        groups_per_update=groups_per_update,
        learning_rate_scale=0.5,
    )


def test_a_stage_trains_what_the_steps_left_and_forgets_it() -> None:
    setting = Setting(a_schedule(steps=5), pipeline=replace(a_pipeline(), stage=staged()))
    assert setting.run()
    batches = setting.learner.batches
    assert [batch.is_stage for batch in batches] == [False, False, True, False, False, True, False]
    stage = batches[2]
    assert (stage.step, stage.version, stage.learning_rate_scale) == (2, 2, 0.5)
    # Six groups left two rows each; four groups make an update and their rows stay together.
    assert [[row.group for row in update] for update in stage.updates] == [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [4, 4, 5, 5],
    ]
    assert {row.group for update in batches[5].updates for row in update} == set(range(6, 12))
    waiting = [step.metrics.get("stage/num_rows_waiting") for step in setting.journal.steps]
    assert waiting == [6.0, None, 6.0, None, 6.0]
    assert setting.journal.steps[1].metrics["stage/num_rows"] == 12.0
    assert len(setting.driver.progress.stage_rows) == 6  # of step 5


def test_a_stage_precedes_the_weights_that_are_published() -> None:
    setting = Setting(a_schedule(steps=2), pipeline=replace(a_pipeline(), stage=staged()))
    order: list[str] = []
    train, publish = setting.learner.train, setting.learner.publish

    async def noted_train(batch):  # type: ignore[no-untyped-def]
        order.append("stage" if batch.is_stage else "step")
        return await train(batch)

    async def noted_publish(version):  # type: ignore[no-untyped-def]
        order.append(f"publish {version}")
        return await publish(version)

    setting.learner.train = noted_train  # type: ignore[method-assign]
    setting.learner.publish = noted_publish  # type: ignore[method-assign]
    setting.run()
    assert order == ["step", "publish 1", "step", "stage", "publish 2"]


def test_rows_that_wait_for_their_stage_survive_a_stop() -> None:
    whole = Setting(a_schedule(steps=2), pipeline=replace(a_pipeline(), stage=staged()))
    whole.run()
    first = Setting(
        a_schedule(steps=2, checkpoint_every=1), pipeline=replace(a_pipeline(), stage=staged())
    )
    first.after_checkpoint = lambda progress: first.driver.request_stop()
    assert not first.run()
    second = Setting(
        a_schedule(steps=2),
        pipeline=replace(a_pipeline(), stage=staged()),
        progress=first.checkpoints[-1],
    )
    assert second.run()
    found, expected = second.learner.batches[-1], whole.learner.batches[-1]
    assert found.is_stage
    assert [[(row.group, row.tokens.tolist()) for row in rows] for rows in found.updates] == [
        [(row.group, row.tokens.tolist()) for row in rows] for rows in expected.updates
    ]


def test_a_stage_without_rows_trains_nothing() -> None:
    assert stage_batch(staged(), [], step=2, version=3) is None


def test_rows_come_back_from_a_checkpoint_as_they_were(tmp_path: Path) -> None:
    group = scored([rollout(0, 3, guidance=1), rollout(1, 0), rollout(2, 2)], answer=[1, 0, 0])
    first, empty, last = plain_rows(group)
    known = replace(
        last, reference_log_probs=np.array([-0.5, -1.5], np.float32), is_cross_context=True
    )
    rows = (first, empty, replace(known, context=np.arange(7, dtype=np.int32)))

    async def saved_and_loaded(rows: tuple[TrainRow, ...], folder: Path) -> tuple[TrainRow, ...]:
        folder.mkdir()
        await WaitingRows(rows).save(folder)
        again = WaitingRows()
        await again.load(folder)
        return again.rows

    found = asyncio.run(saved_and_loaded(rows, tmp_path / "a"))
    for ours, theirs in zip(found, rows, strict=True):
        for name in TrainRow.__dataclass_fields__:
            left, right = getattr(ours, name), getattr(theirs, name)
            if isinstance(right, np.ndarray):
                assert left.dtype == right.dtype, name
                assert left.tolist() == right.tolist(), name
            else:
                assert left == right, name
                assert type(left) is type(right), name
    assert asyncio.run(saved_and_loaded((), tmp_path / "b")) == ()


def replaying(steps: int, **changes: int) -> Setting:
    return Setting(
        a_schedule(steps=steps, groups_per_step=3, replayed_per_step=2, replay_steps=2, **changes)
    )


def test_a_share_of_each_step_is_drawn_from_the_steps_before() -> None:
    setting = replaying(5)
    assert setting.run()
    steps = [
        [row.group for row in batch.updates[0] if row.index == 0]
        for batch in setting.learner.batches
    ]
    assert sorted(steps[0]) == [0, 1, 2]  # nothing to draw from yet
    for step, groups in enumerate(steps[1:], start=1):
        fresh = {3 * step, 3 * step + 1, 3 * step + 2}
        again = set(groups) - fresh
        assert len(groups) == 5
        assert fresh <= set(groups)
        assert again <= set(range(3 * (step - 2), 3 * step)), "of the last two steps only"
        assert setting.journal.steps[step].replayed == again
    shares = [step.metrics["replay/share"] for step in setting.journal.steps]
    assert shares == [0.0] + [0.4] * 4
    # What was drawn again is stale by design: the bound is for what was sampled for the step.
    assert {step.metrics["staleness/max"] for step in setting.journal.steps} == {0.0}


def test_replay_draws_by_the_seed() -> None:
    orders = []
    for _ in range(2):
        setting = replaying(4)
        setting.run()
        orders.append(setting.learner.trained_groups)
        orders.append([step.replayed for step in setting.journal.steps])
    assert orders[:2] == orders[2:]


def test_an_algorithms_state_and_its_stage_see_a_group_once() -> None:
    def counted(state, groups, report):  # type: ignore[no-untyped-def]
        return (state or ()) + tuple(item.group.id for item in groups)

    setting = Setting(
        a_schedule(steps=3, replayed_per_step=2, replay_steps=2),
        pipeline=replace(a_pipeline(), adapt=counted, stage=staged(every=10)),
        scorer=FakeScorer(learns=True),
    )
    setting.run()
    assert sorted(setting.driver.progress.algorithm_state) == list(range(9))
    rows = setting.driver.progress.stage_rows
    assert sorted(row.group for row in rows) == sorted(list(range(9)) * 2)


def test_epochs_go_over_the_step_again() -> None:
    setting = Setting(a_schedule(steps=1, updates_per_step=3, epochs_per_step=2))
    setting.run()
    (batch,) = setting.learner.batches
    assert [update[0].group for update in batch.updates] == [0, 1, 2, 0, 1, 2]


def skip_odd(prompt: Prompt, state: object) -> str | None:
    return "odd" if int(prompt.text) % 2 else None


def test_skipped_prompts_are_neither_sampled_nor_an_alarm() -> None:
    setting = Setting(
        a_schedule(steps=6, max_dropped_rate=0.01), pipeline=replace(a_pipeline(), skip=(skip_odd,))
    )
    assert setting.run()
    assert setting.learner.trained_groups == list(range(0, 36, 2))
    assert {request.group % 2 for request in setting.engine.asked} == {0}
    assert all(fallen.dropped.is_planned for fallen in setting.journal.fallen)


def test_a_run_that_skips_everything_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_all(prompt: Prompt, state: object) -> str:
        return "known"

    monkeypatch.setattr("orchestration.driver.MAX_SKIPPED_IN_A_ROW", 50)
    setting = Setting(a_schedule(), pipeline=replace(a_pipeline(), skip=(skip_all,)))
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    error = root(raised.value)
    assert isinstance(error, Fatal)
    assert "50 prompts in a row" in str(error)
    assert "'known'" in str(error)


def test_a_scorer_that_learns_sees_every_group_of_a_step_once() -> None:
    scorer = FakeScorer(learns=True)
    setting = Setting(a_schedule(steps=2), scorer=scorer)
    setting.run()
    assert scorer.learnt == list(range(6))
    assert [step.metrics["scorers/answer/num_learnt"] for step in setting.journal.steps] == [3, 6]
    assert setting.journal.steps[0].metrics["scorers/answer/hit_rate"] == 0.25


def test_a_scorer_that_fails_too_often_ends_the_run_with_its_reason() -> None:
    """Of 24 groups, 8 steps of three, every third fails: above a quarter, below a half."""
    failing = frozenset(range(0, 1000, 3))
    assert Setting(
        a_schedule(steps=12), scorer=FakeScorer(failing=failing), max_failure_rate=0.5
    ).run()
    setting = Setting(
        a_schedule(steps=12), scorer=FakeScorer(failing=failing), max_failure_rate=0.25
    )
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    message = str(root(raised.value))
    assert "'answer' failed 8 of the last 24 groups" in message
    assert "broken" in message
    assert "max_failure_rate" in message


class Fleet:
    """Makes scorers and remembers them."""

    def __init__(self, *ready: FakeScorer) -> None:
        self.made: list[ScorerWorker] = []
        self._ready = list(ready)

    async def spawn(self, place: int) -> ScorerWorker:
        self.made.append(self._ready.pop(0) if self._ready else FakeScorer(learns=True))
        return self.made[-1]

    async def discard(self, worker: ScorerWorker) -> None:
        pass


@asynccontextmanager
async def a_scorer_pool(fleet: Fleet, size: int = 1) -> AsyncIterator[ScorerPool]:
    async with started_pool(fleet, size, role="scorer answer") as pool:
        yield ScorerPool("answer", pool)


class Mortal(FakeScorer):
    """Is lost once it is told so."""

    is_lost = False

    async def score(self, group: Group, spans: Sequence[Span]):  # type: ignore[no-untyped-def]
        if self.is_lost:
            raise WorkerLost("gone")
        return await super().score(group, spans)


SPANS = [Span(rollout=0, start=0, end=1)]
GROUP = scored([rollout(0, 1)])


def test_what_a_scorer_has_learnt_is_never_lost_without_a_word() -> None:
    async def scenario() -> None:
        worker = Mortal(learns=True)
        async with a_scorer_pool(Fleet(worker)) as pool:
            await pool.learn([GROUP])
            worker.is_lost = True
            with pytest.raises(StateLost, match="lost together with what it had learnt"):
                await pool.score(GROUP, SPANS)

    asyncio.run(scenario())


def test_a_fresh_scorer_is_not_saved_in_the_place_of_one_that_had_learnt(tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = Mortal(learns=True)
        async with a_scorer_pool(Fleet(worker)) as pool:
            await pool.learn([GROUP])
            pool.pool.replace(worker, WorkerLost("gone"))
            with pytest.raises(StateLost) as caught:
                await pool.save(tmp_path)
            assert caught.value.owner == "scorer answer"

    asyncio.run(scenario())


def test_a_scorer_that_forgets_goes_on_with_a_worker_that_has_learnt_nothing() -> None:
    async def scenario() -> None:
        fleet = Fleet(Mortal(learns=True))
        async with a_scorer_pool(fleet) as pool:
            pool.forget()  # there is nothing yet
            await pool.learn([GROUP])
            pool.forget()
            await pool.score(GROUP, SPANS)
            assert pool.pool.workers == fleet.made[1:]

    asyncio.run(scenario())


def test_a_scorer_that_is_lost_before_it_has_learnt_is_replaced() -> None:
    async def scenario() -> None:
        worker = Mortal(learns=True)
        worker.is_lost = True
        async with a_scorer_pool(Fleet(worker)) as pool:
            assert [score.failure for score in await pool.score(GROUP, SPANS)] == [None]

    asyncio.run(scenario())


def test_what_was_learnt_is_saved_and_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        fleet = Fleet()
        async with a_scorer_pool(Fleet()) as old, a_scorer_pool(fleet) as new:
            await old.learn([GROUP])
            await old.save(tmp_path)
            await new.load(tmp_path)
        assert fleet.made[0].learnt == [GROUP.id]  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_counters_of_all_actors_add_up_and_a_lost_one_is_left_out() -> None:
    class Counting(FakeScorer):
        async def statistics(self) -> dict[str, float]:
            return {
                "num_scores": 40.0,
                "num_failures": 2.0,
                "num_cached": 10.0,
                "num_calls": 5.0,
                "num_judged": 30.0,
            }

    class Lost(FakeScorer):
        async def statistics(self) -> dict[str, float]:
            raise WorkerLost("gone")

    async def counters() -> dict[str, float]:
        async with a_scorer_pool(Fleet(Counting(), Lost(), Counting()), 3) as pool:
            return await pool.statistics()

    assert scorer_metrics("answer", asyncio.run(counters()), batch_size=8) == {
        "scorers/answer/num_failures": 4.0,
        "scorers/answer/hit_rate": 0.25,
        "scorers/answer/batch_fill": 60 / (10 * 8),
    }
    assert scorer_metrics("answer", {}, batch_size=8) == {}
