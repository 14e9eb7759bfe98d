"""How far the policy has moved since the start of the step, in log space. N tokens.

Refuses to know advantages. Ratios of an answer count its trained tokens alone. Tensors are used
through their methods only: no torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.rows import row_mean, row_sum, trained_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import Gate, LossInputs


def token_log_ratio(inputs: LossInputs) -> Tensor:
    """Log of policy now / policy at the start of the step, of each token alone. [N]"""
    return inputs.log_probs - inputs.proximal_log_probs


def cross_context_log_ratio(inputs: LossInputs) -> Tensor:
    """Log of policy now / policy that sampled on cross-context tokens, `token_log_ratio` else. [N]

    The two policies differ in what they read: pi(token | prompt) / pi_old(token | prompt, hint)
    (Guide-GRPO, arXiv:2506.13923). Log-probabilities -1.6 now and 0 then: -1.6, ratio 0.2.
    """
    sampled = inputs.behaviour_log_probs.where(inputs.is_cross_context, inputs.proximal_log_probs)
    return inputs.log_probs - sampled


def behaviour_log_ratio(inputs: LossInputs) -> Tensor:
    """Log of policy now / policy that sampled, for answers stored with their log-probs. [N]"""
    return inputs.log_probs - inputs.behaviour_log_probs


def weighted_log_ratio(inputs: LossInputs, *, weight: Gate) -> Tensor:
    """Log of weight times ratio: PPO-clip then bounds weight and ratio together. [N]

    Weight 1.4, ratio 1, A = 1, clip range 0.2: clipped, no gradient.
    """
    return token_log_ratio(inputs) + weight(inputs).detach().log()


def sequence_mean_log_ratio(inputs: LossInputs) -> Tensor:
    """Mean of an answer's token log-ratios, on each of its tokens (GSPO, arXiv:2507.18071). [N]

    Log-ratios 0.1, -0.3, 0: -0.0667 on all three, ratio 0.9355. Needs a mean over answers, as each
    token repeats its answer's ratio.
    """
    return row_mean(token_log_ratio(inputs), inputs)


def sequence_token_log_ratio(inputs: LossInputs) -> Tensor:
    """The value of `sequence_mean_log_ratio` with the gradient of each token alone. [N]

    GSPO-token: the same loss and gradient where the advantage is constant over an answer.
    """
    own = inputs.log_probs - inputs.log_probs.detach()
    return sequence_mean_log_ratio(inputs).detach() + own


def sequence_sum_log_ratio(inputs: LossInputs) -> Tensor:
    """Log-ratio of a whole answer, not divided by its length, on each of its tokens. [N]"""
    return row_sum(token_log_ratio(inputs), inputs)


def traced_log_ratio(inputs: LossInputs, *, decay: float) -> Tensor:
    """Eligibility trace of the log-ratios along an answer: e_t = x_t + decay * e_(t-1). [N]

    x = 0.1, -0.2, 0.05, 0.3 and decay 0.5: 0.1, -0.15, -0.025, 0.2875. Starts anew with each
    answer and passes over untrained tokens.
    """
    trained = trained_tokens(inputs)
    trace, row = token_log_ratio(inputs)[trained], inputs.row[trained]
    shift = 1
    # After k rounds a token has gathered 2^k tokens of its row: log2(length) rounds in all.
    while shift < len(row):
        is_same_row = row == row.roll(shift)
        is_same_row[:shift] = False  # roll() wraps around
        trace = trace + decay**shift * trace.roll(shift) * is_same_row
        shift *= 2
    return inputs.log_probs.new_zeros(inputs.log_probs.shape).masked_scatter(trained, trace)
