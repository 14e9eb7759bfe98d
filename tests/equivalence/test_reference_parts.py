"""A reference cut over two ranks is the whole one: in passes, moved, saved and read by others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from learner.config import LearnerConfig
from learner.packing import blocks
from learner.policy import load_policy
from learner.reference import Reference
from learner.weights import named_weights
from tests.equivalence.learner_processes import Outcome, outcomes_of
from tests.unit.learner_cases import batch_of, random_rows, rank_of, save, write_model
from tests.unit.learner_objectives import WHOLE_GROUPS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOLERANCE = 1e-6  # of a log-probability
CASES = ("tied", "untied", "untied_bfloat16", "tied_offloaded")


def config_of(ranks: int, **settings: object) -> LearnerConfig:
    given = {"learning_rate": 1e-2, "max_tokens_per_microbatch": 50, "zero_stage": 3}
    return LearnerConfig.model_validate(given | {"ranks": ranks} | settings)


def case_config(name: str) -> LearnerConfig:
    return config_of(
        2,
        dtype="bfloat16" if "bfloat16" in name else "float32",
        reference_offload="offloaded" in name,
    )


def reference_of(model: str, config: LearnerConfig, *, is_cut: bool) -> Reference:
    return Reference(
        load_policy(model, config, temperature=0.8),
        device=CPU,
        is_moving=True,
        is_offloaded=config.reference_offload,
        is_cut=is_cut,
    )


def largest_gap(one: Reference, other: Reference) -> float:
    """Over rows that fall to the ranks in unlike numbers; the last turn of one of them is idle."""
    rank = torch.distributed.get_rank()
    turns = blocks(random_rows(29), max_tokens=50, rank=rank, ranks=2)
    assert len(turns) > 2
    with one.at_hand(), other.at_hand():
        gaps = [one.log_probs(block) - other.log_probs(block) for block in turns]
    return torch.cat(gaps).abs().max().item()


def held_bytes(reference: Reference) -> int:
    """What is there between passes: the model's weights, whole or in parts, and the averages."""
    tensors = [*reference._tensors(), *reference._averages.values()]
    by_place = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}
    return sum(by_place.values())


def run_beside(
    config: LearnerConfig, *, model: str, rank: int, master: str, folder: Path
) -> Outcome:
    """A whole and a cut reference that follow the same policies and restore each other."""
    model = str(Path(model) / folder.name.partition("_")[0])
    whole, cut = (reference_of(model, config, is_cut=is_cut) for is_cut in (False, True))
    torch.manual_seed(5)  # the same noise on all ranks
    policy = named_weights(load_policy(model, config, temperature=0.8).model)
    moved = {name: weight + torch.randn_like(weight) for name, weight in policy.items()}
    gaps = [largest_gap(whole, cut)]
    for reference in (whole, cut):
        reference.follow([moved], decay=0.9)
    gaps.append(largest_gap(whole, cut))
    unmoved = reference_of(model, config, is_cut=False)
    gone = largest_gap(unmoved, cut)
    unmoved.restore(dict(cut.averages()))
    gaps.append(largest_gap(unmoved, whole))
    again = reference_of(model, config, is_cut=True)
    again.restore(dict(whole.averages()))
    gaps.append(largest_gap(again, whole))
    return Outcome(log_probs=[gaps, [gone]], held=[(held_bytes(whole), held_bytes(cut))], error="")


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    configs = {name: case_config(name) for name in CASES}
    models = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        write_model(models / name, tied=name == "tied")
    folder = tmp_path_factory.mktemp("beside")
    return outcomes_of(configs, ranks=2, model=str(models), folder=folder, run=run_beside)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_reference_is_the_whole_one(
    side_by_side: list[dict[str, Outcome]], name: str
) -> None:
    errors = [outcome.error for of_rank in side_by_side for outcome in of_rank.values()]
    assert not any(errors), "\n".join(errors)
    for of_rank in side_by_side:
        outcome = of_rank[name]
        gaps, (gone,) = outcome.log_probs
        assert max(gaps) <= TOLERANCE
        assert gone > 0.1  # it has moved away from where it was
        whole, cut = outcome.held[0]
        assert cut < 0.55 * whole


def run_saved(
    config: LearnerConfig,
    *,
    model: str,
    rank: int,
    master: str,
    folder: Path,
    source: Path | None = None,
) -> Outcome:
    """The step after a save; with `source` by a learner that reads what another one saved."""
    learner = rank_of(model, config, rank=rank, master=master, objective=WHOLE_GROUPS)
    rows = random_rows(24)
    if source is None:
        learner.train(batch_of(rows[:8], rows[8:16]))
        save(learner, folder)
    else:
        learner.load(str(source / folder.name))
    metrics = dict(learner.train(batch_of(rows[16:], step=1)).metrics)
    learner.close()
    return Outcome(metrics=[metrics])


def first_rank(found: list[dict[str, Outcome]], name: str) -> dict[str, float]:
    for outcomes in found:
        assert not outcomes[name].error, outcomes[name].error
    return found[0][name].metrics[0]


def test_a_moving_reference_goes_on_with_other_ranks(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    on_two = {"cut": config_of(2), "whole": config_of(2, zero_stage=2)}
    on_two["cut_offloaded"] = config_of(2, reference_offload=True)
    run_two = partial(outcomes_of, on_two, ranks=2, model=model)
    saved = run_two(folder=tmp_path / "two", run=run_saved)
    expected = first_rank(saved, "whole")
    assert expected["kl"] > 1e-3
    on_one = {name: config_of(1) for name in on_two}
    from_two = outcomes_of(
        on_one,
        ranks=1,
        model=model,
        folder=tmp_path / "one",
        run=partial(run_saved, source=tmp_path / "two"),
    )
    for name in on_two:
        assert first_rank(saved, name) == pytest.approx(expected, abs=1e-4)
        assert first_rank(from_two, name) == pytest.approx(expected, abs=1e-4)
