"""Lets transformers and timm be imported beside a torchvision that was built for another torch.

Both import torchvision, but the Gemma 3n that they hold calls none of its compiled operators. Where those do not load,
because torchvision is the CUDA build and torch the CPU one, or their releases do not fit, `import torchvision` fails
with "operator torchvision::nms does not exist": its declaration is all that is missing.
"""

from __future__ import annotations

import importlib.util

import torch

_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # an operator lives as long as its library


def complete_torchvision() -> None:
    """Declares the operators without which an installed torchvision cannot be imported, if they are missing. What else
    may be wrong with it is left for its importers to tell."""
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        if "torchvision::nms" not in str(error):
            return
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
