"""Sampling, log-probabilities, stop strings, streams and limits, end to end."""

from __future__ import annotations

import numpy as np
import pytest

from gemma3n_onnx.runtime import ContextLengthError, OptionError, PromptError
from oracle import TOLERANCE, log_softmax, oracle_logits, random_prompt

PROMPT = "The river rises in the hills and flows through the old town."
SAMPLED = {"temperature": 1.0, "max_new_tokens": 24}


def test_seed_decides_the_text(shallow_model):
    first, again = (shallow_model.generate(PROMPT, seed=5, **SAMPLED) for _ in range(2))
    assert (first.text, first.token_ids) == (again.text, again.token_ids)
    assert len({shallow_model.generate(PROMPT, seed=seed, **SAMPLED).token_ids for seed in range(4)}) == 4
    unseeded = {shallow_model.generate(PROMPT, **SAMPLED).token_ids for _ in range(3)}
    assert len(unseeded) == 3


def test_batch_row_draws_what_it_draws_alone(shallow_model):
    prompts = ["Hello", PROMPT, PROMPT * 3]
    together = shallow_model.generate(prompts, seed=11, top_p=0.9, **SAMPLED)
    alone = [shallow_model.generate(prompt, seed=11, top_p=0.9, **SAMPLED) for prompt in prompts]
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
    assert [row.text for row in together] == [row.text for row in alone]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0, "temperature": 3.0},
        {"frequency_penalty": 2.0, "temperature": 3.0},
        {"top_k": 2},
        {"top_p": 0.2},
        {"min_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 3.0},
    ],
    ids=str,
)
def test_each_option_changes_the_tokens(shallow_model, options):
    base = SAMPLED | {"seed": 3, "temperature": options.get("temperature", 1.0), "max_new_tokens": 96}
    if len(options) == 1:
        base |= {"temperature": 1.0}
    plain = shallow_model.generate(PROMPT, **base)
    assert shallow_model.generate(PROMPT, **base | options).token_ids != plain.token_ids


def test_top_k_of_one_is_greedy(shallow_model):
    greedy = shallow_model.generate(PROMPT, max_new_tokens=24)
    assert shallow_model.generate(PROMPT, seed=1, top_k=1, **SAMPLED).token_ids == greedy.token_ids


def test_logprobs_are_those_of_transformers(shallow_model, shallow_oracle):
    result = shallow_model.generate(PROMPT, seed=2, logprobs=5, repetition_penalty=1.5, **SAMPLED)
    steps = len(result.token_ids)
    logits = oracle_logits(shallow_oracle, [*result.prompt_token_ids, *result.token_ids[:-1]], steps)
    theirs = log_softmax(logits)
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    ours = [[entry.logprob, *(top.logprob for top in entry.top)] for entry in result.logprobs]
    ids = [[entry.token_id, *(top.token_id for top in entry.top)] for entry in result.logprobs]
    error = np.abs(np.array(ours) - np.take_along_axis(theirs, np.array(ids), -1)).max()
    tolerance = 2 * TOLERANCE * (logits.max() - logits.min())  # of the logit and of the logarithm's sum
    print(f"{steps} steps: error {error:.2e} nats (tolerance {tolerance:.0e})")
    assert error <= tolerance
    assert [row[1:] for row in ids] == np.argsort(-theirs, axis=-1)[:, :5].tolist()


def test_stop_string_cuts_the_text(shallow_model):
    whole = shallow_model.generate(PROMPT, max_new_tokens=24).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    result = shallow_model.generate(PROMPT, max_new_tokens=24, stop=[stop, "never said"])
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert len(result.token_ids) < 24
    row, other = shallow_model.generate([PROMPT, "Hello"], max_new_tokens=24, stop=stop)
    assert row.text == result.text
    assert other.text == shallow_model.generate("Hello", max_new_tokens=24, stop=stop).text


@pytest.mark.parametrize("seed", range(4))
def test_stream_gives_the_pieces_of_the_text(shallow_model, seed):
    whole = shallow_model.generate(PROMPT, seed=seed, **SAMPLED)
    stream = shallow_model.stream(PROMPT, seed=seed, **SAMPLED)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids
    assert len(pieces) > 4


def test_text_is_that_of_all_tokens_at_once(shallow_model):
    result = shallow_model.generate(random_prompt(20), seed=1, temperature=2.0, max_new_tokens=64)
    assert result.text == shallow_model.tokenizer.decode(result.token_ids)


def test_timings_count_the_tokens(shallow_model):
    results = shallow_model.generate([random_prompt(7), random_prompt(30)], max_new_tokens=9)
    timings = results[0].timings
    assert timings.prefill_tokens == 37
    assert timings.decode_tokens == sum(len(row.token_ids) for row in results) - 2
    assert 0 < timings.time_to_first_token <= timings.prefill_seconds + timings.decode_seconds


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
def test_what_does_not_fit_is_refused_before_any_work(shallow_model, monkeypatch, call):
    def no_work(*_):
        raise AssertionError("work was done")

    monkeypatch.setattr(shallow_model.engine, "_run", no_work)
    limit = shallow_model.manifest.max_context
    ask = {
        "generate": shallow_model.generate,
        "stream": shallow_model.stream,
        "chat": lambda prompt, **options: shallow_model.chat().send("word " * len(prompt), **options),
    }[call]
    with pytest.raises(ContextLengthError, match=f"{limit:,}"):
        ask(random_prompt(limit), max_new_tokens=1)
    with pytest.raises(OptionError, match="temperature"):
        ask([2, 5], temperature=-1.0)
    with pytest.raises(OptionError, match="heat"):
        ask([2, 5], heat=1.0)
    if call != "chat":
        with pytest.raises(PromptError):
            ask([2, shallow_model.manifest.vocab_size])


def test_whole_context_can_be_used(shallow_model):
    limit = shallow_model.manifest.max_context
    result = shallow_model.generate(random_prompt(limit - 4), max_new_tokens=4)
    assert len(result.token_ids) <= 4
