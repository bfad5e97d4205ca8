"""`scripts/benchmark.py teacher --memory`: what a co-training step with a 7B teacher holds.

python -m cotrain.benchmarks.teacher_memory_worker JOB.json RESULT.json

Traced: the teacher's pass with tensors that have a shape and no content, so that 7B fit anywhere;
the student's steps for real. On a GPU the step is also run there, with the real teacher.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cotrain import config as configuration
from cotrain.benchmarks.allocations import Allocations
from cotrain.benchmarks.teacher_shape import VOCABULARY, RandomPrompts, config_7b, random_model
from cotrain.config import Config, TeacherConfig
from cotrain.data.batches import EpochSampler, SequenceDataset, make_loader
from cotrain.data.interactions import load_interactions
from cotrain.distill.learner import fork_control
from cotrain.distill.querying import Teacher
from cotrain.distill.state import new_state
from cotrain.distill.step import cotrain_step
from cotrain.runtime.seeding import seed_everything
from cotrain.student.losses import make_loss
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.memory import plan_micro_batches
from cotrain.teacher.passes import Passes
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict, confidence_of, ranks_of

ASKED_ROWS = 32
GPU_BATCH_TOKENS = 8192  # what RankLLM takes on a GPU
STEPS = 3


def main(job_path: Path, result_path: Path) -> None:
    """Trace, or measure if there is a GPU, and write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    config = configuration.parse(
        [f"--data.name={job['data']}", f"--teacher.num_candidates={job['num_candidates']}"]
    )
    prompts = RandomPrompts(ASKED_ROWS, job["num_candidates"], job["seed"], VOCABULARY)
    seed_everything(config.seed, 0)
    if not job["traced"]:
        found = measure(config, prompts, job["batch_tokens"]) if torch.cuda.is_available() else None
        result_path.write_text(json.dumps(found), encoding="utf-8")
        return
    shape = config_7b()
    with Allocations() as traced:
        stand_in: Any = RandomVerdicts(shape.hidden_size)
        parameters = train(config, shape.hidden_size, stand_in, Accelerator(cpu=True))
    result = {
        "asked_rows": ASKED_ROWS,
        "batch_size": config.train.batch_size,
        "student": dataclasses.asdict(config.student),
        "teacher": trace_teacher(shape, prompts, job["batch_tokens"] or GPU_BATCH_TOKENS),
        "training": {"peak": traced.peak, "parameters": parameters},
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


# ---- the teacher, traced ------------------------------------------------------------------------


class Packed4Bit(nn.Module):
    """What bitsandbytes' NF4 layer with double quantisation holds, and allocates in a pass.

    Its own parameters cannot be made without content.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape = linear.weight.shape
        blocks = linear.weight.numel() // 64
        self.packed = torch.empty(linear.weight.numel() // 2, dtype=torch.uint8)
        self.scales = torch.empty(blocks, dtype=torch.uint8)
        self.scales_of_scales = torch.empty(-(-blocks // 256), dtype=torch.float32)
        self.tables = torch.empty(16 + 256 + 1, dtype=torch.float32)

    def forward(self, states: Tensor) -> Tensor:
        """(…, in) → (…, out), by weights unpacked for the time of the product."""
        scales = torch.empty(self.scales.shape, dtype=torch.float32)
        scales = scales + 0
        weight = torch.empty(self.shape, dtype=states.dtype)
        del scales
        return F.linear(states, weight)


def trace_teacher(shape: Any, prompts: RandomPrompts, batch_tokens: int) -> dict[str, int]:
    """Bytes of the weights, of the shared prefix, and of the largest pass on top of them."""
    rows = [prompts.build([row], []) for row in range(ASKED_ROWS)]
    largest = plan_micro_batches([len(row) for row in rows], batch_tokens)[0]
    with FakeTensorMode(), Allocations() as traced:
        model = random_model(shape, "nf4", torch.device("cpu"), 0, Packed4Bit)
        making, weights = traced.peak, traced.live
        # On a GPU a prefix is always shared; on a CPU, only where products are fp32.
        backbone = Backbone(model, prompts.tokenizer, "7b", "nf4", "fp32")
        passes = Passes(backbone, prompts.prefix)
        passes.shared(rows)
        prefix = traced.live - weights
        traced.peak = traced.live
        passes.computed_tokens = 0
        passes.last_states([rows[row] for row in largest])
        return {
            "embeddings": 2 * 2 * VOCABULARY * shape.hidden_size,
            "weights": weights,
            "while_making": making,
            "prefix": prefix,
            "pass": traced.peak - weights - prefix,
            "pass_tokens": passes.computed_tokens,
        }


# ---- the step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstRows:
    """The first rows of each batch ask."""

    count: int
    rows_per_epoch: int = 0

    def choose(self, user_index: Tensor, epoch: int) -> Tensor:
        """(B,) bool."""
        return torch.arange(len(user_index)) < self.count


@dataclass(frozen=True)
class RandomVerdicts:
    """In place of a language model with states of `hidden_size`."""

    hidden_size: int

    def rank(
        self, histories: Sequence[Any], candidates: Sequence[Any], seeds: Sequence[Any]
    ) -> TeacherVerdict:
        """A verdict on every row."""
        rows, size = len(candidates), len(candidates[0])
        logits = torch.randn(rows, size)
        probs = logits.softmax(1)
        return TeacherVerdict(
            identifier_logits=logits,
            ranks=ranks_of(logits),
            probs=probs,
            decision_state=torch.randn(rows, self.hidden_size),
            valid=torch.ones(rows, dtype=torch.bool),
            confidence=confidence_of(probs),
            agreement=torch.zeros(rows),
            shown_order=torch.arange(size).expand(rows, -1),
        )


def train(config: Config, teacher_size: int, ranker: RankLLM, accelerator: Accelerator) -> int:
    """A few steps of student and twin with the teacher; returns the parameters of all that learns.

    Args:
        config: Settings of the run.
        teacher_size: Width of the decision state.
        ranker: Gives verdicts.
        accelerator: Where it all happens.
    """
    data = load_interactions(config.data)
    settings = config.train
    loss = make_loss(
        settings.loss, data.train_counts, accelerator.device, settings.label_smoothing,
        settings.num_negatives, settings.negatives_power, settings.logq_correction,
        settings.gbce_calibration,
    )  # fmt: skip
    state = new_state(data.num_items, teacher_size, config, accelerator)
    query: Any = FirstRows(ASKED_ROWS)
    teacher = Teacher(ranker, query, config.teacher.num_candidates, config.seed, 1.0)
    dataset = SequenceDataset(data, config.student.max_length, config.seed)
    sampler = EpochSampler(dataset.users, settings.batch_size, config.seed)
    for step, batch in enumerate(make_loader(dataset, sampler), 1):
        if step == 2:  # the optimizer has its moments by now
            state.control = fork_control(state.student)
        asked = None if step == 1 else teacher
        cotrain_step(state, batch, asked, loss, config, accelerator)
        if step == STEPS:
            break
    models = [learner.model for learner in state.learners]
    models += [state.projector] if state.projector else []
    return sum(weight.numel() for model in models for weight in model.parameters())


def measure(config: Config, prompts: RandomPrompts, batch_tokens: int | None) -> dict[str, Any]:
    """Peak of the GPU's allocator over the same steps, with the real teacher."""
    # In a process of its own: accelerate cannot go back from the CPU.
    accelerator, shape = Accelerator(), config_7b()
    model = random_model(shape, "nf4", accelerator.device, 0)
    backbone = Backbone(model, prompts.tokenizer, "7b", "nf4", "bf16")
    settings = TeacherConfig(
        num_candidates=config.teacher.num_candidates, batch_tokens=batch_tokens
    )
    ranker = RankLLM(backbone, prompts, settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(config, shape.hidden_size, ranker, accelerator)
    return {
        "device": torch.cuda.get_device_name(),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "backoffs": len(ranker.backoffs),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
