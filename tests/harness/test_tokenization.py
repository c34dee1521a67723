"""Texts encoded many at a time get the ids that lm-eval's own methods give them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from lm_eval_kvpress.harness import tokenization
from lm_eval_kvpress.harness.tokenization import encode_all, encode_pairs

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
    assert encode_all(lm, []) == []


def test_pairs_get_the_ids_that_stock_gives_them(lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(context, text) for context in CONTEXTS for text in TEXTS if context or text]
    stock: list[Any] = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, disable_tqdm=False: stock.extend(requests))
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    expected = [(list(context), list(continuation)) for _, context, continuation in stock]
    assert [(list(context), list(text)) for context, text in encode_pairs(lm, pairs)] == expected
