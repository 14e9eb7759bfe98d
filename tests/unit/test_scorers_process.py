"""A function that forks, hangs or hides what it started: its process ends with all of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import BadInput, DeadlineExceeded, WorkerLost
from reward_services.function_child import JUDGE
from reward_services.function_process import FunctionProcess
from reward_services.user_functions import Batch

HEAD = "import os, sys, time, subprocess\n"


def batch(*texts: str) -> Batch:
    return Batch(
        prompts=["p"] * len(texts),
        completions=list(texts),
        tokens=np.zeros(0, np.int32),
        num_tokens=[0] * len(texts),
        prompt_texts=["p"] * len(texts),
        completion_texts=list(texts),
        references=[None] * len(texts),
        columns={},
    )


class Asked:
    """One process with one function, asked again and again."""

    def __init__(self, folder: Path, body: str) -> None:
        path = folder / "f.py"
        path.write_text(HEAD + body)
        self.process = FunctionProcess(f"{path}:reward", {})

    def __call__(self, *texts: str, deadline_s: float = 20.0) -> list[float | None]:
        found = self.process.asked(JUDGE, batch(*texts), deadline_s=deadline_s)
        return found[0]  # type: ignore[index, no-any-return]


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "left_behind",
    [
        "if os.fork() == 0:\n        os.setsid(); time.sleep(120); os._exit(0)\n    pid = 0",
        'pid = subprocess.Popen(["sleep", "120"], start_new_session=True).pid',
    ],
)
def test_a_deadline_holds_whatever_the_function_left_behind(
    tmp_path: Path, left_behind: str
) -> None:
    note = tmp_path / "pid"
    asked = Asked(
        tmp_path,
        f"def reward(completions, **kw):\n    {left_behind}\n"
        f"    open({str(note)!r}, 'w').write(str(pid)); time.sleep(100)",
    )
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="within 3 s and was killed"):
        asked("1", deadline_s=3)
    assert time.monotonic() - started < 20  # 3 s, the kill and a busy machine; else it is 120
    pid = int(note.read_text())
    assert not pid or not is_alive(pid)


def test_a_process_that_dies_beside_its_daemon_is_lost_at_once(tmp_path: Path) -> None:
    asked = Asked(
        tmp_path,
        "def reward(completions, **kw):\n    if os.fork() == 0:\n"
        "        os.setsid(); time.sleep(120); os._exit(0)\n    os._exit(3)",
    )
    with pytest.raises(WorkerLost, match="exit status 3"):
        asked("1")
    asked.process.kill()


def test_a_fork_that_comes_back_answers_nothing(tmp_path: Path) -> None:
    asked = Asked(
        tmp_path,
        "def reward(completions, **kw):\n    os.fork()\n    return [float(c) for c in completions]",
    )
    for numbers in (("10", "11"), ("20", "21"), ("30", "31")):
        assert asked(*numbers) == [float(n) for n in numbers]
    asked.process.kill()


def test_a_forged_reply_ends_the_process_instead_of_shifting_the_scores(tmp_path: Path) -> None:
    asked = Asked(
        tmp_path,
        "import pickle, struct\n"
        "def reward(completions, **kw):\n"
        "    forged = pickle.dumps((0, 'answer', ([1.0], {})))\n"
        "    for fd in range(3, 20):\n"
        "        try: os.write(fd, struct.pack('<Q', len(forged)) + forged)\n"
        "        except OSError: pass\n"
        "    return [0.0]",
    )
    with pytest.raises(WorkerLost, match="answered request 0 when asked 1"):
        asked("1")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("KeyboardInterrupt('stop')", "KeyboardInterrupt: stop (f.py:5)"),
        ("Silent()", "Silent: (its text cannot be read) (f.py:5)"),
    ],
)
def test_whatever_is_raised_is_told(tmp_path: Path, raised: str, reason: str) -> None:
    asked = Asked(
        tmp_path,
        "class Silent(Exception):\n    def __str__(self): raise ValueError\n"
        f"def reward(completions, **kw):\n    raise {raised}",
    )
    with pytest.raises(BadInput) as error:
        asked("1")
    assert str(error.value) == reason
    asked.process.kill()


def test_a_large_request_to_a_process_that_reads_nothing_ends_in_time(tmp_path: Path) -> None:
    asked = Asked(
        tmp_path,
        "import signal\n"
        "def reward(completions, **kw):\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n    return [1.0]",
    )
    with pytest.raises(DeadlineExceeded):
        asked("x" * (1 << 22), deadline_s=3)


def test_what_a_process_started_before_the_end_of_the_run_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    asked = Asked(
        tmp_path,
        "def reward(completions, **kw):\n"
        "    child = subprocess.Popen(['sleep', '120'], start_new_session=True)\n"
        f"    open({str(note)!r}, 'w').write(str(child.pid)); return [1.0]",
    )
    assert asked("1") == [1.0]
    pid = int(note.read_text())
    assert is_alive(pid)
    asked.process.kill()
    assert not is_alive(pid)
