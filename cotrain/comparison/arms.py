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
        """Whether a live teacher takes part, of those that the recipe has to name."""
        by_text = self.settings.get("distill.ranker") == "nearness"
        return not by_text and self.settings.get("teacher.model", "") is not None

    @property
    def reads(self) -> bool:
        """Whether rationales take part."""
        return self.settings.get("distill.rationales", "") is not None


_NO_TEACHER: dict[str, Any] = {"teacher.model": None, "distill.ranker": "llm"}
_NO_RATIONALES: dict[str, Any] = {"distill.rationales": None, "distill.lambda_rdr": 0.0}
_RANK, _EMB, _RDR = "distill.lambda_rank", "distill.lambda_emb", "distill.lambda_rdr"
_TARGET, _WHEN = "distill.target", "query.when"

ARMS = {
    "ce": Arm(
        "cross-entropy on the data and nothing else; all others are compared to it",
        _NO_TEACHER | _NO_RATIONALES,
    ),
    "logit_kd": Arm(
        "a live teacher's identifier logits: ListNet against softmax(logits / τ_t), whose gradient "
        "is that of KL logit distillation",
        _NO_RATIONALES | {_EMB: 0.0, _TARGET: "teacher"},
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
    "ranking": Arm(
        "a live teacher's logits blended with the control's scores: ListNet against what the "
        "teacher adds to them",
        _NO_RATIONALES | {_EMB: 0.0, _TARGET: "blend", _WHEN: "live"},
        (_RANK,),
    ),
    "full": Arm("logits, decision state and rationales together", {}, (_RANK, _EMB, _RDR)),
    "offline": Arm(
        "ranking, but all rows are asked once, on what the student proposes after its warm-up",
        _NO_RATIONALES | {_EMB: 0.0, _TARGET: "blend", _WHEN: "offline"},
        (_RANK,),
        variant=True,
    ),
    "nearness": Arm(
        "ranking, by a sentence encoder in the language model's place: what a language model has "
        "to beat",
        _NO_RATIONALES | {_EMB: 0.0, _TARGET: "blend", _WHEN: "live", "distill.ranker": "nearness"},
        (_RANK,),
        variant=True,
    ),
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
        arm: Its name.
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
        arms: Names, the baseline's among them.
        seeds: Of every arm.
        output: Folder of the comparison.
        defined: What each arm is.
        settings: By arm, as `Arm.settings` with the weight of rationales filled in.
        runs: By seed, then arm: what is there after an hour can be compared already.
    """

    base: Config
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    defined: dict[str, Arm] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: tuple[PlannedRun, ...] = ()


def make_plan(
    recipe: Path,
    options: Sequence[str],
    arms: Sequence[str] | None,
    seeds: Sequence[int],
    output: Path | None,
    vary: Sequence[str] = (),
    vary_arm: str | None = None,
) -> Plan:
    """Check every arm's settings and lay out the runs.

    Args:
        recipe: YAML file of settings.
        options: Dotted settings that hold for all arms, as on a command line.
        arms: Keys of `ARMS`; None: those that the settings allow, without variants.
        seeds: Of every arm.
        output: Folder of the comparison; None: comparisons/DATA.
        vary: Settings with values, as `distill.lambda_rank=0.05,0.3`; each value is a further arm.
        vary_arm: Which of the arms these are like but for that value; None: the last one.

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
    defined = {name: ARMS[name] for name in chosen} | _varied(vary, vary_arm or chosen[-1], chosen)
    problems, configs = [], {}
    settings = {name: _settings(arm, base) for name, arm in defined.items()}
    for name, arm in defined.items():
        found = _missing(arm, base)
        if not found:
            try:
                configs[name] = _parse(recipe, options, settings[name])
            except ConfigError as error:
                found = [str(error)]
        problems += [f"{name}: {text}" for text in found]
    for name, other in _alike(configs):
        if name in chosen:
            problems.append(f"{name} has the very settings of {other}; leave one out.")
        else:  # the value that the recipe has, and so an arm that is there already
            del defined[name], settings[name]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} thing(s) keep arms from running:\n{listed}")
    runs = []
    for seed in seeds:
        for name in defined:
            # Not parsed once more: reading settings takes a second, and there are many runs.
            folder = output / name / f"seed-{seed}"
            config = replace(configs[name], seed=seed, output_dir=str(folder))
            runs.append(PlannedRun(name, seed, config, output))
    return Plan(base, tuple(defined), tuple(seeds), output, defined, settings, tuple(runs))


_OWN = {
    "--config": "name the file with --recipe",
    "--output_dir": "name the folder of the comparison with --output",
    "--seed": "seeds run from --first_seed on, as many as --seeds says",
    "--resume": "the same command goes on with what was interrupted",
    "--train.warm_start": "runs that begin alike share their warm-up by themselves",
    "--train.keep_warm_up": "runs that begin alike share their warm-up by themselves",
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


def _alike(configs: dict[str, Config]) -> list[tuple[str, str]]:
    """Names with the first one before each that has the same settings."""
    found, names = [], list(configs)
    for place, name in enumerate(names):
        same = [other for other in names[:place] if configs[other] == configs[name]]
        found += [(name, other) for other in same[:1]]
    return found


def _varied(vary: Sequence[str], like: str, chosen: Sequence[str]) -> dict[str, Arm]:
    """An arm for each value, by name.

    Raises:
        ConfigError: There is no such arm, or what is varied is not told.
    """
    if vary and like not in chosen:
        raise ConfigError(f"--vary_arm {like} is none of the arms {', '.join(chosen)}; add it.")
    found = {}
    for word in vary:
        setting, _, values = word.removeprefix("--").partition("=")
        if not setting or not all(values.split(",")):
            raise ConfigError(
                f"--vary {word!r} names no values; expected SETTING=VALUE,VALUE, such as "
                "distill.lambda_rank=0.05,0.3."
            )
        if f"--{setting}" in _OWN:
            raise ConfigError(f"--vary {setting} cannot be done: {_OWN[f'--{setting}']}.")
        for value in values.split(","):
            short = f"{setting.rpartition('.')[2]}={value.replace('/', '_')}"
            given = None if value == "none" else value
            found[f"{like}+{short}"] = replace(
                ARMS[like], summary=f"{like}, but with {setting} {value}",
                settings=ARMS[like].settings | {setting: given},
            )  # fmt: skip
    return found


def _settings(arm: Arm, base: Config) -> dict[str, Any]:
    weight = {_RDR: base.distill.lambda_rdr or DEFAULT_LAMBDA_RDR}
    return weight | arm.settings if arm.reads else dict(arm.settings)


def _missing(arm: Arm, base: Config) -> list[str]:
    """What the settings lack for an arm."""
    problems = []
    if arm.asks and not base.has_teacher:
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
    fits = arm.settings.get(_TARGET) == "blend" and base.distill.blend_beta == "auto"
    if fits and base.distill.audit == "off":
        problems.append(
            "it learns a blend that the audit fits, and distill.audit is off; set it to warn, or "
            "distill.blend_beta to a number."
        )
    return problems


def _parse(recipe: Path, options: Sequence[str], settings: dict[str, Any]) -> Config:
    own = [f"--{name}={'none' if value is None else value}" for name, value in settings.items()]
    return configuration.parse(["--config", str(recipe), *options, *own])
