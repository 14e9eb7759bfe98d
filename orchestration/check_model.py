"""A model folder seen from outside: settings, weight files, vocabulary. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo.errors import UserError
from learner.config import heads_problem

INDEX_FILE = "model.safetensors.index.json"
HUB_TIMEOUT_S = 10


def model_facts(model: str, max_model_len: int) -> str:
    """The architecture and size; UserError for what would stop a run."""
    folder = Path(model)
    if not folder.is_dir():
        return _hub_facts(model, max_model_len)
    config = _config(folder)
    _check_positions(config, max_model_len)
    count = sum(_num_elements(file) for file in _weight_files(folder))
    return f"{_architecture(config)}, {_short(count)} parameters, {folder}"


def num_positions(model: str) -> int | None:
    """Tokens that a model folder has positions for; None: without a limit, or no folder."""
    folder = Path(model)
    return _positions(_config(folder)) if folder.is_dir() else None


def vocabulary_fits(model: str, largest_token: int, stop_ids: Sequence[int]) -> None:
    """UserError if the tokenizer gives tokens that the model has no embedding for."""
    folder = Path(model)
    if not folder.is_dir():
        return
    size = _text_config(_config(folder))["vocab_size"]
    largest = max(largest_token, *stop_ids)
    if largest >= size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model has embeddings for {size} "
            "(vocab_size in config.json): tokenizer and weights do not belong together"
        )


def heads_fit(model: str, sequence_parallel: int) -> None:
    """UserError if so many learner ranks cannot share a model folder's attention heads."""
    folder = Path(model)
    if sequence_parallel == 1 or not folder.is_dir():
        return
    shape = _text_config(_config(folder))
    heads = shape["num_attention_heads"]
    key_heads = shape.get("num_key_value_heads") or heads  # not named: every head has its own
    problem = heads_problem(heads=heads, key_heads=key_heads, sequence_parallel=sequence_parallel)
    if problem is not None:
        raise UserError(problem)


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"model folder {folder} holds no config.json; found {found}; expected what "
            "save_pretrained writes: config.json, *.safetensors and the tokenizer's files"
        )
    try:
        config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(
            f"{file} describes no model; expected a mapping with model_type and the sizes, as "
            "save_pretrained writes it"
        )
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        other = [p.name for p in folder.glob("*.bin")]
        remedy = "convert them with save_pretrained" if other else "expected model.safetensors"
        raise UserError(f"model folder {folder} holds no safetensors weights; {remedy}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"model folder {folder} lacks {', '.join(missing)}, which its index names")
    return [folder / name for name in names]


def _num_elements(file: Path) -> int:
    """Read from the header alone."""
    total = 0
    try:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping: it cannot be iterated
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                total += size
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is no readable safetensors file ({error}); copy or download it again"
        ) from error
    return total


def _hub_facts(model: str, max_model_len: int) -> str:
    config: Mapping[str, Any] = json.loads(_hub_config(model).read_text(encoding="utf-8"))
    _check_positions(config, max_model_len)
    return f"{_architecture(config)}, {model}"


def _hub_config(model: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache  # rarely needed

    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        # A download retries for a minute where the hub is out of reach; this asks once.
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        raise UserError(
            f"{model!r} is no folder here, and as a Hugging Face id it could not be reached "
            f"({type(error).__name__}); expected a folder with config.json, or the id of a model "
            "that this machine can reach or has cached"
        ) from error


def _check_positions(config: Mapping[str, Any], max_model_len: int) -> None:
    positions = _positions(config)
    if positions is not None and positions < max_model_len:
        raise UserError(
            f"sampling.max_prompt_length + max_completion_length is {max_model_len}, but the model "
            f"has {positions} positions: lower one of the two"
        )


def _positions(config: Mapping[str, Any]) -> int | None:
    found: int | None = _text_config(config).get("max_position_embeddings")
    return found


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models with images keep the language model's settings one level down."""
    inner: Mapping[str, Any] = config["text_config"] if "text_config" in config else config
    return inner


def _architecture(config: Mapping[str, Any]) -> str:
    names = config["architectures"] if "architectures" in config else None
    return names[0] if names else "unknown architecture"


def _short(count: int) -> str:
    """0.30M, 7.62B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
