"""Reinforcement learning of the teacher's reasoning: GRPO with verifiable rewards, dense ones and
those of a process reward model, by TRL's trainer.

A group of reasonings is drawn for each prompt; the verdict that each leads to, its form and its
steps are rewarded, and what the better ones of a group said is made likelier. TRL brings groups,
advantages, loss and steps. Ours are completions, rewards and log-probabilities: the policy is the
ranker's own model with its own adapter, and prompts reach it as the token ids that the ranker
builds.

Source: Shao et al., "DeepSeekMath", 2024 (GRPO); token-level loss of DAPO (Yu et al., 2025);
advantages scaled by the spread of the whole batch (Liu et al., "Tricks or Traps?", 2025), because
that of a group whose ranks are all equal would turn differences of style of a hundredth into full
steps.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from cotrain.errors import ConfigError, CotrainError
from cotrain.finetune import rewards
from cotrain.finetune.quality import Measured, measure
from cotrain.finetune.rank_sft import check_one_step
from cotrain.finetune.rollouts import Actor, Rollout, in_groups, mean_logits, measures
from cotrain.finetune.run import Context, Outcome, Sample, check_verdicts, title_lines
from cotrain.finetune.tuning import Interrupted, gain_of, set_checkpointing
from cotrain.runtime import checkpoint
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.tracking import clock, progress_bar

_SAVE_EVERY = 5
# Steps without any difference within a group after which there is nothing to learn.
_PATIENCE = 5
# Steps at both ends that the table of rewards compares.
_COMPARED = 5
_SHOWN_PROMPTS = 3
# What TRL measures, and what it is called in the log.
_FROM_TRL = {
    "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "kl": "kl",
    "entropy": "entropy",
}  # fmt: skip


@dataclass
class _Progress:
    """What a checkpoint holds beside weights.

    Attributes:
        step: Steps done.
        start: The validation before the first.
        history: A row of measures of each step.
        samples: Of the first step, heading and lines.
        last: Of the last step.
        equal: Steps in a row without any difference within a group.
        seconds, tokens: Of the steps; tokens drawn.
    """

    step: int = 0
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[Any]] = field(default_factory=list)
    last: list[list[Any]] = field(default_factory=list)
    equal: int = 0
    seconds: float = 0.0
    tokens: int = 0


class _Training:
    """One training by reinforcement: what TRL's trainer is given, and what it is asked."""

    def __init__(self, context: Context):
        self.context, self.settings = context, context.config.rl
        self.adapter, self.folder = context.adapter, context.folder
        self.progress = _Progress()
        self.start = self.adapter.state()
        # The last weights whose loss was a number.
        self.sound = self.start
        self.optimizer = torch.optim.AdamW(
            list(self.adapter.parameters.values()), lr=self.settings.learning_rate, weight_decay=0.0
        )
        size = context.config.teacher.num_candidates
        self.actor = Actor(context, torch.zeros(size))
        self.drawn: list[Rollout] = []
        self.stop = StopRequest()
        self.bar: Any = None
        self.step_started = 0.0

    # ---- the steps ------------------------------------------------------------------------------

    def run(self) -> Outcome:
        context = self.context
        if checkpoint.steps(self.folder):
            self.restore()
        else:
            measured = self.validate()
            self.progress.start = measured.summary()
            self.actor.bias = mean_logits(measured)
        progress = self.progress
        with self.stop:
            if progress.step < self.settings.steps and progress.equal < _PATIENCE:
                self.train()
            if self.stop.received and progress.step < self.settings.steps:
                raise Interrupted(
                    f"Stopped at step {progress.step} of {self.settings.steps}, with a checkpoint "
                    f"in {self.folder}. The same command goes on."
                )
        if progress.equal >= _PATIENCE:
            context.say(f"Warning: {self.nothing_to_learn()}")
        return self.outcome()

    def train(self) -> None:
        """The steps that are left.

        Raises:
            CotrainError: A loss that is no number, with the adapter before it saved.
        """
        # Here, because TRL takes seconds to import and no other method needs it.
        from cotrain.finetune import grpo

        set_checkpointing(self.adapter.backbone, self.context.config.sft.gradient_checkpointing)
        self.bar = progress_bar(
            self.settings.steps, self.progress.step, self.context.accelerator.is_main_process
        )
        self.step_started = time.perf_counter()
        try:
            with self.bar, grpo.restored(self.adapter):
                trainer = grpo.make_trainer(
                    self.adapter, self.start, self.settings, done=self.progress.step,
                    optimizer=self.optimizer, micro_batch=self.micro_batch(),
                    max_tokens=self.actor.limit,
                    max_grad_norm=self.context.config.sft.max_grad_norm,
                    seed=self.context.config.seed, folder=self.folder, roll_out=self.roll_out,
                    on_loss=self.keep_sound, on_step=self.stepped,
                )  # fmt: skip
                trainer.train()
        except grpo.Diverged as error:
            self.adapter.load_state(self.sound, f"step {self.progress.step}")
            self.adapter.save(self.folder / "adapter")
            raise CotrainError(
                f"The loss is no number at step {self.progress.step + 1}; the last adapter whose "
                f"loss was one is in {self.folder / 'adapter'}. Lower rl.learning_rate (now "
                f"{self.settings.learning_rate}), raise rl.beta (now {self.settings.beta}), or set "
                "teacher.quantization bf16 or fp32."
            ) from error

    def micro_batch(self) -> int:
        """Completions of one pass forward and backward: a divisor of all, within the token
        budget."""
        rows = self.settings.prompts_per_step * self.settings.group_size
        longest = max(
            len(self.actor.task(step, place).tokens)
            for step in range(self.progress.step, self.settings.steps)
            for place in range(self.settings.prompts_per_step)
        )
        fit = self.context.config.sft.micro_batch_tokens // (longest + self.actor.limit)
        return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= max(1, fit))

    def keep_sound(self) -> None:
        """Remember weights with which all losses of a step were numbers."""
        self.sound = self.adapter.state()

    def roll_out(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: the completions of the prompts of a step, each named once for each
        completion."""
        size, first = self.settings.group_size, self.settings.prompts_per_step
        numbers = [int(prompt) for prompt in prompts[::size]]
        assert prompts == [str(number) for number in numbers for _ in range(size)]
        self.adapter.changed(f"step {self.progress.step}")
        self.drawn = self.actor.draw(self.progress.step, [number % first for number in numbers])
        return {
            "prompt_ids": [row.task.tokens for row in self.drawn],
            "completion_ids": [row.completion for row in self.drawn],
            "logprobs": None,  # they are drawn from the policy that is trained
            "scored": [row.scored.reward for row in self.drawn],
        }

    def stepped(self, logs: dict[str, Any]) -> bool:
        """After an optimizer step.

        Returns:
            Whether it was the last for now.
        """
        progress = self.progress
        groups = in_groups(self.drawn, self.settings.group_size)
        progress.step += 1
        self.adapter.changed(f"step {progress.step}")
        row = measures(groups, self.actor.bias) | {
            new: float(logs[old])
            for old, new in _FROM_TRL.items()
            if isinstance(logs.get(old), int | float)
        }
        now = time.perf_counter()
        progress.seconds += now - self.step_started
        self.step_started = now
        progress.tokens += sum(len(rollout.completion) for rollout in self.drawn)
        progress.history.append(row)
        progress.equal = progress.equal + 1 if row["zero_spread"] == 1 else 0
        progress.last = self.samples(groups)
        progress.samples = progress.samples or progress.last
        self.context.log.write({"kind": "rl", "step": progress.step, **row})
        left = (self.settings.steps - progress.step) * progress.seconds / progress.step
        self.bar.update(1)
        self.bar.set_postfix_str(f"reward={row['reward']:.3f}, left={clock(left)}")
        stopping = self.stop.received or progress.equal >= _PATIENCE
        if progress.step % _SAVE_EVERY == 0 or progress.step == self.settings.steps or stopping:
            self.save()
        return stopping

    def validate(self) -> Measured:
        context = self.context
        main = context.accelerator.is_main_process
        rows, seed = context.examples.validation, context.config.seed
        measured = measure(context.ranker, rows, seed, "validating" if main else None)
        verdict = measured.verdict
        check_verdicts(int(verdict.valid.sum()), len(rows), dict(verdict.failures), context.config)
        found = measured.summary()
        context.log.write({"kind": "validation", "step": self.progress.step, **found})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        tqdm.write(f"step {self.progress.step}: validation {shown}")
        return measured

    # ---- what is kept and told ------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """Validation at the end, and the better of start and end."""
        progress = self.progress
        end = self.validate().summary()
        metric = self.context.config.sft.best_by
        worse = gain_of(end, progress.start, metric) < 0
        facts: dict[str, Any] = {
            "steps": progress.step,
            "best_step": 0 if worse else progress.step,
            "validation_start": progress.start,
            "validation_best": progress.start if worse else end,
            "validation_end": end,
            "kept": "the adapter of the end",
            "training_seconds": round(progress.seconds, 1),
            "rollouts": progress.step * self.settings.prompts_per_step * self.settings.group_size,
            "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "prompts_without_true_item": len(self.context.examples.train) - len(self.actor.rows),
        }
        if worse:
            self.adapter.load_state(self.start, "step 0")
            facts["kept"] = (
                f"the adapter of the start: after {progress.step} steps the held-out {metric} is "
                f"{end[metric]:.4f}, at the start it was {progress.start[metric]:.4f}"
            )
            self.context.say(f"Kept: {facts['kept']}.")
        if progress.equal >= _PATIENCE:
            facts["warning"] = self.nothing_to_learn()
        samples = [Sample(heading, lines) for heading, lines in progress.samples]
        if progress.step > 1:
            samples += [Sample(heading, lines) for heading, lines in progress.last]
        return Outcome(
            facts=facts, tables={"Rewards": rewards_table(progress.history)}, samples=samples
        )

    def nothing_to_learn(self) -> str:
        return (
            f"stopped at step {self.progress.step} of {self.settings.steps}: in the last "
            f"{_PATIENCE} steps all completions of each prompt had the same reward, so there was "
            "nothing to learn. Raise rl.temperature or rl.group_size, or begin with a teacher that "
            "ranks better (--teacher.adapter)."
        )

    def samples(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Any]]:
        """The best and the worst completion of the first prompts of a step."""
        found: list[list[Any]] = []
        for number, rows in enumerate(groups[:_SHOWN_PROMPTS], 1):
            ordered = sorted(rows, key=lambda rollout: rollout.scored.reward)
            for name, rollout in (("best", ordered[-1]), ("worst", ordered[0])):
                scored, parts = rollout.scored, rollout.scored.parts
                found.append(
                    [
                        f"Step {self.progress.step}, prompt {number}: the {name} of {len(rows)}",
                        [
                            *title_lines(self.context, rollout.task.example),
                            f"Written: {rollout.text or '(nothing)'}",
                            f"Reward {scored.reward:.3f} (true item at rank {rollout.rank}; "
                            + ", ".join(f"{part} {value:.3f}" for part, value in parts.items())
                            + f"); {len(rollout.completion)} tokens"
                            + ("" if rollout.ended else ", cut off"),
                        ],
                    ]
                )
        return found

    def save(self) -> None:
        """A checkpoint that the same command goes on from."""
        checkpoint.save(
            self.folder, self.progress.step,
            {"adapter": self.adapter.state(), "start": self.start},
            {
                "progress": {**vars(self.progress)},
                "optimizer": self.optimizer.state_dict(),
                "bias": self.actor.bias,
                "log_bytes": self.context.log.num_bytes,
            },
            keep=1,
        )  # fmt: skip

    def restore(self) -> None:
        """The latest checkpoint: weights, optimizer, schedule; every random draw depends on the
        step alone."""
        weights, state = checkpoint.load_latest(self.folder)
        self.progress = _Progress(**state["progress"])
        self.adapter.load_state(weights["adapter"], f"step {self.progress.step}")
        self.start, self.sound = weights["start"], weights["adapter"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.actor.bias = state["bias"]
        self.context.say(f"Going on at step {self.progress.step} of {self.settings.steps}.")


def rl(context: Context) -> Outcome:
    """Reinforce the reasonings that lead to the right verdict.

    Args:
        context: With the teacher in mode `cot`.

    Returns:
        Facts, the rewards at both ends and completions to read; the adapter is the better one of
        start and end on held-out users.

    Raises:
        ConfigError: Several processes, windows, or no process reward model where one is weighed.
        DataError: No training row holds the true item.
        Interrupted: After Ctrl-C or SIGTERM, with a checkpoint written.
        CotrainError: A loss that is no number, with the adapter before it saved; no memory for one
            group.
    """
    check_one_step(context.ranker)
    processes = context.accelerator.num_processes
    if processes > 1:
        raise ConfigError(
            f"rl runs in one process, but {processes} were started: the running mean of the "
            "identifiers' logits is not shared between processes. Start it with accelerate launch "
            "--num_processes 1."
        )
    return _Training(context).run()


def rewards_table(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of every part over the first and the last steps, as many as do not overlap."""
    count = max(1, min(_COMPARED, len(history) // 2))
    first, last = history[:count], history[-count:]
    table = []
    for name in ("reward", *rewards.REWARDS, *rewards.PENALTIES):
        if not history or name not in history[0]:
            continue
        means = [sum(row[name] for row in rows) / len(rows) for rows in (first, last)]
        table.append(
            {
                "part": name,
                f"first {count} steps": means[0],
                f"last {count} steps": means[1],
                "change": means[1] - means[0],
            }
        )
    return table
