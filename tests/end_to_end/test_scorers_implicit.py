"""The implicit process reward: 0 before it has learned, then right answers above wrong ones."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.errors import Fatal, UserError
from grpo.types import Group, Score, Span
from reward_services.asked_rollouts import asked_rollouts, judged_rollouts
from reward_services.config import ScorerConfig
from reward_services.implicit_reward import ImplicitReward, outcome_losses
from reward_services.judges import LearningJudge
from reward_services.model_config import ImplicitRewardConfig
from reward_services.service import ScorerService
from tests.unit.preference_models import answered
from tests.unit.small_project import MODEL

RIGHT, WRONG = "7+5=12\n12*3=36\nanswer: 36", "7+5=13\n13*3=39\nanswer: 39"


def a_judged_group(outcomes: Sequence[float | None] = (1.0, 0.0)) -> Group:
    group = answered("7 +5 *3", [RIGHT, WRONG])
    scores = tuple(
        Score(scorer="answer", span=span, value=value)
        for span, value in zip(whole(group), outcomes, strict=True)
    )
    return Group(id=0, prompt=group.prompt, rollouts=group.rollouts, scores=scores)


def whole(group: Group) -> list[Span]:
    return [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]


def an_implicit_reward(**settings: Any) -> ImplicitReward:
    config = {"model": str(MODEL), "outcome": "answer", "learning_rate": 1e-4, **settings}
    return ImplicitReward(ImplicitRewardConfig.model_validate(config))


def sums(model: ImplicitReward, group: Group, spans: Sequence[Span]) -> list[float]:
    verdicts = model.verdicts(asked_rollouts([(group, s) for s in spans], scorer="prime"))
    assert [v.failure for v in verdicts] == [None] * len(spans)
    return [v.value for v in verdicts if v.value is not None]


def learned(model: ImplicitReward, groups: Sequence[Group]) -> Mapping[str, float]:
    return model.learn(judged_rollouts(groups, outcome="answer"))


def test_the_loss_is_the_cross_entropy_of_the_scaled_sum() -> None:
    # sums .2 - .1 + .4 = .5 and -.3 + 0 + .1 = -.2; -log sigmoid(.025), -log(1 - sigmoid(-.01))
    losses = outcome_losses(torch.tensor([0.5, -0.2]), torch.tensor([1.0, 0.0]), beta=0.05)
    assert losses.tolist() == pytest.approx([0.680725, 0.688160], abs=1e-6)


def test_nothing_learned_is_nothing_said_and_spans_add_up() -> None:
    model, group = an_implicit_reward(), a_judged_group()
    assert sums(model, group, whole(group)) == [0.0, 0.0]
    learned(model, [group])
    for rollout, total in zip(group.rollouts, sums(model, group, whole(group)), strict=True):
        tokens = [
            Span(rollout=rollout.index, start=t, end=t + 1) for t in range(rollout.num_tokens)
        ]
        assert sum(sums(model, group, tokens)) == pytest.approx(total, abs=1e-6)
        assert total != 0


def test_a_token_scores_the_gain_in_its_log_probability() -> None:
    model, group = an_implicit_reward(), a_judged_group()
    learned(model, [group])
    rollout = group.rollouts[0]
    ids = torch.tensor([[*rollout.context.tolist(), *rollout.tokens.tolist()]])
    first = len(rollout.context)
    with torch.no_grad():
        gains = [
            net(ids).logits[0].log_softmax(-1)[range(first - 1, ids.shape[1] - 1), ids[0, first:]]
            for net in (model._model, model._reference)
        ]
    spans = [Span(rollout=0, start=t, end=t + 1) for t in range(rollout.num_tokens)]
    assert sums(model, group, spans) == pytest.approx((gains[0] - gains[1]).tolist(), abs=1e-4)


def test_learning_raises_right_answers_above_wrong_ones() -> None:
    model, group = an_implicit_reward(), a_judged_group()
    metrics = [learned(model, [group]) for _ in range(8)]
    right, wrong = sums(model, group, whole(group))
    assert right - wrong > 10
    assert metrics[0]["loss"] == pytest.approx(math.log(2)), "sigmoid(0) is one half"
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["accuracy"] == 1.0
    (other,) = sums(
        model, other_group := answered("7 +5", ["7+5=12\nanswer: 12"]), whole(other_group)
    )
    assert math.isfinite(other)


def test_the_step_is_that_of_plain_autograd_whatever_the_size_of_a_pass() -> None:
    group = a_judged_group()
    results = []
    for budget in (8192, 1):
        model = an_implicit_reward(max_tokens_per_pass=budget)
        metrics = learned(model, [group])
        results.append((metrics["grad_norm"], sums(model, group, whole(group))))
    plain = an_implicit_reward()
    total = torch.zeros(())
    for rollout, outcome in zip(group.rollouts, (1.0, 0.0), strict=True):
        ids = torch.tensor([[*rollout.context.tolist(), *rollout.tokens.tolist()]])
        first = len(rollout.context)
        places = range(first - 1, ids.shape[1] - 1)
        gains = [
            net(ids).logits[0].log_softmax(-1)[places, ids[0, first:]].sum()
            for net in (plain._model, plain._reference)
        ]
        gap = 0.05 * (gains[0] - gains[1])
        total = total - torch.nn.functional.logsigmoid(gap if outcome else -gap) / 2
    total.backward()
    squares = [w.grad.double().square().sum() for w in plain._model.parameters()]
    norm = float(torch.stack(squares).sum().sqrt())
    assert results[0][0] == pytest.approx(norm, rel=1e-4)
    assert results[1][0] == pytest.approx(norm, rel=1e-4)
    assert results[1][1] == pytest.approx(results[0][1], abs=2e-3)


def test_answers_without_an_outcome_teach_nothing() -> None:
    model, group = an_implicit_reward(), a_judged_group((None, None))
    assert learned(model, [group])["num_rollouts"] == 0
    assert sums(model, group, whole(group)) == [0.0, 0.0]


def test_an_outcome_that_is_no_share_and_a_gradient_that_is_no_number_change_nothing() -> None:
    model = an_implicit_reward()
    with pytest.raises(ValueError, match=r"'answer' gave 5; .* between 0 \(wrong\) and 1"):
        learned(model, [a_judged_group((5.0, 0.0))])
    before = {name: w.clone() for name, w in model._model.state_dict().items()}
    model._config = model._config.model_copy(update={"beta": math.inf})
    with pytest.raises(ArithmeticError, match="nothing was learned"):
        learned(model, [a_judged_group()])
    assert all(torch.equal(w, before[name]) for name, w in model._model.state_dict().items())


def test_what_was_saved_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    group = a_judged_group()
    straight, stopped, resumed = (an_implicit_reward() for _ in range(3))
    learned(straight, [group])
    learned(straight, [group])
    learned(stopped, [group])
    stopped.save(str(tmp_path))
    resumed.load(str(tmp_path))
    learned(resumed, [group])
    assert sums(resumed, group, whole(group)) == sums(straight, group, whole(group))


def test_a_token_that_the_model_has_not_is_a_failure_with_the_remedy() -> None:
    model, group = an_implicit_reward(), a_judged_group()
    group.rollouts[1].tokens[0] = 10_000
    right, wrong = model.verdicts(
        asked_rollouts([(group, span) for span in whole(group)], scorer="prime")
    )
    assert right.value == 0.0 and right.failure is None
    assert wrong.value is None and "needs the policy's vocabulary" in str(wrong.failure)


def test_a_folder_without_a_model_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        an_implicit_reward(model=str(tmp_path))


def service_config(**settings: Any) -> ScorerConfig:
    model = {"model": str(MODEL), "outcome": "answer", "learning_rate": 1e-4, **settings}
    return ScorerConfig.model_validate(
        {"name": "prime", "implicit_reward": model, "deadline_s": 60, "weight": 0}
    )


async def _values(service: ScorerService, group: Group) -> list[float | None]:
    return [score.value for score in await service.score(group, whole(group))]


def test_a_killed_process_goes_on_with_what_it_had_learned(tmp_path: Path) -> None:
    group = a_judged_group()

    async def run() -> list[list[float | None]]:
        service = ScorerService(service_config())
        try:
            await service.start()
            seen = [await _values(service, group)]
            metrics = await service.learn([group])
            assert metrics["num_rollouts"] == 2
            seen.append(await _values(service, group))
            await service.save(tmp_path / "state")
            judge = service._judge
            assert isinstance(judge, LearningJudge)
            process = judge._process._process
            assert process is not None
            process.kill()
            seen.append(await _values(service, group))  # what was under way is tried again
            await service.learn([group])
            await service.load(tmp_path / "state")
            seen.append(await _values(service, group))
            return seen
        finally:
            await service.close()

    first, after, killed, loaded = asyncio.run(run())
    assert first == [0.0, 0.0] and None not in after and after != first
    assert killed == after, "a new process continues from the copy"
    assert loaded == after, "a checkpoint brings back what it held"


def test_what_cannot_be_learned_from_ends_the_run_with_the_reason() -> None:
    async def run() -> None:
        service = ScorerService(service_config())
        try:
            await service.start()
            await service.learn([a_judged_group((5.0, 0.0))])
        finally:
            await service.close()

    with pytest.raises(Fatal, match=r"could not learn from a step: .*'answer' gave 5"):
        asyncio.run(run())


def test_a_model_whose_logits_are_not_its_heads_is_refused(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, logit_scale=0.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CohereForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
    model.save_pretrained(tmp_path)
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="changes its logits after the head"):
        an_implicit_reward(model=str(tmp_path))
