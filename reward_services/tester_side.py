"""Runs inside a sandbox of its own: the unit tests, with the program's functions at a distance.

A name that the tests use and nobody here defines is one of the program next door. Values travel as
data, so the program can answer, and do nothing else, to the tests. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import FrameType

from reward_services.far_values import Far, Link, LinkClosed

LINK_FD = 3


class _Expired(BaseException):
    """Not an Exception, which a test may expect."""


def main() -> None:
    """One line of JSON per test on standard output, as it ends; the last if it cost the program."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print is no report
    settings = json.loads((Path(__file__).parents[1] / "tests.json").read_text(encoding="utf-8"))
    link = Link(LINK_FD)
    signal.signal(signal.SIGALRM, _expire)
    for test in settings["tests"]:
        outcome, detail, is_last = _run(test, link, settings["wall_s"])
        report.write(json.dumps({"outcome": outcome, "detail": detail[:300]}) + "\n")
        report.flush()
        if is_last:
            break
    os._exit(0)


def _run(test: str, link: Link, wall_s: float) -> tuple[str, str, bool]:
    try:
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        code = ast.parse(test)
        names: dict[str, object] = {"__name__": "test"}
        for name in sorted(_foreign_names(code)):
            with suppress(NameError):  # the test meets it again where it uses the name
                names[name] = _module(name, link.ask("name", name))
        exec(compile(code, "test", "exec"), names)
    except _Expired:
        return "time", f"no result within {wall_s:g} s", True
    except LinkClosed as error:
        return "failed", str(error), True
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}", False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "passed", "", False


def _module(name: str, value: object) -> object:
    """For a module that only the program imports, the genuine one of that name; else the value."""
    name = {"np": "numpy"}.get(name, name)
    is_module = type(value) is Far and name in sys.stdlib_module_names | {"numpy"}
    return import_module(name) if is_module else value


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


def _expire(signum: int, frame: FrameType | None) -> None:
    raise _Expired
