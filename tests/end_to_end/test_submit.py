"""Jobs on a real Ray head with token authentication: upload, log, exit status, refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Ray's token mode is fixed when Ray is imported, so every client is a process of its own.
CLIENT = """
import sys
from pathlib import Path
from grpo.errors import UserError
from orchestration.submit import connect, follow_job, start
from orchestration.upload import job_files
address, folder, command = sys.argv[1:]
try:
    client = connect(address)
    folder = Path(folder)
    job = start(client, command, folder, job_files(folder, named=[], without=[]))
    print("job", job, flush=True)
    sys.exit(follow_job(client, job, lambda text: print(text, end="", flush=True)))
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running head node and the environment that its friends have."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("ray")  # sockets below it: the path must stay short
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "HOME": str(folder),  # no token of the machine's owner may help
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    port, dashboard, unused = free_port(), free_port(), free_port()
    command = [
        *[str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"],
        *[f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={unused}"],
        *["--dashboard-agent-listen-port=0", "--temp-dir", str(folder / "s")],
        *["--num-cpus=1", "--object-store-memory=80000000"],
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    log = []
    for line in process.stdout:
        log.append(line)
        if "block forever" in line:
            break
    else:
        pytest.fail("the head node did not start:\n" + "".join(log))
    yield Head(address=f"http://127.0.0.1:{dashboard}", environment=environment)
    process.send_signal(signal.SIGTERM)  # it ends the processes that it started, and no others
    process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("recipe.yaml", "runs/old/metrics.jsonl", ".git/config", "data/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def client(head: Head, project: Path, command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, head.address, str(project), command],
        env=head.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_gets_the_folder_without_old_runs_and_its_exit_status_comes_back(
    head: Head, project: Path
) -> None:
    submitted = client(head, project, "find . -type f | sort; echo mode $RAY_AUTH_MODE; exit 3")
    output, errors = submitted.communicate(timeout=60)
    assert submitted.returncode == 3, errors
    # Ray's own lines may come at any place between those of the job.
    ours = [line for line in output.splitlines() if line.startswith(("./", "mode "))]
    assert ours == ["./data/train.jsonl", "./recipe.yaml", "mode token"]
    assert "metrics.jsonl" not in output
    assert ".git" not in output
    assert "failed. Job entrypoint command failed with exit code 3" in output


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(head: Head, project: Path) -> None:
    submitted = client(head, project, "echo begun; sleep 600")
    assert submitted.stdout is not None
    job = ""
    for line in submitted.stdout:
        job = line.split()[1] if line.startswith("job ") else job
        if line == "begun\n":
            break
    submitted.send_signal(signal.SIGINT)
    output, errors = submitted.communicate(timeout=30)
    assert submitted.returncode == 130, errors
    assert f"{job} goes on" in output
    stop = output.partition("to stop it: ")[2].strip()
    stopped = subprocess.run(
        stop, shell=True, env=head.environment, capture_output=True, text=True, timeout=60
    )
    assert f"'{job}' was stopped" in stopped.stdout, stopped.stdout + stopped.stderr


def test_a_wrong_token_is_refused_and_the_message_names_where_it_came_from(
    head: Head, project: Path
) -> None:
    submitted = client(head, project, "true", RAY_AUTH_TOKEN="f" * 64)
    output, errors = submitted.communicate(timeout=60)
    assert submitted.returncode == 1
    assert "refused the token from the variable RAY_AUTH_TOKEN" in errors
    assert "job " not in output
