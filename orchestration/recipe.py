"""The recipe of a run: every section and every default.

Light on purpose: importing it loads no torch, ray, vllm or deepspeed. Refuses to know files (see
config.py for YAML, overrides, aliases and messages) and which values cannot go together
(recipe_problems.py).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_serializer, model_validator

from grpo.algorithms import Algorithm
from grpo.algorithms.user_file import (
    found_algorithm,
)
from grpo.config import AlgorithmConfig, Schema
from grpo.errors import UserError
from grpo.types import Sampling
from learner.config import LearnerConfig
from orchestration.buffer import num_slots
from orchestration.data_config import DataConfig
from orchestration.recipe_problems import recipe_problems
from orchestration.simulation.config import SimulationConfig
from reward_services.config import ScorerConfig
from rollout_workers.config import RolloutConfig

Tracker = Literal["tensorboard", "wandb"]
LOWEST_TEMPERATURE = 0.01


class SamplingConfig(Schema):
    """How completions are drawn, in training and evaluation."""

    temperature: float = Field(
        1.0, ge=0, description="0: greedy, for evaluation only; else 0.01 or more"
    )
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off")
    max_prompt_length: int = Field(512, ge=1, description="tokens, chat template included")
    max_completion_length: int = Field(512, ge=1, description="tokens, guidance included")

    @field_validator("temperature")
    @classmethod
    def _divides_logits(cls, value: float) -> float:
        # vLLM takes 0.01 in place of anything smaller, which the learner would divide by.
        if 0 < value < LOWEST_TEMPERATURE:
            raise ValueError(
                f"found {value:g}; expected {LOWEST_TEMPERATURE:g} or more, as logits are divided "
                "by it, or 0 to decode greedily in an evaluation"
            )
        return value

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
    def shares_gpus(self) -> bool:
        """Whether learner ranks and rollout workers may lie on the same GPUs."""
        return self.rollout.has_part_of_gpu and 0 < self.learner.gpus_per_rank < 1

    @property
    def sends_weights(self) -> bool:
        """Adapters that are published alone are few bytes: they go through the object store."""
        is_chosen = self.rollout.weight_transport != "object_store"
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
        problems = list(recipe_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
