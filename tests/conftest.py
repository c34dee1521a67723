"""Tiny seeded models for all tests: no network, milliseconds to build, attention far from uniform.

`references.py` beside this file holds what the engine is compared with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then runs its kernels in Python
    os.environ["TRITON_INTERPRET"] = "1"

# ruff: noqa: E402
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.fast import gpt_neox_step, triton_support
from lm_eval_kvpress.models.pressable import PressableModel

logging.disable_progress_bar()  # of weights that load in milliseconds; it would fill every failure's report
torch.set_num_threads(1)  # the models are too small for more, and figures then repeat; see also `one_thread`

VOCAB_SIZE = 211


class WordTokenizer:
    """A token for each letter, for presses that put a prompt behind a context; it has no chat template."""

    chat_template = None

    def encode(self, text: str, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([[1 + ord(letter) % (VOCAB_SIZE - 1) for letter in text]], dtype=torch.long)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Take back the threads that a benchmark has set: products are rounded otherwise with two."""
    yield
    torch.set_num_threads(1)


TESTS = Path(__file__).resolve().parent
FOLDER_MARKS = {
    "end_to_end": "end_to_end",
    "kernels": "kernels",
    "benchmarks": "benchmarks",
    "studies": "benchmarks",
    "training": "benchmarks",
}
"""Folder below tests/ -> the mark of its tests; `make test` leaves them out, and continuous integration runs them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = FOLDER_MARKS.get(item.path.relative_to(TESTS).parts[0])
        if mark:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _masks_as_a_gpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch's attention takes a mask of one column for all entries; its kernels for GPUs do not."""
    attend = nn.functional.scaled_dot_product_attention

    def checked(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs.get("attn_mask", args[1] if len(args) > 1 else None)
        assert mask is None or mask.shape[-1] == key.shape[-2] and (mask.stride(-1) == 1 or mask.shape[-1] == 1), (
            f"a mask of shape {tuple(mask.shape)} and strides {mask.stride()} for {key.shape[-2]} entries"
        )
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", checked)


SENTENCES = [
    "The cold river ran past an old mill where seven grey geese slept and nobody asked who owned them.",
    "A baker, a sailor and two clerks waited at the harbour; the ship had left an hour before.",
    "In 1871 the station burnt down, was rebuilt within a year, and has served the valley ever since.",
    "\n = Bridges = \n\n The first bridge was built of oak . It lasted 40 years , and then the flood took it away . \n",
    "Question: Which bird sleeps near the mill?\nAnswer: the grey geese",
]


def randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give biases and norms values other than 0 and 1: a forgotten bias or norm must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
            if isinstance(bias, nn.Parameter):
                bias += 0.2 * torch.randn(bias.shape, generator=generator)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def tiny_neox(
    attn: str = "sdpa",
    *,
    rotary_pct: float = 0.25,
    parallel: bool = True,
    attention_bias: bool = True,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 3,
    vocab_size: int = VOCAB_SIZE,
    max_positions: int = 512,
    seed: int = 0,
) -> GPTNeoXForCausalLM:
    """A GPTNeoX of 4 heads of 16 dims. The same arguments give the same weights; no two models share a config."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=128,
        rotary_pct=rotary_pct,
        use_parallel_residual=parallel,
        attention_bias=attention_bias,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attn,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    return randomized(model, seed + 1).to(dtype)


def tiny_llama(attn: str = "sdpa", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 4 query heads over 2 key-value heads."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=0.2,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attn,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return randomized(model, seed + 1).to(dtype)


@pytest.fixture(scope="session")
def make_neox() -> Callable[..., GPTNeoXForCausalLM]:
    """`tiny_neox`: the untouched transformers model."""
    return tiny_neox


@pytest.fixture(scope="session")
def make_pressable() -> Callable[..., PressableModel]:
    """Present a tiny GPTNeoX; arguments as for ``make_neox``, and ``fast``."""

    def made(*args: Any, fast: bool = True, **kwargs: Any) -> PressableModel:
        return lend_tokenizer(present(tiny_neox(*args, **kwargs), fast=fast), WordTokenizer())

    return made


@pytest.fixture(scope="session")
def make_pressable_llama() -> Callable[..., PressableModel]:
    """Present a tiny Llama with grouped-query attention; arguments as for `tiny_llama`, and ``fast``."""

    def made(*args: Any, fast: bool = True, **kwargs: Any) -> PressableModel:
        return lend_tokenizer(present(tiny_llama(*args, **kwargs), fast=fast), WordTokenizer())

    return made


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Pythia's: any text comes back as it was; ``<|endoftext|>`` is id 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``from_pretrained``: a tiny GPTNeoX of 512 positions and its tokenizer. Do not write to it."""
    folder = tmp_path_factory.mktemp("tiny_neox")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_neox(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def few_kernels_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try GPTNeoX's step in few kernels on a CPU, too."""
    monkeypatch.setattr(gpt_neox_step, "DEVICE_TYPES", {"cpu", "cuda"})
    monkeypatch.setattr(triton_support, "is_new_enough", lambda device: True)


@pytest.fixture
def make_for_gpu(make_pressable: Callable[..., PressableModel]) -> Callable[..., PressableModel]:
    """``make_pressable`` for the GPU, where there is one."""

    def made(**setting: Any) -> PressableModel:
        model = make_pressable(**setting)
        model.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model

    return made


@pytest.fixture
def step_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each forward of a single token was: modules or few kernels."""
    log: list[str] = []
    few, modules = gpt_neox_step.NeoxStep.__call__, PressableModel.hidden_states

    def few_kernels(self: Any, *args: Any) -> torch.Tensor:
        log.append("few")
        return few(self, *args)

    def by_modules(self: PressableModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] == 1:
            log.append("modules")
        return modules(self, tokens, **kwargs)

    monkeypatch.setattr(gpt_neox_step.NeoxStep, "__call__", few_kernels)
    monkeypatch.setattr(PressableModel, "hidden_states", by_modules)
    return log


@pytest.fixture(scope="session")
def models(
    make_pressable: Callable[..., PressableModel], make_pressable_llama: Callable[..., PressableModel]
) -> dict[str, PressableModel]:
    """A tiny GPTNeoX and a tiny Llama by architecture and attention implementation."""
    return {
        "neox sdpa": make_pressable("sdpa"),
        "neox eager": make_pressable("eager"),
        "llama sdpa": make_pressable_llama("sdpa"),
        "llama eager": make_pressable_llama("eager"),
    }
