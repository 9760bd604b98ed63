"""The tokens that this project's runtime answers the questions with."""

from __future__ import annotations

import sys
from pathlib import Path

from gemma3n_onnx.runtime import OnnxGemma3n

PICTURE = Path(__file__).parents[2] / "demo" / "picture.png"
SUM, ASKED = "What is 3 plus 4?", "What is in the picture?"

model = OnnxGemma3n.from_pretrained(sys.argv[1])
for content in (SUM, [{"type": "image", "image": PICTURE}, {"type": "text", "text": ASKED}]):
    answer = model.generate([{"role": "user", "content": content}], max_new_tokens=24)
    print(*answer.token_ids)
