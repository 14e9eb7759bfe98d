"""Hands a recipe to a Ray cluster as a job, and follows the job's log if asked.

Knows Ray's Jobs API and its token authentication; refuses to know how a run is driven: the job
runs the same `train` command that a laptop does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.errors import Transient, UserError
from orchestration.config import Recipe, read_recipe
from orchestration.upload import job_files, write_archive

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Write = Callable[[str], None]

INTERRUPTED = 130  # what a shell reports after Ctrl-C
DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")


def submit(
    recipe: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    follow: bool,
    write: Write,
    working_dir: Path,
) -> int:
    """Start the recipe on the cluster; returns the exit status, with `follow` that of the job.

    `working_dir` is uploaded: it holds the recipe, its small data files and reward functions.
    """
    folder = working_dir.resolve()
    loaded = read_recipe(recipe, overrides)
    command = train_command(loaded.path, overrides, folder)
    _refuse_lost_output(loaded.recipe)
    named = [loaded.path.resolve(), *local_files(loaded.recipe)]
    inside = [path for path in named if path.is_relative_to(folder)]
    for path in named:
        if path not in inside:
            write(f"not uploaded, so it must exist on the cluster's nodes: {path}\n")
    files = job_files(folder, named=inside, without=[Path(loaded.recipe.output)])
    client = connect(address)
    job = start(client, command, folder, files)
    write(f"submitted {job} to {client.get_address()}\n")
    if not follow:
        write(_how_to("follow", "logs --follow", job, client))
        write(_how_to("stop", "stop", job, client))
        return 0
    return follow_job(client, job, write)


def train_command(recipe: Path, overrides: Sequence[str], working_dir: Path) -> str:
    """The job's shell command; paths are relative to the uploaded folder."""
    try:
        inside = recipe.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise UserError(
            f"the recipe {recipe} lies outside of {working_dir}, which is what gets uploaded; "
            "run `covey submit` in a folder that holds the recipe"
        ) from None
    settings = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", "-m", "orchestration.cli", "train", inside.as_posix(), *settings])


def local_files(recipe: Recipe) -> list[Path]:
    """Files and folders of this machine that the recipe names."""
    functions = [scorer.function for scorer in recipe.scorers if scorer.function is not None]
    names = [
        recipe.model,
        *[item.source for item in (*recipe.data.train, *(recipe.data.evaluation or ()))],
        *[name.rpartition(":")[0] for name in (recipe.algorithm.name, *functions)],
        *[s.preference.folder for s in recipe.scorers if s.preference is not None],
        *[s.process_reward.model for s in recipe.scorers if s.process_reward is not None],
        *[s.implicit_reward.model for s in recipe.scorers if s.implicit_reward is not None],
    ]
    return [Path(name) for name in names if Path(name).is_absolute()]


def connect(address: str | None) -> JobSubmissionClient:
    """A client for the cluster's dashboard, authenticated with a token."""
    source = _token_source(os.environ)
    # Ray reads the mode when it is imported, and without it sends no token.
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"--address {address} is the Ray Client's; jobs go to the dashboard, usually "
            "http://HEAD:8265"
        )
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the cluster refused the token from {source}. It must equal the cluster's own: run "
            "`ray get-auth-token` on the head node, and give its output to this machine as "
            f"RAY_AUTH_TOKEN or in {DEFAULT_TOKEN_FILE}"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray dashboard answers at {address or 'the address found'}: {error} Give the "
            "head node's with --address http://HEAD:8265 or in RAY_API_SERVER_ADDRESS; from "
            "outside, forward the port first: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # uploads and closed sockets are no news
    return client


def start(client: JobSubmissionClient, command: str, folder: Path, files: Sequence[Path]) -> str:
    """Upload these files of the folder and start the command among them; the job's id."""
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "job.zip"
        write_archive(archive, folder, files)
        try:
            job: str = client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(archive)}
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the cluster did not take the job: {error}") from error
    return job


def follow_job(client: JobSubmissionClient, job: str, write: Write) -> int:
    """Pass the job's output on until it ends; its exit status. Ctrl-C leaves it running."""
    try:
        asyncio.run(_pass_on(client, job, write))
    except KeyboardInterrupt:
        write(f"\nno longer following; {job} goes on\n")
        write(_how_to("follow", "logs --follow", job, client))
        write(_how_to("stop", "stop", job, client))
        return INTERRUPTED
    except (RuntimeError, OSError) as error:
        raise Transient(
            f"the log of {job} broke off ({error}); the job may well go on. "
            + _how_to("follow", "logs --follow", job, client)
        ) from error
    info = client.get_job_info(job)
    # Of a failed job the message goes on with the whole log, which has just been shown.
    reason = (info.message or "").partition(", last available logs")[0]
    write(f"{job}: {info.status.value.lower()}. {reason}\n")
    code: int | None = info.driver_exit_code  # None: it was stopped, or never began
    if code is None:
        return 0 if info.status.value == "SUCCEEDED" else 1
    return code


async def _pass_on(client: JobSubmissionClient, job: str, write: Write) -> None:
    async for text in client.tail_job_logs(job):
        write(text)


def _token_source(environment: Mapping[str, str]) -> str:
    """Where Ray will find its token, or what to do if nowhere; in Ray's own order."""
    if environment.get("RAY_AUTH_TOKEN"):
        return "the variable RAY_AUTH_TOKEN"
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or DEFAULT_TOKEN_FILE).expanduser()
    if path.is_file() and path.stat().st_size:
        return f"the file {path}"
    where = "RAY_AUTH_TOKEN_PATH names" if named else "Ray looks for a token in"
    raise UserError(
        f"{where} {path}, and there is none. A cluster takes jobs only from those who hold its "
        "token: run `ray get-auth-token` on the head node (with --generate before the cluster "
        "is started for the first time), and give its output to this machine as RAY_AUTH_TOKEN "
        f"or in {DEFAULT_TOKEN_FILE}"
    )


def _refuse_lost_output(recipe: Recipe) -> None:
    if not Path(recipe.output).is_absolute():
        raise UserError(
            f"output is {recipe.output!r}, which on the cluster would lie in the job's working "
            "directory, and that is deleted after the job; name a folder that all nodes can "
            "write to: --set output=/shared/runs"
        )


def _how_to(what: str, verb: str, job: str, client: JobSubmissionClient) -> str:
    command = f"RAY_AUTH_MODE=token ray job {verb} --address {client.get_address()} {job}"
    return f"to {what} it: {command}\n"
