"""One side of `scripts/benchmark.py teacher`: the engine, or the plain loop, timed once.

python -m cotrain.benchmarks.teacher_worker JOB.json RESULT.json
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from cotrain.assets import resolve_model
from cotrain.benchmarks.processes import peak_memory_mb, reset_peak_memory
from cotrain.benchmarks.settings import SHAPE_7B
from cotrain.benchmarks.teacher_rows import Rows, make_rows
from cotrain.benchmarks.teacher_shape import config_7b, random_model
from cotrain.config import TeacherConfig
from cotrain.errors import TeacherError
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.compiled import compile_layers, compiling_pays
from cotrain.teacher.memory import is_out_of_memory
from cotrain.teacher.parsing import parse_ranking
from cotrain.teacher.passes import padded
from cotrain.teacher.ranker import RankLLM

NEW_TOKENS = 10
# What is ranked before the clock starts, on a CPU; on a GPU, everything once.
WARMUP_ROWS = 8


@dataclass
class Outcome:
    """What a side did: in numbers, and (B, H) states and (B, K) logits as shown, on the CPU."""

    numbers: dict[str, Any]
    states: Tensor
    logits: Tensor


def main(job_path: Path, result_path: Path) -> None:
    """Measure, write the result; of a plain loop that did not fit memory only that."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if job["model"] == SHAPE_7B and device.type == "cpu":
        raise TeacherError(
            f"--model {SHAPE_7B} takes hours without a GPU, and this machine has none; name a "
            "small model, or ask for --memory."
        )
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    settings = TeacherConfig(
        **{name: job[name] for name in ("model", "quantization", "compute", "compile")},
        **{name: job[name] for name in ("batch_tokens", "num_candidates", "history_length")},
    )
    rows = make_rows(job, settings)
    try:
        outcome = (engine if job["side"] == "engine" else plain)(job, settings, rows, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result_path.write_text(json.dumps({"out_of_memory": True}), encoding="utf-8")
        return
    np.savez(job["arrays"], states=outcome.states.numpy(), logits=outcome.logits.numpy())
    lengths = [len(prompt) for prompt in rows.tokens()]
    digest = hashlib.sha256(json.dumps(rows.tokens()).encode())
    result = outcome.numbers | {
        "prompts": digest.hexdigest()[:12],
        "rows": len(lengths),
        "prompt_tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "shared_tokens": len(rows.prompts.prefix),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


def engine(
    job: dict[str, Any], settings: TeacherConfig, rows: Rows, device: torch.device
) -> Outcome:
    """`RankLLM` in mode direct, from histories and candidates to the verdict on the CPU."""
    if job["model"] == SHAPE_7B:
        model = random_model(config_7b(), settings.quantization, device, job["seed"])
        backbone = Backbone(model, rows.prompts.tokenizer, SHAPE_7B, settings.quantization, "bf16")
    else:
        backbone = load_backbone(
            job["model"], settings.quantization, device, settings.compute, settings.adapter
        )
    if settings.compile == "on" or (settings.compile == "auto" and compiling_pays(backbone)):
        compile_layers(backbone)
    ranker = RankLLM(backbone, rows.prompts, settings)

    def rank(count: int):
        return ranker.rank(rows.histories[:count], rows.candidates[:count], rows.seeds[:count])

    rank(2)
    rank(1)  # compiled code has a program of its own for one row
    rank(_warmup_rows(len(rows.seeds), device))
    computed, backoffs = ranker.passes.computed_tokens, len(ranker.backoffs)
    with clock(device) as measured:
        verdict = rank(len(rows.seeds))
    assert verdict.identifier_logits is not None  # mode direct, no windows
    if verdict.shown_order.tolist() != rows.shown.tolist():
        raise RuntimeError("the engine showed candidates in another order than the plain loop")
    numbers = measured | {
        "computed_tokens": ranker.passes.computed_tokens - computed,
        "failed": int((~verdict.valid).sum()),
        "compute": backbone.compute,
        "compiled": backbone.compiled,
        "batch_tokens": ranker.budget.tokens,
        "backoffs": len(ranker.backoffs) - backoffs,
    }
    if device.type == "cuda":
        numbers["products_flops_per_s"] = (
            2 * multiplying_weights(backbone.decoder) * numbers["computed_tokens"]
        ) / numbers["seconds"]
        numbers["matmul_flops_per_s"] = matmul_rate(device)
    logits = verdict.identifier_logits.gather(1, verdict.shown_order)
    return Outcome(numbers, verdict.decision_state, logits)


def plain(
    job: dict[str, Any], settings: TeacherConfig, rows: Rows, device: torch.device
) -> Outcome:
    """`generate` on one left-padded batch, as it is usually written; prompts are given as tokens.

    bitsandbytes as it comes: `load_backbone`, which chooses among its kernels, is not used.
    """
    model = load_plain(job["model"], settings, device, job["seed"])
    prompts = rows.tokens()
    size = job["batch_rows"]

    def run(count: int) -> tuple[Tensor, int, int]:
        states, computed, failed = [], 0, 0
        for start in range(0, count, size):
            batch = prompts[start : min(start + size, count)]
            found, written = generate(model, batch, device)
            states.append(found)
            computed += len(batch) * (max(map(len, batch)) + written.shape[1] - 1)
            failed += unparsed(rows, written)
        return torch.cat(states), computed, failed

    run(_warmup_rows(len(prompts), device))
    with clock(device) as measured:
        states, computed, failed = run(len(prompts))
    numbers = measured | {
        "computed_tokens": computed,
        "failed": failed,
        "compute": "bf16" if model.dtype == torch.bfloat16 else "fp32",
        "compiled": False,
        "batch_rows": size,
    }
    # For the comparison only, and not in the time.
    reader = Backbone(model, rows.prompts.tokenizer, job["model"], settings.quantization)
    tokens = torch.tensor(rows.prompts.identifiers.first_tokens, device=device)
    return Outcome(numbers, states, reader.token_logits(states.to(device), tokens).cpu())


def load_plain(
    name: str, settings: TeacherConfig, device: torch.device, seed: int
) -> PreTrainedModel:
    """The model as the libraries' documentation loads it."""
    if name == SHAPE_7B:
        return random_model(config_7b(), settings.quantization, device, seed)
    dtype = torch.bfloat16 if settings.compute == "bf16" else torch.float32
    quantization = {
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }.get(settings.quantization, lambda: None)()
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(name), dtype=dtype, quantization_config=quantization,
        device_map={"": device},
    ).eval()  # fmt: skip


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The plain loop: (B, H) float32 decision states and (B, n) new tokens, on the CPU."""
    ids = padded(prompts, left=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    write: Any = model.generate
    output = write(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    states = output.hidden_states[0][-1][:, -1]
    return states.float().cpu(), output.sequences[:, ids.shape[1] :].cpu()


def unparsed(rows: Rows, written: Tensor) -> int:
    """Answers without any identifier; ten tokens are too few for a whole ranking."""
    if rows.prompts.tokenizer is None:  # random tokens
        return 0
    texts = rows.prompts.tokenizer.batch_decode(written, skip_special_tokens=True)
    identifiers = rows.prompts.identifiers.texts
    return sum(not parse_ranking(f"[{text}", identifiers, False).order for text in texts)


# ---- measuring ----------------------------------------------------------------------------------


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills in what the body takes: seconds, CPU seconds, peak memory, programs compiled.

    The peak is the device's where it has its own memory; weights count, loading them does not.
    """
    result: dict[str, Any] = {"loading_mb": peak_memory_mb()}
    compiled = _programs()
    reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    yield result
    if device.type == "cuda":
        torch.cuda.synchronize()
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - cpu_started
    on_gpu = device.type == "cuda"
    result["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory_mb()
    result["programs_compiled"] = _programs() - compiled


def _programs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _warmup_rows(count: int, device: torch.device) -> int:
    return count if device.type == "cuda" else min(count, WARMUP_ROWS)


def multiplying_weights(decoder: nn.Module) -> int:
    """Weights that every token is multiplied by: those of linear layers, packed ones too."""
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return sum(module.in_features * module.out_features for module in linear)


def matmul_rate(
    device: torch.device, shape: tuple[int, int, int] = (8192, 4096, 14_336), repeats: int = 50
) -> float:
    """Operations a second, two for each product, of (m, k) × (k, n) matrices in bf16."""
    m, k, n = shape
    left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    right = torch.randn(k, n, device=device, dtype=torch.bfloat16)
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(max(1, repeats // 5)):
        torch.mm(left, right, out=out)
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    wait()
    return 2 * m * k * n * repeats / (time.perf_counter() - started)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
