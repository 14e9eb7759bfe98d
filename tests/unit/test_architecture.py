"""Who may import whom, what stays light, and how large a module may grow: read from the source.

Imports are found anywhere in a file, so one hidden inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("grpo", "rollout_workers", "learner", "reward_services", "orchestration")
ACTOR_PACKAGES = ("rollout_workers", "learner", "reward_services")
# Clock, environment, logging and randomness: what would make the maths depend on where it runs.
IMPURE = {"logging", "os", "random", "secrets", "socket", "subprocess", "threading", "time"}
GRPO_LIBRARIES = {"grpo", "numpy", "pydantic", "torch"}
MAX_MODULE_LINES = 400
VAGUE_NAMES = {"base", "common", "helpers", "manager", "misc", "utils"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


def importers(library: str) -> list[str]:
    """The files of our packages that import a library, as paths from the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in modules(package)
        if library in imported(path)
    ]


def loaded_by(statement: str, watched: set[str]) -> set[str]:
    """Which of the watched packages a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*({watched!r} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_that_the_project_is_known_by_holds_modules(package: str) -> None:
    assert modules(package), f"{package}/ holds no module"


def test_grpo_imports_only_numpy_pydantic_torch_and_the_pure_standard_library() -> None:
    allowed = GRPO_LIBRARIES | (sys.stdlib_module_names - IMPURE)
    found = {str(path.relative_to(ROOT)): imported(path) - allowed for path in modules("grpo")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("package", ACTOR_PACKAGES)
def test_actor_packages_import_neither_each_other_nor_the_orchestration(package: str) -> None:
    forbidden = {*ACTOR_PACKAGES, "orchestration"} - {package}
    found = {str(path.relative_to(ROOT)): imported(path) & forbidden for path in modules(package)}
    assert {path: names for path, names in found.items() if names} == {}


def test_ray_is_imported_by_the_handles_and_the_job_client_only() -> None:
    actors = {f"orchestration/{name}.py" for name in ("cluster", "handles", "learner_handles")}
    assert set(importers("ray")) <= actors | {"orchestration/submit.py"}


def test_vllm_is_imported_in_rollout_workers_and_by_the_judges_process_only() -> None:
    """The actor packages must not import each other, and a judge model needs an engine, too."""
    found = [path for path in importers("vllm") if not path.startswith("rollout_workers/")]
    assert found == ["reward_services/model_judge/vllm_child.py"]


def test_deepspeed_is_imported_by_one_file() -> None:
    assert set(importers("deepspeed")) <= {"learner/deepspeed_backend.py"}


def test_peft_is_imported_by_one_file() -> None:
    assert importers("peft") == ["learner/adapters.py"]


def test_bitsandbytes_is_imported_by_one_file() -> None:
    assert importers("bitsandbytes") == ["learner/quantized_base.py"]


def test_reading_a_config_loads_no_torch_ray_vllm_or_deepspeed() -> None:
    heavy = {"torch", "ray", "vllm", "deepspeed", "transformers"}
    assert loaded_by("import grpo.config, orchestration.config", heavy) == set()


def test_the_command_line_starts_without_numpy_pydantic_torch_or_ray() -> None:
    assert loaded_by("import orchestration.cli", {"torch", "ray", "pydantic", "numpy"}) == set()


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in modules(package)
    }
    assert {path: n for path, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if path.stem in VAGUE_NAMES or path.stem.startswith("base_")
    ]
    assert vague == []
