"""Training a process reward model: the value of a step is the share of completions drawn from its
end that reach the right item (Math-Shepherd, Wang et al., ACL 2024).

Rollouts are the cost, so they are written down as they come, and a call that was interrupted goes
on with the rows that are missing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tqdm import tqdm

from cotrain.errors import ConfigError, CotrainError, DataError
from cotrain.finetune.examples import Example
from cotrain.finetune.rank_sft import check_one_step
from cotrain.finetune.run import Context, Outcome, Sample, title_lines
from cotrain.finetune.tuning import Interrupted
from cotrain.runtime.interruption import StopRequest
from cotrain.teacher.process_reward import Head, ProcessReward, save_head
from cotrain.teacher.search import Thought
from cotrain.teacher.steps import split_steps

ROLLOUTS = "rollouts.jsonl"
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Rollouts:
    """One reasoning and what became of its steps.

    Attributes:
        split: train or validation.
        row: Which example of it.
        prompt: Tokens.
        tokens: Of the reasoning.
        ends: Tokens up to the end of each step that is scored.
        place: Where the right item is shown.
        logits: Of each step, (m, K) identifier logits after its completions; of a last step one.
    """

    split: str
    row: int
    prompt: list[int]
    tokens: list[int]
    ends: list[int]
    place: int
    logits: list[list[list[float]]]


def process_reward(context: Context) -> Outcome:
    """The method: rollouts, then a head on the states at the ends of steps."""
    check_one_step(context.ranker)
    if context.accelerator.num_processes > 1:
        raise ConfigError(
            f"process-reward runs in one process, not {context.accelerator.num_processes}; launch "
            "it with --num_processes 1."
        )
    rollouts = _gather(context)
    settings, budget = context.config.process, context.ranker.budget
    values = step_values(rollouts, settings.reached)
    model = ProcessReward(
        _blank(context), context.ranker.passes, budget, context.ranker.backbone.adapter
    )
    prefixes = [one.prompt + one.tokens[:end] for one in rollouts for end in one.ends]
    context.say(f"Reading {len(prefixes):,} steps")
    states = model.states(prefixes)
    train = np.array([one.split == "train" for one in rollouts for _ in one.ends])
    flat = torch.tensor([value for of_row in values for value in of_row])
    learned = flat[torch.from_numpy(train)]
    # A mean of thirds is rounded otherwise for another count.
    if float(learned.max() - learned.min()) < 1e-6:
        raise CotrainError(
            f"All {len(learned)} steps are worth the same ({float(learned[0]):.2f}): no "
            "completion tells a good step from a bad one. Set process.reached reciprocal_rank, "
            "raise examples.rows, or start from an adapter that ranks (--teacher.adapter)."
        )
    head, fit = fit_head(
        states, flat, torch.from_numpy(train), settings.epochs, settings.learning_rate
    )
    model.head = head
    facts = {**fit, "rows": len(rollouts), "mean_value": float(flat.mean())}
    save_head(head, context.folder, str(context.config.teacher.model), fit)
    adapted = context.config.teacher.adapter is not None
    if adapted:
        context.adapter.save(context.folder / "adapter")
    scores = torch.sigmoid(head(states)).tolist()
    return Outcome(
        None,
        facts,
        {"Value of a step, by its place": _by_place(rollouts, values, scores)},
        _samples(context, rollouts, values, scores),
        keeps_adapter=False,
    )


# ---- rollouts -----------------------------------------------------------------------------------


def _gather(context: Context) -> list[Rollouts]:
    path = context.folder / ROLLOUTS
    done = _read(path)
    wanted = [
        (split, row)
        for split, examples in (
            ("train", context.examples.train), ("validation", context.examples.validation),
        )
        for row in range(len(examples))
    ]  # fmt: skip
    known = {(one.split, one.row) for one in done}
    missing = [key for key in wanted if key not in known]
    if done:
        context.say(f"Going on: rollouts of {len(done):,} of {len(wanted):,} rows are there.")
    bar = tqdm(total=len(wanted), initial=len(done), desc="rollouts", unit="row", smoothing=0.05)
    with StopRequest() as stop, bar, path.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            some = missing[start : start + _ROWS_AT_ONCE]
            new = _roll(context, some)
            for one in new:
                file.write(json.dumps(vars(one)) + "\n")
            file.flush()
            done += new
            bar.update(len(some))
            if stop.received:
                raise Interrupted(
                    f"Stopped with rollouts of {len(done):,} rows in {path}. The same command "
                    "goes on."
                )
    found = [one for one in done if one.ends]
    if not any(one.split == "validation" for one in found) or not any(
        one.split == "train" for one in found
    ):
        raise DataError(
            f"Of {len(done):,} reasonings none has a step, in training or among held-out users. "
            "The teacher writes nothing: start from an adapter of cot-sft (--teacher.adapter)."
        )
    return found


def _read(path: Path) -> list[Rollouts]:
    """Whole lines of the file; one that was cut off is dropped, and removed from it."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    try:
        return [Rollouts(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} holds something else than rollouts: {error}. Delete it to begin anew."
        ) from error


def _roll(context: Context, keys: Sequence[tuple[str, int]]) -> list[Rollouts]:
    """One reasoning of each of these rows, and completions from the ends of its steps."""
    config, ranker = context.config, context.ranker
    settings, thinker = config.process, ranker.reader.thinker
    prompts, places = [], []
    for split, row in keys:
        example = _example(context, split, row)
        order = np.random.default_rng((config.seed, 41, row, split == "train")).permutation(
            len(example.candidates)
        )
        places.append(int(np.array(example.relevance)[order].argmax()))
        prompts.append(
            ranker.prompts.build(example.history, [example.candidates[p] for p in order])
        )
    drawn: list[list[Thought]] = [[] for _ in prompts]

    def draw(group: list[int]) -> None:
        some = thinker.draw([prompts[p] for p in group], 1, settings.temperature)
        for place, own in zip(group, some, strict=True):
            drawn[place] = own

    _in_groups(context, [len(prompt) for prompt in prompts], draw)
    thoughts = [own[0] for own in drawn]
    tokenizer = ranker.backbone.tokenizer
    ends = [split_steps(tokenizer, t.tokens)[: settings.max_steps] for t in thoughts]
    # (which row, which step, tokens) of everything that is to be read
    items = [
        (row, step, thoughts[row].tokens[:end])
        for row, of_row in enumerate(ends)
        for step, end in enumerate(of_row)
    ]
    logits: list[list[list[list[float]]]] = [[[] for _ in of_row] for of_row in ends]

    def complete(group: list[int]) -> None:
        own = [items[place] for place in group]
        last = [
            thoughts[row].finished and len(tokens) == len(thoughts[row].tokens)
            for row, _, tokens in own
        ]
        starts = [prompts[row] + tokens for row, _, tokens in own]
        open_ones = [place for place, ended in enumerate(last) if not ended]
        more: list[list[Thought]] = [[Thought([], 0, True)] for _ in own]
        if open_ones:
            found = thinker.draw(
                [starts[place] for place in open_ones], settings.rollouts, settings.temperature,
                salt=1,
            )  # fmt: skip
            for place, completions in zip(open_ones, found, strict=True):
                more[place] = completions
        states = thinker.states_after(starts, more, ranker.prompts.answer)
        first = torch.tensor(ranker.prompts.identifiers.first_tokens, device=states.device)
        values = ranker.backbone.token_logits(states, first).float().cpu()
        for (row, step, _), part in zip(own, values.split([len(m) for m in more]), strict=True):
            logits[row][step] = [[round(float(v), 4) for v in line] for line in part]

    lengths = [(len(prompts[row]) + len(tokens)) * settings.rollouts for row, _, tokens in items]
    _in_groups(context, lengths, complete)
    return [
        Rollouts(split, row, prompts[i], thoughts[i].tokens, ends[i], places[i], logits[i])
        for i, (split, row) in enumerate(keys)
    ]


def _in_groups(context: Context, lengths: Sequence[int], work: Any) -> None:
    for _, done in context.ranker.budget.groups(lengths, work):
        if not done:
            raise MemoryError("There is no memory for the rollouts of one row.")


def _example(context: Context, split: str, row: int) -> Example:
    examples = context.examples
    return (examples.train if split == "train" else examples.validation)[row]


# ---- values and the head ------------------------------------------------------------------------


def step_values(rollouts: Sequence[Rollouts], reached: str) -> list[list[float]]:
    """Of each reasoning the value of each step: mean over its completions of whether the right item
    is ranked first, or of its reciprocal rank. Letter bias, the mean over all of them, is taken
    out first."""
    every = torch.tensor([line for one in rollouts for step in one.logits for line in step])
    bias = (every - every.mean(1, keepdim=True)).mean(0)
    values = []
    for one in rollouts:
        of_row = []
        for step in one.logits:
            scores = torch.tensor(step) - bias
            ranks = (scores >= scores[:, one.place, None]).sum(1).float()
            worth = (ranks == 1).float() if reached == "first" else 1 / ranks
            of_row.append(float(worth.mean()))
        values.append(of_row)
    return values


def fit_head(
    states: torch.Tensor, values: torch.Tensor, train: torch.Tensor, epochs: int,
    learning_rate: float,
) -> tuple[Head, dict[str, float]]:  # fmt: skip
    """Logistic regression with soft targets; its best epoch on the held-out steps stays.

    Args:
        states: (N, H) at the ends of steps.
        values: (N,) in [0, 1].
        train: (N,) bool, the others are held out.
        epochs: Full passes.
        learning_rate: Of AdamW, with weight decay .1.

    Returns:
        The head, and how it does on held-out steps beside the constant that training would give.
    """
    mean, scale = states[train].mean(0), states[train].std(0).clamp(min=1e-6)
    base = values[train].mean().clamp(1e-4, 1 - 1e-4)
    head = Head(torch.zeros(states.shape[1]), torch.logit(base), mean, scale)
    weight = head.weight.clone().requires_grad_(True)
    bias = head.bias.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=0.1)
    inputs = (states - mean) / scale
    held = ~train

    def loss_on(rows: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(inputs[rows] @ weight + bias, values[rows])

    constant = best = float(loss_on(held).detach())
    best_epoch = 0
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        loss_on(train).backward()
        optimizer.step()
        with torch.no_grad():
            found = float(loss_on(held))
        if found < best:
            best, best_epoch = found, epoch
            head = Head(weight.detach().clone(), bias.detach().clone(), mean, scale)
    predicted = torch.sigmoid(head(states[held]))
    # Of what is all the same there is no order.
    varied = all(len(of.unique()) > 1 for of in (predicted, values[held]))
    together: Any = spearmanr(predicted.numpy(), values[held].numpy()) if varied else (0.0,)
    return head, {
        "steps_train": int(train.sum()),
        "steps_held_out": int(held.sum()),
        "best_epoch": best_epoch,
        "held_out_loss": best,
        "held_out_loss_of_constant": constant,
        "held_out_spearman": float(together[0]),
    }


def _blank(context: Context) -> Head:
    size = context.ranker.backbone.hidden_size
    return Head(torch.zeros(size), torch.zeros(()), torch.zeros(size), torch.ones(size))


# ---- the report ---------------------------------------------------------------------------------


def _by_place(
    rollouts: Sequence[Rollouts], values: Sequence[Sequence[float]], scores: Sequence[float]
) -> list[dict[str, Any]]:
    flat = iter(scores)
    of_place: dict[int, list[tuple[float, float]]] = {}
    for one, of_row in zip(rollouts, values, strict=True):
        for step, value in enumerate(of_row):
            score = next(flat)
            if one.split == "validation":
                of_place.setdefault(step + 1, []).append((value, score))
    return [
        {
            "step": place,
            "held-out steps": len(pairs),
            "mean value": float(np.mean([value for value, _ in pairs])),
            "mean score": float(np.mean([score for _, score in pairs])),
        }
        for place, pairs in sorted(of_place.items())
    ]


def _samples(
    context: Context, rollouts: Sequence[Rollouts], values: Sequence[Sequence[float]],
    scores: Sequence[float], count: int = 8,
) -> list[Sample]:  # fmt: skip
    text_of, flat, samples = context.ranker.reader.thinker.text_of, iter(scores), []
    for one, of_row in zip(rollouts, values, strict=True):
        own = [next(flat) for _ in of_row]
        if one.split != "validation" or len(samples) == count:
            continue
        lines = title_lines(context, _example(context, one.split, one.row))
        start = 0
        for end, value, score in zip(one.ends, of_row, own, strict=True):
            said = text_of(one.tokens[start:end]).strip()
            lines.append(f"{said}   [reached {value:.2f}, scored {score:.2f}]")
            start = end
        samples.append(Sample(f"Held-out reasoning {len(samples) + 1}", lines))
    return samples
