"""Every setting of the teacher's own training and of its evaluation, as
`cotrain.run_settings` has those of a run."""

import dataclasses
from typing import Literal

from cotrain.settings import DataConfig, TeacherConfig, option


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Which rows the teacher learns from, and which candidates stand in their prompts."""

    student: str | None = option(
        None,
        "A run of scripts/train_online.py, or its student/ folder: whose candidates are shown. "
        "none: only where examples.candidates needs no student.",
    )
    candidates: Literal["student", "random", "popular"] = option(
        "student",
        "student: its top K, as the teacher will meet them. random, popular: the true item among "
        "others drawn evenly, or by how often they were taken in training.",
    )
    missing: Literal["drop", "inject"] = option(
        "drop",
        "student: rows whose K candidates hold nothing that the user takes later. drop: not used. "
        "inject: the true item takes the last place; it is then the odd one out, which a teacher "
        "learns to see and will not meet again.",
    )
    rows: int = option(2000, "Training rows, drawn from training positions alone.", ge=1)
    draw: int = option(0, "Another number draws other training positions, of the same users.", ge=0)
    min_history: int = option(3, "Items before the position, at least.", ge=1)
    future_weight: float = option(
        0.3,
        "How much a candidate counts that the user takes later in training, where the true next "
        "item counts 1. 0: only the next item counts.",
        ge=0,
        le=1,
    )
    held_out: float = option(
        0.1, "Share of the users that training never sees; the best step is chosen on them.",
        gt=0, lt=1,
    )  # fmt: skip
    validation_rows: int = option(
        200, "Of those users, validation rows whose candidates hold the true item, at most.", ge=1
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The adapter that is trained on the frozen, quantised weights."""

    rank: int = option(16, "Rank r.", ge=1)
    alpha: float = option(32.0, "The update is scaled by alpha / rank.", gt=0)
    dropout: float = option(0.05, "Dropout before the adapter.", ge=0, lt=1)
    modules: Literal["attention", "mlp", "all"] = option(
        "all", "Linear layers that get one; never the output head."
    )
    last_layers: int | None = option(
        None,
        "Only so many of the last layers get one: nothing is kept or computed backward below them. "
        "none: all.",
        ge=1,
    )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """How an adapter is fitted."""

    loss: Literal["ce", "ranknet", "listmle"] = option(
        "ce",
        "rank-sft: on the identifier logits at the decision position. ce: softmax cross-entropy; "
        "ranknet: pairs; listmle: likelihood of the order.",
    )
    recognition_rows: int = option(
        0,
        "rank-sft: rows of a first warm-up, whose answer is the label of the one candidate of six "
        "that stands in the history: it teaches a small model what a label is. 480 do for "
        "SmolLM2-135M; large models need none.",
        ge=0,
    )
    recognition_learning_rate: float = option(1e-3, "Peak in the first warm-up.", gt=0)
    popularity_rows: int = option(
        0,
        "rank-sft: rows of a second warm-up, every other one with the most popular of six "
        "candidates as the answer; for templates that show popularity.",
        ge=0,
    )
    order_rows: int = option(
        0,
        "rank-sft: rows of a third warm-up, every other one with all its candidates by their "
        "popularity as the answer.",
        ge=0,
    )
    popularity_learning_rate: float = option(
        6e-4, "Peak in the second and the third warm-up.", gt=0
    )
    epochs: int = option(2, "Passes over the rows; candidates are shuffled anew in each.", ge=1)
    max_steps: int | None = option(None, "Stop after this many steps; none: no cap.", ge=1)
    batch_size: int = option(16, "Rows an optimizer step, over all processes.", ge=1)
    micro_batch_tokens: int = option(
        2048,
        "Tokens, padding included, of one pass forward and backward; halved when memory runs out.",
        ge=1,
    )
    learning_rate: float = option(3e-4, "Peak of the cosine schedule (AdamW).", gt=0)
    lr_warmup_steps: int = option(10, "Steps of linear learning-rate warm-up.", ge=0)
    final_lr_ratio: float = option(
        0.1, "Learning rate at the last step, as a share of the peak.", ge=0, le=1
    )
    weight_decay: float = option(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = option(1.0, "Gradient norm is clipped to this.", gt=0)
    eval_every_steps: int = option(
        25, "Steps between validations; each writes a checkpoint as well.", ge=1
    )
    best_by: Literal["nll", "ndcg@10"] = option(
        "nll",
        "Which validation counts as the best, in star and rl as well. nll: -log probability of the "
        "true item, the smoother one, which sees overconfidence too; ndcg@10: the order alone, for "
        "ranknet and listmle, whose logits are no probabilities.",
    )
    patience: int = option(4, "Validations without a better one before it stops.", ge=1)
    gradient_checkpointing: Literal["auto", "on", "off"] = option(
        "auto",
        "Compute activations again rather than keep them: a third more time, a fraction of the "
        "memory. auto: on a GPU.",
    )
    reasoning_weight: float = option(
        1.0, "cot-sft, star: weight of the loss on the tokens of the reasoning.", ge=0
    )
    answer_weight: float = option(
        1.0, "cot-sft, star: weight of the loss on the identifier after it.", ge=0
    )


@dataclasses.dataclass(frozen=True)
class CotConfig:
    """Whose reasonings are learned."""

    rationales: str | None = option(
        None,
        "cot-sft: JSON lines of rationales, or the folder that scripts/generate_rationales.py "
        "wrote.",
    )
    drop_flags: str | None = option(
        "empty,refusal,repeats,echo,unfinished,foreign_title,language",
        "Rationales with one of these flags are not learned from; none: all are.",
    )


@dataclasses.dataclass(frozen=True)
class StarConfig:
    """Rounds of self-taught reasoning (STaR)."""

    rounds: int = option(3, "At most; it stops when the held-out gain ends.", ge=1)
    samples: int = option(4, "Reasonings drawn for each row.", ge=1)
    temperature: float = option(0.8, "They are drawn at this temperature.", gt=0)
    top_p: float = option(0.95, "From the likeliest tokens that have this share.", gt=0, le=1)
    keep_per_row: int = option(1, "Reasonings kept of a row, the surest first.", ge=1)
    rationalize: bool = option(
        True,
        "Rows without a right answer are drawn once more with the answer as a hint, which is left "
        "out of the example that is kept.",
    )
    min_gain: float = option(
        0.0, "A round must gain more than this, of sft.best_by, for another to follow.", ge=0
    )


@dataclasses.dataclass(frozen=True)
class ProcessRewardConfig:
    """The reward model that scores each step of a reasoning."""

    rollouts: int = option(4, "Completions drawn from the end of each step.", ge=1)
    temperature: float = option(1.0, "They are drawn at this temperature.", gt=0)
    max_steps: int = option(3, "Steps of a reasoning that are scored, from its beginning.", ge=1)
    reached: Literal["first", "reciprocal_rank"] = option(
        "first",
        "What a completion is worth. first: 1 if the right item is ranked first; reciprocal_rank: "
        "1 / its rank, a finer measure of the same.",
    )
    epochs: int = option(200, "Passes over the steps; the best one on held-out users stays.", ge=1)
    learning_rate: float = option(1e-3, "Of the head (AdamW).", gt=0)


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """GRPO with verifiable and process rewards."""

    steps: int = option(20, "Optimizer steps.", ge=1)
    prompts_per_step: int = option(4, "Prompts of each step.", ge=1)
    group_size: int = option(8, "Reasonings drawn for each prompt.", ge=2)
    temperature: float = option(1.0, "They are drawn at this temperature.", gt=0)
    learning_rate: float = option(2e-5, "Peak; linear to 0.", gt=0)
    beta: float = option(0.04, "Weight of the KL divergence to where it started.", ge=0)
    rank_weight: float = option(1.0, "Reward: reciprocal rank of the true item.", ge=0)
    format_weight: float = option(
        0.1, "Reward: ends by itself with the opening of the ranking, once, and no label before.",
        ge=0,
    )  # fmt: skip
    grounding_weight: float = option(
        0.1, "Reward: names no titles or categories but those in the prompt.", ge=0
    )
    process_weight: float = option(
        0.5, "Reward: mean score of its steps by the process reward model.", ge=0
    )
    repetition_weight: float = option(
        0.2, "Penalty: share of its runs of three words that were there before.", ge=0
    )
    length_weight: float = option(
        0.2,
        "Penalty: 1 if it was cut off at teacher.reasoning_tokens, else the share by which it is "
        "shorter than rl.min_tokens.",
        ge=0,
    )
    min_tokens: int = option(8, "A shorter reasoning is penalised.", ge=0)
    process_reward: str | None = option(
        None, "Folder of the process reward model; needed where rl.process_weight is above 0."
    )


@dataclasses.dataclass(frozen=True)
class BigRecConfig:
    """The generative recommender, and the pointwise scorer."""

    task: Literal["title", "yes_no"] = option(
        "title",
        "title: write the title of the next item (BIGRec), for teacher.mode bigrec. yes_no: say "
        "whether the user takes an item (TALLRec), for teacher.mode pointwise.",
    )
    negatives: int = option(1, "yes_no: candidates not taken, for each that is.", ge=1)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The training of a teacher."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    examples: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    cot: CotConfig = dataclasses.field(default_factory=CotConfig)
    star: StarConfig = dataclasses.field(default_factory=StarConfig)
    process: ProcessRewardConfig = dataclasses.field(default_factory=ProcessRewardConfig)
    rl: RlConfig = dataclasses.field(default_factory=RlConfig)
    bigrec: BigRecConfig = dataclasses.field(default_factory=BigRecConfig)
    output: str | None = option(
        None,
        "Folder of the training; what was interrupted there is gone on with. none: "
        "teachers/DATA-METHOD.",
    )
    seed: int = option(0, "Seed of every random choice.", ge=0)


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Which rows a teacher is measured on, and beside what."""

    users: Literal["all", "held_out"] = option(
        "all",
        "Validation rows of all users, or only of those that examples.held_out and seed keep out "
        "of a teacher's training.",
    )
    rows: int | None = option(
        None, "Most rows, drawn at random among those whose candidates hold the true item; none: "
        "all.", ge=1,
    )  # fmt: skip
    against: str | None = option(
        None, "Folder of another such evaluation of the same rows, to compare with in pairs."
    )
    bootstrap_samples: int = option(10_000, "Resamples of the bootstrap over rows.", ge=100)
    searches: str | None = option(
        None,
        "cot: measure several ways to search in one table, such as greedy,sc4,sc8,tree4x2x2 "
        "(self-consistency over so many samples; branches × beam × steps). none: the settings of "
        "teacher alone.",
    )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The evaluation of a teacher."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    examples: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)
    measure: MeasureConfig = dataclasses.field(default_factory=MeasureConfig)
    output: str | None = option(
        None, "Folder of the report, not yet there; none: teachers/DATA-evaluation-TIME."
    )
    seed: int = option(0, "Seed of every random choice.", ge=0)
