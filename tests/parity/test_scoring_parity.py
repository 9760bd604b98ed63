"""Log-likelihoods of given text against transformers' logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma3n_onnx.runtime import OnnxGemma3n, OptionError, PromptError
from gemma3n_onnx.runtime.engine import engine as engine_module
from gemma3n_onnx.runtime.evaluation.perplexity import perplexity, windows
from gemma3n_onnx.runtime.media import reader
from gemma3n_onnx.runtime.tokens import PromptTokens
from multimodal import OPTIONS, MultimodalOracle, image, user
from oracle import LONG, SAME_GRAPH, TOLERANCE, WINDOW, assert_close, log_softmax, oracle_logits, random_prompt

DEMO = Path(__file__).parents[2] / "demo"


def oracle_logprobs(oracle, ids) -> np.ndarray:
    """[N, V]: row i is what follows the first i + 1 tokens."""
    return log_softmax(oracle_logits(oracle, ids))


@pytest.fixture
def scored_at_once(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(engine_module, "SCORED_AT_ONCE", 6)
    return 6


def test_full_depth_equals_transformers(tiny_model, tiny_oracle):
    ids = random_prompt(3 * LONG, seed=8, vocab_size=1280)
    theirs = oracle_logprobs(tiny_oracle, ids)
    scores = tiny_model.engine.score(PromptTokens(ids), 1, and_next=True)
    picked = theirs[np.arange(len(ids)), [*ids[1:], 0]]
    assert_close("35 layers, every token", scores.logprobs, picked, TOLERANCE)
    best = np.sort(theirs, axis=1)[:, ::-1][:, : scores.top_ids.shape[1]]
    assert_close("the most likely tokens", scores.top_logprobs, best, TOLERANCE)
    assert scores.top_ids[:, 0].tolist() == theirs.argmax(1).tolist()
    assert scores.top_ids.shape == (len(ids), 20)


@pytest.mark.parametrize("first", [1, 2, 7, WINDOW, LONG, 4 * WINDOW + 2])
@pytest.mark.parametrize("chunk", [5, 512])
def test_scores_in_chunks_equal_transformers(
    shallow_checkpoint, exported, shallow_oracle, scored_at_once, chunk, first
):
    ids = random_prompt(4 * WINDOW + 3, seed=3, vocab_size=1280)
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint), prefill_chunk=chunk)
    theirs = oracle_logprobs(shallow_oracle, ids)
    scores = model.engine.score(PromptTokens(ids), first)
    picked = theirs[np.arange(first - 1, len(ids) - 1), ids[first:]]
    whole = np.append(theirs.min(), theirs.max())  # the range that one position's share is measured in
    error = np.abs(scores.logprobs - picked).max() / np.ptp(whole)
    print(f"from {first} in chunks of {chunk}: error {error:.2e} of the range (tolerance {TOLERANCE:.0e})")
    assert scores.logprobs.shape == picked.shape and error <= TOLERANCE


def test_a_shared_prefix_is_reused(shallow_model, scored_at_once):
    engine, ids = shallow_model.engine, random_prompt(LONG, seed=6)
    other = [*ids[: LONG - 4], *random_prompt(9, seed=7)]
    alone = OnnxGemma3n.from_pretrained(shallow_model.folder).engine
    expected = alone.score(PromptTokens(other), LONG - 2)
    engine.score(PromptTokens(ids), LONG - 3)
    ran: list[int] = []
    scores = engine.score(PromptTokens(other), LONG - 2, after_chunk=ran.append)
    assert_close("after another text", scores.logprobs, expected.logprobs, SAME_GRAPH)
    assert ran[0] == LONG - 3, "the first tokens were run again"


def test_a_failure_leaves_no_wrong_prefix(shallow_model, scored_at_once):
    engine, ids = shallow_model.engine, random_prompt(LONG, seed=16)
    expected = engine.score(PromptTokens(ids), 1)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    other = [*ids[:20], *random_prompt(20, seed=9)]
    with pytest.raises(KeyboardInterrupt):
        engine.score(PromptTokens(other), 1, after_chunk=stop)
    again = engine.score(PromptTokens(ids), LONG - 1)
    assert abs(again.logprobs[0] - expected.logprobs[-1]) <= SAME_GRAPH * np.ptp(expected.logprobs)


def test_a_prompt_with_a_picture_equals_transformers(shallow_multimodal_model, shallow_multimodal_oracle):
    model, oracle = shallow_multimodal_model, shallow_multimodal_oracle
    messages = [user(image(0), "What is it?")]
    inputs = oracle.inputs(messages)
    ids = random_prompt(6, seed=4)[1:]
    theirs = oracle.logits([*inputs.ids, *ids], inputs.media, len(ids) + 1)
    found = model.log_likelihood(messages, ids, image_size=OPTIONS.image_size)
    picked = log_softmax(theirs)[np.arange(len(ids)), ids]
    ours = np.array([token.logprob for token in found.tokens])
    assert_close("a continuation after a picture", ours, picked, TOLERANCE)


@pytest.mark.parametrize(("window", "stride"), [(2048, None), (128, None), (128, 32)])
def test_perplexity_of_a_file_equals_transformers(exported, window, stride):
    model, oracle = OnnxGemma3n.from_pretrained(exported(DEMO)), MultimodalOracle.load(DEMO)
    text = (DEMO / "README.md").read_text()[:1500]
    ids, total = model.tokenizer.encode(text, add_bos=False), 0.0
    for begin, first, end in windows(len(ids), window - 1, stride or window - 1):
        part = [model.manifest.bos_token_id, *ids[begin:end]]
        scored = range(1 + first - begin, len(part))
        total += log_softmax(oracle.logits(part, {}))[[i - 1 for i in scored], part[scored.start :]].sum()
    found = perplexity(model, text, window=window, stride=stride)
    error = abs(found.log_likelihood / total - 1)
    print(f"{len(ids)} tokens in windows of {window}: relative error {error:.1e} (tolerance 1e-5)")
    assert error < 1e-5 and found.per_token == pytest.approx(np.exp(-total / len(ids)), rel=1e-4)


@pytest.fixture(scope="module")
def demo_model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


def test_log_likelihood_of_text(demo_model):
    model = demo_model
    question = [{"role": "user", "content": "What is 3 plus 4?"}]
    right, wrong = model.log_likelihood(question, ["3 plus 4 is 7.", "3 plus 4 is 8."])
    assert right.is_greedy and not wrong.is_greedy
    assert right.total > wrong.total + 1
    again = model.log_likelihood("3 plus 4 ", "is 7.")
    whole = model.encode("3 plus 4 is 7.")
    assert [token.token_id for token in again.tokens] == whole.ids[len(model.encode("3 plus 4")) :]
    assert model.log_likelihood("", "3 plus 4 is 7.").tokens[-1:] == again.tokens[-1:]


def test_pictures_are_read_once_for_all_continuations(demo_model, monkeypatch):
    read, load = [], reader.load_image
    monkeypatch.setattr(reader, "load_image", lambda source, *rest: read.append(source) or load(source, *rest))
    picture = str(DEMO / "picture.png")
    part = {"type": "image", "image": picture}
    for prompt, images in (([user(part, "What is it?")], None), ("<image_soft_token> A", [picture])):
        several = demo_model.log_likelihood(prompt, [" red circle", " blue star"], images=images)
        assert read == [picture]
        assert several[1] == demo_model.log_likelihood(prompt, " blue star", images=images)
        read.clear()


@pytest.mark.parametrize(
    ("prompt", "continuation", "told"),
    [
        ("3 plus 4", "", "continuation is empty"),
        ([2, 9], [], "continuation is empty"),
        ("Wh", "at", "'at' and the prompt's end are one token"),
        ([2, 9], None, "must be text or token ids, not NoneType"),
        ([2, 9], b"a", "must be text or token ids, not bytes"),
        ([2, 9], [{"role": "user", "content": "x"}], "is not a token id"),
        ([2, 9], [-1], "is not a token id"),
        ([2, 9], [1.5], "is not a token id"),
        ([2] * 4096, [9], "The text has 4,097 tokens, which is more than the context of 4,096; shorten it"),
    ],
)
def test_what_cannot_be_scored_is_told(demo_model, prompt, continuation, told):
    with pytest.raises(PromptError, match=told):
        demo_model.log_likelihood(prompt, continuation)


def test_an_option_of_generation_is_refused(shallow_model):
    with pytest.raises(OptionError, match="Unknown option 'temperature'; use one of image_size"):
        shallow_model.log_likelihood([2], [9], temperature=0)
