"""How a token is drawn from logits, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout_workers.token_choice import choose

LOGITS = torch.tensor([[0.5, 0.2, 0.3]]).log()  # three tokens with these probabilities


def chosen(
    uniform: float,
    *,
    logits: Tensor = LOGITS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[int, float]:
    token, log_prob = choose(
        logits,
        torch.tensor([temperature]),
        torch.tensor([top_p]),
        torch.tensor([top_k]),
        torch.tensor([uniform], dtype=torch.float64),
    )
    return int(token), float(log_prob.exp())


def test_the_uniform_number_picks_from_the_cumulative_distribution() -> None:
    # cumulative: 0.5, 0.7, 1.0
    assert [chosen(uniform)[0] for uniform in (0.0, 0.49, 0.51, 0.69, 0.71, 0.999)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_the_log_probability_is_the_chosen_token_s() -> None:
    assert chosen(0.6)[1] == pytest.approx(0.2)


def test_temperature_sharpens_what_is_drawn_from() -> None:
    # squared: 0.25, 0.04, 0.09, sum 0.38; the first token holds 0.25 / 0.38 = 0.658
    token, probability = chosen(0.65, temperature=0.5)
    assert token == 0
    assert probability == pytest.approx(0.25 / 0.38)


def test_temperature_zero_takes_the_likeliest_and_reports_it_at_temperature_one() -> None:
    token, probability = chosen(0.99, temperature=0.0)
    assert token == 0
    assert probability == pytest.approx(0.5)


def test_top_k_keeps_the_likeliest_and_renormalises() -> None:
    # kept 0.5 and 0.3 of tokens 0 and 2: 0.625 and 0.375
    assert chosen(0.62, top_k=2) == (0, pytest.approx(0.625))
    assert chosen(0.63, top_k=2) == (2, pytest.approx(0.375))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    assert chosen(0.99, top_p=0.4) == (0, pytest.approx(1.0))
    assert chosen(0.99, top_p=0.6) == (2, pytest.approx(0.375))


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert chosen(0.0, logits=logits)[0] == 1
    assert chosen(1 - 1e-16, logits=logits)[0] == 1


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=generator)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    settings = (
        torch.tensor([1.0, 0.0, 0.7, 1.3]),
        torch.tensor([1.0, 1.0, 0.5, 1.0]),
        torch.tensor([0, 0, 0, 3]),
    )
    together = choose(logits, *settings, uniform)
    for row in range(4):
        alone = choose(
            logits[row : row + 1],
            *[part[row : row + 1] for part in settings],
            uniform[row : row + 1],
        )
        assert alone[0] == together[0][row]
        torch.testing.assert_close(alone[1], together[1][row : row + 1])


def test_many_draws_follow_the_probabilities() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ones = torch.ones(20_000)
    tokens, _ = choose(LOGITS.expand(20_000, 3), ones, ones, ones.long() * 0, uniform)
    shares = torch.bincount(tokens, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.3]), atol=0.015, rtol=0)
