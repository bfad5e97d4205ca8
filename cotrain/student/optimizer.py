"""AdamW that leaves alone the item embeddings which a step did not look up."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LazyAdamW(torch.optim.AdamW):
    """AdamW in which a sparse gradient updates its own rows only.

    With a sampled loss a step looks up a few thousand items. Dense Adam would still read and write
    weight, gradient and two moments of all of them: at 2 million items ten times the rest of the
    step. Moments of a row without a gradient stand still instead of decaying, and its weight
    does not move ("lazy Adam"). Parameters with dense gradients are updated as AdamW does.

    Arguments, and what it raises: as `torch.optim.AdamW`; no closure.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        sparse: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    sparse.append((group, parameter, parameter.grad.coalesce()))
                    parameter.grad = None  # AdamW passes over what has none
        super().step()
        for group, parameter, grad in sparse:
            self._update_rows(group, parameter, grad)
            parameter.grad = grad

    def _update_rows(self, group: dict[str, Any], parameter: nn.Parameter, grad: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2), rate = state["step"].item(), group["betas"], group["lr"]
        rows, values = grad.indices()[0], grad.values()  # (n,), (n, D)
        # Looked up, but without a say in the loss (a verdict of no weight): old momentum alone must
        # not move them.
        told = values.any(1)
        rows, values = rows[told], values[told]
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        spread = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        update = mean.div_(spread).mul_(-rate / (1 - beta1**step))
        if group["weight_decay"]:
            update.sub_(parameter[rows], alpha=rate * group["weight_decay"])
        parameter.index_add_(0, rows, update)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` that also takes sparse gradients.

    Args:
        parameters: Their gradients are scaled in place, sparse ones coalesced.
        max_norm: Norm of all gradients together, at most.

    Returns:
        () the norm before.
    """
    grads = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        if parameter.grad is not None:
            grads.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    norm = torch.nn.utils.get_total_norm(grads)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale)
    return norm
