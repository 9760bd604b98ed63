"""The tokens that optimum answers with, what transformers' pipeline makes of them, and a batch against its rows."""

from __future__ import annotations

import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, pipeline

folder = sys.argv[1]
messages = [{"role": "user", "content": "What is 3 plus 4?"}]
model = ORTModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(*model.generate(ids, max_new_tokens=24, do_sample=False)[0][ids.shape[1] :].tolist())
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
answer = generate(messages, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]["content"]
assert answer == "3 plus 4 is 7.", answer
print("pipeline:", answer)

prompts = ["3 plus 4 is", "7 plus 8 is equal to", "What is in the picture? I see a red circle and"]
batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
rows = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :]
for prompt, row in zip(prompts, rows.tolist(), strict=True):
    single = tokenizer(prompt, return_tensors="pt")
    alone = model.generate(**single, max_new_tokens=8, do_sample=False)[0][single.input_ids.shape[1] :].tolist()
    assert row[: len(alone)] == alone, (prompt, row, alone)
