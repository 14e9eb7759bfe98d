"""What can go wrong at a boundary, in four kinds; the kind decides what the driver does.

No class here defines __init__, so every instance survives pickling between actors.
"""

from __future__ import annotations

from collections.abc import Iterator


class CoveyError(Exception):
    """Everything that covey raises on purpose."""


class UserError(CoveyError):
    """The user's mistake: shown as one message without a traceback, exit status 2."""


class Transient(CoveyError):
    """The prompt is innocent: try again elsewhere, within a budget."""


class WorkerLost(Transient):
    """The actor or process that held the work is gone."""


class StreamBroken(Transient):
    """Weights did not arrive by the direct way; there is another one."""


class DeadlineExceeded(Transient):
    """A named wait took longer than it may."""


class BadInput(CoveyError):
    """It would fail anywhere: drop the group with this reason."""


class PromptTooLong(BadInput):
    """The prompt does not leave room for an answer."""


class Unscorable(BadInput):
    """A scorer could not judge a rollout: it raised, or returned no usable number."""


class Fatal(CoveyError):
    """A bug or a lost learner: end the run with this cause in plain words."""


class StateLost(Fatal):
    """An actor is gone, and with it what it had learnt since the last checkpoint."""

    owner: str | None = None  # as in the names of its waits; pickled with the rest


class NonFinite(Fatal):
    """A loss or gradient that is no number; raised before the optimiser moves."""

    # Group, rollout and completion token at fault, where they are known; pickled with the rest.
    place: tuple[int, int, int] | None = None


class OutOfMemory(Fatal):
    """The learner's device has no room; the message says which budget to lower."""


class WeightMismatch(Fatal):
    """Rollout engine and learner do not hold the same policy."""


class Stalled(Fatal):
    """Nothing moves any more, and who waits on whom is in the message."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that a group is made of, the first to happen first; a single one is itself."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


def root_cause(error: BaseException) -> BaseException:
    """The first leaf of a group: what failed later was cancelled, or is a consequence."""
    return next(leaves(error))
