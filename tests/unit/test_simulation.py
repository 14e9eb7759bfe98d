"""`covey simulate`: the schedule is what a hand-made one says, and no group is lost."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grpo.errors import Fatal, Stalled, UserError
from grpo.types import Rollout, SampleRequest, WeightRef
from orchestration.cli import main
from orchestration.driver import TrainedStep
from orchestration.recipe import Recipe
from orchestration.simulation.clock import SimulatedLoop
from orchestration.simulation.engine import STOP, SimulatedEngine, random_tokens
from orchestration.simulation.measured import measured
from orchestration.simulation.report import SimulationReport, advice
from orchestration.simulation.run import Ledger, _Simulation, simulated
from orchestration.simulation.services import ServiceCpu, long_tailed_lengths, services
from tests.unit.small_project import written_project

# 2 groups of 4 rollouts of 1,000 tokens at 100 tokens/s in 8 places: 10 s to generate a step.
# 8 * (1,000 + 10) tokens at 808 tokens/s: 10 s to learn it.
EVEN = {
    "mean_tokens": 1000,
    "spread": 0,
    "prompt_tokens": 10,
    "worker_tokens_per_s": 800,
    "worker_rollouts": 8,
    "learner_tokens_per_s": 808,
    "scorer_s": 0,
    "publish_s": 0,
    "load_s": 0,
}
# Rollouts of about 5 s, of up to 40.
UNEVEN = {**EVEN, "mean_tokens": 500, "spread": 1.0, "scorer_s": 0.1, "load_s": 0.2}


def a_recipe(simulation: dict[str, Any], algorithm: str = "grpo", **changed: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "simulated",
        "model": "none",
        "data": {"train": "none"},
        "steps": 12,
        "num_prompts_per_step": 2,
        "algorithm": {"name": algorithm, "num_generations": 4},
        "scorers": [{"name": "answer", "rule": "exact"}],
        "sampling": {"max_completion_length": 4000},
        "simulation": simulation,
    }
    return Recipe.model_validate({**settings, **changed})


def report_of(recipe: Recipe) -> SimulationReport:
    return simulated(recipe, services(recipe), lambda step, now_s: None)


def test_an_hour_passes_at_once() -> None:
    async def hour() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600.0):
                await asyncio.sleep(7200.0)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        assert runner.run(hour()) == pytest.approx(3600.0)
    assert time.monotonic() - began < 5.0


def test_waiting_for_nothing_is_an_error_and_no_hang() -> None:
    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stalled, match="waits for nothing"):
        loop = SimulatedLoop()
        task = loop.create_task(never())
        try:
            loop.run_until_complete(task)
        finally:
            task.cancel()
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.close()


def test_synchronous_steps_last_as_long_as_generation_and_learning_together() -> None:
    found = report_of(a_recipe(EVEN))
    assert (found.generation_s, found.learning_s) == pytest.approx((10.0, 10.0))
    assert found.step_s == pytest.approx(20.0)
    assert found.efficiency == pytest.approx(2.0)
    assert found.wall_s == pytest.approx(12 * 20.0)
    assert (found.staleness_mean, found.staleness_max) == (0, 0)


def test_with_staleness_1_steps_last_as_long_as_the_longer_of_the_two() -> None:
    # No token of a step is of the learner's version, so 4 rollouts of 32 fresh ones are compared:
    # 0.32 s to sample them, and a forward pass of 4 * (32 + 10) tokens at 3 * 808 tokens/s.
    both = report_of(a_recipe(EVEN, max_staleness=1))
    assert both.step_s == pytest.approx(10.0 + 0.32 + 168 / 2424)
    slow = {**EVEN, "learner_tokens_per_s": 404}
    found = report_of(a_recipe(slow, max_staleness=1))
    assert found.step_s == pytest.approx(20.0 + 0.32 + 168 / 1212)


def test_the_learner_waits_for_publishing_and_loading() -> None:
    found = report_of(a_recipe({**EVEN, "publish_s": 3.0, "load_s": 2.0, "scorer_s": 0.5}))
    # Two groups one after the other at one scorer: 1 s.
    assert found.step_s == pytest.approx(10.0 + 1.0 + 10.0 + 3.0 + 2.0)
    assert found.learner_waits_s == pytest.approx(16.0)
    assert found.group_waits_s == pytest.approx(0.25)  # the first of the two for the second


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_groups_are_never_staler_than_the_bound(bound: int) -> None:
    found = report_of(a_recipe(UNEVEN, max_staleness=bound, steps=40))
    assert found.staleness_max <= bound
    assert (found.staleness_mean > 0) == (bound > 0)


class TrainedLengths(_Simulation):
    """Remembers the groups of every step: id and tokens."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, services(recipe), lambda step, now_s: None)
        self.steps: list[list[tuple[int, int]]] = []

    def trained(self, step: TrainedStep) -> None:
        groups = [done.group for done in step.groups]
        self.steps.append([(g.id, sum(r.num_tokens for r in g.rollouts)) for g in groups])
        super().trained(step)


@pytest.mark.parametrize("window", [1, 4])
def test_no_step_prefers_short_answers(window: int) -> None:
    """A straggler is passed by window - 1 groups, so steps train on a prefix of the admitted ones.

    By the 80th step as by the 40th, the lengths trained on are those of the groups admitted first.
    """
    count, steps = 4, 80
    spread = {**UNEVEN, "spread": 1.5}
    recipe = a_recipe(
        spread, max_staleness=2, window=window, num_prompts_per_step=count, steps=steps
    )
    run = TrainedLengths(recipe)
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(run.run())
    tokens = {group: size for step in run.steps for group, size in step}
    assert sorted(tokens) != [group for step in run.steps for group, _ in step] or window == 1
    for done in range(1, steps + 1):
        trained = {group for step in run.steps[:done] for group, _ in step}
        assert len(set(range(done * count)) - trained) <= window - 1
    half = [size for step in run.steps[: steps // 2] for _, size in step]
    first = [tokens[group] for group in range(len(half))]
    assert np.mean(half) == pytest.approx(np.mean(first), rel=0.02)
    assert np.percentile(half, [50, 90]) == pytest.approx(np.percentile(first, [50, 90]), rel=0.05)


def test_the_same_seed_gives_the_same_report_and_another_one_does_not() -> None:
    def figures(seed: int) -> dict[str, Any]:
        found = asdict(report_of(a_recipe(UNEVEN, max_staleness=1, seed=seed)))
        return {k: v for k, v in found.items() if k not in ("driver_cpu_s", "peak_memory_mib")}

    assert figures(1) == figures(1)
    assert figures(1)["wall_s"] != figures(2)["wall_s"]


def test_every_group_is_trained_or_dropped_once_or_under_way_at_the_end() -> None:
    found = report_of(a_recipe({**UNEVEN, "constant_share": 0.4}, "dapo", max_staleness=1))
    assert found.trained_groups == 12 * 2
    assert 8 <= found.dropped_groups <= 24  # 0.4 of all, which are 24 / 0.6
    assert 0 <= found.unfinished_groups <= 4
    assert found.trained_rollouts == 12 * 2 * 4


def test_the_ledger_names_groups_that_are_lost_and_refuses_a_second_end() -> None:
    ledger = Ledger()
    ledger.write(0, Ledger.TRAINED)
    ledger.write(3, Ledger.DROPPED)
    assert ledger.lost(admitted=6, unfinished=[4]) == [1, 2, 5]
    assert (ledger.count(Ledger.TRAINED), ledger.count(Ledger.DROPPED)) == (1, 1)
    with pytest.raises(AssertionError, match="group 3 ended twice"):
        ledger.write(3, Ledger.TRAINED)


def test_a_worker_that_misses_its_deadline_ends_the_run_as_it_would_a_real_one() -> None:
    with pytest.raises(Fatal, match=r"sampling 4 rollouts of group [01] failed 4 times"):
        report_of(a_recipe(EVEN, alarms={"worker_s": 9.0, "stall_s": 100.0}))


def test_rollouts_in_flight_pause_for_new_weights_and_go_on_with_them() -> None:
    async def swapped() -> tuple[list[Rollout], float]:
        recipe = a_recipe({**EVEN, "worker_rollouts": 1, "worker_tokens_per_s": 100, "load_s": 2})
        engine = SimulatedEngine(services(recipe), ServiceCpu(), random_tokens(4000))
        requests = [
            SampleRequest(
                group=0,
                index=index,
                context=np.zeros(1, np.int32),
                guidance=np.zeros(0, np.int32),
                sampling=recipe.sampling.drawn(),
                seed=index,
            )
            for index in range(2)
        ]
        sampling = asyncio.create_task(engine.sample(requests))
        await asyncio.sleep(4.0)
        await engine.load_weights(WeightRef(version=1, num_bytes=0, checksum=1, location=None))
        assert engine.busy_s == pytest.approx(4.0)
        return await sampling, asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        (first, second), ended_s = runner.run(swapped())
    # One place: 10 s, 10 s, and the pause of 2 s.
    assert ended_s == pytest.approx(22.0)
    assert (first.versions == 0).sum() == pytest.approx(400, abs=1)
    assert first.versions[-1] == 1
    assert (second.versions == 1).all()
    assert first.tokens[-1] == STOP


def test_long_tailed_lengths_have_the_mean_and_a_tail() -> None:
    lengths = np.array(long_tailed_lengths(1000, 0.8))
    assert lengths.mean() == pytest.approx(1000, rel=0.02)
    # exp(1.645 * 0.8 - 0.32) = 2.7 times the mean is passed by one in 20
    assert (lengths > 2707).mean() == pytest.approx(0.05, abs=0.005)
    assert set(long_tailed_lengths(7, 0)) == {7}


def test_advice_names_the_part_that_limits_the_step() -> None:
    def told(bound: int = 1, **changed: float) -> str:
        return advice(report_of(a_recipe({**EVEN, **changed}, max_staleness=bound)))

    assert told(bound=0).startswith("generation")
    assert "take turns: with max_staleness: 1" in told(bound=0)
    assert told(learner_tokens_per_s=200).startswith("the learner limits")
    workers = told(learner_tokens_per_s=8080)
    assert workers.startswith("rollout workers limit")
    assert workers.endswith("10 workers would generate as fast as it learns")
    assert told(scorer_s=30).startswith("a scorer limits")
    assert told(worker_rollouts=64, worker_tokens_per_s=6400, learner_tokens_per_s=8080).startswith(
        "too few rollouts limit"
    )


def a_run(folder: Path) -> Path:
    """Two steps of a run with 2 workers: 10 s of sampling, twice 100 tokens in the longest."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump(a_recipe({}, rollout={"workers": 2}).model_dump(mode="json"))
    )
    steps = [
        {"step": 1, "num_tokens": 330.0, "timing_s/train": 3.0},
        {"step": 1, "eval/pass@1": 0.5},
        {"step": 2, "num_tokens": 330.0, "timing_s/train": 3.0},
    ]
    sync = {"timing_s/sync/publish": 0.25, "timing_s/sync/load": 0.5}
    lines = [step | sync if "num_tokens" in step else step for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = [
        {
            "group": number,
            "prompt": {"num_tokens": 15},
            "times": {"admitted": begin, "generated": begin + 10.0, "scored": begin + 11.0},
            "rollouts": [
                {"tokens": [3] * size, "scores": {"answer": float(number * size == 50)}}
                for size in (100, 50)
            ],
        }
        for number, begin in enumerate((0.0, 500.0))
    ]
    text = "".join(json.dumps(group) + "\n" for group in groups)
    (folder / "groups.jsonl").write_text(text + '{"torn')
    return folder


def test_service_times_of_a_run_are_those_of_its_records(tmp_path: Path) -> None:
    found = measured(a_run(tmp_path / "run"), workers=2)
    assert found.settings == {
        "worker_tokens_per_s": 300 / 20 / 2,  # the 490 s between the groups do not count
        "worker_rollouts": 1,  # 7.5 tokens/s of a worker, and 10 of a rollout
        "prompt_tokens": 15,
        "scorer_s": 1.0,
        "constant_share": 0.5,  # group 0 scored 0 twice, group 1 once 0 and once 1
        "learner_tokens_per_s": 110.0,
        "publish_s": 0.25,
        "load_s": 0.5,
    }
    assert found.lengths == [[50, 100], [50, 100]]


def test_the_command_simulates_like_a_run_and_leaves_what_was_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written_project(tmp_path)
    (tmp_path / "train.jsonl").unlink()  # a simulation needs neither data nor model
    run = a_run(tmp_path / "run")
    words = ["simulate", str(recipe), "--like", str(run), "--steps", "3", "--workers", "2"]
    assert main([*words, "--json", "--set", "simulation.scorer_s=0.125"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["workers"], found["steps"], found["trained_groups"]) == (2, 3, 24)
    assert found["services"]["scorer_s"] == 0.125
    assert found["services"]["learner_tokens_per_s"] == 110.0
    assert "simulation.scorer_s" not in shown.err
    assert main([*words[:2], "--steps", "3"]) == 0
    assert "asynchronous efficiency" in capsys.readouterr().out


def test_a_run_that_has_not_trained_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"found 0 steps in metrics\.jsonl and 2 groups"):
        measured(run, workers=2)
    (run / "groups.jsonl").unlink()
    with pytest.raises(UserError, match=r"groups\.jsonl cannot be read"):
        measured(run, workers=2)


def test_mistakes_of_the_command_line_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "grpo", "--like", "no-such-run"]) == 2
    assert "no-such-run: there is no such run" in capsys.readouterr().err
    assert main(["simulate", "grpo", "--set", "simulation.speed=3"]) == 2
    assert "simulation.speed: unknown setting" in capsys.readouterr().err
