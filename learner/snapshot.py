"""One rank's training state, copied aside so that it is written while training goes on.

Refuses to know how the state is taken and which checkpoint it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.errors import Fatal, UserError
from grpo.weight_image import METADATA

STATE_FOLDER = "learner"
NUMBERS_FILE = "numbers.json"
REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """What a rank writes; nothing that still trains shares memory with it."""

    rank: int
    numbers: Mapping[str, float]  # the learner's own: steps done, a learnable scalar
    pieces: Mapping[str, Tensor]  # learner/shards.py
    reference: Mapping[str, Tensor]  # of a moving reference, on rank 0; empty: it does not move
    export: Callable[[Path], None] | None  # writes the model for users, on rank 0

    def write(self, folder: Path) -> list[str]:
        """Write all of it below `folder`; the paths of the files, from there."""
        own = folder / STATE_FOLDER
        try:
            own.mkdir(parents=True, exist_ok=True)
            files = [own / f"rank_{self.rank}.safetensors"]
            save_file(dict(self.pieces), files[0], METADATA)
            if self.reference:
                files.append(own / REFERENCE_FILE)
                save_file(dict(self.reference), files[-1], METADATA)
            if self.export is not None:
                files.append(own / NUMBERS_FILE)
                files[-1].write_text(json.dumps(dict(self.numbers)) + "\n", encoding="utf-8")
                self.export(folder)
        except (OSError, SafetensorError) as error:  # a full disk
            raise Fatal(f"the checkpoint cannot be written to {folder}: {error}") from error
        return [file.relative_to(folder).as_posix() for file in files]


def saved_numbers(folder: Path) -> dict[str, float]:
    """The learner's own numbers in a checkpoint."""
    path = folder / STATE_FOLDER / NUMBERS_FILE
    if not path.exists():
        raise UserError(
            f"{path} is missing: expected the learner's state as this version of covey writes it; "
            "continue with the version of covey that wrote the checkpoint (see versions.json)"
        )
    numbers: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return numbers


def saved_pieces(folder: Path) -> list[Path]:
    """The files of all ranks in a checkpoint."""
    return sorted((folder / STATE_FOLDER).glob("rank_*.safetensors"))


def saved_reference(folder: Path) -> dict[str, Tensor]:
    """The moving reference in a checkpoint."""
    return load_file(folder / STATE_FOLDER / REFERENCE_FILE)
