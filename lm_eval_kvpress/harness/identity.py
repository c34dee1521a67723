"""What an answer depends on besides its request, and the guard of lm-eval's ``--use_cache``.

lm-eval keys cached answers by the request alone. So a file beside the cache says whose answers it keeps. Nothing is
read from the cache itself, whose values are pickles: reading one may run code. Knows ``HFLM``, models as their
parameters, and how many answers a cache holds. Does not know presses or text.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zlib
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import write_whole

OWNER_ENDING = ".owner.json"
"""Ends the name of the file beside a cache that says whose answers it holds."""

NO_PART_OF_ANSWERS = frozenset(
    {
        *("attn_implementation", "batch_size", "cache_dir", "device", "device_map", "dtype", "force_download"),
        *("local_files_only", "logits_cache", "low_cpu_mem_usage", "max_batch_size", "max_cpu_memory", "max_length"),
        *("max_memory", "max_memory_per_gpu", "offload_folder", "offload_state_dict", "parallelize", "revision"),
        *("token", "trust_remote_code", "truncation", "use_safetensors"),
    }
)
"""Arguments of ``HFLM`` that change no answer here, or stand in a run's identity under another name."""


NO_PART_OF_CONFIG = frozenset(
    {
        *("_name_or_path", "architectures", "attn_implementation", "_attn_implementation", "dtype", "torch_dtype"),
        *("transformers_version", "use_cache"),
    }
)
"""Entries of a config that change no answer, or stand in a run's identity under another name."""

TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "eos_token_id")


def arguments_of_answers(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The arguments of ``HFLM`` that an answer depends on, without those at their default; ready for JSON."""
    defaults = {name: value.default for name, value in inspect.signature(HFLM.__init__).parameters.items()}
    return {
        name: _as_json(value)
        for name, value in sorted(arguments.items())
        if name not in NO_PART_OF_ANSWERS and value is not None and value != defaults.get(name)
    }


def _as_json(value: Any) -> str:
    if isinstance(value, PreTrainedTokenizerBase):  # whose text changes when lm-eval gives it a padding token
        return f"{value.name_or_path} of {value.vocab_size} tokens"
    return str(value)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A checksum of every byte of the weights, about one GiB per second on a CPU; offloaded ones are read once more.

    It tells checkpoints of one name apart, also if an adapter or training left most of the weights as they were.
    """
    checksum = 0
    for weight in _weights(model):
        whole = weight.detach().cpu().contiguous().reshape(-1)
        raw: Any = whole.view(torch.uint8).numpy()
        checksum = zlib.crc32(raw, checksum)
    return f"{checksum:08x}"


def _weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """All parameters, each once, in the model's order."""
    seen = set[int]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter if parameter.device.type != "meta" else _offloaded(module, name)


def _offloaded(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight that ``accelerate`` keeps on the disk or in CPU memory until its module runs."""
    hook: Any = getattr(module, "_hf_hook", None)
    for own in getattr(hook, "hooks", [hook]):
        weights = getattr(own, "weights_map", None)
        if weights is not None:
            weight: torch.Tensor = weights[name]
            return weight
    raise UsageError(f"a {name} of a {type(module).__name__} is on no device and was not offloaded: nothing was loaded")


def config_fingerprint(model: PreTrainedModel) -> str:
    """A hash of what a config says beside the weights: RoPE and its scaling, norms, positions."""
    return _hash({key: value for key, value in model.config.to_dict().items() if key not in NO_PART_OF_CONFIG})


def checkpoint_hashes(lm: HFLM) -> dict[str, str]:
    """A hash of every part of the checkpoint that answers depend on, as it was loaded.

    A tokenizer, a chat template, a RoPE scaling or an end of text can be corrected beside the same weights.
    """
    tokenizer, generation = lm.tokenizer, lm.model.generation_config
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    flags = {name: getattr(tokenizer, name, None) for name in TOKENIZER_FLAGS}
    return {
        "weights": weights_fingerprint(lm.model),
        "config": config_fingerprint(lm.model),
        "generation": _hash({} if generation is None else generation.to_diff_dict()),
        "tokenizer": _hash({**rules, **flags, "padding": None, "truncation": None}),  # these two change with each call
        "chat_template": _hash(getattr(tokenizer, "chat_template", None)),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_identity(lm: HFLM, facts: Mapping[str, Any], arguments: Mapping[str, str]) -> dict[str, Any]:
    """Everything that an answer depends on besides its request.

    Args:
        facts: the run's record.
        arguments: as `arguments_of_answers` gives them.
    """
    keys = ("pretrained", "press", "quantization", "protocol", "attn_implementation", "dtype", "fast", "versions")
    return {key: facts[key] for key in keys} | {
        **arguments,
        "revision": lm.revision,
        **checkpoint_hashes(lm),
        "prefix_token": lm.prefix_token_id,
        "seed": torch.initial_seed(),
    }


def check_owner(cache: Sized, file: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that a cache holds this run's answers only; an empty one becomes this run's.

    Args:
        cache: lm-eval's cache of answers, of which only the number is looked at.
        file: of the cache; the mark lies beside it.
        identity: of the run (`run_identity`).

    Raises:
        UsageError: if it holds the answers of another run.
    """
    own, mark = json.loads(json.dumps(identity, sort_keys=True)), file.with_name(file.name + OWNER_ENDING)
    if not len(cache):
        write_whole(mark, json.dumps(own, indent=2))
        return
    owner = _read_owner(mark)
    changed = sorted(key for key in owner.keys() | own.keys() if owner.get(key) != own.get(key))
    if changed:
        raise UsageError(
            f"use_cache holds answers under another setting ({', '.join(changed)} differ), and lm-eval would hand them "
            "out for this one: choose another file"
        )


def _read_owner(mark: Path) -> dict[str, Any]:
    try:
        owner = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        owner = None
    if not isinstance(owner, dict):
        raise UsageError(f"use_cache holds answers of unknown origin, no {mark} says whose: choose another file")
    return owner
