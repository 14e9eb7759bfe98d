"""Rules that may take long on a hostile text, as a function for a process of its own.

math-verify and patterns that backtrack have no bound. In this process's main thread a timer stops
one answer, and the deadline of the whole call stops what even the timer cannot.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FrameType

from reward_services.config import ScorerConfig
from reward_services.form_rules import built_form_rule
from reward_services.function_child import serve
from reward_services.rules import built_rule
from reward_services.user_functions import Batch, Verdict, judged

CHILD = "reward_services.rule_function"  # this file, as the process that runs a rule


class _Expired(BaseException):
    """Not an Exception, which the libraries catch."""


def judged_texts(
    queries: list[str], prompts: list[str], labels: list[str | None], *, config: str
) -> list[Verdict]:
    """One verdict per answer, each within its share of the deadline (OpenRLHF's signature).

    `config` is a ScorerConfig as JSON.
    """
    judge = _judge(config)
    return [
        judge(query[len(prompt) :], label)
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]


@cache
def _judge(config: str) -> Callable[[str, str | None], Verdict]:
    settings = ScorerConfig.model_validate_json(config)
    limit_s = settings.deadline_s / settings.batch_size
    compared = _comparing(settings) if settings.needs_reference else _forming(settings)

    def judge(text: str, reference: str | None) -> Verdict:
        try:
            with _timer(limit_s):
                return compared(text, reference)
        except _Expired:
            failure = f"rule {settings.rule} took longer than {limit_s:.2g} s of CPU on one answer"
            return Verdict(value=None, failure=failure)

    return judge


def _comparing(config: ScorerConfig) -> Callable[[str, str | None], Verdict]:
    rule = built_rule(config)

    def judged(text: str, reference: str | None) -> Verdict:
        if reference is None:
            return Verdict(value=None, failure="the prompt has no reference answer")
        try:
            return Verdict(value=rule(text, reference))
        except ValueError as error:
            return Verdict(value=None, failure=str(error))

    return judged


def _forming(config: ScorerConfig) -> Callable[[str, str | None], Verdict]:
    rule = built_form_rule(config)
    # regex is the one form that runs here, and it counts no tokens.
    return lambda text, reference: Verdict(value=rule(text, 0))


@contextmanager
def _timer(limit_s: float) -> Iterator[None]:
    def expire(signum: int, frame: FrameType | None) -> None:
        raise _Expired

    earlier = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, limit_s)  # CPU time: a busy machine is no slow answer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def main(_: str, options: str) -> None:
    """Load the rule of these options (as JSON) before the first answer, then judge."""
    config = json.loads(options)["config"]

    def loaded() -> Callable[[Batch], list[Verdict]]:
        _judge(config)  # remembered; sympy alone takes seconds
        return partial(judged, partial(judged_texts, config=config))

    serve(loaded)


if __name__ == "__main__":
    main(*sys.argv[1:])
