"""The learner's configuration, learning rate schedule and environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from grpo.errors import UserError
from learner.config import LearnerConfig, heads_problem
from learner.environment import rank_environment
from learner.schedule import learning_rate_at
from orchestration.check_model import heads_fit


def rates(config: LearnerConfig, total_steps: int) -> list[float]:
    return [
        learning_rate_at(step, total_steps=total_steps, config=config)
        for step in range(total_steps)
    ]


def test_constant_rate_rises_over_the_warm_up_and_stays() -> None:
    config = LearnerConfig(learning_rate=1.0, warmup_steps=4)
    assert rates(config, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_rate_falls_by_equal_amounts() -> None:
    config = LearnerConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=1)
    # One step of warm-up reaches 1; then (1 - k / 4) for k = 0..3.
    assert rates(config, 5) == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_rate_is_half_at_half_time() -> None:
    config = LearnerConfig(learning_rate=1.0, lr_scheduler_type="cosine")
    assert rates(config, 4)[0] == 1.0
    assert rates(config, 4)[2] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_rate_is_zero_and_not_negative_beyond_the_planned_steps(kind: str) -> None:
    config = LearnerConfig.model_validate({"learning_rate": 1.0, "lr_scheduler_type": kind})
    assert learning_rate_at(9, total_steps=4, config=config) == pytest.approx(0.0)


def test_a_rate_above_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        LearnerConfig(learning_rate=1e40)


@pytest.mark.parametrize("name", ["learning_rate", "ranks", "zero_stage", "warmup_steps"])
def test_true_is_no_number(name: str) -> None:
    with pytest.raises(ValidationError, match="found true; expected a number"):
        LearnerConfig.model_validate({name: True})


def test_true_stays_what_a_switch_may_be() -> None:
    assert LearnerConfig(gradient_checkpointing=True, fused_log_probs=True).fused_log_probs


@pytest.mark.parametrize("found", ["q_proj", [3]])
def test_target_modules_that_are_no_list_of_names_give_one_error(found: object) -> None:
    with pytest.raises(ValidationError, match="expected all-linear or a list of names") as raised:
        LearnerConfig.model_validate({"lora": {"target_modules": found}})
    assert raised.value.error_count() == 1


def test_torch_backend_on_two_ranks_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValidationError, match="set backend: deepspeed, or ranks: 1"):
        LearnerConfig(backend="torch", ranks=2)


def test_bfloat16_below_zero_2_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValidationError, match="set zero_stage: 2"):
        LearnerConfig(dtype="bfloat16", zero_stage=1)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"offload": "optimizer", "backend": "torch"}, "set backend: deepspeed"),
        ({"offload": "optimizer", "zero_stage": 0}, "set zero_stage: 2"),
        ({"offload": "parameters", "zero_stage": 2}, "set zero_stage: 3, or offload: optimizer"),
    ],
)
def test_offload_that_nothing_can_do_is_refused_with_the_remedy(
    settings: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValidationError, match=remedy):
        LearnerConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"sequence_parallel": 2, "backend": "torch"}, "set backend: deepspeed and ranks: 2"),
        ({"sequence_parallel": 4, "ranks": 6}, "set ranks to a multiple, as 4"),
        ({"sequence_parallel": 4, "ranks": 2}, "set ranks to a multiple, as 4"),
        (
            {"sequence_parallel": 2, "ranks": 2, "attn_implementation": "eager"},
            "set attn_implementation: sdpa",
        ),
    ],
)
def test_lines_that_ranks_cannot_share_are_refused_with_the_remedy(
    settings: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValidationError, match=remedy):
        LearnerConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks", "works"),
    # Four ranks copy two key-value heads; six heads go to two or three ranks, not to four.
    [(4, 2, 4, True), (8, 8, 8, True), (6, 6, 4, False), (8, 3, 2, False), (14, 2, 4, False)],
)
def test_heads_that_do_not_divide_are_refused_with_what_would_work(
    heads: int, key_heads: int, ranks: int, works: bool
) -> None:
    problem = heads_problem(heads=heads, key_heads=key_heads, sequence_parallel=ranks)
    assert (problem is None) == works
    if heads == 14:
        assert problem is not None
        assert problem.endswith("set it to one of 1, 2, 14")


def test_the_check_reads_heads_from_the_model_folder(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    heads_fit(str(tmp_path), 3)
    with pytest.raises(UserError, match=r"3 key-value heads.*one of 1, 3, 6"):
        heads_fit(str(tmp_path), 2)


@pytest.mark.parametrize(
    ("gpus", "visible", "local_rank"),
    [(1, "3", "0"), (1, "0,1,2,3", "1"), (1, None, "5"), (0, None, "5")],
)
def test_local_rank_is_the_place_among_the_devices_in_sight(
    gpus: int, visible: str | None, local_rank: str
) -> None:
    config = LearnerConfig.model_validate({"gpus_per_rank": gpus, "ranks": 8})
    environment = rank_environment(
        config, rank=5, world_size=8, master="10.0.0.1:2222", visible_devices=visible
    )
    assert environment["LOCAL_RANK"] == local_rank
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("5", "8")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "2222")


def test_a_master_without_a_port_is_refused() -> None:
    with pytest.raises(ValueError, match=r'master is "10\.0\.0\.1"'):
        rank_environment(
            LearnerConfig(), rank=0, world_size=1, master="10.0.0.1", visible_devices=None
        )
