"""What a run shows while it runs: a live panel on a terminal, one line per step anywhere else.

The only module beside the command line that writes to the screen; refuses to decide anything.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestration.evaluation import EvalReport, Measured

# (metric, label, format). A metric that a step does not have is left out.
HEADLINE = (
    ("reward", "reward", "{:.3f}"),
    ("completions/mean_length", "length", "{:.1f}"),
    ("completions/clipped_ratio", "clipped", "{:.0%}"),
    ("frac_reward_zero_std", "equal groups", "{:.0%}"),
    ("perf/throughput", "tokens/s", "{:,.0f}"),
)
DETAILS = (
    ("grad_norm", "grad norm", "{:.3g}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "kl", "{:.2g}"),
    ("staleness/mean", "staleness", "{:.1f}"),
    ("log_prob_gap", "log-prob gap", "{:.1e}"),
    ("dropped", "dropped groups", "{:.0f}"),
)
TIMES = (
    ("timing_s/step", "step", "{:.2f} s"),
    ("timing_s/wait_for_groups", "waiting for groups", "{:.2f} s"),
    ("timing_s/train", "training", "{:.2f} s"),
    ("timing_s/sync/publish", "publishing", "{:.2f} s"),
    ("timing_s/sync/load", "loading", "{:.2f} s"),
    ("idle/rollout", "rollout idle", "{:.0%}"),
    ("idle/learner", "learner idle", "{:.0%}"),
)
Columns = tuple[tuple[str, str, str], ...]

# Time left is the mean of so many steps: generation slows down and speeds up with the lengths.
PACE_STEPS = 20
TREND_STEPS = 60
_BARS = [chr(code) for code in range(0x2581, 0x2589)]  # one eighth to full block


class QuietWhenCut(Console):
    """A console that falls silent when its reader leaves (`| head`): the run goes on."""

    def on_broken_pipe(self) -> None:
        """rich would end the process here."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Owns the screen for the time of a run."""

    def __init__(self, console: Console, now: Callable[[], float]) -> None:
        self._console = console
        self._now = now
        self._live: Live | None = None
        self._started = now()
        self._phase: str | None = None
        self._phase_began = 0.0
        self._latest: Mapping[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=TREND_STEPS)
        self._step_ends: deque[float] = deque(maxlen=PACE_STEPS + 1)
        self._step = 0
        self._total = 0

    @classmethod
    @contextmanager
    def open(
        cls, console: Console | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> Iterator[Display]:
        """A display on the console, live if that is a terminal; the default is standard output."""
        display = cls(console or QuietWhenCut(), now)
        if not display._console.is_terminal:
            yield display
            return
        with Live(
            console=display._console, get_renderable=display.panel, refresh_per_second=4
        ) as live:
            display._live = live
            yield display
            display._end_phase()

    def phase(self, name: str) -> None:
        """What the run is doing from now on, outside of its steps: `starting Ray`, ..."""
        self._end_phase()
        self._phase, self._phase_began = name, self._now()
        if self._live is None:
            self._line(f"[{self._now() - self._started:7.1f} s] {name}")

    def step(self, metrics: Mapping[str, float], step: int, total: int) -> None:
        """One step is done."""
        self._end_phase()
        self._latest, self._step, self._total = metrics, step, total
        self._step_ends.append(self._now())
        if "reward" in metrics:
            self._rewards.append(metrics["reward"])
        if self._live is None:
            figures = _figures(metrics, (*HEADLINE, *TIMES[:1]))
            self._line("  ".join([f"step {step}/{total}", *figures, self._time_left()]).rstrip())

    def message(self, text: str) -> None:
        """A line that stays, above the live panel."""
        self._line(text)

    def evaluation(
        self, label: str, report: EvalReport, compared_with: EvalReport | None = None
    ) -> None:
        """The figures of an evaluation, and how they moved."""
        self._console.print(evaluation_table(label, report, compared_with))
        for failure, count in report.failures.items():
            self._line(f"{label}: {count} completions without a score: {failure}")

    def panel(self) -> RenderableType:
        """The live area: progress, trend of the reward, figures of the last step, phase."""
        rows: list[RenderableType] = []
        if self._total:
            bar = Table.grid(padding=(0, 2))
            bar.add_row(
                Text(f"step {self._step}/{self._total}", style="bold"),
                ProgressBar(total=self._total, completed=self._step, width=40),
                Text(self._time_left()),
            )
            trend = Text(f"reward  {sparkline(self._rewards)}", style="green")
            rows += [bar, trend]
            rows += [_row(self._latest, columns) for columns in (HEADLINE, DETAILS, TIMES)]
        if self._phase is not None:
            elapsed = self._now() - self._phase_began
            rows.append(Spinner("line", text=f"{self._phase}  {elapsed:.0f} s"))
        return Group(*rows)

    def _end_phase(self) -> None:
        if self._phase is not None and self._live is not None:
            self._line(f"{self._phase}: {self._now() - self._phase_began:.1f} s")
        self._phase = None

    def _time_left(self) -> str:
        if len(self._step_ends) < 2:
            return ""
        pace_s = (self._step_ends[-1] - self._step_ends[0]) / (len(self._step_ends) - 1)
        return f"{duration((self._total - self._step) * pace_s)} left"

    def _line(self, text: str) -> None:
        # Text of users and paths may hold brackets, which rich would read as markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def evaluation_table(
    label: str, report: EvalReport, compared_with: EvalReport | None = None
) -> Table:
    """One row for all prompts and one for each difficulty and domain; fits into 80 columns."""
    now = report.overall
    title = f"{label}: pass@1 {now.pass_at[1]:.3f} +- {now.standard_error:.3f}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    ks = list(now.pass_at)
    table.add_column("", no_wrap=True)
    for name in ["prompts", *[f"pass@{k}" for k in ks], "length", "clipped"]:
        table.add_column(name, justify="right", no_wrap=True)
    before = _rows(compared_with) if compared_with is not None else {}
    for name, measured in _rows(report).items():
        table.add_row(*_cells(name, measured, before.get(name), ks))
    return table


def _rows(report: EvalReport) -> dict[str, Measured]:
    slices = {
        f"{name} {value}": measured
        for name, values in report.by.items()
        for value, measured in values.items()
    }
    return {"all": report.overall} | slices


def _cells(name: str, now: Measured, before: Measured | None, ks: list[int]) -> list[str]:
    """Of the pass rates the first and the last also say how they moved."""
    passes = []
    for k in ks:
        text = f"{now.pass_at[k]:.3f}" if k in now.pass_at else "-"
        if before is not None and k in (ks[0], ks[-1]) and k in before.pass_at and text != "-":
            text += f" ({now.pass_at[k] - before.pass_at[k]:+.3f})"
        passes.append(text)
    length = f"{now.mean_length:.1f}"
    return [name, str(now.num_prompts), *passes, length, f"{now.clipped_ratio:.0%}"]


def sparkline(values: deque[float]) -> str:
    """One bar per value, from the lowest to the highest of them."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _figures(metrics: Mapping[str, float], columns: Columns) -> list[str]:
    return [
        f"{label} {template.format(metrics[name])}"
        for name, label, template in columns
        if name in metrics
    ]


def _row(metrics: Mapping[str, float], columns: Columns) -> Text:
    return Text("   ".join(_figures(metrics, columns)))
