"""The tokens that optimum answers with, and what transformers' pipeline makes of them."""

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
