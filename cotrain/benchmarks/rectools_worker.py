"""RecTools' side of `scripts/benchmark.py student`: one training epoch and one evaluation, timed.

    python rectools_worker.py JOB.json RESULT.json

Runs in an environment of its own that has no cotrain, so it imports nothing of it; the job is what
`cotrain.benchmarks.student` writes. Everything goes through RecTools' public entry points, with
the settings that its default trainer has.
"""

# The libraries below are in that environment and not in the one that is type-checked.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.version import VERSION
from tqdm import tqdm

WARMUP_STEPS = 3


class EpochTimer(Callback):
    """Seconds from the first batch of an epoch to the end of its last step, and what it trained."""

    def __init__(self, show: bool):
        self.show = show
        self.seconds = self.cpu_seconds = 0.0
        self.steps = self.positions = self.computed_positions = 0
        self.loss = float("nan")

    def on_train_epoch_start(self, trainer, module):
        self.bar = tqdm(
            total=trainer.num_training_batches,
            desc="RecTools epoch",
            leave=False,
            disable=not self.show,
            mininterval=2,
        )
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.steps += 1
        self.positions += int((batch["y"] != 0).sum())
        self.computed_positions += batch["x"].numel()
        self.bar.update()

    def on_train_epoch_end(self, trainer, module):
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = time.process_time() - self._cpu_started
        self.bar.close()
        self.loss = float(trainer.callback_metrics["train_loss"])


def trainer(callback: Callback, max_steps: int | None) -> Trainer:
    """One epoch, as RecTools' default trainer runs it, on the CPU."""
    return Trainer(
        max_epochs=1,
        min_epochs=1,
        accelerator="cpu",
        devices=1,
        limit_train_batches=max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )


def dataset(items: np.ndarray, offsets: np.ndarray, left_out: int) -> Dataset:
    """Every user's interactions but the last `left_out`, in their order."""
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(items)) - np.repeat(offsets[:-1], lengths)
    kept = place < np.repeat(lengths - left_out, lengths)
    frame = pd.DataFrame(
        {
            Columns.User: user[kept],
            Columns.Item: items[kept],
            Columns.Weight: 1.0,
            # RecTools orders a user's interactions by time; the place in the history is the order.
            Columns.Datetime: pd.Timestamp("2020-01-01") + pd.to_timedelta(place[kept], unit="s"),
        }
    )
    return Dataset.construct(frame)


def model(job: dict) -> SASRecModel:
    """RecTools' SASRec at the job's size; all that is not named here is RecTools' default."""
    return SASRecModel(
        n_factors=job["hidden_size"],
        n_blocks=job["num_layers"],
        n_heads=job["num_heads"],
        session_max_len=job["max_length"],
        dropout_rate=job["dropout"],
        loss=job["loss"],
        n_negatives=job["num_negatives"],
        gbce_t=job["gbce_calibration"],
        batch_size=job["batch_size"],
        lr=job["learning_rate"],
        recommend_batch_size=job["eval_batch_size"],
        recommend_torch_device="cpu",
        epochs=1,
    )


def recall_at_10(recommended: pd.DataFrame, items: np.ndarray, offsets: np.ndarray) -> float:
    """Share of all users whose last item is among the ten."""
    target = items[offsets[1:] - 1]
    hits = recommended[Columns.Item].to_numpy() == target[recommended[Columns.User].to_numpy()]
    return float(hits.sum() / len(target))


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far.

    Linux's own count where there is one: `ru_maxrss` there starts at the size of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(job_path: Path, result_path: Path) -> None:
    """Train the warm-up, time the epoch and the recommendation of all users, write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    arrays = np.load(job["arrays"])
    items, offsets = arrays["items"], arrays["offsets"]
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(job["seed"])

    started = time.perf_counter()
    known_for_training, known_for_test = dataset(items, offsets, 2), dataset(items, offsets, 1)
    users = np.arange(len(offsets) - 1)
    sasrec = model(job)
    # A first fit of a few steps starts thread pools and caches; the second builds the model anew.
    sasrec._trainer = trainer(EpochTimer(show=False), WARMUP_STEPS)
    sasrec.fit(known_for_training)
    timer = EpochTimer(show=True)
    sasrec._trainer = trainer(timer, job["max_steps"])
    setup_s = time.perf_counter() - started
    sasrec.fit(known_for_training)
    # RecTools copies the trainer, and with it the callback.
    timer = next(c for c in sasrec.fit_trainer.callbacks if isinstance(c, EpochTimer))

    sasrec.recommend(users[: job["eval_batch_size"]], known_for_test, 10, filter_viewed=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    recommended = sasrec.recommend(users, known_for_test, 10, filter_viewed=True)
    evaluate_s = time.perf_counter() - started
    evaluate_cpu_s = time.process_time() - cpu_started

    item_net = sasrec.torch_model.item_model
    parameters = sum(weight.numel() for weight in sasrec.torch_model.parameters())
    result = {
        "library": f"RecTools {VERSION}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "epoch_s": timer.seconds,
        "epoch_cpu_s": timer.cpu_seconds,
        "evaluate_s": evaluate_s,
        "evaluate_cpu_s": evaluate_cpu_s,
        "setup_s": setup_s,
        "steps": timer.steps,
        "positions": timer.positions,
        "computed_positions": timer.computed_positions,
        "items": item_net.n_items - 1,
        "parameters": parameters,
        "parameters_beside_items": parameters - item_net.n_items * job["hidden_size"],
        "users_ranked": int(recommended[Columns.User].nunique()),
        "train_loss": timer.loss,
        "recall@10": recall_at_10(recommended, items, offsets),
        "peak_memory_mb": peak_memory_mb(),
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
