"""The synthetic trap of the lambda-GRPO paper (arXiv:2509.21154): can the best path be learned?

    python -m benchmarks.lambda_trap            the published cell, five seeds, seconds to minutes
    python -m benchmarks.lambda_trap --all      all six cells

Binary tree of depth 4. The target path gets 1, other paths that begin like it get a negative
reward, all others 0.7: at first the target's beginning looks bad. Advantages, set sizes, means and
the loss are those of covey's pipelines; only the policy and the sampling are made here.

By default the policy is a table of logits, a pair for each of the tree's 15 inner nodes. It shares
nothing between prefixes, so what it does is the algorithms' doing alone, and it runs in seconds.
`--policy transformer` is a small GPT-2 with random weights, where prefixes share parameters, as in
the paper's pretrained GPT-2 small. Learning rates are not comparable between the three.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from grpo.algorithms import lambda_grpo_prm
from grpo.batch import build_batch
from grpo.objective import LossInputs, loss_and_metrics
from grpo.types import FinishReason, Group, Origin, Prompt, Rollout, Score, Span, TrainRow

DEPTH, BRANCHES = 4, 2
GROUP_SIZE, STEPS, MEASURED_STEPS = 16, 250, 50
OTHER_REWARD = 0.7
PUBLISHED = {"none": 0.0, "process_sets": 0.7535}  # prefix 1, negative reward -1
LEARNING_RATES = {"table": (0.003, 0.01, 0.03, 0.1), "transformer": (1e-4, 3e-4, 1e-3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """Which path is the target and what surrounds it."""

    target: tuple[int, ...]
    prefix: int  # n, tokens that a path must share with the target to be punished
    negative: float

    def reward(self, path: tuple[int, ...]) -> float:
        """1 for the target, `negative` for its neighbours, 0.7 far away."""
        if path == self.target:
            return 1.0
        is_near = path[: self.prefix] == self.target[: self.prefix]
        return self.negative if is_near else OTHER_REWARD


class Table(nn.Module):
    """One pair of logits for each inner node of the tree, all 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(BRANCHES**DEPTH, BRANCHES))

    def forward(self, paths: Tensor) -> Tensor:
        """[B, t] tokens so far -> [B, t + 1, 2] logits of the token after each prefix."""
        nodes = [torch.ones(len(paths), dtype=torch.int64)]  # numbered as in a heap, the root 1
        for t in range(paths.shape[1]):
            nodes.append(BRANCHES * nodes[-1] + paths[:, t])
        return self.logits[torch.stack(nodes, dim=1)]


class Transformer(nn.Module):
    """A small GPT-2 with random weights; its vocabulary is the two branches and a beginning."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=BRANCHES + 1,
            n_positions=DEPTH + 1,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config).eval()  # without dropout

    def forward(self, paths: Tensor) -> Tensor:
        beginning = torch.full((len(paths), 1), BRANCHES)
        return self.model(torch.cat([beginning, paths], dim=1)).logits[..., :BRANCHES]


POLICIES = {"table": Table, "transformer": Transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description="The synthetic trap of the lambda-GRPO paper.")
    parser.add_argument("--policy", choices=tuple(POLICIES), default="table")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=None)
    parser.add_argument("--all", action="store_true", help="all six cells of the paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(n, r) for n in (1, 2) for r in (-0.5, -1.0, -1.5)] if options.all else [(1, -1.0)]
    scales = ("none", "norm_matched", "process_sets")
    print(f"frequency of the target in the last {MEASURED_STEPS} of {STEPS} steps, Adam,")
    print(f"policy: {options.policy}; mean over {options.seeds} seeds (each seed)\n")
    print("n  r_neg  rate    " + "".join(f"{title:<38}" for title in ("GRPO", "matched", "lambda")))
    for n, negative in cells:
        for rate in options.learning_rates or LEARNING_RATES[options.policy]:
            found = [
                [
                    frequency(options.policy, scale, n, negative, rate, seed)
                    for seed in range(options.seeds)
                ]
                for scale in scales
            ]
            print(f"{n}  {negative:5.1f}  {rate:<7g} " + "".join(map(_column, found)), flush=True)
    print(
        f"\npublished for n 1, r_neg -1 (pretrained GPT-2 small, rate 1e-5): "
        f"GRPO {PUBLISHED['none']:.4f}, lambda-GRPO {PUBLISHED['process_sets']:.4f}"
    )


def frequency(
    policy_name: str, loss_scale: str, prefix: int, negative: float, rate: float, seed: int
) -> float:
    """How often the target is sampled in the last steps of one training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(BRANCHES, (DEPTH,), generator=generator)
    trap = Trap(target=tuple(target.tolist()), prefix=prefix, negative=negative)
    config = lambda_grpo_prm.Config.model_validate(
        {"num_generations": GROUP_SIZE, "loss_scale": loss_scale, "beta": 0.0}
    )
    pipeline = lambda_grpo_prm.pipeline(config, outcomes={"path": 1.0}, max_completion_length=DEPTH)
    objective = lambda_grpo_prm.objective(config)
    policy = POLICIES[policy_name]()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    hits = 0
    for step in range(STEPS):
        paths = sampled(policy, generator)
        log_probs = path_log_probs(policy, paths)
        group = group_of(trap, paths, log_probs.detach(), step)
        built = build_batch(pipeline, [group], None, step=step, version=step, num_updates=1)
        loss, _ = loss_and_metrics(objective, loss_inputs(built.batch.updates[0], log_probs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= STEPS - MEASURED_STEPS:
            hits += int((paths == target).all(dim=1).sum())
    return hits / (MEASURED_STEPS * GROUP_SIZE)


@torch.no_grad()
def sampled(policy: nn.Module, generator: torch.Generator) -> Tensor:
    """[G, DEPTH] paths drawn from the policy."""
    paths = torch.zeros(GROUP_SIZE, 0, dtype=torch.int64)
    for _ in range(DEPTH):
        chances = policy(paths)[:, -1].softmax(dim=-1)
        paths = torch.cat([paths, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return paths


def path_log_probs(policy: nn.Module, paths: Tensor) -> Tensor:
    """[G, DEPTH] of each token given those before it, with gradient."""
    logits = policy(paths[:, :-1])
    return logits.log_softmax(dim=-1).gather(2, paths[..., None])[..., 0]


def group_of(trap: Trap, paths: Tensor, log_probs: Tensor, step: int) -> Group:
    """The sampled paths as covey sees answers."""
    nothing = np.zeros(0, np.int32)
    rollouts = tuple(
        Rollout(
            index=index,
            context=nothing,
            tokens=np.array(path, np.int32),
            log_probs=values.numpy(),
            origins=np.full(DEPTH, Origin.POLICY, np.uint8),
            versions=np.full(DEPTH, step, np.int32),
            text="".join("LR"[token] for token in path),
            token_ends=np.arange(1, DEPTH + 1, dtype=np.int32),
            finish_reason=FinishReason.STOP,
        )
        for index, (path, values) in enumerate(zip(paths.tolist(), log_probs, strict=True))
    )
    scores = tuple(
        Score(
            scorer="path",
            span=Span(rollout=place, start=0, end=DEPTH),
            value=trap.reward(tuple(path)),
        )
        for place, path in enumerate(paths.tolist())
    )
    prompt = Prompt(id="tree", text="", tokens=nothing)
    return Group(id=step, prompt=prompt, rollouts=rollouts, scores=scores)


def loss_inputs(rows: Sequence[TrainRow], log_probs: Tensor) -> LossInputs:
    """The streams of the rows beside the policy's own log-probabilities, all on policy."""
    flat = log_probs.reshape(-1)

    def stream(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))

    return LossInputs(
        log_probs=flat,
        proximal_log_probs=flat.detach(),
        behaviour_log_probs=flat.detach(),
        reference_log_probs=None,
        entropy=None,
        advantages=stream("advantages"),
        weights=stream("weights"),
        policy_weights=stream("policy_weights"),
        origins=stream("origins"),
        is_cross_context=torch.zeros(len(flat), dtype=torch.bool),
        row=torch.repeat_interleave(torch.arange(len(rows)), DEPTH),
        num_rows=len(rows),
    )


def _column(values: Sequence[float]) -> str:
    each = " ".join(f"{value:.2f}" for value in values)
    return f"{np.mean(values):.4f} ({each})".ljust(38)


if __name__ == "__main__":
    main()
