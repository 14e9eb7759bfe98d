"""Scorers as Ray actors that die, hang, raise or lie: a group is scored or says why it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from grpo.types import Score
from orchestration.handles import RayScorerSpawner
from orchestration.scorer_pool import ScorerPool
from reward_services.config import ScorerConfig
from tests.unit.pool_setting import started_pool
from tests.unit.scored_groups import whole, written_group

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# What goes wrong once; afterwards, in a new process, all is well.
BEGINNING = """
import ctypes, math, os, pathlib, signal, time
FIRST = pathlib.Path({mark!r})
def reward(completions, **kwargs):
    if not FIRST.exists():
        FIRST.touch()
        {trouble}
    return [float(c) for c in completions]
"""
ALWAYS = """
import os, signal
def reward(completions, **kwargs):
    if "7" in completions:
        {trouble}
    return [float(c) for c in completions]
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    ray.init(
        address="local",  # not one that another test has left or a user has started
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


async def _scored(config: ScorerConfig, texts: list[str]) -> tuple[list[Score], int]:
    """Scores of a group for each text from a pool of actors, and how many actors were lost."""
    async with started_pool(
        RayScorerSpawner(config),
        config.actors,
        role=f"scorer {config.name}",
        retries=config.retries,
        deadline_s=120,
        start_deadline_s=120,
    ) as pool:
        scorer = ScorerPool(config.name, pool)
        groups = [written_group([text], group=i) for i, text in enumerate(texts)]
        scores = await asyncio.gather(*[scorer.score(g, whole(g)) for g in groups])
        return [score for part in scores for score in part], pool.num_replaced


def scored(path: Path, source: str, texts: list[str]) -> tuple[list[Score], int]:
    path.write_text(source)
    config = ScorerConfig(
        name="mine", function=f"{path}:reward", deadline_s=2, retries=1, max_wait_ms=50
    )
    return asyncio.run(_scored(config, texts))


@pytest.mark.parametrize(
    ("trouble", "num_lost"),
    [
        ("os.kill(os.getppid(), signal.SIGKILL)", 1),  # the actor itself, in the middle of a batch
        ("os.kill(os.getpid(), signal.SIGKILL)", 0),
        ("ctypes.CDLL(None).pause()", 0),  # in C code, where no Python exception arrives
        ("os.system('sleep 1000')", 0),
        ("raise OSError('busy')", 0),
        ("return [1.0] * 99", 0),
        ("time.sleep(4); return [0.0] * len(completions)", 0),  # too late, and nobody's any more
    ],
)
def test_trouble_that_passes_costs_no_group(
    cluster: None, tmp_path: Path, trouble: str, num_lost: int
) -> None:
    source = BEGINNING.format(mark=str(tmp_path / "first"), trouble=trouble)
    scores, lost = scored(tmp_path / "r.py", source, ["3", "7", "5"])
    assert [score.value for score in scores] == [3.0, 7.0, 5.0]
    assert lost == num_lost


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("os._exit(1)", "died"),
        ("import time; time.sleep(1000)", "within 2 s"),
        ("raise OSError('busy')", "OSError: busy"),
        ("return [float('nan')] * len(completions)", "returned nan"),
        ("return []", "0 values for 1 completions"),
    ],
)
def test_trouble_that_stays_fails_its_own_group_with_the_reason(
    cluster: None, tmp_path: Path, trouble: str, reason: str
) -> None:
    scores, _ = scored(tmp_path / "r.py", ALWAYS.format(trouble=trouble), ["3", "7", "5"])
    if "nan" not in trouble:  # a batch of which each score is a failure has no innocent in it
        assert [score.value for score in scores] == [3.0, None, 5.0]
    assert scores[1].value is None
    assert reason in str(scores[1].failure)
