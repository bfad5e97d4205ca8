"""The heart: one co-training step.

The teacher only ever appears here as `Teacher.ask`, under no_grad and outside `prepare`: it is in
no optimizer and in no checkpoint.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cotrain.config import Config
from cotrain.data.batches import SequenceBatch
from cotrain.distill import losses
from cotrain.distill.learner import Learner
from cotrain.distill.meters import TeacherMeter
from cotrain.distill.querying import Teacher, verdict_weight
from cotrain.distill.rationales import Found, Rationales, RationaleTerms
from cotrain.distill.state import CotrainState
from cotrain.distill.targets import blend_probs
from cotrain.distill.verdicts import Judged
from cotrain.errors import CotrainError
from cotrain.runtime.seeding import replayed, torch_state
from cotrain.runtime.tracking import gather
from cotrain.student.losses import TrainingLoss
from cotrain.student.protocol import StudentOutput
from cotrain.student.retrieval import Candidates, retrieve
from cotrain.teacher.verdict import entropy


def cotrain_step(
    state: CotrainState,
    batch: SequenceBatch,
    teacher: Teacher | None,
    loss: TrainingLoss,
    config: Config,
    accelerator: Accelerator,
    rationales: Rationales | None = None,
    rationales_teach: bool = True,
) -> dict[str, float]:
    """One optimizer step of the student, and of the control beside it.

    The student proposes, the teacher judges; then the control learns, and the student, each in
    `train.accumulation_steps` parts of the rows. Collectives, the same on every process whatever
    the teacher answered: questions and verdicts, the projector's moments, the counts, the
    gradients, the sums of the losses.

    Args:
        state: Changed in place.
        batch: This process's rows, on the CPU.
        teacher: None while nobody is asked.
        loss: What the data teach by.
        config: Settings of the run.
        accelerator: Device and collectives.
        rationales: Of the training data, or None.
        rationales_teach: False: only W_r learns, from states that it leaves alone.

    Returns:
        Losses, each a mean over its own rows of all processes, and the teacher's entropy.
    """
    device, weights = accelerator.device, config.distill
    dropout_state = torch_state(device)
    judged = None
    if teacher is not None:
        # The same dropout as in the forward that learns: it draws again what is drawn here.
        with replayed(dropout_state, device):
            judged = let_judge(state, batch, teacher, config, accelerator)
    parts = make_parts(batch, judged, rationales, config, accelerator)
    counts = total(torch.stack([part.counts() for part in parts]).sum(0), accelerator)
    n_targets, n_valid, n_reasons = counts.tolist()
    share = Share(
        max(n_targets, 1), max(n_valid, 1), max(n_reasons, 1),
        state.lambda_rank, weights.lambda_emb,
    )  # fmt: skip

    learn = functools.partial(
        learn_from, parts=parts, loss=loss, rationales=rationales, share=share,
        blend_beta=state.blend_beta if weights.target == "blend" else None,
    )  # fmt: skip
    control_scores, of_control = None, {}
    if state.control is not None:
        # The same dropout masks as the student's: any difference comes from what distills. Before
        # the student, for what the control says of the candidates is what a blend is made with.
        with replayed(dropout_state, device):
            sums, control_scores = learn(state.control, lambda_rdr=0.0)
        ce, _, _, _, distance, _ = total(sums, accelerator).tolist()
        if n_reasons:
            of_control["control_rationale_cosine"] = 1 - distance / n_reasons
        state.control.update()
        of_control["control_loss_ce"] = ce / share.n_targets
    sums, _ = learn(
        state.student, lambda_rdr=weights.lambda_rdr if rationales_teach else 0.0,
        meter=state.meter, references=control_scores,
    )  # fmt: skip
    ce, rank, emb, nats, distance, rdr = total(sums, accelerator).tolist()
    report = {"loss_ce": ce / share.n_targets}
    if teacher is not None:
        report["teacher_rows"] = n_valid
    if n_valid:
        report |= {"loss_rank": rank / n_valid, "loss_emb": emb / n_valid}
        report["teacher_entropy"] = nats / n_valid
    if n_reasons:
        report |= {"rationale_rows": n_reasons, "rationale_cosine": 1 - distance / n_reasons}
    if n_reasons and rationales_teach:
        report["loss_rdr"] = rdr / n_reasons
    report["loss"] = (
        report["loss_ce"]
        + state.lambda_rank * report.get("loss_rank", 0.0)
        + weights.lambda_emb * report.get("loss_emb", 0.0)
        + weights.lambda_rdr * report.get("loss_rdr", 0.0)
    )
    if not math.isfinite(report["loss"]):
        raise CotrainError(
            f"The loss is {report['loss']} at step {state.step + 1} ({report}). Lower "
            "train.learning_rate or the distill.lambda_… of the term that is not finite."
        )
    state.student.update()
    return report | of_control


@dataclass(frozen=True)
class Part:
    """Rows that one forward takes, with all that is known of them before it."""

    batch: SequenceBatch
    judged: Judged | None
    found: Found | None

    def counts(self) -> Tensor:
        """(3,) rows of each kind of loss: targets, valid verdicts, rationales."""
        n_targets = 0 if self.batch.borrowed else len(self.batch.target_ids)
        n_valid = 0 if self.judged is None else int(self.judged.valid.sum())
        n_reasons = 0 if self.found is None else len(self.found[0])
        device = self.batch.user_index.device
        return torch.tensor([n_targets, n_valid, n_reasons], dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Share:
    """What a sum over rows is divided by, and weighted with, to be its share of the step's loss:
    rows of all processes and parts, at least 1."""

    n_targets: float
    n_valid: float
    n_reasons: float
    lambda_rank: float
    lambda_emb: float


def let_judge(
    state: CotrainState,
    batch: SequenceBatch,
    teacher: Teacher,
    config: Config,
    accelerator: Accelerator,
) -> Judged:
    """Verdicts on a whole batch, where the student is; a collective.

    Args:
        state: Gives the student, and verdicts that were kept, and keeps those that later epochs
            repeat; its meter and the projector's moments change.
        batch: This process's rows, on the CPU, where prompts are made.
        teacher: Who is asked, and which rows ask.
        config: Whether the teacher is asked now; confidence.
        accelerator: Device and collectives.
    """
    epoch = config.asking_epoch(state.epoch)
    if config.query.when == "offline" or epoch < state.epoch:
        judged = state.kept.of_batch(batch, epoch)
    else:
        judged = ask(state, batch, teacher, epoch, config, accelerator)
        if config.asking_epoch(state.epoch + 1) == epoch:
            state.fresh += gather((batch.user_index, judged))
    judged = judged.to(accelerator.device)
    assert state.projector is not None  # there is a teacher
    state.projector.observe(
        judged.decision_state, judged.valid, lambda sums: total(sums, accelerator)
    )
    return judged


def ask(
    state: CotrainState,
    batch: SequenceBatch,
    teacher: Teacher,
    epoch: int,
    config: Config,
    accelerator: Accelerator,
) -> Judged:
    """Let the teacher judge what the student proposes for the rows of a CPU batch that ask in an
    epoch; a collective. The verdicts are on the CPU."""
    state.student.refresh()
    candidates = propose(state.student, batch, teacher.num_candidates, accelerator)
    verdict, asked = teacher.ask(batch, candidates, epoch)
    state.meter.observe(batch, candidates, verdict, asked)
    weight = verdict_weight(verdict, config.distill.weighs_by)
    return Judged(candidates.item_ids, verdict.probs, verdict.decision_state, verdict.valid, weight)


@torch.no_grad()
def propose(
    student: Learner, batch: SequenceBatch, num_candidates: int, accelerator: Accelerator
) -> Candidates:
    """The student's candidates at the cut of every row of a CPU batch, on the CPU."""
    on_device = batch.to(accelerator.device)
    candidates = retrieve(
        states_at_cut(student, on_device, accelerator), student.bare.item_vectors,
        on_device.history, on_device.cut_target, num_candidates,
    )  # fmt: skip
    return candidates.cpu()


@torch.no_grad()
def states_at_cut(student: Learner, batch: SequenceBatch, accelerator: Accelerator) -> Tensor:
    """(B, D) float32 states at the cut of every row of a batch on the device."""
    with accelerator.autocast():
        return student.bare.encode(batch.sequences)[batch.cut].float()


def make_parts(
    batch: SequenceBatch,
    judged: Judged | None,
    rationales: Rationales | None,
    config: Config,
    accelerator: Accelerator,
) -> list[Part]:
    """This process's rows in `train.accumulation_steps` parts, fewer where a process has fewer
    rows: all need the same number, because each part may wait for those of the others."""
    count = config.train.accumulation_steps
    if count > 1:
        rows = torch.tensor([len(batch.user_index)], device=accelerator.device)
        gathered = accelerator.gather(rows)
        assert isinstance(gathered, Tensor)  # a tensor goes in
        count = min(count, int(gathered.min()))
    parts, first, device = [], 0, accelerator.device
    for piece in batch.split(count):
        end = first + len(piece.user_index)
        parts.append(
            Part(
                piece.to(device),
                None if judged is None else judged.rows(slice(first, end)),
                None if rationales is None else rationales.of_batch(piece, device),
            )
        )
        first = end
    return parts


def learn_from(
    learner: Learner,
    parts: Sequence[Part],
    loss: TrainingLoss,
    rationales: Rationales | None,
    share: Share,
    lambda_rdr: float,
    blend_beta: float | None = None,
    meter: TeacherMeter | None = None,
    references: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a step, part by part.

    Args:
        learner: Its gradients are replaced. Without a projector the verdicts teach nothing.
        parts: This process's.
        loss: What the data teach by.
        rationales: Of the training data, or None.
        share: What sums are divided by.
        lambda_rdr: Weight of the rationales, or 0: states are left alone.
        blend_beta: β of the blend that the ranking loss teaches; None: it teaches the verdict.
        meter: Takes the user states; None: nobody does.
        references: By part, (B, K) scores of the candidates that a blend is made with; None where
            none is taught.

    Returns:
        (6,) float64 sums over this process's rows: of the data's loss, the ranking loss, the
        alignment loss, the teacher's entropy, the head's cosine distance, the rationale loss.
        And by part its own scores of the candidates, without a graph, where they were computed.
    """
    learner.start_step()
    sums = torch.zeros(6, dtype=torch.float64, device=parts[0].batch.user_index.device)
    scores: list[Tensor | None] = []
    for place, part in enumerate(parts):
        judged = part.judged if learner.projector is not None else None
        with learner.part(last=place == len(parts) - 1):
            scored = part.judged if blend_beta is not None else judged
            asked = None if scored is None else scored.candidate_ids
            output = learner.model(part.batch, loss, asked)
            own = output.candidate_scores
            scores.append(None if own is None else own.detach())
            nothing = output.loss_sum.new_zeros(())
            if meter is not None and not part.batch.borrowed:
                meter.student_states.add(output.user_state)
            ce = output.loss_sum * (not part.batch.borrowed)
            rank, emb, nats = nothing, nothing, nothing
            if judged is not None:
                reference = None if references is None else references[place]
                rank, emb, nats = distillation_sums(learner, output, judged, blend_beta, reference)
            reasons = RationaleTerms(nothing, nothing, nothing)
            if rationales is not None and part.found is not None:
                reasons = rationales.terms(learner.head, output.states, part.found, lambda_rdr)
            learner.backward(
                ce / share.n_targets
                + share.lambda_rank * rank / share.n_valid
                + share.lambda_emb * emb / share.n_valid
                + reasons.gradient_sum / share.n_reasons
            )
        terms = [ce, rank, emb, nats, reasons.head_sum, reasons.student_sum]
        sums += torch.stack([term.detach().double() for term in terms])
    return sums, scores


def distillation_sums(
    student: Learner,
    output: StudentOutput,
    judged: Judged,
    blend_beta: float | None,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranking loss, alignment loss and the teacher's entropy, summed over rows. Only the student's
    states and item embeddings, and the projector, carry a gradient."""
    assert student.projector is not None
    assert output.candidate_scores is not None
    temperature, target = student.config.distill.student_temperature, judged.probs
    if blend_beta is not None:
        assert reference is not None  # of these candidates
        target = blend_probs(reference, judged.probs, blend_beta, temperature)
    # Of all rows, also of those without a verdict: processes agree on what has a gradient.
    projected = student.projector(judged.decision_state)
    return (
        losses.listnet_sum(output.candidate_scores, target, judged.weight, temperature),
        losses.alignment_sum(projected, output.user_state, judged.weight),
        (entropy(judged.probs) * judged.valid).sum(),
    )


def total(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum over all processes, in float64 and without a graph; a collective."""
    summed = accelerator.reduce(values.detach().double(), "sum")
    assert isinstance(summed, Tensor)  # a tensor goes in
    return summed
