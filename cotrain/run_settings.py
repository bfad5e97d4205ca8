"""Every setting of a run, beside those of data and teacher, which `cotrain.settings` has."""

import dataclasses
from typing import Literal

from cotrain.settings import DataConfig, TeacherConfig, option


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
class DistillConfig:
    """How the teacher's verdict enters the student's loss."""

    ranker: Literal["llm", "nearness"] = option(
        "llm",
        "Who ranks. llm: teacher.model. nearness: the yardstick that a language model has to beat, "
        "how near a candidate's text is to those of the teacher.history_length items last taken, "
        "by teacher.grounding_encoder; teacher.model is not read.",
    )
    lambda_rank: float | Literal["auto"] = option(
        0.1,
        "Weight of the ranking loss (ListNet). auto: 2.5 times the relative gain in NDCG@10 of the "
        "blend that the audit finds, at most 0.5, and for distill.target blend 250 times, at most "
        "5; 0 where it finds none.",
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
        "softmax((s + β · log Q) / τ_s).",
    )
    blend_beta: float | Literal["auto"] = option(
        "auto",
        "blend: β, scores that a nat of the teacher's log-probabilities is worth. auto: what the "
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
    reuse: int = option(
        1,
        "Epochs in which a verdict teaches, the one that asks among them. 4: a quarter of the rows "
        "ask, in every fourth epoch, whose rows and verdicts the three after it repeat.",
        ge=1,
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
    warm_start: str | None = option(
        None,
        "Folder of a run with train.keep_warm_up, whose warm-up this one takes over instead of "
        "repeating it: of the same data, student, training and seed; none: from the start.",
    )
    keep_warm_up: bool = option(
        False, "Keep the state at the end of the warm-up, for others to start from."
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

    def round_end(self, number: int) -> int:
        """Epochs done when a round ends, counted from 1; 0: when the first one begins."""
        return self.warmup_epochs + (self.epochs - self.warmup_epochs) * number // self.rounds


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
        return self.has_teacher or self.distill.rationales is not None

    @property
    def has_teacher(self) -> bool:
        """Whether somebody ranks the student's candidates."""
        return self.distill.ranker == "nearness" or self.teacher.model is not None

    def asking_epoch(self, epoch: int) -> int:
        """The epoch whose rows and verdicts teach in an epoch, both counted from 0: itself, or with
        `query.reuse` one before it in the same round."""
        train = self.train
        if not self.has_teacher or epoch < train.warmup_epochs:
            return epoch
        start = max(end for n in range(train.rounds) if (end := train.round_end(n)) <= epoch)
        return epoch - (epoch - start) % self.query.reuse

    def asks(self, epoch: int) -> bool:
        """Whether the teacher is asked about the rows of an epoch, counted from 0."""
        taught = self.has_teacher and epoch >= self.train.warmup_epochs
        return taught and self.asking_epoch(epoch) == epoch
