"""The ledger against made-up records: whatever was lost, done twice or out of order is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from orchestration.checkpoint import DriverState
from orchestration.ledger import Entry, Ledger, audited, read_entries
from tests.fakes import FakeScorer
from tests.unit.driver_setting import Setting, a_schedule


def planned(group: int) -> str:
    return f"prompt-{group}"


def entry(step: int, group: int, dropped: str | None = None, *, again: bool = False) -> Entry:
    return Entry(step=step, group=group, prompt=planned(group), dropped=dropped, is_replayed=again)


# Two groups a step; 2 fell out; 5 is under way; 6 was never admitted.
GOOD = [entry(1, 0), entry(1, 1), entry(2, 2, "constant"), entry(2, 4), entry(2, 3)]
SAVED = DriverState(step=2, version=2, seed=0, next_group=6, pending=(5,))


def checked(entries: list[Entry], saved: DriverState | None = SAVED, window: int = 1) -> Ledger:
    return audited(entries, saved, window=window, planned=planned)


def test_a_ledger_in_order_has_no_problem_and_counts_what_went_where() -> None:
    ledger = checked([*GOOD, entry(2, 0, again=True)])
    assert ledger.problems == ()
    assert (ledger.num_trained, ledger.num_dropped, ledger.num_pending) == (4, 1, 1)
    assert ledger.num_replayed == 1
    assert ledger.line().endswith("none lost, none twice, in the planned order")


def test_a_lost_group_is_named() -> None:
    assert checked([e for e in GOOD if e.group != 3]).problems == (
        "lost (neither trained on, nor dropped, nor pending): 3",
    )
    (problem,) = checked(GOOD, replace(SAVED, pending=())).problems
    assert problem.endswith("pending): 5")


def test_lines_after_the_checkpoint_do_not_count_as_done() -> None:
    """A resumed run cuts them off and samples what is pending."""
    later = [*GOOD, entry(3, 5, "constant"), entry(3, 6)]
    assert checked(later).problems == ()
    assert checked(later, replace(SAVED, pending=())).problems[0].startswith("lost")


def test_a_group_that_was_trained_on_twice_is_named_and_a_replay_is_none() -> None:
    (problem,) = checked([*GOOD, entry(2, 3)]).problems
    assert problem == "trained on twice, or dropped as well: 3"
    (problem,) = checked([*GOOD, entry(2, 4, "constant")]).problems
    assert problem == "trained on twice, or dropped as well: 4"
    (problem,) = checked([*GOOD, entry(2, 2, "constant")]).problems
    assert problem == "dropped twice: 2"
    (problem,) = checked([*GOOD, entry(2, 4, again=True)]).problems
    assert problem == "replayed before any step had trained on them: 4"


def test_a_group_that_is_done_and_pending_would_be_done_again() -> None:
    (problem,) = checked(GOOD, replace(SAVED, pending=(4, 5))).problems
    assert problem == "done, and pending in the checkpoint of step 2: 4"


def test_an_older_group_behind_a_younger_one_is_out_of_order_unless_the_window_allows_it() -> None:
    swapped = [entry(1, 0), entry(1, 3), entry(2, 2, "constant"), entry(2, 4), entry(2, 1)]
    assert checked(swapped).problems == ("trained on after younger groups: 1",)
    assert checked(swapped, window=2).problems == ()


def test_a_group_with_another_prompt_than_the_planned_one_is_named() -> None:
    other = [*GOOD[:-1], replace(GOOD[-1], prompt="prompt-7")]
    assert checked(other).problems == ("with another prompt than planned: 3",)


def test_a_step_without_a_group_is_named() -> None:
    gap = [entry(1, 0), entry(1, 1), entry(3, 2), entry(3, 3)]
    saved = DriverState(step=3, version=3, seed=0, next_group=4)
    assert checked(gap, saved).problems == ("steps without a group: 2",)


def test_without_a_checkpoint_only_what_was_written_down_is_compared() -> None:
    assert checked([e for e in GOOD if e.group != 3], None).problems == ()
    assert len(checked([*GOOD, entry(2, 3)], None).problems) == 1


def test_lines_are_read_as_the_run_directory_writes_them(tmp_path: Path) -> None:
    records = [
        {"step": 1, "group": 0, "prompt": {"id": "a"}},
        {"step": 1, "group": 0, "replayed": True, "prompt": {"id": "a"}},
        {"step": 2, "group": 1, "dropped": "constant", "detail": "", "prompt": {"id": "b"}},
    ]
    file = tmp_path / "groups.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step":2,"gr')
    assert list(read_entries(file)) == [
        Entry(step=1, group=0, prompt="a"),
        Entry(step=1, group=0, prompt="a", is_replayed=True),
        Entry(step=2, group=1, prompt="b", dropped="constant"),
    ]


def test_the_driver_keeps_the_ledger_in_an_overlapping_run_that_drops_and_stops() -> None:
    schedule = a_schedule(max_staleness=2, steps=6, checkpoint_every=1)
    setting = Setting(schedule, scorer=FakeScorer(failing=frozenset({1, 4, 5, 9})))
    setting.after_checkpoint = lambda progress: (
        setting.driver.request_stop() if progress.step == 4 else None
    )
    assert not setting.run()
    progress = setting.checkpoints[-1]
    entries = [
        Entry(step=step.step, group=done.group.id, prompt=done.group.prompt.id)
        for step in setting.journal.steps
        for done in step.groups
    ]
    entries += [
        Entry(step=1, group=fallen.group.id, prompt=fallen.group.prompt.id, dropped="equal")
        for fallen in setting.journal.fallen
        if fallen.group.id not in progress.pending
    ]
    saved = DriverState(
        step=progress.step,
        version=progress.version,
        seed=0,
        next_group=progress.next_group,
        pending=progress.pending,
    )
    ledger = checked(entries, saved)
    assert ledger.problems == ()
    assert ledger.num_dropped == 4
    assert ledger.num_pending > 0
