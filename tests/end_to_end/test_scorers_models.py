"""Scorers that are models: read at the end of each span, refused where they do not fit, killed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from grpo.errors import UserError
from grpo.types import Group, Score, Span
from reward_services.asked_rollouts import asked_rollouts
from reward_services.config import ScorerConfig
from reward_services.judges import FunctionJudge
from reward_services.model_config import ProcessRewardConfig
from reward_services.process_reward import ProcessReward
from reward_services.service import ScorerService
from tests.unit.preference_models import answered
from tests.unit.small_project import MODEL

TEXTS = ["7+5=12\n12*3=36\nanswer: 36", "7+5=13\nanswer: 13", "7+5=12\n12*3=35\nanswer: 35"]
AXES = ["polite", "meaningful", "actionable", "safe"]


def saved(folder: Path, head: Any, *, labels: Sequence[str], **facts: Any) -> str:
    """The starter model's shape with this head and random weights."""
    config = AutoConfig.from_pretrained(MODEL)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: place for place, name in config.id2label.items()}
    config.update(facts)
    torch.manual_seed(0)
    return written(folder, head.from_config(config))


def written(folder: Path, model: Any) -> str:
    with torch.no_grad():
        for weight in model.parameters():  # so that outputs differ by more than rounding
            if weight.dim() > 1:
                weight.mul_(3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def a_process_reward(folder: Path, **facts: Any) -> str:
    return saved(folder, AutoModelForTokenClassification, labels=["bad", "good"], **facts)


def a_regression(folder: Path) -> str:
    head = AutoModelForSequenceClassification
    return saved(folder, head, labels=AXES, problem_type="regression")


def an_encoder(folder: Path, kind: Any = BertForSequenceClassification) -> str:
    torch.manual_seed(0)
    size = len(AutoTokenizer.from_pretrained(MODEL))
    config = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, id2label=dict(enumerate(AXES)), problem_type="regression",
    )  # fmt: skip
    return written(folder, kind(config))


def steps_of(group: Group) -> list[Span]:
    """Lines as spans; the last takes the end of sequence."""
    found = []
    for rollout in group.rollouts:
        line_ends = [i + 1 for i, c in enumerate(rollout.text) if c == "\n"]
        ends = [int((rollout.token_ends < end).sum()) + 1 for end in line_ends]
        bounds = [0, *ends, rollout.num_tokens]
        found += [
            Span(rollout=rollout.index, start=start, end=end) for start, end in pairwise(bounds)
        ]
    return found


def values(model: ProcessReward, group: Group, spans: Sequence[Span]) -> list[float | None]:
    items = [(group, span) for span in spans]
    verdicts = model.verdicts(asked_rollouts(items, scorer="prm"))
    assert [v.failure for v in verdicts] == [None] * len(spans)
    return [verdict.value for verdict in verdicts]


def process_reward(model: str, **settings: Any) -> ProcessReward:
    return ProcessReward(ProcessRewardConfig.model_validate({"model": model, **settings}))


def asked_of_service(config: ScorerConfig, *calls: tuple[Group, Sequence[Span]]) -> list[Any]:
    async def ask() -> list[list[Score]]:
        service = ScorerService(config)
        try:
            await service.start()
            return [await service.score(group, spans) for group, spans in calls]
        finally:
            await service.close()

    return asyncio.run(ask())


def test_a_step_is_read_at_the_last_token_of_its_separator(tmp_path: Path) -> None:
    """As TRL trains them: [start] question, then each step and its separator, tokenised alone."""
    folder = a_process_reward(tmp_path)
    group = answered("7 +5 *3", TEXTS[:1])
    found = values(process_reward(folder, label="good", separator="\n"), group, steps_of(group))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    ids, reads = start + encode("7 +5 *3"), []
    for step in TEXTS[0].split("\n"):
        ids += encode(step) + encode("\n")
        reads.append(len(ids) - 1)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].softmax(-1)
    assert found == pytest.approx(logits[reads, 1].tolist(), abs=1e-5)
    assert max(found) - min(found) > 1e-3


def test_all_steps_of_a_rollout_cost_one_pass_and_equal_rollouts_one_row(tmp_path: Path) -> None:
    model = process_reward(a_process_reward(tmp_path), label="good")
    group = answered("7 +5 *3", [*TEXTS, TEXTS[0]])
    rows: list[int] = []
    model._model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = values(model, group, steps_of(group))
    assert sum(rows) == 3, "the fourth rollout is the first one again"
    assert together[:3] == together[-3:]


def test_a_step_scores_the_same_whatever_else_is_asked_and_however_it_is_padded(
    tmp_path: Path,
) -> None:
    folder = a_process_reward(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    whole = values(process_reward(folder, label="good", separator="\n"), group, steps_of(group))
    narrow = process_reward(folder, label="good", separator="\n", max_tokens_per_pass=1)
    assert values(narrow, group, steps_of(group)) == pytest.approx(whole, abs=1e-5)
    config = ScorerConfig.model_validate(
        {
            "name": "prm",
            "process_reward": {"model": folder, "label": "good", "separator": "\n"},
        }
    )
    first, again = asked_of_service(
        config, (group, steps_of(group)[:3]), (group, steps_of(group)[::-1])
    )
    assert [s.value for s in first] == pytest.approx(whole[:3], abs=1e-5)
    assert [s.value for s in again[::-1]] == pytest.approx(whole, abs=1e-5)


def test_labels_of_a_regression_are_the_outputs_as_they_are(tmp_path: Path) -> None:
    folder = a_regression(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    spans = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for place, name in enumerate(AXES):
        by_name = values(process_reward(folder, head="reward", label=name), group, spans)
        for text, value in zip(TEXTS, by_name, strict=True):
            parts = [tokenizer.encode(part, add_special_tokens=False) for part in ("7 +5 *3", text)]
            with torch.no_grad():
                output = model(torch.tensor([[*start, *parts[0], *parts[1]]])).logits[0]
            assert value == pytest.approx(float(output[place]), abs=1e-4)


def test_a_weighted_sum_of_labels_takes_one_pass(tmp_path: Path) -> None:
    folder = an_encoder(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    spans = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
    weights = dict(zip(AXES, (0.1, 0.2, 0.2, 0.5), strict=True))
    together = process_reward(folder, head="reward", label_weights=weights)
    passes: list[int] = []
    together._model.register_forward_hook(lambda *_: passes.append(1))
    expected = [0.0] * len(spans)
    for name, weight in weights.items():
        by_name = values(process_reward(folder, head="reward", label=name), group, spans)
        parts = zip(expected, by_name, strict=True)
        expected = [total + weight * value for total, value in parts if value is not None]
    assert values(together, group, spans) == pytest.approx(expected, abs=1e-5)
    assert len(passes) == 1


def test_an_encoder_reads_each_answer_up_to_the_end_of_its_span(tmp_path: Path) -> None:
    model = process_reward(an_encoder(tmp_path), head="reward", label="safe")
    group = answered("7 +5 *3", TEXTS)
    prefix = Span(rollout=0, start=0, end=4)
    whole = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
    found = values(model, group, [prefix, *whole])
    assert values(model, group, [prefix]) == pytest.approx(found[:1], abs=1e-5)
    assert len({round(value, 5) for value in found if value is not None}) == 4


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (a_process_reward, {}, r"labels are 0: bad, 1: good: set label"),
        (a_process_reward, {"label": "right"}, r"label is 'right'"),
        (a_process_reward, {"head": "reward"}, r"holds .*ForTokenClassification.*expected"),
        (lambda folder: str(MODEL), {}, r"holds .*ForCausalLM"),
        (lambda folder: str(folder / "absent"), {}, r"absent.* does not fit: transformers cannot"),
        (
            lambda folder: an_encoder(folder, BertForTokenClassification),
            {"label": 0},
            r"sees later tokens",
        ),
    ],
)
def test_what_is_no_such_model_is_refused_with_what_was_found(
    tmp_path: Path, make: Any, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        process_reward(make(tmp_path), **settings)


def test_a_head_whose_weights_are_missing_is_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = a_process_reward(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("score")}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights lack score"):
        process_reward(folder, label="good")


def test_an_answer_that_is_too_long_fails_alone_and_never_gets_a_number(tmp_path: Path) -> None:
    model = process_reward(a_process_reward(tmp_path), label="good")
    model._max_tokens = 20
    group = answered("7 +5 *3", ["answer: 2", "7+5=12\n" * 8])
    spans = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
    short, long = model.verdicts(asked_rollouts([(group, s) for s in spans], scorer="prm"))
    assert short.failure is None and short.value is not None
    assert long.value is None and "reads 20 at most" in str(long.failure)


def test_a_score_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    model = process_reward(a_process_reward(tmp_path), label="good")
    with torch.no_grad():
        model._model.score.bias.fill_(float("nan"))
    group = answered("7 +5", ["answer: 2"])
    (verdict,) = model.verdicts(asked_rollouts([(group, steps_of(group)[0])], scorer="prm"))
    assert verdict.value is None and "expected a finite number" in str(verdict.failure)


def test_a_model_whose_process_is_killed_is_loaded_again_and_answers_the_same(
    tmp_path: Path,
) -> None:
    folder = a_process_reward(tmp_path)
    group = answered("7 +5 *3", TEXTS)
    config = ScorerConfig.model_validate(
        {
            "name": "prm",
            "process_reward": {"model": folder, "label": "good"},
            "cache_size": 0,
        }
    )

    async def ask_twice() -> list[list[Score]]:
        service = ScorerService(config)
        try:
            await service.start()
            before = await service.score(group, steps_of(group))
            judge = service._judge
            assert isinstance(judge, FunctionJudge) and judge._process._process is not None
            judge._process._process.kill()
            return [before, await service.score(group, steps_of(group))]
        finally:
            await service.close()

    before, after = asyncio.run(ask_twice())
    assert [s.value for s in after] == [s.value for s in before]
    assert [s.failure for s in after] == [None] * len(after)
