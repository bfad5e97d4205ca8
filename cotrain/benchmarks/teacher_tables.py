"""What `scripts/benchmark.py teacher` prints."""

from typing import Any

from cotrain.benchmarks import processes
from cotrain.benchmarks.settings import SHAPE_7B, TeacherSettings

NAMES = {"engine": "cotrain", "plain": "generate"}
GIB = 2**30


def headline(settings: TeacherSettings, facts: dict[str, Any]) -> str:
    """What is compared, before the first measurement."""
    of = f"{settings.model} on {settings.data}: random users, candidates drawn by popularity"
    if settings.model == SHAPE_7B:
        of = "random weights in the shape of a 7B model, random prompts"
    return "\n".join(
        [
            of,
            f"cotrain: RankLLM, mode direct, {settings.num_candidates} candidates, history of "
            f"{settings.history_length}; from item lists to verdicts",
            "generate: model.generate(one left-padded batch, max_new_tokens=10, do_sample=False, "
            "output_hidden_states=True,",
            "          return_dict_in_generate=True), hidden_states[0][-1][:, -1] and the parsed "
            "text; from the same prompts' token ids",
            f"Machine: {facts['processor'] or 'unknown processor'}, {facts['cores']} cores, "
            f"{facts['threads']} threads",
        ]
    )


# ---- the comparison -----------------------------------------------------------------------------


def measure_head() -> str:
    """Columns of `measure_line`."""
    return (
        f"\n{'repeat':<8}{'side':<10}{'rows':>5}  {'weights':<9}{'products':<10}{'compiled':<10}"
        f"{'seconds':>9}{'rows/s':>9}{'tokens/s':>10}{'peak MB':>9}"
    )


def measure_line(repeat: int | str, side: str, quantization: str, found: dict[str, Any]) -> str:
    """One measurement."""
    return (
        f"{repeat:<8}{NAMES[side]:<10}{found['rows']:>5}  {quantization:<9}{found['compute']:<10}"
        f"{'yes' if found['compiled'] else 'no':<10}{found['seconds']:>9.2f}"
        f"{found['rows'] / found['seconds']:>9.2f}"
        f"{found['prompt_tokens'] / found['seconds']:>10,.0f}{found['peak_mb']:>9,.0f}"
    )


def halved_line(point: Any, rows: int) -> str:
    """Memory ran out on the plain side."""
    return f"        generate on {point.rows} rows ran out of memory: batches of {rows} from now on"


def summary(found: dict[str, Any], repeats: int) -> str:
    """The ratio of the two sides."""
    low, high = min(found["ratios"]), max(found["ratios"])
    spread = f", from {low:.2f} to {high:.2f} over {repeats} repeats" if repeats > 1 else ""
    lines = [
        f"{found['rows']} rows, {found['quantization']}: cotrain is {found['ratio']:.2f} × as fast"
        + spread
    ]
    ours = found["repeats"]["engine"][-1]
    if ours["device"] == "cpu":
        lines.append(
            f"In CPU seconds, which a busy machine changes less: {found['cpu_ratio']:.2f} ×"
        )
    if "matmul_flops_per_s" in ours:
        share = ours["products_flops_per_s"] / ours["matmul_flops_per_s"]
        lines.append(
            f"{share:.0%} of the bf16 matrix-product rate measured in the same process "
            f"({ours['products_flops_per_s'] / 1e12:,.0f} of "
            f"{ours['matmul_flops_per_s'] / 1e12:,.0f} TFLOP/s; 2 × weights of linear layers × "
            "tokens computed)"
        )
    return "\n".join(lines)


def work_table(found: dict[str, Any]) -> str:
    """Whether both sides did the same work; from the last repeat.

    CPU seconds tell a busy machine: far below seconds × threads, others had the processor.
    """
    labels = {
        "prompts": "fingerprint of all prompts",
        "prompt_tokens": "tokens of the prompts",
        "computed_tokens": "tokens computed, with padding",
        "compute": "products in",
        "batch_rows": "rows at once",
        "batch_tokens": "tokens at once",
        "backoffs": "times that memory ran out",
        "failed": "rows without an answer",
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "programs_compiled": "programs compiled while timed",
        "loading_mb": "host MB at most until then",
        "threads": "threads",
        "device": "device",
        "torch": "torch",
        "transformers": "transformers",
        "bitsandbytes": "bitsandbytes",
    }
    sides = {side: rows[-1] for side, rows in found["repeats"].items()}
    engine = sides["engine"]
    lines = [
        "",
        f"Prompts of {engine['shortest']} to {engine['longest']} tokens, the first "
        f"{engine['shared_tokens']} shared by all",
        f"{'The same work?':<36}{'cotrain':>18}{'generate':>18}",
    ]
    for key, label in labels.items():
        cells = []
        for side in ("engine", "plain"):
            value = sides[side].get(key, "–")
            if isinstance(value, float):
                value = f"{value:,.2f}" if key.endswith("seconds") else f"{value:,.0f}"
            cells.append(f"{value:,}" if isinstance(value, int) else str(value))
        lines.append(f"{label:<36}{cells[0]:>18}{cells[1]:>18}")
    lines.append(
        f"Decision states are apart by {found['median_gap']:.2g} of their length in the median "
        f"row, {found['largest_gap']:.2g} at most.\n"
    )
    return "\n".join(lines)


# ---- exactness ----------------------------------------------------------------------------------


def progress_line(point: Any, found: dict[str, Any]) -> str:
    """A measurement of the exactness table, while it is made."""
    name = f"{NAMES[point.side]}, {point.quantization}, products {found['compute']}"
    name += ", compiled" if found["compiled"] else ""
    return f"  {name:<46}{found['rows'] / found['seconds']:>9.2f} rows/s"


def exactness_table(lines: list[dict[str, Any]], best: dict[str, Any] | None) -> str:
    """Every setting beside the plain loop in fp32, and which one to take."""
    text = [
        "",
        "Exactness, against generate in fp32: Spearman correlation of each row's ranking, as shown "
        "and calibrated",
        "(less the identifier's mean over the rows); relative gap of the decision state",
        f"{'side':<10}{'weights':<9}{'products':<10}{'compiled':<10}{'rows/s':>9}{'peak MB':>9}"
        f"{'Spearman':>10}{'calibrated':>12}{'state gap':>11}",
    ]
    for line in lines:
        made = line["repeats"][-1] if line["repeats"] else line
        compiled = "yes" if made.get("compiled", line["compile"] == "on") else "no"
        head = (
            f"{NAMES[line['side']]:<10}{line['quantization']:<9}{made['compute']:<10}{compiled:<10}"
        )
        if "spearman" not in line:
            text.append(f"{head}{line['error']}")
            continue
        text.append(
            f"{head}{line['rows_per_s']:>9.2f}{made['peak_mb']:>9,.0f}{line['spearman']:>10.4f}"
            f"{line['spearman_calibrated']:>12.4f}{line['gap']:>11.2g}"
        )
    if best is None:
        return "\n".join([*text, "No setting's rankings keep a correlation of .98 with fp32."])
    against = ", ".join(
        f"{ratio:.2f} × generate in {quantization}"
        for quantization, ratio in best["ratios"].items()
    )
    made = best["repeats"][-1]
    name = f"{best['quantization']}, products in {made['compute']}"
    name += ", compiled" if made["compiled"] else ""
    text.append(
        f"Fastest that keeps a calibrated correlation of .98: {name}, {best['rows_per_s']:.2f} "
        f"rows/s; {against} (of two dtypes, the faster)."
    )
    return "\n".join(text)


def notes(facts: dict[str, Any], exact: bool) -> str:
    """How to read the tables."""
    lines = [
        "",
        "How to read this",
        "- A process for each measurement. Weights are loaded, code is compiled and caches warm "
        "before the clock starts, on both sides (by a few rows; on a GPU by all of them once).",
        "- cotrain's time has everything from item lists to verdicts on the CPU: prompts, "
        "micro-batches, logits, orders. generate gets prompts as token ids.",
        "- generate is used as bitsandbytes comes, and with the dtype that cotrain's products "
        "have. On a CPU with bf16 instructions bitsandbytes multiplies NF4 in bf16 whatever it is "
        "told; cotrain unpacks instead.",
        "- peak MB: largest allocation on a GPU; on a CPU the largest resident size of the process "
        "while it ranked, libraries included.",
    ]
    if exact:
        lines.append(
            "- The calibrated correlation is the stricter one: what a small model gives an "
            "identifier whatever stands behind it makes raw rankings alike."
        )
    if warning := processes.busy_warning(facts):
        lines.append(f"- {warning}")
    return "\n".join(lines)


# ---- memory and loop ----------------------------------------------------------------------------


def memory_table(found: dict[str, Any]) -> str:
    """What a step holds, part by part, against 8 GiB."""
    teacher, training, student = found["teacher"], found["training"], found["student"]
    total = teacher["weights"] + teacher["prefix"] + teacher["pass"] + training["peak"]
    parts = {
        "teacher: linear weights, NF4 with double quantisation": teacher["weights"]
        - teacher["embeddings"],
        "teacher: embeddings and head, bf16": teacher["embeddings"],
        "teacher: keys and values of the shared prefix": teacher["prefix"],
        f"teacher: a pass of {teacher['pass_tokens']:,} tokens, at its peak": teacher["pass"],
        f"student, twin, projector ({training['parameters'] / 1e6:.1f} M parameters): weights, "
        "gradients, AdamW, activations": training["peak"],
        "sum": total,
    }
    lines = [
        f"A co-training step with a 7B teacher: {found['asked_rows']} rows asked, prompts of 350 "
        f"to 500 tokens; SASRec of width {student['hidden_size']}, {student['num_layers']} layers, "
        f"length {student['max_length']}, {found['batch_size']} users a step",
        "",
        *(f"{label:<100}{size / 1e6:>8,.0f} MB" for label, size in parts.items()),
        "",
        f"{total / GIB:.2f} GiB of 8 GiB. Computed, not measured: the parts are peaks of traces of "
        "every allocation,",
        "the teacher's with tensors of 7B size and no content, the training's from real steps on "
        "the CPU with random verdicts.",
        "The two peaks are added although they need not coincide. A GPU's own context (about half "
        "a GiB) and fragmentation come on top;",
        f"while the teacher is made, {teacher['while_making'] / GIB:.2f} GiB are the most.",
    ]
    if measured := found.get("measured"):
        lines += [
            "",
            f"Measured on {measured['device']}: {measured['allocated'] / GIB:.2f} GiB allocated at "
            f"most, {measured['reserved'] / GIB:.2f} GiB reserved; memory ran out "
            f"{measured['backoffs']} times.",
        ]
    return "\n".join(lines)


def loop_table(found: dict[str, Any], facts: dict[str, Any]) -> str:
    """What is left of the teacher's rate in a run."""
    rows = found["rows"]
    share = found["alone_s"] / found["wall_s"]
    lines = [
        f"A run of the recipe, {found['epochs']} epochs with the teacher: {found['steps']} steps, "
        f"{rows} rows, with twin and validation",
        "",
        f"{'':<46}{'seconds':>9}{'CPU seconds':>13}{'rows/s':>9}",
        *(
            f"{label:<46}{found[f'{key}_s']:>9.2f}{found[f'{key}_cpu_s']:>13.2f}"
            f"{rows / found[f'{key}_s']:>9.2f}"
            for key, label in {
                "wall": "the run, from its first step with the teacher",
                "teacher": "of it, in the teacher",
                "alone": "the teacher alone, the same rows at once",
            }.items()
        ),
        "",
        f"The loop reaches {share:.0%} of the rate of the teacher alone; "
        f"{found['teacher_s'] / found['wall_s']:.0%} of its time is the teacher's. "
        f"{found['programs_compiled']} programs were compiled in it.",
    ]
    if warning := processes.busy_warning(facts):
        lines.append(warning)
    return "\n".join(lines)
