"""`gemma3n serve`: the HTTP server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.media.decoding import DecodingMemory
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate

from .options import FiniteRange, gigabytes_to_bytes, load_options, sampling_options, template_option

if TYPE_CHECKING:
    from gemma3n_onnx.runtime.serve.model_pool import ModelPool


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@template_option
@click.option("--slice-dir", type=click.Path(path_type=Path), help="Also serve every artifact in this folder.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", envvar="GEMMA3N_API_KEY", help="Key that clients must send; also from GEMMA3N_API_KEY.")
@click.option("--no-api-key", is_flag=True, help="Serve other machines without a key.")
@click.option("--rows", default=4, show_default=True, help="Concurrent answers per model.")
@click.option(
    "--context", type=int, help="Maximum tokens of a prompt and its answer. [default: 4096, or the model's if fewer]"
)
@click.option("--queue", default=64, show_default=True, help="Maximum waiting requests per model.")
@click.option(
    "--prefix-cache-size", default=2, show_default=True, help="Prompts per model whose KV caches are kept for reuse."
)
@click.option(
    "--models-memory",
    type=FiniteRange(min=0, min_open=True),
    help="Memory for all models in GB; idle models are unloaded to make room. [default: no limit]",
)
@click.option("--preload", is_flag=True, help="Load all models before the first request.")
@click.option(
    "--media-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Files that requests may read. [default: none]",
)
@click.option("--allow-private-urls", is_flag=True, help="Also fetch URLs at loopback and private addresses.")
@click.option(
    "--max-body",
    default=64.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Maximum request body in MB.",
)
@click.option(
    "--max-media", default=32, show_default=True, help="Images, clips and videos of a request.", type=click.IntRange(0)
)
@click.option("--max-urls", default=16, show_default=True, help="Media URLs of a request.", type=click.IntRange(0))
@click.option(
    "--max-media-size",
    default=128.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Maximum size of a request's media files in MB.",
)
@click.option(
    "--max-pixels",
    default=400.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Millions of pixels of a request's images and video frames.",
)
@click.option(
    "--max-seconds",
    default=3600.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Seconds of a request's sound and videos.",
)
@click.option(
    "--media-memory",
    default=1.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Memory for decoding media in GB, for all requests together.",
)
@click.option(
    "--served-model-name",
    "aliases",
    multiple=True,
    metavar="[NAME=]ALIAS",
    help="Another name of a model; NAME is needed if several are served. Repeatable.",
)
@click.option(
    "--allow-origins", multiple=True, help="Another origin of web pages that may use the server; * for any. Repeatable."
)
@click.option("--allow-hosts", multiple=True, help="Another Host that requests may name. Repeatable.")
@click.option(
    "--clamp-max-tokens/--refuse-max-tokens",
    default=True,
    show_default=True,
    help="What happens to requests for more tokens than fit into the context.",
)
@click.option(
    "--control-tokens",
    is_flag=True,
    help="Let control tokens that a message spells out take effect, as transformers does.",
)
@sampling_options
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Time limit of a request, in seconds.",
)
@click.option(
    "--grace",
    default=20.0,
    show_default=True,
    type=FiniteRange(min=0),
    help="Seconds that running answers may go on after SIGTERM or Ctrl-C.",
)
@click.option(
    "--read-timeout",
    default=30.0,
    show_default=True,
    type=FiniteRange(min=0, min_open=True),
    help="Seconds that a request may take to arrive, and one more for each 16 KB.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    help="Open connections; further ones are answered 503. [default: 512, or fewer if ulimit -n is low]",
)
@load_options
def serve(
    artifacts: tuple[Path, ...],
    chat_template: Path | None,
    slice_dir: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    no_api_key: bool,
    models_memory: float | None,
    preload: bool,
    media_folder: Path | None,
    allow_private_urls: bool,
    max_body: float,
    max_media: int,
    max_urls: int,
    max_media_size: float,
    max_pixels: float,
    max_seconds: float,
    media_memory: float,
    timeout: float,
    aliases: tuple[str, ...],
    allow_origins: tuple[str, ...],
    allow_hosts: tuple[str, ...],
    grace: float,
    read_timeout: float,
    max_connections: int | None,
    load: dict[str, Any],
    **options: Any,
) -> None:
    """Serve the folders or Hub ids ARTIFACTS over OpenAI's HTTP API, with a chat page at /.

    A request's "model" is a folder or a Hub id as given here, or its last part; one that is served alone needs no
    name. Models are loaded at their first request. Sampling options are for requests that give none of their own; by
    default they are those of the checkpoint's generation_config.json.
    """
    from gemma3n_onnx.runtime.media.budget import MediaLimits
    from gemma3n_onnx.runtime.serve.app import Access, create_app
    from gemma3n_onnx.runtime.serve.listener import connection_limit
    from gemma3n_onnx.runtime.serve.middleware import LOOPBACK, host_of
    from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in
    from gemma3n_onnx.runtime.serve.run import Times, bind, is_loopback, run_app, url_of
    from gemma3n_onnx.runtime.serve.service import Limits

    if api_key is not None and not re.fullmatch("[!-~]+", api_key):  # what every client can send
        raise OptionError("--api-key is empty, or has a space or a letter outside ASCII; give another key.")
    if no_api_key and api_key is not None:
        raise OptionError("--no-api-key and a key (--api-key or GEMMA3N_API_KEY) exclude each other; leave one out.")
    if not (no_api_key or api_key or is_loopback(host)):
        raise OptionError(
            f"Other machines reach {host}; set a key (--api-key or GEMMA3N_API_KEY), or add --no-api-key to let anyone "
            "use this server."
        )
    # Absolute paths: the artifacts of a folder go by their own names.
    folders = [*artifacts, *(artifacts_in(slice_dir.absolute()) if slice_dir is not None else ())]
    if chat_template is not None:
        ChatTemplate.from_file(chat_template)  # reject a bad one before the first request
    load["chat_template"] = chat_template
    load["fetch"] = FetchPolicy(
        allow_private=allow_private_urls,
        allow_files=media_folder is not None,
        files_under=media_folder,
        decoding=DecodingMemory(int(media_memory * 1e9)),
    )
    pool = ModelPool(folders, ServeOptions(memory_budget=gigabytes_to_bytes(models_memory), **options), load, aliases)
    # Only a browser on this machine reaches a loopback address, and a page's name may resolve to it (DNS rebinding).
    known = tuple(dict.fromkeys([*LOOPBACK, *map(host_of, [host, *allow_hosts])]))
    hosts = known if allow_hosts or is_loopback(host) else None
    access = Access(api_key, tuple(allow_origins), hosts)
    listening = bind(host, port, connection_limit(max_connections))  # before models load, which takes longer
    if preload:
        pool.preload()
    click.echo(_announcement(pool, url_of(listening), api_key is not None, preload), err=True)
    media = MediaLimits(
        max_media, max_urls, size_bytes=max_media_size * 1e6, pixels=max_pixels * 1e6, seconds=max_seconds
    )
    limits = Limits(int(max_body * 1e6), timeout, media)
    run_app(create_app(pool, limits, access), listening, Times(read_timeout, grace))


def _announcement(pool: ModelPool, url: str, guarded: bool, loaded: bool) -> str:
    aliases = [name for name in pool.names if name not in pool.folders]
    also = f" (also {', '.join(aliases)})" if aliases else ""
    named = "; requests need not name it" if len(pool.folders) == 1 else ""
    when = "" if loaded else ", loaded at the first request"
    return (
        f"Serving {', '.join(pool.folders)}{also}{when}{named}.\n"
        f"API: {url}/v1 ({'with the key' if guarded else 'no key needed'})\n"
        f"Page: {url}"
    )
