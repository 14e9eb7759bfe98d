"""A folder with everything that a recipe names: the starter model, a few prompts, one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "orchestration" / "starter" / "model"
ROWS = [{"prompt": f"7 +{i}", "answer": str(7 + i), "solution": f"answer: {7 + i}"} for i in (1, 2)]


def settings(**changed: Any) -> dict[str, Any]:
    """A recipe that works, with whole sections replaced."""
    return {
        "name": "small",
        "model": str(MODEL),
        "steps": 2,
        "sampling": {"max_prompt_length": 16, "max_completion_length": 32},
        "data": {"train": "train.jsonl"},
        "algorithm": {"name": "grpo", "num_generations": 4},
        "scorers": [{"name": "answer", "rule": "numeric"}],
        "rollout": {"engine": "transformers"},
        "learner": {"backend": "torch", "learning_rate": 1e-4},
        **changed,
    }


def written_project(folder: Path, **changed: Any) -> Path:
    """Write the data and the recipe; returns the recipe's file."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings(**changed), sort_keys=False))
    return recipe
