"""Asks a server for rewards, in OpenRLHF's protocol: retries, bearer token, checked replies.

Knows nothing of what the server runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import aiohttp

from grpo.errors import BadInput, Transient, UserError
from reward_services.batches import Item, joined
from reward_services.config import ScorerConfig
from reward_services.reward_protocol import verdicts_in
from reward_services.user_functions import Verdict

_FIRST_PAUSE_S = 0.25  # before a second try, and twice as long before each further one
_MAX_REPLY_BYTES = 64 << 20
# Too early, too many, and what a restarting server or its proxy says.
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_NO_ACCESS = {401, 403}
_ELSEWHERE = {404, 405}


class _Overloaded(Exception):
    """The server asks for patience, perhaps for so many seconds."""

    def __init__(self, said: str, retry_after: str) -> None:
        super().__init__(said)
        self.pause_s = float(retry_after) if retry_after.isdigit() else 0.0  # else it is a date


class HttpJudge:
    """One connection pool to one server."""

    def __init__(self, config: ScorerConfig) -> None:
        assert config.url is not None
        self._url = config.url
        self._token_env = config.token_env
        self._deadline_s = config.deadline_s
        self._tries = config.retries + 1
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Read the token; the server may still be starting."""
        headers = {}
        if self._token_env is not None:
            if self._token_env not in os.environ:
                raise UserError(
                    f"token_env names {self._token_env!r}, and no such environment variable is set "
                    "where the scorer runs; export it before the run"
                )
            headers["Authorization"] = f"Bearer {os.environ[self._token_env]}"
        # The judge holds the deadline; the client's own, of 300 s, must not be shorter.
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        """Try until the deadline or the last try; each failure says what the server did.

        What would fail in the same way for each group alone is a verdict, so that nobody asks
        again; what a single group may have caused (a reply of another form, a refusal) is raised.
        """
        batch = joined(items)
        queries = zip(batch.prompt_texts, batch.completion_texts, strict=True)
        question = {
            "query": [prompt + completion for prompt, completion in queries],
            "prompts": batch.prompt_texts,
            "labels": batch.references,
        }
        try:
            async with asyncio.timeout(self._deadline_s):
                return verdicts_in(await self._asked(question), len(batch))
        except TimeoutError:
            failure = f"{self._url} gave no answer within {self._deadline_s:g} s"
        except Transient as error:
            failure = str(error)
        return [Verdict(value=None, failure=failure)] * len(batch)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _asked(self, question: object) -> bytes:
        failure, pause_s = "", 0.0
        for attempt in range(self._tries):
            if attempt:
                await asyncio.sleep(max(_FIRST_PAUSE_S * 2 ** (attempt - 1), pause_s))
            try:
                return await self._answer(question)
            except _Overloaded as error:
                failure, pause_s = str(error), error.pause_s
            except aiohttp.ClientError as error:
                failure, pause_s = f"{self._url} cannot be reached: {error}", 0.0
        raise Transient(failure)

    async def _answer(self, question: object) -> bytes:
        assert self._session is not None, "start() comes first"
        # A redirect could carry the token elsewhere.
        async with self._session.post(self._url, json=question, allow_redirects=False) as response:
            body = await response.content.read(500) if response.status != 200 else b""
            said = f"{self._url} answered {response.status}: {body.decode(errors='replace')!r}"
            if response.status in _NO_ACCESS:
                raise Transient(f"{said}; is the token in token_env the server's?")
            if response.status in _ELSEWHERE:
                raise Transient(f"{said}; does url name POST /get_reward of the server?")
            if response.status in _TRY_AGAIN:
                raise _Overloaded(said, response.headers.get("Retry-After", ""))
            if "Location" in response.headers:
                said += f" and points to {response.headers['Location']!r}: name that as url"
            if response.status != 200:
                raise BadInput(said)
            parts, size = [], 0
            async for part in response.content.iter_chunked(1 << 16):
                size += len(part)
                if size > _MAX_REPLY_BYTES:
                    raise BadInput(f"{self._url} answered with more than {_MAX_REPLY_BYTES} bytes")
                parts.append(part)
            return b"".join(parts)
