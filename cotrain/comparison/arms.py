"""What is compared: each arm is a few settings over one recipe, everything else is the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.errors import ConfigError, some_of

BASELINE = "ce"
# Where a store of rationales is given without a weight.
DEFAULT_LAMBDA_RDR = 0.1


@dataclass(frozen=True)
class Arm:
    """One way of teaching.

    Attributes:
        summary: What the student learns from, in a line.
        settings: What differs from the recipe.
        weights: Weights of the losses that make the arm what it is, none of which may be 0.
        variant: Compared only where it is asked for.
    """

    summary: str
    settings: dict[str, Any]
    weights: tuple[str, ...] = ()
    variant: bool = False

    @property
    def asks(self) -> bool:
        """Whether a live teacher takes part."""
        return "teacher.model" not in self.settings

    @property
    def reads(self) -> bool:
        """Whether rationales take part."""
        return "distill.rationales" not in self.settings


_NO_TEACHER: dict[str, Any] = {"teacher.model": None}
_NO_RATIONALES: dict[str, Any] = {"distill.rationales": None, "distill.lambda_rdr": 0.0}
_RANK, _EMB, _RDR = "distill.lambda_rank", "distill.lambda_emb", "distill.lambda_rdr"

ARMS = {
    "ce": Arm(
        "cross-entropy on the data and nothing else; all others are compared to it",
        _NO_TEACHER | _NO_RATIONALES,
    ),
    "logit_kd": Arm(
        "a live teacher's identifier logits: ListNet against softmax(logits / τ_t), whose gradient "
        "is that of KL logit distillation",
        _NO_RATIONALES | {_EMB: 0.0},
        (_RANK,),
    ),
    "rdr": Arm(
        "rationales of training interactions, written before; no live teacher", _NO_TEACHER, (_RDR,)
    ),
    "decision_state": Arm(
        "a live teacher's decision state, to which the user state is aligned",
        _NO_RATIONALES | {_RANK: 0.0},
        (_EMB,),
    ),
    "full": Arm("logits, decision state and rationales together", {}, (_RANK, _EMB, _RDR)),
    "rdr_gram": Arm(
        "rdr, matching how alike the user states of a batch are to each other",
        _NO_TEACHER | {"distill.rdr_form": "gram"},
        (_RDR,),
        variant=True,
    ),
    "rdr_centred": Arm(
        "rdr towards rationale vectors without their common mean",
        _NO_TEACHER | {"distill.rdr_targets": "centred"},
        (_RDR,),
        variant=True,
    ),
    "rdr_whitened": Arm(
        "rdr towards whitened rationale vectors",
        _NO_TEACHER | {"distill.rdr_targets": "whitened"},
        (_RDR,),
        variant=True,
    ),
}


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        arm: Key of `ARMS`.
        seed: Of all that is random in it.
        config: Its settings.
        output: Folder of the comparison.
    """

    arm: str
    seed: int
    config: Config
    output: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output / self.arm / f"seed-{self.seed}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes:
        base: The recipe with what was set for all arms.
        arms: Keys of `ARMS`, the baseline among them.
        seeds: Of every arm.
        output: Folder of the comparison.
        settings: By arm, as `Arm.settings` with the weight of rationales filled in.
        runs: By seed, then arm: what is there after an hour can be compared already.
    """

    base: Config
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: tuple[PlannedRun, ...] = ()


def make_plan(
    recipe: Path,
    options: Sequence[str],
    arms: Sequence[str] | None,
    seeds: Sequence[int],
    output: Path | None,
) -> Plan:
    """Check every arm's settings and lay out the runs.

    Args:
        recipe: YAML file of settings.
        options: Dotted settings that hold for all arms, as on a command line.
        arms: Keys of `ARMS`; None: those that the settings allow, without variants.
        seeds: Of every arm.
        output: Folder of the comparison; None: comparisons/DATA.

    Raises:
        ConfigError: An arm is unknown or cannot run, or a setting is wrong; all that is wrong with
            the arms at once.
    """
    for word in options:
        if (name := word.partition("=")[0]) in _OWN:
            raise ConfigError(f"{name} cannot be set here: {_OWN[name]}.")
    base = configuration.parse(["--config", str(recipe), *options])
    if base.seed or base.output_dir is not None:
        raise ConfigError(
            f"{recipe} sets seed or output_dir, which a comparison gives to each of its runs; take "
            "them out of it."
        )
    chosen = _chosen(arms, base)
    output = output or Path("comparisons") / Path(base.data.name).name
    problems, configs = [], {}
    settings = {name: _settings(ARMS[name], base) for name in chosen}
    for name in chosen:
        found = _missing(ARMS[name], base)
        if not found:
            try:
                configs[name] = _parse(recipe, options, settings[name])
            except ConfigError as error:
                found = [str(error)]
        problems += [f"{name}: {text}" for text in found]
    for place, name in enumerate(configs):
        for other in list(configs)[:place]:
            if configs[name] == configs[other]:
                problems.append(f"{name} has the very settings of {other}; leave one out.")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} thing(s) keep arms from running:\n{listed}")
    runs = []
    for seed in seeds:
        for name in chosen:
            # Not parsed once more: reading settings takes a second, and there are many runs.
            folder = output / name / f"seed-{seed}"
            config = replace(configs[name], seed=seed, output_dir=str(folder))
            runs.append(PlannedRun(name, seed, config, output))
    return Plan(base, chosen, tuple(seeds), output, settings, tuple(runs))


_OWN = {
    "--config": "name the file with --recipe",
    "--output_dir": "name the folder of the comparison with --output",
    "--seed": "seeds run from --first_seed on, as many as --seeds says",
    "--resume": "the same command goes on with what was interrupted",
    "--show_prompts": "scripts/train_online.py shows prompts",
}


def _chosen(arms: Sequence[str] | None, base: Config) -> tuple[str, ...]:
    if arms is None:
        able = [name for name, arm in ARMS.items() if not arm.variant and not _missing(arm, base)]
        if len(able) == 1:
            raise ConfigError(
                f"With these settings only {BASELINE} can run: there is neither a teacher nor a "
                "store of rationales. Set teacher.model or distill.rationales."
            )
        return tuple(able)
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        raise ConfigError(f"unknown arms {some_of(unknown)}; known are {', '.join(ARMS)}.")
    if len(set(arms)) < len(arms):
        raise ConfigError(f"--arms {','.join(arms)} names an arm twice; expected each once.")
    if BASELINE not in arms:
        raise ConfigError(
            f"--arms {','.join(arms)} lacks {BASELINE}, which every other arm is compared to; add "
            "it."
        )
    return tuple(arms)


def _settings(arm: Arm, base: Config) -> dict[str, Any]:
    weight = {_RDR: base.distill.lambda_rdr or DEFAULT_LAMBDA_RDR}
    return weight | arm.settings if arm.reads else dict(arm.settings)


def _missing(arm: Arm, base: Config) -> list[str]:
    """What the settings lack for an arm."""
    problems = []
    if arm.asks and base.teacher.model is None:
        problems.append("it asks a live teacher, but teacher.model is none; name one.")
    if arm.reads and base.distill.rationales is None:
        problems.append(
            "it needs --distill.rationales STORE, the folder that scripts/encode_rationales.py "
            "wrote."
        )
    weights = {_RANK: base.distill.lambda_rank, _EMB: base.distill.lambda_emb}
    for name, value in weights.items():
        if name in arm.weights and not value:
            problems.append(f"it learns by {name}, which is 0; raise it.")
    if _RANK in arm.weights and not arm.reads and base.teacher.mode == "generate":
        problems.append(
            "it learns from logits, and teacher.mode generate gives none; set it to direct or cot."
        )
    return problems


def _parse(recipe: Path, options: Sequence[str], settings: dict[str, Any]) -> Config:
    own = [f"--{name}={'none' if value is None else value}" for name, value in settings.items()]
    return configuration.parse(["--config", str(recipe), *options, *own])
