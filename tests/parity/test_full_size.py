"""E2B's depth and widths with a small vocabulary; 12 GB of disk, 10 GB of memory, five minutes on two cores.

Run it with: pytest -m full_size tests/parity/test_full_size.py -s
"""

from __future__ import annotations

import gc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.runtime import OnnxGemma3n
from oracle import TOLERANCE, NoProgress, assert_close, generate_greedily, load_oracle, oracle_logits, random_prompt
from support import text_checkpoint

PROMPT_TOKENS = 2 * 512 + 17
STEPS = 8


@pytest.mark.full_size
def test_e2b_shapes_equal_transformers_beyond_twice_the_window(tmp_path):
    overrides = {"vocab_size": 8448, "vocab_size_per_layer_input": 8192}
    with TemporaryDirectory(dir=tmp_path) as folder:  # pytest would keep the files
        checkpoint = text_checkpoint("e2b", Path(folder) / "e2b", overrides=overrides)
        artifact = Path(folder) / "artifact"
        export(Checkpoint(checkpoint), artifact, ExportOptions(), NoProgress())
        model = OnnxGemma3n.from_pretrained(artifact)
        ours = generate_greedily(model, random_prompt(PROMPT_TOKENS, vocab_size=8448), STEPS)
        del model
        gc.collect()  # one copy of the weights at a time
        theirs = oracle_logits(load_oracle(checkpoint), ours.oracle_ids, STEPS)
    assert_close(f"E2B, {PROMPT_TOKENS} tokens and {STEPS} steps", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()
