"""What `covey submit` refuses and prepares before it talks to a cluster."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.config import load_recipe
from orchestration.submit import connect, local_files, submit, train_command
from orchestration.upload import MAX_UPLOAD_BYTES, job_files, write_archive

RECIPE = """
name: demo
model: some/hub-id
steps: 2
output: {output}
data: {{train: {data}}}
algorithm: {{name: grpo}}
scorers: [{{name: answer, rule: numeric}}]
"""


def written(folder: Path, *, data: str = "train.jsonl", output: str = "/shared/runs") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, output=output))
    return path


def refusal(recipe: Path, working_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        submit(
            recipe,
            [],
            address="http://127.0.0.1:9",
            follow=False,
            write=lambda text: None,
            working_dir=working_dir,
        )
    return str(caught.value)


def test_the_job_runs_the_recipe_by_its_place_in_the_uploaded_folder(tmp_path: Path) -> None:
    recipe = written(tmp_path / "my recipes")
    command = train_command(recipe, ["steps=4", "name=a b"], tmp_path)
    assert command == (
        "python -m orchestration.cli train 'my recipes/recipe.yaml' --set steps=4 --set 'name=a b'"
    )


def test_a_recipe_that_is_not_uploaded_is_refused(tmp_path: Path) -> None:
    recipe = written(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    assert "outside" in refusal(recipe, tmp_path / "here")


def test_runs_that_would_vanish_with_the_job_are_refused(tmp_path: Path) -> None:
    recipe = written(tmp_path, output="runs")
    assert "--set output=/shared/runs" in refusal(recipe, tmp_path)


def test_the_files_that_a_recipe_names_are_found(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path))
    assert local_files(recipe) == [tmp_path / "train.jsonl"]  # the model is a hub id


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("recipe.yaml", "a/reward.py", "data/train.jsonl", "runs/x/metrics.jsonl", ".env"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(folder: Path, *, needs: str) -> list[str]:
    files = job_files(folder, named=[folder / needs], without=[folder / "runs"])
    return [path.relative_to(folder).as_posix() for path in files]


def test_what_git_ignores_stays_behind_unless_the_recipe_names_it(project: Path) -> None:
    (project / ".gitignore").write_text("/data/\n.env\n")
    (project / "data" / "other.jsonl").write_text("not named")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    found = names(project, needs="data/train.jsonl")
    assert found == [".gitignore", "a/reward.py", "data/train.jsonl", "recipe.yaml"]


def test_without_git_everything_but_runs_and_environments_is_uploaded(project: Path) -> None:
    (project / ".venv" / "lib").mkdir(parents=True)
    (project / ".venv" / "lib" / "x.py").write_text("")
    expected = [".env", "a/reward.py", "data/train.jsonl", "recipe.yaml"]
    assert names(project, needs="recipe.yaml") == expected


def test_an_unchanged_folder_gives_the_same_archive(project: Path, tmp_path: Path) -> None:
    archives = [tmp_path / "1.zip", tmp_path / "2.zip"]
    for archive in archives:
        (project / "recipe.yaml").touch()
        write_archive(archive, project, [project / "a" / "reward.py", project / "recipe.yaml"])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as found:
        assert found.read("a/reward.py") == b"a/reward.py"


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(
    project: Path, tmp_path: Path
) -> None:
    big = project / "weights.bin"
    with big.open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)  # sparse: takes no space
    with pytest.raises(UserError, match=r"500 MiB  weights.bin"):
        write_archive(tmp_path / "job.zip", project, [big])


def test_a_missing_token_is_explained_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"\.ray/auth_token.*ray get-auth-token"):
        connect("http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "typo"))
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH names .*typo"):
        connect("http://127.0.0.1:9")
