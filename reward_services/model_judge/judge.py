"""A model as step judge: puts the questions of a batch to a backend and reads its replies.

A reply that cannot be read is asked for once more; then the rollout's steps get no score, as the
judge said nothing of them. Knows neither models nor servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from reward_services.asked_rollouts import AskedRollout, AskedRollouts, asked_rollouts
from reward_services.batches import Item
from reward_services.model_judge.config import ModelJudgeConfig, Template
from reward_services.model_judge.questions import (
    Question,
    Reply,
    first_wrong_step,
    question,
    reference_of,
    span_value,
    steps_of,
)
from reward_services.user_functions import Verdict

_TRIES = 2


class Backend(Protocol):
    """What answers questions."""

    async def start(self) -> Template:
        """Get ready, and say which prompt to use where the recipe has none."""
        ...

    async def replies(
        self, questions: Sequence[Question], *, is_retry: bool, deadline_s: float
    ) -> list[Reply]:
        """One reply each, in order; BadInput or Transient if the call failed as a whole."""
        ...

    async def close(self) -> None:
        """End everything that was started."""
        ...


@dataclass(slots=True, kw_only=True)
class JudgeCounts:
    """What one judge has done so far."""

    num_questions: int = 0  # rollouts that a model was asked about
    num_replies: int = 0
    num_unreadable_replies: int = 0  # not the JSON that was asked for, or a step that is not there
    num_unread_questions: int = 0  # for which every reply was unreadable

    def counters(self) -> dict[str, float]:
        """Numbers to add up over actors."""
        return {name: getattr(self, name) for name in JudgeCounts.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """Of one rollout. Without failure and unless it was read, there is nothing to say."""

    ends: Sequence[int]
    is_read: bool = False
    first_wrong: int | None = None
    failure: str | None = None


class ModelJudge:
    """A Judge (see judges.py) that asks a model."""

    def __init__(
        self, name: str, config: ModelJudgeConfig, backend: Backend, *, deadline_s: float
    ) -> None:
        self.counts = JudgeCounts()
        self._name = name
        self._config = config
        self._backend = backend
        self._deadline_s = deadline_s
        self._template: Template | None = config.prompt

    async def start(self) -> None:
        prompt = await self._backend.start()
        self._template = prompt if self._config.prompt is None else self._config.prompt

    async def judged(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per span: 1 if nothing is wrong up to its end, else 0."""
        asked = asked_rollouts(items, scorer=self._name)
        said = await self._said(items, asked)
        verdicts = []
        for number, place in asked.places:
            rollout, found = asked.rollouts[number], said[number]
            verdicts.append(_verdict(rollout, rollout.spans[place][1], found))
        return verdicts

    async def close(self) -> None:
        await self._backend.close()

    async def _said(self, items: Sequence[Item], asked: AskedRollouts) -> list[_Said]:
        groups = {number: item[0] for item, (number, _) in zip(items, asked.places, strict=True)}
        said = [_Said(ends=steps_of(r.text, r.characters)) for r in asked.rollouts]
        questions: dict[int, Question] = {}
        for number, rollout in enumerate(asked.rollouts):
            ends = said[number].ends
            try:
                reference = reference_of(groups[number].prompt, self._config)
            except ValueError as error:
                said[number] = _Said(ends=ends, failure=str(error))
                continue
            if ends:
                questions[number] = self._question(rollout, ends, reference)
        self.counts.num_questions += len(questions)
        for number, found in (await self._answered(questions, said)).items():
            said[number] = found
        return said

    def _question(
        self, rollout: AskedRollout, ends: Sequence[int], reference: str | None
    ) -> Question:
        assert self._template is not None, "start() comes first"
        return question(
            rollout.text,
            ends,
            problem=rollout.prompt,
            reference=reference,
            template=self._template,
            system=self._config.system,
        )

    async def _answered(
        self, questions: Mapping[int, Question], said: Sequence[_Said]
    ) -> dict[int, _Said]:
        """What the replies say; questions whose reply cannot be read are put a second time."""
        clock = asyncio.get_running_loop().time
        ends_at = clock() + self._deadline_s
        found: dict[int, _Said] = {}
        for attempt in range(_TRIES):
            open_ = [number for number in questions if number not in found]
            if not open_:
                break
            replies = await self._backend.replies(
                [questions[number] for number in open_],
                is_retry=attempt > 0,
                deadline_s=max(ends_at - clock(), 0.001),
            )
            for number, reply in zip(open_, replies, strict=True):
                read = self._read(questions[number], reply, said[number].ends)
                if read is not None:
                    found[number] = read
        self.counts.num_unread_questions += len(questions) - len(found)
        return found

    def _read(self, asked: Question, reply: Reply, ends: Sequence[int]) -> _Said | None:
        if reply.text is None:
            return _Said(ends=ends, failure=reply.failure)
        self.counts.num_replies += 1
        try:
            first_wrong = first_wrong_step(reply.text, asked.num_steps)
        except ValueError:
            self.counts.num_unreadable_replies += 1
            return None
        return _Said(ends=ends, is_read=True, first_wrong=first_wrong)


def _verdict(rollout: AskedRollout, end: int, said: _Said) -> Verdict:
    if not said.is_read:
        return Verdict(value=None, failure=said.failure)
    character = rollout.characters[rollout.boundaries.index(end)] if end else 0
    return Verdict(value=span_value(character, said.ends, said.first_wrong))
