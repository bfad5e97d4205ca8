"""Which class the student is of: SASRec, or one of the user's own, tried before it is trained."""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from cotrain import config as configuration
from cotrain.config import StudentConfig
from cotrain.data.packing import pack
from cotrain.errors import ConfigError, some_of
from cotrain.student.protocol import Student
from cotrain.student.sasrec import SASRec

# How `student.architecture` calls our own.
SASREC = "sasrec"
_METHODS = ("encode", "user_states", "forward")
_ATTRIBUTES = ("hidden_size", "max_length", "item_embedding", "item_vectors", "settings")
# Of a student that is tried: how far a state may be from what it is without later items.
_TOLERANCE = 1e-3


def student_class(name: str) -> type[Student]:
    """The class that `student.architecture` names.

    Args:
        name: sasrec, or module:Class, where the module is found as Python finds it, the current
            folder first.

    Raises:
        ConfigError: No such module or class, or no student.
    """
    if name == SASREC:
        return cast("type[Student]", SASRec)
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ConfigError(
            f"student.architecture is {name!r}; expected {SASREC}, or a class of your own as "
            "module:Class, such as scripts.recipes.gru4rec:GRU4Rec."
        )
    try:
        with _current_folder_first():
            found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ConfigError(
            f"student.architecture {name} cannot be imported: {type(error).__name__}: {error}. "
            "Expected module:Class; modules are looked for in the current folder and where Python "
            "finds its packages."
        ) from error
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if not (inspect.isclass(found) and issubclass(found, nn.Module)) or missing:
        raise ConfigError(
            f"student.architecture {name} is no student: expected an nn.Module with the methods "
            f"{', '.join(_METHODS)}; it lacks {some_of(missing) if missing else 'nn.Module'}. See "
            "cotrain/student/protocol.py."
        )
    return cast("type[Student]", found)


def class_name(kind: type[Any]) -> str:
    """What `student_class` finds a class by; of SASRec its plain name."""
    return "SASRec" if kind is SASRec else f"{kind.__module__}:{kind.__qualname__}"


def class_of_run(folder: Path) -> type[Student]:
    """The class that the settings of a run name, for `Recommender.from_pretrained`.

    Raises:
        ConfigError: They cannot be read, or the class cannot be had.
    """
    settings = configuration.parse(["--config", str(folder / "config.yaml")])
    return student_class(settings.student.architecture)


def new_student(num_items: int, settings: StudentConfig, sparse: bool) -> Student:
    """An untrained student.

    Args:
        num_items: Items, padding not counted.
        settings: Class and sizes; it is given those that its `__init__` names.
        sparse: Its item embedding is to give sparse gradients.

    Raises:
        ConfigError: The class cannot be had, or be built like this, or does not do what training
            relies on.
    """
    kind: Any = student_class(settings.architecture)
    offered = {**asdict(settings), "num_items": num_items, "sparse": sparse}
    names = inspect.signature(kind.__init__).parameters
    arguments = {name: offered[name] for name in names if name in offered}
    if kind is SASRec:
        return kind(**arguments)
    name = settings.architecture
    if sparse and "sparse" not in names:
        raise ConfigError(
            f"train.item_updates is lazy, but {name} takes no argument `sparse`, so that its item "
            "embedding cannot give sparse gradients; set train.item_updates all."
        )
    try:
        model = kind(**arguments)
        problem = _problem(model, num_items)
    except Exception as error:  # of the user's code
        raise ConfigError(
            f"student.architecture {name} cannot be built or tried with {arguments}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if problem:
        raise ConfigError(f"student.architecture {name}: {problem} See cotrain/student/protocol.py")
    return model


def _problem(model: Any, num_items: int) -> str | None:
    """What is wrong with an untrained student, or None; no random number is drawn."""
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing:
        return f"it lacks {some_of(missing)}."
    try:
        json.dumps(model.settings)
    except TypeError as error:
        return f"its settings are not plain values: {error}."
    if model.settings.get("num_items") != num_items:
        return f"its settings have num_items {model.settings.get('num_items')}, not {num_items}."
    weight = model.item_embedding.weight
    if weight.shape != (num_items + 1, model.hidden_size) or model.item_vectors is not weight:
        return (
            f"item_embedding.weight is {tuple(weight.shape)}; expected (num_items + 1, "
            f"hidden_size) = {(num_items + 1, model.hidden_size)}, and item_vectors the same."
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.eval()
        problem = _problem_of_states(model, num_items)
        model.train()
    return problem


def _problem_of_states(model: Student, num_items: int) -> str | None:
    length = min(model.max_length, 6)
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, num_items + 1, size) for size in (length, 1, length, 2)]
    packed = pack(rows)
    states = model.encode(packed)
    if states.shape != (len(packed.item_ids), model.hidden_size):
        return (
            f"encode gives {tuple(states.shape)} for {len(packed.item_ids)} positions; expected "
            f"{(len(packed.item_ids), model.hidden_size)}."
        )
    for row, start in zip(rows, packed.starts.tolist(), strict=True):
        for end in range(1, len(row) + 1):
            alone = model.user_states([row[:end]])[0]
            if not torch.allclose(states[start + end - 1], alone, atol=_TOLERANCE, rtol=_TOLERANCE):
                return (
                    f"its state at position {end} of a row of {len(row)} beside others is not that "
                    "of these items alone: it sees later items, or other rows, or `encode` gives "
                    "states in another order than `sequences.item_ids`."
                )
    return None


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """A script has its own folder there in its place."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))
