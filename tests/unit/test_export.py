"""`covey export`: a model that transformers loads, and one clear answer to every mistake."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestration import cli
from orchestration.local import LocalLearner
from orchestration.run_directory import RunDirectory
from tests.unit.checkpoint_cases import FILE, a_report, save
from tests.unit.learner_cases import batch_of, random_rows, rank_of, torch_config, write_model

CONFIG = {
    "model": "a/model",
    "algorithm": {"name": "grpo", "num_generations": 4},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4 of one file each, the older one the best."""
    directory = RunDirectory.create(
        tmp_path / "runs", "demo", now=datetime(2026, 3, 4), config=CONFIG, versions={}
    )
    for step in range(1, 5):
        directory.append_metrics(step, {"reward": step / 10, "timing_s/step": 2.0})
    directory.append_metrics(2, {"eval/pass@1": 0.5})
    directory.close()
    found = {2: a_report(0.5), 4: a_report(0.25)}
    save(directory.path, 2, 4, keep=1, keep_best=1, evaluations=found)
    return directory.path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_exported_model_has_the_logits_of_the_learner(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tied=False)
    learner = rank_of(model, torch_config())
    rows = random_rows(4)
    learner.train(batch_of(rows))
    directory = RunDirectory.create(
        tmp_path, "real", now=datetime(2026, 3, 4), config=CONFIG, versions={}
    )
    directory.close()
    save(directory.path, 1, learner=LocalLearner(learner, asyncio.Lock()))
    target = tmp_path / "new" / "exported"
    assert cli.main(["export", str(directory.path), "1", str(target)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(target)
    tokens = torch.tensor([[*rows[0].context.tolist(), *rows[0].tokens.tolist()]])
    with torch.no_grad():
        found = exported(tokens).logits
        hidden = learner._trainee.backend._policy.model.get_decoder()(tokens).last_hidden_state  # type: ignore[attr-defined]  # the weights that train
        with learner._trainee.backend.output_layer() as head:
            expected = torch.nn.functional.linear(hidden, head.weight, head.bias)  # type: ignore[attr-defined]  # a LogProbHead
    assert torch.equal(found, expected)
    assert not torch.equal(found, AutoModelForCausalLM.from_pretrained(model)(tokens).logits)
    assert AutoTokenizer.from_pretrained(target)("ha")["input_ids"] == [9, 2]


def test_the_exported_adapter_makes_the_base_the_exported_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", tied=True)
    learner = rank_of(model, torch_config(lora={"rank": 3, "alpha": 5}))
    rows = random_rows(4)
    learner.train(batch_of(rows))
    directory = RunDirectory.create(
        tmp_path, "real", now=datetime(2026, 3, 4), config=CONFIG, versions={}
    )
    directory.close()
    save(directory.path, 1, learner=LocalLearner(learner, asyncio.Lock()))
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    assert cli.main(["export", str(directory.path), "1", str(whole)]) == 0
    for more in ((), ("--force",)):
        wanted = ["export", str(directory.path), "1", str(adapter), "--adapter", *more]
        assert cli.main(wanted) == 0
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "covey_origin.json"
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.tensor([[*rows[0].context.tolist(), *rows[0].tokens.tolist()]])
    with torch.no_grad():
        before = base(tokens).logits
        found = peft.PeftModel.from_pretrained(base, adapter)(tokens).logits
        expected = AutoModelForCausalLM.from_pretrained(whole)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (found - before).abs().max() > 1e-2
    (directory.path / "checkpoints/step_1/adapter/adapter_model.safetensors").write_bytes(b"w")
    message = refusal(capsys, directory.path, "1", adapter, "--adapter", "--force")
    assert "damaged: adapter/adapter_model.safetensors" in message


def test_a_run_without_lora_has_no_adapter_to_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, run, "latest", tmp_path / "out", "--adapter")
    assert "step_4 holds no adapter: the run trained without learner.lora" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_step_is_named_by_number_or_by_marker(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("2", 2), ("best", 2), ("latest", 4)):
        assert cli.main(["export", str(run), name, str(tmp_path / name), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["step"] == step
        assert (tmp_path / name / "model.safetensors").read_bytes() == b"w" * 1000


def test_the_origin_says_run_step_algorithm_and_what_was_measured_there(
    run: Path, tmp_path: Path
) -> None:
    assert cli.main(["export", str(run), "best", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "covey_origin.json").read_text()) == {
        "run": run.name,
        "step": 2,
        "model": "a/model",
        "algorithm": {"name": "grpo", "num_generations": 4},
        "metrics": {"reward": 0.2, "eval/pass@1": 0.5},
    }


def test_a_step_that_is_not_there_is_answered_with_those_that_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, run, "3", tmp_path / "out")
    assert "no complete checkpoint of step 3" in message
    assert "2 (best), 4 (latest)" in message
    assert "expected a number, latest or best" in refusal(capsys, run, "newest", tmp_path / "out")
    assert "there is no such run" in refusal(capsys, "nowhere", "1", tmp_path / "out")
    (run / "checkpoints" / "best").unlink()
    assert "has no best checkpoint" in refusal(capsys, run, "best", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_not_copied(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "step_4" / "huggingface" / "model.safetensors"
    file.write_bytes(b"v" + b"w" * 999)
    message = refusal(capsys, run, "4", tmp_path / "out")
    assert "damaged: the contents of huggingface/model.safetensors have changed" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_is_replaced_only_if_asked_and_only_if_it_is_a_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    assert cli.main(["export", str(run), "2", str(target)]) == 0  # empty
    (target / "config.json").write_text("{}")
    (target / "stale.safetensors").write_bytes(b"")
    assert "is not empty" in refusal(capsys, run, "2", target)
    assert cli.main(["export", str(run), "2", str(target), "--force"]) == 0
    assert not (target / "stale.safetensors").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    assert "holds no model" in refusal(capsys, run, "2", tmp_path / "home", "--force")
    assert (tmp_path / "home" / "letter").exists()


def test_an_older_model_than_the_latest_is_not_given_in_silence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step_4" / FILE).write_bytes(b"w" * 100)
    assert cli.main(["export", str(run), "latest", str(tmp_path / "out"), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["step"] == 2
    assert found.err.count("\n") == 1
    assert f"step_4 cannot be used: {FILE} has 100 bytes instead of 1000" in found.err
    assert "step_2 is used instead" in found.err


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_metrics_that_are_lost_cost_the_origin_its_metrics_and_nothing_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    metrics = run / "metrics.jsonl"
    if damage == "gone":
        metrics.unlink()
    else:
        metrics.write_bytes(metrics.read_bytes().replace(b'{"step":2,"reward"', b'{"step":2,\xff'))
    assert cli.main(["export", str(run), "2", str(tmp_path / "out"), "--json"]) == 0
    found = capsys.readouterr()
    expected = {} if damage == "gone" else {"eval/pass@1": 0.5}
    assert json.loads(found.out)["metrics"] == expected
    assert "metrics.jsonl" in found.err


@pytest.mark.parametrize("name", ["\u00b2", "\u0664", "-4", "04", ""])
def test_only_the_number_of_a_step_is_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = (run, "--", name, tmp_path / "out") if name == "-4" else (run, name, tmp_path / "o")
    assert "expected a number, latest or best" in refusal(capsys, *arguments)


def test_a_damaged_best_marker_is_not_taken_for_a_run_without_best(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "best").write_bytes(b"\xf3tep_2\n")
    message = refusal(capsys, run, "best", tmp_path / "out")
    assert "best is damaged: it names no checkpoint. Steps in" in message


@pytest.mark.parametrize("place", ["", "new", "step_2/huggingface", "step_4/new/deeper"])
def test_nothing_is_exported_into_the_checkpoints_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (run / "checkpoints/step_2/huggingface/config.json").write_text("{}")
    before = sorted((run / "checkpoints").rglob("*"))
    (tmp_path / "link").symlink_to(run / "checkpoints")
    for target in (run / "checkpoints" / place, tmp_path / "link" / place):
        assert "is among the checkpoints of" in refusal(capsys, run, "4", target, "--force")
    assert sorted((run / "checkpoints").rglob("*")) == before
