"""A preference model that goes on learning: when it learns, from what, and what a stop costs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.types import Group, Score, Span
from reward_services.config import ScorerConfig
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.questions import labelled_questions
from reward_services.preference.refresh import RefreshedModel, loaded_refreshed
from reward_services.service import ScorerService
from tests.unit.preference_models import answered, written_model

RIGHT, WRONG = "7+5=12\nanswer: 12", "7+5=13\nanswer: 13"


def a_group(number: int, *, outcomes: tuple[float, float] = (1.0, 0.0)) -> Group:
    group = answered(f"7 +{number}", [RIGHT, WRONG])
    spans = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
    scores = tuple(
        Score(scorer="answer", span=span, value=value)
        for span, value in zip(spans, outcomes, strict=True)
    )
    prompt = replace(group.prompt, id=f"p{number}")
    return replace(group, id=number, prompt=prompt, scores=scores)


def a_config(folder: Path, *, every_steps: int = 2) -> PreferenceConfig:
    return PreferenceConfig.model_validate(
        {
            "folder": str(folder),
            "head_learning_rate": 1e-2,
            "epochs": 10,
            "refresh": {"every_steps": every_steps, "outcome": "answer"},
        }
    )


def a_model(folder: Path, *, every_steps: int = 2) -> RefreshedModel:
    written_model(folder)
    return loaded_refreshed(folder, a_config(folder, every_steps=every_steps))


def learned(model: RefreshedModel, *groups: Group) -> dict[str, float]:
    return dict(model.learn(labelled_questions(groups, scorer="answer")))


def weights(model: RefreshedModel) -> list[float]:
    return [float(weight.detach().sum()) for weight in model._head.parameters()]


def test_the_head_moves_every_so_many_steps_and_learns_from_all_groups_since(
    tmp_path: Path,
) -> None:
    model = a_model(tmp_path)
    before = weights(model)
    assert learned(model, a_group(1)) == {"refreshed": 0.0}
    assert weights(model) == before
    metrics = learned(model, a_group(2), a_group(3))
    assert metrics["refreshed"] == 1.0 and metrics["num_pairs"] == 3
    assert weights(model) != before
    learned(model, a_group(1))
    after = learned(model, a_group(2), a_group(3))
    assert after["pair_accuracy"] == 1.0 and after["log_loss"] < metrics["log_loss"]


def test_groups_without_a_right_and_a_wrong_answer_change_nothing(tmp_path: Path) -> None:
    model = a_model(tmp_path, every_steps=1)
    before = weights(model)
    metrics = learned(model, a_group(1, outcomes=(0.0, 0.0)))
    assert metrics == {"refreshed": 0.0, "num_pairs": 0.0}
    assert weights(model) == before


def test_a_stop_between_two_refreshes_loses_neither_head_nor_groups(tmp_path: Path) -> None:
    straight, stopped, resumed = (a_model(tmp_path) for _ in range(3))
    for step in (1, 2, 3, 4):
        learned(straight, a_group(step))
    for step in (1, 2, 3):
        learned(stopped, a_group(step))
    state = tmp_path / "state"
    state.mkdir()
    stopped.save(str(state))
    resumed.load(str(state))
    learned(resumed, a_group(4))
    assert weights(resumed) == weights(straight)


@pytest.mark.parametrize("refreshes", [False, True])
def test_as_a_scorer_its_utilities_change_with_a_refresh_only(
    tmp_path: Path, refreshes: bool
) -> None:
    written_model(tmp_path)
    config = ScorerConfig.model_validate(
        {"name": "p", "preference": a_config(tmp_path, every_steps=1 if refreshes else 2)}
    )
    group = a_group(1)
    spans = [Span(rollout=0, start=0, end=end) for end in (0, 5)]

    async def run() -> list[list[Score]]:
        service = ScorerService(config)
        try:
            await service.start()
            before = await service.score(group, spans)
            await service.learn([group])
            return [before, await service.score(group, spans)]
        finally:
            await service.close()

    before, after = ([s.value for s in scores] for scores in asyncio.run(run()))
    assert None not in before
    assert (before != after) == refreshes
