"""A handle on the process that runs a user function or a model: start, ask with a deadline, kill.

Blocking on purpose: the service calls it from a thread. Knows nothing of groups or batching.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from grpo.errors import BadInput, DeadlineExceeded, UserError, WorkerLost
from reward_services.frames import exchanged

# Imports of a scorer (torch, math libraries) may take long once, whatever a call may take.
START_DEADLINE_S = 120.0
FUNCTION_CHILD = "reward_services.function_child"
MARK = "COVEY_SCORER_PROCESS"  # in the environment of the process and of all that it starts
_END_S = 5.0  # what outlives SIGKILL that long is stuck in the kernel
_LAST_WORDS_S = 1.0  # for a process that hung up to die by itself, so that its status is told


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
        self._mark = ""
        self._numbers = itertools.count(1)
        self._exchanging = threading.Lock()  # pipes are closed when nobody reads them any more

    def start(self) -> None:
        """Start the process and load the function; a missing file or name is a UserError."""
        self._mark = f"{MARK}={uuid4().hex}"
        paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        mark = dict([self._mark.split("=")])
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | paths | self._environment | mark,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        kind, payload = self._exchange(0, None, self._start_deadline_s)
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
        number = next(self._numbers)
        kind, answer = self._exchange(number, (number, what, payload), deadline_s)
        if kind == "failed":
            raise BadInput(str(answer))
        return answer

    def kill(self) -> None:
        """End the process and everything it started; a call under way fails at once."""
        process, self._process = self._process, None
        if process is not None:
            _kill_all(process, self._mark)
            with self._exchanging:
                _close(process)

    def _exchange(self, number: int, request: object, deadline_s: float) -> tuple[str, object]:
        process = self._process
        assert process is not None
        message = None if request is None else pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        try:
            with self._exchanging:
                reply = _exchanged(process, message, deadline_s)
        except TimeoutError as error:
            self._end(process)
            raise DeadlineExceeded(
                f"gave no answer within {deadline_s:g} s and was killed"
            ) from error
        if reply is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_S)
            ended = process.returncode  # None: it has hung up and lives on
            self._end(process)
            if ended is None:
                raise WorkerLost("the process closed its end of the pipe and was killed")
            raise WorkerLost(f"the process died with exit status {ended}")
        answered, kind, payload = pickle.loads(reply)
        if answered != number:  # whoever wrote this, no later answer can be trusted either
            self._end(process)
            raise WorkerLost(f"the process answered request {answered} when asked {number}")
        return kind, payload

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if self._process is process:  # else kill() came first and a new one may be running
            self._process = None
        _kill_all(process, self._mark)
        with self._exchanging:
            _close(process)


def _exchanged(
    process: subprocess.Popen[bytes], message: bytes | None, deadline_s: float
) -> bytes | None:
    assert process.stdin is not None and process.stdout is not None
    if process.stdin.closed or process.poll() is not None:
        return None
    peer = os.pidfd_open(process.pid)
    try:
        requests, replies = process.stdin.fileno(), process.stdout.fileno()
        return exchanged(requests, replies, message, peer=peer, deadline_s=deadline_s)
    finally:
        os.close(peer)


def _kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """The process, its group, and whoever it started that left the group but kept its mark."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ends_at = time.monotonic() + _END_S
    # Again, because one that is being killed may just have started another.
    while (found := _marked(mark)) and time.monotonic() < ends_at:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Living processes with this entry in the environment that they started with."""
    entry, found = mark.encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # gone, or somebody else's
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # what was not sent yet is sent to nobody
            pipe.close()
