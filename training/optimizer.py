"""Muon for matrices, AdamW for the rest, one schedule for both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ADAM_LR = 3e-3
MUON_LR = 2e-2
_MOMENTUM = 0.95
_WARM_UP_STEPS = 30
_DECAY_SHARE = 0.6
# Quintic Newton-Schulz iteration that drives singular values towards 1 (Jordan et al., "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Optimizer:
    """Steps of parameters under a learning rate that warms up, stays, and falls to 0 at `steps`.

    `matrices` take orthogonalized momentum, `others` Adam's steps. A convolution's weight is a matrix by its first axis
    and all the rest. `rate` is a factor of both learning rates. Gradients are clipped to a norm of `max_norm`.
    `weight_decay` is a share of the learning rate, as in AdamW, for both.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        steps: int,
        *,
        muon_lr: float = MUON_LR,
        rate: float = 1.0,
        max_norm: float = 1.0,
        weight_decay: float = 0.01,
    ) -> None:
        self._matrices, self._others = list(matrices), list(others)
        self._momenta = [torch.zeros_like(matrix) for matrix in self._matrices]
        self._adam = torch.optim.AdamW(self._others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=weight_decay)
        self._steps, self._done, self._rate = steps, 0, rate
        self._muon_lr, self._max_norm, self._weight_decay = muon_lr, max_norm, weight_decay

    def step(self, losses: Iterable[Tensor]) -> float:
        """One step down the gradient of the losses' sum, which is returned; each is worked off as it comes."""
        self.clear()
        total = backward(losses)
        self.update()
        return total

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in [*self._matrices, *self._others]:
            parameter.grad = None

    def update(self) -> None:
        """One step down the gradients that the parameters have."""
        torch.nn.utils.clip_grad_norm_([*self._matrices, *self._others], self._max_norm)
        falling = (self._steps - self._done) / (_DECAY_SHARE * self._steps)
        rate = self._rate * min(1.0, (self._done + 1) / _WARM_UP_STEPS, falling)
        self._done += 1
        for group in self._adam.param_groups:
            group["lr"] = ADAM_LR * rate
        self._adam.step()
        with torch.no_grad():
            for matrix, momentum in zip(self._matrices, self._momenta):
                if matrix.grad is not None:
                    momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                    update = _orthogonalized(matrix.grad.lerp(momentum, _MOMENTUM).flatten(1))
                    matrix.mul_(1 - self._muon_lr * rate * self._weight_decay)
                    matrix.add_(update.view_as(matrix), alpha=-self._muon_lr * rate)


def backward(losses: Iterable[Tensor]) -> float:
    """Adds the gradients of the losses, each as it comes, and returns the sum of these."""
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total


def split(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Of what the module may learn the matrices, convolutions of several channels included, and the rest."""
    parameters: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1 and p.shape[1] > 1]
    return matrices, [p for p in parameters if p.ndim == 1 or p.shape[1] == 1]


def _orthogonalized(gradient: Tensor) -> Tensor:
    """The nearest matrix whose singular values are about 1, scaled up where it is taller than wide."""
    rows, columns = gradient.shape
    x = gradient / (gradient.norm() + 1e-7)
    x = x.T if rows > columns else x
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if rows > columns else x) * max(1.0, rows / columns) ** 0.5
