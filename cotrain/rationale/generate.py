"""Writes reasons for training interactions into a folder, and goes on where an earlier call was
interrupted."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from cotrain import config as configuration
from cotrain.config import GenerateConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import ConfigError, CotrainError
from cotrain.rationale.checks import Checks
from cotrain.rationale.endpoint import Endpoint
from cotrain.rationale.journal import Journal
from cotrain.rationale.page import Summary, write_page
from cotrain.rationale.prompts import RationaleMessages, RationalePrompts, load_template
from cotrain.rationale.records import Rationale, position_hash, read_rationales
from cotrain.rationale.selection import Positions, select_positions
from cotrain.rationale.writers import (
    Answer,
    Ask,
    EndpointWriter,
    LocalWriter,
    first_paragraph,
    seed_of,
)
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.tracking import use_all_cores
from cotrain.student.recommender import Recommender
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.tokenizer import load_tokenizer

RATIONALES = "rationales.jsonl"
DROPPED = "dropped.jsonl"
# What may change between two calls that write into one folder: which positions, and how fast.
_MAY_CHANGE = {
    "output", "rationale.select", "rationale.student", "rationale.rows", "rationale.fraction",
    "rationale.user_fraction", "rationale.per_user", "rationale.strata", "rationale.endpoint_url",
    "rationale.concurrency", "rationale.requests_per_minute", "rationale.max_retries",
    "rationale.timeout_s", "teacher.batch_tokens",
}  # fmt: skip


class Interrupted(CotrainError):
    """The writing was asked to stop; what is written is safe."""


def generate(config: GenerateConfig) -> Path:
    """Write the rationales that the settings ask for.

    Returns:
        The folder: `rationales.jsonl`, `dropped.jsonl` where flagged ones are not kept,
        `config.yaml`, `report.json`, `rationales.html`.

    Raises:
        CotrainError: Before any text is written, if settings, data, student, model or endpoint
            cannot work, or the folder holds other rationales.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    use_all_cores(1)
    settings = config.rationale
    data = load_interactions(config.data)
    print(f"Data: {data.name}, {data.num_users:,} users, {data.num_items:,} items", flush=True)
    folder = Path(config.output or f"rationales/{Path(config.data.name).name}")
    open_folder(folder, config)
    student = None if settings.student is None else Recommender.from_pretrained(settings.student)
    positions = select_positions(data, settings, config.seed, student, progress=True)
    print(f"Positions: {len(positions.user):,} training interactions by {settings.select}")
    for name, total, chosen in positions.strata:
        print(f"  targets with {name} training interactions: {chosen:,} of {total:,}")
    writer = make_writer(config, data)
    kept, dropped = Journal(folder / RATIONALES), Journal(folder / DROPPED)
    try:
        for journal in (kept, dropped):
            if journal.mended:
                print(f"{journal.path}: {journal.mended}.")
            journal.check(data)
        spent = write_all(config, data, positions, writer, kept, dropped)
    finally:
        kept.close()
        dropped.close()
    if not dropped.written:
        dropped.path.unlink()
    report(config, data, positions, folder, spent)
    return folder


def report(
    config: GenerateConfig, data: InteractionData, positions: Positions, folder: Path,
    spent: dict[str, float],
) -> None:  # fmt: skip
    """Write the page over all that is in the folder, and say the most important here."""
    settings = config.rationale
    summary = Summary.of(_written(folder), config.seed)
    rate = spent["rows"] / spent["seconds"] if spent["rows"] else 0.0
    local = settings.backend == "local"
    facts = {
        "Model": config.teacher.model if local else settings.endpoint_model,
        "Written by": f"this machine, {_quantization(config)}" if local else "an endpoint",
        "Template": settings.template,
        "History shown": f"{settings.history_length} titles",
        "Drawn": f"temperature {settings.temperature}, top_p {settings.top_p}, seed {config.seed}",
        "Selected": f"{settings.select}, strata {settings.strata}, "
        f"{len(positions.user):,} asked for",
        "Flagged rationales": "kept" if settings.keep_flagged else f"moved to {DROPPED}",
        "Rate of the last call": f"{rate:.2f} rows/s, {spent['tokens'] / spent['seconds']:.0f} "
        f"tokens/s, {spent['rows']:,} rows",
    }  # fmt: skip
    page = write_page(facts, positions.strata, summary, data, settings.history_length, folder)
    found = ", ".join(f"{name} {count:,}" for name, count in summary.flags.most_common())
    print(
        f"\n{summary.rows:,} rationales for {len(summary.users):,} users, {rate:.2f} rows/s; "
        f"{summary.clean:,} without a flag ({found or 'none has one'}); "
        f"{len(summary.texts):,} different texts.\n{folder / RATIONALES}\n{page}"
    )


def _written(folder: Path) -> Iterator[Rationale]:
    for name in (RATIONALES, DROPPED):
        if (folder / name).exists():
            yield from read_rationales(folder / name)


def open_folder(folder: Path, config: GenerateConfig) -> None:
    """Make the folder, or see that what is there can be gone on with.

    Raises:
        ConfigError: It was begun with other settings, or holds something else.
    """
    known, half = folder / "config.yaml", folder / ".config.yaml.tmp"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; expected a folder, or nothing yet.")
    if folder.is_dir() and set(folder.iterdir()) - {half} and not known.is_file():
        raise ConfigError(
            f"output {folder} holds other files and no rationales; nothing is overwritten. Choose "
            "another --output."
        )
    if known.is_file():
        now, before = configuration.flat(configuration.to_dict(config)), _settings_in(known)
        listed = configuration.differences(before, now, _MAY_CHANGE)
        if listed:
            raise ConfigError(
                f"output {folder} holds rationales of other settings: {listed}. Choose another "
                "--output, or the same settings to go on."
            )
    folder.mkdir(parents=True, exist_ok=True)
    configuration.save(config, half)
    os.replace(half, known)  # at once: a kill leaves the old one or the new one


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds no settings; expected those of the rationales beside it. Choose another "
            "--output."
        )
    return configuration.flat(tree)


def make_writer(config: GenerateConfig, data: InteractionData) -> LocalWriter | EndpointWriter:
    """Who will write, tried before the time is spent.

    Raises:
        AssetError, TeacherError, ConfigError: It cannot be had.
    """
    settings, teacher = config.rationale, config.teacher
    template = load_template(settings.template)
    if settings.backend == "endpoint":
        endpoint = Endpoint(
            str(settings.endpoint_model), settings.endpoint_url, max_tokens=settings.max_tokens,
            temperature=settings.temperature, top_p=settings.top_p, seed=config.seed,
            concurrency=settings.concurrency, max_retries=settings.max_retries,
            requests_per_minute=settings.requests_per_minute, timeout_s=settings.timeout_s,
        )  # fmt: skip
        endpoint.check()
        messages = RationaleMessages(
            data.catalog, template, item_noun=teacher.item_noun,
            history_length=settings.history_length,
            max_title_characters=8 * teacher.max_title_tokens,
        )  # fmt: skip
        return EndpointWriter(endpoint, messages)
    assert teacher.model is not None  # checked with the settings
    print(f"Model: {teacher.model}, {_quantization(config)}, loading …", flush=True)
    tokenizer, max_context_tokens = load_tokenizer(teacher.model)
    prompts = RationalePrompts(
        tokenizer, data.catalog, template, item_noun=teacher.item_noun,
        history_length=settings.history_length, max_title_tokens=teacher.max_title_tokens,
        max_prompt_tokens=max_context_tokens - settings.max_tokens,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(
        teacher.model, _quantization(config), device, teacher.compute, teacher.adapter
    )
    return LocalWriter(backbone, prompts, settings, teacher.batch_tokens)


def _quantization(config: GenerateConfig) -> Literal["nf4", "int8", "bf16", "fp32"]:
    return config.rationale.quantization or config.teacher.quantization


def write_all(
    config: GenerateConfig,
    data: InteractionData,
    positions: Positions,
    writer: LocalWriter | EndpointWriter,
    kept: Journal,
    dropped: Journal,
) -> dict[str, float]:
    """Write what is not yet written.

    Returns:
        Rows, tokens and seconds of this call.
    """
    settings = config.rationale
    pairs = list(zip(positions.user.tolist(), positions.cut.tolist(), strict=True))
    keys = [(data.user_ids[user], cut) for user, cut in pairs]
    done = {
        place for place, key in enumerate(keys) if key in kept.written or key in dropped.written
    }
    asks = [
        Ask(data.history(user)[:cut].tolist(), int(data.history(user)[cut]),
            seed_of(config.seed, *key))
        for (user, cut), key in zip(pairs, keys, strict=True)
    ]  # fmt: skip
    if done:
        print(f"Going on: {len(done):,} of {len(pairs):,} are written already.")
    checks = Checks(
        data.catalog.titles, data.catalog.categories, min_words=settings.min_words,
        max_words=settings.max_words, language=settings.language,
    )  # fmt: skip
    flagged, tokens, rows, unasked, started = 0, 0, 0, 0, time.perf_counter()
    bar = tqdm(total=len(pairs), initial=len(done), desc="writing", unit="row", smoothing=0.05)
    with StopRequest() as stop, bar:
        for answers in writer.write(asks, done):
            new = []
            for place, answer in answers:
                if place in done or answer is None:
                    continue
                key, ask = keys[place], asks[place]
                new.append(_rationale(data, key, ask, answer, checks, config, writer))
            unasked += sum(answer is None and place not in done for place, answer in answers)
            rows += len(new)
            tokens += sum(rationale.tokens or 0 for rationale in new)
            flagged += sum(bool(rationale.flags) for rationale in new)
            clean = [r for r in new if settings.keep_flagged or not r.flags]
            kept.append(clean)
            dropped.append(r for r in new if r not in clean)
            bar.update(len(new))
            seconds = time.perf_counter() - started
            bar.set_postfix({"tokens/s": f"{tokens / seconds:.0f}", "flagged": f"{flagged:,}"})
            if stop.received:
                raise Interrupted(
                    f"Stopped with {len(kept.written) + len(dropped.written):,} rationales in "
                    f"{kept.path.parent}. The same command goes on."
                )
    if isinstance(writer, EndpointWriter) and writer.endpoint.retries:
        print(f"Tries that followed a failure: {writer.endpoint.retries:,}.")
    if unasked:
        why = (
            "Memory does not do for" if isinstance(writer, LocalWriter) else "The endpoint refused"
        )
        print(f"{why} {unasked:,} of them; the same command tries them again.")
    return {"rows": rows, "tokens": tokens, "seconds": time.perf_counter() - started}


def _rationale(
    data: InteractionData, key: tuple[Any, int], ask: Ask, answer: Answer, checks: Checks,
    config: GenerateConfig, writer: LocalWriter | EndpointWriter,
) -> Rationale:  # fmt: skip
    answer = first_paragraph(answer)
    ids = data.catalog.item_ids
    target = ids[ask.target]
    return Rationale(
        user_id=key[0],
        item_id=target,
        cut=key[1],
        history_hash=position_hash([ids[item] for item in ask.history], target),
        rationale=answer.text,
        model=writer.name,
        template=config.rationale.template,
        logprob=None if answer.logprob is None else round(answer.logprob, 4),
        tokens=answer.tokens,
        flags=checks.flags(answer.text, ask.history, ask.target, answer.ended),
    )
