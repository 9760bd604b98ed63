"""Half of each step's gradients, worked out by a second process on the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, multiprocessing

from .optimizer import backward

Shapes = Mapping[str, torch.Size]


class LossesOf(Protocol):
    """Losses of a step on these weights, one after the other."""

    def __call__(self, *step: int) -> Iterable[Tensor]: ...


class GradientWorker:
    """A process that takes the same steps as this one, with losses of its own.

    It is forked from a server without threads, as those of `workers`. Weights and its gradients lie in memory that both
    processes see.
    """

    def __init__(self, weights: Mapping[str, Tensor], losses_on: Callable[[Mapping[str, Tensor]], LossesOf]) -> None:
        """`losses_on` is pickled; the data of `weights` move to shared memory."""
        shapes = {name: weight.shape for name, weight in weights.items()}
        size = sum(map(math.prod, shapes.values()))
        shared, gradients = (torch.zeros(size).share_memory_() for _ in range(2))
        for weight, view in zip(weights.values(), _views(shared, shapes).values(), strict=True):
            weight.data = view.copy_(weight.detach())
        self._weights = list(weights.values())
        self._gradients = list(_views(gradients, shapes).values())
        context = multiprocessing.get_context("forkserver")
        self._pipe, its_end = context.Pipe()
        arguments = its_end, losses_on, shapes, shared, gradients, torch.get_num_threads()
        self._process = context.Process(target=_take_steps, args=arguments, daemon=True)
        self._process.start()
        its_end.close()

    def begin(self, *step: int) -> None:
        """Lets it work on a step. The weights must stay as they are until `finish`."""
        self._pipe.send(step)

    def finish(self) -> float:
        """Waits for its gradients, adds them to those of the weights, and returns the sum of its losses.

        Raises EOFError where the process has ended.
        """
        total: float = self._pipe.recv()
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)
        return total

    def __enter__(self) -> GradientWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()


def _take_steps(
    pipe: Connection,
    losses_on: Callable[[Mapping[str, Tensor]], LossesOf],
    shapes: Shapes,
    shared: Tensor,
    gradients: Tensor,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    weights = {name: view.requires_grad_() for name, view in _views(shared, shapes).items()}
    for name, gradient in _views(gradients, shapes).items():
        weights[name].grad = gradient
    losses_of = losses_on(weights)
    while True:
        try:
            step: Sequence[int] = pipe.recv()
        except EOFError:
            return
        gradients.zero_()
        pipe.send(backward(losses_of(*step)))


def _views(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
