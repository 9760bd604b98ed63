"""Names of the graphs' inputs, outputs and dynamic axes; those of onnxruntime-genai's `gemma4` where it has them."""

from __future__ import annotations

INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"
PER_LAYER_INPUTS = "per_layer_inputs"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS = "logits"

NEXT_TOKEN, NEXT_LOGIT = "next_token", "next_logit"
TARGETS, TARGET_LOGPROBS = "targets", "target_logprobs"
TOP_LOGPROBS, TOP_IDS = "top_logprobs", "top_ids"
CANDIDATE_LOGITS, CANDIDATE_IDS = "candidate_logits", "candidate_ids"

PIXEL_VALUES = "pixel_values"
IMAGE_FEATURES = "image_features"
INPUT_FEATURES, INPUT_FEATURES_MASK = "input_features", "input_features_mask"
AUDIO_FEATURES = "audio_features"

BATCH, NEW_TOKENS, TOTAL_LENGTH = "batch", "new_tokens", "total_length"
SCORED_TOKENS = "scored_tokens"
CAPACITY, WINDOW_CAPACITY = "capacity", "window_capacity"


def past(layer: int | str) -> tuple[str, str]:
    """Inputs for K and V of a layer's cache."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present(layer: int | str) -> tuple[str, str]:
    """Outputs for K and V of a layer's cache."""
    return f"present.{layer}.key", f"present.{layer}.value"


def rows_of(features: str) -> str:
    """The axis that counts the rows of the embedding graph's input `features`."""
    return f"{features}_rows"
