"""Self-taught reasoning (STaR): the teacher learns from those of its own reasonings that led it to
the right item, round by round.

Each round draws reasonings for every training row, keeps those after which the true item is ranked
first, draws rows without one again with the answer as a hint, and fits the adapter anew, from where
the first round began, to all that it kept. A reasoning that was written with a hint counts only if
it leads to the item without it, and is learned without it.

Source: Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning", NeurIPS 2022. They keep
what the hint leads to; here the verdict is read again without it: a hint copied is no reason.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from cotrain.errors import CotrainError
from cotrain.files import write_whole
from cotrain.finetune.cot_sft import CotObjective, Reasoned
from cotrain.finetune.quality import measure
from cotrain.finetune.rank_sft import check_one_step, ranked_samples
from cotrain.finetune.run import Context, Outcome, Sample, title_lines
from cotrain.finetune.tuning import Interrupted, Progress, gain_of, tune
from cotrain.runtime.interruption import StopRequest
from cotrain.teacher.search import Thought


@dataclass(frozen=True)
class Kept:
    """One reasoning that is learned from.

    Attributes:
        row: Which training row.
        text: Of the reasoning.
        margin: How much likelier the right identifier is than the best other, in nats.
        hinted: Whether it was written with the answer as a hint.
    """

    row: int
    text: str
    margin: float
    hinted: bool


def star(context: Context) -> Outcome:
    """The method; ends with the adapter of its best round."""
    check_one_step(context.ranker)
    config, adapter = context.config, context.adapter
    begin = adapter.state()
    first = measure(context.ranker, context.examples.validation, config.seed, "validating")
    start = first.summary()
    context.say(f"Before: held-out {_shown(start)}")
    best, best_state, best_round = start, begin, 0
    rounds: list[dict[str, Any]] = []
    samples: list[Sample] = []
    progress = Progress(start=start)
    for number in range(1, config.star.rounds + 1):
        folder = context.folder / f"round_{number}"
        kept, facts = _gather(context, folder, number)
        if not kept:
            _leave(
                context, best_state,
                f"Round {number} kept none of its reasonings ({facts['share of draws right']:.1%} "
                "of those without a hint led to the right item; one that is kept also ends within "
                "teacher.reasoning_tokens, says three words and names no label)",
            )  # fmt: skip
        adapter.load_state(begin, "start")
        objective = CotObjective(
            context.ranker,
            [Reasoned(context.examples.train[one.row], one.text) for one in kept],
            context.examples.validation, config.sft.reasoning_weight, config.sft.answer_weight,
            config.seed,
        )  # fmt: skip
        context.say(f"Round {number}: fitting {len(kept):,} reasonings")
        done = tune(
            adapter, objective, config.sft, folder, config.seed + number, context.accelerator
        )
        progress = _added(progress, done)
        found = {name: value for name, value in done.best.items() if name != "step"}
        rounds.append({"round": number, **facts, **found})
        samples += _samples(context, kept, number)
        gain = gain_of(found, best, config.sft.best_by)
        context.say(f"Round {number}: held-out {_shown(found)}; a gain of {gain:+.4f}")
        context.log.write({"kind": "validation", "step": number, **found})
        if gain > 0:
            best, best_state, best_round = found, adapter.state(), number
        if gain <= config.star.min_gain:
            context.say("The held-out gain has ended.")
            break
    adapter.load_state(best_state, f"round {best_round}")
    progress.start, progress.best = start, {"step": float(best_round), **best}
    return Outcome(
        progress, {"best_round": best_round}, {"Rounds": rounds},
        samples + ranked_samples(context, 5),
    )  # fmt: skip


# ---- reasonings of a round --------------------------------------------------------------------


def _gather(context: Context, folder: Path, number: int) -> tuple[list[Kept], dict[str, Any]]:
    """What a round keeps; read from its folder where it was gathered before."""
    path = folder / "kept.json"
    if path.is_file():
        content = json.loads(path.read_text("utf-8"))
        context.say(f"Round {number}: {len(content['kept']):,} reasonings are there already.")
        return [Kept(**one) for one in content["kept"]], content["facts"]
    accelerator, settings = context.accelerator, context.config.star
    rows = list(range(len(context.examples.train)))
    own = rows[accelerator.process_index :: accelerator.num_processes]
    found = _attempt(context, own, number, hinted=False)
    right: list[Kept] = gather_object(found.kept)
    solved = {one.row for one in right}
    missing = [row for row in own if row not in solved]
    second = _Attempt([], 0, 0.0)
    if settings.rationalize and missing:
        second = _attempt(context, missing, number, hinted=True)
    hinted: list[Kept] = gather_object(second.kept)
    drawn = sum(gather_object([found.drawn + second.drawn]))
    accuracy = sum(gather_object([found.greedy_right])) / max(1, len(rows))
    kept = _deduplicated([*right, *hinted], settings.keep_per_row)
    texts = Counter(one.text for one in kept)
    facts = {
        "rows": len(rows),
        "drawn": drawn,
        "share of draws right": accuracy,
        "rows solved": len(solved),
        "rows with a hint": len({one.row for one in hinted}),
        "kept": len(kept),
        "kept rate": len({one.row for one in kept}) / max(1, len(rows)),
        "different texts": len(texts),
    }
    context.say(
        f"Round {number}: {len(solved):,} of {len(rows):,} rows solved, "
        f"{facts['rows with a hint']:,} more with a hint, {len(kept):,} kept, {len(texts):,} "
        "different"
    )
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"facts": facts, "kept": [vars(one) for one in kept]}
        write_whole(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    accelerator.wait_for_everyone()
    return kept, facts


@dataclass
class _Attempt:
    """What came of drawing; `greedy_right` is the mean share of right draws, summed over rows."""

    kept: list[Kept]
    drawn: int
    greedy_right: float


def _attempt(context: Context, rows: Sequence[int], number: int, hinted: bool) -> _Attempt:
    """Draw reasonings for rows and keep those that lead to the right item."""
    ranker, settings, seed = context.ranker, context.config.star, context.config.seed
    prompts, examples = ranker.prompts, context.examples.train
    plain: list[list[int]] = []
    asked: list[list[int]] = []
    right: list[int] = []
    for row in rows:
        example = examples[row]
        order = np.random.default_rng((seed, 31, number, row)).permutation(len(example.candidates))
        shown = [example.candidates[place] for place in order]
        place = order.tolist().index(example.right_place)
        right.append(place)
        plain.append(prompts.build(example.history, shown))
        asked.append(prompts.build(example.history, shown, place) if hinted else plain[-1])
    thoughts: list[list[Thought]] = [[] for _ in rows]
    logits = torch.zeros(len(rows), settings.samples, prompts.num_shown)
    words = "with a hint" if hinted else "reasoning"
    bar = tqdm(
        total=len(rows), desc=f"round {number}, {words}", unit="row", leave=False,
        disable=not context.accelerator.is_main_process,
    )  # fmt: skip

    def work(group: list[int]) -> None:
        _think(context, group, plain, asked, thoughts, logits, number + 1000 * hinted)

    with StopRequest() as stop, bar:
        # Every copy of a prompt has a cache of its own.
        lengths = [len(prompt) * settings.samples for prompt in asked]
        for group, done in ranker.budget.groups(lengths, work):
            bar.update(len(group))
            if not done:
                for place in group:
                    thoughts[place] = []
            if stop.received:
                break
    # Here, where all processes come: one that stopped alone would leave the others waiting.
    if any(gather_object([stop.received])):
        raise Interrupted(
            f"Stopped while round {number} drew its reasonings; the rounds before it are safe in "
            f"{context.folder}. The same command begins this round again."
        )
    found = [
        _right_ones(context, row, own, scores, place, hinted)
        for row, own, scores, place in zip(
            rows, thoughts, _unbiased(logits), right, strict=True
        )
    ]  # fmt: skip
    return _Attempt(
        [one for kept, _ in found for one in kept],
        sum(map(len, thoughts)),
        sum(share for _, share in found),
    )


def _think(
    context: Context, group: list[int], plain: list[list[int]], asked: list[list[int]],
    thoughts: list[list[Thought]], logits: torch.Tensor, salt: int,
) -> None:  # fmt: skip
    """Draw for some rows, and read each verdict without a hint."""
    settings, ranker = context.config.star, context.ranker
    thinker, identifiers = ranker.reader.thinker, ranker.prompts.identifiers
    drawn = thinker.draw(
        [asked[place] for place in group], settings.samples, settings.temperature, settings.top_p,
        salt,
    )  # fmt: skip
    states = thinker.states_after([plain[place] for place in group], drawn, ranker.prompts.answer)
    first = torch.tensor(identifiers.first_tokens, device=states.device)
    values = ranker.backbone.token_logits(states, first).float().cpu()
    for place, own, scores in zip(group, drawn, values.split(settings.samples), strict=True):
        thoughts[place], logits[place] = own, scores


def _unbiased(logits: torch.Tensor) -> torch.Tensor:
    """(R, m, K) without what each letter has above the others over all of them."""
    if not len(logits):
        return logits
    centred = logits - logits.mean(2, keepdim=True)
    return centred - centred.mean((0, 1))


def _right_ones(
    context: Context, row: int, thoughts: Sequence[Thought], logits: torch.Tensor, place: int,
    hinted: bool,
) -> tuple[list[Kept], float]:  # fmt: skip
    """The reasonings after which the right item is first, and their share."""
    kept = []
    right = 0
    for thought, scores in zip(thoughts, logits, strict=False):
        others = scores.clone()
        others[place] = -torch.inf
        margin = float(scores[place] - others.max())
        right += margin > 0
        text = " ".join(context.ranker.reader.thinker.text_of(thought.tokens).split())
        # One that was cut off, says nothing or names a label is nothing to learn from.
        if margin > 0 and thought.finished and len(text.split()) >= 3 and "[" not in text:
            kept.append(Kept(row, text, margin, hinted))
    return kept, right / max(1, len(thoughts))


def _deduplicated(kept: Sequence[Kept], per_row: int) -> list[Kept]:
    """Of equal texts of a row one, and of a row the surest."""
    by_row: dict[int, dict[str, Kept]] = {}
    for one in sorted(kept, key=lambda one: -one.margin):
        of_row = by_row.setdefault(one.row, {})
        if len(of_row) < per_row:
            of_row.setdefault(one.text, one)
    return [one for row in sorted(by_row) for one in by_row[row].values()]


# ---- the report ---------------------------------------------------------------------------------


def _leave(context: Context, state: dict[str, torch.Tensor], what: str) -> None:
    """End without an error in the folder: the best adapter so far is saved."""
    context.adapter.load_state(state, "best")
    if context.accelerator.is_main_process:
        context.adapter.save(context.folder / "adapter")
    raise CotrainError(
        f"{what}, so there is nothing to fit; the best adapter so far is in "
        f"{context.folder / 'adapter'}. Raise star.samples or examples.rows, start from an adapter "
        "of cot-sft (--teacher.adapter), or write with --teacher.quantization bf16."
    )


def _added(before: Progress, done: Progress) -> Progress:
    """Costs of all rounds together."""
    return Progress(
        step=before.step + done.step,
        seconds=before.seconds + done.seconds,
        rows=before.rows + done.rows,
        tokens=before.tokens + done.tokens,
        micro_batch_tokens=done.micro_batch_tokens,
        backoffs=before.backoffs + done.backoffs,
    )


def _samples(context: Context, kept: Sequence[Kept], number: int, count: int = 5) -> list[Sample]:
    draw = np.random.default_rng((context.config.seed, 33, number))
    chosen = [kept[place] for place in draw.permutation(len(kept))[:count].tolist()]
    return [
        Sample(
            f"Round {number}, kept{' (written with a hint)' if one.hinted else ''}",
            [
                *title_lines(context, context.examples.train[one.row]),
                f"Reasoning: {context.ranker.prompts.opening} {one.text}",
            ],
        )
        for one in chosen
    ]


def _shown(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
