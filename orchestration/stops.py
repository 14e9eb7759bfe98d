"""How a run is asked to stop: Ctrl-C, SIGTERM of a cluster manager, SIGHUP of a closed terminal.

Refuses to know what is saved and what is running.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Asks politely first, and cancels the run's task the second time or if nobody listens."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.polite: Callable[[], None] | None = None  # None: there is nothing to bring to an end
        self._on_message = on_message
        self.was_asked = False
        self._task: asyncio.Task[object] | None = None

    def listen(self) -> None:
        """Take the signals over for the task that calls; again after a library took them away."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._received)

    def ignore(self) -> None:
        """Give the signals back."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def _received(self) -> None:
        if self.polite is not None and not self.was_asked:
            self.was_asked = True
            self._on_message(
                "stopping: the step in progress ends, then a checkpoint is written "
                "(a second Ctrl-C does not wait)"
            )
            self.polite()
        elif self._task is not None:
            self._on_message("stopping now")
            self._task.cancel()
