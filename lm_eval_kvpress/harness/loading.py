"""lm-eval's ``HFLM`` that reads a checkpoint only if it can be evaluated; each reason why not is one line.

Config and tokenizer are looked at before weights are read. Knows checked settings. Does not know requests or presses'
work.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import Settings
from lm_eval_kvpress.models import llama_like


class CheckedHFLM(HFLM):
    """What its subclass sets before ``HFLM`` loads anything:

    Attributes:
        _settings: how to compress and score.
        _pretrained_name: as the user typed it.
        _asked_max_length, _asked_device: as the user typed them, or None; the latter where it is one for all weights.
    """

    _settings: Settings
    _pretrained_name: str
    _asked_max_length: int | None
    _asked_device: str | None

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"cannot load pretrained={pretrained}: {reason} Offline, pass the folder of a local checkpoint, or "
                "pretrained=builtin for the small trained model that ships with this package"
            ) from error
        self._check_config(self._config, self._asked_max_length)
        self._check_device()

    def _check_device(self) -> None:
        """``HFLM`` takes another one where it does not find the one that was asked for. The first GPU is what lm-eval's
        command asks for where nobody did, also on a machine without any."""
        if self._asked_device in (None, "cuda", "cuda:0") or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return
        asked = torch.device(self._asked_device)
        if asked.type != self.device.type or asked.index not in (None, self.device.index):
            raise UsageError(f"device={asked} is not on this machine, and {self.device} would take its place")

    def _create_tokenizer(
        self, pretrained: str | PreTrainedModel, tokenizer: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)
        if len(self.tokenizer) <= len(self.tokenizer.added_tokens_decoder):  # transformers makes up an empty one
            raise UsageError(
                f"no tokenizer in {tokenizer or self._pretrained_name}: pass tokenizer=FOLDER with one, or save the "
                "model's own beside its weights"
            )

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        try:
            super()._create_model(pretrained, *args, **kwargs)
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"cannot read the weights of pretrained={pretrained}: {reason}") from error

    def _check_config(self, config: PretrainedConfig, max_length: int | None) -> None:
        if config.model_type in llama_like.MODEL_TYPES:
            llama_like.check_config(config)
        elif config.model_type != "gpt_neox":
            raise UsageError(
                f"architecture '{config.model_type}' is neither GPTNeoX nor one that kvpress supports "
                f"({', '.join(llama_like.MODEL_TYPES)})"
            )
        check_settings(self._settings, config, max_length)


def check_settings(settings: Settings, config: PretrainedConfig, max_length: int | None) -> None:
    """Refuses settings that do not fit the model.

    Raises:
        UsageError: in one line.
    """
    positions = config.max_position_embeddings
    if max_length and max_length > positions and not settings.allow_extrapolation:
        raise UsageError(
            f"max_length={max_length} exceeds the {positions} positions that the model was trained on: lower it, or "
            "pass allow_extrapolation=true to measure what happens beyond"
        )
    settings.rolling_window(max_length or positions)
    settings.check_stream(positions)
    settings.press.check_layers(config.num_hidden_layers)
