"""Answers with right-or-wrong labels: their file, their pairs and which prompts are held out.

Knows no model. A pair is a right and a wrong answer to the same prompt (arXiv:2602.17025); a
prompt whose answers are all right or all wrong gives none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import UserError
from grpo.types import Group

RIGHT_ABOVE = 0.5  # of an outcome score
ROLLOUTS_FILE, COLLECTION_FILE = "rollouts.jsonl", "collection.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRollout:
    """One answer; cut-off answers are wrong."""

    tokens: tuple[int, ...]
    is_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with its labelled answers."""

    id: str
    context: tuple[int, ...]
    rollouts: tuple[LabelledRollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Where labelled answers came from."""

    model: str
    weights: str  # their fingerprint
    tokenizer: str  # fingerprint of its vocabulary
    num_questions: int
    num_rollouts: int
    num_right: int
    num_dropped: int  # prompts without scores


def labelled_pairs(labels: Sequence[bool]) -> list[tuple[int, int]]:
    """All (winner, loser): right, wrong, right -> (0, 1), (2, 1)."""
    right = [place for place, is_right in enumerate(labels) if is_right]
    wrong = [place for place, is_right in enumerate(labels) if not is_right]
    return [(winner, loser) for winner in right for loser in wrong]


def question_pairs(question: Question, *, at_most: int, seed: int) -> list[tuple[int, int]]:
    """The pairs of one prompt; of equal answers the first counts; a seeded choice of too many."""
    first: dict[tuple[int, ...], int] = {}
    for place, rollout in enumerate(question.rollouts):
        first.setdefault(rollout.tokens, place)
    places = list(first.values())
    labels = [question.rollouts[place].is_right for place in places]
    pairs = [(places[winner], places[loser]) for winner, loser in labelled_pairs(labels)]
    if len(pairs) <= at_most:
        return pairs
    return sorted(random.Random(f"pairs/{seed}/{question.id}").sample(pairs, at_most))


def labelled_question(group: Group, *, scorer: str) -> Question:
    """Answers that the scorer does not apply to are left out; cut-off ones are wrong."""
    values = zip(group.rollouts, group.outcomes(scorer), strict=True)
    return Question(
        id=group.prompt.id,
        context=tuple(group.prompt.tokens.tolist()),
        rollouts=tuple(
            LabelledRollout(
                tokens=tuple(rollout.tokens.tolist()),
                is_right=value > RIGHT_ABOVE and not rollout.is_truncated,
            )
            for rollout, value in values
            if value is not None
        ),
    )


def labelled_questions(groups: Sequence[Group], *, scorer: str) -> list[Question]:
    """One question per group, in their order."""
    return [labelled_question(group, scorer=scorer) for group in groups]


def split(
    questions: Sequence[Question], *, share: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """(to train on, to measure on): by prompt, so that no prompt is in both."""
    ranked = sorted(questions, key=lambda question: _rank(seed, question.id))
    num_held_out = max(round(share * len(ranked)), 1)
    return ranked[num_held_out:], ranked[:num_held_out]


def write_collection(folder: Path, questions: Iterable[Question], collection: Collection) -> None:
    """The answers first and what they are last, so that a half-written folder holds neither."""
    write_questions(folder, questions)
    facts = {name: getattr(collection, name) for name in Collection.__dataclass_fields__}
    _replace(folder / COLLECTION_FILE, [json.dumps(facts, indent=2)])


def read_collection(folder: Path) -> tuple[list[Question], Collection]:
    """What `write_collection` wrote."""
    if not (folder / COLLECTION_FILE).is_file():
        raise UserError(
            f"{folder} holds no labelled rollouts ({COLLECTION_FILE}): collect them with "
            "covey preference collect RECIPE"
        )
    facts = json.loads((folder / COLLECTION_FILE).read_text())
    return read_questions(folder), Collection(**facts)


def write_questions(folder: Path, questions: Iterable[Question]) -> None:
    """One line each; a file that was there before is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / ROLLOUTS_FILE, (json.dumps(_row(question)) for question in questions))


def read_questions(folder: Path) -> list[Question]:
    """What `write_questions` wrote."""
    path = folder / ROLLOUTS_FILE
    found: list[Question] = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise UserError(
                    f"{path}, line {number}: found no labelled rollouts ({error}); collect them "
                    "anew with covey preference collect RECIPE"
                ) from error
    return found


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write to a neighbour and rename it, so that no reader sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.writelines(f"{line}\n" for line in lines)
    partial.replace(path)


def _row(question: Question) -> dict[str, object]:
    return {
        "id": question.id,
        "context": question.context,
        "rollouts": [{"tokens": r.tokens, "is_right": r.is_right} for r in question.rollouts],
    }


def _question(row: dict[str, object]) -> Question:
    context, rollouts = row["context"], row["rollouts"]
    assert isinstance(context, list) and isinstance(rollouts, list)
    return Question(id=str(row["id"]), context=tuple(context), rollouts=tuple(_rollouts(rollouts)))


def _rollouts(rows: list[dict[str, object]]) -> Iterator[LabelledRollout]:
    for row in rows:
        tokens = row["tokens"]
        assert isinstance(tokens, list)
        yield LabelledRollout(tokens=tuple(tokens), is_right=bool(row["is_right"]))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
