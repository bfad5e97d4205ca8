"""One process or many, whole or sharded, left alone or killed: the same run.

Dropout is 0 where numbers of processes or parts are compared: its masks belong to a process. Where
a run is compared with itself resumed, dropout is on.
"""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cotrain.runtime import checkpoint

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("processes_worker.py")
Job = dict[str, Any]
# Of losses, relative, over 24 steps with learning rates up to 0.005. Sums of float32 in another
# order differ in the last bit, and Adam makes most of it where a gradient is almost zero.
DRIFT = 1e-4

has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="deepspeed is not installed")


def deepspeed_on_cpu(stage: int) -> dict[str, str]:
    """What accelerate launch tells its processes of accelerate_configs/deepspeed_cpu.yaml."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(REPOSITORY / f"ds_configs/cpu_zero{stage}.json"),
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
    }


ON_CPU = {"ACCELERATE_USE_CPU": "true"}
# Name: processes, parts of a step, environment.
WAYS: dict[str, tuple[int, int, dict[str, str]]] = {
    "1 × 8": (1, 1, ON_CPU),
    "2 parts × 4": (1, 2, ON_CPU),
    "2 processes × 4": (2, 1, ON_CPU),
    "ZeRO-1": (2, 1, deepspeed_on_cpu(1)),
    "ZeRO-2, 2 parts": (2, 2, deepspeed_on_cpu(2)),
    "ZeRO-3": (2, 1, deepspeed_on_cpu(3)),
}


@pytest.fixture(scope="module")
def arguments(
    tiny_teacher: str, small_tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A run of 24 steps on 57 users, whose last batch of an epoch has one row."""
    table = tmp_path_factory.mktemp("table") / "interactions.csv"
    rows = pl.read_csv(small_tables[0])
    rows.filter(pl.col("user_id") <= 57).write_csv(table)
    options = {
        "data.interactions": table,
        "data.items": small_tables[1],
        "teacher.model": tiny_teacher,
        "teacher.quantization": "fp32",
        "teacher.num_candidates": 5,
        "teacher.calibration_rows": 4,
        "teacher.compile": "off",
        "distill.teacher_temperature": 0.1,
        "distill.target": "blend",
        "distill.blend_beta": 0.4,
        "distill.confidence": "entropy",
        "query.policy": "entropy",
        "student.hidden_size": 16,
        "student.max_length": 20,
        "train.epochs": 3,
        "train.warmup_epochs": 1,
        "train.batch_size": 8,
        "train.learning_rate": 0.01,
        "train.checkpoint_every_steps": 2,
        "query.fraction": 0.5,
        "eval.bootstrap_samples": 100,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def job(
    logs: Path, processes: int, environment: dict[str, str], *arguments: str, **more: Any
) -> Job:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "logs": str(logs), "processes": processes, "environment": environment, "port": port,
        "arguments": list(arguments), **more,
    }  # fmt: skip


def run_jobs(jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """One after another: exit codes by process, what was killed, seconds."""
    folder.mkdir(exist_ok=True, parents=True)
    files = [folder / "jobs.json", folder / "results.json"]
    files[0].write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, files)], capture_output=True, text=True,
        cwd=REPOSITORY, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(files[1].read_text())


def said(of: Job) -> str:
    """All that its processes wrote."""
    return "\n".join(path.read_text() for path in sorted(Path(of["logs"]).glob("*.log")))


def train_rows(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train" and "loss" in row]


def results(folder: Path) -> dict[str, Any]:
    """All that a run found out, without its times."""
    report = json.loads((folder / "report.json").read_text())
    kept = ("student", "control", "lift", "shipped", "effective_rank", "examples", "dataset")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("teacher_rows_per_s", None)
    return {key: report[key] for key in kept} | {"metrics": rows}


def answers(folder: Path) -> dict[tuple[int, int], Any]:
    """By epoch and user: candidates and the teacher's order."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    found = {(epoch, user): rest for epoch, user, *rest in map(json.loads, lines)}
    assert len(found) == len(lines)  # nobody was asked twice
    return found


# ---- the same whatever the number ---------------------------------------------------------------


@pytest.fixture(scope="module")
def ways(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same run done in every way."""
    base = tmp_path_factory.mktemp("ways")
    chosen = [name for name in WAYS if has_deepspeed or "ZeRO" not in name]
    jobs, folders = [], {}
    for place, name in enumerate(chosen):
        processes, parts, environment = WAYS[name]
        folders[name] = base / str(place)
        own = ["--output_dir", str(folders[name] / "run"), "--student.dropout", "0",
               "--train.accumulation_steps", str(parts)]  # fmt: skip
        record = str(folders[name] / "answers")
        logs = folders[name] / "logs"
        jobs.append(job(logs, processes, environment, *arguments, *own, record=record))
    for result, its in zip(run_jobs(jobs, base), jobs, strict=True):
        assert set(result["codes"]) == {0}, said(its)
    return folders


OTHERS = [
    pytest.param(name, marks=needs_deepspeed if "ZeRO" in name else ()) for name in list(WAYS)[1:]
]
LOSSES = ("loss_ce", "loss_rank", "loss_emb", "control_loss_ce", "teacher_entropy")


@pytest.mark.parametrize("way", OTHERS)
def test_losses_hardly_drift(ways: dict[str, Path], way: str):
    one, other = train_rows(ways["1 × 8"] / "run"), train_rows(ways[way] / "run")
    assert len(one) == len(other) == 24
    drifts = {}
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
        assert ours.get("teacher_rows") == theirs.get("teacher_rows")
        for name in LOSSES:
            if name in ours:
                drift = abs(ours[name] - theirs[name]) / abs(ours[name])
                drifts[name] = max(drift, drifts.get(name, 0.0))
    print(way, {name: f"{drift:.1e}" for name, drift in drifts.items()})
    assert drifts.keys() == set(LOSSES)
    assert max(drifts.values()) < DRIFT


@pytest.mark.parametrize(
    ("options", "count"), [(["--query.when", "offline"], 2 * 28), (["--query.reuse", "2"], 28)]
)
def test_kept_verdicts_are_the_same_for_two_processes(
    arguments: list[str], tmp_path: Path, options: list[str], count: int
):
    folders, jobs = [tmp_path / name for name in ("one", "two")], []
    for processes, folder in enumerate(folders, start=1):
        own = ["--output_dir", str(folder / "run"), "--student.dropout", "0", *options]
        record = str(folder / "answers")
        jobs.append(job(folder / "logs", processes, ON_CPU, *arguments, *own, record=record))
    for result, its in zip(run_jobs(jobs, tmp_path), jobs, strict=True):
        assert set(result["codes"]) == {0}, said(its)
    one, two = (answers(folder / "answers") for folder in folders)
    assert len(one) == count
    assert one == two
    for ours, theirs in zip(*(train_rows(folder / "run") for folder in folders), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & set(LOSSES):
            assert ours[name] == pytest.approx(theirs[name], rel=DRIFT)


@pytest.mark.parametrize("way", OTHERS)
def test_the_same_candidates_get_the_same_verdicts(ways: dict[str, Path], way: str):
    one, other = answers(ways["1 × 8"] / "answers"), answers(ways[way] / "answers")
    assert len(one) == 2 * 28  # half of 57 users in each of two epochs
    assert one == other


@pytest.mark.parametrize("way", OTHERS)
def test_the_evaluation_is_exactly_the_same(ways: dict[str, Path], way: str):
    one, other = (ways[name] / "run" for name in ("1 × 8", way))
    ranks = [pl.read_parquet(folder / "ranks.parquet") for folder in (one, other)]
    assert ranks[0].equals(ranks[1])  # every user once, though 57 are uneven
    assert ranks[0].null_count().sum_horizontal()[0] == 0
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    for name in ("student", "control", "lift", "shipped"):
        assert reports[0][name] == reports[1][name]
    counts = ("rows_asked", "rows_valid", "prompt_tokens", "failures", "target_in_candidates")
    for name in counts:
        assert reports[0]["teacher"][name] == reports[1]["teacher"][name]


def test_both_processes_rank_for_the_teacher(ways: dict[str, Path]):
    _, state = checkpoint.load_latest(ways["2 processes × 4"] / "run")
    tokens = [of_one["meter"]["totals"]["prompt_tokens"] for of_one in state["processes"]]
    assert len(tokens) == 2
    assert min(tokens) > 0.8 * max(tokens)


# ---- killed and resumed -------------------------------------------------------------------------


def kills(folder: Path, processes: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Moments to kill at: every third while a checkpoint is being written."""
    return [
        {
            "folder": str(folder), "seed": 100 * seed + n, "writing": n % 3 == 1,
            "within_s": 0.2, "signal": "SIGKILL", "ranks": [(seed + n) % processes],
        }
        for n in range(count)
    ]  # fmt: skip


def disturbed(
    base: Path, arguments: list[str], processes: int, environment: dict[str, str], count: int,
    seed: int,
) -> tuple[Path, list[dict[str, Any]]]:  # fmt: skip
    """A run that is killed `count` times, resumed every time, and one that is left alone."""
    folder, alone = base / "killed", base / "alone"
    arguments = [*arguments, "--train.epochs", str(max(3, count + 2))]
    jobs = [
        job(base / "alone-logs", processes, environment, *arguments, "--output_dir", str(alone))
    ]
    for n, kill in enumerate(kills(folder, processes, count, seed)):
        words = ["--resume", str(folder)] if n else [*arguments, "--output_dir", str(folder)]
        jobs.append(job(base / f"logs-{n}", processes, environment, *words, kill=kill))
    jobs.append(job(base / "logs-last", processes, environment, "--resume", str(folder)))
    found = run_jobs(jobs, base)
    assert set(found[0]["codes"]) == set(found[-1]["codes"]) == {0}, said(jobs[0]) + said(jobs[-1])
    for its, result in zip(jobs[1:-1], found[1:-1], strict=True):
        assert result["killed"], (result, said(its))
        assert result["codes"][its["kill"]["ranks"][0]] == -9
        # The others end by themselves, and with an error.
        assert all(isinstance(code, int) and code for code in result["codes"]), said(its)
        print(processes, result["killed"], result["codes"], f"{result['seconds']:.1f} s")
    return folder, found


@pytest.mark.parametrize(
    ("processes", "count"),
    [
        (1, 2),
        (2, 1),
        pytest.param(1, 10, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_ends_like_one_left_alone(
    tmp_path: Path, arguments: list[str], processes: int, count: int
):
    folder, _ = disturbed(tmp_path, arguments, processes, ON_CPU, count, seed=count)
    assert results(folder) == results(tmp_path / "alone")
    ranks = [pl.read_parquet(run / "ranks.parquet") for run in (folder, tmp_path / "alone")]
    assert ranks[0].equals(ranks[1])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sharded_run_that_is_killed_ends_like_one_left_alone(
    tmp_path: Path, arguments: list[str], stage: int
):
    folder, _ = disturbed(tmp_path, arguments, 2, deepspeed_on_cpu(stage), 3, seed=stage)
    assert results(folder) == results(tmp_path / "alone")


# ---- stopped, and what cannot go on -------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of two processes that end early, each with its folder, result and words."""
    base = tmp_path_factory.mktemp("ends")
    stop = {"folder": str(base / "stopped"), "seed": 0, "writing": False, "within_s": 0.1,
            "signal": "SIGTERM"}  # fmt: skip
    plain = [*arguments, "--output_dir"]
    jobs = {
        "alone": job(base / "a", 2, ON_CPU, *plain, str(base / "alone")),
        "stopped": job(base / "s", 2, ON_CPU, *plain, str(base / "stopped"), kill=stop),
        "fewer": job(base / "f", 1, ON_CPU, "--resume", str(base / "stopped")),
        "resumed": job(base / "r", 2, ON_CPU, "--resume", str(base / "stopped")),
        "full": job(base / "d", 2, ON_CPU, *plain, str(base / "full"), largest_file=30_000),
    }
    if has_deepspeed:
        jobs["apart"] = job(
            base / "n", 2, deepspeed_on_cpu(2), *plain, str(base / "apart"), without_gloo=True
        )
        jobs["lazy"] = job(
            base / "l", 2, deepspeed_on_cpu(2), *plain, str(base / "lazy"),
            "--train.item_updates", "lazy", "--train.loss", "sampled_softmax",
        )  # fmt: skip
    found = run_jobs(list(jobs.values()), base)
    return {
        name: {"folder": base / name, "said": said(its), **result}
        for (name, its), result in zip(jobs.items(), found, strict=True)
    }


def test_a_scheduler_that_stops_all_processes_leaves_a_checkpoint_to_go_on_from(
    ends: dict[str, Any],
):
    assert ends["stopped"]["killed"]
    assert ends["stopped"]["codes"] == [130, 130], ends["stopped"]["said"]
    assert "--resume" in ends["stopped"]["said"]
    assert ends["alone"]["codes"] == ends["resumed"]["codes"] == [0, 0], ends["resumed"]["said"]
    assert results(ends["stopped"]["folder"]) == results(ends["alone"]["folder"])


def test_resuming_with_another_number_of_processes_is_refused(ends: dict[str, Any]):
    assert ends["fewer"]["codes"] == [1]
    assert "was run by 2 process(es) and would be resumed by 1" in ends["fewer"]["said"]


def test_a_full_disk_ends_every_process_with_the_reason(ends: dict[str, Any]):
    assert ends["full"]["codes"] == [1, 1], ends["full"]["said"]
    assert ends["full"]["said"].count("error: Cannot write checkpoint") == 2
    assert checkpoint.steps(ends["full"]["folder"]) == []


@needs_deepspeed
def test_processes_that_would_train_apart_are_stopped(ends: dict[str, Any]):
    """Regression: on a CPU DeepSpeed counted one process in each of two, and nobody said so."""
    assert ends["apart"]["codes"] == [1, 1], ends["apart"]["said"]
    assert "do not find each other" in ends["apart"]["said"]
    assert "Accelerate 1" in ends["apart"]["said"]
    assert not ends["apart"]["folder"].exists()


@needs_deepspeed
def test_what_cannot_be_sharded_is_refused_before_anything_is_written(ends: dict[str, Any]):
    assert ends["lazy"]["codes"] == [1, 1]
    assert "sparse gradients DeepSpeed cannot shard" in ends["lazy"]["said"]
    assert not ends["lazy"]["folder"].exists()


# ---- by the real launcher -----------------------------------------------------------------------


def launch(config: Path, *arguments: str) -> list[str]:
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    script = str(REPOSITORY / "scripts" / "train_online.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [accelerate, "launch", "--config_file", str(config), "--main_process_port", port, script,
            *arguments]  # fmt: skip


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(12_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run never came to the point at which it was to be stopped")


@pytest.mark.slow
def test_launched_stopped_and_launched_again(arguments: list[str], tmp_path: Path):
    folder, config = tmp_path / "run", REPOSITORY / "accelerate_configs" / "cpu_2_processes.yaml"
    arguments = [*arguments, "--train.epochs", "30"]  # or it ends before it is stopped
    process = subprocess.Popen(
        launch(config, *arguments, "--output_dir", str(folder)), cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: len(checkpoint.steps(folder)) > 1, process)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode
    assert not (folder / "report.json").exists()
    done = subprocess.run(
        launch(config, "--resume", str(folder)), cwd=REPOSITORY, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "report.json").read_text())["environment"]["num_processes"] == 2


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_is_launched_on_a_cpu(arguments: list[str], tmp_path: Path):
    config = REPOSITORY / "accelerate_configs" / "deepspeed_cpu.yaml"
    done = subprocess.run(
        launch(config, *arguments, "--output_dir", str(tmp_path / "run")), cwd=REPOSITORY,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["environment"]["num_processes"] == 2
