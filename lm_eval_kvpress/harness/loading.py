"""lm-eval's ``HFLM`` that reads a checkpoint only if it can be evaluated; each reason why not is one line.

Config and tokenizer are looked at before weights are read. Knows checked settings. Does not know requests, or how
presses work.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import make_writable
from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.launch import meet_the_others, num_processes, rank_in_run
from lm_eval_kvpress.harness.packing import check_groups
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.harness.whole_weights import WholeWeights, unreadable_in_one_line
from lm_eval_kvpress.models.architectures import check_config, check_numbers
from lm_eval_kvpress.models.cpu_dtypes import warn_of_slow_dtype
from lm_eval_kvpress.models.positions import Positions
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.loss_files import lock_folder


class CheckedHFLM(HFLM):
    """``HFLM`` on a checkpoint that fits the settings.

    Args:
        pretrained: folder, hub name, ``builtin``, or a loaded model.
        settings: how to compress and score.
        **arguments: of ``HFLM``, with ``attn_implementation``.

    Attributes:
        pretrained_name: as the user typed it; the name of a loaded model.

    Raises:
        UsageError: if it cannot be evaluated.
    """

    pretrained_name: str
    AUTO_MODEL_CLASS: Any

    def __init__(self, pretrained: str | PreTrainedModel | None, settings: Settings, **arguments: Any) -> None:
        if pretrained is None or pretrained == "":
            raise UsageError("pretrained is required: a folder, a hub name, or pretrained=builtin")
        if isinstance(pretrained, int | float):  # lm-eval reads a folder named 2024 as a number
            pretrained = str(pretrained)
        self._settings_at_load, self._asked_max_length = settings, arguments.get("max_length")
        self._asked_prefix = arguments.get("prefix_token_id")
        self._asked_device: str | None = None
        self._is_borrowed = not isinstance(pretrained, str)
        if settings.stream_output is not None:
            make_writable("stream_output", Path(settings.stream_output))
            self._stream_lock = lock_folder(Path(settings.stream_output), rank_in_run())
        if isinstance(pretrained, str):
            self.pretrained_name = pretrained
            arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            meet_the_others(str(arguments["device"]))
            if not {"parallelize", "device_map"} & arguments.keys():
                self._asked_device = arguments["device"]
            super().__init__(pretrained=resolve_pretrained(pretrained), **arguments)
            self._take_a_share()
        else:
            self.pretrained_name = pretrained.name_or_path
            self._check_loaded(pretrained)
            del arguments["attn_implementation"]
            super().__init__(pretrained=pretrained, **arguments)

    def check_settings(self, settings: Settings) -> None:
        """Refuse settings that do not fit the loaded model.

        Raises:
            UsageError: in one line.
        """
        check_settings(settings, self.model.config, self._asked_max_length)

    def _take_a_share(self) -> None:
        """Answer a share of the documents wherever several processes were started.

        ``HFLM`` does so on machines of several GPUs only, by the rank within the machine: processes on CPUs, or on
        machines of one GPU, would each answer everything, and machines of several would repeat each other's share.
        """
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _check_loaded(self, model: PreTrainedModel) -> None:
        self._check_config(model.config)
        settings, has = self._settings_at_load, model.config._attn_implementation
        needed = settings.attn_implementation
        if needed and has != needed:
            raise UsageError(
                f"press={settings.press_name} needs {needed} attention and the loaded model has {has}: call "
                f"model.set_attn_implementation('{needed}') first, or pass the model's name"
            )

    def _check_config(self, config: PretrainedConfig) -> None:
        check_numbers(config)
        if self._asked_prefix is not None and self._asked_prefix >= config.vocab_size:
            raise UsageError(
                f"prefix_token_id={self._asked_prefix} is beyond the model's vocabulary of {config.vocab_size} tokens"
            )
        check_settings(self._settings_at_load, config, self._asked_max_length)

    def _check_device(self) -> None:
        """Refuse another device than the one asked for, which ``HFLM`` would take in silence where that is missing.

        ``cuda`` and ``cuda:0`` pass: lm-eval's command asks for the first GPU where nobody did, also without any. But
        ``HFLM`` takes a plain ``cuda`` for a device that is there.
        """
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device={self.device} is not on this machine: name another, or leave it out")
        if self._asked_device in (None, "cuda", "cuda:0") or num_processes() > 1:
            return
        asked = torch.device(self._asked_device)
        if asked.type != self.device.type or asked.index not in (None, self.device.index):
            raise UsageError(f"device={asked} is not on this machine, and {self.device} would take its place")

    # ---------------------------------------------------------------------------- the phases of HFLM's constructor

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError, KeyError, TypeError) as error:  # the last two: of a config.json's values
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"cannot load pretrained={pretrained}: {reason} Offline, pass the folder of a local checkpoint, or "
                "pretrained=builtin for the small trained model that ships with this package"
            ) from error
        self._check_config(self._config)
        self._check_device()

    def _create_tokenizer(
        self, pretrained: str | PreTrainedModel, tokenizer: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"cannot read the tokenizer of {tokenizer or self.pretrained_name}: {reason}") from error
        if len(self.tokenizer) <= len(self.tokenizer.added_tokens_decoder):  # transformers makes up an empty one
            raise UsageError(
                f"no tokenizer in {tokenizer or self.pretrained_name}: pass tokenizer=FOLDER with one, or save the "
                "model's own beside its weights"
            )
        if self._asked_prefix is None and self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise UsageError(
                f"the tokenizer of {self.pretrained_name} has neither BOS nor EOS, so nothing predicts a text's first "
                "token: pass prefix_token_id=N"
            )
        # Documents are cut into windows here: the warning that they are longer than one would mislead.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        loader = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = WholeWeights(loader)
        try:
            with unreadable_in_one_line(pretrained):
                super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = loader


def settle_on_device(model: PressableModel, computes_in: torch.dtype) -> None:
    """Make the model's GPU the current device, to which CUDA's events and graphs belong; on a CPU warn of a slow dtype.

    Without this, ``device=cuda:1`` leaves the first GPU the current one.
    """
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    elif model.device.type == "cpu":
        warn_of_slow_dtype(computes_in)


def check_settings(settings: Settings, config: PretrainedConfig, max_length: int | None) -> None:
    """Refuse settings that do not fit the model.

    Args:
        max_length: as the user typed it, or None.

    Raises:
        UsageError: in one line.
    """
    positions = config.max_position_embeddings
    if max_length and max_length > positions and not settings.allow_extrapolation:
        raise UsageError(
            f"max_length={max_length} exceeds the {positions} positions that the model was trained on: lower it, or "
            "pass allow_extrapolation=true to measure what happens beyond"
        )
    if settings.rolling == "prefix":
        settings.rolling_window(max_length or positions)
    settings.check_stream(positions)
    check_groups(settings, config)
    check_config(config, positions_of(settings, max_length or positions))
    settings.press.check_layers(config.num_hidden_layers)


def positions_of(settings: Settings, max_length: int) -> Positions:
    """The positions that a run with these settings may use."""
    if settings.rolling != "stream":
        return Positions(max_length)
    if settings.stream_positions == "original":
        return Positions(math.inf)
    assert settings.stream_budget is not None
    return Positions(max(max_length, settings.stream_budget + settings.stream_chunk), rotates_back=True)
