"""Settings under the names that OpenRLHF, verl and TRL users know, and where covey keeps them.

Knows names only. An alias is accepted at the top level of a recipe and in the section of its
target; one with a dot is accepted where it is written so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TARGETS: Mapping[str, str] = {
    # OpenRLHF
    "n_samples_per_prompt": "algorithm.num_generations",
    "rollout_batch_size": "num_prompts_per_step",
    "max_new_tokens": "sampling.max_completion_length",
    "generate_max_len": "sampling.max_completion_length",
    "prompt_max_len": "sampling.max_prompt_length",
    "eps_clip": "algorithm.epsilon",
    "init_kl_coef": "algorithm.beta",
    "async_queue_size": "max_staleness",
    "max_tokens_per_gpu": "learner.max_tokens_per_microbatch",
    "actor_learning_rate": "learner.learning_rate",
    "pretrain": "model",
    "ring_attn_size": "learner.sequence_parallel",
    "ref_reward_offload": "learner.reference_offload",
    "prompt_data": "data.train",
    "eval_dataset": "data.evaluation",
    "input_key": "data.prompt_column",
    "label_key": "data.answer_column",
    # verl
    "rollout.n": "algorithm.num_generations",
    "train_batch_size": "num_prompts_per_step",
    "data.train_batch_size": "num_prompts_per_step",
    "max_response_length": "sampling.max_completion_length",
    "data.max_response_length": "sampling.max_completion_length",
    "data.max_prompt_length": "sampling.max_prompt_length",
    "clip_ratio": "algorithm.epsilon",
    "clip_ratio_low": "algorithm.epsilon",
    "clip_ratio_high": "algorithm.epsilon_high",
    "kl_loss_coef": "algorithm.beta",
    "staleness_threshold": "max_staleness",
    "ppo_max_token_len_per_gpu": "learner.max_tokens_per_microbatch",
    "ulysses_sequence_parallel_size": "learner.sequence_parallel",
    "use_fused_kernels": "learner.fused_log_probs",
    "ppo_epochs": "epochs_per_step",
    "data.train_files": "data.train",
    "data.val_files": "data.evaluation",
    # TRL, whose settings are flat
    "max_steps": "steps",
    "num_iterations": "epochs_per_step",
    "model_name_or_path": "model",
    "output_dir": "output",
    "report_to": "trackers",
    "num_generations": "algorithm.num_generations",
    "max_completion_length": "sampling.max_completion_length",
    "max_prompt_length": "sampling.max_prompt_length",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "epsilon": "algorithm.epsilon",
    "epsilon_high": "algorithm.epsilon_high",
    "beta": "algorithm.beta",
    "learning_rate": "learner.learning_rate",
    "use_liger_loss": "learner.fused_log_probs",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    # LoRA: OpenRLHF and verl, TRL
    "lora_rank": "learner.lora.rank",
    "lora_r": "learner.lora.rank",
    "lora_alpha": "learner.lora.alpha",
    "lora_dropout": "learner.lora.dropout",
    "lora_target_modules": "learner.lora.target_modules",
}
PAIRS: Mapping[str, tuple[str, str]] = {
    "eps_clip_low_high": ("algorithm.epsilon", "algorithm.epsilon_high"),
}


def with_listed_sets(data: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], bool]:
    """OpenRLHF's `prompt_data: a.jsonl,b.jsonl` and `prompt_data_probs: 0.3,0.7` as lists of sets.

    Whether there were probabilities is the second value: they are weights here.
    """
    found = dict(data)
    for key in ("prompt_data", "eval_dataset"):
        if isinstance(found.get(key), str) and "," in found[key]:
            found[key] = [{"source": part.strip()} for part in found[key].split(",")]
    if (probs := found.pop("prompt_data_probs", None)) is None:
        return found, False
    sets = found.get("prompt_data")
    parts = str(probs).split(",")
    if not isinstance(sets, list) or len(sets) != len(parts):
        problems.append(
            f"prompt_data_probs: found {probs!r}; expected one number for each source of "
            "prompt_data, with commas between them"
        )
        return found, False
    # Text that is no number is told at the set's weight.
    found["prompt_data"] = [{**s, "weight": p} for s, p in zip(sets, parts, strict=True)]
    return found, True


def targets_of(path: str) -> tuple[str, ...]:
    """Where a dotted path belongs: two places for a pair, none if it is no alias."""
    return tuple(dict.fromkeys(_targets(path)))


def _targets(path: str) -> Iterator[str]:
    section, _, key = path.rpartition(".")
    if path in TARGETS:
        yield TARGETS[path]
    elif key in TARGETS and _belongs(section, TARGETS[key]) and TARGETS[key] != path:
        yield TARGETS[key]
    elif key in PAIRS and _belongs(section, PAIRS[key][0]):
        yield from PAIRS[key]


def _belongs(section: str, target: str) -> bool:
    return section in ("", target.rpartition(".")[0])
