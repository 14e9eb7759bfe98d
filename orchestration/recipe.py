"""The recipe of a run: every section, every default, and which combinations cannot work.

Light on purpose: importing it loads no torch, ray, vllm or deepspeed. Refuses to know files: see
config.py for YAML, overrides, aliases and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, SerializeAsAny, model_serializer, model_validator

from grpo import combinations
from grpo.algorithms import Algorithm
from grpo.algorithms.user_file import (
    composition_problems,
    found_algorithm,
    is_file_name,
    theirs_is_told,
)
from grpo.config import AlgorithmConfig, Schema
from grpo.errors import UserError
from grpo.types import Sampling
from learner.config import LearnerConfig
from orchestration.buffer import num_slots
from orchestration.data_config import DataConfig
from orchestration.simulation.config import SimulationConfig
from reward_services.config import ScorerConfig
from rollout_workers.adapter_limits import adapter_problems
from rollout_workers.config import RolloutConfig

HEALTHY_BFLOAT16_GAP = 1e-2  # mean |difference| measured between vLLM and transformers: 6e-3
HEALTHY_FP8_GAP = 0.05  # with weights, cache or both in fp8: 0.01, 0.02, 0.03 (starter model)
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


class EvaluationConfig(Schema):
    """How the policy is measured on held-out prompts."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after only")
    prompts: int = Field(
        200, ge=1, description="at most so many of each set, the first of the file"
    )
    samples: int = Field(4, ge=1, description="completions per prompt, for pass@k")


class CheckpointConfig(Schema):
    """When the training state is saved."""

    every: int = Field(50, ge=0, description="steps; 0: at the end and on Ctrl-C only")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    keep_best: int = Field(
        1,
        ge=0,
        description="checkpoints that stay for the highest pass@1 on data.evaluation, each saved "
        "when its step is evaluated; 0: none",
    )
    record_batches: bool = Field(
        True,
        description="keep what the learner was given since the oldest of the newest checkpoints, "
        "for covey replay: about 30 bytes a token, 1 % of a step or less; a batch that ends the "
        "run is kept either way",
    )


class ReplayConfig(Schema):
    """Groups that are trained on once more, beside those that are sampled for a step."""

    share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of a step's groups, drawn from those that earlier steps sampled; they may be "
        "older than max_staleness, so set importance_cap or a gate for off-policy tokens",
    )
    steps: int = Field(4, ge=1, description="how many steps back; a resumed run fills up anew")


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
    steps_without_signal: int = Field(
        100,
        ge=1,
        description="steps in a row whose groups were all rewarded alike, so that no advantage was "
        "other than 0, before the run stops",
    )
    learner_losses: int = Field(
        3,
        ge=0,
        description="times that a lost learner (or a lost scorer that learns) is started again "
        "from the last checkpoint, without a new one between them, before the run stops; 0: never",
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
        return found_algorithm(self.name)

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: object) -> object:
        if not isinstance(value, dict) or "settings" in value or "name" not in value:
            return value
        name = value["name"]
        try:
            algorithm = found_algorithm(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        rest = {k: v for k, v in value.items() if k != "name"}
        return {"name": name, "settings": algorithm.config(**rest)}

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
    epochs_per_step: int = Field(
        1, ge=1, description="how often a step goes through its updates, with the same rollouts"
    )
    replay: ReplayConfig = ReplayConfig()
    max_staleness: int = Field(
        0, ge=0, description="S, steps that a rollout may be behind the learner; 0: synchronous"
    )
    window: int = Field(
        1,
        ge=1,
        description="W, how far a step may look past its oldest unfinished group; W - 1 fewer "
        "groups are under way then, so that none gets older than max_staleness",
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
    simulation: SimulationConfig = SimulationConfig()
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
    def replayed_per_step(self) -> int:
        """Groups of a step that earlier ones sampled: share * P, rounded."""
        return round(self.replay.share * self.num_prompts_per_step)

    @property
    def sampled_per_step(self) -> int:
        """Groups of a step that are sampled for it; P without replay."""
        return self.num_prompts_per_step - self.replayed_per_step

    @property
    def slots(self) -> int:
        """So many groups may be under way."""
        return num_slots(
            self.sampled_per_step, max_staleness=self.max_staleness, window=self.window
        )

    @property
    def broadcasts_weights(self) -> bool:
        """Adapters that are published alone are few bytes: they go through the object store."""
        is_chosen = self.rollout.weight_transport == "broadcast"
        return is_chosen and self.learner.published_adapters is None

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
    replayed = recipe.replayed_per_step
    if recipe.replay.share > 0 and not 1 <= replayed < prompts:
        yield (
            f"replay.share is {recipe.replay.share:g} of {prompts} groups, which is {replayed} "
            f"of them: expected 1 to {prompts - 1}; change the share or num_prompts_per_step"
        )
    elif replayed and updates > recipe.sampled_per_step:
        yield (
            f"updates_per_step is {updates}, but the first step has no more than its "
            f"{recipe.sampled_per_step} sampled groups: lower updates_per_step or replay.share"
        )
    if prompts % updates:
        yield (
            f"num_prompts_per_step is {prompts} and updates_per_step is {updates}: a step is cut "
            "by whole groups; choose a divisor of num_prompts_per_step"
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
    for name in sorted({"rollout", "learner"}.intersection(names)):
        yield f"scorers: {name!r} is another role's name in `covey scale`; choose another one"
    for scorer in recipe.scorers:
        if scorer.learns and scorer.learns_from not in {*names} - {scorer.name}:
            yield (
                f"scorers: {scorer.name!r} learns from {scorer.learns_from!r}; expected another "
                f"scorer of the recipe as its outcome: {', '.join({*names} - {scorer.name})}"
            )
    yield from _precision_problems(recipe)
    if recipe.learner.published_adapters is not None:
        yield from adapter_problems(recipe.rollout, recipe.learner.published_adapters)
    yield from _transport_problems(recipe)
    yield from _size_problems(recipe)
    yield from _algorithm_problems(recipe)


def _algorithm_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the algorithm's points together, and a user's own ones each alone."""
    choice = recipe.algorithm
    try:
        with theirs_is_told(choice.name, "cannot be built"):
            pipeline = choice.algorithm.pipeline(
                choice.settings,
                outcomes=recipe.weights,
                max_completion_length=recipe.sampling.max_completion_length,
            )
            objective = choice.algorithm.objective(choice.settings)
    except (ValueError, UserError) as error:
        yield str(error)
        return
    problems = list(composition_problems(pipeline, objective)) if is_file_name(choice.name) else []
    yield from problems or combinations.combination_problems(
        pipeline,
        objective,
        updates_per_step=recipe.updates_per_step,
        epochs_per_step=recipe.epochs_per_step,
        is_replayed=recipe.replay.share > 0,
    )


def _transport_problems(recipe: Recipe) -> Iterator[str]:
    """A broadcast is between devices of one kind."""
    rollout, learner = recipe.rollout, recipe.learner
    is_on_gpus = rollout.gpus_per_worker > 0
    if rollout.weight_transport == "broadcast" and is_on_gpus != (learner.gpus_per_rank > 0):
        yield (
            f"rollout.weight_transport is broadcast, but rollout.gpus_per_worker is "
            f"{rollout.gpus_per_worker} and learner.gpus_per_rank {learner.gpus_per_rank}: it goes "
            "from GPU to GPU or from CPU to CPU; set weight_transport: object_store, or give GPUs "
            "to both"
        )


def _precision_problems(recipe: Recipe) -> Iterator[str]:
    """Two precisions are two policies: their log-probabilities drift apart until training fails."""
    published = recipe.learner.rollout_dtype
    if recipe.rollout.dtype != published:
        yield (
            f"rollout.dtype is {recipe.rollout.dtype}, but the learner publishes {published}: the "
            "sampled and the trained policy would differ; set rollout.dtype to "
            f"{published}, or learner.publish_dtype to {recipe.rollout.dtype}"
        )
    if recipe.rollout.fp8_settings:
        yield from _rounding_problem(recipe)
    elif published == "bfloat16" and recipe.alarms.log_prob_gap < HEALTHY_BFLOAT16_GAP:
        yield (
            f"alarms.log_prob_gap is {recipe.alarms.log_prob_gap:g}, but in bfloat16 a gap up to "
            f"{HEALTHY_BFLOAT16_GAP:g} is healthy: set it to {HEALTHY_BFLOAT16_GAP:g} or more"
        )


def _rounding_problem(recipe: Recipe) -> Iterator[str]:
    """Tokens are sampled by a rounding of the policy: both alarm and loss have to know."""
    if recipe.alarms.log_prob_gap >= HEALTHY_FP8_GAP:
        return
    is_corrected = recipe.algorithm.settings.importance_cap is not None
    correction = (
        ""
        if is_corrected
        else (
            ", and algorithm.importance_cap: 2, which is null now, so that the loss corrects for "
            "it (but for an algorithm that needs no importance weight)"
        )
    )
    yield (
        f"alarms.log_prob_gap is {recipe.alarms.log_prob_gap:g}, but with "
        f"{' and '.join(recipe.rollout.fp8_settings)} tokens are sampled by a rounding of the "
        f"policy, and a gap up to {HEALTHY_FP8_GAP:g} is healthy: set it to {HEALTHY_FP8_GAP:g} or "
        f"more{correction}"
    )


def _size_problems(recipe: Recipe) -> Iterator[str]:
    """Work that cannot be cut into the pieces that the recipe asks for."""
    learner = recipe.learner
    rows = recipe.rollouts_per_step // recipe.updates_per_step
    if rows < learner.row_ranks:
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
