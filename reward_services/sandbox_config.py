"""Settings of the sandbox that runs generated programs against unit tests."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grpo.config import Schema


class SandboxConfig(Schema):
    """What a program may use, and where its tests stand."""

    tests_column: str = Field(
        "tests",
        description="column with a row's unit tests: Python statements such as 'assert f(2) == 4' "
        "(a list, or one text), or inputs and outputs: {input: ..., output: ...} as a list, or "
        "{inputs: [...], outputs: [...]}",
    )
    partial: bool = Field(True, description="score: share of passed tests; false: 1 if all passed")
    isolation: Literal["required", "none"] = Field(
        "required",
        description="required: refuse to start where the host cannot isolate programs; none: "
        "run them with limits only, as the user who runs covey, with the network and all files",
    )
    time_s: float = Field(
        5.0, gt=0, le=600, description="CPU time of one test; wall time: twice that"
    )
    memory_mb: int = Field(512, ge=64, description="address space of each process of a program")
    processes: int = Field(8, ge=1, description="processes and threads of one program at a time")
    scratch_mb: int = Field(16, ge=1, description="files that a program may write, in memory")
    output_kb: int = Field(256, ge=1, description="what a program may print; more is a failed test")
    parallel: int = Field(2, ge=1, description="programs that one actor runs side by side")
    folders: tuple[str, ...] = Field(
        (), description="further folders that programs can read, under their own paths"
    )
