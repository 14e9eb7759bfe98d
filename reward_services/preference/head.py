"""The trained part of a preference model: a small network from a prefix's features to a utility.

Bradley-Terry: P(a preferred to b) = sigmoid(utility(a) - utility(b)), so P(a, b) + P(b, a) = 1 and
utilities of consecutive prefixes telescope. Knows its two files, not the encoder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from grpo.errors import UserError
from grpo.types import DType

WEIGHTS_FILE, FACTS_FILE = "preference.safetensors", "preference.json"


class UtilityHead(nn.Module):
    """Linear, GELU, Linear to one number."""

    def __init__(self, num_features: int, hidden_units: int) -> None:
        super().__init__()
        self.inner = nn.Linear(num_features, hidden_units)
        self.outer = nn.Linear(hidden_units, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[..., F] to [...]"""
        result: Tensor = self.outer(nn.functional.gelu(self.inner(features)))[..., 0]
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFacts:
    """What the weights belong to; a head on another encoder's states would say anything."""

    model: str  # the encoder, as the recipe named it
    encoder: str  # fingerprint of its weights
    tokenizer: str  # fingerprint of its vocabulary
    encoder_dtype: DType
    largest_surprise: bool
    num_features: int
    hidden_units: int


def save_head(folder: Path, head: UtilityHead, facts: HeadFacts) -> None:
    """Weights first, facts last: without them the weights are not found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS_FILE).unlink(missing_ok=True)
    safetensors.torch.save_file(head.state_dict(), folder / WEIGHTS_FILE)
    (folder / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n")


def read_facts(folder: Path) -> HeadFacts:
    """UserError with the remedy where there is no preference model."""
    if not (folder / FACTS_FILE).is_file():
        raise UserError(
            f"{folder} holds no preference model ({FACTS_FILE}): train it first, with "
            "covey preference train RECIPE"
        )
    try:
        return HeadFacts(**json.loads((folder / FACTS_FILE).read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / FACTS_FILE} cannot be read: {error}; train the preference model again"
        ) from error


def load_head(folder: Path, facts: HeadFacts) -> UtilityHead:
    """The head that `save_head` wrote."""
    head = UtilityHead(facts.num_features, facts.hidden_units)
    head.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    return head.eval()
