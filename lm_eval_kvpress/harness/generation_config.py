"""How texts are generated: lm-eval's generation arguments over the checkpoint's ``generation_config.json``.

As stock ``HFLM`` does: what a task leaves open, the checkpoint decides, such as a repetition penalty or a ban of
n-grams, and what both leave open, transformers. Whatever cannot be done through a compressed cache is refused; no field
is dropped unseen. Knows transformers' fields. Does not know models or caches.

Source: ``GenerationMixin._prepare_generation_config`` and ``GenerationConfig.get_generation_mode`` of transformers 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from lm_eval_kvpress.engine.logits_processors import OPTIONS, acting, eos_ids
from lm_eval_kvpress.errors import UsageError

DEFAULTS = {"top_k": 50}
"""Where transformers' default is not the value that changes nothing (``_get_default_generation_params``)."""

STRATEGY = ("do_sample", "eos_token_id", "max_new_tokens")
"""Options without a processor that are followed."""

WITHOUT_EFFECT = frozenset(
    {
        *("max_length", "use_cache", "cache_config", "compile_config", "disable_compile", "prefill_chunk_size"),
        *("low_memory", "bos_token_id", "pad_token_id", "decoder_start_token_id", "early_stopping", "length_penalty"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "transformers_version"),
        *("trust_remote_code",),
    }
)
"""Fields that change no text of one prompt without beams and without an assistant. lm-eval sets ``max_length``."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "cache_implementation": ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid"),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    **dict.fromkeys(("dola_layers", "constraints", "force_words_ids", "watermarking_config", "max_time"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "stop_strings", "top_h"), ()),
}
"""Fields that ask for another way of decoding -> the values, besides None, with which they ask for nothing."""


def effective_options(checkpoint: GenerationConfig | None, gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` would run with, less what changes nothing.

    Args:
        checkpoint: of the loaded model; None for a model that has none.
        gen_kwargs: lm-eval's normalized generation arguments, without ``until`` and ``max_gen_toks``. None switches the
            checkpoint's value off.

    Returns:
        the options of `engine.logits_processors` that act, in the order in which they are applied, then ``do_sample``
        (only if true), ``eos_token_id`` (a list), and ``max_new_tokens`` if the checkpoint sets it. JSON can hold them.

    Raises:
        UsageError: for an argument that is unknown or cannot be followed.
    """
    _refuse_unknown(gen_kwargs)
    options = {**DEFAULTS, **checkpoint_options(checkpoint), **gen_kwargs}
    if gen_kwargs.get("temperature") == 0 and gen_kwargs.get("do_sample"):
        raise UsageError(f"do_sample=true needs temperature > 0, not {gen_kwargs['temperature']}")
    _refuse_unsupported(options, gen_kwargs)
    if options.get("exponential_decay_length_penalty") is not None and not eos_ids(options):
        raise UsageError("exponential_decay_length_penalty needs an eos_token_id, whose share it raises")
    effective = {**acting(options), "eos_token_id": eos_ids(options)}
    return effective | {name: options[name] for name in ("do_sample", "max_new_tokens") if options.get(name)}


def checkpoint_options(checkpoint: GenerationConfig | None) -> dict[str, Any]:
    """What a checkpoint's generation config asks for, by transformers' names, ready for JSON.

    Entries of other programs are left out. A bias by tuples of ids becomes the list that a file would hold.
    """
    known, given = vars(GenerationConfig()), {} if checkpoint is None else checkpoint.to_dict()
    return {
        name: _as_list(value) if name == "sequence_bias" else value
        for name, value in given.items()
        if name in known and not name.startswith("_") and name not in WITHOUT_EFFECT and value is not None
    }


def _as_list(sequence_bias: Any) -> Any:
    return (
        [[list(ids), bias] for ids, bias in sequence_bias.items()] if isinstance(sequence_bias, dict) else sequence_bias
    )


def _refuse_unknown(gen_kwargs: Mapping[str, Any]) -> None:
    known = {*OPTIONS, *STRATEGY, *UNSUPPORTED, *WITHOUT_EFFECT} - {"max_length"}
    unknown = sorted(name for name in gen_kwargs if name not in known)
    if unknown:
        raise UsageError(
            f"generation arguments not supported: {', '.join(unknown)}; supported are do_sample, until, max_gen_toks, "
            f"ignore_eos, eos_token_id, {', '.join(OPTIONS)}"
        )


def _refuse_unsupported(options: Mapping[str, Any], gen_kwargs: Mapping[str, Any]) -> None:
    """Refuse another way of decoding, and a field of a transformers that is newer than this file."""
    for name, value in options.items():
        if name in OPTIONS or name in STRATEGY or name in WITHOUT_EFFECT or value is None:
            continue
        if value in UNSUPPORTED.get(name, ()) or (name == "top_h" and not options.get("do_sample")):
            continue
        whose = "" if name in gen_kwargs else "of the checkpoint's generation_config.json "
        raise UsageError(
            f"{name}={value} {whose}is not supported: a compressed cache is decoded greedily or by sampling, one text "
            f"per prompt; gen_kwargs {name}=None leaves it out"
        )
