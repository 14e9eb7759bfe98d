"""Metrics of a step by domain of the data, and how far the run is through each data set.

A domain has the metrics of its own only among the largest: a file may have thousands.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from orchestration.driver import TrainedStep
from orchestration.evaluation import MAX_DOMAINS
from orchestration.prompt_order import PromptOrder

OTHERS = "others"  # all further domains together


class DataMetrics:
    """Counts since the step before; a run of one domain has no metrics by domain."""

    def __init__(self, order: PromptOrder) -> None:
        self._order = order
        sizes = Counter(prompt.domain for prompt in order.prompts)
        self.num_domains = len(sizes)
        # Equally large ones by name: the same domains after a resume, whatever came first.
        by_size = sorted(sizes, key=lambda domain: (-sizes[domain], domain))
        self._named = frozenset(by_size[:MAX_DOMAINS])
        self._fallen: dict[str, Counter[str]] = defaultdict(Counter)

    @property
    def remark(self) -> str | None:
        """What to tell the user once; None: nothing."""
        if self.num_domains <= MAX_DOMAINS:
            return None
        return (
            f"data.train has {self.num_domains} domains: the metrics name the {MAX_DOMAINS} with "
            f"the most prompts, the further ones count as {OTHERS!r}"
        )

    def fell_out(self, domain: str, fate: str) -> None:
        """A group of the domain was `dropped` or `skipped`."""
        self._fallen[self.name(domain)][fate] += 1

    def forget(self) -> None:
        """What fell out will be sampled again."""
        self._fallen.clear()

    def of_step(self, step: TrainedStep) -> Mapping[str, float]:
        """The step's groups by domain, and what fell out since the step before."""
        fresh = [done.group.id for done in step.groups if done.group.id not in step.replayed]
        epochs = self._order.epochs(max(fresh) + 1)
        metrics = {f"data/{name}/epoch": value for name, value in epochs.items()}
        if self.num_domains > 1:
            metrics |= self._by_domain(step)
        self.forget()
        return metrics

    def _by_domain(self, step: TrainedStep) -> dict[str, float]:
        metrics: dict[str, float] = {}
        rewards: dict[str, list[float]] = defaultdict(list)
        groups: Counter[str] = Counter()
        for item in step.built.rewarded:
            name = self.name(item.group.prompt.domain)
            groups[name] += 1
            rewards[name] += item.rewards[~np.isnan(item.rewards)].tolist()
        further = [OTHERS] if self.num_domains > MAX_DOMAINS else []
        for name in [*sorted(self._named), *further]:
            metrics[f"domain/{name}/groups"] = float(groups[name])
            metrics[f"domain/{name}/dropped"] = float(self._fallen[name]["dropped"])
            if self._fallen[name]["skipped"]:
                metrics[f"domain/{name}/skipped"] = float(self._fallen[name]["skipped"])
            if rewards[name]:  # a mean of nothing is absent
                metrics[f"domain/{name}/reward"] = float(np.mean(rewards[name]))
        return metrics

    def name(self, domain: str) -> str:
        """Under which its metrics are."""
        return domain if domain in self._named else OTHERS
