"""Does a press keep the needle where the model reads it? On RULER's first needle, by layers and heads.

    python -m scripts.studies.needle_heads FOLDER --documents 8 --length 1024 --ratio 0.25

The model answers with its full cache. The attention of the tokens of the answer on the entries of the needle's number
says in which key-value heads it reads them. Then each press, in kvpress's own implementation, compresses the same
context, and two shares are taken: of the number's entries, how many are left; and of that attention, how much fell on
entries that are left. Equal shares mean that the press loses the number without regard to where it is read.

Needs ``pip install "lm-eval-kvpress[longcontext]"``, no network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lm_eval_kvpress.tables import markdown_table
from scripts.studies.kvpress_agreement import QUESTION, documents

PRESSES: dict[str, type[kvpress.ScorerPress]] = {
    "snapkv": kvpress.SnapKVPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "random": kvpress.RandomPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "knorm": kvpress.KnormPress,
    "tova": kvpress.TOVAPress,
    "keydiff": kvpress.KeyDiffPress,
}


class Needle:
    """One document over the full cache.

    Attributes:
        context: token ids that are compressed, ``(1, T)``.
        values: of each layer, the values of the number's entries, ``(H_kv, N, D)``.
        reading: attention of the answer on these entries, ``(layers, H_kv, N)``; a query head counts with its
            key-value head, a token of the answer with the token of the number that it repeats.
    """

    def __init__(self, model: Any, tokenizer: Any, document: Mapping[str, Any], query_aware: bool) -> None:
        (number,) = document["outputs"]
        text = document["input"]
        split = len(text) if query_aware else [*QUESTION.finditer(text)][-1].start()
        self.context = tokenizer(text[:split], return_tensors="pt").input_ids
        rest = tokenizer(text[split:] + " " + document["gen_prefix"].strip(), return_tensors="pt").input_ids
        answer = tokenizer(" " + number, return_tensors="pt").input_ids
        places = _places(self.context[0].tolist(), tokenizer(number).input_ids)
        cache = DynamicCache()
        model.set_attn_implementation("sdpa")
        model.model(torch.cat([self.context, rest], 1), past_key_values=cache)
        self.values = [layer.values[0, :, places] for layer in cache.layers]
        model.set_attn_implementation("eager")
        attentions = model(answer[:, :-1], past_key_values=cache, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        num_digits = len(places)
        self.reading = torch.stack([_reading(one[0, :, -num_digits:], places, self.values[0]) for one in attentions])

    def shares(self, model: Any, press: kvpress.ScorerPress) -> tuple[float, float]:
        """The share of the number's entries that a press keeps, plain and weighted with the attention on them."""
        cache = DynamicCache()
        with press(model):
            model.model(self.context, past_key_values=cache)
        kept = torch.stack(
            [
                (one[:, :, None] - layer.values[0, :, None]).abs().amax(-1).amin(-1).lt(1e-4)
                for one, layer in zip(self.values, cache.layers, strict=True)
            ]
        ).float()
        return float(kept.mean()), float((kept * self.reading).sum() / self.reading.sum())


def _places(context: Sequence[int], number: Sequence[int]) -> list[int]:
    """Where the number stands in a context, which holds it once."""
    starts = [i for i in range(len(context)) if [*context[i : i + len(number)]] == [*number]]
    if len(starts) != 1:
        raise ValueError(f"the number stands {len(starts)} times in the context")
    return [*range(starts[0], starts[0] + len(number))]


def _reading(attention: torch.Tensor, places: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Attention ``(H, N, T)`` of the tokens before each digit on that digit's entry, summed by key-value head."""
    on_own = torch.stack([attention[:, step, place] for step, place in enumerate(places)], -1)
    return on_own.unflatten(0, (values.shape[0], -1)).sum(1)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama type whose tokenizer has a token per digit")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="max_seq_lengths of RULER")
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    _, docs = documents(str(args.model), args.documents, args.length)
    rows = []
    for query_aware in (False, True):
        needles = [Needle(model, tokenizer, document, query_aware) for document in docs]
        for name, press in PRESSES.items():
            shares = [one.shares(model, press(compression_ratio=args.ratio)) for one in needles]
            plain, read = (statistics.mean(column) for column in zip(*shares, strict=True))
            rows.append([name, str(query_aware).lower(), f"{plain:.0%}", f"{read:.0%}"])
            print("\t".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown_table(["press", "query_aware", "entries kept", "kept where the answer reads"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
