"""What judges a batch where it can be stopped: a process, a sandbox or a server, behind a Protocol.

Knows nothing of groups, waiting or caching.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Protocol, cast

from grpo.errors import BadInput, Fatal, Transient
from grpo.types import Group
from reward_services import rule_function
from reward_services.asked_rollouts import asked_rollouts, judged_rollouts
from reward_services.batches import Item, joined
from reward_services.code_judge import CodeJudge
from reward_services.config import ScorerConfig
from reward_services.function_child import JUDGE
from reward_services.function_process import FUNCTION_CHILD, FunctionProcess
from reward_services.http_judge import HttpJudge
from reward_services.model_judge.config import ModelJudgeConfig
from reward_services.model_judge.endpoint import EndpointBackend
from reward_services.model_judge.judge import ModelJudge
from reward_services.model_judge.local_model import LocalBackend
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.questions import labelled_questions
from reward_services.user_functions import PackedVerdicts, Verdict, unpacked_verdicts

PREFERENCE_CHILD = "reward_services.preference.child"
MODEL_CHILD = "reward_services.model_child"

Packed = Callable[[Sequence[Item]], object]  # from groups and spans to what a process is sent


class Judge(Protocol):
    """Judges one batch at a time, and is done by its deadline."""

    async def start(self) -> None:
        """Get ready; what cannot work on this machine is a UserError."""
        ...

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per span; a call that failed as a whole is BadInput or Transient."""
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
        packed: Packed = joined,
    ) -> None:
        """`packed` makes of groups and spans what the process is sent."""
        self._packed = packed
        self._process = FunctionProcess(spec, options, child=child)
        self._deadline_s = deadline_s

    async def start(self) -> None:
        await asyncio.to_thread(self._process.start)

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        payload, deadline_s = self._packed(items), self._deadline_s
        try:
            found = await asyncio.to_thread(
                self._process.asked, JUDGE, payload, deadline_s=deadline_s
            )
            return unpacked_verdicts(cast(PackedVerdicts, found))
        except asyncio.CancelledError:
            self._process.kill()  # its late answer would be taken for the next request's
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._process.kill)


class LearningJudge(FunctionJudge):
    """A model that learns, in a process of its own; a new process continues from the last copy."""

    def __init__(
        self,
        spec: str,
        options: Mapping[str, object],
        deadline_s: float,
        *,
        child: str,
        packed: Packed,
        labelled: Callable[[Sequence[Group]], object],
        learn_deadline_s: float,
    ) -> None:
        """`labelled` makes of groups what the process learns from."""
        super().__init__(spec, options, deadline_s, child=child, packed=packed)
        self._labelled = labelled
        self._learn_deadline_s = learn_deadline_s
        self._copies = TemporaryDirectory(prefix="covey-scorer-")
        self._copy: str | None = None  # None: nothing has been learned yet

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        await self._continued()
        return await super().judged(items)

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Twice at most, from the same state; what cannot be learned from ends the run."""
        labelled = self._labelled(groups)
        for _ in range(2):
            try:
                await self._continued()
                metrics = await self._asked("learn", labelled)
                copy = mkdtemp(dir=self._copies.name)
                await self._asked("save", copy)
            except Transient as error:
                failure: Exception = error
                continue
            except BadInput as error:
                raise Fatal(f"the scorer could not learn from a step: {error}") from error
            self._replace_copy(copy)
            return cast(Mapping[str, float], metrics)
        raise Fatal(f"the scorer could not learn from a step: {failure}") from failure

    async def save(self, folder: Path) -> None:
        await self._continued()
        folder.mkdir(parents=True, exist_ok=True)
        await self._asked("save", str(folder))

    async def load(self, folder: Path) -> None:
        copy = mkdtemp(dir=self._copies.name)
        await asyncio.to_thread(shutil.copytree, folder, copy, dirs_exist_ok=True)
        self._replace_copy(copy)
        await self._asked("load", copy)

    async def close(self) -> None:
        await super().close()
        self._copies.cleanup()

    async def _continued(self) -> None:
        """A process that died is replaced by one that has learned the same."""
        if not self._process.is_running and self._copy is not None:
            await self._asked("load", self._copy)

    def _replace_copy(self, copy: str) -> None:
        before, self._copy = self._copy, copy
        if before is not None:
            shutil.rmtree(before)

    async def _asked(self, what: str, payload: object) -> object:
        try:
            return await asyncio.to_thread(
                self._process.asked, what, payload, deadline_s=self._learn_deadline_s
            )
        except asyncio.CancelledError:
            self._process.kill()
            raise


def _model_judge(name: str, config: ModelJudgeConfig, deadline_s: float) -> ModelJudge:
    backend = EndpointBackend(config) if config.model is None else LocalBackend(config)
    return ModelJudge(name, config, backend, deadline_s=deadline_s)


def built_judge(config: ScorerConfig) -> Judge:
    """The judge of a scorer that is not computed in place."""
    if config.judge is not None:
        return _model_judge(config.name, config.judge, config.deadline_s)
    rollouts = partial(asked_rollouts, scorer=config.name)
    if config.process_reward is not None:
        return FunctionJudge(
            "process_reward",
            config.process_reward.model_dump(),
            config.deadline_s,
            child=MODEL_CHILD,
            packed=rollouts,
        )
    if config.implicit_reward is not None:
        return LearningJudge(
            "implicit_reward",
            config.implicit_reward.model_dump(),
            config.deadline_s,
            child=MODEL_CHILD,
            packed=rollouts,
            labelled=partial(judged_rollouts, outcome=config.implicit_reward.outcome),
            learn_deadline_s=config.implicit_reward.learn_deadline_s,
        )
    if config.code is not None:
        return CodeJudge(config.code, deadline_s=config.deadline_s)
    if config.url is not None:
        return HttpJudge(config)
    if config.preference is not None:
        return _preference_judge(config.preference, config.deadline_s, rollouts)
    if config.function is not None:
        return FunctionJudge(config.function, config.options, config.deadline_s)
    rule = {"config": config.model_dump_json()}
    return FunctionJudge(config.name, rule, config.deadline_s, child=rule_function.CHILD)


def _preference_judge(config: PreferenceConfig, deadline_s: float, packed: Packed) -> Judge:
    folder, settings = config.folder, config.model_dump()
    if config.refresh is None:
        return FunctionJudge(folder, settings, deadline_s, child=PREFERENCE_CHILD, packed=packed)
    return LearningJudge(
        folder,
        settings,
        deadline_s,
        child=PREFERENCE_CHILD,
        packed=packed,
        labelled=partial(labelled_questions, scorer=config.refresh.outcome),
        learn_deadline_s=config.refresh.learn_deadline_s,
    )
