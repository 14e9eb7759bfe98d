"""A thread that owns something which generates step by step, and obeys between two steps.

Whatever touches the stepper runs in this thread, so nothing needs a lock, and a weight swap is
always between two steps: which weights sampled a token is known exactly.

consumes: commands, from any thread. waits for: a command, when there is nothing to step.
unblocked by: `call` and `stop`. When a step raises, every waiter gets WorkerLost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from grpo.errors import WorkerLost


class Stepper(Protocol):
    """What a step loop can drive."""

    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def step(self) -> None:
        """Sample one more token for every running request."""
        ...

    def shutdown(self, error: WorkerLost) -> None:
        """Fail what is still running with `error` and free everything."""
        ...


S = TypeVar("S", bound=Stepper)
R = TypeVar("R")


class StepLoop(Generic[S]):
    """Builds a stepper and drives it, in a thread of its own."""

    def __init__(self, name: str, build: Callable[[], S]) -> None:
        self._build = build
        # Each takes the stepper, or the reason why there is none any more; None: stop.
        self._commands: SimpleQueue[Callable[[S | WorkerLost], None] | None] = SimpleQueue()
        self._lost: WorkerLost | None = None
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Future[None]:
        """Begin; the future holds the error if the stepper cannot be built."""
        self._thread.start()
        return self._started

    def call(self, run: Callable[[S], R]) -> Future[R]:
        """Have `run` called between two steps; its error goes to the caller alone."""
        done: Future[R] = Future()

        def command(stepper: S | WorkerLost) -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                if isinstance(stepper, WorkerLost):
                    raise stepper
                done.set_result(run(stepper))
            except Exception as error:
                done.set_exception(error)

        self._commands.put(command)
        if self._lost is not None:
            self._refuse(self._lost)  # the thread may have ended before it saw this one
        return done

    def give(self, run: Callable[[S], None], answers: Sequence[Future[Any]]) -> None:
        """Have `run` called between two steps; its error goes to whoever waits for `answers`."""

        def refused(given: Future[None]) -> None:
            if (error := given.exception()) is not None:
                for answer in answers:
                    if answer.set_running_or_notify_cancel():
                        answer.set_exception(error)

        self.call(run).add_done_callback(refused)

    def stop(self) -> None:
        """End the thread; what still runs fails with WorkerLost."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            stepper = self._build()
        except BaseException as error:
            self._lost = WorkerLost("the rollout engine did not start")
            self._started.set_exception(error)
            self._refuse(self._lost)
            return
        self._started.set_result(None)
        try:
            while self._obey(stepper):
                stepper.step()
            self._lost = WorkerLost("the rollout engine was closed")
        except BaseException as error:
            self._lost = WorkerLost(f"the rollout engine failed: {type(error).__name__}: {error}")
        try:
            stepper.shutdown(self._lost)
        finally:
            self._refuse(self._lost)

    def _obey(self, stepper: S) -> bool:
        """Run commands until none is left and there is something to step; False: stop."""
        while True:
            try:
                command = self._commands.get(block=not stepper.busy())
            except Empty:
                return True
            if command is None:
                return False
            command(stepper)

    def _refuse(self, lost: WorkerLost) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            if command is not None:
                command(lost)
