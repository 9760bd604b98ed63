"""Where features lie in a prompt, however the prompt is cut."""

import numpy as np
import pytest

from gemma3n_onnx.runtime.tokens import PromptTokens, SoftTokenSpan, fill

FEATURES = {"a": np.full((3, 2), 1.0) * [[1], [2], [3]], "b": np.full((2, 2), 7.0)}
IDS = [10, 11, 5, 5, 5, 12, 6, 6, 13]
PROMPT = PromptTokens(
    IDS, (SoftTokenSpan(2, 3, "a", lambda: FEATURES["a"]), SoftTokenSpan(6, 2, "b", lambda: FEATURES["b"]))
)
EXPECTED = np.array([0, 0, 1, 2, 3, 0, 7, 7, 0])


def filled(prompt: PromptTokens, chunk: int) -> np.ndarray:
    rows = np.zeros((len(prompt), 2))
    for first in range(0, len(prompt), chunk):
        fill(rows[first : first + chunk], first, prompt.spans, lambda span: span.features())
    return rows[:, 0]


@pytest.mark.parametrize("chunk", range(1, 10))
@pytest.mark.parametrize("cut", range(9))
def test_features_land_in_their_places_in_chunks_and_after_a_cut(chunk: int, cut: int) -> None:
    assert filled(PROMPT.after(cut), chunk).tolist() == EXPECTED[cut:].tolist()


@pytest.mark.parametrize("cut", range(9))
def test_keys_survive_a_cut(cut: int) -> None:
    assert PROMPT.after(cut).keys() == PROMPT.keys()[cut:]


def test_keys_tell_what_a_position_holds() -> None:
    assert PROMPT.keys() == [10, 11, ("a", 0), ("a", 1), ("a", 2), 12, ("b", 0), ("b", 1), 13]
