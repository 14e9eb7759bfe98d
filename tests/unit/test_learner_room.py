"""What the learner says when memory does not suffice: which budget to lower, what to share out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.errors import OutOfMemory
from learner.config import LearnerConfig
from learner.packing import pack
from learner.rank import LearnerRank
from learner.room import memory_remedy, room_for, room_for_state, state_remedies
from orchestration.run_inputs import FREE_OF_LEARNER
from orchestration.yaml_source import parsed_scalar
from tests.unit.learner_cases import (
    EVERYTHING,
    batch_of,
    random_rows,
    rank_of,
    row_of,
    save,
    torch_config,
    write_model,
)

NO_SUCH_MEMORY = 2**60  # bytes: more than any address space, so that it fails at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def exhausted(*_: object, **__: object) -> Any:
    """Asks the allocator for the impossible."""
    return torch.empty(NO_SUCH_MEMORY, dtype=torch.uint8)


@pytest.fixture
def limited(model: str) -> Iterator[LearnerRank]:
    """A learner whose decoder asks the allocator for the impossible above 40 tokens."""
    learner = rank_of(model, torch_config(max_tokens_per_microbatch=64))

    def refuse(module: torch.nn.Module, arguments: object, named: dict[str, torch.Tensor]) -> None:
        if named["input_ids"].numel() > 40:
            exhausted()

    decoder = learner._pretrained.get_decoder()
    handle = decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    yield learner
    handle.remove()


def test_out_of_memory_names_the_budget_and_its_new_value(limited: LearnerRank) -> None:
    rows = [row_of(4, 12) for _ in range(4)]
    with pytest.raises(OutOfMemory) as raised:
        limited.train(batch_of(rows))
    said = str(raised.value)
    assert "in the forward and backward pass of a micro-batch of 64 tokens (4 rollouts)" in said
    assert "lower learner.max_tokens_per_microbatch: 64 -> 32" in said
    assert "DefaultCPUAllocator" in said


def test_the_advice_is_one_that_helps(limited: LearnerRank, model: str) -> None:
    smaller = rank_of(model, torch_config(max_tokens_per_microbatch=32))
    rows = [row_of(4, 12) for _ in range(4)]
    assert max(block.input_ids.numel() for block in smaller._trainee.blocks(rows)) <= 40


def test_every_pass_of_the_policy_explains_itself(limited: LearnerRank) -> None:
    rows = [row_of(4, 12) for _ in range(4)]
    with pytest.raises(OutOfMemory, match="pass without gradient"):
        limited.train(batch_of(rows, rows))
    with pytest.raises(OutOfMemory, match="pass without gradient"):
        limited.log_probs(rows)


def test_a_rollout_that_does_not_fit_alone_gets_other_advice(limited: LearnerRank) -> None:
    with pytest.raises(OutOfMemory) as raised:
        limited.train(batch_of([row_of(4, 60)]))
    assert "max_tokens_per_microbatch" not in str(raised.value)
    assert "set learner.gradient_checkpointing: true or lower sampling" in str(raised.value)
    already = memory_remedy(pack([row_of(4, 60)]), max_tokens=64, is_checkpointing=True)
    assert "gradient_checkpointing" not in already
    assert "its completion has 60 tokens, its context 4" in already


def test_the_budget_is_never_lowered_below_the_longest_rollout() -> None:
    block = pack([row_of(4, 60), row_of(4, 8), row_of(4, 8)])
    said = memory_remedy(block, max_tokens=100, is_checkpointing=False)
    assert said.endswith("100 -> 64")


def test_a_device_s_error_is_known_and_any_other_one_is_left_alone() -> None:
    block = pack([row_of(4, 8), row_of(4, 8)])
    with (
        pytest.raises(OutOfMemory, match="CUDA out of memory"),
        room_for(block, "pass", max_tokens=32, is_checkpointing=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        pytest.raises(RuntimeError, match="shapes"),
        room_for(block, "pass", max_tokens=32, is_checkpointing=False),
    ):
        raise RuntimeError("shapes do not match")


def test_an_optimiser_whose_state_does_not_fit_says_what_makes_it_smaller(model: str) -> None:
    learner = rank_of(model, torch_config())
    learner._trainee.backend._optimizer.register_step_pre_hook(exhausted)  # type: ignore[attr-defined]  # the torch backend's own
    with pytest.raises(OutOfMemory) as raised:
        learner.train(batch_of(random_rows(4)))
    said = str(raised.value)
    assert "ran out of host memory in the optimiser step" in said
    assert "learner.ranks: 1 -> 2 with learner.backend: deepspeed, on more machines" in said
    assert "learner.lora: {}" in said
    assert "max_tokens_per_microbatch" not in said
    assert "DefaultCPUAllocator" in said


@pytest.mark.parametrize(
    ("method", "act", "place"),
    [
        ("whole_weights", lambda learner, folder: learner.publish(0), "gathering of the weights"),
        ("copied_state", lambda learner, folder: learner.snapshot(), "copy of the training state"),
        ("restore", lambda learner, folder: learner.load(folder), "reading of the training state"),
    ],
)
def test_every_other_place_that_holds_the_model_explains_itself(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    act: Callable[[LearnerRank, str], object],
    place: str,
) -> None:
    learner = rank_of(model, torch_config())
    save(learner, tmp_path)
    monkeypatch.setattr(learner._trainee.backend, method, exhausted)
    with pytest.raises(OutOfMemory, match=place):
        act(learner, str(tmp_path))


def test_a_model_that_does_not_fit_at_the_start_explains_itself(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.rank.make_backend", exhausted)
    with pytest.raises(OutOfMemory, match="out of host memory in the start"):
        rank_of(model, torch_config(), algorithm=EVERYTHING)


def on_gpu(**settings: object) -> LearnerConfig:
    return LearnerConfig.model_validate({"gpus_per_rank": 1} | settings)


@pytest.mark.parametrize(
    ("config", "remedies"),
    [
        (
            on_gpu(),
            [
                "learner.ranks: 1 -> 2",
                "learner.offload: optimizer",
                "learner.reference_offload: true",
                "learner.lora: {}",
            ],
        ),
        (
            on_gpu(ranks=4, zero_stage=2, reference_offload=True, offload="optimizer"),
            [
                "learner.zero_stage: 2 -> 3",
                "learner.ranks: 4 -> 8",
                "learner.offload: parameters with learner.zero_stage: 3",
                "learner.lora: {}",
                "learner.dtype: bfloat16",
            ],
        ),
        (
            on_gpu(ranks=2, zero_stage=3, offload="parameters", dtype="bfloat16", lora={}),
            [
                "learner.ranks: 2 -> 4",
                "learner.reference_offload: true",
                "learner.lora.quantization: nf4",
            ],
        ),
        (
            on_gpu(backend="torch", gpus_per_rank=0.6, reference_offload=True),
            [
                "learner.ranks: 1 -> 2 with learner.backend: deepspeed",
                "learner.offload: optimizer with learner.backend: deepspeed",
                "a lower rollout.gpu_memory_utilization, where an engine shares the GPU",
                "learner.lora: {}",
            ],
        ),
    ],
)
def test_remedies_of_a_gpu_are_those_that_are_not_set_yet(
    config: LearnerConfig, remedies: list[str]
) -> None:
    assert state_remedies(config, is_on_gpu=True, has_second_model=True) == remedies


def test_the_settings_that_a_remedy_names_are_accepted_together() -> None:
    """A recipe that follows it must load: stage 0 has no optimiser to move, torch one rank."""
    for start in (
        {"zero_stage": 0},
        {"zero_stage": 0, "lora": {}},
        {"backend": "torch", "lora": {}},
        {"ranks": 2, "zero_stage": 1},
        {"ranks": 2, "zero_stage": 2, "offload": "optimizer", "dtype": "bfloat16"},
    ):
        for remedy in state_remedies(on_gpu(**start), is_on_gpu=True, has_second_model=True):
            changes = {
                part.partition(": ")[0].removeprefix("learner."): yaml_value(part)
                for part in remedy.split(" with ")
            }
            known = {name for name in changes if not name.startswith(("lora", "dtype"))}
            assert known <= FREE_OF_LEARNER  # a run that stopped for it can be resumed with it
            lora = changes.pop("lora.quantization", None)
            on_gpu(**start | changes | ({"lora": {"quantization": lora}} if lora else {}))


def yaml_value(part: str) -> object:
    return parsed_scalar(part.partition(": ")[2].rpartition("-> ")[2])


def test_host_memory_of_a_gpu_learner_is_not_saved_by_offloading_more() -> None:
    config = on_gpu(ranks=2, zero_stage=3, offload="parameters", reference_offload=True)
    assert state_remedies(config, is_on_gpu=False, has_second_model=True) == [
        "learner.offload: parameters -> optimizer",
        "learner.reference_offload: false",
        "ranks spread over more machines",
        "learner.lora: {}",
    ]


def test_the_memory_that_failed_is_named() -> None:
    with (
        pytest.raises(OutOfMemory, match="out of GPU memory in the optimiser step"),
        room_for_state("optimiser step", on_gpu(), has_second_model=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        pytest.raises(RuntimeError, match="shapes"),
        room_for_state("optimiser step", on_gpu(), has_second_model=False),
    ):
        raise RuntimeError("shapes do not match")
