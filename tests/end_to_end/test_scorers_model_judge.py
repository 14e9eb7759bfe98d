"""A judge of starter problems, trained for a moment, as vLLM and transformers serve it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import UserError
from grpo.types import Group, Score
from orchestration.cli import main
from orchestration.handles import RayScorerSpawner
from orchestration.starter.judge_eval import judge_scorer, step_spans_of, wrong_answers
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says nothing sensible after two steps, but structured output gives it the right form."""
    out = tmp_path_factory.mktemp("judge") / "model"
    assert main(["judge", "train", "--out", str(out), "--steps", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return wrong_answers(16, seed=0)


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


def check_scores(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> None:
    """Of each answer the steps up to some one are right and the others are not."""
    for group, part in zip(groups, scores, strict=True):
        assert [score.failure for score in part] == [None] * len(part)
        for rollout in group.rollouts:
            values = [score.value for score in part if score.span.rollout == rollout.index]
            assert values and set(values) <= {0.0, 1.0}
            assert values == sorted(values, reverse=True)


def judge_processes(folder: Path) -> list[int]:
    """Those that hold this judge."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in (process.info["cmdline"] or []) and "-m" in process.info["cmdline"]
    ]


def test_the_folder_is_a_hugging_face_model_that_writes_json(folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = '[1] 7+5=12{"first_wrong_step":1}'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_actor_serves_it_through_vllm_and_survives_the_death_of_the_engine(
    cluster: None, folder: Path, groups: list[Group]
) -> None:
    async def scored() -> tuple[list[list[Score]], list[list[Score]]]:
        spawner = RayScorerSpawner(judge_scorer(folder))
        scorer = await spawner.spawn(0)
        try:
            first = await asyncio.gather(*[scorer.score(g, step_spans_of(g)) for g in groups[:4]])
            (engine,) = judge_processes(folder)
            under_way = asyncio.gather(*[scorer.score(g, step_spans_of(g)) for g in groups[4:]])
            os.kill(engine, signal.SIGKILL)
            return list(first), list(await under_way)
        finally:
            await spawner.discard(scorer)

    first, second = asyncio.run(scored())
    check_scores(groups, [*first, *second])


def test_transformers_serve_it_where_there_is_no_vllm(folder: Path, groups: list[Group]) -> None:
    async def scored() -> tuple[list[list[Score]], dict[str, float]]:
        service = ScorerService(judge_scorer(folder, engine="transformers"))
        try:
            await service.start()
            spans = [step_spans_of(group) for group in groups]
            scores = [await service.score(g, s) for g, s in zip(groups, spans, strict=True)]
            return scores, service.statistics_so_far()
        finally:
            await service.close()

    scores, counters = asyncio.run(scored())
    check_scores(groups, scores)
    assert counters["num_questions"] == counters["num_replies"] == 16
    assert counters["num_unreadable_replies"] == 0


def test_judge_and_rule_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "eval", str(folder), "--answers", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreement"]["num_answers"] == 20
    assert 0 <= found["agreement"]["exact"] <= 1
    assert (found["num_unscored"], found["num_unreadable_replies"]) == (0, 0)


def test_what_is_missing_is_said_with_its_remedy(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "eval", str(tmp_path)]) == 2
    assert f"covey judge train --out {tmp_path}" in capsys.readouterr().err
    settings = {"model": {"path": str(tmp_path / "none")}}
    with pytest.raises(UserError, match="no such folder"):
        _started(settings)
    withheld = {"model": {"path": str(folder)}, "reference": "withheld"}
    with pytest.raises(UserError, match="was trained with solution"):
        _started(withheld)


def _started(judge: dict[str, object]) -> None:
    config = ScorerConfig.model_validate({"name": "steps", "judge": judge})
    asyncio.run(ScorerService(config).start())
