"""The `gemma3n` command. Subcommands of other rooms join through entry points and load when called."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.artifact import Manifest, load_manifest, verify_checksums
from gemma3n_onnx.runtime.engine.providers.select import choices
from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.options import read_options

from .exit import exit_with_message, missing_package
from .terminal_chat import TerminalChat, describe_timings, line_history

COMMANDS_GROUP = "gemma3n_onnx.commands"


class CommandGroup(click.Group):
    """The runtime's commands and those that the installation adds, such as the exporter's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(e.name for e in entry_points(group=COMMANDS_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if found := super().get_command(ctx, cmd_name):
            return found
        for entry in entry_points(group=COMMANDS_GROUP, name=cmd_name):
            try:
                return entry.load()
            except ImportError as error:
                raise click.ClickException(missing_package(error)) from error
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's own, without loading the other rooms' commands for their help."""
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            rows.append((name, own.get_short_help_str() if own else "(from the exporter; see its --help)"))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=CommandGroup)
@click.version_option(package_name="gemma3n-onnx")
def cli() -> None:
    """Gemma 3n on ONNX Runtime."""


def main() -> None:
    exit_with_message(functools.partial(cli.main, prog_name="gemma3n", standalone_mode=False))


_artifact = click.argument("artifact", type=click.Path(path_type=Path))
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


def _load_options(command: Callable[..., None]) -> Callable[..., None]:
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
            "memory_budget": _bytes(memory_budget),
            "device_id": device_id,
            "gpu_memory_limit": _bytes(gpu_memory_limit),
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


def _answer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of how media are read and answers made; `command` gets most of them as they are."""
    for option in reversed(_ANSWER_OPTIONS):
        command = option(command)
    return command


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


@cli.command()
@_artifact
@click.argument("prompt")
@click.option("--image", "images", multiple=True, help="An image, path or URL; may be given several times.")
@click.option("--audio", "clips", multiple=True, help="A clip, path or URL; may be given several times.")
@click.option("--video", "videos", multiple=True, help="A video, path or URL; may be given several times.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")
@_answer_options
@_load_options
@click.option("--stats", is_flag=True, help="Print speed and memory to stderr.")
def run(
    artifact: Path,
    prompt: str,
    images: tuple[str, ...],
    clips: tuple[str, ...],
    videos: tuple[str, ...],
    allow_private_urls: bool,
    system: str | None,
    raw: bool,
    load: dict[str, Any],
    stats: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, after images, clips and videos if any, with the model in the folder ARTIFACT."""
    if raw and (system is not None or images or clips or videos):
        raise click.UsageError("--system, --image, --audio and --video need the chat template, which --raw leaves out.")
    if not prompt:
        raise PromptError("The prompt is empty; give some text to answer.")
    read_options(options)  # a bad option is told before a model is loaded
    fetch = FetchPolicy(allow_private=allow_private_urls)
    model = OnnxGemma3n.from_pretrained(artifact, fetch=fetch, **load)
    media = [(kind, s) for kind, sources in (("image", images), ("audio", clips), ("video", videos)) for s in sources]
    content = [*({"type": kind, kind: source} for kind, source in media), {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content if media else prompt})
    plain = raw or (model.template is None and not media)
    answer = model.stream(prompt if plain else messages, **options)
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()
    if stats:
        click.echo(describe_timings(answer.result.timings), err=True)


@cli.command()
@_artifact
@_answer_options
@_load_options
def chat(artifact: Path, system: str | None, allow_private_urls: bool, load: dict[str, Any], **options: Any) -> None:
    """Talk with the model in the folder ARTIFACT. /help lists what can be typed beside messages."""
    read_options(options)  # a bad option is told before a model is loaded
    model = OnnxGemma3n.from_pretrained(artifact, fetch=FetchPolicy(allow_private=allow_private_urls), **load)
    typed = sys.stdin.isatty()
    if typed:
        click.echo("/help lists what can be typed beside messages.", err=True)
    with line_history(Path(click.get_app_dir("gemma3n")) / "history") if typed else contextlib.nullcontext():
        TerminalChat(model, system, options).run()


@cli.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--slice-dir", type=click.Path(path_type=Path), help="Offer also every artifact in this folder.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", envvar="GEMMA3N_API_KEY", help="What clients must send; also from GEMMA3N_API_KEY.")
@click.option("--rows", default=4, show_default=True, help="Answers of a model at once.")
@click.option("--context", default=4096, show_default=True, help="Tokens of one prompt with its answer.")
@click.option("--queue", default=64, show_default=True, help="Requests of a model that may wait.")
@click.option(
    "--prefix-cache-size", default=2, show_default=True, help="Prompts of a model whose KV caches are kept for reuse."
)
@click.option(
    "--models-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GB that all models together may take; those not in use are unloaded for others. [default: no limit]",
)
@click.option("--media-folder", type=click.Path(path_type=Path), help="Where requests may name files. [default: none]")
@click.option("--allow-private-urls", is_flag=True, help="Also fetch from loopback and private addresses.")
@click.option("--max-body", default=64.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="MB.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that one request may take.")
@_load_options
def serve(
    artifacts: tuple[Path, ...],
    slice_dir: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    models_memory: float | None,
    media_folder: Path | None,
    allow_private_urls: bool,
    max_body: float,
    timeout: float,
    load: dict[str, Any],
    **options: int,
) -> None:
    """Offer the folders ARTIFACTS over OpenAI's HTTP API, and a page to chat in at /.

    A request's "model" is the name of a folder; it is loaded when first asked for.
    """
    from gemma3n_onnx.runtime.serve.app import Limits, create_app
    from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in
    from gemma3n_onnx.runtime.serve.run import run_app

    folders = [*artifacts, *(artifacts_in(slice_dir) if slice_dir is not None else ())]
    load["fetch"] = FetchPolicy(
        allow_private=allow_private_urls, allow_files=media_folder is not None, files_under=media_folder
    )
    pool = ModelPool(folders, ServeOptions(memory_budget=_bytes(models_memory), **options), load)
    run_app(create_app(pool, Limits(int(max_body * 1e6), timeout), api_key), host, port)


@cli.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=1024, show_default=True)
@click.option("--new-tokens", default=256, show_default=True)
@click.option("--context", default=4096, show_default=True, help="Tokens that the KV caches have room for.")
@click.option("--runs", default=3, show_default=True, help="Medians are taken of so many.")
@_load_options
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="A PNG of speed, memory and MMLU to write.")
def bench(
    artifacts: tuple[Path, ...],
    prompt_tokens: int,
    new_tokens: int,
    context: int,
    runs: int,
    load: dict[str, Any],
    as_json: bool,
    plot_file: Path | None,
) -> None:
    """Measure speed and memory of the folders ARTIFACTS, each in a process of its own."""
    from .bench import Sizes, measure_apart, plot, table

    sizes = Sizes(prompt_tokens, new_tokens, context)
    show = sys.stderr.isatty()
    with click.progressbar(artifacts, label="Measuring", file=sys.stderr, hidden=not show) as bar:
        figures = [measure_apart(folder, sizes, runs, load) for folder in bar]
    if plot_file is not None:
        plot(figures, plot_file)
    everything = [asdict(each) | {"decode_limit": each.decode_limit} for each in figures]
    click.echo(json.dumps(everything, indent=2) if as_json else table(figures))


@cli.command()
@_artifact
@click.option("--verify", is_flag=True, help="Read every file and compare its checksum.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(artifact: Path, verify: bool, as_json: bool) -> None:
    """Show what the folder ARTIFACT holds."""
    manifest = load_manifest(artifact)
    click.echo(json.dumps(asdict(manifest), indent=2) if as_json else describe_manifest(manifest))
    if verify:
        total = sum(info.bytes for info in manifest.files.values())
        with click.progressbar(length=total, label="Checking", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            verify_checksums(artifact, manifest, lambda _, count: bar.update(count))
        click.echo(f"All {len(manifest.files)} checksums are right.", err=as_json)


def describe_manifest(manifest: Manifest) -> str:
    counts = manifest.parameters
    lines = [
        f"{manifest.slice} of {manifest.source}, {manifest.precision} for {manifest.target} "
        f"(computes in {manifest.compute_dtype}), by {manifest.producer}",
        f"parameters: {counts.text:,} text, {counts.effective:,} effective"
        + "".join(f", {n:,} {name}" for name, n in (("vision", counts.vision), ("audio", counts.audio)) if n),
        f"layers: {manifest.num_layers}, KV caches: {len(manifest.caches)} "
        f"({sum(c.window is not None for c in manifest.caches)} of them windowed), context: {manifest.max_context:,}",
        f"modalities: {', '.join(manifest.modalities)}; logits: {manifest.logits}",
        "",
    ]
    encoders = [encoder.graph for encoder in manifest.encoders.values()]
    for graph in (manifest.decoder, manifest.embedding, *encoders):
        lines.append(graph.file)
        for kind, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            shown = [t for t in tensors if not t.name.startswith(("past_key_values", "present"))]
            lines += [f"  {kind:<3} {t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in shown]
            if hidden := len(tensors) - len(shown):
                lines.append(f"  {kind:<3} {hidden} tensors of the KV caches")
    lines.append("")
    lines += [f"{info.bytes:>15,}  {name}" for name, info in manifest.files.items()]
    lines.append(f"{sum(info.bytes for info in manifest.files.values()):>15,}  bytes in all")
    return "\n".join(lines)
