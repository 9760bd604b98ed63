"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.engine.providers.base import DeviceOptions
from gemma3n_onnx.runtime.engine.providers.select import choices
from gemma3n_onnx.runtime.errors import as_flag
from gemma3n_onnx.runtime.generation.defaults import SamplingDefaults
from gemma3n_onnx.runtime.options import GREEDY, SAMPLINGS, split_options


class FiniteRange(click.FloatRange):
    """Without nan and inf, which `float` reads and no range of click's refuses."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


template_option = click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="A Jinja file to use instead of the artifact's chat template.",
)
artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
_LOAD_OPTIONS = (
    click.option("--provider", default="auto", show_default=True, help=f"{choices()}."),
    click.option("--threads", type=int, help="ONNX Runtime threads."),
    click.option(
        "--memory-budget",
        type=FiniteRange(min=0),
        help="Memory for the decoder's weights in GB; more speeds up long prompts. [default: free memory]",
    ),
    click.option("--device-id", default=0, show_default=True, help="Index of the GPU."),
    click.option(
        "--gpu-memory-limit",
        type=FiniteRange(min=0, min_open=True),
        help="GPU memory for each graph, in GB. [default: all]",
    ),
    click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="Run decode steps as CUDA graphs."),
)


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the load options; `command` gets them as `load`, arguments of `from_pretrained`."""

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
        if threads is not None:
            require_integer("threads", threads, 1)
        DeviceOptions(device_id, gigabytes_to_bytes(gpu_memory_limit), cuda_graphs)  # rejects what is out of range
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


_SAMPLING_OPTIONS = (
    click.option("--temperature", type=float, help="0 is greedy decoding."),
    click.option("--top-k", type=int, help="Keep the k most likely tokens."),
    click.option("--top-p", type=float, help="Keep the most likely tokens of this total probability."),
    click.option("--min-p", type=float, help="Keep tokens at least this times as likely as the most likely one."),
    click.option("--repetition-penalty", type=float, help="Over prompt and answer; 1 is none."),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `SamplingDefaults`; `command` gets those that are given, as `sampling`."""

    @functools.wraps(command)
    def sampled(**given: Any) -> None:
        values = {name: given.pop(name) for name in SamplingDefaults.__dataclass_fields__}
        command(sampling={name: value for name, value in values.items() if value is not None}, **given)

    for option in reversed(_SAMPLING_OPTIONS):
        sampled = option(sampled)
    return sampled


_ANSWER_OPTIONS = (
    click.option("--system", help="System prompt."),
    click.option("--image-size", type=int, help="Image side in pixels: 256, 512 or 768."),
    click.option("--long-audio", default="error", show_default=True, help="For audio over 30 s: error, or split it."),
    click.option("--video-fps", default=1.0, show_default=True, help="Frames sampled per second of video."),
    click.option("--max-frames", default=16, show_default=True, help="Maximum frames of one video."),
    click.option("--allow-private-urls", is_flag=True, help="Also fetch URLs at loopback and private addresses."),
    click.option("--max-new-tokens", default=256, show_default=True),
    click.option("--presence-penalty", default=0.0, show_default=True),
    click.option("--frequency-penalty", default=0.0, show_default=True),
    click.option("--stop", multiple=True, help="Stop before this text; repeatable."),
    click.option("--seed", type=int),
)


def answer_options(sampling: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the media and generation options, which `command` gets as keyword arguments. `sampling`: the default of the
    option of that name."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def answering(*, base: str, sampling: dict[str, Any], **others: Any) -> None:
            command(**others, **sampling, sampling=base)

        made: Callable[..., None] = answering
        for option in reversed(_ANSWER_OPTIONS):
            made = option(made)
        return click.option(
            "--sampling",
            "base",
            type=click.Choice(SAMPLINGS),
            default=sampling,
            show_default=True,
            help="Where options below that are not given come from: greedy decoding, or default, the values of the "
            "checkpoint's generation_config.json.",
        )(sampling_options(made))

    return add


def check_answer_options(options: Mapping[str, Any]) -> None:
    """Raises OptionError for what `split_options` refuses, and warns of what has no effect."""
    split_options(options)
    greedy = options["sampling"] == GREEDY if "temperature" not in options else options["temperature"] == 0
    if greedy and (idle := [as_flag(name, "") for name in ("top_k", "top_p", "min_p") if name in options]):
        click.echo(f"Warning: {', '.join(idle)} without effect at temperature 0; add --temperature.", err=True)


def gigabytes_to_bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)
