"""An explanation on the screen: tables, and the answers with their tokens coloured by credit.

Colour only adds to what is written: without it (a pipe, NO_COLOR) every number is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from grpo.types import Float64
from orchestration.explain.explanation import Explanation, GroupVerdict, StageUpdate
from orchestration.explain.loss import RowNumbers
from orchestration.group_file import token_texts

PIPE_WIDTH = 160  # of a table that no terminal limits
LOWEST_SHADE = 60  # of 255: the faintest credit still shows

Column = tuple[str, Callable[[int], str]]  # head, and the cell of a token


def print_explanation(found: Explanation, *, console: Console, max_tokens: int) -> None:
    """Group by group, then what the step makes of all of them."""
    place = 0
    for verdict in found.verdicts:
        console.print(Text(_headline(verdict), style="bold"))
        for note in _notes(verdict):
            console.print(Text(f"  {note}"))
        if verdict.kept is not None and found.found is not None:
            for part in _group(found, verdict, place, max_tokens):
                console.print(part)
            place += 1
        console.print()
    for part in _step(found):
        console.print(part)


def a_console() -> Console:
    """Standard output; wide where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def number(value: float) -> str:
    """Six significant digits; `-` where there is none."""
    return "-" if np.isnan(value) else f"{value + 0.0:.6g}"


def _headline(verdict: GroupVerdict) -> str:
    group, dropped = verdict.given, verdict.dropped
    head = f"group {group.id}, prompt {group.prompt.id}: "
    if dropped is not None:
        kind = "skipped" if dropped.is_planned else "dropped"
        detail = f" ({dropped.detail})" if dropped.detail else ""
        return f"{head}{kind}, {dropped.reason}{detail}"
    return f"{head}kept, {len(verdict.places)} of {len(group.rollouts)} rollouts"


def _notes(verdict: GroupVerdict) -> Iterator[str]:
    scorers = dict.fromkeys(scorer for scorer, _ in verdict.unscored)
    for name in scorers:
        spans = [span for scorer, span in verdict.unscored if scorer == name]
        shown = ", ".join(f"{s.rollout}[{s.start}:{s.end}]" for s in spans[:6])
        more = f" and {len(spans) - 6} more" if len(spans) > 6 else ""
        yield f"not scored by {name}, which the algorithm would ask: {shown}{more}"


def _group(
    found: Explanation, verdict: GroupVerdict, place: int, max_tokens: int
) -> Iterator[RenderableType]:
    assert found.found is not None
    workings, rows = found.found, found.rows[place]
    rewarded = workings.rewarded[place]
    table = _table(["rollout", "tokens", "trained", *found.terms, "reward", "advantage", "loss"])
    for i, row in enumerate(rows):
        rewards = [number(value) for value in rewarded.components[i].tolist()]
        table.add_row(
            str(verdict.places[i]),
            str(len(row.loss)),
            str(int(workings.masks[place][i].sum())),
            *rewards,
            number(float(rewarded.rewards[i])),
            _one_or_range(row.advantages),
            number(float(row.loss.sum())),
        )
    yield table
    yield Text("  credit: + and green, the step makes the token likelier; - and red, less likely")
    strongest = max((float(np.abs(row.gradient).max(initial=0)) for row in rows), default=0.0)
    for i, row in enumerate(rows):
        yield _coloured(verdict.places[i], token_texts(rewarded.group.rollouts[i]), row, strongest)
    if max_tokens:
        yield _tokens(found, verdict, place, max_tokens)


def _coloured(
    place: int, texts: Sequence[str], row: RowNumbers, strongest: float
) -> RenderableType:
    """The answer, each token shaded by how strongly the step moves it."""
    line = Text(f"  {place:>3} ")
    for text, gradient in zip(texts, row.gradient.tolist(), strict=True):
        credit = -gradient / strongest if strongest else 0.0
        line.append(_visible(text), style=_shade(credit))
        line.append(" ")
    return line


def _shade(credit: float) -> str:
    """Green above 0 and red below, stronger the further from it; grey at 0."""
    if abs(credit) < 1e-12:
        return "dim"
    level = round(LOWEST_SHADE + (200 - LOWEST_SHADE) * min(abs(credit), 1.0))
    return f"white on rgb(0,{level // 2},0)" if credit > 0 else f"white on rgb({level},0,0)"


def _tokens(
    found: Explanation, verdict: GroupVerdict, place: int, max_tokens: int
) -> RenderableType:
    """One line per token; columns that say nothing are left out."""
    assert found.found is not None
    group = found.found.rewarded[place].group
    columns = [_columns(found, place, i) for i in range(len(group.rollouts))]
    heads = [
        head
        for head in columns[0]
        if any(_says_something(head, of_row[head]) for of_row in columns)
    ]
    table = _table(["rollout", "token", "text", *heads, "credit"])
    for i, rollout in enumerate(group.rollouts):
        texts, row = token_texts(rollout), found.rows[place][i]
        for t in range(min(len(texts), max_tokens)):
            credit = -float(row.gradient[t])
            sign = "+" if credit > 0 else ""
            cells = [number(float(columns[i][head][t])) for head in heads]
            cells.append(f"{sign}{number(credit)}")
            table.add_row(str(verdict.places[i]), str(t), _visible(texts[t]), *cells)
        if len(texts) > max_tokens:
            table.add_row(str(verdict.places[i]), "...", f"{len(texts) - max_tokens} more")
    return table


# What a column holds where nothing stands at its point.
_NEUTRAL = {"token weight": 1.0, "gate": 1.0, "loss weight": 1.0, "ratio": 1.0, "clipped": 0.0}


def _columns(found: Explanation, place: int, i: int) -> dict[str, Float64]:
    assert found.found is not None
    workings, row = found.found, found.rows[place][i]
    rollout = workings.rewarded[place].group.rollouts[i]
    clipped = row.clipped_high.astype(np.float64) - row.clipped_low.astype(np.float64)
    return {
        **{name: np.asarray(values, np.float64) for name, values in rollout.measured.items()},
        "advantage": row.advantages,
        "token weight": row.policy_weights,
        "loss weight": np.asarray(workings.loss_weights[place][i], np.float64),
        "coefficient": np.asarray(workings.weights[place][i], np.float64),
        "ratio": np.exp(row.log_ratios),
        "clipped": clipped,
        "gate": row.gates,
        **row.penalties,
        "loss": row.loss,
    }


def _says_something(head: str, values: Float64) -> bool:
    return head not in _NEUTRAL or bool((values != _NEUTRAL[head]).any())


def _step(found: Explanation) -> Iterator[RenderableType]:
    if found.found is None:
        yield Text("no group is kept: no step", style="bold")
    else:
        losses = ", ".join(number(update.loss) for update in found.updates)
        several = f" (updates: {losses})" if len(found.updates) > 1 else ""
        yield Text(f"loss {number(found.loss)}{several}", style="bold")
        yield _metrics(found.metrics)
    if found.state is not None:
        yield Text(f"state       {found.state!r}")
        yield Text(f"next state  {found.next_state!r}")
    if found.learnable is not None:
        before, after = found.learnable
        yield Text(f"learnable   {number(before)}, next {number(after)}")
    if found.stage is not None:
        yield from _stage(found.stage)


def _stage(stage: StageUpdate) -> Iterator[RenderableType]:
    yield Text(f"second stage, on the rows of these groups: loss {number(stage.numbers.loss)}")
    table = _table(["unit", "tokens", "advantage", "loss", "credit of its tokens"])
    for row, numbers in zip(stage.rows, stage.numbers.rows, strict=True):
        table.add_row(
            str(row.group),
            str(len(row.tokens)),
            _one_or_range(numbers.advantages),
            number(float(numbers.loss.sum())),
            _one_or_range(-numbers.gradient),
        )
    yield table


def _metrics(metrics: Mapping[str, float]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 2))
    for name, value in metrics.items():
        table.add_row(Text(name), number(value))
    return table


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=True)
    for head in heads:
        table.add_column(Text(head), justify="left" if head == "text" else "right", no_wrap=True)
    return table


def _one_or_range(values: Float64) -> str:
    if not len(values):
        return "-"
    low, high = float(values.min()), float(values.max())
    return number(low) if low == high else f"{number(low)}..{number(high)}"


def _visible(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t")
