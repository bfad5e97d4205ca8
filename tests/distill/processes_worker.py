"""Runs of scripts/train_online.py in processes of their own, without paying for imports each time.

    python processes_worker.py JOBS.json RESULTS.json

A job is a list of command-line arguments, how many processes, what they find in the environment,
and when which of them is killed. All jobs are forks of this process, which has imported everything.
"""

import importlib
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

# A forked child's pool of threads would be its parent's, which stayed behind.
os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_online.py"
# Longer than any job here takes on a slow machine: a process that is still there hangs.
PATIENCE_S = 600


def main(jobs_path: Path, results_path: Path) -> None:
    jobs = json.loads(jobs_path.read_text())
    import_all(any("ACCELERATE_USE_DEEPSPEED" in job["environment"] for job in jobs))
    results = []
    for job in jobs:
        started = time.monotonic()
        codes, killed = run(job)
        results.append({"codes": codes, "killed": killed, "seconds": time.monotonic() - started})
        results_path.write_text(json.dumps(results))


def import_all(with_deepspeed: bool) -> None:
    import torch
    import torch._dynamo
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401

    import cotrain.distill.run  # noqa: F401

    torch.set_num_threads(1)
    if with_deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")


def run(job: dict[str, Any]) -> tuple[list[int | str], list[dict[str, Any]]]:
    """Exit codes by process, and what was killed."""
    logs = Path(job["logs"])
    logs.mkdir(parents=True, exist_ok=True)
    started, world = time.monotonic(), job["processes"]
    if "kill" in job:
        folder = Path(job["kill"]["folder"]) / "checkpoints"
        job["kill"] |= {"folder": folder, "latest": latest_step(folder)}
    children = [fork(job, rank, world, logs) for rank in range(world)]
    killed = []
    if "kill" in job:
        fact = wait_for_moment(job["kill"], started, children)
        if fact is not None:
            ranks = job["kill"].get("ranks", range(world))
            for rank in ranks:
                os.kill(children[rank], signal.Signals[job["kill"]["signal"]])
            killed.append(fact | {"ranks": list(ranks)})
    codes: list[int | None] = [None] * world
    while None in codes and time.monotonic() < started + PATIENCE_S:
        for rank, child in enumerate(children):
            if codes[rank] is None and (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    for rank, child in enumerate(children):
        if codes[rank] is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return ["hangs" if code is None else code for code in codes], killed


def fork(job: dict[str, Any], rank: int, world: int, logs: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(logs / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world > 1 or "ACCELERATE_USE_DEEPSPEED" in job["environment"]:
            os.environ |= {
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(job["port"]),
            }  # fmt: skip
        os.environ |= job["environment"]
        if "record" in job:
            record_answers(Path(job["record"]) / f"{rank}.jsonl")
        if "largest_file" in job:  # as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        if job.get("without_gloo"):
            forget_gloo()
        sys.argv = [str(SCRIPT), *job["arguments"]]
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def forget_gloo() -> None:
    """Start Accelerate as a program does that knows nothing of DeepSpeed on a CPU."""
    processes: Any = importlib.import_module("cotrain.runtime.processes")
    handler = processes.InitProcessGroupKwargs
    processes.InitProcessGroupKwargs = lambda backend: handler()


def record_answers(path: Path) -> None:
    """Write down whom the teacher was asked about, on what, and what it said."""
    from cotrain.distill.querying import Teacher

    path.parent.mkdir(parents=True, exist_ok=True)
    ask = Teacher.ask

    def recorded(self: Any, batch: Any, candidates: Any, epoch: int) -> Any:
        verdict, asked = ask(self, batch, candidates, epoch)
        with path.open("a") as file:
            for row in asked.nonzero().flatten().tolist():
                user, items = int(batch.user_index[row]), candidates.item_ids[row].tolist()
                order = verdict.ranking[row].tolist()
                file.write(json.dumps([epoch, user, items, order]) + "\n")
        return verdict, asked

    Teacher.ask = recorded


def wait_for_moment(
    moment: dict[str, Any], started: float, children: list[int]
) -> dict[str, Any] | None:
    """Wait until it is time to kill; None where the job ended before.

    Args:
        moment: Up to `within_s` after a further checkpoint is there; or, if `writing`, while the
            one after that is being written.
        started: When the job was.
        children: Its processes.
    """
    folder: Path = moment["folder"]
    draw = random.Random(moment["seed"])
    latest = moment["latest"]
    while time.monotonic() < started + PATIENCE_S:
        if any(os.path.exists(f"/proc/{child}/stat") and is_dead(child) for child in children):
            return None
        if latest_step(folder) > latest:
            break
        time.sleep(0.005)
    if moment["writing"]:
        while not any(is_dead(child) for child in children):
            if written := list(folder.glob(".step_*.tmp")):
                return {"while": f"writing {written[0].name}"}
        return None
    pause = draw.uniform(0, moment["within_s"])
    time.sleep(pause)
    return None if any(map(is_dead, children)) else {"while": f"training, after {pause:.3f} s"}


def latest_step(folder: Path) -> int:
    """Of the checkpoints there; -1 without."""
    names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def is_dead(child: int) -> bool:
    """Whether it has ended, and waits to be asked how."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
