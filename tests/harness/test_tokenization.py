"""Texts encoded many at a time get the ids that lm-eval's own methods give them one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lm_eval_kvpress.harness import tokenization
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.requests import generation_batches
from lm_eval_kvpress.harness.tokenization import encode_all, encode_pairs, encode_prompts

END = "<|endoftext|>"
CONTEXTS = ("The old mill", "The old mill ", "The old mill \n\n", " geese", "  ", "", f"{END}The river", "Ünï—code 雪 ")
TEXTS = (" slept", "slept", "", "\nseven grey", f"{END} geese", " 雪", f"{END}", "  river")


@pytest.fixture(scope="module", params=[None, True, False])
def lm(request: pytest.FixtureRequest, checkpoint_dir: Path) -> HFLM:
    """With a tokenizer that begins texts with a token of its own, as Llama's does, unless it is told not to."""
    lm = HFLM(pretrained=str(checkpoint_dir), device="cpu", add_bos_token=request.param)
    begins = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, lm.prefix_token_id)])
    lm.tokenizer.backend_tokenizer.post_processor = begins
    assert lm.tok_encode("geese")[:1] == [lm.prefix_token_id] or request.param is False
    return lm


def test_many_texts_get_the_ids_of_each(lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*CONTEXTS, *TEXTS, "river " * 700]  # longer than the model: no warning, no truncation
    monkeypatch.setattr(tokenization, "TEXTS_PER_CALL", 5)
    assert encode_all(lm, texts) == [lm.tok_encode(text) for text in texts]
    assert encode_all(lm, []) == encode_prompts(lm, []) == []


def test_pairs_get_the_ids_that_stock_gives_them(lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(context, text) for context in CONTEXTS for text in TEXTS if context or text]
    stock: list[Any] = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, disable_tqdm=False: stock.extend(requests))
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    expected = [(list(context), list(continuation)) for _, context, continuation in stock]
    assert [(list(context), list(text)) for context, text in encode_pairs(lm, pairs)] == expected


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(begins: str, ends: str = "", *, bos: str | None = "<s>", space: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens; ``begins`` and ``ends`` are put around a text."""
    special = ["<s>", "</s>", "<pad>"]
    made = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate([*special, *BYTES])}, merges=[]))
    made.add_special_tokens(special)
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=space), decoders.ByteLevel()
    if begins or ends:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A {ends}".strip(), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {
    "Llama": lambda: tokenizer("<s>"),
    "both ends": lambda: tokenizer("<s>", "</s>"),
    "Qwen": lambda: tokenizer("", bos=None),
    "GPT-2": lambda: tokenizer("", bos="</s>"),
    "Pythia that begins": lambda: tokenizer("</s>", bos="</s>"),
    "space before": lambda: tokenizer("<s>", space=True),
}


@pytest.mark.parametrize("prefix", [None, 0, 1, 40])
@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_all_three_request_types_are_those_of_stock(
    make_neox: Callable[..., GPTNeoXForCausalLM], monkeypatch: pytest.MonkeyPatch, name: str, add_bos: Any, prefix: Any
) -> None:
    """What stock ``HFLM`` would feed, taken where it hands ids to the model."""
    lm = HFLM(
        pretrained=make_neox(vocab_size=259, num_layers=1),
        tokenizer=TOKENIZERS[name](),
        add_bos_token=add_bos,
        prefix_token_id=prefix,
        batch_size=1,
    )
    scored: list[Any] = []
    prompts: list[Any] = []

    def score(requests: list[Any], **_: Any) -> list[Any]:
        scored.extend(requests)
        return [(0.0, False)] * len(requests)

    def generate(context: Any, **_: Any) -> Any:
        prompts.append(context[0].tolist())
        return context

    monkeypatch.setattr(lm, "_loglikelihood_tokens", score)
    monkeypatch.setattr(lm, "_model_generate", generate)
    texts = ["<s>The mill", "The mill", " geese", "</s>river", "%first"]
    pairs = [(context, " slept") for context in [*texts, ""]]
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert encode_pairs(lm, pairs) == [(context, continuation) for _, context, continuation in scored]
    scored.clear()
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts], disable_tqdm=True)
    assert encode_all(lm, texts) == [continuation for _, _, continuation in scored]
    for text in texts:
        lm.generate_until([Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 4}), 0)], True)
    assert encode_prompts(lm, texts) == prompts


def test_a_prompt_with_the_tokenizers_bos_is_continued_from_one_bos(make_neox: Callable[..., Any]) -> None:
    """``prefix_token_id`` names another token; chat templates write the BOS into the text."""
    lm = KVPress(pretrained=make_neox(vocab_size=259), tokenizer=tokenizer("<s>"), prefix_token_id=1)
    requests = [Instance("generate_until", {}, ("<s>The mill", {"until": []}), 0, ("chat", 0, 1))]
    (batches,) = generation_batches(lm, lm.session, requests)
    context = batches.contexts([0])[0].tokens
    assert list(context) == lm.tok_batch_encode(["<s>The mill"])[0][0].tolist() and context[:2].count(0) == 1
