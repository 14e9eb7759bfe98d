"""`covey serve-scorer` as a process, asked by a scorer of ours and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from grpo.types import Score
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from tests.end_to_end.runs import covey, finished, lines_until, settings
from tests.unit.scored_groups import whole, written_group


def test_served_scores_are_those_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "let me in")
    arguments = ["--port", "0", "--token-env", "SCORER_TOKEN", *settings(tmp_path)]
    process = covey("serve-scorer", "recipes/quickstart.yaml", *arguments)
    try:
        url = lines_until(process, "serving ")[-1].split(" at ")[1].strip()
        assert url.startswith("http://127.0.0.1:")
        scores = asyncio.run(_scores(url))
        assert [score.value for score in scores] == [1.0, 0.0]
        assert _posted(url, token="wrong") == 401
        assert _posted(url, token=os.environ["SCORER_TOKEN"]) == 200
        process.send_signal(signal.SIGINT)
        finished(process)
        assert process.returncode == 0
    finally:
        process.kill()


async def _scores(url: str) -> list[Score]:
    config = ScorerConfig(name="remote", url=url, token_env="SCORER_TOKEN")
    service = ScorerService(config)
    await service.start()
    group = written_group(["7+5=12\nanswer: 12", "answer: 13"])
    try:
        return await service.score(group, whole(group))
    finally:
        await service.close()


def _posted(url: str, *, token: str) -> int:
    body = json.dumps({"query": ["1"], "prompts": [""], "labels": ["1"]}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
