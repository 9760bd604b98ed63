"""Makes transformers and timm importable next to a torchvision that was built for another torch.

Both import torchvision, but Gemma 3n uses none of its compiled operators. If these do not load (a CUDA build of
torchvision with a CPU build of torch, or incompatible releases), `import torchvision` fails with "operator
torchvision::nms does not exist". Declaring the operators is enough.
"""

from __future__ import annotations

import importlib.util

import torch

_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # an operator lives as long as its library


def complete_torchvision() -> None:
    """Declares the operators that `import torchvision` needs, if they are missing.

    Other import errors are left to the importers of torchvision.
    """
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
