"""/v1/completions, asked by OpenAI's own client."""

from __future__ import annotations

from serving import E2B, SUM, message


def test_a_completion(server, model):
    prompt = model.prompts.render(model.read(message(SUM), None)).removeprefix("<bos>")
    made = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, logprobs=1)
    assert made.choices[0].text == "3 plus 4 is 7."
    assert len(made.choices[0].logprobs.tokens) == made.usage.completion_tokens - 1, "the end token is not listed"
    pieces = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "3 plus 4 is 7."
    ids = [[2, 5, 6], [2, 7]]
    made = server.client.completions.create(model=E2B, prompt=ids, temperature=0, max_tokens=2, n=2)
    assert len(made.choices) == 4
