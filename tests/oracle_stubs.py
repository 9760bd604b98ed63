"""What torchvision's wheel does not bring for this torch: imported first, it lets timm and transformers import.

The published wheel is built against another torch, so its compiled operators do not load, and torchvision fails
on the missing ones while it is imported. timm, which holds transformers' vision tower, needs none of them.
"""

import torch

TORCHVISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
