"""What the screen shows: a line per step without a terminal, a live panel with one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

from rich.console import Console

from orchestration.display import Display, duration, sparkline
from orchestration.evaluation import EvalReport, Measured

METRICS = {"reward": 0.4, "completions/mean_length": 31.5, "timing_s/step": 2.0, "other": 1.0}


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def plain() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def measured(rate: float, size: int = 10) -> Measured:
    return Measured(
        num_prompts=size,
        num_scored=4 * size,
        pass_at={1: rate, 2: 1.5 * rate, 4: 2 * rate},
        standard_error=0.01,
        mean_score=rate,
        mean_length=20.0,
        clipped_ratio=0.05,
    )


def test_without_a_terminal_every_step_is_one_line_however_narrow_the_console() -> None:
    console, clock = plain(), Clock()
    with Display.open(console, now=clock) as display:
        for step in (1, 2, 3):
            clock.time += 2.0
            display.step(METRICS, step, 63)
    lines = text(console).splitlines()
    assert lines == [
        "step 1/63  reward 0.400  length 31.5  step 2.00 s",
        "step 2/63  reward 0.400  length 31.5  step 2.00 s  2 min 02 s left",
        "step 3/63  reward 0.400  length 31.5  step 2.00 s  2 min 00 s left",
    ]


def test_without_a_terminal_a_phase_is_announced_when_it_begins() -> None:
    console, clock = plain(), Clock()
    with Display.open(console, now=clock) as display:
        display.phase("starting Ray")
        clock.time += 6.5
        display.phase("loading the engine")
        assert "[    6.5 s] loading the engine" in text(console)  # before it is over
    assert "[    0.0 s] starting Ray" in text(console)


def test_messages_are_shown_as_they_are() -> None:
    console = plain()
    with Display.open(console) as display:
        display.message("see [bold]runs/x[/bold] and [1]")
    assert text(console) == "see [bold]runs/x[/bold] and [1]\n"


def test_the_live_panel_shows_progress_figures_and_time_left() -> None:
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=100), Clock()
    with Display.open(console, now=clock) as display:
        display.step(METRICS, 1, 11)
        clock.time += 60.0
        display.step(METRICS | {"reward": 0.8}, 2, 11)
        recorder = Console(file=io.StringIO(), record=True, width=100)
        recorder.print(display.panel())
    shown = recorder.export_text()
    for part in ("step 2/11", "9 min 00 s left", "reward 0.800", "length 31.5", "step 2.00 s"):
        assert part in shown
    assert "other" not in shown


def test_the_live_panel_shows_how_long_a_phase_has_been_going_on() -> None:
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=100), Clock()
    recorder = Console(file=io.StringIO(), record=True, width=100)
    with Display.open(console, now=clock) as display:
        display.phase("loading the engine")
        clock.time += 12.0
        recorder.print(display.panel())
    assert "loading the engine  12 s" in recorder.export_text()
    assert "loading the engine: 12.0 s" in text(console)


def test_an_evaluation_shows_parts_and_how_they_moved() -> None:
    console = Console(file=io.StringIO(), width=80)
    before = EvalReport(
        num_samples=4, overall=measured(0.2), by={"difficulty": {"1": measured(0.3, 5)}}
    )
    after = EvalReport(
        num_samples=4,
        overall=measured(0.35),
        by={"difficulty": {"1": measured(0.25, 5), "2": measured(0.1, 5)}},
        failures={"it raised": 3},
    )
    with Display.open(console) as display:
        display.evaluation("after", after, before)
    shown = text(console)
    assert "after: pass@1 0.350 +- 0.010" in shown
    assert "0.350 (+0.150)" in shown
    assert "0.250 (-0.050)" in shown
    assert "difficulty 2" in shown  # without a change: it was not measured before
    assert "3 completions without a score: it raised" in shown


def test_the_trend_runs_from_the_lowest_to_the_highest_bar() -> None:
    assert sparkline(deque([0.0, 1.0])) == chr(0x2581) + chr(0x2588)
    assert sparkline(deque([0.5, 0.5])) == chr(0x2581) * 2


def test_durations_are_written_for_people() -> None:
    assert [duration(s) for s in (4.6, 65, 7799)] == ["5 s", "1 min 05 s", "2 h 09 min"]


def test_a_reader_that_leaves_silences_the_display_and_does_not_end_the_run(tmp_path: Path) -> None:
    """`covey train ... | head -1`: the pipe breaks at the second line."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from orchestration.display import Display\n"
        "with Display.open() as display:\n"
        "    for number in range(2000):\n"
        "        display.message(f'line {number} ' + 'x' * 200)\n"
        "sys.stderr.write('reached the end')\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert "reached the end" in run.stderr.read()
    assert run.wait() == 0
