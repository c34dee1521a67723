"""What later tokens of a window attend to among earlier ones: one view per layer, while its attention has just run.

Queries and keys are those of the presented model, its norms and rotation included. Knows a presented model. Does not
know text, files or presses.

Letters in shape comments: L layers, H query heads, K key-value heads, G query heads per key-value head, T tokens of the
window, Q later tokens, P earlier ones, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lm_eval_kvpress.calibrate.queries import queries_of
from lm_eval_kvpress.models.pressable import PressableModel


@dataclass(frozen=True, eq=False)
class AttendedLayer:
    """One layer of a window after its attention.

    Attributes:
        index: of the layer.
        module: its attention.
        arguments: of the attention's forward, by name.
        output: what it returned.
        keys, values: ``(K, T, D)``.
    """

    index: int
    module: nn.Module
    arguments: dict[str, Any]
    output: Any
    keys: torch.Tensor
    values: torch.Tensor

    def weights(self, num_queries: int) -> torch.Tensor:
        """Attention weights of the last ``num_queries`` tokens over all, ``(K, G, Q, T)`` in fp32; causal."""
        queries = queries_of(self.module, self.arguments, rotated=True)[:, -num_queries:]  # (H, Q, D)
        num_kv_heads, num_tokens, head_dim = self.keys.shape
        by_group = queries.reshape(num_kv_heads, -1, num_queries, head_dim).float()
        scores = by_group @ self.keys.float()[:, None].transpose(2, 3) * getattr(self.module, "scaling", head_dim**-0.5)
        places = torch.arange(num_tokens, device=scores.device)
        scores.masked_fill_(places > places[-num_queries:, None], -torch.inf)
        return scores.softmax(dim=-1)


@torch.inference_mode()
def look_at_layers(
    model: PressableModel, window: Sequence[int], look: Callable[[AttendedLayer], None], cache: DynamicCache
) -> None:
    """Run a window, or what follows the tokens of ``cache``, and show every layer to ``look``.

    The model must be presented already.
    """

    def hook_for(index: int) -> Callable[..., None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            layer = cache.layers[index]
            look(AttendedLayer(index, module, kwargs, output, layer.keys[0], layer.values[0]))

        return show

    with ExitStack() as hooks:
        for index, attention in enumerate(model.attentions):
            hooks.callback(attention.register_forward_hook(hook_for(index), with_kwargs=True).remove)
        tokens = torch.tensor([list(window)], device=model.device)
        model.hidden_states(tokens, past_key_values=cache, use_cache=True)
