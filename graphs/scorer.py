"""The decoder as a scorer of given text: log-probabilities of target tokens instead of logits.

Shape legend: B batch, S new tokens, N scored tokens, V vocabulary, K = min(`TOP`, V).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import names, ops
from .config import TextConfig
from .decoder import Decoder

TOP = 20
"""The most likely tokens that are listed at each position."""


class Scorer(Decoder):
    """Scores the last N of S new positions in each row; rows have no padding, and every KV cache keeps all positions.

    Inputs are those of `Decoder`, and `targets` [B, N] int64: the tokens that follow the last N positions. Outputs are
    natural logarithms of softmax(logits) in fp32, `target_logprobs` [B, N] and `top_logprobs` [B, N, K], descending,
    with their `top_ids` int64; then the present K and V. The layers above the last KV producer run for N positions
    only.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, "all", windows=False)

    @property
    def input_names(self) -> list[str]:
        inputs = super().input_names
        return [*inputs[:4], names.TARGETS, *inputs[4:]]

    @property
    def output_names(self) -> list[str]:
        return [names.TARGET_LOGPROBS, names.TOP_LOGPROBS, names.TOP_IDS, *super().output_names[1:]]

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        per_layer_inputs: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        batch, scored = ops.size_of_axis(targets, 0), ops.size_of_axis(targets, 1)

        def select(_: ops.Size) -> Tensor:
            ends = (ops.count_to(batch) + 1).unsqueeze(1) * ops.size_of_axis(inputs_embeds, 1).tensor
            return ops.reshape(ends - scored.tensor + ops.count_to(scored), -1)

        inputs = (inputs_embeds, per_layer_inputs, attention_mask, position_ids, past)
        streams, present = self.run_layers(*inputs, select)
        logits = self.logits_of(streams)
        top, ids = logits.topk(min(TOP, self.config.vocab_size))
        largest = top[:, :1]
        log_total = largest + (logits - largest).exp().sum(-1, keepdim=True).log()
        chosen = logits.gather(1, ops.reshape(targets, -1, 1))
        by_row = (ops.reshape(x, batch, -1, x.shape[1]) for x in (top - log_total, ids))
        return ops.reshape(chosen - log_total, batch, -1), *by_row, *present
