"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.engine.providers.select import choices

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
_LOAD_OPTIONS = (
    click.option("--provider", default="auto", show_default=True, help=f"{choices()}."),
    click.option("--threads", type=int, help="Threads of ONNX Runtime."),
    click.option(
        "--memory-budget",
        type=click.FloatRange(min=0),
        help="GB that the decoder's weights may take; with more, long prompts run faster. [default: what is free]",
    ),
    click.option("--device-id", default=0, show_default=True, help="Which GPU."),
    click.option(
        "--gpu-memory-limit",
        type=click.FloatRange(min=0, min_open=True),
        help="GB of the GPU that each graph may take. [default: all]",
    ),
    click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="Replay decode steps from a recording."),
)


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of how an artifact is loaded; `command` gets them as `load`, arguments of `from_pretrained`."""

    @functools.wraps(command)
    def loading(
        *,
        memory_budget: float | None,
        gpu_memory_limit: float | None,
        provider: str,
        threads: int | None,
        device_id: int,
        cuda_graphs: bool,
        **others: Any,
    ) -> None:
        load = {
            "provider": provider,
            "threads": threads,
            "memory_budget": gigabytes_to_bytes(memory_budget),
            "device_id": device_id,
            "gpu_memory_limit": gigabytes_to_bytes(gpu_memory_limit),
            "cuda_graphs": cuda_graphs,
        }
        command(load=load, **others)

    for option in reversed(_LOAD_OPTIONS):
        loading = option(loading)
    return loading


_ANSWER_OPTIONS = (
    click.option("--system", help="A system prompt."),
    click.option("--image-size", type=int, help="Pixels that an image is resized to: 256, 512 or 768."),
    click.option("--long-audio", default="error", show_default=True, help="error, or split clips over 30 s."),
    click.option("--video-fps", default=1.0, show_default=True, help="Frames taken of each second of a video."),
    click.option("--max-frames", default=16, show_default=True, help="Frames of one video at most."),
    click.option("--allow-private-urls", is_flag=True, help="Also fetch from loopback and private addresses."),
    click.option("--max-new-tokens", default=256, show_default=True),
    click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token."),
    click.option("--top-k", type=int),
    click.option("--top-p", type=float),
    click.option("--min-p", type=float),
    click.option("--repetition-penalty", default=1.0, show_default=True),
    click.option("--presence-penalty", default=0.0, show_default=True),
    click.option("--frequency-penalty", default=0.0, show_default=True),
    click.option("--stop", multiple=True, help="Stop before this text; may be given several times."),
    click.option("--seed", type=int),
)


def answer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of how media are read and answers made; `command` gets most of them as they are."""
    for option in reversed(_ANSWER_OPTIONS):
        command = option(command)
    return command


def gigabytes_to_bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)
