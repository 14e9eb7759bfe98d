"""One rank of the learner: the whole learner where `ranks` is 1.

A plain class that runs in any process. Refuses to know Ray; the driver calls the same method with
the same arguments on every rank, because all ranks work together in each.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from grpo.algorithms.user_file import found_algorithm
from grpo.errors import Fatal
from grpo.objective import Objective
from grpo.objective_checks import needs_reference, refuse_impossible
from grpo.types import Float32, MeasureRequest, StepReport, TrainBatch, TrainRow, WeightBundle
from grpo.weight_group import WeightGroup
from learner.answers import measured
from learner.backend import Backend
from learner.config import LearnerConfig, LoraConfig
from learner.environment import rank_environment
from learner.policy import Adapters, Policy, load_policy, refuse_unshareable
from learner.reference import Reference, WithoutAdapters
from learner.room import room_for_state
from learner.row_cost import RowCost
from learner.scalar import Scalar
from learner.schedule import learning_rate_at
from learner.snapshot import Snapshot, saved_numbers, saved_pieces, saved_reference
from learner.torch_backend import TorchBackend
from learner.update import Trainee, log_probs_of, run_step
from learner.weight_images import (
    WeightImages,
    adapter_images,
    is_saved_as_named,
    model_images,
    pass_on,
)
from learner.weight_sender import WeightSender
from learner.weights import as_saved, copy_weights, export, named_weights, to_cpu

EXPORT_FOLDER = "huggingface"
ADAPTER_FOLDER = "adapter"


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
        refuse_impossible(self._objective)
        self._total_steps = total_steps
        self._temperature = temperature
        self._rank = rank
        self._world_size = world_size
        self._master = master
        self._seed = seed
        self._dtype: torch.dtype = getattr(torch, config.rollout_dtype)
        self._steps_done = 0
        self._adapters: Adapters | None = None  # None: all weights are trained
        self._images: WeightImages | None = None  # None: another rank publishes
        self._snapshot: Snapshot | None = None  # None: nothing waits to be written

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
        with room_for_state("start", self._config, has_second_model=self._copies_initial):
            self._build()

    def _build(self) -> None:
        policy = load_policy(self._model, self._config, temperature=self._temperature)
        refuse_unshareable(policy.model, self._config.sequence_parallel)
        self._pretrained = policy.model
        published = self._config.published_adapters
        # Rank 0 sends what its image holds.
        self._is_saved_as_named = self._rank == 0 or is_saved_as_named(policy.model)
        if self._rank == 0 and published is None:
            self._images = model_images(policy.model, self._dtype)
        initial = copy.deepcopy(policy) if self._copies_initial else None
        if self._config.lora is not None:
            self._adapters = attached(policy.model, self._config.lora, name=self._model)
            policy.adapters = self._adapters
            if self._rank == 0 and published is not None:
                self._images = adapter_images(self._adapters.named_weights(), published)
        backend = make_backend(policy, self._config)
        policy.head.prepare(backend.device)
        if initial is not None:
            initial.sequence_group = policy.sequence_group
        self._sender = WeightSender(backend.device, self._dtype)
        self._moving_reference: Reference | None = None  # None: the model's files are all of it
        learnable = self._objective.learnable
        self._trainee = Trainee(
            backend=backend,
            objective=self._objective,
            reference=self._reference(initial, policy, backend),
            scalar=None if learnable is None else Scalar(learnable),
            config=self._config,
            row_cost=RowCost.of_model(policy.model.config),
            # Ranks of one sequence group have the same rows.
            rank=self._rank // self._config.sequence_parallel,
            ranks=self._world_size // self._config.sequence_parallel,
        )

    def train(self, batch: TrainBatch) -> StepReport:
        """Apply every update of the batch, at the learning rate of the next step.

        A stage runs at the rate of the step before it, and is none itself.
        """
        done = self._steps_done
        rate = learning_rate_at(
            max(0, done - 1) if batch.is_stage else done,
            total_steps=self._total_steps,
            config=self._config,
        )
        rate *= batch.learning_rate_scale
        if batch.is_stage:
            return run_step(self._staged(), batch, learning_rate=rate)
        report = run_step(self._trainee, batch, learning_rate=rate)
        self._steps_done += 1
        self._update_reference()
        return report

    def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        """By name, for each group, for each of its rows: [T] under the current weights."""
        return measured(self._trainee, request)

    def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        """[T] log-probabilities of each row's completion under the current policy."""
        mine: dict[int, list[float]] = {}
        for block in self._trainee.blocks(rows):
            values = log_probs_of(self._trainee, block).cpu()
            for index, place in enumerate(() if block.is_idle else block.places):
                mine[place] = values[block.row == index].tolist()
        found = {k: v for part in self._trainee.backend.collect(mine) for k, v in part.items()}
        return [found[place] for place in range(len(rows))]

    def open_group(self, host: str) -> int:
        """The port of this node where rollout workers can meet this rank, to be sent weights."""
        return self._sender.open(host)

    def publish(self, version: int, group: WeightGroup | None = None) -> WeightBundle | None:
        """The current weights, or adapters, on rank 0; None on the others.

        `group` gets all weights of this rank as they are gathered, whatever becomes of the bundle.
        """
        with self._trainee.room_for_state("gathering of the weights for the rollout workers"):
            return self._published(version, group)

    def _published(self, version: int, group: WeightGroup | None) -> WeightBundle | None:
        backend = self._trainee.backend
        if self._config.published_adapters is None:
            parts = backend.whole_weights()
        else:
            parts = backend.whole_adapters()
        sender = None if group is None else self._sender.begun(group, version)
        if self._images is not None:
            return self._images.bundle(parts, version=version, sender=sender)
        if sender is not None:
            saved = None if self._is_saved_as_named else partial(as_saved, self._pretrained)
            pass_on(parts, sender, as_saved=saved)
            return None
        for _ in parts:  # takes part in gathering them
            pass
        return None

    def snapshot(self) -> None:
        """Copy the training state aside, whole weights with it; `write` is what follows."""
        numbers = {"steps_done": float(self._steps_done)}
        if self._trainee.scalar is not None:
            numbers["scalar"] = self._trainee.scalar.value
        is_first = self._rank == 0
        with self._trainee.room_for_state("copy of the training state for a checkpoint"):
            weights, adapters = self._gathered(), self._copied_adapters()
            self._snapshot = Snapshot(
                rank=self._rank,
                numbers=numbers,
                pieces=self._trainee.backend.copied_state(),
                reference=self._copied_averages(),
                export=partial(self._export, weights, adapters) if is_first else None,
            )

    def write(self, folder: str) -> list[str]:
        """Write the snapshot: every rank its state, rank 0 a `huggingface/` export, too.

        Not collective, and the one method that another thread may run beside the others. The
        paths of this rank's files, from `folder`.
        """
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None, "snapshot() comes first"
        return snapshot.write(Path(folder))

    def load(self, folder: str) -> None:
        """Continue from what `write` wrote, on however many ranks; nothing else has state."""
        own = saved_numbers(Path(folder))
        self._steps_done = int(own["steps_done"])
        if self._trainee.scalar is not None:
            self._trainee.scalar.value = own["scalar"]
        with self._trainee.room_for_state("reading of the training state from a checkpoint"):
            self._trainee.backend.restore(saved_pieces(Path(folder)))
            if self._moving_reference is not None:
                self._moving_reference.restore(saved_reference(Path(folder)))

    def close(self) -> None:
        """Leave the other ranks, and the rollout workers."""
        self._sender.leave()
        self._trainee.backend.close()

    @property
    def _copies_initial(self) -> bool:
        """Whether the reference is a second model; adapters can be switched off instead."""
        can_move = self._objective.reference_update is not None
        return needs_reference(self._objective) and (can_move or self._config.lora is None)

    def _reference(
        self, initial: Policy | None, policy: Policy, backend: Backend
    ) -> Reference | WithoutAdapters | None:
        if initial is not None:
            if self._config.rounds_base:
                room = named_weights(initial.model)
                for part in backend.whole_weights():
                    copy_weights(part, room)
            is_moving = self._objective.reference_update is not None
            reference = Reference(
                initial,
                device=backend.device,
                is_moving=is_moving,
                is_offloaded=self._config.reference_offload,
                is_cut=self._config.zero_stage == 3 and self._world_size > 1,
            )
            self._moving_reference = reference if is_moving else None
            return reference
        if policy.adapters is not None and needs_reference(self._objective):
            return WithoutAdapters(backend, policy.adapters)
        return None

    def _update_reference(self) -> None:
        update, reference = self._objective.reference_update, self._moving_reference
        if update is not None and reference is not None and self._steps_done % update.every == 0:
            with self._trainee.room_for_state("update of the reference"):
                reference.follow(self._trainee.backend.whole_weights(), decay=update.decay)

    def _staged(self) -> Trainee:
        """The same policy under the objective of the stage."""
        if self._objective.stage is None:
            raise Fatal("the driver sent a batch of a stage, but the objective has no `stage`")
        return replace(self._trainee, objective=self._objective.stage, scalar=None)

    def _export(
        self, weights: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor], folder: Path
    ) -> None:
        path = folder / EXPORT_FOLDER
        export(weights, path, model=self._model, dtype=self._config.rollout_dtype)
        if self._adapters is not None:
            self._adapters.export(adapters, folder / ADAPTER_FOLDER)

    def _gathered(self) -> dict[str, torch.Tensor]:
        """A copy of all weights as transformers saves them, on rank 0; empty elsewhere."""
        weights: dict[str, torch.Tensor] = {}
        for part in self._trainee.backend.whole_weights():
            if self._rank == 0:
                weights |= {name: to_cpu(weight, self._dtype) for name, weight in part.items()}
        return as_saved(self._pretrained, weights) if self._rank == 0 else {}

    def _copied_adapters(self) -> dict[str, torch.Tensor]:
        """A copy of every A and B on rank 0; empty elsewhere, and where there are none."""
        if self._adapters is None:
            return {}
        return {
            name: to_cpu(weight, torch.float32)
            for part in self._trainee.backend.whole_adapters()
            for name, weight in part.items()
            if self._rank == 0
        }

    def _copied_averages(self) -> dict[str, torch.Tensor]:
        """A copy of a moving reference on rank 0; empty elsewhere, and where none moves."""
        reference = self._moving_reference
        return {
            name: to_cpu(average, average.dtype)
            for name, average in (() if reference is None else reference.averages())
            if self._rank == 0
        }


def algorithm_objective(algorithm: Mapping[str, object]) -> Objective:
    """The learner's half of {name: grpo, ...settings}."""
    chosen = found_algorithm(str(algorithm["name"]))
    settings = {key: value for key, value in algorithm.items() if key != "name"}
    return chosen.objective(chosen.config.model_validate(settings))


def make_backend(policy: Policy, config: LearnerConfig) -> Backend:
    """The configured backend."""
    if config.backend == "torch":
        return TorchBackend(policy, config)
    # Imported here: it takes seconds, and a laptop that trains with torch need not have it.
    from learner.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(policy, config)


def attached(model: PreTrainedModel, config: LoraConfig, *, name: str) -> Adapters:
    """Low-rank adapters in a model; they alone are trainable from then on."""
    # It warns of a kernel for inference that is not used here; peft imports it where it is there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Imported here: peft takes seconds, and whoever trains all weights need not have it.
    from learner.adapters import LowRankAdapters

    if config.quantization is None:
        return LowRankAdapters(model, config, name=name)
    # Imported here: an extra, which whoever trains beside a whole base need not have.
    from learner.quantized_base import dequantized, quantize

    quantize(model)
    return LowRankAdapters(model, config, name=name, whole=dequantized)
