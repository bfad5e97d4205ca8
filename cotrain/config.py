"""Every setting of a run: what it means, its unit, its range and its default.

The settings are frozen dataclasses. `parse` fills them from a YAML file and dotted command-line
options (`--teacher.model NAME`), the command line winning, and reports every mistake at once.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cotrain.errors import ConfigError


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field that carries its help text and its allowed range."""
    bounds = {"≥": ge, ">": gt, "≤": le, "<": lt}
    bounds = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which interactions and items to learn from."""

    name: str = option(
        "ml-100k",
        "Name of a known or prepared data set, or path of a prepared folder; with "
        "data.interactions set, only a label for the report.",
    )
    interactions: str | None = option(
        None, "Parquet, CSV or TSV table of interactions, one row each; none: the data set `name`."
    )
    items: str | None = option(
        None, "Parquet, CSV or TSV table of items with their titles; none: ids serve as titles."
    )
    user_column: str = option("user_id", "Column of the user id in the interactions table.")
    item_column: str = option("item_id", "Column of the item id, in both tables.")
    timestamp_column: str = option("timestamp", "Column of the time, any number that grows.")
    order_column: str | None = option(
        None,
        "Column that orders a user's interactions; none: `position` where the table has it, else "
        "the timestamp. Equal values keep the order of the file.",
    )
    title_column: str = option("title", "Column of the item title in the items table.")
    categories_column: str | None = option(
        "categories", "Column of the item categories, joined by a bar; none, or absent: not used."
    )
    split: Literal["leave-one-out", "time"] = option(
        "leave-one-out",
        "leave-one-out: of every user the last interaction is the test target, the one before it "
        "the validation target. time: one cut for all users; nothing after it is trained on.",
    )
    validation_share: float = option(
        0.1, "Split by time: share of the interactions in the validation window.", gt=0, lt=0.5
    )
    test_share: float = option(
        0.1,
        "Split by time: share of the interactions, the latest, in the test window.",
        gt=0,
        lt=0.5,
    )
    validation_start: str | None = option(
        None,
        "Split by time: start of the validation window, in place of validation_share; a number in "
        "the unit of the timestamps, or an ISO date where they are dates; none: by share.",
    )
    test_start: str | None = option(
        None, "Split by time: start of the test window, like validation_start; none: by share."
    )
    time_target: Literal["last", "first"] = option(
        "last", "Split by time: which of a user's interactions in a window is to be predicted."
    )
    unseen_items: Literal["keep", "drop"] = option(
        "keep",
        "Split by time: items without an interaction before the validation window. keep: they stay "
        "in the catalogue and can be targets. drop: they leave, with their interactions.",
    )


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The sequential recommender that is served (SASRec)."""

    hidden_size: int = option(128, "Width D of item embeddings and states.", ge=1)
    num_layers: int = option(2, "Transformer blocks.", ge=1)
    num_heads: int = option(2, "Attention heads; divides hidden_size.", ge=1)
    max_length: int = option(200, "Most recent interactions that the student sees.", ge=1)
    dropout: float = option(0.3, "Dropout probability.", ge=0, lt=1)
    item_text: str | None = option(
        None,
        "Start item embeddings from the items' titles and categories, encoded by this sentence "
        "encoder (a known asset, a local folder or a hub name) or by the `teacher`; none: random.",
    )


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The language model that ranks the student's candidates (RankLLM)."""

    model: str | None = option(
        "smollm2-135m-instruct",
        "Causal language model: a known asset, a local folder, or a hub name; none: train the "
        "student alone.",
    )
    quantization: Literal["nf4", "int8", "bf16", "fp32"] = option(
        "nf4", "Weights: nf4 and int8 by bitsandbytes (on CPU computed in fp32), or unquantised."
    )
    mode: Literal["direct"] = option(
        "direct", "direct: one forward pass, verdict read at the answer prefix."
    )
    decision_position: Literal["predict"] = option(
        "predict",
        "Where the decision state is read. predict: the state whose logits choose the first "
        "identifier.",
    )
    num_candidates: int = option(20, "Candidates K that are ranked, lettered A, B, …", ge=2, le=26)
    history_length: int = option(10, "Most recent titles of the history in the prompt.", ge=1)
    item_noun: str = option("item", "What the items are called in the prompt, e.g. movie.")
    max_title_tokens: int = option(
        32, "An item's title and categories are cut to this many tokens each.", ge=1
    )
    calibration_rows: int = option(
        64,
        "Rows ranked when the teacher starts to measure how much it favours each letter, whatever "
        "stands behind it; that is subtracted from its logits from then on. 0: no calibration.",
        ge=0,
    )
    batch_tokens: int = option(
        8192, "Prompt tokens, padding included, in one forward pass of the teacher.", ge=1
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How the teacher's verdict enters the student's loss."""

    lambda_rank: float = option(0.1, "Weight of the ranking loss (ListNet).", ge=0)
    lambda_emb: float = option(0.001, "Weight of the decision-state alignment loss.", ge=0)
    student_temperature: float = option(
        1.0, "τ_s: the student's candidate scores are divided by it.", gt=0
    )
    teacher_temperature: float = option(
        1.0, "τ_t: the teacher's identifier logits are divided by it.", gt=0
    )
    confidence: Literal["entropy", "none"] = option(
        "entropy",
        "Weight of a row's verdict. entropy: 1 − H(Q) / log K; none: 1 for every valid row.",
    )


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """Which rows ask the teacher."""

    fraction: float = option(
        0.1, "Share of the users, drawn anew each epoch, that ask the teacher.", ge=0, le=1
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = option(40, "Passes over the users, warm-up included.", ge=1)
    warmup_epochs: int = option(
        35,
        "First epochs without the teacher, where there is one; then it and the control start.",
        ge=0,
    )
    max_steps: int | None = option(None, "Stop after this many steps; none: no cap.", ge=1)
    batch_size: int = option(64, "Users per optimizer step, over all processes.", ge=1)
    learning_rate: float = option(1e-3, "Peak of the cosine schedule (AdamW).", gt=0)
    loss: Literal["chunked_ce", "ce", "sampled_softmax", "bce", "gbce"] = option(
        "chunked_ce",
        "How the next item is learned. ce: softmax over the catalogue; chunked_ce: the same in "
        "flat memory; sampled_softmax, bce, gbce: against num_negatives drawn items.",
    )
    label_smoothing: float = option(
        0.0, "ce, chunked_ce: share of the target's mass spread over all items.", ge=0, lt=1
    )
    num_negatives: int = option(
        1024, "Sampled losses: negatives a step, shared by all its positions.", ge=1
    )
    negatives_power: float = option(
        0.0, "Sampled losses: negatives are drawn ∝ (training count + 1)^power; 0: evenly.", ge=0
    )
    logq_correction: bool = option(
        True, "sampled_softmax: weigh negatives so that their sum estimates the whole catalogue's."
    )
    gbce_calibration: float = option(
        0.75, "gbce: t between 0 (plain bce) and 1 (fully calibrated).", ge=0, le=1
    )
    windows: Literal["last", "random"] = option(
        "last",
        "Of histories longer than student.max_length, an epoch trains the last items, or a stretch "
        "drawn anew each epoch.",
    )
    item_updates: Literal["all", "lazy"] = option(
        "all",
        "Item embeddings updated in a step. lazy: only those that it looked up, which a sampled "
        "loss over a catalogue of 100,000 items or more needs to be fast.",
    )
    weight_decay: float = option(0.0, "AdamW weight decay.", ge=0)
    adam_beta2: float = option(0.98, "AdamW's decay of squared gradients.", ge=0, lt=1)
    lr_warmup_steps: int = option(50, "Steps of linear learning-rate warm-up.", ge=0)
    final_lr_ratio: float = option(
        0.1, "Learning rate at the last step, as a share of the peak.", ge=0, le=1
    )
    max_grad_norm: float = option(1.0, "Gradient norm is clipped to this.", gt=0)
    control: bool = option(
        True, "Fork a twin when the teacher starts and train it on cross-entropy only."
    )
    eval_every_epochs: int = option(1, "Epochs between evaluations on validation.", ge=1)
    checkpoint_every_steps: int = option(100, "Optimizer steps between checkpoints.", ge=1)
    keep_checkpoints: int = option(2, "Latest checkpoints that are kept.", ge=1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How models are measured."""

    batch_size: int = option(256, "Users scored at once.", ge=1)
    bootstrap_samples: int = option(10_000, "Resamples of the paired bootstrap.", ge=100)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    query: QueryConfig = dataclasses.field(default_factory=QueryConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    output_dir: str | None = option(
        None, "Folder of the run, without another run in it; none: runs/DATA-DATE-TIME."
    )
    seed: int = option(0, "Seed of every random choice of the run.", ge=0)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted name and the dataclass field behind it."""

    name: str
    type: Any
    field: dataclasses.Field

    def range_problem(self, value: Any) -> str | None:
        """What is wrong with a value of the right type, or None."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.name} is {value}; expected a finite number."
        tests = {
            "≥": lambda bound: value >= bound,
            ">": lambda bound: value > bound,
            "≤": lambda bound: value <= bound,
            "<": lambda bound: value < bound,
        }
        bounds = self.field.metadata["bounds"]
        if value is None or all(tests[sign](bound) for sign, bound in bounds.items()):
            return None
        expected = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
        return f"{self.name} is {value}; expected {expected}."


def leaves(cls: type = Config, prefix: str = "") -> Iterator[Leaf]:
    """All settings of a configuration dataclass, depth first."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield Leaf(prefix + field.name, hints[field.name], field)


def parse(argv: Sequence[str], default_file: Path | None = None, prog: str | None = None) -> Config:
    """Settings from the command line and the YAML file that it names.

    Args:
        argv: Command-line arguments without the program's name: `--config FILE` and dotted
            options, each with one value, as `--name value` or `--name=value`.
        default_file: YAML file when the command line names none.
        prog: Program name for `--help`.

    Raises:
        ConfigError: Names every unknown setting, wrong type and value out of range at once.
    """
    parser = _parser(prog, default_file)
    problems: list[str] = []
    if {"-h", "--help"} & set(argv):
        if default_file is not None:  # show the defaults that hold when no file is named
            parser.set_defaults(
                _typed(parser, _read_yaml(default_file), str(default_file), problems)
            )
        parser.print_help()
        sys.exit(0)
    options = _split_options(argv, problems)
    file = options.pop("config", default_file)
    values: dict[str, Any] = {}
    if file is not None:
        values |= _typed(parser, _read_yaml(Path(file)), str(file), problems)
    values |= _typed(parser, options, "command line", problems)
    for leaf in leaves():
        problem = leaf.range_problem(values[leaf.name]) if leaf.name in values else None
        if problem:
            problems.append(problem)
    config = _build(Config, values, "")
    if not problems:
        problems += _contradictions(config)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"The configuration has {len(problems)} mistake(s):\n{listed}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as written to a run's config.yaml."""
    return dataclasses.asdict(config)


def save(config: Config, path: Path) -> None:
    """Write a resolved configuration that `parse(["--config", path])` reads back."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def _parser(prog: str | None, default_file: Path | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Settings come from a YAML file; each option below overrides one of them.",
    )
    parser.add_argument("--config", help="YAML file of settings.", default=default_file)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="Folder of an interrupted run to go on with. Its settings hold; no other option.",
    )
    for leaf in leaves():
        metadata = leaf.field.metadata
        bounds = ", ".join(f"{sign} {bound}" for sign, bound in metadata["bounds"].items())
        text = metadata["help"] + (f" Range: {bounds}." if bounds else "")
        parser.add_argument(
            f"--{leaf.name}",
            type=leaf.type,
            default=leaf.field.default,
            help=text.replace("%", "%%"),
        )
    return parser


def _split_options(argv: Sequence[str], problems: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(
                f"{word!r} on the command line is not an option; expected --name value."
            )
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"--{name} has no value; expected --{name} VALUE.")
                continue
            value = words.pop(0)
        options[name] = value
    return options


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"Cannot read the configuration file {path}: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected settings, name: value.")
    return dict(_flatten(content))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _typed(
    parser: ArgumentParser, raw: dict[str, Any], source: str, problems: list[str]
) -> dict[str, Any]:
    """Values of the right types; everything else becomes a line in `problems`."""
    known = {leaf.name: leaf for leaf in leaves()}
    sections = {name.partition(".")[0] for name in known if "." in name}
    values = {}
    for name, value in raw.items():
        if name in sections and value is None:  # a section of the file with every line commented
            continue
        if name not in known:
            problems.append(f"{source}: unknown setting {name!r}{_nearest(name, known)}.")
            continue
        kind = known[name].type
        optional = type(None) in typing.get_args(kind)
        if optional and str(value).lower() in ("none", "null"):
            values[name] = None
            continue
        if value is None or isinstance(value, list):
            # As text, either would pass for the name of something.
            problems.append(f"{source}: {name} is {value!r}; expected {_type_text(kind)}.")
            continue
        if isinstance(value, str):
            # Strings come from the command line, or quoted from YAML: one rule reads both.
            arguments = [f"--{name}={value}"]
        else:
            arguments = [f"--{name}={yaml.safe_dump(value).removesuffix('...' + chr(10)).strip()}"]
        try:
            parsed = parser.parse_args(arguments)
        except ArgumentError:
            problems.append(f"{source}: {name} is {value!r}; expected {_type_text(kind)}.")
        else:
            values[name] = parsed[name]
    return values


def _nearest(name: str, known: dict[str, Leaf]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # right name, wrong or missing section
        last = name.rpartition(".")[2]
        close = [other for other in known if other.rpartition(".")[2] == last][:1]
    return (
        f"; the nearest known one is {close[0]!r}" if close else "; see --help for the known ones"
    )


def _type_text(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(part) for part in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "none")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def _contradictions(config: Config) -> list[str]:
    problems = []
    student = config.student
    if student.hidden_size % student.num_heads:
        problems.append(
            f"student.hidden_size {student.hidden_size} is not a multiple of student.num_heads "
            f"{student.num_heads}; change one of them."
        )
    train = config.train
    if config.teacher.model is not None and train.warmup_epochs >= train.epochs:
        problems.append(
            f"train.warmup_epochs {config.train.warmup_epochs} leaves no epoch of train.epochs "
            f"{config.train.epochs} to the teacher; lower the first or raise the second."
        )
    if config.student.item_text == "teacher" and config.teacher.model is None:
        problems.append(
            "student.item_text is teacher, but teacher.model is none; name a sentence encoder, or "
            "a teacher."
        )
    if train.item_updates == "lazy" and train.loss in ("ce", "chunked_ce"):
        problems.append(
            f"train.item_updates is lazy, but train.loss {train.loss} touches every item in every "
            "step; set train.item_updates all, or a sampled loss."
        )
    if train.label_smoothing and train.loss not in ("ce", "chunked_ce"):
        problems.append(
            f"train.label_smoothing {train.label_smoothing} has no meaning for train.loss "
            f"{train.loss}; set it to 0, or train.loss chunked_ce."
        )
    problems += _split_contradictions(config.data)
    if config.data.items is not None and config.data.interactions is None:
        problems.append("data.items is set without data.interactions; set both, or neither.")
    return problems


def _split_contradictions(data: DataConfig) -> list[str]:
    starts = {"validation_start": data.validation_start, "test_start": data.test_start}
    given = [f"data.{name}" for name, value in starts.items() if value is not None]
    if given and data.split != "time":
        return [
            f"{' and '.join(given)} set, but data.split is {data.split}; set data.split time, or "
            "leave them."
        ]
    if len(given) == 1:
        return [
            f"{given[0]} is set without the other start; set both data.validation_start and "
            "data.test_start, or neither."
        ]
    return []
