"""What an answer depends on besides its request: which weights, and which arguments of ``HFLM``.

Knows models as their parameters. Does not know presses, text or files.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLED = 1_024
"""Numbers of each weight that tell checkpoints apart."""

NO_PART_OF_ANSWERS = frozenset(
    {
        *("attn_implementation", "batch_size", "cache_dir", "device", "device_map", "dtype", "force_download", "gpus"),
        *("local_files_only", "low_cpu_mem_usage", "max_batch_size", "max_cpu_memory", "max_length", "max_memory"),
        *("max_memory_per_gpu", "offload_folder", "offload_state_dict", "parallelize", "revision", "token"),
        *("trust_remote_code", "use_safetensors"),
    }
)
"""Arguments of ``HFLM`` that change no answer, or stand in a run's identity under another name."""


def arguments_of_answers(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Of the arguments of ``HFLM`` those that an answer depends on; JSON can hold them."""
    return {name: str(value) for name, value in sorted(arguments.items()) if name not in NO_PART_OF_ANSWERS}


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints of one name apart: a checksum of numbers from all over every weight, for adapters and frozen
    parts leave some weights as they were."""
    flat = [parameter.detach().flatten() for parameter in model.parameters() if parameter.device.type != "meta"]
    samples = [weight[:: max(1, weight.numel() // SAMPLED)].float().cpu() for weight in flat]
    return f"{zlib.crc32(torch.cat(samples).numpy().tobytes()):08x}"
