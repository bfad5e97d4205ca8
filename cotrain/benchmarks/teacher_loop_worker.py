"""`scripts/benchmark.py teacher --loop`: a short co-training run, and its teacher alone.

python -m cotrain.benchmarks.teacher_loop_worker JOB.json RESULT.json
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.distill.loop import fit
from cotrain.distill.run import prepare
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict

# One epoch without the teacher, because a run has some; what is timed are the others.
EPOCHS, WARMUP_EPOCHS = 3, 1


class Moment(NamedTuple):
    """A reading of both clocks, and the programs that were compiled until then."""

    seconds: float
    cpu_seconds: float
    programs: int


def now() -> Moment:
    """This moment."""
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return Moment(time.perf_counter(), time.process_time(), programs)


class Recorder:
    """A ranker that remembers what it was asked.

    Attributes:
        ranker: Does the work.
        asks: Arguments of each call of `rank`.
        seconds, cpu_seconds: Spent in them.
        calibrated_at: When teaching began, by `now`.
    """

    def __init__(self, ranker: RankLLM):
        self.ranker = ranker
        self.asks: list[tuple[Sequence[Any], Sequence[Any], Sequence[Any]]] = []
        self.seconds = self.cpu_seconds = 0.0
        self.calibrated_at = now()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranker, name)

    def calibrate(self, *args: Any) -> TeacherVerdict:
        """As the ranker."""
        verdict = self.ranker.calibrate(*args)
        self.calibrated_at = now()
        return verdict

    def rank(
        self, histories: Sequence[Any], candidates: Sequence[Any], seeds: Sequence[Any]
    ) -> TeacherVerdict:
        """As the ranker."""
        started = now()
        verdict = self.ranker.rank(histories, candidates, seeds)
        ended = now()
        self.seconds += ended.seconds - started.seconds
        self.cpu_seconds += ended.cpu_seconds - started.cpu_seconds
        self.asks.append((histories, candidates, seeds))
        return verdict


def run_config(job: dict[str, Any], folder: Path) -> Config:
    """The recipe's settings, cut short."""
    options = {
        "data.name": job["data"],
        "teacher.model": job["model"],
        "teacher.quantization": job["quantization"][0],
        "teacher.compute": job["compute"],
        "teacher.compile": job["compile"],
        "teacher.batch_tokens": job["batch_tokens"] or "none",
        "teacher.num_candidates": job["num_candidates"],
        "teacher.history_length": job["history_length"],
        "train.epochs": EPOCHS,
        "train.warmup_epochs": WARMUP_EPOCHS,
        "train.control": "true",
        "seed": job["seed"],
        "output_dir": folder / "run",
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    return configuration.parse(argv, Path(job["recipe"]))


def main(job_path: Path, result_path: Path) -> None:
    """Train, rank the same rows again without a student, write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="cotrain-benchmark-") as folder:
        state, run = prepare(run_config(job, Path(folder)))
        torch.set_num_threads(job["threads"])
        assert run.teacher is not None
        assert isinstance(run.teacher.ranker, RankLLM)
        recorder = Recorder(run.teacher.ranker)
        ranker: Any = recorder
        run = dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, ranker=ranker))
        fit(state, run)
        started, ended = recorder.calibrated_at, now()
        run.accelerator.end_training()
    histories, candidates, seeds = (
        [row for ask in recorder.asks for row in ask[place]] for place in range(3)
    )
    before = now()
    alone = recorder.ranker.rank(histories, candidates, seeds)
    after = now()
    result = {
        "epochs": EPOCHS - WARMUP_EPOCHS,
        "steps": len(recorder.asks),
        "rows": len(seeds),
        "wall_s": ended.seconds - started.seconds,
        "wall_cpu_s": ended.cpu_seconds - started.cpu_seconds,
        "teacher_s": recorder.seconds,
        "teacher_cpu_s": recorder.cpu_seconds,
        "alone_s": after.seconds - before.seconds,
        "alone_cpu_s": after.cpu_seconds - before.cpu_seconds,
        "programs_compiled": ended.programs - started.programs,
        "prompt_tokens": alone.prompt_tokens,
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
