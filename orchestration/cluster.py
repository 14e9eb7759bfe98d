"""The Ray cluster of a run: joined or started, and what every call of an actor goes through.

Failures come out as the kinds of grpo.errors, classified where Ray still tells them apart. Refuses
to know what the actors do.
"""

from __future__ import annotations

import logging
import os
from math import ceil
from typing import Any

import ray
import ray.exceptions
from ray._private import worker as ray_worker
from ray.actor import ActorHandle

from grpo.errors import CoveyError, Fatal, UserError, WorkerLost
from orchestration.cluster_address import require_listener
from orchestration.config import Recipe
from orchestration.placement import Room, room_of, shortage, total
from orchestration.waiting import Whereabouts
from orchestration.waits import note_whereabouts

# Where covey starts Ray itself CPUs are book-keeping, and a pool may grow beyond the cores; Ray
# starts no more processes for it. GPUs are counted as they are.
LOGICAL_CPUS = 16  # for each core


def connect(recipe: Recipe) -> bool:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; True if it was started."""
    # Authentication stays on, and Ray need not warn about it at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        require_listener(address)
        _init(address=address)
    else:
        cpus, _ = total(recipe)
        _start_here(max(LOGICAL_CPUS * (os.cpu_count() or 1), ceil(cpus)))
    problem = shortage(recipe, ray.cluster_resources())
    if problem:
        ray.shutdown()
        raise UserError(problem)
    return not address


def _start_here(num_cpus: int) -> None:
    """Ray gives its own processes half a minute, which a busy machine may need twice."""
    for is_last in (False, True):
        try:
            # "local": without it Ray joins what `ray start` has left on this machine.
            _init(address="local", num_cpus=num_cpus, include_dashboard=False)
        except Fatal:
            if is_last:
                raise
            ray.shutdown()
        else:
            return


def _init(**where: Any) -> None:
    _print_no_paragraphs()
    try:
        ray.init(**where, log_to_driver=False, logging_level="warning")
    except Exception as error:  # Ray raises nothing more exact, of late processes for example
        raise Fatal(
            f"Ray did not start: {error}\nit gives its own processes half a minute at most: on a "
            "busy machine try again, or train without Ray (--local)"
        ) from error


def _print_no_paragraphs() -> None:
    """Ray prints a paragraph of advice for every process that dies, ahead of our line about it.

    No setting stops it; where another version of Ray does it otherwise, it prints as ever. What
    the paragraph says is in Ray's logs, too.
    """
    if hasattr(ray_worker, "print_to_stdstream"):
        ray_worker.print_to_stdstream = _print_nothing


def _print_nothing(*message: object, **how: object) -> None:
    """In its place."""


def room() -> Room:
    """As of now, on all nodes together."""
    return room_of(ray.cluster_resources(), ray.available_resources())


def disconnect() -> None:
    """Leave the cluster; ends it if `connect` started it."""
    ray.shutdown()


async def answer(reference: Any) -> Any:
    """The result of an actor call; failures come out as the kinds of grpo.errors."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CoveyError):
            raise cause from None
        raise Fatal(f"an actor raised {type(cause).__name__}: {cause}\n{error}") from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(in_short(str(error)) or type(error).__name__) from error


def _whereabouts(actor: object) -> Whereabouts:
    """Runs in the actor. Ray has put files in the place of standard output and error."""
    logs = [os.readlink(f"/proc/self/fd/{stream}") for stream in (1, 2)]
    return Whereabouts(
        pid=os.getpid(), node=ray.util.get_node_ip_address(), logs=tuple(dict.fromkeys(logs))
    )


async def located(actor: ActorHandle[Any], owner: str | None = None) -> None:
    """Register where an actor runs, before anything is asked of it that could hang."""
    note_whereabouts(await answer(actor.__ray_call__.remote(_whereabouts)), owner)


async def device_of(actor: ActorHandle[Any]) -> str:
    """The GPU that an actor was given, or its node: actors of one device can share memory there."""
    return str(await answer(actor.__ray_call__.remote(_device)))


def _device(actor: object) -> str:
    context = ray.get_runtime_context()
    return " ".join([context.get_node_id(), *context.get_accelerator_ids().get("GPU", [])])


def in_short(told: str) -> str:
    """What Ray tells of a failure: the cause first, then its own words without general advice."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    causes = [line for line in lines if "Worker exit" in line or "died" in line]
    sentence = (causes[-1:] or lines[:1] or [""])[0].partition(" Some common causes")[0]
    head, _, detail = sentence.partition(" Worker exit type: ")
    if not detail:
        return head
    words = detail.rpartition("Worker exit detail: ")[2]
    return f"its process has ended (Ray: {words.rstrip('.')})"
