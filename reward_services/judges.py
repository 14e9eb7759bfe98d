"""What judges a batch where it can be stopped: a process, a sandbox or a server, behind a Protocol.

Knows nothing of groups, waiting or caching.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from reward_services import rule_function
from reward_services.code_judge import CodeJudge
from reward_services.config import ScorerConfig
from reward_services.function_process import FUNCTION_CHILD, FunctionProcess
from reward_services.http_judge import HttpJudge
from reward_services.user_functions import Batch, Verdict

PREFERENCE_CHILD = "reward_services.preference.child"


class Judge(Protocol):
    """Judges one batch at a time, and is done by its deadline."""

    async def start(self) -> None:
        """Get ready; what cannot work on this machine is a UserError."""
        ...

    async def judged(self, batch: Batch) -> list[Verdict]:
        """One verdict per completion; a call that failed as a whole is BadInput or Transient."""
        ...

    async def close(self) -> None:
        """End everything that was started."""
        ...


class FunctionJudge:
    """A function in a process of its own, which is killed and replaced when it is late."""

    def __init__(
        self,
        spec: str,
        options: Mapping[str, object],
        deadline_s: float,
        *,
        child: str = FUNCTION_CHILD,
    ) -> None:
        self._process = FunctionProcess(spec, options, child=child)
        self._deadline_s = deadline_s

    async def start(self) -> None:
        await asyncio.to_thread(self._process.start)

    async def judged(self, batch: Batch) -> list[Verdict]:
        try:
            return await asyncio.to_thread(self._process.judged, batch, deadline_s=self._deadline_s)
        except asyncio.CancelledError:
            self._process.kill()  # its late answer would be taken for the next request's
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._process.kill)


def built_judge(config: ScorerConfig) -> Judge:
    """The judge of a scorer that is not computed in place."""
    if config.code is not None:
        return CodeJudge(config.code, deadline_s=config.deadline_s)
    if config.url is not None:
        return HttpJudge(config)
    if config.preference is not None:
        encoder = {"encoder": config.preference.encoder}
        folder, deadline_s = config.preference.folder, config.deadline_s
        return FunctionJudge(folder, encoder, deadline_s, child=PREFERENCE_CHILD)
    if config.function is not None:
        return FunctionJudge(config.function, config.options, config.deadline_s)
    rule = {"config": config.model_dump_json()}
    return FunctionJudge(rule_function.SPEC, rule, config.deadline_s)
