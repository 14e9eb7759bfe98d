"""The command line: exit status, one message without traceback, nothing written by a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import COMMANDS, main
from tests.unit.small_project import MODEL, REPOSITORY, written_project

HEAVY = ("torch", "ray", "pydantic", "numpy", "yaml", "vllm", "deepspeed", "transformers", "rich")


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, orchestration.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, orchestration.cli as cli\n"
        "for name in cli.COMMANDS:\n"
        "    with contextlib.suppress(SystemExit): cli.main([name, '--help'])\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"usage: covey {name}" in done.stdout for name in COMMANDS)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2


def test_a_wrong_name_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "quickstart"]) == 2
    assert "unknown command 'trian'; did you mean train?" in capsys.readouterr().err
    assert main(["describe", "dappo"]) == 2
    assert "unknown algorithm 'dappo'; did you mean dapo?" in capsys.readouterr().err


def test_algorithms_are_listed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    assert "dr_grpo" in capsys.readouterr().out
    assert main(["algorithms", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["name"]: r["settings"] for r in records}["dapo"]["epsilon"] == 0.2


def test_describe_shows_the_functions_with_their_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["describe", "dapo", "--set", "epsilon=0.1"]) == 0
    assert "clipped(low=0.1, high=0.28)" in capsys.readouterr().out
    assert main(["describe", str(written_project(tmp_path)), "--set", "algorithm.beta=0.5"]) == 0
    assert "0.5 * k3" in capsys.readouterr().out
    assert main(["describe", "dapo", "--set", "epsilom=0.1"]) == 2
    assert "did you mean algorithm.epsilon?" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "covey recipe"


def test_starter_data_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert main(["starter", "data", "--out", str(out), "--train", "5", "--heldout", "3"]) == 0
    assert len((out / "train.jsonl").read_text().splitlines()) == 5
    assert "heldout.jsonl  3 problems" in capsys.readouterr().out


def test_check_of_a_good_recipe_says_ok_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check", str(written_project(tmp_path)), "--local"]) == 0
    shown = capsys.readouterr()
    assert "problem" not in shown.out
    for name in ("versions", "machine", "model", "tokenizer", "data.train", "scorer answer"):
        assert f"ok       {name}" in shown.out


def test_dry_run_shows_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written_project(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    overrides = ["--num.of.nothing=1", "--sampling.max_completion_length", "16"]
    assert main(["train", str(recipe), "--dry-run", "--local", *overrides[1:]]) == 0
    assert "8 prompts x 4 = 32 a step" in capsys.readouterr().out
    assert main(["train", str(recipe), "--dry-run", "--local", overrides[0]]) == 2
    assert sorted(tmp_path.rglob("*")) == before


Spoil = Callable[[Path], dict[str, Any]]


def _appended(line: str) -> Spoil:
    def spoil(folder: Path) -> dict[str, Any]:
        with (folder / "train.jsonl").open("a") as file:
            file.write(line + "\n")
        return {}

    return spoil


def _model_without(name: str) -> Spoil:
    def spoil(folder: Path) -> dict[str, Any]:
        shutil.copytree(MODEL, folder / "model")
        for file in (folder / "model").glob(name):
            file.unlink()
        return {"model": "model"}

    return spoil


def _model_with(name: str, content: str) -> Spoil:
    def spoil(folder: Path) -> dict[str, Any]:
        shutil.copytree(MODEL, folder / "model")
        (folder / "model" / name).write_text(content)
        return {"model": "model"}

    return spoil


def _function(source: str, name: str = "reward", deadline_s: float = 60) -> Spoil:
    def spoil(folder: Path) -> dict[str, Any]:
        (folder / "rewards.py").write_text(source)
        function = f"rewards.py:{name}"
        return {"scorers": [{"name": "mine", "function": function, "deadline_s": deadline_s}]}

    return spoil


MISTAKES: dict[str, tuple[Spoil, list[str]]] = {
    "unknown setting": (lambda _: {"stps": 1}, ["stps: unknown setting", "did you mean steps?"]),
    "broken JSON line": (_appended('{"prompt": "1 +1"'), ["train.jsonl line 3", "no valid JSON"]),
    "missing column": (_appended('{"promt": "1 +1"}'), ["line 3: no column 'prompt'"]),
    "long prompt": (
        _appended('{"prompt": "1 +1 +1 +1 +1 +1 +1", "answer": 7}'),
        ["train.jsonl line 3: the prompt has 22 tokens", "max_prompt_length is 16"],
    ),
    "no answer for a rule": (
        _appended('{"prompt": "1 +1"}'),
        ["train.jsonl:3: no answer", "expected a column 'answer'"],
    ),
    "answer that is no number": (
        _appended('{"prompt": "1 +1", "answer": "two"}'),
        ["train.jsonl:3: reference answer 'two' holds no number; use rule: exact"],
    ),
    "no tokenizer": (_model_without("tok*"), ["holds no tokenizer", "expected tokenizer.json"]),
    "no config": (_model_without("config.json"), ["holds no config.json", "save_pretrained"]),
    "config that is a list": (_model_with("config.json", "[]"), ["describes no model"]),
    "no weights": (_model_without("*.safetensors"), ["holds no safetensors weights"]),
    "damaged weights": (
        _model_with("model.safetensors", "nonsense"),
        ["no readable safetensors file", "download it again"],
    ),
    "lost shard": (
        _model_with("model.safetensors.index.json", '{"weight_map": {"a": "part-2.safetensors"}}'),
        ["lacks part-2.safetensors, which its index names"],
    ),
    "too few positions": (
        lambda _: {"sampling": {"max_prompt_length": 16, "max_completion_length": 4096}},
        ["is 4112, but the model has 512 positions", "lower one of the two"],
    ),
    "function that is not there": (_function("def f(): ...", "rewrad"), ["no function 'rewrad'"]),
    "function with a syntax error": (_function("def f("), ["could not be loaded: SyntaxError"]),
    "function that wants another column": (
        _function("def reward(completions, level): return [0.0] * len(completions)"),
        ["missing 1 required positional argument: 'level'"],
    ),
    "NaN reward": (
        _function("def reward(completions, **kw): return [float('nan')] * len(completions)"),
        ["returned nan; expected a finite number"],
    ),
    "reward that raises": (
        _function("def reward(completions, **kw): raise KeyError('level')"),
        ["KeyError: 'level' (rewards.py:1)"],
    ),
    "hung reward": (
        _function("import threading\ndef reward(**kw): threading.Event().wait()", deadline_s=1),
        ["gave no answer within 1 s"],
    ),
    "module that is not installed": (
        lambda _: {"scorers": [{"name": "a", "function": "absent_module:f"}]},
        ["reward module 'absent_module': not found"],
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_mistake_ends_with_status_2_and_its_remedy(
    command: str,
    spoil: Spoil,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written_project(tmp_path)
    recipe = written_project_again(tmp_path, spoil(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert main([command, str(recipe), "--local"]) == 2
    shown = capsys.readouterr()
    text = shown.out + shown.err
    for part in expected:
        assert part in text
    assert "Traceback" not in text
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)) == before


def written_project_again(folder: Path, changed: dict[str, Any]) -> Path:
    """The recipe with changes, beside data that may have been spoilt already."""
    data = (folder / "train.jsonl").read_text()
    recipe = written_project(folder, **changed)
    (folder / "train.jsonl").write_text(data)
    return recipe


def test_all_problems_of_a_recipe_are_found_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written_project(tmp_path)
    changed = _model_without("tok*")(tmp_path) | _function("import absent")(tmp_path)
    _appended("not json")(tmp_path)
    assert main(["check", str(written_project_again(tmp_path, changed)), "--local"]) == 2
    shown = capsys.readouterr()
    for name in ("tokenizer", "data.train", "scorer mine"):
        assert f"problem  {name}" in shown.out
    assert "covey: 3 problems" in shown.err
