"""What an answer depends on besides its request: which weights, and which arguments of ``HFLM``.

Knows models as their parameters, and ``HFLM``'s signature. Does not know presses, text or files.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_PART_OF_ANSWERS = frozenset(
    {
        *("attn_implementation", "batch_size", "cache_dir", "device", "device_map", "dtype", "force_download"),
        *("local_files_only", "logits_cache", "low_cpu_mem_usage", "max_batch_size", "max_cpu_memory", "max_length"),
        *("max_memory", "max_memory_per_gpu", "offload_folder", "offload_state_dict", "parallelize", "revision"),
        *("token", "trust_remote_code", "truncation", "use_safetensors"),
    }
)
"""Arguments of ``HFLM`` that change no answer here, or stand in a run's identity under another name."""


def arguments_of_answers(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Of the arguments of ``HFLM`` those that an answer depends on, less what is so by default; JSON can hold them."""
    defaults = {name: value.default for name, value in inspect.signature(HFLM.__init__).parameters.items()}
    return {
        name: _in_words(value)
        for name, value in sorted(arguments.items())
        if name not in NO_PART_OF_ANSWERS and value is not None and value != defaults.get(name)
    }


def _in_words(value: Any) -> str:
    if isinstance(value, PreTrainedTokenizerBase):  # whose text changes when lm-eval gives it a padding token
        return f"{value.name_or_path} of {value.vocab_size} tokens"
    return str(value)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints of one name apart, also by an adapter or training that left most weights as they were: a
    checksum of every byte, of which a CPU does about one GiB a second."""
    checksum = 0
    for parameter in model.parameters():
        if parameter.device.type != "meta":  # offloaded
            whole = parameter.detach().cpu().contiguous().reshape(-1)
            checksum = zlib.crc32(whole.view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"
