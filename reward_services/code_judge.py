"""Scores generated programs by their unit tests: the share that passed, program by program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from grpo.errors import UserError
from reward_services.batches import Item, joined
from reward_services.sandbox import Sandbox, SandboxLost
from reward_services.sandbox_config import SandboxConfig
from reward_services.unit_tests import program_in, read_tests, results
from reward_services.user_functions import Verdict

_TRIES = 2  # a sandbox that could not be built says nothing about the program
_SHARE_TO_RUN = 0.95  # of the deadline; the rest is for ending what runs then


class CodeJudge:
    """Runs some programs of a batch side by side, each test in a sandbox of its own."""

    def __init__(self, config: SandboxConfig, *, deadline_s: float) -> None:
        self._config = config
        self._deadline_s = deadline_s  # for all tests of one program
        self._sandbox = Sandbox(config)

    async def start(self) -> None:
        """Refuses a host that cannot isolate programs, unless the recipe does without."""
        missing = await asyncio.to_thread(self._sandbox.missing)
        if missing is not None:
            raise UserError(
                f"this host cannot isolate generated programs: {missing}\n"
                "allow user namespaces (sysctl user.max_user_namespaces, and on Ubuntu "
                "kernel.apparmor_restrict_unprivileged_userns=0; in a container: a seccomp profile "
                "that permits unshare and mount), or set code.isolation: none in the recipe to "
                "run programs with this user's rights"
            )

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        """A program that misbehaves fails its tests; a sandbox that fails is no score."""
        batch = joined(items)
        tests = batch.columns.get(self._config.tests_column, [None] * len(batch))
        places = asyncio.Semaphore(self._config.parallel)

        async def judged_one(text: str, column: object) -> Verdict:
            async with places:
                return await asyncio.to_thread(self._verdict, text, column)

        pairs = zip(batch.completion_texts, tests, strict=True)
        return list(await asyncio.gather(*[judged_one(text, column) for text, column in pairs]))

    async def close(self) -> None:
        """Sandboxes end with the call that started them."""

    def _verdict(self, text: str, column: object) -> Verdict:
        end = time.monotonic() + self._deadline_s * _SHARE_TO_RUN
        failure = ""
        for _ in range(_TRIES):
            try:
                return Verdict(value=self._share_passed(text, column, end))
            except ValueError as error:  # the data set's mistake
                return Verdict(value=None, failure=f"column {self._config.tests_column!r}: {error}")
            except SandboxLost as error:
                failure = str(error)
        return Verdict(value=None, failure=failure)

    def _share_passed(self, text: str, column: object, end: float) -> float:
        tests, source = read_tests(column), program_in(text)
        found = results(self._sandbox, self._config, source, tests, end=end)
        share = sum(result.outcome == "passed" for result in found) / len(found)
        return share if self._config.partial else float(share == 1.0)
