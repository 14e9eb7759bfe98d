"""`covey serve-scorer`: the scorers of a recipe behind HTTP."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from orchestration.commands.arguments import parsed, recipe_parser
from orchestration.commands.output import remark, say

if TYPE_CHECKING:
    from aiohttp.web import BaseSite

    from orchestration.config import Recipe


def run(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C."""
    parser = recipe_parser(
        "serve-scorer", "Serve a recipe's scorers as OpenRLHF's POST /get_reward."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="0: any free one (5000)")
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with the token that clients send; without it one is made up",
    )
    options = parsed(parser, arguments)

    from orchestration.config import read_recipe

    loaded = read_recipe(options.recipe, options.set)
    asyncio.run(_serve(loaded.recipe, options, _token(options.token_env)))
    return 0


def _token(token_env: str | None) -> str:
    from grpo.errors import UserError

    if token_env is None:
        token = secrets.token_urlsafe(24)
        remark(f"token: {token}")
        return token
    token = os.environ.get(token_env, "")
    if not token:
        raise UserError(f"--token-env names {token_env!r}, and that variable is not set or empty")
    return token


async def _serve(recipe: Recipe, options: argparse.Namespace, token: str) -> None:
    # Loaded here, as `covey serve-scorer --help` must not wait for them.
    from aiohttp import web

    from reward_services.reward_server import RewardServer, ServedScorer
    from reward_services.service import ScorerService

    async with AsyncExitStack() as stack:
        scorers: dict[str, ServedScorer] = {}
        for config in recipe.scorers:
            service = ScorerService(config)
            stack.push_async_callback(service.close)
            await service.start()
            scorers[config.name] = ServedScorer(service=service, weight=config.weight)
        server = RewardServer(scorers, token=token, label_columns=_label_columns(recipe))
        runner = web.AppRunner(server.app(), access_log=None)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await _listen(web.TCPSite(runner, options.host, options.port), options)
        host, port = runner.addresses[0][:2]
        say(f"serving {', '.join(scorers)} at http://{host}:{port}/get_reward")
        await _stop_signal()


async def _listen(site: BaseSite, options: argparse.Namespace) -> None:
    from grpo.errors import UserError

    try:
        await site.start()
    except (OSError, OverflowError) as error:  # OverflowError: a port above 65,535
        raise UserError(
            f"cannot listen on {options.host}:{options.port}: {error}; name another with --host "
            "and --port (port 0: any that is free)"
        ) from error


def _label_columns(recipe: Recipe) -> list[str]:
    tests = [scorer.code.tests_column for scorer in recipe.scorers if scorer.code is not None]
    answers = [source.answer_column for source in recipe.data.training_sources]
    return list(dict.fromkeys([*answers, *tests]))


async def _stop_signal() -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
