"""Settings from a YAML file and dotted command-line options (`--teacher.model NAME`), the command
line winning, with every mistake reported at once. What can be set is in `cotrain.settings` and
the three `cotrain.…_settings`.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cotrain.contradictions import contradictions
from cotrain.errors import ConfigError
from cotrain.finetune_settings import EvaluateConfig, FinetuneConfig
from cotrain.rationale_settings import EncodeConfig, GenerateConfig, RationaleConfig
from cotrain.run_settings import (
    Config,
    DistillConfig,
    EvalConfig,
    QueryConfig,
    StudentConfig,
    TrackingConfig,
    TrainConfig,
    TuningConfig,
)
from cotrain.settings import DataConfig, TeacherConfig, option

__all__ = [
    "Config", "DataConfig", "DistillConfig", "EncodeConfig", "EvalConfig", "EvaluateConfig",
    "FinetuneConfig", "GenerateConfig", "Leaf", "QueryConfig", "RationaleConfig", "StudentConfig",
    "TeacherConfig", "TrackingConfig", "TrainConfig", "TuningConfig", "leaves", "option", "parse",
    "save", "to_dict",
]  # fmt: skip

# What a script can be configured by: a run, or what is prepared for one.
Root = TypeVar("Root", Config, GenerateConfig, EncodeConfig, FinetuneConfig, EvaluateConfig)
_ROOTS = (Config, GenerateConfig, EncodeConfig, FinetuneConfig, EvaluateConfig)


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
        if value is None or isinstance(value, str):  # a word where a number may stand as well
            return None
        if all(tests[sign](bound) for sign, bound in bounds.items()):
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
            yield Leaf(prefix + _said(field.name), hints[field.name], field)


def parse(argv: Sequence[str], default_file: Path | None = None, prog: str | None = None) -> Config:
    """Settings of a run; arguments and errors as for `parse_as`."""
    return parse_as(Config, argv, default_file, prog)


def parse_as(
    cls: type[Root],
    argv: Sequence[str],
    default_file: Path | None = None,
    prog: str | None = None,
) -> Root:
    """Settings from the command line and the YAML file that it names.

    Args:
        cls: What is configured. A file may hold settings of the others too, so that one recipe
            serves a run and the scripts that prepare it; the command line may not.
        argv: Command-line arguments without the program's name: `--config FILE` and dotted
            options, each with one value, as `--name value` or `--name=value`.
        default_file: YAML file when the command line names none.
        prog: Program name for `--help`.

    Raises:
        ConfigError: Names every unknown setting, wrong type and value out of range at once.
    """
    parser = _parser(cls, prog, default_file)
    problems: list[str] = []
    if {"-h", "--help"} & set(argv):
        if default_file is not None:  # show the defaults that hold when no file is named
            shown = _of_file(cls, parser, default_file, problems)
            parser.set_defaults(shown)
        parser.print_help()
        sys.exit(0)
    options = _split_options(argv, problems)
    file = options.pop("config", default_file)
    values: dict[str, Any] = {}
    if file is not None:
        values |= _of_file(cls, parser, Path(file), problems)
    values |= _typed(cls, parser, options, "command line", problems)
    for leaf in leaves(cls):
        problem = leaf.range_problem(values[leaf.name]) if leaf.name in values else None
        if problem:
            problems.append(problem)
    config = _build(cls, values, "")
    if not problems:
        problems += contradictions(config)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"The configuration has {len(problems)} mistake(s):\n{listed}")
    return config


def _said(field_name: str) -> str:
    """What a field is called outside of Python, which has words of its own, such as `with`."""
    return field_name.removesuffix("_")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as written to a run's config.yaml."""
    return dataclasses.asdict(
        config, dict_factory=lambda pairs: {_said(name): value for name, value in pairs}
    )


def save(config: Any, path: Path) -> None:
    """Write a resolved configuration that `parse_as` reads back as `--config path`."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name."""
    return dict(_flatten(tree))


def differences(before: dict[str, Any], now: dict[str, Any], may_change: Collection[str]) -> str:
    """Settings by dotted name that are others now, for an error message; empty: none is."""
    other = [
        f"{name} {before.get(name)!r} → {value!r}"
        for name, value in now.items()
        if name not in may_change and before.get(name) != value
    ]
    return ", ".join(other[:5]) + (f", … ({len(other)} in all)" if other[5:] else "")


def _parser(cls: type, prog: str | None, default_file: Path | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Settings come from a YAML file; each option below overrides one of them.",
    )
    parser.add_argument("--config", help="YAML file of settings.", default=default_file)
    if cls is Config:
        parser.add_argument(
            "--resume",
            metavar="RUN",
            help="Folder of an interrupted run to go on with. Its settings hold; no other option.",
        )
        parser.add_argument(
            "--show_prompts",
            metavar="N",
            help="Print N prompts of the teacher under these settings and stop; loads no weights.",
        )
    for leaf in leaves(cls):
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


def _of_file(cls: type, parser: ArgumentParser, path: Path, problems: list[str]) -> dict[str, Any]:
    """Values of a file, without those that only concern other scripts."""
    own, raw = {leaf.name for leaf in leaves(cls)}, _read_yaml(path)
    others = {leaf.name for root in _ROOTS for leaf in leaves(root)} - own
    others |= {name.partition(".")[0] for name in others if "." in name} - {
        name.partition(".")[0] for name in own
    }
    mine = {name: value for name, value in raw.items() if name not in others}
    return _typed(cls, parser, mine, str(path), problems)


def _typed(
    cls: type, parser: ArgumentParser, raw: dict[str, Any], source: str, problems: list[str]
) -> dict[str, Any]:
    """Values of the right types; everything else becomes a line in `problems`."""
    known = {leaf.name: leaf for leaf in leaves(cls)}
    sections = {name.partition(".")[0] for name in known if "." in name}
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
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
        # Strings come from the command line, or quoted from YAML: one rule reads both.
        texts[name] = (
            value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()
        )
    for name, value in _parsed(parser, texts).items():
        if isinstance(value, ArgumentError):
            expected = _type_text(known[name].type)
            problems.append(f"{source}: {name} is {raw[name]!r}; expected {expected}.")
        else:
            values[name] = value
    return values


def _parsed(parser: ArgumentParser, texts: dict[str, str]) -> dict[str, Any]:
    """Each setting's value, or what the parser says against it."""
    if not texts:
        return {}
    try:
        # All at once, because a call takes 30 ms.
        found = parser.parse_args([f"--{name}={text}" for name, text in texts.items()])
    except ArgumentError as error:
        if len(texts) == 1:
            return dict.fromkeys(texts, error)
        return {
            name: value
            for one in texts
            for name, value in _parsed(parser, {one: texts[one]}).items()
        }
    return {name: found[name] for name in texts}


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
        name = prefix + _said(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)
