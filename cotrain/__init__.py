"""cotrain: teach a small sequential recommender what a large language model knows, live.

`load_run`, `load_teacher`, `Recommender`, `SASRec` and `losses` are what a program of one's own
needs, `Student` is what a student of one's own has to be; `cotrain.api` has runnable examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotrain.api import Run, Teacher, load_run, load_teacher
    from cotrain.distill import losses
    from cotrain.student.protocol import Student
    from cotrain.student.recommender import Recommender
    from cotrain.student.sasrec import SASRec

__all__ = [
    "Recommender", "Run", "SASRec", "Student", "Teacher", "load_run", "load_teacher", "losses",
]  # fmt: skip

_HOMES = {
    "Recommender": "cotrain.student.recommender",
    "SASRec": "cotrain.student.sasrec",
    "Student": "cotrain.student.protocol",
} | dict.fromkeys(["Run", "Teacher", "load_run", "load_teacher"], "cotrain.api")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import cotrain` alone takes no second, and no torch.
    if name == "losses":
        return importlib.import_module("cotrain.distill.losses")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
