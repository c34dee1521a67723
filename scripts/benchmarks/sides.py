"""The contestants of `evaluation`: this package's model and what it is measured against, on the same weights.

A side takes a `Workload` and returns lm-eval's answers. The loops hold the last context token back and feed it after
compression, as this package does, and take one request at a time, as kvpress's own code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import KVPressTextGenerationPipeline
from kvpress.presses.base_press import BasePress
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import StockHFLM
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from scripts.benchmarks.models import builtin_tokenizer, model_named
from scripts.benchmarks.workloads import Workload

Answers = list[Any]
Side = Callable[[Workload], Answers]

RATIO = 0.5


@dataclass(frozen=True)
class Models:
    """One set of weights twice.

    Attributes:
        plain: never touched; stock ``HFLM`` runs on it.
        prepared: presented to kvpress; all other sides run on it.
    """

    plain: PreTrainedModel
    prepared: PressableModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, dtype: str) -> Models:
        """``builtin``, or a key of `models.SHAPES` for random weights of that shape."""
        tokenizer = builtin_tokenizer()
        return cls(model_named(name, dtype), present(model_named(name, dtype)), tokenizer)


def ours(models: Models, press: str, batch_size: int, rolling: str) -> Side:
    of_press = {} if press == "none" else {"compression_ratio": RATIO}
    lm = KVPress(
        pretrained=models.prepared.model,
        tokenizer=models.tokenizer,
        batch_size=batch_size,
        press=press,
        rolling=rolling,
        **of_press,
    )
    return _asked(lm)


def stock(models: Models, batch_size: int) -> Side:
    """lm-eval's own model: uncompressed, one forward per request."""
    return _asked(StockHFLM(pretrained=models.plain, tokenizer=models.tokenizer, batch_size=batch_size))


def _asked(lm: HFLM) -> Side:
    def run(workload: Workload) -> Answers:
        answer: Callable[..., Answers] = getattr(lm, workload.request_type)
        return answer(list(workload.instances), disable_tqdm=True)

    return run


class Pipeline(KVPressTextGenerationPipeline):
    """kvpress's pipeline on token ids.

    Its ``_forward`` calls ``model.model``, which GPTNeoX does not have, so the prefill is spelt out here; what follows
    it is kvpress's own ``generate_answer`` and ``_remove_answer_from_cache``.
    """

    @torch.no_grad()
    def prefill(self, context: list[int], press: BasePress | None) -> DynamicCache:
        cache = DynamicCache()
        ids = torch.tensor([context], device=self.model.device)
        with press(self.model) if press is not None else ExitStack():
            self.model.base_model(input_ids=ids, past_key_values=cache)
        return cache

    @torch.no_grad()
    def generate(self, prompt: list[int], press: BasePress | None, num_new_tokens: int) -> str:
        cache = self.prefill(prompt[:-1], press)
        question = torch.tensor([prompt[-1:]], device=self.model.device)
        return self.generate_answer(question, cache, len(prompt) - 1, num_new_tokens)

    @torch.no_grad()
    def score(self, cache: DynamicCache, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Token by token, as ``generate_answer`` goes; the cache is cropped back afterwards."""
        lengths = [cache.get_seq_length(layer) for layer in range(len(cache))]
        total, is_greedy = 0.0, True
        for step, (token, target) in enumerate(zip([context[-1], *continuation[:-1]], continuation, strict=True)):
            logits = self.model(
                input_ids=torch.tensor([[token]], device=self.model.device),
                past_key_values=cache,
                position_ids=torch.tensor([[len(context) - 1 + step]], device=self.model.device),
            ).logits[0, -1]
            total += logits.float().log_softmax(dim=-1)[target].item()
            is_greedy = is_greedy and logits.argmax().item() == target
        self._remove_answer_from_cache(cache, lengths)
        return total, is_greedy


def pipeline(models: Models, press: str, *, shares_contexts: bool = False) -> Side:
    """kvpress's pipeline in a loop.

    Args:
        shares_contexts: whether the continuations of one context follow one prefill, as kvpress's ``questions=`` do;
            otherwise each request is prefilled.
    """
    encode = HFLM(pretrained=models.plain, tokenizer=models.tokenizer)
    pipe = Pipeline(model=models.prepared.model, tokenizer=models.tokenizer)

    def scores(workload: Workload) -> Iterator[tuple[float, bool]]:
        latest: list[int] = []
        cache = DynamicCache()
        for instance in workload.instances:
            context, continuation = encode._encode_pair(*instance.args)
            if not shares_contexts or context != latest:
                cache, latest = pipe.prefill(context[:-1], _built(press, len(context) - 1)), context
            yield pipe.score(cache, context, continuation)

    def texts(workload: Workload) -> Iterator[str]:
        for instance in workload.instances:
            prompt = encode.tok_encode(instance.args[0])
            yield pipe.generate(prompt, _built(press, len(prompt) - 1), workload.num_new_tokens)

    def run(workload: Workload) -> Answers:
        with models.prepared.presented():
            return list((texts if workload.num_new_tokens else scores)(workload))

    return run


def plain_generate(models: Models, press: str) -> Side:
    """``model.generate`` inside ``with press(model)``, one prompt at a time: what most scripts do.

    Its first token comes from the full cache, so its texts may differ from those of the other sides.
    """
    model, tokenizer = models.prepared.model, models.tokenizer

    @torch.no_grad()
    def run(workload: Workload) -> Answers:
        return [one(tokenizer.encode(instance.args[0]), workload.num_new_tokens) for instance in workload.instances]

    def one(prompt: list[int], num_new_tokens: int) -> str:
        ids = torch.tensor([prompt], device=model.device)
        built = _built(press, len(prompt))
        with models.prepared.presented(), built(model) if built is not None else ExitStack():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new_tokens, do_sample=False
            )
        return tokenizer.decode(new[0, len(prompt) :], skip_special_tokens=True)

    return run


def _built(press: str, length: int) -> BasePress | None:
    of_press = {} if press == "none" else {"compression_ratio": RATIO}
    return parse_press(press, of_press).build(length, shrink=False)
