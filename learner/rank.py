"""One rank of the learner: the whole learner where `ranks` is 1.

A plain class that runs in any process. Refuses to know Ray; the driver calls the same method with
the same arguments on every rank, because all ranks work together in each.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from grpo.algorithms import ALGORITHMS
from grpo.objective import Objective, Signal
from grpo.types import StepReport, TrainBatch, TrainRow, WeightBundle
from learner.backend import Backend
from learner.config import LearnerConfig
from learner.environment import rank_environment
from learner.policy import Policy, load_policy
from learner.schedule import learning_rate_at
from learner.torch_backend import TorchBackend
from learner.update import Trainee, log_probs_of, run_step
from learner.weights import as_saved, bundle, export

STATE_FOLDER = "learner"
EXPORT_FOLDER = "huggingface"


class LearnerRank:
    """Holds its part of the policy from `start` to `close`."""

    def __init__(
        self,
        *,
        model: str,
        config: LearnerConfig,
        algorithm: Mapping[str, object],  # name and settings, as in a recipe
        total_steps: int,
        temperature: float,  # of the sampling: both sides must mean the same distribution
        rank: int,
        world_size: int,
        master: str,  # "host:port" of rank 0
        seed: int,
        objective: Objective | None = None,  # instead of the algorithm's own
    ) -> None:
        if temperature <= 0:
            raise ValueError(
                f"temperature is {temperature}: a policy that is trained must be sampled from, "
                "so set sampling.temperature above 0 (1.0 is usual)"
            )
        self._model = model
        self._config = config
        self._objective = algorithm_objective(algorithm) if objective is None else objective
        self._total_steps = total_steps
        self._temperature = temperature
        self._rank = rank
        self._world_size = world_size
        self._master = master
        self._seed = seed
        self._steps_done = 0

    def start(self) -> None:
        """Load the policy, join the other ranks and build the optimiser."""
        os.environ |= rank_environment(
            self._config,
            rank=self._rank,
            world_size=self._world_size,
            master=self._master,
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
        torch.set_num_threads(self._config.cpus_per_rank)
        torch.manual_seed(self._seed)
        policy = load_policy(self._model, self._config, temperature=self._temperature)
        self._pretrained = policy.model
        needs_reference = Signal.REFERENCE in self._objective.needs
        reference = copy.deepcopy(policy).requires_grad_(False).eval() if needs_reference else None
        backend = make_backend(policy, self._config)
        self._trainee = Trainee(
            backend=backend,
            objective=self._objective,
            reference=None if reference is None else reference.to(backend.device),
            max_tokens=self._config.max_tokens_per_microbatch,
            rank=self._rank,
            ranks=self._world_size,
        )

    def train(self, batch: TrainBatch) -> StepReport:
        """Apply every update of the batch, at the learning rate of the next step."""
        rate = learning_rate_at(
            self._steps_done, total_steps=self._total_steps, config=self._config
        )
        report = run_step(self._trainee, batch, learning_rate=rate)
        self._steps_done += 1
        return report

    def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        """[T] log-probabilities of each row's completion under the current policy."""
        place = {row: index for index, row in enumerate(rows)}  # by identity
        mine: dict[int, list[float]] = {}
        for block in self._trainee.blocks(rows):
            values = log_probs_of(self._trainee.backend, block).cpu()
            for index, row in enumerate(block.rows):
                if row in place:  # not the stand-in of an idle rank
                    mine[place[row]] = values[block.row == index].tolist()
        found = {k: v for part in self._trainee.backend.collect(mine) for k, v in part.items()}
        return [found[place[row]] for row in rows]

    def publish(self, version: int) -> WeightBundle | None:
        """The current weights, on rank 0; None on the others."""
        weights = self._gathered()
        return bundle(weights, version=version) if self._rank == 0 else None

    def save(self, folder: str) -> None:
        """Write the training state of every rank and, on rank 0, a `huggingface/` export."""
        self._trainee.backend.save(Path(folder) / STATE_FOLDER, steps_done=self._steps_done)
        weights = self._gathered()
        if self._rank == 0:
            export(
                weights,
                Path(folder) / EXPORT_FOLDER,
                model=self._model,
                dtype=self._config.rollout_dtype,
            )

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote; nothing else has state, since nothing here is drawn."""
        self._steps_done = self._trainee.backend.load(Path(folder) / STATE_FOLDER)

    def close(self) -> None:
        """Leave the other ranks."""
        self._trainee.backend.close()

    def _gathered(self) -> dict[str, torch.Tensor]:
        weights = self._trainee.backend.gather(getattr(torch, self._config.rollout_dtype))
        return as_saved(self._pretrained, weights) if self._rank == 0 else weights


def algorithm_objective(algorithm: Mapping[str, object]) -> Objective:
    """The learner's half of {name: grpo, ...settings}."""
    chosen = ALGORITHMS[str(algorithm["name"])]
    settings = {key: value for key, value in algorithm.items() if key != "name"}
    return chosen.objective(chosen.config.model_validate(settings))


def make_backend(policy: Policy, config: LearnerConfig) -> Backend:
    """The configured backend."""
    if config.backend == "torch":
        return TorchBackend(policy, config)
    # Imported here: it takes seconds, and a laptop that trains with torch need not have it.
    from learner.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(policy, config)
