"""Recorded steps done again: the learner of a run from a checkpoint, through its batches, compared.

Knows run folders and the learner's Protocol; refuses to know files of batches and where a learner
runs. (`replay.py` is about groups that a run trains on more than once.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from grpo.errors import CoveyError, NonFinite, UserError
from grpo.types import TrainBatch
from orchestration.batch_files import BatchFile, Outcome, batch_files, read_batch
from orchestration.config import Recipe
from orchestration.manifest import find_damage
from orchestration.resume import whole_checkpoints
from orchestration.roles import Learner

GAP = "log_prob_gap/mean"
# A policy that is another one differs from the engine's by far more than rounding does.
STRANGE_GAP_FACTOR = 100.0
STRANGE_GAP = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """What has to be done to see a step again."""

    run: Path
    step: int
    checkpoint: Path | None  # to start from; None: the initial model
    files: tuple[BatchFile, ...]  # from there up to the step

    @property
    def start(self) -> str:
        """Where the weights come from, in words."""
        return "the initial model" if self.checkpoint is None else self.checkpoint.name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """One batch: what came of it in the run, and now."""

    batch: TrainBatch
    recorded: Outcome
    recomputed: Outcome
    learner: Mapping[str, JsonValue]  # settings with which it was recorded

    @property
    def differing(self) -> list[str]:
        """The figures that are not equal bit for bit; "error" where one of the two failed."""
        if self.recorded.error != self.recomputed.error:
            return ["error"]
        ours, theirs = self.recorded.metrics or {}, self.recomputed.metrics or {}
        names = dict.fromkeys([*ours, *theirs])
        return [name for name in names if not _same(ours.get(name), theirs.get(name))]


def recorded_step(run: Path, step: int) -> RecordedStep:
    """The newest checkpoint before the step, and all batches from there; UserError without them."""
    files = batch_files(run)
    recorded = sorted({file.step for file in files})
    if step not in recorded:
        raise UserError(f"step {step} of {run} is not recorded; {_recorded(recorded)}")
    earlier = {n: path for n, path in whole_checkpoints(run).items() if n < step}
    start = max(earlier, default=0)
    missing = sorted(set(range(start + 1, step)) - set(recorded))
    if missing:
        begin = f"checkpoint step_{start}" if start else "the initial model"
        lacking = f"{_ranges(missing)} {'is' if len(missing) == 1 else 'are'} not recorded"
        raise UserError(
            f"step {step} cannot be recomputed: from {begin} on it needs all steps before it, but "
            f"{lacking} (checkpoint.record_batches: true keeps them){_failure(files, step)}"
        )
    checkpoint = earlier.get(start)
    if checkpoint is not None and (damage := find_damage(checkpoint, checksums=True)):
        raise UserError(
            f"checkpoint {checkpoint} is not what the run wrote: {damage}; without its weights "
            f"step {step} cannot be recomputed"
        )
    wanted = tuple(file for file in files if start < file.step <= step)
    return RecordedStep(run=run, step=step, checkpoint=checkpoint, files=wanted)


def recipe_then(recipe: Recipe, wanted: RecordedStep) -> Recipe:
    """The recipe as it was when the step was taken, where a resumed run may have changed it."""
    last = read_batch(wanted.files[-1].path)
    learner = type(recipe.learner).model_validate({**recipe.learner.model_dump(), **last.learner})
    return recipe.model_copy(update={"steps": last.total_steps, "learner": learner})


async def recomputed(
    wanted: RecordedStep, learner: Learner, on_batch: Callable[[Comparison], None]
) -> list[Comparison]:
    """Every batch up to the step; ends with the first one that cannot be trained on."""
    if wanted.checkpoint is not None:
        await learner.load(wanted.checkpoint)
    found: list[Comparison] = []
    for file in wanted.files:
        recorded = read_batch(file.path)
        outcome = await _outcome(learner, recorded.batch)
        found.append(
            Comparison(
                batch=recorded.batch,
                recorded=recorded.outcome,
                recomputed=outcome,
                learner=recorded.learner,
            )
        )
        on_batch(found[-1])
        if outcome.error is not None:
            break
    return found


def explanation(wanted: RecordedStep, found: Sequence[Comparison]) -> Iterator[str]:
    """Why figures differ, as far as it can be told from them."""
    first = next((item for item in found if item.differing), None)
    if first is None:
        return
    batch, names = first.batch, first.differing
    yield f"the first to differ is step {batch.step}{' (stage)' if batch.is_stage else ''}, in " + (
        ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
    )
    last = found[-1]
    if changed := _changed(first.learner, last.learner):
        yield (
            f"it was taken with {changed[0]}, step {last.batch.step} with {changed[1]}; all are "
            "recomputed with the latter, which rounds otherwise"
        )
    ours, theirs = first.recorded.metrics or {}, first.recomputed.metrics or {}
    if first is found[0] and GAP in ours and GAP in theirs:
        limit = max(STRANGE_GAP, STRANGE_GAP_FACTOR * ours[GAP])
        if not theirs[GAP] <= limit:
            yield (
                f"the weights of {wanted.start} are not those that the run had there: its rollout "
                f"engine differed from them by {ours[GAP]:.1e} in the log-probability of a token, "
                f"now by {theirs[GAP]:.1e}. Has the folder of the model changed since?"
            )


async def _outcome(learner: Learner, batch: TrainBatch) -> Outcome:
    try:
        report = await learner.train(batch)
    except CoveyError as error:
        place = error.place if isinstance(error, NonFinite) else None
        return Outcome(error=str(error), place=place)
    return Outcome(metrics=report.metrics)


def _changed(
    before: Mapping[str, JsonValue], after: Mapping[str, JsonValue]
) -> tuple[str, str] | None:
    """Settings that differ, as they were and as they are."""
    names = sorted(name for name in before if before[name] != after.get(name))
    if not names:
        return None
    then, now = (
        ", ".join(f"learner.{name} {settings.get(name)}" for name in names)
        for settings in (before, after)
    )
    return then, now


def _same(a: float | None, b: float | None) -> bool:
    both_nan = a is not None and b is not None and a != a and b != b
    return a == b or both_nan


def _failure(files: Sequence[BatchFile], step: int) -> str:
    """What the run said of a step that it failed in."""
    failed = next((file for file in files if file.step == step and file.is_failed), None)
    if failed is None:
        return ""
    return f"\nwhat the run said of it: {read_batch(failed.path).outcome.error}"


def _recorded(steps: Sequence[int]) -> str:
    if not steps:
        return (
            "no step is: checkpoint.record_batches was false, or a checkpoint has just taken the "
            "place of all batches before it"
        )
    return f"those since the oldest checkpoint are: {_ranges(steps)}"


def _ranges(steps: Sequence[int]) -> str:
    """`steps 3 to 5 and 9`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    words = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    return f"{'step' if len(steps) == 1 else 'steps'} {' and '.join(words)}"
