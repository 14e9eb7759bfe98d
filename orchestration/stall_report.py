"""Who is to blame when a deadline passes: from the open waits to a few lines, the culprit first.

Refuses to know how waits are registered and what becomes of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from orchestration.waiting import Wait, Whereabouts

MAX_OTHERS = 12  # of hundreds of groups that wait alike


def stall_report(
    key: int, waits: Sequence[Wait], whereabouts: Mapping[str, Whereabouts], now: float
) -> str:
    """What to say when the wait of this key has passed its deadline."""
    chain = WaitChains(waits).through(key)
    culprit, expired = chain[-1], next(wait for wait in chain if wait.key == key)
    lines = [f"{culprit.owner} has not answered for {now - culprit.since:.1f} s"]
    if culprit.asked:
        lines[0] += f"; it was asked last: {culprit.asked}"
    if culprit.owner in whereabouts:
        lines += whereabouts[culprit.owner].tail()
    lines.append(f"  who waits for whom: {chain_in_words(chain, now)}")
    if expired.deadline is not None:
        limit = f"{expired.deadline - expired.since:g} s"
        lines.append(f"  the deadline that passed: {limit} for {_named(expired)}")
    others = [wait for wait in waits if wait not in chain]
    if others:
        lines.append("  other open waits, oldest first:")
        lines += [f"    {_named(wait)}, since {now - wait.since:.1f} s" for wait in others][
            :MAX_OTHERS
        ]
        if len(others) > MAX_OTHERS:
            lines.append(f"    and {len(others) - MAX_OTHERS} more")
    return "\n".join(lines)


class WaitChains:
    """Who waits for whom among the open waits of one moment."""

    def __init__(self, waits: Sequence[Wait]) -> None:
        self._by_key = {wait.key: wait for wait in waits}
        self._inside: dict[int, list[Wait]] = defaultdict(list)  # by the wait they are a part of
        self._alone: dict[str, list[Wait]] = defaultdict(list)  # part of none, by owner
        for wait in waits:
            if wait.part_of is None:
                self._alone[wait.owner].append(wait)
            else:
                self._inside[wait.part_of].append(wait)

    def through(self, key: int) -> list[Wait]:
        """From the outermost wait over this one to the culprit: who at last keeps all waiting.

        Of several waits that one depends on it is the oldest: what began later had less time.
        """
        chain = [self._by_key[key]]
        while (outer := chain[0].part_of) is not None and outer in self._by_key:
            chain.insert(0, self._by_key[outer])
        while inner := self._depends_on(chain[-1]):
            chain.append(min(inner, key=lambda wait: wait.since))
        return chain

    def _depends_on(self, wait: Wait) -> list[Wait]:
        behind = [other for owner in wait.behind() for other in self._alone.get(owner, ())]
        return [*self._inside.get(wait.key, ()), *behind]


def chain_in_words(chain: Sequence[Wait], now: float) -> str:
    """`the run waits for A (what, since 3.0 s), which waits for B (...)`."""
    links = [
        f"{wait.owner} ({', '.join(filter(None, (wait.asked, f'since {now - wait.since:.1f} s')))})"
        for wait in chain
    ]
    return f"the run waits for {', which waits for '.join(links)}"


def _named(wait: Wait) -> str:
    return f"{wait.owner}: {wait.asked}" if wait.asked else wait.owner
