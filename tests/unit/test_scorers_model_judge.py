"""A model as step judge: its questions, its replies, and a server that answers in every bad way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import ValidationError

from grpo.errors import UserError
from grpo.types import Group, Score, Span
from reward_services.config import ScorerConfig
from reward_services.model_judge.config import ModelJudgeConfig, Turn
from reward_services.model_judge.local_model import trained_prompt, write_trained_prompt
from reward_services.model_judge.questions import (
    first_wrong_step,
    numbered,
    reply_schema,
    reply_text,
    span_value,
    steps_of,
)
from reward_services.service import ScorerService
from tests.unit.scored_groups import whole, written_group

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SOLUTION = "7+5=12\n12*3=36"
TEXT = "7+5=12\n12*3=37\n37-4=33"
STEPS = [
    Span(rollout=0, start=0, end=7),
    Span(rollout=0, start=7, end=15),
    Span(rollout=0, start=15, end=22),
]


@pytest.mark.parametrize(
    ("text", "cuts", "ends"),
    [
        ("7+5=12\n12*3=36\n", [7], [7, 15]),
        ("7+5=12\n12*3=36\n", [7, 14], [7, 15]),  # a blank piece joins the step before it
        ("\n\n7+5=12\n12*3=36", [2, 9], [9, 16]),  # or the first one after it
        ("one", [], [3]),
        (" \n", [1], []),
        ("", [], []),
    ],
)
def test_steps_are_what_lies_between_the_boundaries(
    text: str, cuts: list[int], ends: list[int]
) -> None:
    assert steps_of(text, cuts) == ends


def test_steps_are_numbered_from_one() -> None:
    assert numbered(TEXT, [7, 15, 22]) == "[1] 7+5=12\n[2] 12*3=37\n[3] 37-4=33"


@pytest.mark.parametrize("step", [None, 1, 3])
def test_a_reply_says_what_it_was_made_of(step: int | None) -> None:
    assert first_wrong_step(reply_text(step), 3) == step


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "the second step",
        "2",
        "[2]",
        '{"first_wrong_step": 2',
        '{"first_wrong_step": "2"}',
        '{"first_wrong_step": 2.0}',
        '{"first_wrong_step": true}',
        '{"first_wrong_step": 0}',
        '{"first_wrong_step": 4}',
        '{"first_wrong_step": -1}',
        '{"wrong_step": 2}',
        '{"first_wrong_step": 2, "why": "12*3 is 36"}',
    ],
)
def test_anything_else_is_no_reply(reply: str) -> None:
    with pytest.raises(ValueError, match="the judge's reply"):
        first_wrong_step(reply, 3)


def test_a_span_is_right_if_nothing_is_wrong_up_to_its_end() -> None:
    ends = [7, 15, 22]
    assert [span_value(end, ends, 2) for end in (0, 7, 15, 22)] == [1, 1, 0, 0]
    assert [span_value(end, ends, 1) for end in (0, 7, 15)] == [1, 0, 0]
    assert [span_value(end, ends, None) for end in ends] == [1, 1, 1]


def reply(content: object, status: int = 200) -> Handler:
    """A chat completion with this content."""

    async def handler(request: web.Request) -> web.Response:
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": content},
        }
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
        return web.json_response({**body, "choices": [choice]}, status=status)

    return handler


async def _asked(
    handler: Handler, group: Group, spans: Sequence[Span], options: dict[str, object]
) -> tuple[list[Score], dict[str, float]]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    async with TestServer(app) as server:
        endpoint = {"url": str(server.make_url("/v1")), "model": "judge", "request_retries": 0}
        scorer = {"name": "steps", "retries": 0, "deadline_s": options.pop("deadline_s", 20)}
        endpoint |= options.pop("endpoint", {})  # type: ignore[arg-type]
        config = {**scorer, "judge": {"endpoint": endpoint, **options}}
        service = ScorerService(ScorerConfig.model_validate(config))
        await service.start()
        try:
            return await service.score(group, spans), service.statistics_so_far()
        finally:
            await service.close()


def a_group(texts: Sequence[str] = (TEXT,), **columns: object) -> Group:
    return written_group(texts, columns={"solution": SOLUTION, **columns})


def asked(
    handler: Handler,
    *,
    group: Group | None = None,
    spans: Sequence[Span] = tuple(STEPS),
    **options: object,
) -> tuple[list[Score], dict[str, float]]:
    return asyncio.run(_asked(handler, a_group() if group is None else group, spans, options))


def test_a_server_is_asked_in_openais_protocol_with_a_schema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    questions = []

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer open sesame"
        questions.append(await request.json())
        return await reply('{"first_wrong_step": 2}')(request)

    scores, counters = asked(
        handler,
        endpoint={"api_key_env": "JUDGE_KEY", "extra": {"temperature": 0}},
        system="You are strict.",
        prompt="{problem} | {reference} | {steps} | {num_steps} {not_a_field",
    )
    assert [score.value for score in scores] == [1, 0, 0]
    (question,) = questions
    steps = "[1] 7+5=12\n[2] 12*3=37\n[3] 37-4=33"
    assert question["messages"] == [
        {"role": "system", "content": "You are strict."},
        {"role": "user", "content": f"7 +5 | {SOLUTION} | {steps} | 3 {{not_a_field"},
    ]
    assert (question["model"], question["temperature"]) == ("judge", 0)
    form = question["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == reply_schema(3)
    assert (counters["num_questions"], counters["num_unreadable_replies"]) == (1, 0)


def test_a_question_can_be_a_conversation() -> None:
    questions = []

    async def handler(request: web.Request) -> web.StreamResponse:
        questions.append((await request.json())["messages"])
        return await reply('{"first_wrong_step": 2}')(request)

    turns = [
        {"role": "user", "content": "{problem}"},
        {"role": "assistant", "content": "{answer}"},
        {"role": "user", "content": "Which of {num_steps}? {reference}"},
    ]
    asked(handler, system="You are strict.", prompt=turns)
    assert questions == [
        [
            {"role": "system", "content": "You are strict."},
            {"role": "user", "content": "7 +5"},
            {"role": "assistant", "content": TEXT},
            {"role": "user", "content": f"Which of 3? {SOLUTION}"},
        ]
    ]


@pytest.mark.parametrize(
    "content",
    [
        "oh dear",
        '{"first_wrong_step": 2',
        '{"first_wrong_step": 9}',
        '{"first_wrong_step": 0}',
        None,
    ],
)
def test_a_reply_that_cannot_be_read_twice_is_no_score_and_counted(content: str | None) -> None:
    scores, counters = asked(reply(content))
    assert [(score.value, score.failure) for score in scores] == [(None, None)] * 3
    assert counters["num_replies"] == counters["num_unreadable_replies"] == 2
    assert counters["num_unread_questions"] == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<html>log in</html>", "log in"),
        ("", "JSONDecodeError"),
        ("[1]", "no chat completion"),
        ("null", "no chat completion"),
        ('"text"', "no chat completion"),
        ("[" * 200_000, "RecursionError"),
        ('{"error": {"message": "model not found"}}', "model not found"),
        ('{"choices": []}', "no chat completion"),
        ('{"choices": [{"index": 0}]}', "no chat completion"),
        ('{"choices": [{"message": null}]}', "no chat completion"),
        ('{"choices": [{"message": {"content": 7}}]}', "no text: 7"),
        ('{"choices": [{"message": {"content": [{"text": "a"}]}}]}', "no text"),
        ('{"choices": [{"message": {"content": null, "refusal": "never"}}]}', "refused: 'never'"),
    ],
)
def test_what_is_no_chat_completion_is_a_failure_with_the_servers_words(
    body: str, said: str
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        kind = "text/html" if body.startswith("<") else "application/json"
        return web.Response(text=body, content_type=kind)

    scores, _ = asked(handler)
    assert {score.value for score in scores} == {None}
    assert all(said in str(score.failure) for score in scores), scores[0].failure


def test_a_reply_too_deep_to_read_is_no_score() -> None:
    scores, counters = asked(reply("[" * 200_000))
    assert {(score.value, score.failure) for score in scores} == {(None, None)}
    assert counters["num_unreadable_replies"] == 2


def test_a_second_reply_may_be_better() -> None:
    replies = iter(['{"first_wrong_step": 7}', '{"first_wrong_step": null}'])

    async def handler(request: web.Request) -> web.StreamResponse:
        return await reply(next(replies))(request)

    scores, counters = asked(handler)
    assert [score.value for score in scores] == [1, 1, 1]
    assert counters["num_unreadable_replies"] == 1 and counters["num_unread_questions"] == 0


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_a_refusal_is_a_failure_and_no_number(status: int) -> None:
    scores, _ = asked(reply("", status))
    assert {score.value for score in scores} == {None}
    assert all(f"{status}" in str(score.failure) for score in scores)


def test_an_overloaded_server_is_asked_again() -> None:
    statuses = [500, 200]

    async def handler(request: web.Request) -> web.StreamResponse:
        return await reply('{"first_wrong_step": 1}', statuses.pop(0))(request)

    scores, _ = asked(handler, endpoint={"request_retries": 1})
    assert [score.value for score in scores] == [0, 0, 0] and not statuses


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"deadline_s": 0.3}, "did not answer 1 questions within 0.3 s"),
        ({"endpoint": {"request_timeout_s": 0.3}}, "APITimeoutError"),
    ],
)
def test_a_server_that_hangs_costs_its_time_and_no_more(
    options: dict[str, object], reason: str
) -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    scores, _ = asked(handler, **options)
    assert {score.value for score in scores} == {None}
    assert all(reason in str(score.failure) for score in scores)


def test_a_bad_answer_to_one_question_leaves_the_others_alone() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        content = (await request.json())["messages"][0]["content"]
        status = 400 if "bad" in content else 200
        return await reply('{"first_wrong_step": null}', status)(request)

    group = a_group(["good", "bad", "good"])
    scores, counters = asked(handler, group=group, spans=whole(group))
    assert [score.value for score in scores] == [1, None, 1]
    assert counters["num_questions"] == 2, "identical answers are one question"


def test_the_reference_can_be_the_answer_or_be_withheld() -> None:
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json())["messages"][0]["content"])
        return await reply('{"first_wrong_step": null}')(request)

    asked(handler)
    asked(handler, reference="answer")
    asked(handler, reference="withheld")
    assert f"Reference solution:\n{SOLUTION}\n" in seen[0]
    assert "Reference solution:\n12\n" in seen[1]
    assert "eference solution" not in seen[2] and "[3] 37-4=33" in seen[2]


def test_a_row_without_its_reference_is_a_failure_that_says_what_to_do() -> None:
    scores, counters = asked(reply("unasked"), group=written_group([TEXT]))
    assert "judge.reference: withheld" in str(scores[0].failure)
    assert counters["num_questions"] == 0


def test_an_answer_without_text_is_not_asked_about() -> None:
    group = a_group(["  "])
    scores, counters = asked(reply("unasked"), group=group, spans=whole(group))
    assert [(score.value, score.failure) for score in scores] == [(None, None)]
    assert counters["num_questions"] == 0


def test_steps_that_were_judged_before_keep_their_numbers() -> None:
    """The second step alone is asked for: the judge still sees the first as [1]."""
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json())["messages"][0]["content"])
        return await reply('{"first_wrong_step": 2}')(request)

    known = Score(scorer="steps", span=STEPS[0], value=1.0)
    group = replace(a_group(), scores=(known,))
    scores, _ = asked(handler, group=group, spans=STEPS[1:])
    assert [score.value for score in scores] == [0, 0]
    assert "[2] 12*3=37\n[3] 37-4=33" in seen[0]


def test_a_key_that_is_not_set_is_the_users_error() -> None:
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        asked(reply(""), endpoint={"api_key_env": "NO_SUCH_KEY"})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "found none of model and endpoint"),
        ({"model": {"path": "m"}, "endpoint": {"url": "http://a", "model": "m"}}, "found both"),
        ({"model": {"path": "m"}, "prompt": "{steps} of {question}"}, "found the field {question}"),
        ({"model": {"path": "m"}, "prompt": "{steps}"}, "has to be told"),
        ({"model": {"path": "m"}, "prompt": "{problem} {steps}"}, "no field {reference}"),
        (
            {
                "model": {"path": "m"},
                "prompt": "{problem} {steps} {reference}",
                "reference": "withheld",
            },
            "a field {reference}",
        ),
        (
            {
                "model": {"path": "m"},
                "prompt": [
                    {"role": "user", "content": "{problem} {reference}"},
                    {"role": "assistant", "content": "{answer}"},
                ],
            },
            "the last message is the assistant's",
        ),
        ({"endpoint": {"url": "judge:80", "model": "m"}}, "pattern"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelJudgeConfig.model_validate(settings)


def test_a_trained_judge_brings_its_prompt_and_refuses_another_reference(
    tmp_path: Path,
) -> None:
    assert "{reference}" in trained_prompt(str(tmp_path), "solution")  # the general one
    assert "{reference}" not in trained_prompt(str(tmp_path), "withheld")
    written = (
        Turn(role="user", content="{problem}"),
        Turn(role="assistant", content="{answer}"),
        Turn(role="user", content="{reference}"),
    )
    write_trained_prompt(tmp_path, prompt=written, reference="solution")
    assert trained_prompt(str(tmp_path), "solution") == written
    with pytest.raises(UserError, match="was trained with solution"):
        trained_prompt(str(tmp_path), "withheld")
