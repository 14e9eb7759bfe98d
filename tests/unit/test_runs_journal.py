"""What the journal makes of groups that fell out: dropped and skipped ones are counted apart."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from grpo.types import Prompt
from orchestration.data_metrics import DataMetrics
from orchestration.display import Display
from orchestration.journal import RunJournal
from orchestration.prompt_order import PromptOrder
from orchestration.prompts import PromptSet
from orchestration.run_directory import RunDirectory
from orchestration.telemetry import PhaseClock, Telemetry
from tests.fakes import FakeScorer, a_prompt
from tests.unit.driver_setting import Setting, a_pipeline, a_schedule


def in_a_domain(number: int) -> Prompt:
    return replace(a_prompt(number), domain="threes" if number % 3 == 0 else "rest")


PROMPTS = PromptSet(name="numbers", prompts=tuple(map(in_a_domain, range(20))))


def skip_odd(prompt: Prompt, state: object) -> str | None:
    return "odd" if int(prompt.text) % 2 else None


@pytest.fixture
def journal(tmp_path: Path) -> RunJournal:
    """Of a run of two steps of three groups; odd prompts are skipped, group 2 cannot be scored."""
    now = datetime(2026, 1, 2, 3, 4, 5)
    run = RunDirectory.create(tmp_path, "demo", now=now, config={}, versions={})
    pipeline = replace(a_pipeline(), skip=(skip_odd,))
    setting = Setting(
        a_schedule(steps=2, replayed_per_step=1, replay_steps=1),
        pipeline=pipeline,
        scorer=FakeScorer(failing=frozenset({2})),
    )
    with Display.open() as display:
        written = RunJournal(
            run=run,
            telemetry=Telemetry(run, []),
            display=display,
            clock=PhaseClock(),
            pipeline=pipeline,
            data=DataMetrics(PromptOrder([PROMPTS], seed=0, shuffle=False)),
            total_steps=2,
        )
        setting.driver._journal = written
        setting.driver._prompt_at = in_a_domain
        assert asyncio.run(setting.driver.run())
    run.close()
    return written


def lines(path: Path, name: str) -> list[dict[str, object]]:
    (file,) = path.rglob(name)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_skipped_prompts_are_counted_apart_from_dropped_groups(
    journal: RunJournal, tmp_path: Path
) -> None:
    assert journal.dropped_by_reason == {"failed_score": 1}
    assert set(journal.skipped_by_reason) == {"odd"}
    metrics = lines(tmp_path, "metrics.jsonl")
    assert sum(step["dropped"] for step in metrics) == 1
    assert sum(step.get("skipped/odd", 0) for step in metrics) >= 6
    assert all("dropped/odd" not in step for step in metrics)
    assert metrics[0]["scorers/answer/hit_rate"] == 0.25
    assert [step["data/numbers/epoch"] for step in metrics] == [0.35, 0.65]  # groups 6 and 12


def test_groups_are_counted_by_the_domain_of_their_prompts(
    journal: RunJournal, tmp_path: Path
) -> None:
    metrics, records = lines(tmp_path, "metrics.jsonl"), lines(tmp_path, "groups.jsonl")
    for step in metrics:
        own = [r for r in records if r["step"] == step["step"] and "dropped" not in r]
        for name in ("threes", "rest"):
            found = [r for r in own if r["prompt"]["domain"] == name]
            rewards = [rollout["reward"] for r in found for rollout in r["rollouts"]]
            assert step[f"domain/{name}/groups"] == len(found) > 0
            assert step[f"domain/{name}/reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert [step["domain/rest/dropped"] for step in metrics] == [1, 0]  # group 2
    assert [step["domain/threes/dropped"] for step in metrics] == [0, 0]
    assert sum(step.get("domain/threes/skipped", 0) for step in metrics) >= 2  # groups 3 and 9


def test_a_group_that_is_trained_on_again_has_a_record_of_its_own(
    journal: RunJournal, tmp_path: Path
) -> None:
    records = [r for r in lines(tmp_path, "groups.jsonl") if "dropped" not in r]
    assert [(r["step"], "replayed" in r) for r in records].count((2, True)) == 1
    assert sorted(r["group"] for r in records if "replayed" not in r) == [0, 4, 6, 8, 10, 12]
