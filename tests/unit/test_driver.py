"""The driver's loops against fakes: order, staleness, drops, stops and resumes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from grpo.errors import DeadlineExceeded, Fatal, PromptTooLong, Stalled, WeightMismatch
from grpo.types import LoadReport, WeightRef
from orchestration.group_task import rollout_seed
from orchestration.progress import Progress
from tests.fakes import FakeEngine, FakeScorer
from tests.unit.driver_setting import Setting, a_schedule, root


def test_synchronous_run_trains_every_group_once_in_order_and_always_fresh() -> None:
    setting = Setting(a_schedule())
    assert setting.run()
    assert setting.learner.trained_groups == list(range(12))
    assert [step.metrics["staleness/max"] for step in setting.journal.steps] == [0.0] * 4
    assert [batch.version for batch in setting.learner.batches] == [0, 1, 2, 3]
    assert setting.engine.version == 4


@pytest.mark.parametrize("bound", [1, 2])
def test_overlapping_run_trains_the_same_groups_and_keeps_the_bound(bound: int) -> None:
    setting = Setting(a_schedule(max_staleness=bound, steps=6))
    assert setting.run()
    assert setting.learner.trained_groups == list(range(18))
    ages = [step.metrics["staleness/max"] for step in setting.journal.steps]
    assert max(ages) == bound


def test_generation_goes_on_while_the_learner_trains_only_if_the_bound_allows_it() -> None:
    """Holds the learner inside a step and looks at what the engine was asked meanwhile."""

    async def asked_during_step(bound: int) -> int:
        setting = Setting(a_schedule(max_staleness=bound))
        inside, go_on = asyncio.Event(), asyncio.Event()
        train = setting.learner.train

        async def slow_train(batch):  # type: ignore[no-untyped-def]
            inside.set()
            await go_on.wait()
            return await train(batch)

        setting.learner.train = slow_train  # type: ignore[method-assign]
        running = asyncio.ensure_future(setting.driver.run())
        await inside.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        asked = {request.group for request in setting.engine.asked}
        go_on.set()
        await running
        return len(asked)

    assert asyncio.run(asked_during_step(0)) == 3
    assert asyncio.run(asked_during_step(1)) == 6


def test_groups_without_a_score_are_dropped_with_the_reason_and_replaced() -> None:
    setting = Setting(a_schedule(), scorer=FakeScorer(failing=frozenset({1, 5})))
    assert setting.run()
    assert setting.learner.trained_groups == [0, 2, 3, 4, *range(6, 14)]
    assert [fallen.dropped.reason for fallen in setting.journal.fallen] == ["failed_score"] * 2
    assert "broken" in setting.journal.fallen[0].dropped.detail


def test_a_failed_score_ends_the_run_where_the_recipe_says_stop() -> None:
    setting = Setting(a_schedule(), scorer=FakeScorer(failing=frozenset({1})), stop_on_failure=True)
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    assert isinstance(root(raised.value), Fatal)
    assert "broken" in str(root(raised.value))


def test_a_prompt_that_no_engine_takes_is_dropped_not_fatal() -> None:
    engine = FakeEngine(failures=[PromptTooLong("9 tokens, 8 fit")])
    setting = Setting(a_schedule(), engine=engine)
    assert setting.run()
    assert setting.journal.fallen[0].dropped.reason == "PromptTooLong"
    assert len(setting.learner.trained_groups) == 12


def test_a_run_in_which_nothing_survives_stops_and_names_the_commonest_reason() -> None:
    setting = Setting(a_schedule(), scorer=FakeScorer(failing=frozenset(range(10_000))))
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    error = root(raised.value)
    assert isinstance(error, Fatal)
    assert "'failed_score'" in str(error)
    assert "alarms.dropped_rate" in str(error)


def test_dapo_never_trains_on_a_group_whose_outcomes_are_equal() -> None:
    setting = Setting(a_schedule(steps=12), algorithm="dapo")
    assert setting.run()
    dropped = {fallen.group.id for fallen in setting.journal.fallen}
    assert dropped, "with four coin flips some group must be constant"
    assert dropped.isdisjoint(setting.learner.trained_groups)
    for step in setting.journal.steps:
        assert step.metrics["frac_reward_zero_std"] == 0.0


def test_a_requested_stop_writes_a_checkpoint_from_which_the_rest_is_trained_once() -> None:
    whole = Setting(a_schedule(checkpoint_every=1))
    whole.run()
    for stop_after in (1, 2, 3):
        first = Setting(a_schedule(checkpoint_every=1))

        def stop(progress: Progress, at: int = stop_after, first: Setting = first) -> None:
            if progress.step == at:
                first.driver.request_stop()

        first.after_checkpoint = stop
        assert not first.run()
        saved = first.checkpoints[-1]
        assert saved.step == stop_after
        second = Setting(a_schedule(checkpoint_every=1), progress=saved)
        assert second.run()
        both = first.learner.trained_groups + second.learner.trained_groups
        assert both == whole.learner.trained_groups
        rows = [tokens_of(s) for s in (first, second)]
        assert np.array_equal(np.concatenate(rows), tokens_of(whole))


def tokens_of(setting: Setting) -> np.ndarray:
    return np.concatenate(
        [
            row.tokens
            for batch in setting.learner.batches
            for update in batch.updates
            for row in update
        ]
    )


def test_unfinished_groups_of_an_overlapping_run_are_sampled_again_after_a_resume() -> None:
    first = Setting(a_schedule(max_staleness=2, checkpoint_every=1))
    first.after_checkpoint = lambda progress: (
        first.driver.request_stop() if progress.step == 1 else None
    )
    assert not first.run()
    saved = first.checkpoints[-1]
    second = Setting(a_schedule(max_staleness=2), progress=saved)
    assert second.run()
    assert first.learner.trained_groups + second.learner.trained_groups == list(range(12))


def test_damaged_weights_end_the_run() -> None:
    class Damaging(FakeEngine):
        async def load_weights(self, ref: WeightRef) -> LoadReport:
            report = await super().load_weights(ref)
            return LoadReport(version=report.version, checksum=0xBAD, timings_s={})

    with pytest.raises(ExceptionGroup) as raised:
        Setting(a_schedule(), engine=Damaging()).run()
    assert isinstance(root(raised.value), WeightMismatch)


def test_an_engine_that_samples_from_other_weights_trips_the_alarm_in_an_overlapping_run() -> None:
    """No token of the step is of the learner's version: a fresh probe finds it."""
    setting = Setting(a_schedule(max_staleness=1))

    async def other_weights(rows):  # type: ignore[no-untyped-def]
        return [[-3.0] * len(row.tokens) for row in rows]

    setting.learner.log_probs = other_weights  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    assert "alarms.log_prob_gap" in str(root(raised.value))


def test_an_engine_that_hangs_is_named_when_the_deadline_passes() -> None:
    async def scenario() -> None:
        engine = FakeEngine(gate=asyncio.Event())
        await Setting(a_schedule(take_deadline_s=0.05), engine=engine).driver.run()

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(scenario())
    error = root(raised.value)
    assert isinstance(error, Stalled)
    assert "waiting for 3 finished groups" in str(error)
    assert "groups in progress: 0, 1, 2" in str(error)


def test_a_group_that_ends_begins_the_deadline_anew() -> None:
    """The deadline passes twice while groups end one at a time; only silence is a stall."""

    async def scenario() -> bool:
        gate = asyncio.Event()
        engine = FakeEngine(gate=gate)
        setting = Setting(a_schedule(take_deadline_s=0.2, steps=1), engine=engine)
        within = setting.driver._waits.within
        expired = 0

        async def expiring(seconds, name, awaitable, **options):  # type: ignore[no-untyped-def]
            """The first two waits for groups end at once, each after a group has ended."""
            nonlocal expired
            if "finished groups" in name and expired < 2:
                expired += 1
                awaitable.close()
                setting.driver._last_progress += 1.0
                raise DeadlineExceeded(name)
            gate.set()
            return await within(5.0, name, awaitable, **options)

        setting.driver._waits.within = expiring  # type: ignore[method-assign]
        return await setting.driver.run() and expired == 2

    assert asyncio.run(scenario())


def test_a_checkpoint_is_written_before_the_evaluation_that_might_fail() -> None:
    setting = Setting(a_schedule(checkpoint_every=2, evaluate_every=2))

    async def failing(progress: Progress) -> None:
        raise Fatal("too many failed scores")

    setting.driver._evaluate = failing
    with pytest.raises(ExceptionGroup):
        setting.run()
    assert [progress.step for progress in setting.checkpoints] == [2]


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_evaluation_has_the_engines_for_itself_in_a_synchronous_run_only(staleness: int) -> None:
    setting = Setting(a_schedule(evaluate_every=2, max_staleness=staleness))
    assert setting.run()
    (in_progress,) = setting.in_progress_at_evaluation  # of step 2; the end has its own
    assert bool(in_progress) == (staleness > 0)


def test_tokens_of_dropped_groups_are_counted_as_sampled() -> None:
    setting = Setting(a_schedule(steps=1), scorer=FakeScorer(failing=frozenset({1})))
    setting.run()
    assert setting.driver.progress.num_tokens == 4 * 4 * 4  # 4 groups, 4 rollouts, 4 tokens


def test_rollout_seeds_differ_in_every_part_and_are_the_same_twice() -> None:
    parts = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]
    seeds = [rollout_seed(*part) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [rollout_seed(*part) for part in parts]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_group_that_falls_out_while_a_step_ends_is_recorded_or_pending_but_not_both() -> None:
    """It falls out while the scorers say how they fare, just before the step is written down."""

    async def scenario() -> Setting:
        ending = asyncio.Event()

        class Refusing(FakeEngine):
            async def sample(self, requests):  # type: ignore[no-untyped-def]
                if requests[0].group == 4:  # of the second step, under way during the first
                    await ending.wait()
                    raise PromptTooLong("9 tokens, 8 fit")
                return await super().sample(requests)

        schedule = a_schedule(max_staleness=1, steps=2, checkpoint_every=1)
        setting = Setting(schedule, engine=Refusing())

        async def scorer_metrics() -> dict[str, float]:
            ending.set()
            while not setting.journal.fallen:
                await asyncio.sleep(0)
            return {}

        setting.driver._scorer_metrics = scorer_metrics
        await setting.driver.run()
        return setting

    setting = asyncio.run(scenario())
    assert [fallen.group.id for fallen in setting.journal.fallen] == [4]
    assert 4 not in setting.checkpoints[0].pending
