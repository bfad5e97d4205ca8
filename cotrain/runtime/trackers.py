"""Where a run is shown besides its folder, by Accelerate's trackers: TensorBoard, Weights & Biases,
MLflow.

What keeps a tracker from starting is an error before the first step. What happens to it later (a
server that is gone) is said once, and the run goes on without it: its folder has everything.
"""

import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from os import environ
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
)
from tqdm import tqdm

from cotrain.errors import ConfigError
from cotrain.files import write_whole

# Of all runs together, in W&B a project, in MLflow an experiment.
PROJECT = "cotrain"
# In the run folder: what the trackers call this run, so that it is resumed under its name.
IDS_FILE = "trackers.json"
# Seconds that W&B may go on uploading when the run is over.
_FINISH_TIMEOUT_S = 300.0

_REMEDIES = {
    "tensorboard": "Is the run folder's disk full?",
    "wandb": "Log in (`wandb login`), or set WANDB_MODE=offline and `wandb sync` it later.",
    "mlflow": "Is MLFLOW_TRACKING_URI right, and its server up?",
}


def require_packages(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are there.

    Raises:
        ConfigError: They are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking.with asks for {', '.join(missing)}, not installed here: pip install "
            f"'cotrain[{','.join(missing)}]', or leave it out."
        )


class _TensorBoard(TensorBoardTracker):
    settings: dict[str, Any]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        # A row of hyper-parameters is written once, so it waits for the results.
        self.settings = values

    def store_results(self, results: dict[str, Any]) -> None:
        words = {name: value for name, value in results.items() if isinstance(value, str)}
        # "." is the folder of the curves; else the row would be a run of its own beside them.
        self.writer.add_hparams(self.settings | words, _numbers(results), run_name=".")


class _WandB(WandBTracker):
    def store_results(self, results: dict[str, Any]) -> None:
        self.run.summary.update(results)


class _MLflow(MLflowTracker):
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        # "@" is no letter of a metric there.
        super().log({name.replace("@", "_at_"): one for name, one in values.items()}, step)

    def store_results(self, results: dict[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        self.log({f"final/{name}": value for name, value in _numbers(results).items()})
        mlflow.set_tags({name: one for name, one in results.items() if isinstance(one, str)})


class Tracker(GeneralTracker):
    """One of Accelerate's trackers that ends no run.

    Args:
        name: tensorboard, wandb or mlflow.
        folder: Of the run.
        resume_step: Step of the checkpoint that a resumed run goes on from; None: a new run.
    """

    requires_logging_directory = False

    def __init__(self, name: str, folder: Path, resume_step: int | None = None):
        super().__init__(_blank=True)
        self.name = name
        self._ids = folder / IDS_FILE
        known = json.loads(self._ids.read_text("utf-8")) if self._ids.exists() else {}
        self._inner: Any
        if name == "tensorboard":
            # It drops this step and what follows; the checkpoint's own step was kept.
            purge = {} if resume_step is None else {"purge_step": resume_step + 1}
            self._inner = _TensorBoard("tensorboard", str(folder), **purge)
        elif name == "wandb":
            self._inner = _WandB(
                environ.get("WANDB_PROJECT", PROJECT), name=folder.name, dir=str(folder),
                id=known.get("wandb", uuid.uuid4().hex[:8]), resume="allow",
                settings={"finish_timeout": _FINISH_TIMEOUT_S},
            )  # fmt: skip
        else:
            self._inner = _MLflow(PROJECT, run_name=folder.name, run_id=known.get("mlflow"))
        self._alive = True

    @property
    def tracker(self) -> Any:
        """What the library calls the run."""
        return self._inner.tracker

    def start(self) -> None:
        """Raises:
        ConfigError: It cannot be started.
        """
        try:
            self._inner.start()
        except Exception as error:  # of a library and a network
            raise ConfigError(
                f"tracking.with {self.name} cannot be started: {type(error).__name__}: "
                f"{str(error)[:500]}\n{_REMEDIES[self.name]} Or leave it out of tracking.with."
            ) from error
        if self.name != "tensorboard":
            run = self._inner.tracker
            run_id = run.id if self.name == "wandb" else run.info.run_id
            known = json.loads(self._ids.read_text("utf-8")) if self._ids.exists() else {}
            write_whole(self._ids, json.dumps(known | {self.name: run_id}) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The settings, before training."""
        self._try(partial(self._inner.store_init_configuration, values))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Numbers of a step."""
        self._try(partial(self._inner.log, values, step=step, **options))

    def store_results(self, results: dict[str, Any]) -> None:
        """Numbers and words that the run ends with, in one row with its settings."""
        self._try(partial(self._inner.store_results, results))

    def finish(self) -> None:
        """Closes it."""
        self._try(self._inner.finish)

    def _try(self, call: Callable[[], Any]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:  # of a library and a network
            self._alive = False
            tqdm.write(
                f"warning: {self.name} is not told of this run any more: {type(error).__name__}: "
                f"{str(error)[:500]} Its folder has everything."
            )


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if not isinstance(value, str)}
