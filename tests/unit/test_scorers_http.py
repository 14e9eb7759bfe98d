"""POST /get_reward, as client and as server: whatever the other does, no failure is a number."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from grpo.errors import BadInput, UserError
from grpo.types import Score
from reward_services.config import ScorerConfig
from reward_services.reward_protocol import verdicts_in
from reward_services.reward_server import RewardServer, ServedScorer
from reward_services.service import ScorerService
from tests.unit.scored_groups import whole, written_group

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _asked(handler: Handler, texts: list[str], **options: object) -> list[Score]:
    """Scores of a group by a server of ours that answers as `handler` does."""
    app = web.Application()
    app.router.add_post("/get_reward", handler)
    async with TestServer(app) as server:
        settings = {"name": "remote", "url": str(server.make_url("/get_reward")), "retries": 1}
        service = ScorerService(ScorerConfig.model_validate({**settings, **options}))
        await service.start()
        group = written_group(texts)
        try:
            return await service.score(group, whole(group))
        finally:
            await service.close()


def scores_from(handler: Handler, texts: list[str], **options: object) -> list[Score]:
    return asyncio.run(_asked(handler, texts, **options))


def reply(body: object, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=json.dumps(body).encode(), status=status)

    return handler


def test_the_question_is_openrlhfs_and_the_rewards_become_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "open sesame")
    questions = []

    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer open sesame"
        questions.append(await request.json())
        return web.json_response({"rewards": [0.5, 1], "scores": [0, 1], "extra_logs": {}})

    scores = scores_from(handler, ["12", "13"], token_env="REWARD_TOKEN")
    assert [score.value for score in scores] == [0.5, 1.0]
    assert questions == [
        {"query": ["7 +512", "7 +513"], "prompts": ["7 +5"] * 2, "labels": ["12", "12"]}
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"reward": [1.0]}, "rewards: Field required"),
        ({"rewards": [1.0, 2.0]}, "2 rewards for 1 queries"),
        ({"rewards": ["1.0"]}, "rewards.0"),
        ({"rewards": [True]}, "rewards.0"),
        ({"rewards": 1.0}, "rewards"),
        ({"rewards": [float("nan")]}, "gave nan"),
        ({"rewards": [1e39]}, "gave 1e+39; expected a finite number between -1e+15"),
        ({"rewards": [None], "failures": ["out of paper"]}, "out of paper"),
        ({"rewards": [1.0], "failures": []}, "0 failures for 1 queries"),
        ("no object", "none of /get_reward"),
    ],
)
def test_a_reply_that_is_no_list_of_numbers_is_a_failure(body: object, reason: str) -> None:
    (score,) = scores_from(reply(body), ["12"])
    assert score.value is None
    assert reason in str(score.failure)


def test_null_without_a_failure_does_not_apply() -> None:
    (score,) = scores_from(reply({"rewards": [None]}), ["12"])
    assert (score.value, score.failure) == (None, None)


def test_a_reply_that_is_no_json_is_a_failure() -> None:
    with pytest.raises(BadInput, match="none of /get_reward"):
        verdicts_in(b"<html>", 1)


def test_an_overloaded_server_is_asked_again() -> None:
    answers = [503, 200]

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"rewards": [1.0]}, status=answers.pop(0))

    (score,) = scores_from(handler, ["12"])
    assert (score.value, answers) == (1.0, [])


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (401, 1), (404, 1), (400, 3)])
def test_retries_are_counted_once(status: int, tries: int) -> None:
    """A server in trouble is asked again after a pause, a group's own trouble group by group."""
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=status, headers={"Retry-After": "0"})

    (score,) = scores_from(handler, ["12"], retries=2)
    assert (score.value, asked) == (None, tries)


def test_a_server_may_say_how_long_to_wait() -> None:
    answers = [429, 200]
    times: list[float] = []

    async def handler(request: web.Request) -> web.Response:
        times.append(asyncio.get_running_loop().time())
        headers = {"Retry-After": "1"}
        return web.json_response({"rewards": [1.0]}, status=answers.pop(0), headers=headers)

    (score,) = scores_from(handler, ["12"])
    assert score.value == 1.0
    assert times[1] - times[0] >= 1.0


def test_a_reply_too_deep_to_read_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=b"[" * 200_000)

    (score,) = scores_from(handler, ["12"], retries=0)
    assert "none of /get_reward" in str(score.failure)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302, 503])
def test_a_refusal_is_a_failure_that_names_the_status(status: int) -> None:
    (score,) = scores_from(reply({"rewards": [1.0]}, status), ["12"], retries=0)
    assert score.value is None
    assert f"answered {status}" in str(score.failure)


def test_a_server_that_hangs_costs_its_deadline_and_no_more() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    (score,) = scores_from(handler, ["12"], deadline_s=0.2, retries=0)
    assert score.value is None
    assert "gave no answer within 0.2 s" in str(score.failure)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    async def asked() -> list[Score]:
        url = "http://127.0.0.1:9/get_reward"
        service = ScorerService(ScorerConfig(name="remote", url=url, retries=0))
        await service.start()
        group = written_group(["12"])
        scores = await service.score(group, whole(group))
        await service.close()
        return scores

    (score,) = asyncio.run(asked())
    assert score.value is None
    assert "cannot be reached" in str(score.failure)


def test_a_token_that_is_not_set_is_the_users_error() -> None:
    config = ScorerConfig(name="remote", url="http://localhost:1", token_env="NO_SUCH_TOKEN")
    with pytest.raises(UserError, match="NO_SUCH_TOKEN"):
        asyncio.run(ScorerService(config).start())


QUESTION = {"query": ["7 +5=12", "7 +5=1"], "prompts": ["7 +5=", "7 +5="], "labels": ["12", "12"]}


async def _served(
    question: object, *, token: str | None = "right", labels: str = "answer"
) -> tuple[int, dict[str, object]]:
    services = {
        "number": ServedScorer(
            service=ScorerService(ScorerConfig(name="number", rule="numeric")), weight=1.0
        ),
        "length": ServedScorer(
            service=ScorerService(
                ScorerConfig(name="length", rule="length", max_length=1, length_unit="characters")
            ),
            weight=-0.5,
        ),
    }
    app = RewardServer(services, token="right", label_columns=[labels]).app()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with TestServer(app) as server, aiohttp.ClientSession(headers=headers) as client:
        url = server.make_url("/get_reward")
        async with client.post(url, json=question) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith("{") else {}


def test_the_server_adds_weighted_scores_and_keeps_them_apart() -> None:
    status, body = asyncio.run(_served(QUESTION))
    assert status == 200
    assert body == {
        "rewards": [1.0, -0.5],
        "scores": [1.0, -0.5],
        "failures": [None, None],
        "extra_logs": {"number": [1.0, 0.0], "length": [0.0, 1.0]},
    }


@pytest.mark.parametrize("token", [None, "", "wrong", "right2", "\u00e4"])
def test_the_server_wants_its_token(token: str | None) -> None:
    status, body = asyncio.run(_served(QUESTION, token=token))
    assert (status, body) == (401, {})


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"query": ["a"], "prompts": ["b"], "labels": ["c"]},
        {"query": ["a"], "prompts": [], "labels": []},
        {"query": "a", "prompts": "a", "labels": "a"},
    ],
)
def test_the_server_refuses_what_is_no_question(question: object) -> None:
    status, body = asyncio.run(_served(question))
    assert status == 422
    assert body["error"]


def test_a_failed_score_leaves_the_server_as_a_reason_and_no_number() -> None:
    question = {**QUESTION, "labels": [None, "twelve"]}
    status, body = asyncio.run(_served(question))
    assert (status, body["rewards"]) == (200, [None, None])
    assert ["number" in failure for failure in body["failures"]] == [True, True]  # type: ignore[attr-defined]


def test_no_question_has_no_rewards() -> None:
    _, body = asyncio.run(_served({"query": [], "prompts": [], "labels": []}))
    assert body["rewards"] == []
