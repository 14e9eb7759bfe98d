"""Runs inside a sandbox of its own: the unit tests, with the program's functions at a distance.

A name that the tests use and nobody here defines is a function of the program next door. Arguments
and results travel as Python literals, so the program can answer, and do nothing else, to the tests.
Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

LINK_FD = 3
_MAX_REPLY_BYTES = 1 << 20


class _Expired(BaseException):
    """Not an Exception, which a test may expect."""


class _ProgramEnded(BaseException):
    """It can answer no more; the tests after this one need it to start anew."""


def main() -> None:
    """One line of JSON per test on standard output, as it ends; the last if it cost the program."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print is no report
    settings = json.loads((Path(__file__).parent / "tests.json").read_text(encoding="utf-8"))
    link = open(LINK_FD, "wb", buffering=0, closefd=False)  # noqa: SIM115 (open until the end)
    replies: BinaryIO = open(LINK_FD, "rb", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGALRM, _expire)

    def called(name: str) -> Callable[..., object]:
        def function(*arguments: object, **named: object) -> object:
            try:
                link.write(json.dumps(repr((name, arguments, named))).encode() + b"\n")
            except BrokenPipeError:
                raise _ProgramEnded from None
            return _value(replies.readline(_MAX_REPLY_BYTES))

        return function

    for test in settings["tests"]:
        outcome, detail, is_last = _run(test, called, settings["wall_s"])
        report.write(json.dumps({"outcome": outcome, "detail": detail[:300]}) + "\n")
        report.flush()
        if is_last:
            os._exit(0)


def _run(test: str, called: Callable[[str], Any], wall_s: float) -> tuple[str, str, bool]:
    try:
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        code = ast.parse(test)
        exec(compile(code, "test", "exec"), {n: called(n) for n in _foreign_names(code)})
    except _Expired:
        return "time", f"no result within {wall_s:g} s", True
    except _ProgramEnded:
        return "failed", "the program ended, or answered at endless length", True
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}", False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "passed", "", False


def _foreign_names(code: ast.AST) -> set[str]:
    """Read somewhere and bound nowhere: neither in the test nor by Python itself."""
    read: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(code):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                bound.add(name)
    return read - bound


def _value(reply: bytes) -> object:
    if not reply.endswith(b"\n"):
        raise _ProgramEnded
    answer = json.loads(reply)
    if "value" in answer:
        return ast.literal_eval(answer["value"])
    kind, message = answer["raised"]
    error = getattr(builtins, str(kind), RuntimeError)
    if not (isinstance(error, type) and issubclass(error, Exception)):
        error = RuntimeError
    raise error(f"the program raised {kind}: {message}")


def _expire(signum: int, frame: FrameType | None) -> None:
    raise _Expired


if __name__ == "__main__":
    main()
