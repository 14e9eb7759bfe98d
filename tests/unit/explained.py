"""Runs `covey explain` in this process and reads what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from tests.unit.grpo_groups import ENGINE, NEW, OLD, REFERENCE, REWARDS
from tests.unit.small_project import REPOSITORY

EXAMPLES = REPOSITORY / "recipes" / "groups"
# As the papers print it: population deviation, no eps, no correction for the engine.
LITERAL = ("std_ddof=0", "std_eps=0", "importance_cap=null")

Json = dict[str, Any]


def explain(
    capsys: pytest.CaptureFixture[str],
    algorithm: str,
    file: Path | str,
    *settings: str,
    **options: Any,
) -> Json:
    """The explanation as --json prints it."""
    words = [word for setting in settings for word in ("--set", setting)]
    words += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    status = main(["explain", algorithm, str(file), "--json", *words])
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, ""), shown.err
    found: Json = json.loads(shown.out)
    return found


def refused(
    capsys: pytest.CaptureFixture[str], algorithm: str, file: Path | str, *settings: str
) -> str:
    """The one message of a mistake."""
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["explain", algorithm, str(file), *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def column(found: Json, name: str, group: int = 0) -> list[Any]:
    """One entry per kept rollout of a group."""
    return [rollout[name] for rollout in found["groups"][group]["rollouts"] if rollout["kept"]]


def written(folder: Path, value: object, name: str = "group.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(value))
    return file


def rollout(tokens: list[int], **fields: Any) -> Json:
    return {"tokens": tokens, **fields}


def toy(*, rewards: list[float] | None = None, **fields: Any) -> Json:
    """The group of the hand-worked numbers."""
    rollouts = [
        rollout(
            list(range(len(old))),
            log_probs=engine,
            proximal_log_probs=old,
            current_log_probs=new,
            reference_log_probs=reference,
        )
        for engine, old, new, reference in zip(ENGINE, OLD, NEW, REFERENCE, strict=True)
    ]
    return {"rollouts": rollouts, "outcomes": {"answer": rewards or REWARDS}, **fields}
