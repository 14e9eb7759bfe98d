"""docs/scorers.md: its function and its recipes are what they claim to be."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from reward_services.config import AnswerRuleName, FormRuleName, ScorerConfig
from reward_services.service import ScorerService
from tests.unit.scored_groups import whole, written_group

PAGE = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_on_the_page_is_valid(block: str) -> None:
    configs = [ScorerConfig.model_validate(entry) for entry in yaml.safe_load(block)["scorers"]]
    assert configs


def test_the_scorer_of_ten_lines_scores(tmp_path: Path) -> None:
    (source,) = blocks("python")
    (tmp_path / "rewards.py").write_text(source)
    (entry,) = yaml.safe_load(blocks("yaml")[0])["scorers"]
    function = f"{tmp_path}/{entry['function']}"
    config = ScorerConfig.model_validate({**entry, "function": function})

    async def scored() -> list[float | None]:
        service = ScorerService(config)
        await service.start()
        group = written_group(["Please wait", "Wait!"])
        scores = await service.score(group, whole(group))
        await service.close()
        return [score.value for score in scores]

    assert asyncio.run(scored()) == [1.0, 0.0]
    assert len(source.strip().splitlines()) <= 10


@pytest.mark.parametrize("rule", [*get_args(AnswerRuleName), *get_args(FormRuleName)])
def test_every_rule_has_its_row(rule: str) -> None:
    assert f"| `{rule}` |" in PAGE
