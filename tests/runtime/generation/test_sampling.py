import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from gemma3n_onnx.runtime.errors import OptionError, ProviderError
from gemma3n_onnx.runtime.generation.logits_processors import (
    TokenCounts,
    apply_temperature,
    min_p_positions,
    penalize,
    top_k_positions,
    top_p_positions,
)
from gemma3n_onnx.runtime.generation.logprobs import log_probabilities
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.generation.sampler import Sampler, rng_for

NO_TOKENS = torch.zeros((1, 0), dtype=torch.long)


def random_logits(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def kept_by(warper: Any, logits: np.ndarray) -> np.ndarray:
    """In float64, so that the rounding of its running sum decides nothing."""
    scores = warper(NO_TOKENS, torch.from_numpy(logits).double()[None])[0]
    return np.flatnonzero(np.isfinite(scores.numpy()))


@pytest.mark.parametrize("size", [7, 130, 5000, 262_400])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("k", [1, 5, 64, 1000])
def test_top_k_keeps_what_transformers_keeps(size: int, spread: float, k: int) -> None:
    logits = random_logits(size, seed=k, spread=spread)
    np.testing.assert_array_equal(top_k_positions(logits, k), kept_by(oracle.TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("size", [7, 130, 5000, 60_000])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.95])
def test_top_p_keeps_what_transformers_keeps(size: int, spread: float, p: float) -> None:
    logits = random_logits(size, seed=size, spread=spread)
    ours, theirs = top_p_positions(logits, p), kept_by(oracle.TopPLogitsWarper(p), logits)
    # float32 weights may move the edge of a nucleus of thousands by one token
    assert len(np.setxor1d(ours, theirs)) <= len(theirs) // 2000


@pytest.mark.parametrize("p", [0.001, 0.05, 0.9])
def test_min_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = random_logits(5000, seed=1)
    np.testing.assert_array_equal(min_p_positions(logits, p), kept_by(oracle.MinPLogitsWarper(p), logits))


def test_temperature_gives_the_probabilities_of_transformers() -> None:
    logits = random_logits(5000, seed=2)
    expected = oracle.TemperatureLogitsWarper(0.7)(NO_TOKENS, torch.from_numpy(logits)[None]).softmax(-1)[0]
    scaled = np.exp(apply_temperature(logits, 0.7))
    np.testing.assert_allclose(scaled / scaled.sum(), expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(100, seed=3)
    counts = TokenCounts([4, 4, 9])
    for token in (9, 50, 51, 50):
        counts.add(token)
    history = torch.tensor([[4, 4, 9, 9, 50, 51, 50]])
    expected = oracle.RepetitionPenaltyLogitsProcessor(penalty)(history, torch.from_numpy(logits)[None])[0]
    np.testing.assert_allclose(penalize(logits, counts, penalty, 0, 0), expected.numpy(), rtol=1e-6)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    counts = TokenCounts([0, 0, 1])
    for token in (1, 2, 2):
        counts.add(token)
    penalized = penalize(np.zeros(4, np.float32), counts, 1.0, presence=0.5, frequency=0.25)
    np.testing.assert_allclose(penalized, [0, -0.75, -1.0, 0])


def test_counts_grow_with_the_generation() -> None:
    counts = TokenCounts([])
    for token in list(range(500)) * 2:
        counts.add(token)
    np.testing.assert_array_equal(counts.ids, np.arange(500))
    np.testing.assert_array_equal(counts.generated, np.full(500, 2))


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}, {"top_p": 0.9}])
def test_draws_are_as_frequent_as_transformers_probabilities(filters: dict[str, float]) -> None:
    logits, draws = random_logits(300, seed=4, spread=1.5), 4000
    scores = torch.from_numpy(logits).double()[None] / 0.9
    for name, warper in (
        ("top_k", oracle.TopKLogitsWarper),
        ("top_p", oracle.TopPLogitsWarper),
        ("min_p", oracle.MinPLogitsWarper),
    ):
        if name in filters:
            scores = warper(filters[name])(NO_TOKENS, scores)  # type: ignore
    probabilities = scores.softmax(-1)[0].numpy()
    sampler = Sampler(GenerationOptions(temperature=0.9, **filters))  # type: ignore[arg-type]
    rng, counts = rng_for(5), TokenCounts([])
    seen = np.bincount([sampler.sample(logits, counts, rng) for _ in range(draws)], minlength=300)
    assert not seen[probabilities == 0].any()
    expected = draws * probabilities[probabilities > 0]
    chi_square = ((seen[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([0, 3, 3, -np.inf], np.float32)
    assert Sampler(GenerationOptions()).sample(logits, TokenCounts([]), rng_for(0)) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    sampler = Sampler(GenerationOptions(temperature=temperature))
    logits = random_logits(1000, seed=6)
    assert sampler.sample(logits, TokenCounts([]), rng_for(0)) == logits.argmax()


def test_choosing_leaves_the_logits_alone() -> None:
    logits = random_logits(1000, seed=7)
    before = logits.copy()
    options = GenerationOptions(temperature=0.5, top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    Sampler(options).sample(logits, TokenCounts([1, 2]), rng_for(0))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("filters", [{}, {"top_k": 10}, {"top_p": 0.999}, {"min_p": 1e-9}])
def test_an_excluded_token_is_never_chosen(filters: dict[str, float]) -> None:
    logits = np.full(400, -np.inf, np.float32)
    logits[[7, 390]] = 0
    sampler = Sampler(GenerationOptions(temperature=1.0, **filters))  # type: ignore[arg-type]
    rng = rng_for(0)
    assert {sampler.sample(logits, TokenCounts([]), rng) for _ in range(60)} == {7, 390}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_is_an_error(bad: float, temperature: float) -> None:
    logits = np.array([1, bad, 2], np.float32)
    with pytest.raises(ProviderError, match="precision"):
        Sampler(GenerationOptions(temperature=temperature)).sample(logits, TokenCounts([]), rng_for(0))
    with pytest.raises(ProviderError, match="-inf"):
        Sampler(GenerationOptions()).sample(np.full(3, -np.inf, np.float32), TokenCounts([]), rng_for(0))


def test_log_probabilities_are_those_of_log_softmax() -> None:
    logits = random_logits(3000, seed=8) + 500
    logits[5] = -np.inf
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    result = log_probabilities(logits, chosen=17, top=20)
    assert result.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    values, ids = expected.topk(20)
    assert [top.token_id for top in result.top] == ids.tolist()
    np.testing.assert_allclose([top.logprob for top in result.top], values, atol=1e-5)
    assert log_probabilities(logits, 17, 0).top == ()


def test_equals_are_listed_by_id_and_the_impossible_not_at_all() -> None:
    logits = np.array([-np.inf, 1, 2, 1, 1], np.float32)
    assert [top.token_id for top in log_probabilities(logits, 1, 3).top] == [2, 1, 3]
    assert len(log_probabilities(logits, 1, 5).top) == 4


def test_streams_repeat_with_a_seed_and_differ_by_sample() -> None:
    assert rng_for(3).random() == rng_for(3, 0).random()
    assert len({rng_for(3, sample).random() for sample in range(20)} | {rng_for(4).random()}) == 21
    assert rng_for(None).random() != rng_for(None).random()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.0, True, None, "3"]),
        ("temperature", [-0.1, math.nan, math.inf, True, None, "1"]),
        ("top_k", [0, -1, 1.5, True]),
        ("top_p", [0, -0.1, 1.1, math.nan, True]),
        ("min_p", [-0.1, 1.1, math.nan, True]),
        ("repetition_penalty", [0, -1, math.inf, True, None]),
        ("presence_penalty", [-2.1, 2.1, math.nan, True]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, True]),
        ("stop", ["", ("a", ""), (1,), None, 3]),
        ("stop_token_ids", [5, "a", (1.5,), (-1,), (True,), None]),
        ("seed", [-1, 2**64, 1.0, True]),
        ("logprobs", [-1, 21, 1.0, True]),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(OptionError, match=name):
            GenerationOptions(**{name: value})


def test_options_at_the_edges_are_accepted() -> None:
    options = GenerationOptions(1, 0, 1, 1, 0, 0.1, -2, 2, "END", 2**64 - 1, 20)  # type: ignore[arg-type]
    assert options.stop == ("END",)
    assert GenerationOptions(top_k=np.int64(3), temperature=np.float32(0.5), stop=["a"]).stop == ("a",)  # type: ignore[arg-type]
