"""Prefix utilities: one forward pass for all prefixes, the right encoder, failures with reasons."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from grpo.errors import UserError
from grpo.types import Score, Span
from reward_services.asked_rollouts import asked_rollouts
from reward_services.config import ScorerConfig
from reward_services.judges import FunctionJudge
from reward_services.preference.encoder import MAX_TOKENS_PER_LOGITS, MAX_TOKENS_PER_PASS
from reward_services.preference.head import WEIGHTS_FILE
from reward_services.preference.model import PreferenceModel, loaded_model, require_tokenizer
from reward_services.preference.prefixes import PrefixRow
from reward_services.service import ScorerService
from tests.unit.preference_models import an_encoder, answered, written_model
from tests.unit.small_project import MODEL

TEXTS = ["7+5=12\n12*3=36\nanswer: 36", "7+5=13\nanswer: 13", "answer: 2"]


def a_row(context: list[int], tokens: list[int], *ends: int) -> PrefixRow:
    return PrefixRow(
        context=np.array(context, np.int32), tokens=np.array(tokens, np.int32), ends=ends
    )


def random_rows(num_rows: int) -> list[PrefixRow]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        context, tokens = (rng.integers(4, 40, rng.integers(1, 30)).tolist() for _ in range(2))
        rows.append(a_row(context, tokens, *range(len(tokens) + 1)))
    return rows


def test_prefixes_from_one_pass_equal_prefixes_encoded_alone() -> None:
    encoder = an_encoder()
    for row in random_rows(4):
        together = encoder.features([row])[0]
        alone = [
            encoder.features([a_row(row.context.tolist(), row.tokens[:end].tolist(), end)])[0][0]
            for end in row.ends
        ]
        torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=2e-5)


def test_padding_and_the_size_of_a_pass_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rows = an_encoder(), random_rows(9)
    alone = [encoder.features([row])[0] for row in rows]
    for budget in (MAX_TOKENS_PER_PASS, 64, 1):
        monkeypatch.setattr("reward_services.preference.encoder.MAX_TOKENS_PER_PASS", budget)
        for one, other in zip(encoder.features(rows), alone, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_features_are_the_means_of_prompt_and_prefix_and_the_largest_surprise() -> None:
    encoder, row = an_encoder(), a_row([5, 6, 7], [8, 9, 10], 0, 2, 3)
    model = encoder._model
    with torch.no_grad():
        output = model(torch.tensor([[5, 6, 7, 8, 9, 10]]), output_hidden_states=True)
    states, log_p = output.hidden_states[-1][0], output.logits[0].log_softmax(-1)
    surprise = torch.stack([-log_p[2 + i, token] for i, token in enumerate((8, 9, 10))])
    found = encoder.features([row])[0]
    size = states.shape[1]
    for line, end in zip(found, (0, 2, 3), strict=True):
        torch.testing.assert_close(line[:size], states[:3].mean(0))
        mean = states[3 : 3 + end].mean(0) if end else torch.zeros(size)
        torch.testing.assert_close(line[size : 2 * size], mean)
        expected = surprise[:end].max() if end else torch.tensor(0.0)
        torch.testing.assert_close(line[-1], expected)
    without = an_encoder(largest_surprise=False).features([row])[0]
    torch.testing.assert_close(without, found[:, :-1])


def test_surprise_is_the_same_when_the_vocabulary_comes_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, rows = an_encoder(), random_rows(3)
    whole = encoder.features(rows)
    monkeypatch.setattr("reward_services.preference.encoder.MAX_TOKENS_PER_LOGITS", 4)
    assert MAX_TOKENS_PER_LOGITS > 4
    for one, other in zip(encoder.features(rows), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_each_distinct_rollout_is_read_once_however_many_prefixes_are_asked_for() -> None:
    group = answered("7 +5 *3", [*TEXTS, TEXTS[0]])
    items = [
        (group, Span(rollout=r.index, start=0, end=end))
        for r in group.rollouts
        for end in range(r.num_tokens + 1)
    ]
    asked = asked_rollouts(items[::-1], scorer="p")
    assert sorted(len(rollout.tokens) for rollout in asked.rollouts) == sorted(
        group.rollouts[i].num_tokens for i in range(3)
    )
    encoder, rows_read = an_encoder(), []
    encoder._model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows_read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    head = torch.nn.Linear(encoder.num_features, 1)
    PreferenceModel(encoder, lambda x: head(x)[:, 0]).verdicts(asked)  # type: ignore[arg-type]
    assert sum(rows_read) == 3
    for (number, place), (_, span) in zip(asked.places, items[::-1], strict=True):
        rollout = asked.rollouts[number]
        expected = group.rollouts[span.rollout].tokens[: span.end]
        assert rollout.tokens[: rollout.spans[place][1]].tolist() == expected.tolist()


def test_equal_answers_to_different_prompts_are_kept_apart() -> None:
    groups = [answered(prompt, ["answer: 2"]) for prompt in ("7 +5", "7 -5")]
    span = Span(rollout=0, start=0, end=3)
    assert len(asked_rollouts([(group, span) for group in groups], scorer="p").rollouts) == 2


def test_a_scorer_gives_the_utility_of_every_prefix_the_empty_one_included(
    tmp_path: Path,
) -> None:
    written_model(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    spans = [
        Span(rollout=r.index, start=0, end=end) for r in group.rollouts for end in (0, r.num_tokens)
    ]
    scores = scored(tmp_path, group, [*spans, Span(rollout=0, start=2, end=4)])
    model = loaded_model(tmp_path, encoder=None)
    for rollout, (empty, whole) in zip(
        group.rollouts, zip(scores[:-1:2], scores[1:-1:2], strict=True), strict=True
    ):
        row = a_row(rollout.context.tolist(), rollout.tokens.tolist(), 0, rollout.num_tokens)
        assert [empty.value, whole.value] == pytest.approx(model.utilities([row])[0].tolist())
    empty_values = {score.value for score in scores[:-1:2]}
    assert len(empty_values) == 1, "nothing but the prompt is the same for all answers"
    assert scores[-1].value is None and "prefixes [0, t) only" in str(scores[-1].failure)


def scored(folder: Path, group, spans) -> list[Score]:  # type: ignore[no-untyped-def]
    config = ScorerConfig.model_validate({"name": "p", "preference": {"folder": str(folder)}})

    async def ask() -> list[Score]:
        service = ScorerService(config)
        try:
            await service.start()
            return await service.score(group, spans)
        finally:
            await service.close()

    return asyncio.run(ask())


def test_a_utility_that_is_no_number_is_a_failure_and_never_a_zero(tmp_path: Path) -> None:
    written_model(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    weights["outer.bias"].fill_(float("nan"))
    safetensors.torch.save_file(weights, tmp_path / WEIGHTS_FILE)
    items = [(answered("7 +5", ["answer: 2"]), Span(rollout=0, start=0, end=2))]
    asked = asked_rollouts(items, scorer="p")
    (verdict,) = loaded_model(tmp_path, encoder=None).verdicts(asked)
    assert verdict.value is None and "expected a finite number" in str(verdict.failure)


def test_another_encoder_or_vocabulary_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "preference"
    shutil.copytree(MODEL, model)
    written_model(folder, model=model)
    loaded_model(folder, encoder=str(MODEL))  # the same weights elsewhere are the same encoder
    require_tokenizer(folder, str(MODEL))
    weights = safetensors.torch.load_file(model / "model.safetensors")
    name = next(iter(weights))
    weights[name][0] += 1e-3
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other weights .*covey preference train"):
        loaded_model(folder, encoder=None)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"check: "', '"cheque: "'))
    with pytest.raises(UserError, match="another vocabulary"):
        require_tokenizer(folder, str(model))


def test_a_folder_without_a_model_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no preference model.*covey preference train"):
        scored(tmp_path, answered("7 +5", ["answer: 2"]), [])


def test_a_scorer_whose_process_is_killed_loads_the_model_again_and_answers(
    tmp_path: Path,
) -> None:
    written_model(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    spans = [Span(rollout=0, start=0, end=end) for end in (0, 4)]
    config = ScorerConfig.model_validate(
        {"name": "p", "preference": {"folder": str(tmp_path)}, "cache_size": 0}
    )

    async def ask_twice() -> list[list[Score]]:
        service = ScorerService(config)
        try:
            await service.start()
            before = await service.score(group, spans)
            judge = service._judge
            assert isinstance(judge, FunctionJudge) and judge._process._process is not None
            judge._process._process.kill()
            return [before, await service.score(group, spans)]
        finally:
            await service.close()

    before, after = asyncio.run(ask_twice())
    assert [s.failure for s in after] == [None, None]
    assert [s.value for s in after] == [s.value for s in before]
