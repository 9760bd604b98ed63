"""`gemma3n verify`: an artifact beside transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from gemma3n_onnx.export.cli.options import (
    PATH,
    model_option,
    revision_option,
    slice_option,
    split_modalities,
    table_option,
)
from gemma3n_onnx.runtime.engine.providers.select import choices


@click.command()
@click.argument("artifact", type=PATH)
@model_option
@revision_option
@slice_option
@table_option
@click.option("--provider", default="auto", show_default=True, help=f"{choices()}.")
@click.option("--prompts", default=2, show_default=True, type=click.IntRange(1))
@click.option("--prompt-tokens", type=click.IntRange(1), help="By default a little more than twice the sliding window.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the random inputs.")
@click.option("--modalities", help="Modalities to compare, comma-separated; by default all of the artifact's.")
@click.option("--json", "as_json", is_flag=True)
def verify(
    artifact: Path,
    model: str,
    revision: str | None,
    slice_name: str | None,
    table: Path | None,
    provider: str,
    prompts: int,
    prompt_tokens: int | None,
    new_tokens: int,
    seed: int,
    modalities: str | None,
    as_json: bool,
) -> None:
    """Compare ARTIFACT with transformers on the checkpoint that it was exported from.

    The decoder is always compared; transformers' vision encoder needs timm. The slice is the artifact's own unless
    --slice names another. Exits with 1 if parity fails.
    """
    wanted = None if modalities is None else split_modalities(modalities)

    # It takes seconds to import, so it comes after the check.
    from .artifact import VerifyOptions, verify_artifact

    options = VerifyOptions(
        revision=revision,
        slice=slice_name,
        matformer_config=table,
        provider=provider,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        modalities=wanted,
    )
    compared = verify_artifact(artifact, model, options)
    click.echo(json.dumps(compared.to_json(), indent=2) if as_json else compared.describe())
    if not compared.passed:
        sys.exit(1)
