"""The CUDA execution provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from gemma3n_onnx.runtime.artifact import ATTENTION_MASK, INPUTS_EMBEDS, PER_LAYER_INPUTS, POSITION_IDS, Manifest
from gemma3n_onnx.runtime.engine.candidates import Candidates
from gemma3n_onnx.runtime.engine.ort import Binding, onnxruntime_module
from gemma3n_onnx.runtime.engine.steps import DeviceSteps, Steps
from gemma3n_onnx.runtime.errors import ProviderError

from . import cuda_runtime
from .base import DeviceOptions, ExecutionProvider


@dataclass(frozen=True)
class CUDAProvider(ExecutionProvider):
    compute_dtypes: tuple[str, ...] = ("fp16", "bf16")
    memory_limit: int | None = None
    graphs: bool = True
    tf32: bool = True

    name: ClassVar[str] = "cuda"
    ort_name: ClassVar[str] = "CUDAExecutionProvider"
    device: ClassVar[str] = "cuda"
    targets: ClassVar[tuple[str, ...]] = ("cuda",)
    host_memory: ClassVar[bool] = False

    @classmethod
    def create(cls, options: DeviceOptions) -> Self:
        if (trouble := cuda_runtime.trouble(onnxruntime_module(), options.id)) is not None:
            raise ProviderError(f"{cls.ort_name} cannot start: {trouble}.")
        return cls(device_id=options.id, memory_limit=options.memory_limit, graphs=options.graphs)

    @property
    def captures_steps(self) -> bool:
        return self.graphs

    def provider_options(self, *, captures: bool) -> Mapping[str, str]:
        options = {"arena_extend_strategy": "kSameAsRequested", "device_id": str(self.device_id)}
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        if captures:
            options["enable_cuda_graph"] = "1"
        if not self.tf32:
            options["use_tf32"] = "0"
        return options

    def bind_steps(
        self, binding: Binding, manifest: Manifest, rows: int, capacity: int, candidates: Candidates
    ) -> Steps:
        if not self.graphs:
            return DeviceSteps(binding, manifest, rows, candidates)
        compute = manifest.compute_dtype
        binding.fix_input(INPUTS_EMBEDS, (rows, 1, manifest.token_embeddings.width), compute)
        binding.fix_input(PER_LAYER_INPUTS, (rows, 1, manifest.per_layer_embeddings.width), compute)
        binding.fix_input(POSITION_IDS, (rows, 1), "int64")
        binding.fix_input(ATTENTION_MASK, (rows, capacity), "int64")
        steps = DeviceSteps(binding, manifest, rows, candidates, mask_length=capacity)
        binding.capture()
        return steps

    def memory_used(self) -> int | None:
        return cuda_runtime.memory_used(self.device_id)

    def bandwidth(self, threads: int) -> float:
        return cuda_runtime.bandwidth(self.device_id) or math.nan

    def exact(self, rewrite: Callable[[Path], bytes]) -> Self:
        return replace(super().exact(rewrite), tf32=False)
