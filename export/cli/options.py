"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click


def known(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


PATH = click.Path(path_type=Path)
model_option = click.option(
    "--model", required=True, help="A checkpoint folder, a Hub id (org/name), or demo, this project's small one."
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub id.")
table_option = click.option(
    "--matformer-config",
    "--matformer-config-path",
    "table",
    type=PATH,
    help="A CSV of slices, instead of the checkpoint's slices.csv or the published slices.",
)
slice_option = click.option(
    "--slice",
    "--matformer-slice-name",
    "slice_name",
    help="A MatFormer slice: E2B, E4B, E2.49B, E2.98B-layer, ... (see `gemma3n slices`), or a slice of the CSV or of "
    "the checkpoint's slices.csv.",
)
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def split_modalities(modalities: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in modalities.split(",") if part.strip())
    if not parts:
        raise click.UsageError("--modalities names none; leave it out for all of them.")
    return parts
