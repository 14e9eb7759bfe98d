"""What a learner answers about whole groups: against brute force over transformers' own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.errors import Fatal
from grpo.objective import Measure
from grpo.types import MeasureRequest, Origin, TrainRow
from learner.answers import turns
from learner.rank import LearnerRank
from tests.unit.learner_cases import batch_of, random_rows, rank_of, torch_config, write_model
from tests.unit.learner_objectives import MEASURE_NAMES, PLAIN, WHOLE_GROUPS

TEMPERATURE = 0.8


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


def groups_of(count: int) -> list[list[TrainRow]]:
    rows = random_rows(4 * count)
    return [rows[4 * group : 4 * group + 4 - group % 2] for group in range(count)]


def request_of(groups: Sequence[Sequence[TrainRow]], *names: str) -> MeasureRequest:
    return MeasureRequest(
        names=names or MEASURE_NAMES,
        groups=tuple(tuple(group) for group in groups),
        labels=tuple(np.arange(len(group)) - 1.0 for group in groups),
    )


def full_pass(folder: str, row: TrainRow) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T], log-probabilities [T, V] and hidden states [T, H] of a row by itself."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
    first = len(row.context)
    with torch.no_grad():
        output = loaded(tokens[None], output_hidden_states=True)
    log_probs = (output.logits[0, first - 1 : -1].double() / TEMPERATURE).log_softmax(-1)
    return tokens[first:], log_probs, output.hidden_states[-1][0, first - 1 : -1].double()


def brute_force_likeness(folder: str, group: Sequence[TrainRow]) -> list[Tensor]:
    """sum over all tokens of the group of <g, g'> <h, h'>, token pair by token pair."""
    errors, hidden = [], []
    for row in group:
        tokens, log_probs, states = full_pass(folder, row)
        errors.append(torch.eye(log_probs.shape[1]).double()[tokens] - log_probs.exp())
        hidden.append(states)
    g, h = torch.cat(errors), torch.cat(hidden)
    scores = ((g @ g.T) * (h @ h.T)).sum(1)
    return list(scores.split([len(row.tokens) for row in group]))


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_a_measure_over_hidden_states_equals_brute_force_over_full_logits(
    model: str, max_tokens: int
) -> None:
    learner = rank_of(
        model, torch_config(max_tokens_per_microbatch=max_tokens), objective=WHOLE_GROUPS
    )
    groups = groups_of(3)
    answer = learner.measure(request_of(groups, "likeness"))["likeness"]
    for group, streams in zip(groups, answer, strict=True):
        for found, expected in zip(streams, brute_force_likeness(model, group), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_entropies_and_labels_reach_their_own_rows(model: str) -> None:
    learner = rank_of(model, torch_config(max_tokens_per_microbatch=30), objective=WHOLE_GROUPS)
    groups = groups_of(2)
    request = request_of(groups, "entropy")
    for group, labels, streams in zip(
        groups, request.labels, learner.measure(request)["entropy"], strict=True
    ):
        for row, label, found in zip(group, labels, streams, strict=True):
            log_probs = full_pass(model, row)[1]
            entropy = -(log_probs.exp() * log_probs).sum(-1).numpy()
            expected = entropy * label * (row.origins == Origin.POLICY)
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_reference_is_asked_and_not_the_present_policy(model: str) -> None:
    learner = rank_of(model, torch_config(), objective=replace(WHOLE_GROUPS, reference_update=None))
    groups = groups_of(2)
    learner.train(batch_of([row for group in groups for row in group]))
    for group, streams in zip(
        groups, learner.measure(request_of(groups, "reference"))["reference"], strict=True
    ):
        for row, found in zip(group, streams, strict=True):
            tokens, log_probs, _ = full_pass(model, row)
            expected = log_probs.gather(-1, tokens[:, None])[:, 0]
            np.testing.assert_allclose(found, expected, atol=1e-4)
            present = learner.log_probs([row])[0]
            assert np.abs(found - present).max() > 1e-3


def test_measuring_leaves_no_gradient_and_changes_no_training(model: str) -> None:
    rows = random_rows(8)
    learner = rank_of(model, torch_config(), objective=WHOLE_GROUPS)
    other = rank_of(model, torch_config(), objective=WHOLE_GROUPS)
    other.measure(request_of([rows[:4], rows[4:]]))
    assert other.train(batch_of(rows)).metrics == learner.train(batch_of(rows)).metrics


def test_answers_have_the_shape_of_the_question(model: str) -> None:
    learner = rank_of(model, torch_config(), objective=WHOLE_GROUPS)
    groups = [*groups_of(2), []]
    answer = learner.measure(request_of(groups, "reference", "entropy"))
    assert list(answer) == ["reference", "entropy"]
    for streams in answer.values():
        shapes = [[len(found) for found in of_group] for of_group in streams]
        assert shapes == [[len(row.tokens) for row in group] for group in groups]
    assert learner.measure(request_of([], "entropy")) == {"entropy": []}


def ragged(rows, layer) -> list[Tensor]:
    return [row.log_probs[:1] for row in rows]


def asked(model: str, *names: str) -> None:
    objective = replace(PLAIN, measures=(Measure(name="ragged", fn=ragged),))
    learner: LearnerRank = rank_of(model, torch_config(), objective=objective)
    learner.measure(request_of(groups_of(1), *names))


def test_a_measure_that_the_objective_does_not_have_is_refused(model: str) -> None:
    with pytest.raises(Fatal, match='asked to measure "entropy", but its objective measures ragg'):
        asked(model, "entropy")


def test_a_measure_that_is_no_stream_of_tokens_is_refused(model: str) -> None:
    with pytest.raises(Fatal, match="one number for each token"):
        asked(model, "ragged")


def test_groups_alike_in_tokens_are_computed_at_the_same_time() -> None:
    rows = sorted(random_rows(12), key=lambda row: row.num_tokens)
    groups = [rows[:1], rows[4:12], rows[1:4], []]
    assert turns(groups, ranks=2) == [[1, 2], [0]]
    assert turns(groups, ranks=1) == [[1], [2], [0]]
    assert turns([], ranks=2) == []
