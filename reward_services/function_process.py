"""A handle on the process that runs a user function or a model: start, ask with a deadline, kill.

Blocking on purpose: the service calls it from a thread. Knows nothing of groups or batching.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

from grpo.errors import BadInput, DeadlineExceeded, UserError, WorkerLost
from reward_services.frames import read_frame, write_frame

# Imports of a scorer (torch, math libraries) may take long once, whatever a call may take.
START_DEADLINE_S = 120.0
FUNCTION_CHILD = "reward_services.function_child"


class FunctionProcess:
    """What judges, in a process of its own, so that it can be killed when it hangs."""

    def __init__(
        self,
        spec: str,
        options: Mapping[str, object],
        *,
        child: str = FUNCTION_CHILD,
        environment: Mapping[str, str] | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        """`options` are keyword arguments of every call, as JSON can carry them; `child` is the
        module that the process runs, with what `environment` adds to this one's."""
        self._arguments = (child, spec, json.dumps(options))
        self._environment = {} if environment is None else dict(environment)
        self._start_deadline_s = start_deadline_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and load the function; a missing file or name is a UserError."""
        paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment = os.environ | paths | self._environment
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a group of its own: what the function started dies with it
        )
        kind, payload = self._exchange(None, self._start_deadline_s)
        if kind == "user_error":
            self.kill()
            raise UserError(str(payload))

    @property
    def is_running(self) -> bool:
        """False before the start and after a death: the next process knows nothing of this one."""
        return self._process is not None

    def asked(self, what: str, payload: object, *, deadline_s: float) -> object:
        """The answer of one of the process's functions; BadInput is what the function raised.

        After DeadlineExceeded or WorkerLost: ask again, and a new process starts.
        """
        if self._process is None:
            self.start()
        kind, answer = self._exchange((what, payload), deadline_s)
        if kind == "failed":
            raise BadInput(str(answer))
        return answer

    def kill(self) -> None:
        """End the process and everything it started; a call under way fails at once."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _exchange(self, request: object, deadline_s: float) -> tuple[str, object]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with _killed_after(process, deadline_s) as expired:
            reply = _asked(process.stdin, process.stdout, request)
        if reply is not None:
            kind, payload = pickle.loads(reply)
            return kind, payload
        _end(process)
        if self._process is process:  # else kill() came first and a new one may be running
            self._process = None
        if expired.is_set():
            raise DeadlineExceeded(f"gave no answer within {deadline_s:g} s and was killed")
        raise WorkerLost(f"the process died with exit status {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not sent yet is sent to nobody
            assert pipe is not None
            pipe.close()


def _asked(stdin: IO[bytes], stdout: IO[bytes], request: object) -> bytes | None:
    """The reply; None: the process is gone. Without a request only wait for the first message."""
    try:
        if request is not None:
            write_frame(stdin, pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        return read_frame(stdout)
    except (BrokenPipeError, ValueError):  # ValueError: the pipe was closed by kill
        return None


@contextmanager
def _killed_after(process: subprocess.Popen[bytes], deadline_s: float) -> Iterator[threading.Event]:
    """Kill the process when the time is over; a read that waits for it then returns."""
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(deadline_s, kill)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
