import pytest

from gemma3n_onnx.runtime.engine.kv_window import can_truncate, resident_length

CACHES = [(1, 1), (5, 1), (5, 4), (5, 5), (8, 3), (17, 8)]  # (capacity, window)


def simulated(tokens: int, capacity: int, window: int) -> list[int]:
    """The tokens of a cache that appends one at a time and, when full, keeps the window with the new one."""
    held: list[int] = []
    for token in range(tokens):
        if len(held) == capacity:
            held = held[capacity - window + 1 :]
        held.append(token)
    return held


@pytest.mark.parametrize(("capacity", "window"), CACHES)
def test_length_is_that_of_a_simulated_cache_and_covers_the_window(capacity: int, window: int) -> None:
    for tokens in range(80):
        length = resident_length(tokens, capacity, window)
        assert length == len(simulated(tokens, capacity, window))
        assert min(tokens, window) <= length <= min(tokens, capacity)


@pytest.mark.parametrize(("capacity", "window"), CACHES)
def test_a_cut_is_exact_where_the_shorter_cache_is_a_prefix(capacity: int, window: int) -> None:
    for tokens in range(60):
        held = simulated(tokens, capacity, window)
        for count in range(tokens + 1):
            shorter = simulated(tokens - count, capacity, window)
            exact = count <= len(held) and held[: len(held) - count] == shorter
            assert can_truncate(tokens, count, capacity, window) == exact


def test_impossible_caches_and_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        resident_length(3, 4, 5)
    with pytest.raises(ValueError, match="-1"):
        resident_length(-1, 4, 2)
    with pytest.raises(ValueError, match="cut 4 of 3"):
        can_truncate(3, 4, 4, 2)
