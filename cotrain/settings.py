"""Every setting of a run: what it means, its unit, its range and its default.

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
class StudentConfig:
    """The sequential recommender that is served."""

    architecture: str = option(
        "sasrec",
        "sasrec, or a student of your own as module:Class; it is given those of these settings "
        "that its __init__ names.",
    )
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


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How the teacher's verdict enters the student's loss."""

    lambda_rank: float | Literal["auto"] = option(
        0.1,
        "Weight of the ranking loss (ListNet). auto: 2.5 times the relative gain in NDCG@10 of the "
        "blend that the audit finds, at most 0.5; 0 where it finds none.",
        ge=0,
    )
    lambda_emb: float = option(0.001, "Weight of the decision-state alignment loss.", ge=0)
    student_temperature: float = option(
        1.0, "τ_s: the student's candidate scores are divided by it.", gt=0
    )
    teacher_temperature: float = option(
        1.0, "τ_t: the teacher's identifier logits are divided by it.", gt=0
    )
    target: Literal["teacher", "blend"] = option(
        "teacher",
        "What the ranking loss teaches. teacher: the teacher's own distribution Q over the "
        "candidates. blend: the control's scores of them with what the teacher adds, "
        "softmax((s + β · spread(s) · t) / τ_s), t the log of Q in units of its spread within a "
        "row; without a control, the student's own scores.",
    )
    blend_beta: float | Literal["auto"] = option(
        "auto",
        "blend: β, spreads of the scores that a spread of the teacher's is worth. auto: what the "
        "audit fits before the teacher teaches.",
        ge=0,
    )
    order_temperature: float = option(
        3.0, "τ_r: where the teacher gives an order without logits, Q ∝ exp(−rank / τ_r).", gt=0
    )
    confidence: Literal["auto", "entropy", "agreement", "none"] = option(
        "auto",
        "Weight of a row's verdict. entropy: 1 − H(Q) / log K; agreement: between the rankings of "
        "teacher.shuffles; none: 1 for every valid row. auto: entropy; but none for "
        "distill.target blend, whose β says already what a verdict counts.",
    )
    audit: Literal["off", "warn", "stop"] = option(
        "warn",
        "Ask the teacher on validation rows, before it teaches and in the end, and say whether a "
        "blend of its verdict with the student's scores beats the student's own order. stop: a "
        "teacher of which that does not show never starts.",
    )
    audit_rows: int = option(
        64, "Validation rows of an audit, all with the true item among the candidates.", ge=2
    )
    audit_evaluations: bool = option(
        False, "Audit at every evaluation as well, of as many rows each."
    )
    rationales: str | None = option(
        None,
        "Folder that scripts/encode_rationales.py wrote: reasons for training interactions, with "
        "or without a live teacher; none: no rationales.",
    )
    lambda_rdr: float = option(
        0.0,
        "Weight of the rationale loss. 0: the student is left alone, and only the head is trained "
        "that finds reasons for its recommendations.",
        ge=0,
    )
    rdr_form: Literal["cosine", "gram"] = option(
        "cosine",
        "cosine: 1 − cos(W_r u, v) of user state and rationale vector. gram: user states of a "
        "batch are to be as similar to each other as their rationales are.",
    )
    rdr_targets: Literal["plain", "centred", "whitened"] = option(
        "plain",
        "Rationale vectors as they are; without their mean, which most of their similarity comes "
        "from where texts begin alike; or with all directions made equally wide.",
    )

    @property
    def weighs_by(self) -> str:
        """`confidence`, where it is auto decided."""
        if self.confidence != "auto":
            return self.confidence
        return "none" if self.target == "blend" else "entropy"


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """Which rows ask the teacher."""

    policy: Literal["all", "random", "entropy", "margin", "loss", "k_center"] = option(
        "random",
        "Which users ask, chosen anew each epoch. all: every one. random: drawn. By the student of "
        "the epoch's start, at the epoch's cuts: entropy and margin between the two best: where "
        "softmax over its candidates is least sure; loss: where the item that was taken surprises "
        "it most; k_center: whose states are unlike each other.",
    )
    fraction: float = option(
        0.1, "Share of the users that ask the teacher in an epoch; has no say in policy all.",
        ge=0, le=1,
    )  # fmt: skip
    when: Literal["live", "offline"] = option(
        "live",
        "live: each row asks on what the student proposes in the step that learns from it. "
        "offline: the rows of all epochs ask before the first of them, on what the student of the "
        "warm-up proposes, and its verdicts are kept.",
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
    rounds: int = option(
        1,
        "Parts into which the epochs with the teacher are divided. Between two the teacher is "
        "trained on the candidates of the present student (tuning.…), then teaches on; the run "
        "ends early after a round in which the student's best validation did not rise.",
        ge=1,
    )
    max_steps: int | None = option(None, "Stop after this many steps; none: no cap.", ge=1)
    batch_size: int = option(64, "Users per optimizer step, over all processes.", ge=1)
    accumulation_steps: int = option(
        1,
        "Parts that a process trains its users of a step in, one after another, for less memory; "
        "the step stays the same.",
        ge=1,
    )
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
class TuningConfig:
    """How the teacher is trained between rounds: one pass by `rank-sft` in teacher.mode direct, by
    one round of `star` in cot."""

    rows: int = option(
        500, "train.rounds: rows of each training, other positions in each round.", ge=1
    )
    learning_rate: float = option(
        1e-4, "train.rounds: peak of the cosine schedule (AdamW) of each.", gt=0
    )
    held_out: float = option(
        0.2,
        "train.rounds: share of the users whose rows the teacher is not trained on; on them it "
        "chooses its best step.",
        gt=0,
        lt=1,
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How models are measured."""

    batch_size: int = option(256, "Users scored at once.", ge=1)
    bootstrap_samples: int = option(10_000, "Resamples of the paired bootstrap.", ge=100)


TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where a run is shown besides its folder."""

    # `with` on the command line and in files, which Python keeps for itself.
    with_: str | None = option(
        "tensorboard",
        "Joined by commas: tensorboard (files in the run folder), wandb (Weights & Biases; "
        "pip install 'cotrain[wandb]'), mlflow (pip install 'cotrain[mlflow]'); none: nothing.",
    )

    @property
    def names(self) -> list[str]:
        """Each tracker once."""
        return list(
            dict.fromkeys(name.strip() for name in (self.with_ or "").split(",") if name.strip())
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    query: QueryConfig = dataclasses.field(default_factory=QueryConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    output_dir: str | None = option(
        None, "Folder of the run, without another run in it; none: runs/DATA-DATE-TIME."
    )
    seed: int = option(0, "Seed of every random choice of the run.", ge=0)

    @property
    def distills(self) -> bool:
        """Whether, after the warm-up, something else than the data teaches the student."""
        return self.teacher.model is not None or self.distill.rationales is not None
