"""Every setting of the writing and the encoding of rationales, as `cotrain.run_settings` has those
of a run."""

import dataclasses
from typing import Literal

from cotrain.settings import DataConfig, TeacherConfig, option


@dataclasses.dataclass(frozen=True)
class RationaleConfig:
    """Which training interactions get a reason, and who writes it."""

    select: Literal["random", "entropy", "margin", "loss", "k_center"] = option(
        "random",
        "Interactions that get a rationale: at random; those that a trained student is least sure "
        "of (entropy of its scores, margin between its two best, loss on what was taken); or "
        "k_center, as unlike each other as its user states allow.",
    )
    student: str | None = option(
        None, "Folder of that trained student, as a run writes it; not needed by random."
    )
    rows: int | None = option(None, "How many; none: by rationale.fraction.", ge=1)
    fraction: float = option(0.1, "Share of the training interactions.", gt=0, le=1)
    user_fraction: float = option(1.0, "Share of the users who may get some.", gt=0, le=1)
    per_user: int | None = option(None, "Most of one user; none: no limit.", ge=1)
    strata: Literal["popularity", "none"] = option(
        "popularity",
        "popularity: as many for rare items as for popular ones, while there are any (strata of "
        "1–5, 6–20, 21–100 and more training interactions). none: as they come, mostly popular.",
    )
    backend: Literal["local", "endpoint"] = option(
        "local",
        "Who writes. local: teacher.model on this machine. endpoint: a server that speaks OpenAI's "
        "protocol; its key is taken from OPENAI_API_KEY alone.",
    )
    quantization: Literal["nf4", "int8", "bf16", "fp32"] | None = option(
        None,
        "local: weights of the model that writes; none: teacher.quantization. In 4 bits a small "
        "model says the same again and again, where ranking still works.",
    )
    endpoint_url: str | None = option(
        None, "endpoint: address, e.g. http://127.0.0.1:8000/v1; none: OpenAI's own."
    )
    endpoint_model: str | None = option(None, "endpoint: name of the model there.")
    concurrency: int = option(8, "endpoint: requests under way at once.", ge=1)
    requests_per_minute: int | None = option(
        None, "endpoint: most requests sent in a minute; none: no limit.", ge=1
    )
    max_retries: int = option(5, "endpoint: tries after the first, with growing pauses.", ge=0)
    timeout_s: float = option(120.0, "endpoint: seconds that one answer may take.", gt=0)
    template: str = option(
        "default", "Prompt template: default, movies, products, or the path of your own text file."
    )
    history_length: int = option(10, "Most recent titles of the history in the prompt.", ge=1)
    max_tokens: int = option(64, "Tokens of a rationale at most.", ge=1)
    temperature: float = option(
        0.0, "0: the likeliest word each time; above: drawn, by a seed of each row.", ge=0
    )
    top_p: float = option(
        1.0, "Drawn from the likeliest words that together have this share.", gt=0, le=1
    )
    min_words: int = option(6, "A shorter rationale is flagged too_short.", ge=1)
    max_words: int = option(80, "A longer one is flagged too_long.", ge=1)
    language: str | None = option(
        "en", "ISO 639-1 code; a rationale in another language is flagged. none: not looked at."
    )
    keep_flagged: bool = option(
        True, "Flagged rationales are written as well, with their flags; false: only counted."
    )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The writing of rationales."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    rationale: RationaleConfig = dataclasses.field(default_factory=RationaleConfig)
    output: str | None = option(
        None, "Folder of the rationales; what is there is gone on with. none: rationales/DATA."
    )
    seed: int = option(0, "Seed of every random choice.", ge=0)


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Rationales to vectors."""

    rationales: str | None = option(
        None, "JSON lines of rationales, or the folder that scripts/generate_rationales.py wrote."
    )
    output: str | None = option(
        None, "Folder of the store, not yet there; none: beside the rationales, by the encoder."
    )
    encoder: str = option(
        "all-minilm-l6-v2",
        "A sentence encoder (a known asset, a local folder or a hub name), or `teacher`: the mean "
        "of the last layer of teacher.model.",
    )
    dtype: Literal["float16", "float32"] = option("float16", "Of the vectors on disk.")
    batch_size: int = option(64, "Texts encoded at once.", ge=1)
    drop_flags: str | None = option(
        "empty,refusal,repeats", "Rationales with one of these flags are left out; none: keep all."
    )
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
