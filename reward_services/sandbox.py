"""Runs generated programs where they can harm nobody, and says how each of them ended.

The verdict comes from this side alone: what a program printed, and how the kernel says it ended.
No expected result ever enters a sandbox. Blocking on purpose: callers use threads.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo.errors import Transient
from reward_services.sandbox_config import SandboxConfig

Ending = Literal["finished", "failed", "time", "output"]

_PACKAGE_ROOT = Path(__file__).parents[1]
_CHUNK_BYTES = 65536
WALL_FACTOR = 2.0  # a program that waits for its turn on a crowded machine is no slow program
_START_S = 30.0  # for building a sandbox, which takes 50 ms: a crowded machine is no slow program
_STOP_S = 5.0  # for the kernel to end what a sandbox runs


class SandboxLost(Transient):
    """The sandbox itself failed, which says nothing about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run: files by name, one of which is the Python program, and its input."""

    files: Mapping[str, str]
    main: str
    stdin: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How one run ended. `detail` is for people: the last words, or the signal."""

    ending: Ending
    stdout: bytes
    detail: str


class Sandbox:
    """Starts programs under one set of limits."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        interpreter = Path(sys._base_executable)  # type: ignore[attr-defined]  # not the venv's
        self._python = str(interpreter.resolve())

    def missing(self) -> str | None:
        """Why programs cannot be isolated on this host; None: they can."""
        try:
            report = self.run(Program(files={"main.py": "print('ok')"}, main="main.py"), cpu_s=10)
        except SandboxLost as error:
            return str(error)
        if report.stdout != b"ok\n":
            return f"a first program ended as {report.ending!r}: {report.detail}"
        return None

    def run(self, program: Program, *, cpu_s: float, until: float = math.inf) -> RunReport:
        """Run a program to its end, or until a limit or the clock (time.monotonic) ends it."""
        with self.started(program, cpu_s=cpu_s, until=until) as running:
            return running.report()

    def started(
        self, program: Program, *, cpu_s: float, until: float = math.inf, link_fd: int = -1
    ) -> Running:
        """Start a program; `link_fd` is a connection that it finds under a fixed number."""
        settings = self._settings(program, cpu_s)
        return Running(settings, program.stdin, link_fd, self._config, until=until)

    def _settings(self, program: Program, cpu_s: float) -> dict[str, object]:
        config = self._config
        return {
            "isolation": config.isolation,
            "files": dict(program.files),
            "main": program.main,
            "python": self._python,
            "python_folder": str(Path(sys.base_prefix).resolve()),
            "folders": config.folders,
            "wall_s": cpu_s * WALL_FACTOR,
            "cpu_s": cpu_s,
            "memory_mb": config.memory_mb,
            "processes": config.processes,
            "scratch_mb": config.scratch_mb,
        }


class Running:
    """One program under way; leaving the `with` block ends all of its processes."""

    def __init__(
        self,
        settings: dict[str, object],
        stdin: bytes,
        link_fd: int,
        config: SandboxConfig,
        *,
        until: float,
    ) -> None:
        self._wall_s, self._until = float(str(settings["wall_s"])), until
        self._max_output = config.output_kb * 1024
        self._folder = None
        if config.isolation == "none":
            self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            settings = {**settings, "scratch": self._folder.name}
            for name, text in dict(settings["files"]).items():  # type: ignore[call-overload]
                path = Path(self._folder.name, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, errors="surrogatepass")
        self._status, status_fd = os.pipe()
        settings_fd, stdin_fd = _in_memory(json.dumps(settings).encode()), _in_memory(stdin)
        code = "from reward_services.sandbox_child import main"
        start = f"import sys; sys.path.insert(0, {str(_PACKAGE_ROOT)!r}); {code}"
        self._process = subprocess.Popen(
            [
                sys.executable,
                *("-I", "-S", "-c"),
                f"{start}; main({settings_fd}, {status_fd}, {link_fd})",
            ],
            stdin=stdin_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[settings_fd, status_fd, *([link_fd] if link_fd >= 0 else [])],
            env={},
            start_new_session=True,
        )
        for fd in (settings_fd, stdin_fd, status_fd):
            os.close(fd)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        os.close(self._status)
        if self._folder is not None:
            self._folder.cleanup()

    def end(self) -> None:
        """Kill every process of the sandbox; its process 1 takes the others with it."""
        if self._process.poll() is None:
            if self._folder is None:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_until_started(self) -> None:
        """Returns when the program is about to run; its end has then to be seen otherwise."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._status, selectors.EVENT_READ)
            left = min(_START_S, max(0.0, self._until - time.monotonic()))
            told = os.read(self._status, _CHUNK_BYTES) if selector.select(left) else b""
        if b"started" not in told:
            raise SandboxLost(f"the sandbox could not be built: {told.decode() or 'no sign of it'}")

    def report(self) -> RunReport:
        """Wait for the end, or bring it about."""
        output = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
        stopped = self._collect(output)
        self.end()
        if stopped is None:
            status = [json.loads(line) for line in bytes(output["status"]).splitlines()]
            return _ended(status, bytes(output["stdout"]), bytes(output["stderr"]))
        limit = f"{self._wall_s:g} s" if stopped == "time" else f"{self._max_output} bytes"
        detail = f"stopped: more {stopped} than {limit}"
        if stopped == "time" and time.monotonic() >= self._until:
            detail = "stopped: no time is left for its tests"
        return RunReport(ending=stopped, stdout=bytes(output["stdout"]), detail=detail)

    def _collect(self, output: dict[str, bytearray]) -> Literal["time", "output"] | None:
        """Read all pipes until they close; says which limit was passed, if one was."""
        assert self._process.stdout is not None and self._process.stderr is not None
        deadline, has_started = min(time.monotonic() + _START_S, self._until), False
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ, output["stdout"])
            selector.register(self._process.stderr, selectors.EVENT_READ, output["stderr"])
            selector.register(self._status, selectors.EVENT_READ, output["status"])
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    if not has_started:
                        raise SandboxLost("the sandbox was not built in time")
                    return "time"
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, _CHUNK_BYTES)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    key.data.extend(chunk)
                if output["status"] and not has_started:
                    deadline = min(time.monotonic() + self._wall_s, self._until)
                    has_started = True
                if len(output["stdout"]) + len(output["stderr"]) > self._max_output:
                    return "output"
        return None


def _ended(status: list[dict[str, object]], stdout: bytes, stderr: bytes) -> RunReport:
    told = {key: value for line in status for key, value in line.items()}
    if "error" in told or "started" not in told:
        cause = told["error"] if "error" in told else f"it vanished: {stderr[-500:]!r}"
        raise SandboxLost(f"the sandbox could not be built: {cause}")
    if "exit" not in told:  # the program's doing, as all that comes after the start
        return RunReport(ending="failed", stdout=stdout, detail="the sandbox ended under it")
    code = int(str(told["exit"]))
    if code == 0:
        return RunReport(ending="finished", stdout=stdout, detail="")
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and not stderr):
        detail = "stopped by the kernel: CPU time or memory"
        return RunReport(ending="time", stdout=stdout, detail=detail)
    words = stderr.decode(errors="replace").strip().splitlines()
    how = f"exit status {code}" if code > 0 else f"signal {-code}"
    detail = f"{how}: {words[-1][:200]}" if words else how
    return RunReport(ending="failed", stdout=stdout, detail=detail)


def _in_memory(content: bytes) -> int:
    """A file that is nowhere on disk; the program that reads it cannot change it."""
    fd = os.memfd_create("covey", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seal, add_seals = 0xF, 1033  # no seal, shrink, grow or write; F_ADD_SEALS
    fcntl.fcntl(fd, add_seals, seal)
    return fd
