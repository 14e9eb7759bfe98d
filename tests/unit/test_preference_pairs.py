"""Labelled answers: their pairs, their split, their file; the loss and the figures of the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.errors import UserError
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.questions import (
    Collection,
    LabelledRollout,
    Question,
    labelled_pairs,
    question_pairs,
    read_collection,
    split,
    write_collection,
)
from reward_services.preference.training import Pairs, pair_losses, report_of, trained_head


def a_question(labels: list[bool], *, name: str = "q", equal: bool = False) -> Question:
    rollouts = tuple(
        LabelledRollout(tokens=(0,) if equal else (i, 1), is_right=right)
        for i, right in enumerate(labels)
    )
    return Question(id=name, context=(5, 6), rollouts=rollouts)


def test_every_right_answer_wins_against_every_wrong_one_to_the_same_prompt() -> None:
    expected = [(0, 1), (0, 2), (0, 4), (3, 1), (3, 2), (3, 4)]
    assert labelled_pairs([True, False, False, True, False]) == expected
    question = a_question([True, False, False, True, False])
    assert question_pairs(question, at_most=16, seed=0) == expected


def test_equal_labels_and_equal_answers_give_no_pair() -> None:
    assert labelled_pairs([True, True]) == labelled_pairs([False]) == []
    assert question_pairs(a_question([True, False], equal=True), at_most=16, seed=0) == []


def test_of_too_many_pairs_a_seeded_choice_is_kept() -> None:
    question = a_question([True] * 4 + [False] * 4)
    kept = question_pairs(question, at_most=5, seed=0)
    assert len(set(kept)) == 5 and set(kept) <= set(question_pairs(question, at_most=99, seed=0))
    assert kept == question_pairs(question, at_most=5, seed=0)
    assert kept != question_pairs(question, at_most=5, seed=1)


def test_no_prompt_is_both_trained_on_and_measured_on_whatever_the_order() -> None:
    questions = [a_question([True], name=f"q{i}") for i in range(50)]
    train, held_out = split(questions, share=0.1, seed=0)
    assert len(held_out) == 5 and not {q.id for q in train} & {q.id for q in held_out}
    again = split(questions[::-1], share=0.1, seed=0)[1]
    assert {q.id for q in again} == {q.id for q in held_out}


def test_a_collection_reads_as_it_was_written(tmp_path: Path) -> None:
    questions = [a_question([True, False], name="a"), a_question([], name="b")]
    facts = Collection(
        model="m",
        weights="w",
        tokenizer="t",
        num_questions=2,
        num_rollouts=2,
        num_right=1,
        num_dropped=0,
    )
    write_collection(tmp_path, questions, facts)
    assert read_collection(tmp_path) == (questions, facts)
    with pytest.raises(UserError, match="covey preference collect"):
        read_collection(tmp_path / "nothing")


def test_the_loss_of_a_pair_on_the_published_gaps() -> None:
    losses = pair_losses(torch.tensor([1.0, 0.0, -1.0]))
    assert losses.tolist() == pytest.approx([0.313262, 0.693147, 1.313262], abs=1e-6)
    assert losses.mean().item() == pytest.approx(0.773224, abs=1e-6)


def test_the_report_on_four_pairs() -> None:
    # sigmoid(2) = 0.8808: three pairs at this confidence, two of them right; one tie at 0.5.
    report = report_of(torch.tensor([2.0, 2.0, -2.0, 0.0]), 3)
    assert report.pair_accuracy == pytest.approx((2 + 0.5) / 4)
    assert [b.num_pairs for b in report.bins] == [1, 3]
    assert report.calibration_error == pytest.approx(3 / 4 * (0.8808 - 2 / 3), abs=1e-4)
    assert report.log_loss == pytest.approx((2 * 0.126928 + 2.126928 + 0.693147) / 4, abs=1e-5)


def test_a_head_learns_which_feature_wins_and_the_seed_decides_all() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 200, 4, generator=generator)
    index = torch.arange(200).view(100, 2)
    loses = features[0, index[:, 0], 2] < features[0, index[:, 1], 2]
    index[loses] = index[loses].flip(1)
    data = Pairs(
        features=features,
        winners=index[:, 0],
        losers=index[:, 1],
        weights=torch.ones(len(index)),
        num_questions=1,
    )
    config = PreferenceConfig(folder="x", epochs=40, head_learning_rate=1e-3, batch_size=16)
    head, again = (trained_head(data, config, seed=3) for _ in range(2))
    with torch.no_grad():
        gaps = head(features[0, index[:, 0]]) - head(features[0, index[:, 1]])
        assert (gaps > 0).float().mean() > 0.95
        assert torch.equal(head(features), again(features))
