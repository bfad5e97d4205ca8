"""The settings that all scripts share, of data and teacher: what each means, its unit, its range
and its default. Those of a run, of rationales and of a teacher's training are in files of their
own.

Frozen dataclasses and nothing else; `cotrain.config` fills them from files and command lines.
"""

import dataclasses
from typing import Any, Literal


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
class TeacherConfig:
    """The language model that ranks the student's candidates (RankLLM)."""

    model: str | None = option(
        "smollm2-135m-instruct",
        "Causal language model: a known asset, a local folder, or a hub name; none: train the "
        "student alone.",
    )
    adapter: str | None = option(
        None, "LoRA adapter put onto the teacher: a folder or a hub name; none: the model as it is."
    )
    quantization: Literal["nf4", "int8", "bf16", "fp32"] = option(
        "nf4", "Weights: nf4 and int8 by bitsandbytes, or unquantised."
    )
    compute: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "What nf4 weights are multiplied in. auto: bf16 on a GPU and on a CPU with bf16 matrix "
        "units (AMX), fp32 on other CPUs.",
    )
    mode: Literal["direct", "generate", "cot", "bigrec", "pointwise"] = option(
        "direct",
        "direct: one forward pass, verdict read at the answer prefix. generate: the order is "
        "written out and parsed. cot: a short reasoning is written, then the verdict is read. "
        "bigrec: the title of the next item is written, and candidates are scored by how near "
        "theirs are. pointwise: of each candidate by itself, how likely yes is (K prompts a row).",
    )
    decision_position: Literal["predict", "emit"] = option(
        "predict",
        "Where the decision state is read. predict: the state whose logits choose the first "
        "identifier. emit: the state at that identifier, one more step.",
    )
    identifiers: Literal["letters", "numbers"] = option(
        "letters",
        "What candidates are called in the prompt, A, B, … or 1, 2, …; numbers that are several "
        "tokens cost a further step for each first part that several of them share.",
    )
    num_candidates: int = option(
        20, "Candidates K that are ranked; more than 26 need teacher.window.", ge=2, le=200
    )
    window: int | None = option(
        None,
        "Candidates in one prompt; K more than that are ranked by sliding windows from the back. "
        "none: all.",
        ge=2,
        le=100,
    )
    stride: int | None = option(
        None, "Candidates that a window moves on by; none: half a window.", ge=1
    )
    history_length: int = option(10, "Most recent titles of the history in the prompt.", ge=1)
    template: str = option(
        "default",
        "Prompt template: default, movies, products, for a trained teacher brief or "
        "brief-popularity, or the path of your own text file.",
    )
    item_noun: str = option("item", "What the items are called in the prompt, e.g. movie.")
    max_title_tokens: int = option(
        32, "An item's title and categories are cut to this many tokens each.", ge=1
    )
    reasoning_tokens: int = option(64, "cot: tokens of reasoning at most.", ge=1)
    reasoning_end: Literal["ranking", "paragraph"] = option(
        "ranking",
        "cot: where a reasoning ends. ranking: where the model goes on to the ranking or stops; "
        "paragraph: at its first blank line too, behind which a small model only rambles.",
    )
    search: Literal["none", "self_consistency", "tree"] = option(
        "none",
        "cot: how reasonings are looked for. none: the likeliest one. self_consistency: "
        "teacher.samples are drawn and their verdicts averaged. tree: after each step "
        "teacher.branches are drawn, and the teacher.samples that teacher.process_reward scores "
        "best go on.",
    )
    samples: int = option(
        4, "search: reasonings drawn for a row; tree: those kept after each step.", ge=1
    )
    branches: int = option(2, "tree: continuations drawn of each that is kept.", ge=1)
    search_steps: int = option(3, "tree: steps at most; a step is a sentence.", ge=1)
    search_temperature: float = option(0.8, "search: tokens are drawn at this temperature.", gt=0)
    process_reward: str | None = option(
        None,
        "tree: folder of a process reward model, as scripts/train_teacher.py writes it; needed by "
        "no other search: none.",
    )
    title_tokens: int = option(24, "bigrec: tokens of a written title at most.", ge=1)
    grounding_encoder: str = option(
        "all-minilm-l6-v2",
        "bigrec: embeds written and real titles: a sentence encoder (a known asset, a local folder "
        "or a hub name), or `teacher`, the mean of its last layer.",
    )
    grounding_weight: Literal["none", "popularity", "student"] = option(
        "none",
        "bigrec: what a candidate's nearness is weighted by: how often it was taken in training, "
        "or the student's score.",
    )
    grounding_power: float = option(1.0, "bigrec: exponent of that weight.", ge=0)
    shuffles: int = option(
        1, "Orders in which each row's candidates are shown; the verdicts are averaged.", ge=1
    )
    calibration: Literal["batch", "content_free", "none"] = option(
        "batch",
        "What the teacher gives each identifier whatever stands behind it is subtracted from its "
        "logits. batch: measured over rows of the student's candidates; content_free: over prompts "
        "with N/A for every title, which left most of the bias of a small teacher.",
    )
    calibration_rows: int = option(
        64, "Rows ranked when the teacher starts, to measure that bias before and after.", ge=0
    )
    batch_tokens: int | None = option(
        None,
        "Prompt tokens, padding included, in one forward pass; halved when memory runs out. none: "
        "8192, but 2048 for direct and pointwise on a CPU, where more only leaves the cache.",
        ge=1,
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "torch.compile of the decoder's layers, ten to twenty seconds at the start. auto: on a CPU "
        "with bf16 products and a C++ compiler, where it makes a pass half as fast again.",
    )
    memo_rows: int = option(
        0, "Verdicts kept, by prompt and adapter, to answer equal prompts at once; 0: none.", ge=0
    )

    @property
    def num_shown(self) -> int:
        """W, candidates in one prompt."""
        return min(self.window or self.num_candidates, self.num_candidates)
