"""`gemma3n serve`: the HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.media.fetch import FetchPolicy

from .options import gigabytes_to_bytes, load_options


@click.command()
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
@load_options
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
    from gemma3n_onnx.runtime.serve.app import create_app
    from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in
    from gemma3n_onnx.runtime.serve.run import run_app
    from gemma3n_onnx.runtime.serve.service import Limits

    folders = [*artifacts, *(artifacts_in(slice_dir) if slice_dir is not None else ())]
    load["fetch"] = FetchPolicy(
        allow_private=allow_private_urls, allow_files=media_folder is not None, files_under=media_folder
    )
    pool = ModelPool(folders, ServeOptions(memory_budget=gigabytes_to_bytes(models_memory), **options), load)
    run_app(create_app(pool, Limits(int(max_body * 1e6), timeout), api_key), host, port)
