"""A whole run: from settings to an exported student and a report."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.data.item_text import identity, item_texts, kept, sentence_vectors
from cotrain.distill import warm_up
from cotrain.distill.loop import Run, fit
from cotrain.distill.nearness import NearnessRanker
from cotrain.distill.outcome import finish
from cotrain.distill.querying import Query, Teacher
from cotrain.distill.rationales import Rationales
from cotrain.distill.state import CotrainState, new_state, restore_checkpoint
from cotrain.errors import CheckpointError, ConfigError, DataError, TeacherError
from cotrain.rationale.store import RationaleStore
from cotrain.runtime import checkpoint, tracking, zero
from cotrain.runtime.processes import make_accelerator
from cotrain.runtime.seeding import seed_everything
from cotrain.runtime.trackers import require_packages
from cotrain.student.architectures import student_class
from cotrain.student.losses import make_loss
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.compiled import compile_layers, compiling_pays, uncompile_layers
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.tokenizer import load_tokenizer


def open_folder(config: Config) -> Config:
    """Choose the folder of a new run.

    Returns:
        The settings with `output_dir` filled in; that folder is not yet made.

    Raises:
        ConfigError: The folder holds a run already, or something that is not a run, or may not be
            written.
    """
    if config.output_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        config = replace(config, output_dir=f"runs/{Path(config.data.name).name}-{stamp}")
    folder = Path(str(config.output_dir))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; expected a folder, or nothing yet.")
    if folder.is_dir() and any(folder.iterdir()):
        has = "a run" if (folder / "config.yaml").exists() else "other files"
        raise ConfigError(
            f"output_dir {folder} holds {has} already and nothing is overwritten. Choose another "
            f"--output_dir, or go on with an interrupted run by --resume {folder}."
        )
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "is read-only" if above.is_dir() else "is a file"
        raise ConfigError(
            f"output_dir {folder} cannot be made: {above} {what}. Choose another --output_dir."
        )
    return config


def open_interrupted(folder: Path) -> Config:
    """Settings of a run that is to be resumed.

    Raises:
        CheckpointError: There is no run, it has no checkpoint, or it has ended.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"--resume {folder}: no config.yaml there; expected a run folder.")
    if (folder / "report.json").exists():
        raise CheckpointError(f"--resume {folder}: this run has ended; see {folder}/report.html.")
    if not checkpoint.steps(folder):
        raise CheckpointError(
            f"--resume {folder}: no checkpoint was written yet; delete the folder and start anew."
        )
    config = configuration.parse(["--config", str(folder / "config.yaml")])
    return replace(config, output_dir=str(folder))


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate, export and report.

    Args:
        config: Settings; with `resume`, those of the interrupted run in `output_dir`.
        resume: Go on from the latest checkpoint.

    Returns:
        The report, as written to report.json.

    Raises:
        CotrainError: Before any training, if settings, data or teacher cannot work.
        Interrupted: After Ctrl-C or SIGTERM, with a checkpoint written.
    """
    state, this_run = prepare(config, resume)
    fit(state, this_run)
    report = finish(state, this_run)
    this_run.accelerator.end_training()
    return report


def prepare(
    config: Config, resume: bool = False, adapter: str | None = None
) -> tuple[CotrainState, Run]:
    """Everything before the first step.

    Args:
        config: As for `run`, like `resume` and what is raised.
        resume: Go on from the latest checkpoint.
        adapter: Of the teacher; none: the one of the settings.
    """
    require_packages(config.tracking.names)
    if config.train.warm_start is not None and not resume:
        warm_up.require(config)
    student_class(config.student.architecture)
    accelerator = make_accelerator()
    if zero.stage(accelerator) and config.train.item_updates == "lazy":
        raise ConfigError(
            "train.item_updates is lazy, whose sparse gradients DeepSpeed cannot shard. Set "
            "train.item_updates all, or launch with accelerate_configs/multi_gpu.yaml."
        )
    if zero.stage(accelerator) and config.train.rounds > 1:
        raise ConfigError(
            f"train.rounds is {config.train.rounds}, and between rounds DeepSpeed cannot make way "
            "for the teacher's training. Set train.rounds 1, or launch with "
            "accelerate_configs/multi_gpu.yaml."
        )
    if config.train.batch_size < accelerator.num_processes:
        raise ConfigError(
            f"train.batch_size is {config.train.batch_size} for {accelerator.num_processes} "
            "processes; it counts users over all of them, so expected at least as many."
        )
    if not resume:
        # Every process checks, and all take the main one's folder: its name may hold the time.
        chosen = [open_folder(config)]
        broadcast_object_list(chosen)
        config = chosen[0]
    folder = Path(str(config.output_dir))
    tracking.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    seed_everything(config.seed)  # on every process alike, until the models are made
    say = accelerator.print
    with accelerator.main_process_first():  # one process downloads, the others find it
        data = load_interactions(config.data)
    say(
        f"Data: {data.name}, {data.num_users:,} users, {data.num_items:,} items, "
        f"{data.num_interactions:,} interactions"
    )
    for note in data.notes:
        say(f"  {note}")
    check_against_data(config, data, accelerator.num_processes)
    rationales = open_rationales(config, data, say)
    teacher = None
    if config.distill.ranker == "nearness":
        with accelerator.main_process_first():
            teacher = make_nearness(config, data, accelerator, say)
    elif config.teacher.model is not None:
        with accelerator.main_process_first():
            asked = replace(config.teacher, adapter=adapter or config.teacher.adapter)
            teacher = make_teacher(replace(config, teacher=asked), data, accelerator.device, say)
    item_text = None
    if not resume and config.train.warm_start is None:  # else they have started
        with accelerator.main_process_first():  # one process encodes, the others find it kept
            item_text = encode_items(config, data, teacher, accelerator)
    loss = make_loss(
        config.train.loss, data.train_counts, accelerator.device, config.train.label_smoothing,
        config.train.num_negatives, config.train.negatives_power, config.train.logq_correction,
        config.train.gbce_calibration,
    )  # fmt: skip
    state = new_state(
        data.num_items, None if teacher is None else teacher.ranker.state_size, config,
        accelerator, item_text, None if rationales is None else rationales.matched,
    )  # fmt: skip
    if accelerator.process_index:
        seed_everything(config.seed, accelerator.process_index)
    log_bytes = 0
    if resume:
        log_bytes = restore_checkpoint(state, folder, accelerator)
        if teacher is not None:
            teacher.ranker.identifier_bias = state.identifier_bias
            if teacher.query.follows_student:
                teacher.query.settle(state.epoch, state.asking.numpy())
        say(f"Resuming {folder} at step {state.step}")
    elif accelerator.is_main_process:
        make_folder(folder, config, accelerator)
    accelerator.wait_for_everyone()
    if config.train.warm_start is not None and not resume:
        log_bytes = warm_up.start(state, folder, config, accelerator)
        say(f"Warm-up: taken over from {config.train.warm_start}, step {state.step}")
    log = tracking.MetricsLog(
        folder, accelerator, log_bytes, state.step if resume else None, config.tracking.names,
        configuration.flat(configuration.to_dict(config)),
    )  # fmt: skip
    say_plan(config, data, state, teacher, folder, say)
    return state, Run(config, data, teacher, rationales, loss, accelerator, log, folder)


def open_rationales(config: Config, data: InteractionData, say: Any) -> Rationales | None:
    """The rationales that the settings name, each found in the training data.

    Raises:
        DataError: They cannot be read, or are not of these data and this split.
    """
    if config.distill.rationales is None:
        return None
    matched = RationaleStore.open(Path(config.distill.rationales)).match(data)
    rationales = Rationales(matched, config.distill)
    facts = rationales.facts(data)
    say(
        f"Rationales: {facts['rows']:,} for {facts['users']:,} of {data.num_users:,} users, "
        f"{facts['dimension']} dimensions by {facts['encoder']}"
    )
    return rationales


def check_against_data(config: Config, data: InteractionData, num_processes: int) -> None:
    """Settings that only the data can refute.

    Raises:
        ConfigError: More candidates than items.
        DataError: Too few users with something to train on.
    """
    if config.has_teacher and config.teacher.num_candidates > data.num_items:
        raise ConfigError(
            f"teacher.num_candidates is {config.teacher.num_candidates}, but the catalogue has "
            f"only {data.num_items} items; expected at most that many."
        )
    if len(data.trained_users) < num_processes:
        raise DataError(
            f"{len(data.trained_users)} of {data.num_users} users have two interactions or more in "
            "training, beside what is held out for validation and test: one to predict from, one "
            f"to learn. Expected at least {num_processes}, one a process; bring longer histories."
        )


def make_folder(folder: Path, config: Config, accelerator: Accelerator) -> None:
    """Make the run folder with the settings and the environment in it."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration.save(config, folder / "config.yaml")
    facts = tracking.environment(accelerator.device, accelerator.num_processes)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")


def encode_items(
    config: Config, data: InteractionData, teacher: Teacher | None, accelerator: Accelerator
) -> Tensor | None:
    """Text embeddings (items, E) that the student starts from, or None where it starts random.

    Raises:
        AssetError, DataError: The sentence encoder cannot be had.
    """
    encoder = config.student.item_text
    if encoder is None:
        return None
    if encoder != "teacher":
        return _sentences(encoder, data, accelerator)
    texts, shown = item_texts(data.catalog), accelerator.is_main_process
    assert teacher is not None  # checked with the settings, and that it is a language model
    assert isinstance(teacher.ranker, RankLLM)
    ranker = teacher.ranker
    backbone = ranker.backbone
    name = f"teacher {identity(backbone.name)} {backbone.quantization} {backbone.compute} "
    name += f"{backbone.adapter_version} {config.teacher.max_title_tokens} tokens"
    return kept(texts, name, lambda: ranker.embed_items(shown))


def _sentences(encoder: str, data: InteractionData, accelerator: Accelerator) -> Tensor:
    texts = item_texts(data.catalog)
    return kept(
        texts, identity(encoder),
        lambda: sentence_vectors(texts, encoder, accelerator.device, accelerator.is_main_process),
    )  # fmt: skip


def make_nearness(
    config: Config, data: InteractionData, accelerator: Accelerator, say: Any
) -> Teacher:
    """The yardstick of a teacher.

    Raises:
        AssetError, DataError: The sentence encoder cannot be had.
    """
    encoder = config.teacher.grounding_encoder
    say(f"Teacher: nearness of texts by {encoder}, in place of a language model")
    vectors = _sentences(encoder, data, accelerator)
    ranker = NearnessRanker(vectors, config.teacher, config.distill.teacher_temperature)
    users = data.trained_users[:256].tolist()
    histories = [data.train_history(user).tolist() for user in users]
    any_items = [list(range(1, config.teacher.num_candidates + 1))] * len(users)
    rate = len(users) / ranker.rank(histories, any_items, []).seconds
    return Teacher(
        ranker, _query(config, data), config.teacher.num_candidates, config.seed, rate
    )  # fmt: skip


def _query(config: Config, data: InteractionData) -> Query:
    return Query(data.trained_users, config.query.fraction, config.seed, config.query.policy)


_REMEDIES = {
    "non_finite": "Try --teacher.quantization bf16 or fp32, or another model.",
    "out_of_memory": "Take a smaller model or quantization, or fewer candidates or titles.",
} | dict.fromkeys(
    ("empty", "no_identifier", "unknown_identifier"),
    "It does not write what it is asked for: try --teacher.mode direct, or a model tuned on "
    "instructions.",
)


def load_ranker(config: Config, data: InteractionData, device: torch.device, say: Any) -> RankLLM:
    """Load the language model that the settings name, with the prompts of these data.

    Raises:
        AssetError, TeacherError, ConfigError: It cannot be loaded, its identifiers cannot be
            scored, or its context is too short.
    """
    settings = config.teacher
    assert settings.model is not None
    say(f"Teacher: {settings.model}, {settings.quantization}, loading …")
    # Prompts first: what cannot be asked is found out before the weights are read.
    tokenizer, max_context_tokens = load_tokenizer(settings.model)
    prompts = make_prompts(
        settings, tokenizer, data.catalog.titles, data.catalog.categories, max_context_tokens,
        data.popularity_levels.tolist(),
    )  # fmt: skip
    if isinstance(prompts, ItemPrompts) and prompts.template.name != settings.template:
        say(
            f"Teacher: {settings.template} has words for rankings only; mode {settings.mode} takes "
            f"those of template {prompts.template.name}"
        )
    backbone = load_backbone(
        settings.model, settings.quantization, device, settings.compute, settings.adapter
    )
    ranker = RankLLM(
        backbone, prompts, settings,
        config.distill.teacher_temperature, config.distill.order_temperature, data.train_counts,
    )  # fmt: skip
    ranker.prepare()
    return ranker


def make_teacher(config: Config, data: InteractionData, device: torch.device, say: Any) -> Teacher:
    """Load the teacher, compile it where that pays, try it on real prompts.

    Raises:
        AssetError, TeacherError, ConfigError: As `load_ranker`; or no row gets a verdict.
    """
    settings, ranker = config.teacher, load_ranker(config, data, device, say)
    backbone = ranker.backbone
    users = data.trained_users[:8].tolist()
    histories = [data.train_history(user).tolist() for user in users]
    any_items = [list(range(1, settings.num_candidates + 1))] * len(users)
    seeds = [(config.seed, user) for user in users]
    # There is no student yet to weight them.
    scores = [[0.0] * settings.num_candidates] * len(users) if ranker.wants_scores else None
    if settings.compile == "on" or (settings.compile == "auto" and compiling_pays(backbone)):
        # One row is a program of its own.
        asks = [
            (histories[:count], any_items[:count], seeds[:count], None, scores and scores[:count])
            for count in (2, 1)
        ]
        compile_teacher(ranker, asks, settings.compile == "on", say)
    probe = ranker.rank(histories, any_items, seeds, scores=scores)
    if not probe.valid.any():
        raise TeacherError(
            f"The teacher {settings.model!r}, quantization {settings.quantization}, mode "
            f"{settings.mode}, gives no verdict on any of {len(probe.valid)} rows: "
            f"{dict(probe.failures)}. {_REMEDIES[probe.failures.most_common(1)[0][0]]}"
        )
    rate = len(users) / probe.seconds
    say(
        f"Teacher: {backbone.num_parameters / 1e6:,.0f} M parameters on {device}, products in "
        f"{backbone.compute}, {rate:.2f} rows/s, about {probe.prompt_tokens // len(users)} tokens "
        "a row"
    )
    return Teacher(
        ranker, _query(config, data), settings.num_candidates, config.seed, rate,
        ranker.wants_scores,
    )  # fmt: skip


def compile_teacher(ranker: RankLLM, asks: Sequence[tuple[Any, ...]], must: bool, say: Any) -> None:
    """Compile the teacher's layers by ranking a few rows.

    Args:
        ranker: Whose language model it is.
        asks: Arguments of `rank`, as different as there are programs to be compiled.
        must: Whether there is no going on without.
        say: Prints a line.

    Raises:
        TeacherError: They cannot be compiled, and must be.
    """
    say("Teacher: compiling its layers …")
    compile_layers(ranker.backbone)
    try:
        for ask in asks:
            ranker.rank(*ask)
    except TorchDynamoException as error:  # a compiler without Python's headers, say
        cause = str(error).strip().partition("\n")[0]
        if must:
            raise TeacherError(
                f"The teacher's layers cannot be compiled: {cause} Set --teacher.compile auto or "
                "off."
            ) from error
        say(f"Teacher: its layers cannot be compiled and run as they are: {cause}")
        uncompile_layers(ranker.backbone)


def say_plan(
    config: Config, data: InteractionData, state: CotrainState, teacher: Teacher | None,
    folder: Path, say: Any,
) -> None:  # fmt: skip
    """Print what follows from the settings before the time is spent."""
    train = config.train
    parameters = sum(p.numel() for p in state.student.bare.parameters())
    start = f", items start from {config.student.item_text}" if config.student.item_text else ""
    say(f"Student: {type(state.student.bare).__name__}, {parameters / 1e6:.2f} M parameters{start}")
    plan = f"Plan: {train.epochs} epochs of {train.loss}, without a teacher"
    if teacher is not None:
        asked = teacher.query.rows_per_epoch * sum(map(config.asks, range(train.epochs)))
        asked += config.teacher.calibration_rows
        plan = (
            f"Plan: {train.warmup_epochs} epochs of {train.loss}, then "
            f"{train.epochs - train.warmup_epochs} with the teacher on {asked:,} rows "
            f"(about {tracking.clock(asked / teacher.probed_rows_per_s)} of teacher time)"
        )
        plan += " and with rationales" if config.distill.rationales else ""
        plan += f", in {train.rounds} rounds" if train.rounds > 1 else ""
    elif config.distill.rationales:
        plan = (
            f"Plan: {train.warmup_epochs} epochs of {train.loss}, then "
            f"{train.epochs - train.warmup_epochs} with rationales and without a live teacher"
        )
    say(plan + (f"; cut short at step {train.max_steps}" if train.max_steps else ""))
    say(f"Run folder: {folder}\n")
