"""Recipes: every mistake is named with its place, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.algorithms import ALGORITHMS
from grpo.errors import UserError
from orchestration.check import checked
from orchestration.config import load_recipe, read_recipe
from orchestration.roles import local_recipe
from tests.unit.small_project import REPOSITORY, settings, written_project

SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def _message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_a_recipe_is_loaded_with_defaults_and_absolute_paths(tmp_path: Path) -> None:
    recipe = load_recipe(written_project(tmp_path))
    assert [item.source for item in recipe.data.train] == [str(tmp_path / "train.jsonl")]
    assert recipe.num_generations == 4
    assert recipe.rollouts_per_step == 8 * 4
    assert recipe.max_model_len == 16 + 32
    assert type(recipe.algorithm.settings) is ALGORITHMS["grpo"].config


def test_a_local_run_leaves_out_what_only_vllm_can_do(tmp_path: Path) -> None:
    rollout = {"kv_cache_dtype": "fp8", "quantization": "fp8", "dtype": "bfloat16"}
    rollout |= {"weight_transport": "broadcast"}
    changed = {"learner": {"publish_dtype": "bfloat16"}, "alarms": {"log_prob_gap": 0.05}}
    recipe = load_recipe(written_project(tmp_path, rollout=rollout, **changed))
    assert len(recipe.rollout.fp8_settings) == 2
    local = local_recipe(recipe)
    assert local.rollout.fp8_settings == ()
    assert recipe.sends_weights and not local.sends_weights
    assert type(local.rollout).model_validate(local.rollout.model_dump()) == local.rollout


def test_a_dumped_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written_project(tmp_path, algorithm={"name": "dapo", "epsilon": 0.1}))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(dumped) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "starter").mkdir(parents=True)
    for name in ("train", "heldout"):
        (tmp_path / "data" / "starter" / f"{name}.jsonl").touch()
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe == load_recipe(path)


def test_every_algorithm_has_a_shipped_recipe() -> None:
    named = {yaml.safe_load(path.read_text())["algorithm"]["name"] for path in SHIPPED}
    assert named == set(ALGORITHMS)


def test_overrides_reach_sections_lists_and_the_algorithm(tmp_path: Path) -> None:
    recipe = load_recipe(
        written_project(tmp_path),
        ["learner.learning_rate=1e-5", "scorers.0.weight=2", "algorithm.beta=0.1", "seed=7"],
    )
    assert recipe.learner.learning_rate == 1e-5
    assert recipe.weights == {"answer": 2.0}
    assert recipe.algorithm.settings.beta == 0.1
    assert recipe.seed == 7


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    written_project(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.0001", "learning_rate: 3e-4"))
    assert load_recipe(path).learner.learning_rate == 3e-4


ALIASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "OpenRLHF's group size": ({"n_samples_per_prompt": 6}, "num_generations", 6),
    "verl's group size": ({"rollout": {"n": 6, "engine": "transformers"}}, "num_generations", 6),
    "verl's batch": ({"train_batch_size": 4}, "num_prompts_per_step", 4),
    "OpenRLHF's batch": ({"rollout_batch_size": 4}, "num_prompts_per_step", 4),
    "OpenRLHF's staleness": ({"async_queue_size": 2}, "max_staleness", 2),
    "TRL's steps": ({"max_steps": 9, "steps": None}, "steps", 9),
}


@pytest.mark.parametrize(("given", "name", "value"), ALIASES.values(), ids=ALIASES)
def test_a_setting_under_another_projects_name_is_accepted_and_reported(
    tmp_path: Path, given: dict[str, Any], name: str, value: Any
) -> None:
    data = {k: v for k, v in settings(**given).items() if v is not None}
    data["algorithm"] = {"name": "grpo"}
    written_project(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    loaded = read_recipe(path)
    assert getattr(loaded.recipe, name) == value
    assert len(loaded.notices) == 1 and " is read as " in loaded.notices[0]


def test_a_pair_of_clip_values_sets_both_sides(tmp_path: Path) -> None:
    path = written_project(tmp_path)
    recipe = load_recipe(path, ["algorithm.eps_clip_low_high=[0.1, 0.3]"])
    dumped = recipe.algorithm.settings.model_dump()
    assert (dumped["epsilon"], dumped["epsilon_high"]) == (0.1, 0.3)


def test_a_setting_under_both_names_is_refused(tmp_path: Path) -> None:
    path = written_project(tmp_path, max_steps=4)
    assert "max_steps is steps, which is given too; remove one" in _message(path)


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (
        {"max_stalenes": 1},
        ["line 20: max_stalenes: unknown setting", "did you mean max_staleness?"],
    ),
    "unknown key in a section": (
        {"learner": {"backend": "torch", "learning_rte": 1}},
        ["learner.learning_rte: unknown setting", "did you mean learner.learning_rate?"],
    ),
    "key of another section": (
        {"rollout": {"engine": "transformers", "learning_rate": 1}},
        ["rollout.learning_rate: unknown setting", "did you mean learner.learning_rate?"],
    ),
    "unknown key of the algorithm": (
        {"algorithm": {"name": "grpo", "epsilom": 0.1}},
        ["algorithm.epsilom: unknown setting", "did you mean algorithm.epsilon?"],
    ),
    "unknown algorithm": (
        {"algorithm": {"name": "drgrpo"}},
        ["unknown algorithm 'drgrpo'", "did you mean dr_grpo?"],
    ),
    "no algorithm": ({"algorithm": None}, ["algorithm: found None; expected a name"]),
    "wrong type": ({"steps": "many"}, ["line 3: steps: found 'many'; expected a valid integer"]),
    "out of range": ({"steps": 0}, ["steps: found 0; expected greater than or equal to 1"]),
    "no scorer": ({"scorers": []}, ["scorers: found none; expected at least one"]),
    "scorer without judge": (
        {"scorers": [{"name": "a"}]},
        ["scorers.0: scorer 'a': found none of rule, function, ", "expected exactly one"],
    ),
    "two scorers of one name": (
        {"scorers": [{"name": "a", "rule": "exact"}] * 2},
        ["scorers: the name 'a' is used twice"],
    ),
    "only weight 0": (
        {"scorers": [{"name": "a", "rule": "exact", "weight": 0}]},
        ["no scorer has a weight other than 0", "give at least one scorer a weight"],
    ),
    "updates do not divide prompts": (
        {"updates_per_step": 3},
        ["num_prompts_per_step is 8 and updates_per_step is 3", "choose a divisor"],
    ),
    "replay of nothing": (
        {"replay": {"share": 0.05}},
        ["replay.share is 0.05 of 8 groups, which is 0", "expected 1 to 7"],
    ),
    "more updates than sampled groups": (
        {"replay": {"share": 0.75}, "updates_per_step": 4},
        ["updates_per_step is 4, but the first step has no more than its 2 sampled groups"],
    ),
    "no window": ({"window": 0}, ["window: found 0; expected greater than or equal to 1"]),
    "greedy training": (
        {"sampling": {"temperature": 0}},
        ["sampling.temperature is 0", "choose a value above 0"],
    ),
    "torch with two ranks": (
        {"learner": {"backend": "torch", "ranks": 2}},
        ["backend torch runs on one rank, but ranks is 2", "set backend: deepspeed, or ranks: 1"],
    ),
    "torch with ZeRO 3": (
        {"learner": {"backend": "torch", "zero_stage": 3}},
        ["learner.zero_stage is 3", "set learner.backend: deepspeed"],
    ),
    "two precisions": (
        {"rollout": {"dtype": "bfloat16"}},
        ["rollout.dtype is bfloat16, but the learner publishes float32", "publish_dtype"],
    ),
    "broadcast without vLLM": (
        {"rollout": {"weight_transport": "broadcast", "engine": "transformers"}},
        ["rollout.engine is transformers", "set weight_transport: object_store, or engine: vllm"],
    ),
    "broadcast between GPUs and the CPU": (
        {"rollout": {"weight_transport": "broadcast", "engine": "vllm", "gpus_per_worker": 1}},
        ["gpus_per_worker 1 and learner.gpus_per_rank 0", "from GPU to GPU or from CPU to CPU"],
    ),
    "broadcast on parts of GPUs": (
        {
            "rollout": {"weight_transport": "broadcast", "engine": "vllm", "gpus_per_worker": 0.4},
            "learner": {"gpus_per_rank": 0.6},
        },
        ["gpus_per_worker 0.4 and learner.gpus_per_rank 0.6", "set weight_transport: ipc"],
    ),
    "ipc between whole GPUs": (
        {
            "rollout": {"weight_transport": "ipc", "engine": "vllm", "gpus_per_worker": 1},
            "learner": {"gpus_per_rank": 1},
        },
        ["weight_transport is ipc", "set parts that fit on one, such as 0.4 and 0.6"],
    ),
    "ipc between parts that do not fit on one GPU": (
        {
            "rollout": {"weight_transport": "ipc", "engine": "vllm", "gpus_per_worker": 0.5},
            "learner": {"gpus_per_rank": 0.6},
        },
        ["gpus_per_worker 0.5 and learner.gpus_per_rank 0.6", "such as 0.4 and 0.6"],
    ),
    "two ranks on a GPU": (
        {"learner": {"gpus_per_rank": 0.5, "ranks": 2}},
        ["gpus_per_rank is 0.5 with 2 ranks", "set gpus_per_rank above 0.5"],
    ),
    "a GPU and a half": (
        {"rollout": {"gpus_per_worker": 1.5}},
        ["gpus_per_worker is 1.5", "or a whole number"],
    ),
    "alarm too tight for bfloat16": (
        {"rollout": {"dtype": "bfloat16"}, "learner": {"publish_dtype": "bfloat16"}},
        ["alarms.log_prob_gap is 0.001", "set it to 0.01 or more"],
    ),
    "fp8 without vLLM": (
        {"rollout": {"engine": "transformers", "kv_cache_dtype": "fp8"}},
        ["found rollout.kv_cache_dtype: fp8", "set rollout.engine to vllm"],
    ),
    "fp8 weights in float32": (
        {"rollout": {"quantization": "fp8"}},
        ["rollout.dtype is float32", "set rollout.dtype: bfloat16 and learner.publish_dtype"],
    ),
    "alarm too tight for fp8": (
        {"rollout": {"kv_cache_dtype": "fp8"}, "alarms": {"log_prob_gap": 0.01}},
        ["alarms.log_prob_gap is 0.01, but with rollout.kv_cache_dtype: fp8", "set it to 0.05 or"],
    ),
    "neither alarm nor loss knows of fp8": (
        {
            "rollout": {"quantization": "fp8", "dtype": "bfloat16", "kv_cache_dtype": "fp8"},
            "learner": {"publish_dtype": "bfloat16"},
            "algorithm": {"name": "grpo", "importance_cap": None},
        },
        [
            "with rollout.quantization: fp8 and rollout.kv_cache_dtype: fp8",
            "set it to 0.05 or more, and algorithm.importance_cap: 2, which is null now",
        ],
    ),
    "more ranks than rollouts": (
        {"learner": {"ranks": 64}},
        ["learner.ranks is 64, but an update has only 32 rollouts"],
    ),
    "overlong cache above the budget": (
        {"algorithm": {"name": "dapo", "soft_overlong_cache": 99}},
        ["algorithm.soft_overlong_cache is 99, but sampling.max_completion_length is 32"],
    ),
    "missing data file": (
        {"data": {"train": "trian.jsonl"}},
        ["data.train: found no 'trian.jsonl'; did you mean train.jsonl?"],
    ),
    "missing model folder": (
        {"model": "./models/mine"},
        ["line 2: model: found no './models/mine'; looked in"],
    ),
    "missing folder in an existing one": (
        {"data": {"train": "sets/mine"}},
        ["data.train: found no 'sets/mine'; did you mean sets/mime?"],
    ),
    "missing reward file": (
        {"scorers": [{"name": "a", "function": "reward.py:f"}]},
        ["scorers.0.function: found no 'reward.py'"],
    ),
    "function without a name": (
        {"scorers": [{"name": "a", "function": "train.jsonl"}]},
        ["scorers.0.function: found 'train.jsonl'; expected 'path.py:name' or 'module:name'"],
    ),
    "pattern that is none": (
        {"scorers": [{"name": "a", "rule": "exact", "pattern": "("}]},
        ["scorers.0.pattern: '(' is no regular expression"],
    ),
    "name that is no folder name": ({"name": "a/b"}, ["line 1: name: found 'a/b'"]),
}


@pytest.mark.parametrize(("changed", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_remedy(
    tmp_path: Path, changed: dict[str, Any], expected: list[str]
) -> None:
    (tmp_path / "sets" / "mime").mkdir(parents=True)
    message = _message(written_project(tmp_path, **changed))
    assert message.startswith("recipe.yaml: "), "one mistake makes one problem"
    for part in expected:
        assert part in message


def test_all_mistakes_are_in_one_message(tmp_path: Path) -> None:
    path = written_project(tmp_path, steps="x", stps=1, algorithm={"name": "grpo", "beta": -1})
    message = _message(path, "learner.rank=2", "scorers.3.weight=1", "nonsense")
    assert message.startswith("recipe.yaml has 6 problems:")
    for part in ("steps: found 'x'", "stps: ", "beta: found -1", "--set learner.rank=2: "):
        assert part in message
    assert "--set scorers.3.weight=1: the recipe has nothing at" in message
    assert "--set nonsense: expected NAME=VALUE" in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = written_project(tmp_path)
    path.write_text(path.read_text() + "steps: 5\n")
    assert "line 20: steps: given twice" in _message(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1", "this is no valid YAML"),
        ("- 1", "found list at the top; expected settings"),
        ("", "found NoneType at the top"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in _message(path)


def test_a_missing_recipe_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    written_project(tmp_path)
    assert "did you mean" in _message(tmp_path / "recipes.yaml")
    assert "quickstart.yaml?" in _message(Path("quikstart"))


def test_a_temperature_that_no_engine_samples_at_is_refused(tmp_path: Path) -> None:
    said = _message(written_project(tmp_path), "sampling.temperature=1e-30")
    assert "sampling.temperature: found 1e-30; expected 0.01 or more" in said


def test_check_refuses_a_kv_cache_larger_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    huge = ["rollout.engine=vllm", "rollout.kv_cache_gib=100000"]
    found = checked(load_recipe(written_project(tmp_path), huge))
    refused = next(finding for finding in found if finding.name == "KV cache")
    assert not refused.ok and "rollout.kv_cache_gib is 100000" in refused.detail
    rest = checked(load_recipe(written_project(tmp_path), ["rollout.engine=vllm"]))
    assert "KV cache" not in {finding.name for finding in rest}
