"""Unit tests as data sets write them, and their results for one generated program.

The judgement is made here or in a sandbox that the program is not in; expected results never come
near the program. Knows nothing of batches or rewards.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

from reward_services.sandbox import WALL_FACTOR, Program, RunReport, Sandbox, SandboxLost
from reward_services.sandbox_config import SandboxConfig

Outcome = Literal["passed", "wrong", "failed", "time", "output"]

_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintTest:
    """What a program has to print when it reads this."""

    stdin: str
    stdout: str


UnitTest = PrintTest | str  # str: Python statements that call the program's functions


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """How one unit test ended; `detail` says it in words."""

    __test__ = False  # pytest takes the name for one of its own

    outcome: Outcome
    detail: str = ""


def read_tests(column: object) -> list[UnitTest]:
    """The tests of a data row; what is none of the known forms is a ValueError."""
    if isinstance(column, str) and column.lstrip()[:1] in ("[", "{"):
        with suppress(json.JSONDecodeError):  # Python may start with a bracket as well
            column = json.loads(column)
    if isinstance(column, str):
        column = [column]
    if isinstance(column, dict) and {"inputs", "outputs"} <= column.keys():
        pairs = zip(column["inputs"], column["outputs"], strict=True)
        column = [{"input": i, "output": o} for i, o in pairs]
    if not isinstance(column, list) or not column:
        raise ValueError(f"found {column!r:.80} as unit tests; expected a list, a text or pairs")
    return [_read_test(test) for test in column]


def program_in(completion: str) -> str:
    """The last fenced block of an answer; without one, all of it."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def results(
    sandbox: Sandbox,
    config: SandboxConfig,
    source: str,
    tests: Sequence[UnitTest],
    *,
    end: float,
) -> list[TestResult]:
    """One result per test, in order; what has not run by `end` (time.monotonic) fails by time."""
    found: list[TestResult] = []
    while len(found) < len(tests) and time.monotonic() < end:
        left = tests[len(found) :]
        try:
            if isinstance(left[0], PrintTest):
                found.append(_printed(sandbox, config, source, left[0], end))
            elif _are_statements(left):
                found += _called(sandbox, config, source, left, end)
            else:
                raise ValueError("found printing and calling tests in one row; expected one kind")
        except SandboxLost:
            if not found or time.monotonic() < end:  # else the program took the time for it
                raise
    late = TestResult(outcome="time", detail="no time is left for this test")
    return found + [late] * (len(tests) - len(found))


def _read_test(test: object) -> UnitTest:
    if isinstance(test, str):
        return test
    if isinstance(test, dict):
        stdin, stdout = test.get("input"), test.get("output")
        if isinstance(stdin, str) and isinstance(stdout, str):
            return PrintTest(stdin=stdin, stdout=stdout)
    raise ValueError(
        f"found unit test {test!r:.80}; expected Python statements, or "
        "{input: text, output: text}"
    )


def _are_statements(tests: Sequence[UnitTest]) -> TypeGuard[Sequence[str]]:
    return all(isinstance(test, str) for test in tests)


def _printed(
    sandbox: Sandbox, config: SandboxConfig, source: str, test: PrintTest, end: float
) -> TestResult:
    program = Program(files={"main.py": source}, main="main.py", stdin=test.stdin.encode())
    report = sandbox.run(program, cpu_s=config.time_s, until=end)
    if report.ending != "finished":
        return TestResult(outcome=report.ending, detail=report.detail)
    printed = report.stdout.decode(errors="replace")
    if _lines(printed) == _lines(test.stdout):
        return TestResult(outcome="passed")
    return TestResult(outcome="wrong", detail=f"printed {printed[:200]!r}")


def _lines(text: str) -> list[str]:
    """Spaces at the end of a line and empty lines at the end do not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _called(
    sandbox: Sandbox, config: SandboxConfig, source: str, tests: Sequence[str], end: float
) -> list[TestResult]:
    """Results of the first test at least, and of all unless one hangs or ends the program."""
    wall_s = config.time_s * WALL_FACTOR
    settings = json.dumps({"tests": list(tests), "wall_s": wall_s})
    cpu_s = config.time_s * len(tests) + 1
    program_end, tester_end = socket.socketpair()
    with program_end, tester_end:
        program = sandbox.started(
            _script("program_side", "answer.py", source),
            cpu_s=cpu_s,
            until=end,
            link_fd=program_end.fileno(),
        )
        with program:
            program.wait_until_started()  # and waits there until the tests ask it something
            tester = sandbox.started(
                _script("tester_side", "tests.json", settings),
                cpu_s=cpu_s,
                until=end,
                link_fd=tester_end.fileno(),
            )
            program_end.close()  # now a program that ends is a closed connection
            tester_end.close()
            with tester:
                return _reported(tester.report(), len(tests))


def _script(name: str, data_name: str, data: str) -> Program:
    """One of our modules with what it imports from us, and the data that it reads."""
    ours = {f"{_HERE.name}/{n}.py": (_HERE / f"{n}.py").read_text() for n in (name, "far_values")}
    start = (
        "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n"
        f"from {_HERE.name}.{name} import main\nmain()\n"
    )
    return Program(files={"main.py": start, data_name: data, **ours}, main="main.py")


def _reported(report: RunReport, num_tests: int) -> list[TestResult]:
    lines = [json.loads(line) for line in report.stdout.splitlines()]
    found = [TestResult(outcome=line["outcome"], detail=line["detail"]) for line in lines]
    if not found or (len(found) < num_tests and report.ending != "finished"):
        ending: Outcome = "failed" if report.ending == "finished" else report.ending
        found.append(TestResult(outcome=ending, detail=report.detail or "it ended the tests"))
    return found
