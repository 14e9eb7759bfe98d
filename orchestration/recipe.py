"""The recipe of a run: every section, every default, and which combinations cannot work.

Light on purpose: importing it loads no torch, ray, vllm or deepspeed. Refuses to know files: see
config.py for YAML, overrides, aliases and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, SerializeAsAny, model_serializer, model_validator

from grpo.algorithms import ALGORITHMS, Algorithm
from grpo.config import AlgorithmConfig, Schema
from grpo.surrogates import log_likelihood
from grpo.types import Sampling
from learner.config import LearnerConfig
from reward_services.config import ScorerConfig
from rollout_workers.config import RolloutConfig

HEALTHY_BFLOAT16_GAP = 1e-2  # mean |difference| measured between vLLM and transformers: 6e-3
Tracker = Literal["tensorboard", "wandb"]


class SamplingConfig(Schema):
    """How completions are drawn, in training and evaluation."""

    temperature: float = Field(1.0, ge=0, description="0: greedy, for evaluation only")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off")
    max_prompt_length: int = Field(512, ge=1, description="tokens, chat template included")
    max_completion_length: int = Field(512, ge=1, description="tokens, guidance included")

    def drawn(self) -> Sampling:
        """As the rollout workers take it."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_completion_length,
        )


class DataConfig(Schema):
    """Where prompts come from and which column holds what."""

    train: str = Field(description="a .jsonl or .parquet file, or a Hugging Face data set id")
    evaluation: str | None = Field(None, description="held-out prompts; null: no evaluation")
    split: str = Field("train", description="of a Hugging Face data set")
    evaluation_split: str = Field("test", description="of a Hugging Face data set")
    prompt_column: str = Field("prompt", description="text, or a list of messages")
    answer_column: str = Field("answer", description="the reference answer; may be absent")
    solution_column: str = Field("solution", description="a worked solution; may be absent")
    domain_column: str | None = Field(None, description="groups metrics by kind of prompt")
    shuffle: bool = Field(True, description="a new order every epoch; false: as in the file")
    on_long_prompt: Literal["error", "drop"] = Field(
        "error", description="a prompt above sampling.max_prompt_length"
    )


class EvaluationConfig(Schema):
    """How the policy is measured on held-out prompts."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after only")
    prompts: int = Field(200, ge=1, description="at most so many, the first of the file")
    samples: int = Field(4, ge=1, description="completions per prompt, for pass@k")


class CheckpointConfig(Schema):
    """When the training state is saved."""

    every: int = Field(50, ge=0, description="steps; 0: at the end and on Ctrl-C only")
    keep: int = Field(2, ge=1, description="checkpoints that stay on disk")


class AlarmConfig(Schema):
    """Values that are never healthy, and how long nothing may happen."""

    log_prob_gap: float = Field(
        1e-3,
        gt=0,
        description="mean difference of log-probabilities between rollout engine and learner; "
        "healthy: 1e-5 in float32, below 1e-2 in bfloat16",
    )
    dropped_rate: float = Field(
        0.95, gt=0, le=1, description="share of groups dropped before the run stops"
    )
    worker_s: float = Field(
        600.0, gt=0, description="a worker that takes longer for one call is replaced"
    )
    stall_s: float = Field(1200.0, gt=0, description="without progress, the run ends saying why")


class AlgorithmChoice(Schema):
    """An algorithm by name with its own settings; written flat: `{name: grpo, beta: 0.04}`."""

    name: str
    settings: SerializeAsAny[AlgorithmConfig]

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.name]

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: object) -> object:
        if not isinstance(value, dict) or "settings" in value or "name" not in value:
            return value
        name = value["name"]
        if name not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {name!r}; expected one of {', '.join(ALGORITHMS)}")
        rest = {k: v for k, v in value.items() if k != "name"}
        return {"name": name, "settings": ALGORITHMS[name].config(**rest)}

    @model_serializer
    def _flat(self) -> dict[str, object]:
        return {"name": self.name, **self.settings.model_dump(mode="json")}


class Recipe(Schema):
    """Everything that describes a run; a run folder keeps it resolved."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="first part of the run folder"
    )
    seed: int = Field(0, ge=0)
    model: str = Field(description="a folder with weights and tokenizer, or a Hugging Face id")
    steps: int = Field(ge=1, description="optimiser steps of the run")
    num_prompts_per_step: int = Field(8, ge=1, description="P, groups in a step")
    updates_per_step: int = Field(
        1, ge=1, description="optimiser updates that a step's groups are cut into"
    )
    max_staleness: int = Field(
        0, ge=0, description="S, steps that a rollout may be behind the learner; 0: synchronous"
    )
    window: int = Field(
        1, ge=1, description="W, how far a step may look past its oldest unfinished group"
    )
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig
    algorithm: AlgorithmChoice
    scorers: tuple[ScorerConfig, ...]
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarms: AlarmConfig = AlarmConfig()
    output: str = Field("runs", description="run folders are made in here")
    trackers: tuple[Tracker, ...] = ()

    @property
    def num_generations(self) -> int:
        """G, rollouts in a group."""
        return self.algorithm.settings.num_generations

    @property
    def rollouts_per_step(self) -> int:
        """P * G."""
        return self.num_prompts_per_step * self.num_generations

    @property
    def slots(self) -> int:
        """(S + 1) * P groups may be under way."""
        return (self.max_staleness + 1) * self.num_prompts_per_step

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return self.sampling.max_prompt_length + self.sampling.max_completion_length

    @property
    def weights(self) -> dict[str, float]:
        """Coefficient of each scorer in the reward."""
        return {scorer.name: scorer.weight for scorer in self.scorers}

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        problems = list(combination_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def combination_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with values that are each right alone; with the remedy."""
    prompts, updates = recipe.num_prompts_per_step, recipe.updates_per_step
    if prompts % updates:
        yield (
            f"num_prompts_per_step is {prompts} and updates_per_step is {updates}: a step is cut "
            "by whole groups; choose a divisor of num_prompts_per_step"
        )
    objective = recipe.algorithm.algorithm.objective(recipe.algorithm.settings)
    if updates > 1 and objective.surrogate is log_likelihood:
        yield (
            f"updates_per_step is {updates}, but the loss of {recipe.algorithm.name} has no ratio "
            "that would notice how far the policy has moved: set updates_per_step: 1"
        )
    if recipe.sampling.temperature == 0:
        yield (
            "sampling.temperature is 0: all rollouts of a group would be equal and teach nothing; "
            "choose a value above 0, usually 1.0"
        )
    if recipe.sampling.top_p < 1 or recipe.sampling.top_k > 0:
        yield (
            f"sampling.top_p is {recipe.sampling.top_p:g} and sampling.top_k is "
            f"{recipe.sampling.top_k}: a policy that is cut off when it is sampled is not the one "
            "that is trained; set top_p: 1 and top_k: 0, and lower temperature instead"
        )
    if recipe.alarms.worker_s >= recipe.alarms.stall_s:
        yield (
            f"alarms.worker_s is {recipe.alarms.worker_s:g} and alarms.stall_s is "
            f"{recipe.alarms.stall_s:g}: a worker that hangs must be replaced before the run is "
            "given up; set worker_s to half of stall_s"
        )
    if not recipe.scorers:
        yield "scorers: found none; expected at least one, for example {name: answer, rule: exact}"
        return  # what follows would say the same in other words
    names = [scorer.name for scorer in recipe.scorers]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"scorers: the name {name!r} is used twice; names must differ, as metrics use them"
    yield from _precision_problems(recipe)
    yield from _size_problems(recipe)
    try:
        recipe.algorithm.algorithm.pipeline(
            recipe.algorithm.settings,
            outcomes=recipe.weights,
            max_completion_length=recipe.sampling.max_completion_length,
        )
    except ValueError as error:
        yield str(error)


def _precision_problems(recipe: Recipe) -> Iterator[str]:
    """Two precisions are two policies: their log-probabilities drift apart until training fails."""
    published = recipe.learner.rollout_dtype
    if recipe.rollout.dtype != published:
        yield (
            f"rollout.dtype is {recipe.rollout.dtype}, but the learner publishes {published}: the "
            "sampled and the trained policy would differ; set rollout.dtype to "
            f"{published}, or learner.publish_dtype to {recipe.rollout.dtype}"
        )
    if published == "bfloat16" and recipe.alarms.log_prob_gap < HEALTHY_BFLOAT16_GAP:
        yield (
            f"alarms.log_prob_gap is {recipe.alarms.log_prob_gap:g}, but in bfloat16 a gap up to "
            f"{HEALTHY_BFLOAT16_GAP:g} is healthy: set it to {HEALTHY_BFLOAT16_GAP:g} or more"
        )


def _size_problems(recipe: Recipe) -> Iterator[str]:
    """Work that cannot be cut into the pieces that the recipe asks for."""
    learner = recipe.learner
    rows = recipe.rollouts_per_step // recipe.updates_per_step
    if rows < learner.ranks:
        yield (
            f"learner.ranks is {learner.ranks}, but an update has only {rows} rollouts: "
            "lower learner.ranks or raise num_prompts_per_step"
        )
    if learner.backend == "torch" and learner.zero_stage == 3:
        yield (
            "learner.zero_stage is 3, but learner.backend torch shares nothing out: "
            "set learner.backend: deepspeed, or leave zero_stage out"
        )
    if learner.warmup_steps and learner.warmup_steps >= recipe.steps:
        yield (
            f"learner.warmup_steps is {learner.warmup_steps} and steps is {recipe.steps}: the "
            "learning rate would never be reached; lower warmup_steps"
        )
