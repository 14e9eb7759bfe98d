"""Puts a judge's questions to any server that speaks OpenAI's chat protocol.

Structured output is asked for by JSON schema. Knows nothing of rollouts and scores.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import openai

from grpo.errors import DeadlineExceeded, UserError
from reward_services.model_judge.config import (
    DEFAULT_PROMPT,
    DEFAULT_PROMPT_WITHHELD,
    EndpointConfig,
    ModelJudgeConfig,
)
from reward_services.model_judge.questions import KEY, Question, Reply, reply_schema

_NO_KEY = "none"  # the client insists on one; servers without keys ignore it


class EndpointBackend:
    """One client of one server; it tries again by itself after overload and lost connections."""

    def __init__(self, config: ModelJudgeConfig) -> None:
        assert config.endpoint is not None
        self._config = config
        self._endpoint: EndpointConfig = config.endpoint
        self._places = asyncio.Semaphore(config.endpoint.concurrency)
        self._client: openai.AsyncOpenAI | None = None

    async def start(self) -> str:
        """Read the key; the server may still be starting."""
        name = self._endpoint.api_key_env
        if name is not None and name not in os.environ:
            raise UserError(
                f"judge.endpoint.api_key_env names {name!r}, and no such environment variable is "
                "set where the scorer runs; export it before the run"
            )
        self._client = openai.AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=_NO_KEY if name is None else os.environ[name],
            timeout=self._endpoint.request_timeout_s,
            max_retries=self._endpoint.request_retries,
        )
        withheld = self._config.reference == "withheld"
        return DEFAULT_PROMPT_WITHHELD if withheld else DEFAULT_PROMPT

    async def replies(
        self, questions: Sequence[Question], *, is_retry: bool, deadline_s: float
    ) -> list[Reply]:
        """One reply each; a question that the server refuses fails alone."""
        try:
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as tasks:
                waits = [tasks.create_task(self._reply(question)) for question in questions]
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._endpoint.url} did not answer {len(questions)} questions within "
                f"{deadline_s:.3g} s"
            ) from error
        return [wait.result() for wait in waits]

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _reply(self, question: Question) -> Reply:
        assert self._client is not None, "start() comes first"
        schema = {"name": KEY, "strict": True, "schema": reply_schema(question.num_steps)}
        fields: dict[str, object] = {
            "model": self._endpoint.model,
            "messages": [dict(message) for message in question.messages],
            "max_completion_tokens": self._config.max_reply_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        try:
            async with self._places:
                completion = await self._client.chat.completions.create(
                    **fields,
                    extra_body=dict(self._endpoint.extra),
                )
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # no JSON is a ValueError
            return Reply(text=None, failure=f"{self._endpoint.url}: {_reason(error)}")
        return _reply(completion, self._endpoint.url)


def _reply(completion: object, url: str) -> Reply:
    """What the model said. The client checks no types: a server may have sent anything at all."""
    try:
        message = completion.choices[0].message  # type: ignore[attr-defined]
        content, refusal = message.content, getattr(message, "refusal", None)
    except (AttributeError, IndexError, TypeError, KeyError):
        said = getattr(completion, "error", None) or completion
        return Reply(text=None, failure=f"{url} sent no chat completion: {str(said)[:300]!r}")
    if content is None and refusal:
        return Reply(text=None, failure=f"{url}: the model refused: {str(refusal)[:300]!r}")
    if content is not None and not isinstance(content, str):
        return Reply(text=None, failure=f"{url} sent content that is no text: {content!r:.300}")
    return Reply(text=content or "")


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    hint = ""
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        hint = "; is the key in judge.endpoint.api_key_env the server's?"
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{hint}"
