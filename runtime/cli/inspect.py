"""`gemma3n inspect`: the manifest and checksums of an artifact."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from gemma3n_onnx.runtime.artifact import Manifest, load_manifest, verify_checksums
from gemma3n_onnx.runtime.hub import find_artifact

from .options import artifact_argument


@click.command()
@artifact_argument
@click.option("--verify", is_flag=True, help="Verify the checksum of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(artifact: Path, verify: bool, as_json: bool) -> None:
    """Show the contents of the folder or Hub id ARTIFACT."""
    artifact = find_artifact(artifact)
    manifest = load_manifest(artifact)
    click.echo(json.dumps(asdict(manifest), indent=2) if as_json else describe_manifest(manifest))
    if verify:
        total = sum(info.bytes for info in manifest.files.values())
        with click.progressbar(length=total, label="Checking", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            verify_checksums(artifact, manifest, lambda _, count: bar.update(count))
        click.echo(f"All {len(manifest.files)} checksums match.", err=as_json)


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
    lines.append(f"{sum(info.bytes for info in manifest.files.values()):>15,}  bytes in total")
    return "\n".join(lines)
