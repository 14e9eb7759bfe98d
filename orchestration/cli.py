"""The `covey` command: finds the subcommand, runs it, and turns every error into plain words.

Imports nothing but the standard library until a subcommand is chosen, so that --help is instant.
Exit status: 0 done, 2 the user's mistake, 1 a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "run a recipe",
    "check": "find every problem of a recipe, its files and this machine before a run",
    "algorithms": "list the algorithms",
    "explain": "show what an algorithm would do with given groups, number by number",
    "describe": "show which function an algorithm has at each point, and its settings",
    "eval": "measure a model on a data set: pass@1, pass@k, mean length",
    "export": "copy the model of a checkpoint, for AutoModelForCausalLM and vLLM",
    "replay": "recompute a recorded step of a run, and compare it bit for bit",
    "doctor": "say what a run is doing, who waits for whom, and what is wrong with it",
    "scale": "show the numbers of workers of a running job, or change them while it goes on",
    "selftest": "train at rate 0: neither the policy nor the engine's difference may move",
    "simulate": "the driver against workers that only wait: what limits a step, at any size",
    "preference": "collect answers, train and measure a preference model (WS-GRPO)",
    "judge": "train a small model that judges steps (SGPO), and compare it with the rule",
    "serve-scorer": "answer OpenRLHF's POST /get_reward with a recipe's scorers",
    "starter": "build the small starter model, or write its data sets",
    "schema": "print the JSON Schema of recipes, or of the groups that explain reads",
    "submit": "run a recipe on a Ray cluster",
}
DONE, FAILURE, MISTAKE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _overview().print_help(sys.stdout if arguments else sys.stderr)
        return DONE if arguments else MISTAKE
    if arguments[0] == "--version":
        arguments = ["version"]
    return _run(arguments[0], arguments[1:])


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return argparse.ArgumentParser(
        prog="covey",
        usage="covey COMMAND [options]",
        description="Reinforcement learning of language models with the GRPO family.",
        epilog="\n".join(
            ["commands:", *lines, "", "covey COMMAND --help shows the options of a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run(name: str, arguments: Sequence[str]) -> int:
    import importlib

    from grpo.errors import CoveyError, UserError

    if name not in COMMANDS and name != "version":
        return _say_unknown(name)
    try:
        stem = name.replace("-", "_")
        module = importlib.import_module(f"orchestration.commands.{stem}_command")
        return int(module.run(list(arguments)))
    except UserError as error:
        return _end(MISTAKE, str(error))
    except CoveyError as error:
        return _end(FAILURE, f"{error} ({type(error).__name__})")
    except KeyboardInterrupt:
        return _end(FAILURE, "stopped by Ctrl-C")
    except BrokenPipeError:  # the reader of our output has seen enough: covey schema | head
        sys.stderr.close()
        return DONE


def _say_unknown(name: str) -> int:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
    return _end(MISTAKE, f"unknown command {name!r}; {remedy}")


def _end(status: int, message: str) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"covey: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
