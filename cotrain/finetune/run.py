"""A teacher's training, whole: from settings to an adapter and a report.

The folder: `adapter/` as peft saves it, `config.yaml`, `environment.json`, `metrics.jsonl` and
TensorBoard events, `checkpoints/` while it trains, `report.json` and `report.html` at its end.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from cotrain import config as configuration
from cotrain.config import FinetuneConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import CheckpointError, ConfigError, TeacherError
from cotrain.files import write_whole
from cotrain.finetune.examples import Example, Examples, make_examples, open_student
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.quality import metrics_of
from cotrain.finetune.report import write_report
from cotrain.finetune.tuning import Progress
from cotrain.runtime import checkpoint, tracking
from cotrain.runtime.processes import make_accelerator
from cotrain.runtime.seeding import seed_everything
from cotrain.student.recommender import Recommender
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.tokenizer import load_tokenizer

Mode = Literal["direct", "generate", "cot", "bigrec", "pointwise"]
# May change between a call that was interrupted and the one that goes on.
_MAY_CHANGE = {
    "output", "sft.micro_batch_tokens", "sft.gradient_checkpointing", "sft.patience",
    "teacher.batch_tokens", "star.rounds", "teacher.compile",
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What a method is given.

    Attributes:
        config: Settings; `teacher.mode` is the method's.
        method: Its name.
        data: Interactions and catalogue.
        student: Whose candidates are ranked; none where they are drawn.
        examples: Rows to learn from, and of held-out users.
        ranker: The teacher with the adapter on it; ranks at any moment as it then is.
        adapter: What is trained.
        accelerator: Device and processes.
        log: Takes metrics.
        folder: Of the training.
        say: Prints a line, once over all processes.
    """

    config: FinetuneConfig
    method: str
    data: InteractionData
    student: Recommender | None
    examples: Examples
    ranker: RankLLM
    adapter: TrainableAdapter
    accelerator: Accelerator
    log: tracking.MetricsLog
    folder: Path
    say: Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """Something to read in the report: lines above each other."""

    heading: str
    lines: Sequence[str]


@dataclass
class Outcome:
    """What a method has to tell; the adapter then holds what is to be kept.

    Attributes:
        progress: Of its last fit; none where it fits in another way.
        facts: For the report, by name.
        tables: By heading, rows as dicts of the same keys.
        samples: To read.
        keeps_adapter: Whether there is an adapter to save.
    """

    progress: Progress | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    keeps_adapter: bool = True


Method = Callable[[Context], Outcome]


def open_folder(folder: Path, config: FinetuneConfig, method: str) -> bool:
    """See that a training can begin there, or go on.

    Returns:
        Whether it goes on.

    Raises:
        ConfigError: It holds a finished training, one of other settings, or something else.
    """
    known = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; expected a folder, or nothing yet.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not known.is_file():
        raise ConfigError(
            f"output {folder} holds other files and no training; nothing is overwritten. Choose "
            "another --output."
        )
    if (folder / "report.json").exists():
        raise ConfigError(
            f"output {folder} holds a finished training; see {folder / 'report.html'}. Choose "
            "another --output, or delete it."
        )
    content = yaml.safe_load(known.read_text("utf-8"))
    before = configuration.flat(content if isinstance(content, dict) else {})
    facts = folder / "environment.json"
    if facts.is_file():
        before["method"] = json.loads(facts.read_text("utf-8")).get("method")
    now = configuration.flat({"method": method, **configuration.to_dict(config)})
    listed = configuration.differences(before, now, _MAY_CHANGE)
    if listed:
        raise ConfigError(
            f"output {folder} holds a training of other settings: {listed}. Choose another "
            "--output, or the same settings to go on."
        )
    return True


def run(
    method: str, work: Method, mode: Mode, config: FinetuneConfig, last: bool = True
) -> dict[str, Any]:
    """Train a teacher by one method.

    Args:
        method: Its name.
        work: Does it.
        mode: In which mode the teacher is asked.
        config: Settings; `teacher.mode` is replaced.
        last: Whether nothing comes after it that the processes do together.

    Returns:
        The report, as written to report.json.

    Raises:
        CotrainError: Before any training, if settings, data or teacher cannot work.
        Interrupted: After Ctrl-C or SIGTERM; the same command goes on.
    """
    started = time.perf_counter()
    config = replace(config, teacher=replace(config.teacher, mode=mode))
    context = prepare(method, config)
    start = context.examples.validation
    places = np.array([row.target_place for row in start])
    outcome = work(context)
    config, folder, accelerator = context.config, context.folder, context.accelerator
    report: dict[str, Any] = {
        "method": method,
        "data": context.data.name,
        "teacher": config.teacher.model,
        "quantization": config.teacher.quantization,
        "rows": len(context.examples.train),
        "validation_rows": len(start),
        "held_out_users": context.examples.num_validation,
        "trained_parameters": sum(p.numel() for p in context.adapter.parameters.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(peak_memory(accelerator.device) / 2**30, 2),
        "processes": accelerator.num_processes,
        **outcome.facts,
    }
    # Drawn candidates stand in no order of a student.
    if context.student is not None:
        report["student_order"] = metrics_of(places + 1)
    report["any_order"] = any_order(config.teacher.num_candidates)
    if outcome.progress is not None:
        report |= _of_progress(outcome.progress)
    report["tables"] = outcome.tables
    if accelerator.is_main_process:
        if outcome.keeps_adapter:
            context.adapter.save(folder / "adapter")
        page = write_report(
            report, outcome.samples, configuration.to_dict(config), context.log.rows(), folder
        )
        for checkpoints in [folder / "checkpoints", *folder.glob("*/checkpoints")]:
            shutil.rmtree(checkpoints, ignore_errors=True)
        _say_result(report, page, context)
    accelerator.wait_for_everyone()
    context.log.close()
    if last:
        accelerator.state.destroy_process_group()
    return report


def prepare(method: str, config: FinetuneConfig) -> Context:
    """Everything before the first step; errors as for `run`."""
    accelerator = make_accelerator()
    folder = Path(config.output or f"teachers/{Path(config.data.name).name}-{method}")
    config = replace(config, output=str(folder))
    goes_on = open_folder(folder, config, method)
    accelerator.wait_for_everyone()  # all have looked before one writes
    tracking.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    say = accelerator.print
    with accelerator.main_process_first():
        data = load_interactions(config.data)
    say(f"Data: {data.name}, {data.num_users:,} users, {data.num_items:,} items")
    settings = config.teacher
    if settings.num_candidates > data.num_items:
        raise ConfigError(
            f"teacher.num_candidates is {settings.num_candidates}, but the catalogue has only "
            f"{data.num_items} items; expected at most that many."
        )
    student = open_student(config.examples, data)
    assert settings.model is not None  # checked with the settings
    # Prompts first: what cannot be asked is found out before the weights are read.
    tokenizer, max_context_tokens = load_tokenizer(settings.model)
    prompts = make_prompts(
        settings, tokenizer, data.catalog.titles, data.catalog.categories, max_context_tokens,
        data.popularity_levels.tolist(),
    )  # fmt: skip
    examples = make_examples(
        data, config.examples, settings.num_candidates, config.seed, student,
        accelerator.is_main_process,
    )  # fmt: skip
    say(
        f"Examples: {len(examples.train):,} rows of {examples.drawn:,} training positions looked "
        f"at; validation: {len(examples.validation):,} rows whose candidates hold the true item, "
        f"of {examples.num_validation:,} held-out users"
    )
    say(f"Teacher: {settings.model}, {settings.quantization}, loading …")
    with accelerator.main_process_first():
        backbone = load_backbone(
            settings.model, settings.quantization, accelerator.device, settings.compute
        )
        ranker = RankLLM(backbone, prompts, settings, train_counts=data.train_counts)
        ranker.prepare()
    # Dropout of processes differs; the adapter's first weights do not.
    adapter = TrainableAdapter(backbone, config.lora, config.seed, settings.adapter)
    seed_everything(config.seed, accelerator.process_index)
    trained = sum(p.numel() for p in adapter.parameters.values())
    say(
        f"Adapter: {trained / 1e6:.2f} M weights on {backbone.num_parameters / 1e6:,.0f} M frozen, "
        f"from {settings.adapter or 'nothing'}; products in {backbone.compute}"
    )
    log_bytes, step = 0, None
    if goes_on and checkpoint.steps(folder):
        _, state = checkpoint.load_latest(folder)
        log_bytes, step = int(state["log_bytes"]), int(state["progress"]["step"])
    if accelerator.is_main_process:
        _write_facts(folder, config, method, accelerator)
    accelerator.wait_for_everyone()
    log = tracking.MetricsLog(folder, accelerator, log_bytes, step)
    say(f"Folder: {folder}\n")
    return Context(
        config, method, data, student, examples, ranker, adapter, accelerator, log, folder, say
    )


def _write_facts(
    folder: Path, config: FinetuneConfig, method: str, accelerator: Accelerator
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "method": method,
            **tracking.environment(accelerator.device, accelerator.num_processes),
        }
        write_whole(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
        half = folder / ".config.yaml.tmp"
        configuration.save(config, half)
        os.replace(half, folder / "config.yaml")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {folder}: {error.strerror}. Choose another --output."
        ) from error


def any_order(num_candidates: int) -> dict[str, float]:
    """What an order without any knowledge gets, on average, exactly."""
    return metrics_of(np.arange(1, num_candidates + 1))


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by PyTorch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def check_verdicts(measured_valid: int, rows: int, failures: dict[str, int], config: Any) -> None:
    """Whether the teacher says anything at all.

    Raises:
        TeacherError: It does not.
    """
    if not measured_valid:
        raise TeacherError(
            f"The teacher {config.teacher.model!r}, quantization {config.teacher.quantization}, "
            f"mode {config.teacher.mode}, gives no verdict on any of {rows} validation rows: "
            f"{failures}. Try --teacher.quantization bf16 or fp32, or another model."
        )


def title_lines(context: Context, example: Example, ranking: Sequence[int] = ()) -> list[str]:
    """A row in words, for a sample: the last titles, and the candidates that are right."""
    titles = context.data.catalog.titles
    shown = example.history[-context.config.teacher.history_length :]
    lines = ["History: " + "; ".join(titles[item] for item in shown)]
    lines.append(f"Taken next: {titles[example.target]}")
    if ranking:
        best = [titles[example.candidates[place]] for place in ranking[:3]]
        lines.append("Ranked first: " + "; ".join(best))
    return lines


def _of_progress(progress: Progress) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "best_step": int(progress.best.get("step", 0)),
        "validation_start": _without_step(progress.start),
        "validation_best": _without_step(progress.best),
        "rows_per_s": round(progress.rows / max(progress.seconds, 1e-9), 3),
        "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "training_seconds": round(progress.seconds, 1),
        "micro_batch_tokens": progress.micro_batch_tokens,
        "memory_backoffs": progress.backoffs,
    }


def _without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _say_result(report: dict[str, Any], page: Path, context: Context) -> None:
    say = context.say
    lines = [
        ("any order", report["any_order"]),
        ("student's own order", report.get("student_order")),
        ("teacher before", report.get("validation_start")),
        ("teacher after", report.get("validation_best")),
    ]
    say(f"\n{report['validation_rows']:,} held-out rows:{'':8}accuracy@1  ndcg@10     mrr")
    for name, values in lines:
        if values:
            say(
                f"  {name:26}  {values['accuracy@1']:.4f}   {values['ndcg@10']:.4f}  "
                f"{values['mrr']:.4f}"
            )
    say(f"Peak memory {report['peak_memory_gb']:.2f} GB, {report['seconds']:.0f} s")
    if (context.folder / "adapter").is_dir():
        say(f"\nAdapter: {context.folder / 'adapter'}   (--teacher.adapter)")
    say(f"Report: {page}")
