"""The same texts through kvpress's own pipeline: the kept entries of every layer and the greedy answers are equal.

``KVPressTextGenerationPipeline`` splits a prompt for its own evaluation: the context is compressed, and the question,
the end of the chat's template and the answer's prefix are fed afterwards. Its evaluation with ``query_aware`` moves the
question into the context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval_requests import text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.requests import generation_batches

CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONTEXT, QUESTION, ANSWER_PREFIX = text(3, 90) + "\n", "Question: which bird sleeps near the mill?", "It is the"
NUM_NEW = 8
PRESSES: dict[str, type[kvpress.ScorerPress]] = {
    "knorm": kvpress.KnormPress,
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
}


CASES = [
    ("llama", "knorm", False, True),
    ("llama", "snapkv", False, False),
    ("llama", "expected_attention", True, True),
    ("llama", "streaming_llm", True, False),
    ("qwen3", "keydiff", False, True),
    ("qwen3", "snapkv", True, False),
]


@pytest.fixture(scope="module")
def folders(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of random weights, with the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        models = {
            "llama": LlamaForCausalLM(LlamaConfig(**shape)),
            "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape)),
        }
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, folder in folders.items():
        models[name].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.mark.parametrize(("model", "press", "query_aware", "chat"), CASES)
def test_kept_entries_and_answers_are_those_of_kvpress(
    folders: dict[str, Path], model: str, press: str, query_aware: bool, chat: bool
) -> None:
    folder, window = folders[model], {"window_size": 8} if press == "snapkv" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT if chat else None
    pipeline = kvpress.KVPressTextGenerationPipeline(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    context, question = (CONTEXT + QUESTION, "") if query_aware else (CONTEXT, QUESTION)
    parts = pipeline.preprocess(context, [question], ANSWER_PREFIX, max_context_length=512)
    cache = DynamicCache()
    theirs = PRESSES[press](compression_ratio=0.5, **window)
    with torch.inference_mode():
        (answer,) = pipeline._forward(parts, max_new_tokens=NUM_NEW, press=theirs, cache=cache)

    (held_back,), whole = parts["questions_ids"], torch.cat([parts["context_ids"], *parts["questions_ids"]], dim=1)
    split = {"query_tokens": held_back.shape[1]} if query_aware else {"question_pattern": "Question:"}
    lm = KVPress(
        str(folder), press=press, compression_ratio=0.5, device="cpu", query_aware=query_aware, **split, **window
    )
    options = {"until": [], "max_gen_toks": NUM_NEW, "do_sample": False}
    request = Instance("generate_until", {}, (tokenizer.decode(whole[0]), options), 0, ("t", 0, 1))
    (batches,) = generation_batches(lm, lm.session, [request])
    (ours,) = batches.contexts([0])
    assert [*ours.compressed] == parts["context_ids"][0].tolist()
    assert [*ours.held_back] == held_back[0].tolist()
    kept = lm.session.runner.compressor.compress([ours]).cache
    for one, other in zip(kept.layers, cache.layers, strict=True):
        assert one.num_entries == len(ours.compressed) // 2
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5)
    assert lm.generate_until([request], disable_tqdm=True) == [answer]
