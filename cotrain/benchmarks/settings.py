"""Settings of the benchmarks, and their command-line options."""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from cotrain.config import Leaf, leaves, option
from cotrain.errors import ConfigError

T = TypeVar("T")
SHAPE_7B = "7b"


@dataclasses.dataclass(frozen=True)
class StudentSettings:
    """One epoch and one evaluation of our student beside RecTools' SASRec."""

    data: str = option("amazon-beauty", "Data set: a known name, or the folder of a prepared set.")
    interactions: str | None = option(None, "Table of interactions in place of `data`.")
    items: str | None = option(None, "Table of items; goes with --interactions.")
    loss: Literal["chunked_ce", "ce", "sampled_softmax", "bce", "gbce"] = option(
        "chunked_ce",
        "Loss of both sides, by cotrain's names; the first two are one to RecTools, softmax.",
    )
    num_negatives: int = option(64, "Negatives of the sampled losses.", ge=1)
    gbce_calibration: float = option(0.75, "t of gBCE.", ge=0, le=1)
    hidden_size: int = option(256, "Width of item embeddings and states.", ge=1)
    num_layers: int = option(2, "Transformer blocks.", ge=1)
    num_heads: int = option(4, "Attention heads; divides the hidden size.", ge=1)
    max_length: int = option(50, "Most recent interactions that the models see.", ge=1)
    dropout: float = option(0.2, "Dropout probability.", ge=0, lt=1)
    batch_size: int = option(128, "Users an optimizer step.", ge=1)
    learning_rate: float = option(1e-3, "Of Adam, constant.", gt=0)
    eval_batch_size: int = option(256, "Users encoded at once when they are evaluated.", ge=1)
    threads: int | None = option(None, "CPU threads of each side; none: one a core.", ge=1)
    repeats: int = option(3, "Times that each side is measured, in turn.", ge=1)
    max_steps: int | None = option(
        None, "Stop an epoch after this many steps, to try the benchmark out.", ge=1
    )
    seed: int = option(0, "Seed of weights, order and dropout; each repeat adds one.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class CatalogueSettings:
    """Training and retrieval on random interactions, each size and loss in a process of its own."""

    sizes: tuple[int, ...] = option(
        (10_000, 100_000, 500_000, 2_000_000), "Catalogue sizes, in items.", ge=100
    )
    losses: tuple[Literal["chunked_ce", "ce", "sampled_softmax", "bce", "gbce"], ...] = option(
        ("chunked_ce", "sampled_softmax", "bce", "gbce"), "Losses to train by."
    )
    num_negatives: int = option(1024, "Negatives a step of the sampled losses.", ge=1)
    item_updates: Literal["lazy", "all"] = option(
        "lazy", "Items that a step of a sampled loss updates. ce and chunked_ce update all."
    )
    hidden_size: int = option(64, "Width of item embeddings and states.", ge=1)
    num_layers: int = option(2, "Transformer blocks.", ge=1)
    num_heads: int = option(2, "Attention heads; divides the hidden size.", ge=1)
    history_length: int = option(20, "Positions to train on, of every user.", ge=1)
    batch_size: int = option(64, "Users an optimizer step, and users a retrieval.", ge=1)
    steps: int = option(5, "Steps that are timed, after two that are not.", ge=1)
    k: int = option(20, "Items retrieved for a user.", ge=1, le=100)
    threads: int | None = option(None, "CPU threads; none: one a core.", ge=1)
    seed: int = option(0, "Seed of interactions and weights.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class BulkSettings:
    """A file of users, answered by scripts/recommend.py in a process of its own."""

    run: str = option("runs/student", "Folder of a finished run.")
    users: int = option(1_000_000, "Users, drawn from those of the run's data.", ge=1)
    k: int = option(10, "Items recommended to each.", ge=1)
    kind: Literal["parquet", "csv", "jsonl"] = option("parquet", "Of both files.")
    threads: int | None = option(None, "CPU threads; none: one a core.", ge=1)
    seed: int = option(0, "Seed of the draw.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """The teacher engine beside the plain generate loop: same weights, prompts and machine."""

    model: str = option(
        "smollm2-135m-instruct",
        "Causal language model: a known asset, a folder or a hub name; 7b: random weights in the "
        "shape of a 7B model and random prompts of 350 to 500 tokens, for a machine without any.",
    )
    data: str = option("ml-100k", "Data set of the prompts: a known name or a prepared folder.")
    rows: tuple[int, ...] = option((64,), "Rows ranked at once.", ge=1)
    quantization: tuple[Literal["nf4", "int8", "bf16", "fp32"], ...] = option(
        ("nf4",), "Weights, of both sides."
    )
    compute: Literal["auto", "fp32", "bf16"] = option(
        "auto", "What products are computed in, as teacher.compute; the plain loop follows it."
    )
    compile: Literal["auto", "on", "off"] = option("auto", "As teacher.compile.")
    batch_tokens: int | None = option(
        None, "As teacher.batch_tokens; the plain loop takes all rows at once.", ge=1
    )
    num_candidates: int = option(20, "Candidates of a row.", ge=2, le=26)
    history_length: int = option(10, "Titles of a row's history.", ge=1)
    threads: int | None = option(None, "CPU threads of each side; none: one a core.", ge=1)
    repeats: int = option(3, "Times that each side is measured, in turn.", ge=1)
    seed: int = option(0, "Seed of the rows, and of random weights.", ge=0)
    exactness: bool = option(
        False, "Measure every setting of ours, too: its rate, and how near it is to fp32."
    )
    memory: bool = option(
        False,
        "Only show what a co-training step with a 7B teacher, 32 rows asked, takes of a GPU's "
        "memory: measured on one, and without one from traces of all allocations.",
    )
    loop: bool = option(
        False, "Only time a short co-training run, for the share of its time that is the teacher's."
    )
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class ModesSettings:
    """What a teacher says in each of its modes, on the same real prompts."""

    model: str = option(
        "smollm2-135m-instruct", "Causal language model: a known asset, a folder or a hub name."
    )
    data: str = option("ml-100k", "Data set of the prompts: a known name or a prepared folder.")
    template: str = option("movies", "Prompt template, as teacher.template.")
    rows: int = option(64, "Rows measured; as many others calibrate.", ge=1)
    quantization: Literal["nf4", "int8", "bf16", "fp32"] = option("nf4", "Weights.")
    num_candidates: int = option(20, "Candidates of a row.", ge=11, le=26)
    samples: int = option(3, "Reasonings that are printed.", ge=0)
    seed: int = option(0, "Seed of the rows.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class ParitySettings:
    """The teacher's engine against `generate`, on a tiny random model of each family."""

    seeds: int = option(3, "Random models of each family.", ge=1)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class ProcessesSettings:
    """A short co-training run by one process, and by several that share the same cores."""

    data: str = option("ml-100k", "Data set: a known name, or the folder of a prepared set.")
    model: str = option(
        "smollm2-135m-instruct", "Teacher: a known asset, a local folder or a hub name."
    )
    quantization: Literal["nf4", "int8", "bf16", "fp32"] = option("nf4", "Its weights.")
    fraction: float = option(0.1, "Share of the rows that ask.", gt=0, le=1)
    steps: int | None = option(
        None, "Steps of the run, of which the first epoch asks nobody; none: two epochs.", ge=1
    )
    processes: int = option(2, "Processes of the second side.", ge=2)
    threads: int | None = option(
        None, "CPU threads, shared by the processes of a side; none: one a core.", ge=1
    )
    seed: int = option(0, "Seed of the run.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


@dataclasses.dataclass(frozen=True)
class ShardingSettings:
    """Memory of each process and time of a step by how a large student is spread over processes.

    Weights are multiples of the items here, so what is measured holds for more of them.
    """

    num_items: int = option(1_000_000, "Catalogue size.", ge=100)
    hidden_size: int = option(64, "Width of item embeddings and states.", ge=1)
    num_heads: int = option(2, "Attention heads; divides the hidden size.", ge=1)
    ways: tuple[Literal["ddp", "ddp_lazy", "zero1", "zero2", "zero3"], ...] = option(
        ("ddp", "ddp_lazy", "zero1", "zero2", "zero3"),
        "Whole on every process (DDP), with all item embeddings updated or (lazy) those looked up, "
        "or sharded by a stage of DeepSpeed's ZeRO.",
    )
    processes: tuple[int, ...] = option((1, 2), "Numbers of processes.", ge=1)
    steps: int = option(5, "Steps that are timed, after two that are not.", ge=1)
    batch_size: int = option(64, "Users an optimizer step, over all processes.", ge=1)
    num_negatives: int = option(1024, "Negatives a step (sampled softmax).", ge=1)
    threads: int | None = option(
        None, "CPU threads, shared by the processes of a point; none: one a core.", ge=1
    )
    seed: int = option(0, "Seed of interactions and weights.", ge=0)
    json: str | None = option(None, "File for everything that was measured.")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """One `--name-with-hyphens` for each field of a settings dataclass."""
    for leaf in leaves(settings):
        kind, many = _kind(leaf)
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        metadata, default = leaf.field.metadata, leaf.field.default
        name = f"--{leaf.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(name, dest=leaf.name, action="store_true", help=metadata["help"])
            continue
        shown = (
            " ".join(map(str, typing.cast(tuple, default)))
            if many
            else "none"
            if default is None
            else default
        )
        bounds = ", ".join(f"{sign} {bound}" for sign, bound in metadata["bounds"].items())
        text = f"{metadata['help']} Default: {shown}." + (f" Range: {bounds}." if bounds else "")
        parser.add_argument(
            name,
            dest=leaf.name,
            type=str if choices else kind,
            nargs="+" if many else None,
            choices=choices,
            default=default,
            metavar=None if choices else kind.__name__.upper(),
            help=text.replace("%", "%%"),
        )


def read_options(parsed: argparse.Namespace, settings: type[T]) -> T:
    """The settings behind parsed options.

    Raises:
        ConfigError: Names every value out of range, and options that contradict each other.
    """
    values: dict[str, Any] = {}
    problems = []
    for leaf in leaves(settings):
        value = getattr(parsed, leaf.name)
        if isinstance(value, list):  # argparse collects several values in one
            value = tuple(value)
        values[leaf.name] = value
        named = dataclasses.replace(leaf, name=f"--{leaf.name.replace('_', '-')}")
        for one in value if isinstance(value, tuple) else (value,):
            problem = named.range_problem(one)
            problems += [problem] if problem else []
    problems += _contradictions(values)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"The options have {len(problems)} mistake(s):\n{listed}")
    return settings(**values)


def _contradictions(values: dict[str, Any]) -> list[str]:
    problems = []
    if values.get("items") is not None and values.get("interactions") is None:
        problems.append("--items is set without --interactions; set both, or neither.")
    size, heads = values.get("hidden_size", 0), values.get("num_heads", 0)
    if heads >= 1 and size % heads:
        problems.append(
            f"--hidden-size {size} is not a multiple of --num-heads {heads}; change one of them."
        )
    if values.get("memory") and values.get("loop"):
        problems.append("--memory and --loop are each measured alone; set one of them.")
    if values.get("exactness") and (values["memory"] or values["loop"]):
        problems.append("--exactness belongs to the comparison, which --memory and --loop replace.")
    if values.get("exactness") and values["model"] == SHAPE_7B:
        problems.append(f"--exactness needs trained weights, which --model {SHAPE_7B} has not.")
    if values.get("loop") and values["model"] == SHAPE_7B:
        problems.append(f"--loop needs a model to load, which --model {SHAPE_7B} is not.")
    unmade = {"int8", "fp32"} & {*values.get("quantization", ())}
    if values.get("model") == SHAPE_7B and (unmade or values["compute"] == "fp32"):
        problems.append(
            f"--model {SHAPE_7B} is made in nf4 or bf16 and computes in bf16; take one of these as "
            "--quantization and leave --compute, or name another model."
        )
    return problems


def _kind(leaf: Leaf) -> tuple[Any, bool]:
    """The type of one value, and whether the option takes several."""
    kind = leaf.type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False
