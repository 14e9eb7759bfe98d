"""Learner ranks in processes of their own, without Ray: what they did, as plain data."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed

from grpo.errors import NonFinite
from grpo.objective import Objective
from grpo.types import MeasureRequest, TrainBatch, TrainRow
from learner import policy
from learner.config import LearnerConfig
from learner.rank import LearnerRank
from learner.weights import named_weights
from tests.unit.learner_cases import (
    VOCABULARY,
    batch_of,
    overflowing_row,
    random_rows,
    rank_of,
    save,
)
from tests.unit.learner_objectives import MEASURE_NAMES, WHOLE_GROUPS

Case = Callable[..., "Outcome"]
MOST_GATHERED = 2000  # elements, of which the test model has several times as many
DEADLINE_S = 240  # of all cases of one set of processes


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What rank 0 of one learner saw; `error` replaces all else."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    image: bytes = b""  # published after the second step
    resumed_image: bytes = b""  # the same, with a save and a load after the first step
    refusals: list[str] = field(default_factory=list)  # what NonFinite said
    image_after_refusals: bytes = b""
    answers: dict[str, list[list[list[float]]]] = field(default_factory=dict)  # of `measure`
    held: list[tuple[int, int]] = field(default_factory=list)  # see run_gathering
    error: str = ""


def steps() -> list[TrainBatch]:
    """Two updates of unlike size, then a step with fewer rows than some ranks have turns."""
    rows = random_rows(19)
    return [batch_of(rows[:11], rows[11:18], step=0), batch_of(rows[18:], step=1)]


def poisoned() -> list[list[TrainRow]]:
    """An update whose gradient overflows, and one whose loss is no number on a single rank."""
    rows = random_rows(6, seed=3)
    undefined = replace(rows[1], advantages=np.full_like(rows[1].advantages, np.nan))
    return [[overflowing_row()], [undefined, *rows[2:]]]


def run_case(config: LearnerConfig, *, model: str, rank: int, master: str, folder: Path) -> Outcome:
    """Train, save, train; then load into a fresh learner, train the same, and poison it."""
    first, second = steps()
    outcome = Outcome()
    learner = rank_of(model, config, rank=rank, master=master)
    outcome.metrics.append(dict(learner.train(first).metrics))
    save(learner, folder)
    outcome.metrics.append(dict(learner.train(second).metrics))
    outcome.log_probs = learner.log_probs(random_rows(5, seed=1))
    outcome.image = image_of(learner)
    learner.close()
    learner = rank_of(model, config, rank=rank, master=master)
    learner.load(str(folder))
    learner.train(second)
    outcome.resumed_image = image_of(learner)
    for rows in poisoned():
        try:
            learner.train(batch_of(rows, step=2))
        except NonFinite as refusal:
            outcome.refusals.append(str(refusal))
    outcome.image_after_refusals = image_of(learner)
    learner.close()
    return outcome


def run_whole_groups(
    config: LearnerConfig,
    *,
    model: str,
    rank: int,
    master: str,
    folder: Path,
    objective: Objective = WHOLE_GROUPS,
) -> Outcome:
    """Steps, a stage and measures of an objective over whole groups; stopped and continued."""
    rows = random_rows(19)
    stage = replace(batch_of(rows[:8], rows[8:12]), is_stage=True)
    # Three groups on two ranks: in the second turn one rank has nothing to measure.
    groups = tuple(tuple(rows[start : start + 4]) for start in (0, 4, 8))
    labels = tuple(np.arange(4.0) + group for group in range(3))
    request = MeasureRequest(names=MEASURE_NAMES, groups=groups, labels=labels)
    outcome = Outcome()
    for is_resumed in (False, True):
        learner = rank_of(model, config, rank=rank, master=master, objective=objective)
        if is_resumed:
            learner.load(str(folder))
        else:
            outcome.metrics.append(dict(learner.train(batch_of(rows[:11], rows[11:])).metrics))
            outcome.metrics.append(dict(learner.train(stage).metrics))
            save(learner, folder)
        found = learner.measure(request)
        outcome.answers = {
            name: [[stream.tolist() for stream in group] for group in of_name]
            for name, of_name in found.items()
        }
        outcome.metrics.append(dict(learner.train(batch_of(rows[:5], step=1)).metrics))
        if is_resumed:
            outcome.resumed_image = image_of(learner)
        else:
            outcome.image = image_of(learner)
        learner.close()
    return outcome


def run_gathering(
    config: LearnerConfig, *, model: str, rank: int, master: str, folder: Path
) -> Outcome:
    """(elements of all weights that are whole on this rank, those of the part), at each part."""
    from learner import deepspeed_backend  # seconds to import, and only here

    deepspeed_backend.GATHER_ELEMENTS = MOST_GATHERED
    outcome = Outcome()
    learner = rank_of(model, config, rank=rank, master=master)
    weights = named_weights(learner._pretrained).values()
    for part in learner._trainee.backend.whole_weights():
        whole = sum(weight.numel() for weight in weights)  # 0 for what ZeRO-3 has cut
        outcome.held.append((whole, sum(weight.numel() for weight in part.values())))
    outcome.image = image_of(learner)
    learner.close()
    return outcome


def image_of(learner: LearnerRank) -> bytes:
    bundle = learner.publish(0)
    return b"" if bundle is None else bundle.payload.tobytes()


def worker(
    rank: int,
    configs: dict[str, LearnerConfig],
    master: str,
    model: str,
    folder: Path,
    results: Queue[tuple[int, dict[str, Outcome]]],
    run: Case,
) -> None:
    """All cases one after the other: importing DeepSpeed takes longer than most of them.

    The process group is this function's, because DeepSpeed cannot join a second one. Small chunks
    of the output layer, unlike in number on the ranks, must not disturb the lock-step of ZeRO-3.
    """
    policy.MAX_LOGITS = 5 * VOCABULARY
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{master}",
        rank=rank,
        world_size=next(iter(configs.values())).ranks,
    )
    outcomes: dict[str, Outcome] = {}
    for name, config in configs.items():
        try:
            outcomes[name] = run(
                config, model=model, rank=rank, master=master, folder=folder / name
            )
        except Exception:
            outcomes[name] = Outcome(error=traceback.format_exc())
            break
    results.put((rank, outcomes))
    torch.distributed.destroy_process_group()


def outcomes_of(
    configs: dict[str, LearnerConfig],
    *,
    ranks: int,
    model: str,
    folder: Path,
    run: Case = run_case,
    start: Literal["spawn", "fork"] = "spawn",
) -> list[dict[str, Outcome]]:
    """Run the cases on so many ranks; the outcomes of each rank by name."""
    context = multiprocessing.get_context(start)
    results: Queue[tuple[int, dict[str, Outcome]]] = context.Queue()
    master = f"127.0.0.1:{free_port()}"
    processes = [
        context.Process(target=worker, args=(rank, configs, master, model, folder, results, run))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=DEADLINE_S) for _ in processes)
    except queue.Empty:
        raise AssertionError(f"{ranks} ranks hung for {DEADLINE_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [found[rank] for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
