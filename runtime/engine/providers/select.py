"""Selects the execution provider that runs an artifact."""

from __future__ import annotations

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.ort import available_providers
from gemma3n_onnx.runtime.errors import OptionError, ProviderError

from .base import DeviceOptions, ExecutionProvider
from .cpu import CPUProvider
from .cuda import CUDAProvider

AUTO = "auto"
BUILT_IN: tuple[type[ExecutionProvider], ...] = (
    CPUProvider,
    CUDAProvider,
)
PROVIDERS = {provider.name: provider for provider in BUILT_IN}


def choices() -> str:
    """For help and messages: "auto, cpu or cuda"."""
    *first, last = (AUTO, *PROVIDERS)
    return f"{', '.join(first)} or {last}"


def select_provider(name: str, manifest: Manifest, options: DeviceOptions | None = None) -> ExecutionProvider:
    """The provider for `provider=name` and this artifact; "auto" selects the one that the artifact targets if it is
    installed, else the CPU.

    Raises:
        OptionError: unknown name.
        RuntimeMissingError: no ONNX Runtime, or one that is too old.
        ProviderError: the provider is not installed, cannot start, or does not support the artifact's compute dtype.
    """
    available = available_providers()
    if name == AUTO:
        made_for = provider_of(manifest)
        name = made_for.name if made_for.ort_name in available else CPUProvider.name
    if name not in PROVIDERS:
        raise OptionError(f"Unknown provider {name!r}; choose {choices()}.")
    kind = PROVIDERS[name]
    if kind.ort_name not in available:
        raise ProviderError(
            f"This ONNX Runtime has no {kind.ort_name} (it has {', '.join(available)}); "
            f'install it with: pip install "gemma3n-onnx[{name}]".'
        )
    provider = kind.create(options or DeviceOptions())
    provider.require(manifest.compute_dtype, "The artifact")
    return provider


def provider_of(manifest: Manifest) -> type[ExecutionProvider]:
    """The provider that an artifact targets."""
    return next((kind for kind in PROVIDERS.values() if manifest.target in kind.targets), CPUProvider)
