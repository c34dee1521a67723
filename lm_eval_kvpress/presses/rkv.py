"""R-KV, which kvpress lacks: an entry stays if the newest queries attend to it and no other key is like its own.

Texts that reason repeat themselves. Attention alone keeps every copy of a repeated step; here a key that is like many
others counts as redundant, and of keys that are alike the newest does not. Scores only: how many stay, and when, is
decided elsewhere. Does not know models or caches.

Source: arXiv 2505.24133, and the authors' code (github.com/Zefan-Cai/R-KV, ``rkv/compression/r1_kv.py``). One thing is
as in the paper and not as in the code, which also forgives token 0 its likeness to every token that is like none.

Letters in shape comments: B rows, H key-value heads, T cached entries, D head_dim, W window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import kvpress
from kvpress.utils import get_prerope_query_states


@dataclass
class RKVPress(kvpress.ScorerPress):
    """R-KV: importance less redundancy.

    Args:
        window_size: newest tokens, which look at the others and always stay.
        kernel_size: entries over which the largest attention counts.
        mix_lambda: weight of the importance; that of the redundancy is the rest.
        redundancy_threshold: cosine of two keys above which they are alike, and the older one is redundant.
    """

    window_size: int = 8
    kernel_size: int = 7
    mix_lambda: float = 0.1
    redundancy_threshold: float = 0.5

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Scores ``(B, H, T)`` of keys ``(B, H, T, D)``; the window's are above all others."""
        window = self.window_size
        assert hidden_states.shape[1] >= window, f"{hidden_states.shape[1]} hidden states for a window of {window}"
        attention = self._attention(module, hidden_states[:, -window:], keys, kwargs["position_embeddings"])
        redundancy = self._redundancy(keys)[..., :-window]
        scores = attention.new_full(keys.shape[:3], 1.0)  # no other score is above mix_lambda
        scores[..., :-window] = self.mix_lambda * self._pooled(attention) - (1 - self.mix_lambda) * redundancy
        return scores

    def _attention(self, module: Any, hidden: Any, keys: Any, angles: tuple[Any, Any]) -> Any:
        """How much the window attends to each entry before it, ``(B, H, T - W)``, on the average of its tokens.

        Of query heads that share a key-value head, the largest logit counts.
        """
        cos, sin = (angle[:, None, -hidden.shape[1] :] for angle in angles)
        queries = _rotated(get_prerope_query_states(module, hidden), cos, sin)
        by_group = queries.unflatten(1, (keys.shape[1], -1))  # (B, H, heads of a group, W, D)
        logits = by_group @ keys[:, :, None, : -hidden.shape[1]].transpose(-1, -2) / math.sqrt(keys.shape[-1])
        return logits.amax(dim=2).float().softmax(dim=-1).mean(dim=-2)

    def _pooled(self, attention: Any) -> Any:
        """The largest attention within a kernel around each entry."""
        half, num_entries = self.kernel_size // 2, attention.shape[-1]
        padded = attention.new_zeros(*attention.shape[:-1], num_entries + 2 * half)
        padded[..., half : half + num_entries] = attention
        return padded.unfold(-1, self.kernel_size, 1).amax(dim=-1)

    def _redundancy(self, keys: Any) -> Any:
        """How alike each key is to all others, ``(B, H, T)``, as shares that sum to 1."""
        directions = keys.float() / keys.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        alike = directions @ directions.transpose(-1, -2)  # (B, H, T, T)
        alike.diagonal(dim1=-2, dim2=-1).zero_()
        above = alike > self.redundancy_threshold
        is_newest = above & (above.cumsum(dim=-1) == above.sum(dim=-1, keepdim=True))
        return alike.masked_fill(is_newest, 0.0).mean(dim=-2).softmax(dim=-1)


def _rotated(queries: Any, cos: Any, sin: Any) -> Any:
    """Apply RoPE over whole heads."""
    half, turned = queries.shape[-1] // 2, queries * cos
    turned[..., :half] -= queries[..., half:] * sin[..., :half]
    turned[..., half:] += queries[..., :half] * sin[..., half:]
    return turned
