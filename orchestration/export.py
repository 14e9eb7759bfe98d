"""Copies the model out of a checkpoint into a folder of its own, and says where it came from.

Refuses to know what a model's files mean: the learner wrote them (learner/weights.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo.errors import UserError
from orchestration.best import BEST_FILE
from orchestration.checkpoint import (
    CHECKPOINTS,
    LATEST_FILE,
    checkpoint_folder,
    latest_checkpoint,
    marked_step,
    whole_steps,
)
from orchestration.manifest import find_damage, folder_name, step_named
from orchestration.metrics_file import read_metrics
from orchestration.resume import known_runs
from orchestration.run_directory import CONFIG_FILE, write_json
from orchestration.yaml_source import read_yaml

# In a checkpoint.
MODEL_FOLDER = "huggingface"
ADAPTER_FOLDER = "adapter"
ORIGIN_FILE = "covey_origin.json"
RUNS = Path("runs")  # where a recipe without `output` makes its runs
# How long things took says nothing about the model.
_NOT_OF_THE_MODEL = ("timing_s/", "idle/", "perf/", "checkpoint/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an exported model comes from; the content of its covey_origin.json."""

    run: str  # the name of its folder
    step: int
    model: object  # that the run began with
    algorithm: object  # name and settings
    metrics: dict[str, float]  # of this step, evaluations included


def export_model(
    run_name: str,
    step_name: str,
    target: Path,
    *,
    force: bool,
    remark: Callable[[str], None],
    adapter: bool = False,
) -> Origin:
    """Copy the model of one step, or its adapter, into `target`: whole or not at all.

    `remark` is told what is missing or damaged and does not prevent it.
    """
    run = _run_folder(run_name)
    step = _step(run, step_name, remark)
    folder = checkpoint_folder(run, step)
    part = ADAPTER_FOLDER if adapter else MODEL_FOLDER
    if adapter and not (folder / part).is_dir():
        raise UserError(
            f"checkpoint {folder} holds no adapter: the run trained without learner.lora. Leave "
            "--adapter out to export the whole model"
        )
    damage = find_damage(folder, checksums=True, below=f"{part}/")
    if damage is not None:
        raise UserError(f"checkpoint {folder} is damaged: {damage}. {_choice(run)}")
    _refuse_checkpoints(target)
    _refuse_occupied(target, force=force)
    origin = _origin(run, step, remark)
    draft = target.with_name(f".{target.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(folder / part, draft)
        write_json(draft / ORIGIN_FILE, asdict(origin))
        if target.is_dir():
            shutil.rmtree(target)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(f"cannot copy {folder / part} to {target}: {error}") from error
    return origin


def _run_folder(name: str) -> Path:
    for path in (Path(name), RUNS / name):
        if (path / CONFIG_FILE).is_file():
            return path.resolve()
    raise UserError(f"{name}: there is no such run. {known_runs(RUNS)}")


def _step(run: Path, name: str, remark: Callable[[str], None]) -> int:
    if name == "latest":
        folder = latest_checkpoint(run, remark)
        step = None if folder is None else step_named(folder.name)
    elif name == "best":
        step = _best_step(run)
    else:
        step = step_named(folder_name(name))
        if step is None:
            raise UserError(f"STEP is {name!r}; expected a number, latest or best. {_choice(run)}")
    if step is None or step not in whole_steps(run):
        raise UserError(f"{run} has no complete checkpoint of step {name}. {_choice(run)}")
    return step


def _best_step(run: Path) -> int | None:
    step, marker = marked_step(run, BEST_FILE), run / CHECKPOINTS / BEST_FILE
    if step is None and marker.exists():
        raise UserError(f"{marker} is damaged: it names no checkpoint. {_choice(run)}")
    if step is None and whole_steps(run):
        raise UserError(
            f"{run} has no best checkpoint: a run has one if it evaluates (data.evaluation) "
            f"and keeps it (checkpoint.keep_best). {_choice(run)}"
        )
    return step


def _choice(run: Path) -> str:
    """Which steps there are, and what they are called."""
    marks: dict[int | None, list[str]] = {}
    for marker in (LATEST_FILE, BEST_FILE):
        marks.setdefault(marked_step(run, marker), []).append(marker)
    steps = [
        f"{step} ({', '.join(marks[step])})" if step in marks else str(step)
        for step in whole_steps(run)
    ]
    return f"Steps in {run / CHECKPOINTS}: {', '.join(steps) or 'none'}"


def _refuse_checkpoints(target: Path) -> None:
    """Whatever is in them is a run's own, and sealed."""
    path = target.resolve()
    for folder in (path, *path.parents):
        if folder.name == CHECKPOINTS and (folder.parent / CONFIG_FILE).is_file():
            raise UserError(
                f"DIR is {target}, which is among the checkpoints of {folder.parent}; name a "
                "folder outside of them"
            )


def _refuse_occupied(target: Path, *, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"DIR is {target}, which is a file; expected a new or an empty folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise UserError(
            f"DIR is {target}, which is not empty; name a new folder, or replace this one with "
            "--force"
        )
    has_config = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not has_config or not any(target.glob("*.safetensors")):
        raise UserError(
            f"--force would delete {target}, which holds no model (config.json, *.safetensors); "
            "remove it yourself, or name a new folder"
        )


def _origin(run: Path, step: int, remark: Callable[[str], None]) -> Origin:
    recipe = read_yaml(run / CONFIG_FILE).data
    return Origin(
        run=run.name,
        step=step,
        model=recipe["model"],
        algorithm=recipe["algorithm"],
        metrics=_metrics_at(run, step, remark),
    )


def _metrics_at(run: Path, step: int, remark: Callable[[str], None]) -> dict[str, float]:
    metrics = read_metrics(run, remark, step=step).get(step, {})
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and not name.startswith(_NOT_OF_THE_MODEL)
    }
