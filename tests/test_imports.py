"""The house keeps its floors: imports point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cotrain"

# What each part may import beside itself, transitively everything below it.
BELOW = {
    "cotrain.errors": set(),
    "cotrain.files": {"cotrain.errors"},
    "cotrain.settings": set(),
    "cotrain.run_settings": {"cotrain.settings"},
    "cotrain.finetune_settings": {"cotrain.settings"},
    "cotrain.rationale_settings": {"cotrain.settings"},
    "cotrain.contradictions": {
        "cotrain.settings", "cotrain.run_settings", "cotrain.finetune_settings",
        "cotrain.rationale_settings",
    },
    "cotrain.config": {
        "cotrain.errors", "cotrain.settings", "cotrain.finetune_settings", "cotrain.contradictions",
        "cotrain.run_settings", "cotrain.rationale_settings",
    },
    "cotrain.asset_builders": {"cotrain.errors"},
    "cotrain.assets": {"cotrain.errors", "cotrain.files", "cotrain.asset_builders"},
    "cotrain.runtime": {"cotrain.errors", "cotrain.files", "cotrain.config"},
    "cotrain.data": {
        "cotrain.errors", "cotrain.config", "cotrain.files", "cotrain.asset_builders",
        "cotrain.assets",
    },
    "cotrain.student": {"cotrain.errors", "cotrain.config", "cotrain.files", "cotrain.data"},
    "cotrain.teacher": {"cotrain.errors", "cotrain.config", "cotrain.assets", "cotrain.data"},
    "cotrain.evaluation": {
        "cotrain.errors", "cotrain.config", "cotrain.files", "cotrain.data", "cotrain.student",
        "cotrain.runtime",
    },
    "cotrain.rationale": {
        "cotrain.errors", "cotrain.config", "cotrain.files", "cotrain.assets", "cotrain.data",
        "cotrain.runtime", "cotrain.student", "cotrain.teacher",
    },
    "cotrain.finetune": {
        "cotrain.errors", "cotrain.finetune_settings", "cotrain.config", "cotrain.contradictions",
        "cotrain.files",
        "cotrain.data", "cotrain.runtime", "cotrain.student", "cotrain.teacher",
        "cotrain.evaluation", "cotrain.rationale",
    },
    "cotrain.distill": {
        "cotrain.errors", "cotrain.config", "cotrain.data", "cotrain.runtime", "cotrain.student",
        "cotrain.teacher", "cotrain.evaluation", "cotrain.rationale",
    },
    "cotrain.rounds": {
        "cotrain.errors", "cotrain.config", "cotrain.finetune_settings", "cotrain.runtime",
        "cotrain.student", "cotrain.distill", "cotrain.finetune",
    },
    "cotrain.comparison": {
        "cotrain.errors", "cotrain.config", "cotrain.files", "cotrain.data", "cotrain.runtime",
        "cotrain.evaluation", "cotrain.rationale", "cotrain.distill",
    },
    "cotrain.benchmarks": {
        "cotrain.errors", "cotrain.config", "cotrain.assets", "cotrain.data", "cotrain.runtime",
        "cotrain.student", "cotrain.teacher", "cotrain.evaluation", "cotrain.rationale",
        "cotrain.distill",
    },
    "cotrain.export": {
        "cotrain.errors", "cotrain.files", "cotrain.data", "cotrain.student", "cotrain.evaluation",
        "cotrain.rationale",
    },
    "cotrain.serving": {
        "cotrain.errors", "cotrain.config", "cotrain.data", "cotrain.student", "cotrain.teacher",
        "cotrain.evaluation", "cotrain.rationale", "cotrain.distill",
    },
    "cotrain.api": {
        "cotrain.errors", "cotrain.config", "cotrain.data", "cotrain.student", "cotrain.teacher",
        "cotrain.evaluation", "cotrain.rationale", "cotrain.distill",
    },
}  # fmt: skip
PURE = [
    "distill/losses.py",
    "evaluation/metrics.py",
    "finetune/losses.py",
    "finetune/rewards.py",
    "teacher/parsing.py",
    "teacher/chat.py",
    "teacher/identifiers.py",
    "teacher/prompts.py",
    "teacher/segments.py",
    "teacher/verdict.py",
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize(
    "path",
    # The package's own __init__ may offer anything.
    sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"),
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_import_points_up(path: Path):
    own = part("cotrain." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    wrong = [
        name
        for name in imports(path)
        if name.startswith("cotrain.") and part(name) not in BELOW[own] | {own}
    ]
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_neither_processes_nor_files(name: str):
    roots = {module.split(".")[0] for module in imports(PACKAGE / name)}
    assert not roots & {"accelerate", "pathlib", "os", "io", "subprocess"}
