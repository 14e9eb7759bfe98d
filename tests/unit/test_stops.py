"""Signals: politely once, at once the second time, and at once where nothing can be saved."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from orchestration.stops import SIGNALS, StopSignals


def sent(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_without_anything_to_save_the_run_is_cancelled(number: signal.Signals) -> None:
    async def scenario() -> None:
        stops = StopSignals(lambda text: None)
        stops.listen()
        sent(number)
        try:
            with pytest.raises(asyncio.CancelledError):
                await asyncio.Event().wait()
        finally:
            stops.ignore()

    asyncio.run(scenario())


def test_the_first_signal_asks_and_the_second_cancels() -> None:
    async def scenario() -> list[str]:
        said: list[str] = []
        asked = asyncio.Event()
        stops = StopSignals(said.append)
        stops.polite = asked.set
        stops.listen()
        try:
            sent(signal.SIGINT)
            await asked.wait()
            sent(signal.SIGINT)
            with pytest.raises(asyncio.CancelledError):
                await asyncio.Event().wait()
        finally:
            stops.ignore()
        return said

    said = asyncio.run(scenario())
    assert len(said) == 2
    assert "checkpoint" in said[0]
