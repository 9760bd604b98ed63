"""How many tokens a windowed KV cache holds.

A sliding-window layer reads the last `window` tokens. Its cache holds up to `capacity` tokens and is
appended to until it is full; the next token then drops the oldest ones, down to the window that it
attends to. Each drop has the same size, so the length depends only on the number of tokens processed.
"""


def resident_length(tokens: int, capacity: int, window: int) -> int:
    """Tokens in the cache after `tokens` were processed: from min(tokens, window) to min(tokens, capacity).

    ValueError: not 1 <= window <= capacity, or a negative number of tokens.
    """
    if not 1 <= window <= capacity:
        raise ValueError(f"a cache of {capacity} tokens cannot hold a window of {window}")
    if tokens < 0:
        raise ValueError(f"a cache cannot have processed {tokens} tokens")
    dropped_at_once = capacity - window + 1
    drops = -(min(capacity - tokens, 0) // dropped_at_once)
    return tokens - drops * dropped_at_once


def can_truncate(tokens: int, count: int, capacity: int, window: int) -> bool:
    """Whether truncating a cache of `tokens` by `count` gives the cache of `tokens - count`.

    False if positions were dropped within these tokens: the shorter sequence still needs them. ValueError: `count` is
    outside [0, tokens], or as `resident_length`.
    """
    if not 0 <= count <= tokens:
        raise ValueError(f"cannot cut {count} of {tokens} tokens")
    before = resident_length(tokens - count, capacity, window)
    return before == resident_length(tokens, capacity, window) - count
