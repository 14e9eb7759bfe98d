"""The process that runs one user function: requests on standard input, replies on standard output.

The function runs in this process's main thread, because libraries that bound their own time with
`signal.alarm` (math-verify does) fail silently in any other. Run by function_process.py only.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from grpo.errors import UserError
from reward_services.frames import read_frame, write_frame
from reward_services.user_functions import (
    Batch,
    Verdict,
    judged,
    loaded_function,
    packed_verdicts,
    reason_of,
)

Judged = Callable[[Batch], list[Verdict]]
Functions = Mapping[str, Callable[[Any], object]]  # what the process can be asked, by name
JUDGE = "judge"


def main(spec: str, options: str) -> None:
    """Judge with the function that `spec` names; `options` are keyword arguments as JSON."""
    serve(lambda: partial(judged, partial(loaded_function(spec), **json.loads(options))))


def serve(load: Callable[[], Judged]) -> None:
    """`serve_all` for a process that judges and does nothing else."""
    serve_all(lambda: {JUDGE: packing(load())})


def packing(judge: Callable[[Any], Sequence[Verdict]]) -> Callable[[Any], object]:
    """A judge whose verdicts travel as `unpacked_verdicts` reads them."""

    def packed(asked: object) -> object:
        return packed_verdicts(judge(asked))

    return packed


def serve_all(load: Callable[[], Functions]) -> None:
    """Load what answers, say so, then answer one request after the other until the input ends."""
    requests, replies = _own_pipes()
    try:
        functions = load()
    except UserError as error:
        write_frame(replies, pickle.dumps((0, "user_error", str(error))))
        return
    write_frame(replies, pickle.dumps((0, "ready", "")))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(requests, inbox), name="requests", daemon=True)
    reader.start()
    own = os.getpid()
    while True:
        number, what, payload = pickle.loads(inbox.get())
        answer = _answer(functions, what, payload)
        if os.getpid() != own:
            os._exit(0)  # a process that the function forked came back from it: not our answer
        write_frame(replies, pickle.dumps((number, *answer), pickle.HIGHEST_PROTOCOL))


def _answer(functions: Functions, what: str, payload: object) -> tuple[str, object]:
    try:
        return "answer", functions[what](payload)
    except BaseException as error:  # whatever the user's code raises is its failure
        return "failed", reason_of(error)


def _read(requests: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    """Ends the process when its parent is gone, even while the function hangs."""
    while (frame := read_frame(requests)) is not None:
        inbox.put(frame)
    os._exit(0)


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the two pipes, and give user code that prints or reads the usual streams instead."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


if __name__ == "__main__":
    main(*sys.argv[1:])
