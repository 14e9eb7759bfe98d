"""The process that holds a reward model for a scorer; see reward_services/function_child.py."""

from __future__ import annotations

import json
import sys

from reward_services.function_child import JUDGE, Functions, packing, serve_all
from reward_services.model_config import ImplicitRewardConfig, ProcessRewardConfig


def main(kind: str, settings: str) -> None:
    """Load a model of this kind with these settings, as JSON; answer until the input ends."""
    load = {"process_reward": _process_reward, "implicit_reward": _implicit_reward}[kind]
    serve_all(lambda: load(json.loads(settings)))


def _process_reward(settings: object) -> Functions:
    from reward_services.process_reward import ProcessReward  # each process loads its own kind

    model = ProcessReward(ProcessRewardConfig.model_validate(settings))
    return {JUDGE: packing(model.verdicts)}


def _implicit_reward(settings: object) -> Functions:
    from reward_services.implicit_reward import ImplicitReward

    model = ImplicitReward(ImplicitRewardConfig.model_validate(settings))
    return {
        JUDGE: packing(model.verdicts),
        "learn": model.learn,
        "save": model.save,
        "load": model.load,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
