"""OpenRLHF's reward protocol: POST /get_reward with {"query", "prompts", "labels"}, and its reply.

The reply holds "rewards", one number each. Ours may also hold null (does not apply) and, in
"failures", the reason why there is none. Shared by the client and the server; knows no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from grpo.errors import BadInput
from reward_services.user_functions import A_SCORE, Verdict, is_score


class RewardRequest(BaseModel):
    """What a trainer asks: prompt and completion in one text, the prompts, the references."""

    model_config = ConfigDict(frozen=True)  # other keys are other versions' and do no harm

    query: list[str]
    prompts: list[str]
    labels: list[str | None]

    @model_validator(mode="after")
    def _is_parallel(self) -> RewardRequest:
        lengths = [len(self.query), len(self.prompts), len(self.labels)]
        if len(set(lengths)) != 1:
            raise ValueError(f"found {lengths} entries in query, prompts, labels; expected as many")
        for query, prompt in zip(self.query, self.prompts, strict=True):
            if not query.startswith(prompt):
                raise ValueError(f"query {query[:60]!r} does not begin with its prompt")
        return self

    @property
    def completions(self) -> list[str]:
        """What follows the prompts."""
        pairs = zip(self.query, self.prompts, strict=True)
        return [query[len(prompt) :] for query, prompt in pairs]


class _Reply(BaseModel):
    """Strict where a wrong type would become a wrong reward: no text, no true for 1."""

    model_config = ConfigDict(strict=True)

    rewards: list[float | None]
    failures: list[str | None] | None = None


def reply_body(
    rewards: Sequence[float | None],
    failures: Sequence[str | None],
    logs: Mapping[str, Sequence[float | None]],
) -> dict[str, object]:
    """What our server answers; "scores" is what OpenRLHF filters groups by."""
    return {
        "rewards": list(rewards),
        "scores": list(rewards),
        "failures": list(failures),
        "extra_logs": {name: list(values) for name, values in logs.items()},
    }


def verdicts_in(body: bytes, num_expected: int) -> list[Verdict]:
    """The verdicts of a reply; BadInput says what is wrong with one that is none."""
    try:
        found = _unwrapped(json.loads(body))
        reply = _Reply.model_validate(found)
    except (ValueError, RecursionError) as error:  # RecursionError: a hundred thousand "["
        raise BadInput(
            f"the server's reply is none of /get_reward: {_first_line(error)}; expected "
            '{"rewards": [one number each]}'
        ) from error
    if len(reply.rewards) != num_expected:
        raise BadInput(f"the server gave {len(reply.rewards)} rewards for {num_expected} queries")
    failures = reply.failures if reply.failures is not None else [None] * num_expected
    if len(failures) != num_expected:
        raise BadInput(f"the server gave {len(failures)} failures for {num_expected} queries")
    return [_verdict(r, f) for r, f in zip(reply.rewards, failures, strict=True)]


def _unwrapped(found: object) -> object:
    """Older OpenRLHF servers answer with a list around the one object."""
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def _verdict(reward: float | None, failure: str | None) -> Verdict:
    if failure is not None:
        return Verdict(value=None, failure=failure)
    if reward is not None and not is_score(reward):
        return Verdict(value=None, failure=f"the server gave {reward}; expected {A_SCORE}")
    return Verdict(value=reward)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
