"""The files of a checkpoint: written aside, sealed with a manifest, renamed into place, marked.

    RUN/checkpoints/step_40/     what the learner wrote, driver_state.json, manifest.json
    RUN/checkpoints/latest       the name of the folder to continue from

A folder whose manifest does not fit (manifest.py) is never chosen. Refuses to know when one is due
(saving.py), what the learner writes and what the algorithm's state means.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from grpo.engines import Checkpointed, SavedAside
from grpo.errors import Fatal, UserError
from grpo.pipeline import State
from orchestration.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    find_damage,
    flush_folder,
    folder_name,
    seal,
    step_named,
)
from orchestration.run_directory import write_json

CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"
FORMAT = 1  # raise it when a DriverState of today could be misread by the code of yesterday


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """What the driver needs to go on as if it had never stopped."""

    step: int  # optimiser steps done
    version: int  # of the weights that the learner holds
    seed: int
    next_group: int  # id of the next group that was never admitted
    pending: tuple[int, ...] = ()  # admitted and not trained on yet: to be sampled again
    prompts: Mapping[str, JsonValue] = field(default_factory=dict)  # the data: PromptOrder.record
    algorithm: JsonValue = None  # `encoded_state` of the pipeline's state
    counters: Mapping[str, int] = field(default_factory=dict)  # dropped groups by reason
    skipped: Mapping[str, int] = field(default_factory=dict)  # skipped prompts by reason
    wall_s: Mapping[str, float] = field(default_factory=dict)  # by phase, over the whole run
    tokens: Mapping[str, int] = field(default_factory=dict)  # generated, trained, ...


def encoded_state(state: State) -> JsonValue:
    """The algorithm's state as JSON; it must come back equal, or a resumed run would differ."""
    if state is None:
        return None
    adapter = TypeAdapter(type(state))
    value: JsonValue = adapter.dump_python(state, mode="json")
    assert adapter.validate_json(json.dumps(value)) == state, f"{state!r} does not survive JSON"
    return value


def decoded_state(initial: State, value: JsonValue) -> State:
    """The state that `encoded_state` wrote, of the type of the pipeline's initial state.

    ValueError if it is of another one's.
    """
    if initial is None:
        if value is not None:
            raise ValueError(f"the algorithm keeps no state, but was given {value!r:.60}")
        return None
    state: State = TypeAdapter(type(initial)).validate_json(json.dumps(value))
    return state


async def begin_checkpoint(
    run: Path, step: int, learner: SavedAside, others: Mapping[str, Checkpointed]
) -> Path:
    """A draft folder, once all that training would change is copied or written.

    `others` have a folder in it each, by its name.
    """
    root = run / CHECKPOINTS
    draft = root / f".{folder_name(step)}.draft"
    await asyncio.to_thread(_empty, root, draft)
    await learner.snapshot()
    for name, other in others.items():
        (draft / name).mkdir(parents=True)
        await other.save(draft / name)
    return draft


async def complete_checkpoint(draft: Path, learner: SavedAside, state: DriverState) -> Path:
    """Write the learner's part, seal it and mark it as the latest; training may go on meanwhile."""
    for file in await learner.write(draft):
        if not (draft / file).exists():
            raise Fatal(
                f"the learner saved step {state.step}, but {draft / file} is not there where the "
                "driver runs: `output` must name a folder that all nodes share"
            )
    final = draft.with_name(folder_name(state.step))
    await asyncio.to_thread(_seal, draft, state)
    await asyncio.to_thread(_put_in_place, draft, final, state.step)
    return final


async def load_checkpoint(
    folder: Path, learner: SavedAside, others: Mapping[str, Checkpointed]
) -> DriverState:
    """Verify every checksum, bring all to this point and return the driver's part."""
    damage = await asyncio.to_thread(find_damage, folder, checksums=True)
    if damage is not None:
        raise UserError(
            f"checkpoint {folder} is damaged: {damage}. "
            "Name an older one: --resume RUN/checkpoints/step_N"
        )
    state = read_driver_state(folder)
    await learner.load(folder)
    for name, other in others.items():
        await other.load(folder / name)
    return state


def read_driver_state(folder: Path) -> DriverState:
    """The driver's part of a checkpoint."""
    path = folder / STATE_FILE
    try:
        data = TypeAdapter(dict[str, JsonValue]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {error.errors()[0]['msg']}") from error
    found = data.pop("format", None)
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found}, this version of covey reads format {FORMAT}; "
            "continue with the version of covey that wrote it (see versions.json of the run)"
        )
    try:
        return TypeAdapter(DriverState).validate_python(data)
    except ValidationError as error:
        raise UserError(f"{path} is not a driver state: {error}") from error


def latest_checkpoint(run: Path, remark: Callable[[str], None] | None = None) -> Path | None:
    """The folder that `latest` names if it is whole, else the newest whole one, if there is one.

    `remark` is told once why another one is chosen than expected.
    """
    marked, passed = marked_step(run, LATEST_FILE), list[str]()
    if marked is None and (run / CHECKPOINTS / LATEST_FILE).exists():
        passed.append(f"{LATEST_FILE} is damaged: it names no checkpoint")
    steps = sorted(saved_steps(run) | ({marked} if marked is not None else set()), reverse=True)
    steps.sort(key=lambda step: step != marked)  # stable: the others stay newest first
    for step in steps:
        folder = checkpoint_folder(run, step)
        damage = find_damage(folder, checksums=False)
        if damage is not None:
            passed.append(f"{folder.name} cannot be used: {damage}")
            continue
        if passed and remark is not None:
            found = "; ".join(passed)
            remark(f"{run / CHECKPOINTS}: {found}; {folder.name} is used instead")
        return folder
    return None


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that were completed, the oldest first."""
    return sorted(
        n for n in saved_steps(run) if (checkpoint_folder(run, n) / MANIFEST_FILE).exists()
    )


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / CHECKPOINTS / folder_name(step)


def marked_step(run: Path, marker: str) -> int | None:
    """The step that a marker names, None without one and if it names none."""
    path = run / CHECKPOINTS / marker
    if not path.exists():
        return None
    return step_named(path.read_text(encoding="utf-8", errors="replace").strip())


def mark(run: Path, marker: str, step: int | None) -> None:
    """Let `latest` or `best` name a step; a reader sees the old name or the new one. None: no."""
    path = run / CHECKPOINTS / marker
    if step is None:
        path.unlink(missing_ok=True)
        return
    draft = path.with_name(f".{marker}.draft")
    draft.write_text(f"{folder_name(step)}\n", encoding="utf-8")
    draft.replace(path)
    flush_folder(path.parent)


def saved_steps(run: Path) -> set[int]:
    """Steps that have a folder, be it whole or not."""
    steps = {step_named(path.name) for path in (run / CHECKPOINTS).glob("step_*")}
    return {step for step in steps if step is not None}


def delete_checkpoints(run: Path, steps: Collection[int]) -> None:
    """Delete these checkpoints of the run."""
    for step in steps:
        folder = checkpoint_folder(run, step)
        # Without its manifest a half-deleted folder is never chosen.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def abandon_later(run: Path, step: int) -> None:
    """Go on from this step for good: no later checkpoint is chosen again, whatever happens next.

    Their folders are hidden, and go when the next checkpoint begins.
    """
    later = [saved for saved in saved_steps(run) if saved > step]
    if later:
        mark(run, LATEST_FILE, step if step > 0 else None)
    for folder in (checkpoint_folder(run, saved) for saved in later):
        hidden = folder.with_name(f".{folder.name}.abandoned")
        shutil.rmtree(hidden, ignore_errors=True)  # of an earlier time
        folder.rename(hidden)


def _empty(root: Path, draft: Path) -> None:
    """An empty draft folder; what an interrupted save left behind goes."""
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover)
    draft.mkdir(parents=True)


def _seal(draft: Path, state: DriverState) -> None:
    """Write the driver's state, then the manifest; everything is on disk after it."""
    write_json(draft / STATE_FILE, {"format": FORMAT, **asdict(state)})
    seal(draft, state.step)


def _put_in_place(draft: Path, final: Path, step: int) -> None:
    """Rename, and only then let the marker name it."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # of steps that were done again
        final.rename(old)
    draft.rename(final)
    flush_folder(final.parent)
    mark(final.parent.parent, LATEST_FILE, step)
    if old.exists():
        shutil.rmtree(old)
