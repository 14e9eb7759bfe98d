"""An event loop whose clock jumps to the next timer instead of waiting for it.

What runs in it waits, times out and is ordered as always, only no time passes. Threads and
sockets would be outrun: it is for code that waits for timers and other tasks alone.
"""

from __future__ import annotations

import asyncio
import selectors

from grpo.errors import Stalled


class _JumpingSelector(selectors.DefaultSelector):
    """Looks once for what is ready (signals), and counts the wait as done."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stalled("the simulation waits for nothing: no task can run and no timer is set")
        self.now += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 and passes only where everybody waits."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Simulated seconds."""
        return self._jumping.now
