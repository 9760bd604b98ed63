"""The table of layouts."""

from __future__ import annotations

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.writer import OutputKind

from .base import Layout
from .native import NativeLayout
from .optimum import OptimumLayout
from .transformers_js import TransformersJsLayout

BUILT_IN: tuple[Layout, ...] = (
    NativeLayout(),
    OptimumLayout(),
    TransformersJsLayout(),
)
LAYOUTS = {layout.name: layout for layout in BUILT_IN}
DEFAULT = NativeLayout.name


def layout_named(name: str) -> Layout:
    """Raises ExportOptionError, listing the known names, for an unknown name."""
    if name not in LAYOUTS:
        raise ExportOptionError(f"Unknown layout {name!r}; choose {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def artifact_kind() -> OutputKind:
    """Artifacts in any layout."""
    return OutputKind("artifact", tuple(layout.marker for layout in LAYOUTS.values()))
