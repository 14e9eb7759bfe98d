"""DeepSpeed at every ZeRO stage, on one rank and two, is the torch backend computed elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.config import LearnerConfig
from tests.equivalence.learner_processes import (
    MOST_GATHERED,
    Outcome,
    outcomes_of,
    run_case,
    run_gathering,
    run_whole_groups,
)
from tests.unit.learner_cases import torch_config, write_model

pytestmark = pytest.mark.slow

SETTINGS: dict[str, object] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "max_tokens_per_microbatch": 50,
}
STAGES = [0, 1, 2, 3]
CASES = [(stage, ranks) for stage in STAGES for ranks in (1, 2)]
# Adam divides by the root of the squared gradient: where that is tiny, rounding shows.
WEIGHT_TOLERANCE = 1e-5


def config_of(stage: int, ranks: int, **settings: object) -> LearnerConfig:
    return LearnerConfig.model_validate(SETTINGS | {"zero_stage": stage, "ranks": ranks} | settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def by_torch(model: str, folder: Path) -> Outcome:
    environment = dict(os.environ)
    outcome = run_case(
        torch_config(**SETTINGS), model=model, rank=0, master="127.0.0.1:1", folder=folder / "torch"
    )
    os.environ.clear()
    os.environ.update(environment)
    return outcome


@pytest.fixture(scope="module")
def by_deepspeed(model: str, folder: Path) -> dict[tuple[int, int], list[Outcome]]:
    """Outcomes of every rank by ZeRO stage and number of ranks."""
    found = {}
    for ranks in (1, 2):
        configs = {f"zero{stage}_on_{ranks}": config_of(stage, ranks) for stage in STAGES}
        of_ranks = outcomes_of(configs, ranks=ranks, model=model, folder=folder)
        for stage, name in zip(STAGES, configs, strict=True):
            found[stage, ranks] = [
                outcomes.get(name, Outcome(error="not run")) for outcomes in of_ranks
            ]
    return found


@pytest.fixture(scope="module")
def groups_by_torch(model: str, folder: Path) -> Outcome:
    environment = dict(os.environ)
    outcome = run_whole_groups(
        torch_config(**SETTINGS),
        model=model,
        rank=0,
        master="127.0.0.1:1",
        folder=folder / "groups_by_torch",
    )
    os.environ.clear()
    os.environ.update(environment)
    return outcome


@pytest.fixture(scope="module")
def groups_on_two_ranks(model: str, folder: Path) -> dict[int, list[Outcome]]:
    """Outcomes of both ranks by ZeRO stage."""
    configs = {f"groups_zero{stage}": config_of(stage, 2) for stage in (2, 3)}
    found = outcomes_of(configs, ranks=2, model=model, folder=folder, run=run_whole_groups)
    return {
        stage: [outcomes.get(name, Outcome(error="not run")) for outcomes in found]
        for stage, name in zip((2, 3), configs, strict=True)
    }


def case(found: dict[tuple[int, int], list[Outcome]], stage: int, ranks: int) -> Outcome:
    for outcome in found[stage, ranks]:
        assert not outcome.error, outcome.error
    return found[stage, ranks][0]


def assert_same_weights(image: bytes, expected: bytes) -> None:
    weights, others = load(image), load(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_any_stage_and_number_of_ranks_trains_the_same_weights(
    by_torch: Outcome,
    by_deepspeed: dict[tuple[int, int], list[Outcome]],
    stage: int,
    ranks: int,
) -> None:
    outcome = case(by_deepspeed, stage, ranks)
    assert_same_weights(outcome.image, by_torch.image)
    for metrics, expected in zip(outcome.metrics, by_torch.metrics, strict=True):
        assert metrics == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_every_rank_knows_the_log_probs_of_all_rows(
    by_torch: Outcome,
    by_deepspeed: dict[tuple[int, int], list[Outcome]],
    stage: int,
    ranks: int,
) -> None:
    case(by_deepspeed, stage, ranks)
    for outcome in by_deepspeed[stage, ranks]:
        for values, expected in zip(outcome.log_probs, by_torch.log_probs, strict=True):
            assert values == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(
    by_deepspeed: dict[tuple[int, int], list[Outcome]], stage: int, ranks: int
) -> None:
    outcome = case(by_deepspeed, stage, ranks)
    assert outcome.resumed_image == outcome.image


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_numbers_that_are_none_stop_every_rank_before_the_optimiser_moves(
    by_deepspeed: dict[tuple[int, int], list[Outcome]], stage: int, ranks: int
) -> None:
    outcome = case(by_deepspeed, stage, ranks)
    for of_rank in by_deepspeed[stage, ranks]:
        overflow, undefined = of_rank.refusals
        assert "every loss is finite, but the gradient norm is" in overflow
        assert "advantage is nan at completion token 0 of rollout 1 of group 0" in undefined
    assert outcome.image_after_refusals == outcome.image


@pytest.mark.parametrize("stage", [2, 3])
def test_export_of_two_ranks_loads_into_transformers(
    by_deepspeed: dict[tuple[int, int], list[Outcome]], folder: Path, model: str, stage: int
) -> None:
    case(by_deepspeed, stage, 2)
    exported = folder / f"zero{stage}_on_2" / "huggingface"
    weights = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    by_one = AutoModelForCausalLM.from_pretrained(folder / "torch" / "huggingface").state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, by_one[name], atol=WEIGHT_TOLERANCE, rtol=0)
    assert AutoTokenizer.from_pretrained(exported)("ha")["input_ids"] == [9, 2]


def test_untied_bfloat16_weights_keep_float32_masters_at_stages_2_and_3(
    untied_model: str, folder: Path
) -> None:
    settings = {"dtype": "bfloat16", "learning_rate": 1e-4}
    configs = {f"bfloat16_{stage}": config_of(stage, 1, **settings) for stage in (2, 3)}
    (outcomes,) = outcomes_of(configs, ranks=1, model=untied_model, folder=folder)
    for outcome in outcomes.values():
        assert not outcome.error, outcome.error
        weights = load(outcome.image)
        assert "lm_head.weight" in weights
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert outcome.resumed_image == outcome.image  # masters are saved and read back
        assert len(outcome.refusals) == 2
        assert outcome.image_after_refusals == outcome.image


@pytest.mark.parametrize("stage", [2, 3])
def test_whole_groups_cut_by_ranks_train_the_same_weights_scalar_and_reference(
    groups_by_torch: Outcome, groups_on_two_ranks: dict[int, list[Outcome]], stage: int
) -> None:
    for outcome in groups_on_two_ranks[stage]:
        assert not outcome.error, outcome.error
        for metrics, expected in zip(outcome.metrics, groups_by_torch.metrics, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-4)
    first = groups_on_two_ranks[stage][0]
    assert_same_weights(first.image, groups_by_torch.image)
    assert first.resumed_image == first.image
    # The step after a resume reads the saved reference (kl) and the saved scalar.
    assert first.metrics[3] == first.metrics[2]
    assert first.metrics[2]["kl"] > 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_every_rank_has_every_answer(
    groups_by_torch: Outcome, groups_on_two_ranks: dict[int, list[Outcome]], stage: int
) -> None:
    for outcome in groups_on_two_ranks[stage]:
        assert not outcome.error, outcome.error
        for name, of_groups in groups_by_torch.answers.items():
            for found, expected in zip(outcome.answers[name], of_groups, strict=True):
                for values, others in zip(found, expected, strict=True):
                    # A sum over all pairs of the group's tokens is large, and rounds as such.
                    tolerance = 2e-2 if name == "likeness" else 1e-4
                    assert values == pytest.approx(others, abs=tolerance, rel=1e-4)


def test_no_rank_holds_more_than_one_part_of_what_zero_3_gathers(model: str, folder: Path) -> None:
    found = outcomes_of(
        {"gathering": config_of(3, 2)}, ranks=2, model=model, folder=folder, run=run_gathering
    )
    saved = load_file(Path(model) / "model.safetensors")
    largest = max(weight.numel() for weight in saved.values())  # goes alone
    # Weights that DeepSpeed never cuts: 10 times the hidden size of 32 and less.
    uncut = sum(weight.numel() for weight in saved.values() if weight.numel() <= 320)
    for of_rank in found:
        outcome = of_rank["gathering"]
        assert not outcome.error, outcome.error
        assert sum(part for _, part in outcome.held) == sum(w.numel() for w in saved.values())
        assert len(outcome.held) > 3
        assert max(part for _, part in outcome.held) <= max(MOST_GATHERED, largest)
        bucket = max(MOST_GATHERED, largest)
        assert all(whole <= bucket + uncut for whole, _ in outcome.held)
    images = [of_rank["gathering"].image for of_rank in found]
    assert images[1] == b""
    assert all(torch.equal(weight, saved[name]) for name, weight in load(images[0]).items())
    assert load(images[0]).keys() == saved.keys()
