"""The process that holds a preference model for a scorer; see reward_services/function_child.py."""

from __future__ import annotations

import sys
from pathlib import Path

from reward_services.function_child import JUDGE, Functions, packing, serve_all
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.model import loaded_model
from reward_services.preference.refresh import loaded_refreshed


def main(folder: str, settings: str) -> None:
    """Load the model of a folder, then answer until the input ends."""
    config = PreferenceConfig.model_validate_json(settings)

    def load() -> Functions:
        if config.refresh is None:
            return {JUDGE: packing(loaded_model(Path(folder), encoder=config.encoder).verdicts)}
        model = loaded_refreshed(Path(folder), config)
        return {
            JUDGE: packing(model.verdicts),
            "learn": model.learn,
            "save": model.save,
            "load": model.load,
        }

    serve_all(load)


if __name__ == "__main__":
    main(*sys.argv[1:])
