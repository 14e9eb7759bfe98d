"""What `--resume` means: which run, which checkpoint, and whether the recipe is still the same.

Refuses to know how a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import UserError
from orchestration.checkpoint import (
    CHECKPOINTS,
    LATEST_FILE,
    checkpoint_folder,
    latest_checkpoint,
    saved_steps,
)
from orchestration.manifest import find_damage
from orchestration.run_directory import CONFIG_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """The run to continue and the checkpoint to continue from."""

    run: Path
    checkpoint: Path | None  # None: it ended before its first one, and begins again
    remarks: tuple[str, ...] = ()  # why it is not the checkpoint that one would expect


def resolve_resume(argument: str, output: Path) -> ResumePoint:
    """The run named by `--resume ARGUMENT`: its folder, one of its checkpoints, or its name."""
    named = [Path(argument), output / argument]
    path = next((path.resolve() for path in named if path.is_dir()), None)
    if path is None:
        raise UserError(f"--resume {argument}: there is no such run. {known_runs(output)}")
    if path.parent.name == CHECKPOINTS:
        damage = find_damage(path, checksums=False)
        if damage is not None:
            raise UserError(f"--resume {argument}: checkpoint {path} cannot be used: {damage}")
        return ResumePoint(run=path.parent.parent, checkpoint=path)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"--resume {argument}: {path} is no run folder: it has no {CONFIG_FILE}")
    remarks = list[str]()
    checkpoint = latest_checkpoint(path, remarks.append)
    torn = sorted((path / CHECKPOINTS).glob("step_*"))
    if checkpoint is None and torn:
        # Not a crash's doing: until a checkpoint is whole its folder has another name.
        raise UserError(
            f"--resume {argument}: {path} holds no complete checkpoint ({torn[-1].name}: "
            f"{find_damage(torn[-1], checksums=False)}); put its files back, or start a new run "
            "without --resume"
        )
    return ResumePoint(run=path, checkpoint=checkpoint, remarks=tuple(remarks))


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """The folders of all complete checkpoints by step; contents are not compared."""
    folders = {step: checkpoint_folder(run, step) for step in saved_steps(run)}
    return {
        step: path for step, path in folders.items() if find_damage(path, checksums=False) is None
    }


def oldest_start(run: Path, *, keep: int) -> int:
    """The step of the oldest of the `keep` newest checkpoints; the initial model is one of step 0.

    Checkpoints 50 and 100: 50 with `keep` 2, 0 with 3.
    """
    return sorted({0, *whole_checkpoints(run)})[-keep:][0]


def require_same_recipe(
    saved: Mapping[str, object], given: Mapping[str, object], *, may_change: frozenset[str]
) -> None:
    """Refuse to continue a run under settings that would make its two parts incomparable.

    `may_change` names settings (`steps`) or sections (`checkpoint`) that can differ.
    """
    before, now = _flat(saved), _flat(given)
    changed = [
        f"  {key}: was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
        and key not in may_change
        and key.split(".")[0] not in may_change
    ]
    if changed:
        raise UserError(
            "the recipe differs from the one that the run began with:\n"
            + "\n".join(changed)
            + "\nUndo these changes to continue it, or start a new run without --resume "
            f"(free to change: {', '.join(sorted(may_change))})"
        )


def require_same_data(saved: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Refuse to continue a run on other prompts: some would come twice, others never.

    Both as `PromptOrder.record`: by set, how many prompts and a fingerprint of them.
    """
    changed = [
        f"  {name}: {_of_set(saved.get(name))} when the run began, {_of_set(given.get(name))} now"
        for name in {**saved, **given}
        if saved.get(name) != given.get(name)
    ]
    if changed:
        raise UserError(
            "data.train holds other prompts than the run began with:\n"
            + "\n".join(changed)
            + "\nPut the data back to continue it, or start a new run without --resume"
        )


def _of_set(facts: object) -> str:
    if not isinstance(facts, Mapping):
        return "absent"
    return f"{facts['num_prompts']} prompts (fingerprint {facts['fingerprint']})"


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def known_runs(output: Path) -> str:
    """For the answer to a run that is not there."""
    runs = sorted(path.parent.parent.name for path in output.glob(f"*/{CHECKPOINTS}/{LATEST_FILE}"))
    if not runs:
        return f"No run in {output} has a checkpoint"
    return f"Runs with a checkpoint in {output}: {', '.join(runs[-5:])}"
