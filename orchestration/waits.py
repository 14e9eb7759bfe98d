"""Named waits with deadlines, and the register of who waits for what right now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from grpo.errors import DeadlineExceeded

T = TypeVar("T")


class Waits:
    """Every wait of the driver passes here, so that a stall can say who waits for whom."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, float]] = {}  # key -> name, start on the monotonic clock
        self._next = 0

    async def within(self, seconds: float, name: str, awaitable: Awaitable[T]) -> T:
        """The result, or DeadlineExceeded naming the wait and everything else that is open."""
        key, self._next = self._next, self._next + 1
        self._open[key] = (name, time.monotonic())
        try:
            async with asyncio.timeout(seconds):
                return await awaitable
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{name} did not end within {seconds:g} s. Open waits, oldest first:\n"
                f"{self.report()}"
            ) from error
        finally:
            del self._open[key]

    def report(self) -> str:
        """One line per open wait, oldest first."""
        now = time.monotonic()
        waits = sorted(self._open.values(), key=lambda item: item[1])
        return "\n".join(f"  {name}: since {now - start:.1f} s" for name, start in waits)
