"""What contexts take in memory under a press, reckoned from the shape of a model: what fits is reckoned from it.

A press prunes each layer's cache as soon as that layer has run. So a prefill holds what is kept of the layers before,
one layer in full, and the activations of one layer. A shared prefill, and a press that needs the whole cache first,
hold all of it. Entries that are packed are prefilled a few contexts at a time, and packed before the next ones; parts
of a batch are copied layer by layer when they are joined. Decoding copies kept entries into buffers that grow, and
leaves packed ones where they are.

Knows shapes and shares. Does not know text, lm-eval or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from lm_eval_kvpress.cache.quantized import Quantization

ACTIVATIONS_PER_TOKEN = 40
"""Numbers per token and hidden dimension alive in one layer's forward: residual, fused QKV, attention, the
feed-forward's inner width before and after its activation, and copies; on a GPU, where this was not measured, with room
for libraries' own memory."""

CPU_ACTIVATIONS_PER_TOKEN = 8
"""As measured on a CPU, where forwards work in place (docs/quantization.md)."""

PACKING_COPIES = 6
"""Of one layer's kept keys and values, while they are packed: measured on a CPU in float32."""


PACKED_FORWARD_TOKENS = 8_192
"""The most tokens that one prefill runs side by side where entries are packed afterwards: what they take in full
precision is the peak of a batch, and more tokens at once are hardly faster on any device."""


@dataclass(frozen=True)
class Footprint:
    """Bytes per token of context.

    Attributes:
        cache_bytes: of the full cache, all layers.
        activation_bytes: alive in one layer's forward.
        num_layers: of the model.
        share: of the cache's bytes that a press keeps.
        packed_share: bytes of a packed entry, as a fraction of those in full precision; None if none are packed.
    """

    cache_bytes: float
    activation_bytes: float
    num_layers: int
    share: float = 1.0
    packed_share: float | None = None

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        share: float = 1.0,
        quantization: Quantization | None = None,
        activations: int = ACTIVATIONS_PER_TOKEN,
    ) -> Footprint:
        """The footprint of a model whose weights and cache have a dtype.

        Args:
            activations: numbers per token and hidden dimension alive in one layer's forward.
        """
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            cache_bytes=2 * config.num_hidden_layers * heads * dim * dtype.itemsize,
            activation_bytes=activations * config.hidden_size * dtype.itemsize,
            num_layers=config.num_hidden_layers,
            share=share,
            packed_share=None if quantization is None else quantization.bits_per_number(dtype) / (8 * dtype.itemsize),
        )

    @property
    def kept_bytes(self) -> float:
        """Of kept entries in full precision."""
        return self.cache_bytes * self.share

    @property
    def held_bytes(self) -> float:
        """Of kept entries as they are stored."""
        return self.kept_bytes * (1.0 if self.packed_share is None else self.packed_share)

    @property
    def prefill_bytes(self) -> float:
        """The peak of a prefill."""
        packed = 0.0 if self.packed_share is None else self.held_bytes
        forward = (self.cache_bytes - self.kept_bytes) / self.num_layers + self.activation_bytes
        packing = 0.0 if self.packed_share is None else PACKING_COPIES * self.kept_bytes / self.num_layers
        return self.kept_bytes + packed + max(forward, packing)

    def read_bytes(self, num_copies: int) -> float:
        """While the cache is scored or decoded over.

        Args:
            num_copies: how often an unpacked cache is in memory at the same time.
        """
        if self.packed_share is None:
            return self.kept_bytes * num_copies
        return self.held_bytes + 5 * self.kept_bytes / self.num_layers  # one layer: in float32, in its dtype, joined

    def prefilling_bytes(self, num_tokens: float, forward_tokens: float | None = None) -> float:
        """The peak until a batch of so many tokens is ready to be read.

        Args:
            forward_tokens: the most that are prefilled side by side; by default all, unless entries are packed.
        """
        limit = forward_tokens or (num_tokens if self.packed_share is None else PACKED_FORWARD_TOKENS)
        if num_tokens <= limit:
            return num_tokens * self.prefill_bytes
        before = (num_tokens - limit) * self.held_bytes
        joining = num_tokens * self.held_bytes * (1 + 1 / self.num_layers)  # one layer is there twice
        return max(before + limit * self.prefill_bytes, joining)

    def batch_bytes(self, num_tokens: float, num_copies: int, forward_tokens: float | None = None) -> float:
        """The peak of a batch of so many tokens, scored or decoded over.

        Args:
            num_copies, forward_tokens: as for `read_bytes` and `prefilling_bytes`.
        """
        return max(self.prefilling_bytes(num_tokens, forward_tokens), num_tokens * self.read_bytes(num_copies))

    def most_tokens(self, num_bytes: float, num_copies: int, forward_tokens: float | None = None) -> int:
        """The most tokens of a batch whose peak is no more than so many bytes, by bisection."""
        low, high = 0, int(num_bytes / min(self.held_bytes, self.prefill_bytes)) + 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.batch_bytes(middle, num_copies, forward_tokens) <= num_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
