"""TRL's trainer of GRPO on the ranker's own model: completions, log-probabilities and reference of
our own, everything else TRL's.

How TRL calls all of this is not declared stable: tests compare log-probabilities, reference and
steps with plain ones.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PrinterCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from cotrain.finetune.forward import states_at
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune_settings import RlConfig
from cotrain.teacher.backbone import Backbone

# Positions whose logits over the vocabulary are held at once: 150 MB at 150,000 words.
_CHUNK = 256


class Diverged(Exception):
    """The loss is no number."""


class PolicyTrainer(GRPOTrainer):
    """TRL's, with completions, log-probabilities and reference of our own.

    The reference is the policy with the weights with which it started, put in place for its pass:
    TRL would load the whole model once more for any model that is no `PeftModel`.

    Args:
        adapter: Of the policy; trained in place.
        start: Its weights at the start.
        beta: Weight of the divergence.
        on_loss: Called before weights change, once all losses of a step were numbers.
        on_step: Told what TRL measured of a step, after it; whether it was the last for now.
        args: TRL's settings, with `beta` 0.
        kwargs: What else TRL's trainer takes.
    """

    def __init__(
        self, adapter: TrainableAdapter, start: dict[str, Tensor], beta: float, *,
        on_loss: Callable[[], None], on_step: Callable[[dict[str, Any]], bool], args: GRPOConfig,
        **kwargs: Any,
    ):  # fmt: skip
        self.adapter, self.on_loss, self.on_step = adapter, on_loss, on_step
        weights = adapter.parameters
        exact = {name: parameter.data for name, parameter in weights.items()}
        super().__init__(model=adapter.backbone.model, args=args, **kwargs)
        # TRL rounds those on a quantised model to bf16, in which steps of this size would be lost.
        for name, values in exact.items():
            weights[name].data = values
        self.beta = beta
        device = self.adapter.backbone.device
        self.ref_model: Any = {name: value.to(device) for name, value in start.items()}

    def _send_telemetry(self) -> None:
        """Nobody is told of a training but its owner."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """One micro-batch.

        Raises:
            Diverged: Its loss is no number; no weight was changed by it.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise Diverged
        if self.accelerator.sync_gradients:
            self.on_loss()
        return loss

    def _generate(self, prompts: list) -> Any:
        set_modes(self.adapter.backbone, computes_again=False)
        return super()._generate(prompts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands on what TRL measures of a step."""
        super().log(logs, start_time)
        if "grad_norm" in logs:
            self.control.should_training_stop |= self.on_step(logs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, *args: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        """(B, C) log-probabilities and entropies of completion tokens, by the passes with which the
        ranker reads: without padding before a prompt, whose positions are then those it is drawn
        at. `model` is the policy, or the weights of the reference."""
        if model is self.ref_model:
            with _weights(self.adapter, model):
                return self._get_per_token_logps_and_entropies(
                    self.model, input_ids, attention_mask, logits_to_keep, batch_size
                )
        set_modes(self.adapter.backbone, computes_again=torch.is_grad_enabled())
        start = input_ids.shape[1] - logits_to_keep
        split = zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
        rows = [
            (
                [token for token, real in zip(ids[:start], mask[:start], strict=True) if real],
                [token for token, real in zip(ids[start:], mask[start:], strict=True) if real],
            )
            for ids, mask in split
        ]
        size = batch_size or len(rows)
        found = [
            value
            for first in range(0, len(rows), size)
            for value in token_logprobs(
                self.adapter.backbone, rows[first : first + size], self.temperature
            )
        ]
        widths = [logits_to_keep - len(completion) for _, completion in rows]
        pairs = list(zip(found, widths, strict=True))
        logprobs = torch.stack([F.pad(row, (0, width)) for (row, _), width in pairs])
        entropies = torch.stack([F.pad(row, (0, width)) for (_, row), width in pairs])
        return logprobs, entropies, None


def make_trainer(
    adapter: TrainableAdapter, start: dict[str, Tensor], settings: RlConfig, *, done: int,
    optimizer: torch.optim.Optimizer, micro_batch: int, max_tokens: int, max_grad_norm: float,
    seed: int, folder: Path, roll_out: Callable[[list[str], Any], dict[str, Any]],
    on_loss: Callable[[], None], on_step: Callable[[dict[str, Any]], bool],
) -> PolicyTrainer:  # fmt: skip
    """The trainer for the steps that are left; silent, and it writes nothing.

    Args:
        adapter, start, on_loss, on_step: As `PolicyTrainer` takes them.
        settings: Of the training.
        done: Steps done.
        optimizer: Of the adapter's weights; its learning rate falls linearly to 0 over all steps.
        micro_batch: Completions of one pass forward and backward; divides those of a step.
        max_tokens: Of a completion.
        max_grad_norm: The gradient's norm is clipped to this.
        seed: Of the order of completions within a step.
        folder: Of the training.
        roll_out: Draws completions for prompts, which are numbers from 0, each named once for each
            completion; `scored` are their rewards.
    """
    rows, left = settings.prompts_per_step * settings.group_size, settings.steps - done
    on_cpu = adapter.backbone.device.type == "cpu"
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch, num_generations=settings.group_size,
        max_completion_length=max_tokens, temperature=settings.temperature, max_steps=left,
        max_grad_norm=max_grad_norm, beta=0.0, loss_type="dapo", scale_rewards="batch",
        router_aux_loss_coef=0.0, shuffle_dataset=False, seed=seed,
        # Frozen weights and their products have their precision already.
        bf16=False, gradient_checkpointing=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=on_cpu, accelerator_config={"use_configured_state": True},
        dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_steps=1,
        logging_nan_inf_filter=False, disable_tqdm=True, log_level="error",
    )  # fmt: skip
    # Where several GPUs are visible, one is used; TRL takes the others for a mistake.
    args._n_gpu = min(1, args.n_gpu)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = settings.learning_rate
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - (done + step) / settings.steps)
    )
    trainer = PolicyTrainer(
        adapter, start, settings.beta, on_loss=on_loss, on_step=on_step, args=args,
        reward_funcs=_reward_of_rollout,
        # A copy, because TRL gives it a token for padding.
        processing_class=copy.deepcopy(adapter.backbone.tokenizer),
        # Numbers instead of texts: no prompt is ever made of text.
        train_dataset=Dataset.from_dict(
            {"prompt": [str(n) for n in range(left * settings.prompts_per_step)]}
        ),
        optimizers=(optimizer, schedule), rollout_func=roll_out,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reward_of_rollout(scored: list[float], **_: Any) -> list[float]:
    """TRL's reward function: the rewards were computed with the completions."""
    return scored


def token_logprobs(
    backbone: Backbone, rows: Sequence[tuple[list[int], list[int]]], temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Log-probability in nats of each token of completions, with a graph, and the entropy of the
    distribution that it is drawn from, without.

    Args:
        backbone: The policy.
        rows: Prompt and completion of each, none of them empty.
        temperature: Logits are divided by it, as when tokens were drawn.

    Returns:
        Of each row (C,) float32 and (C,) float32.
    """
    states = states_at(
        backbone,
        [prompt + completion for prompt, completion in rows],
        [range(len(prompt) - 1, len(prompt) - 1 + len(own)) for prompt, own in rows],
    )  # (N, H)
    targets = torch.tensor([token for _, own in rows for token in own], device=states.device)

    def of_chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(backbone.logits(states) / temperature, dim=1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(1)
        return chosen, entropy

    chunks = []
    for start in range(0, len(targets), _CHUNK):
        part = states[start : start + _CHUNK], targets[start : start + _CHUNK]
        # Logits of a chunk are computed again on the way back; kept, they would be most of the
        # memory.
        graph = torch.is_grad_enabled()
        chunks.append(
            recomputed(of_chunk, *part, use_reentrant=False) if graph else of_chunk(*part)
        )
    chosen, entropy = (torch.cat(values) for values in zip(*chunks, strict=True))
    sizes = [len(own) for _, own in rows]
    return list(zip(chosen.split(sizes), entropy.split(sizes), strict=True))


def set_modes(backbone: Backbone, computes_again: bool) -> None:
    """No dropout, neither where a policy is drawn from nor where it is trained: with it the
    divergence from the reference would not begin at 0, and what is trained would not be what was
    drawn from."""
    for module in backbone.model.modules():
        module.training = computes_again and isinstance(module, GradientCheckpointingLayer)
    backbone.model.training = True  # of this module alone, which TRL asks whether it trains


@contextlib.contextmanager
def _weights(adapter: TrainableAdapter, others: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the adapter has other weights."""
    own = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    try:
        _put(adapter, others)
        yield
    finally:
        _put(adapter, own)


@torch.no_grad()
def _put(adapter: TrainableAdapter, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        adapter.parameters[name].copy_(value)


@contextlib.contextmanager
def restored(adapter: TrainableAdapter) -> Iterator[None]:
    """Takes back what TRL's trainer changes: a model's forward, special tokens and tags, and the
    library's verbosity. Inside, warnings about what TRL itself calls by an old name, and that its
    `rollout_func` may change, are not shown."""
    model: Any = adapter.backbone.model
    verbosity = transformers.logging.get_verbosity()
    config, forward = model.config.get_text_config(), vars(model).get("forward")
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "use_cache")
    before = {name: getattr(config, name, None) for name in names}
    tags = copy.copy(getattr(model, "model_tags", None))
    use_cache, generation = model.config.use_cache, copy.deepcopy(model.generation_config)
    try:
        with warnings.catch_warnings():
            for words in (".*gradient_checkpointing.*", "You are using 'rollout_func'"):
                warnings.filterwarnings("ignore", message=words)
            yield
    finally:
        model.eval()
        for name, value in before.items():
            setattr(config, name, value)
        model.config.use_cache, model.generation_config = use_cache, generation
        model.model_tags = tags
        if forward is None:
            vars(model).pop("forward", None)
        else:
            model.forward = forward
        transformers.logging.set_verbosity(verbosity)
