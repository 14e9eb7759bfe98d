"""What Ray says of a lost process, in words that put the cause first."""

from __future__ import annotations

from orchestration.cluster import in_short

DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutWorker
\tactor_id: 1f2e
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR \
Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. \
Some common causes include: (1) the process was killed by the OOM killer."""


def test_a_dead_process_is_said_before_ray_s_own_words_and_without_its_advice() -> None:
    assert in_short(DEAD) == (
        "its process has ended (Ray: Worker unexpectedly exits with a connection error code 2. "
        "End of file)"
    )


def test_other_failures_are_their_first_line() -> None:
    assert in_short("\n  The node is gone.\n  more\n") == "The node is gone."
    assert in_short("") == ""
