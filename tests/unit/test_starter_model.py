"""The shipped base model, and the command that rebuilds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from orchestration.starter.build import build_starter, shipped_model_dir
from orchestration.starter.data import distinct_problems
from orchestration.starter.measurement import MAX_COMPLETION_LENGTH, measured, rolled_out
from orchestration.starter.tokenizer import built_tokenizer
from orchestration.starter.training import TrainingProgress, new_model, train
from orchestration.starter.world import DIFFICULTIES, generated


@pytest.fixture(scope="module")
def shipped() -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(shipped_model_dir(), dtype=torch.float32)


def test_the_shipped_folder_is_small_and_holds_a_model_card() -> None:
    files = list(shipped_model_dir().iterdir())
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }


def test_the_shipped_model_and_tokenizer_agree_on_how_a_completion_ends(
    shipped: Qwen2ForCausalLM,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_dir())
    assert tokenizer.get_vocab() == built_tokenizer().get_vocab()
    assert tokenizer.chat_template == built_tokenizer().chat_template
    assert shipped.config.eos_token_id == tokenizer.eos_token_id
    assert shipped.generation_config.eos_token_id == tokenizer.eos_token_id
    assert shipped.config.tie_word_embeddings
    assert shipped.config.vocab_size >= len(tokenizer)


def test_the_shipped_model_solves_easy_problems_by_halves_and_hard_ones_hardly_ever(
    shipped: Qwen2ForCausalLM,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_dir())
    problems = distinct_problems(100, seed=0, split="heldout")
    completions = rolled_out(shipped, tokenizer, problems, num_completions=4, seed=0)
    by_difficulty = {m.difficulty: m for m in measured(completions)}
    easiest, hardest = by_difficulty[DIFFICULTIES[0]], by_difficulty[DIFFICULTIES[-1]]
    assert 0.3 < easiest.pass_at_1 < 0.6
    assert hardest.pass_at_1 < 0.1
    assert hardest.share_truncated > 0.15


def test_the_shipped_model_finds_the_right_result_of_a_step_likeliest(
    shipped: Qwen2ForCausalLM,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_dir())
    right: list[bool] = []
    for problem in distinct_problems(100, seed=0, split="heldout"):
        prompt = f"<|user|>{problem.prompt}<|end|><|assistant|>"
        text = prompt + problem.solution
        encoded = tokenizer(text, return_offsets_mapping=True)
        with torch.no_grad():
            likeliest = shipped(torch.tensor([encoded["input_ids"]])).logits[0].argmax(-1).tolist()
        positions = {start: i for i, (start, _) in enumerate(encoded["offset_mapping"])}
        for match in re.finditer(r"=(\d+)", problem.solution):
            first, end = (positions[len(prompt) + at] for at in (match.start(1), match.end(1)))
            right.append(likeliest[first - 1 : end - 1] == encoded["input_ids"][first:end])
    assert sum(right) / len(right) > 0.95


def test_every_right_trace_fits_the_completion_length() -> None:
    tokenizer = built_tokenizer()
    for difficulty in DIFFICULTIES:
        for index in range(100):
            ids = tokenizer(generated(0, index, difficulty).solution)["input_ids"]
            assert len(ids) + 1 <= MAX_COMPLETION_LENGTH


def test_training_is_the_same_for_the_same_seed_and_tells_its_progress() -> None:
    def trained(seed: int) -> tuple[torch.Tensor, list[TrainingProgress]]:
        tokenizer = built_tokenizer()
        model, told = new_model(tokenizer, seed=seed), list[TrainingProgress]()
        train(model, tokenizer, seed=seed, num_steps=2, on_progress=told.append)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), told

    first, told = trained(0)
    assert torch.equal(first, trained(0)[0])
    assert not torch.equal(first, trained(1)[0])
    assert [(p.step, p.num_steps) for p in told] == [(1, 2), (2, 2)]


def test_a_build_replaces_its_folder_with_a_model_that_loads(tmp_path: Path) -> None:
    out_dir = tmp_path / "model"
    out_dir.mkdir()
    (out_dir / "stale.txt").write_text("from an earlier build")
    report = build_starter(out_dir, num_steps=1)
    assert not (out_dir / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(out_dir)
    assert model.num_parameters() == report.num_parameters
    assert [m.difficulty for m in report.measurements] == list(DIFFICULTIES)
    card = (out_dir / "README.md").read_text()
    assert f"--seed {report.seed} --steps 1" in card


def test_a_build_of_no_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        build_starter(tmp_path / "model", num_steps=0)
