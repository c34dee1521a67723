"""``kv_quant`` changes answers and bytes, nothing changes with batches, and what cannot be packed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import text
from references import largest_difference

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress

CHOICES = (" geese", " the small river", " an old house by the sea")


def answered(folder: Path, **arguments: Any) -> tuple[list[float], list[str], dict[str, Any]]:
    """Scores, texts and the record. In float64, since an entry may lie between two codes."""
    lm = KVPress(
        pretrained=str(folder), device="cpu", dtype="float64", rolling_context=80, rolling_score=30, **arguments
    )
    choices = [
        Instance("loglikelihood", {}, (text(index, 70 + 7 * (index % 3)), choice), number, ("t", index, 1))
        for index in range(4)
        for number, choice in enumerate(CHOICES)
    ]
    documents = [Instance("loglikelihood_rolling", {}, (text(index, 130),), 0, ("r", index, 1)) for index in range(2)]
    until = {"until": [], "max_gen_toks": 6, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text(9 + i, 60 + 9 * i), until), 0, ("g", i, 1)) for i in range(3)]
    scores = [score for score, _ in lm.loglikelihood(choices, disable_tqdm=True)]
    scores += lm.loglikelihood_rolling(documents, disable_tqdm=True)
    return scores, lm.generate_until(prompts, disable_tqdm=True), lm.describe()


@pytest.mark.parametrize("press", [{}, {"press": "knorm"}, {"press": "adakv:snapkv", "window_size": 8}], ids=str)
def test_answers_and_bytes_change_and_do_not_depend_on_batches(checkpoint_dir: Path, press: dict[str, Any]) -> None:
    plain, _, full = answered(checkpoint_dir, **press)
    scores, texts, record = answered(checkpoint_dir, kv_quant="int4", **press)
    others, other_texts, other = answered(checkpoint_dir, kv_quant="int4", batch_size=4, **press)
    assert largest_difference(scores, plain) > 1e-4
    assert largest_difference(scores, others) < 1e-6 and texts == other_texts
    assert (full["quantization"], record["quantization"]["kv_quant"]) == (None, "int4")
    for task in ("t", "r", "g"):
        assert record["tasks"][task]["contexts_pressed"] == other["tasks"][task]["contexts_pressed"]
        kind = "contexts_pressed" if press else "contexts_unpressed"
        one, packed = (facts["tasks"][task][kind] for facts in (full, record))
        assert one["kv_bytes_allocated"] == one["kv_bytes_unpacked"] == packed["kv_bytes_unpacked"]
        assert packed["kv_bytes_allocated"] < 0.25 * packed["kv_bytes_unpacked"]
        assert packed["kept_share"] == one["kept_share"]
        share = packed["kv_bytes_effective"] / one["kv_bytes_effective"]
        assert share == pytest.approx(packed["kv_bytes_allocated"] / one["kv_bytes_allocated"], rel=1e-2)


def test_fewer_bits_are_further_from_the_full_cache(checkpoint_dir: Path) -> None:
    found = [answered(checkpoint_dir, kv_quant=name, fidelity=True)[2] for name in ("int8", "int4", "int2")]
    divergences = [record["tasks"]["t"]["fidelity"]["kl_mean"] for record in found]
    assert 0 < divergences[0] < divergences[1] < divergences[2]


def test_answers_of_packed_caches_are_kept_apart(checkpoint_dir: Path) -> None:
    one, other = (
        KVPress(pretrained=str(checkpoint_dir), device="cpu", kv_quant=name)._identity() for name in ("int4", "int8")
    )
    assert {key for key in one if one[key] != other[key]} == {"quantization"}


OF_ENTRIES = {"kv_layout": "token", "kv_group": 16}


@pytest.mark.parametrize("packing", [{"kv_quant": "int4", **OF_ENTRIES}, {"kv_quant": "fp8"}], ids=str)
def test_streams_hold_packed_entries_and_do_not_depend_on_batches(
    checkpoint_dir: Path, packing: dict[str, Any]
) -> None:
    documents = [Instance("loglikelihood_rolling", {}, (text(i, 90 + 9 * i),), 0, ("s", i, 1)) for i in range(3)]

    def streamed(batch_size: int, **arguments: Any) -> tuple[list[float], int]:
        protocol = {"rolling": "stream", "press": "knorm", "stream_budget": 40, "stream_chunk": 16}
        model = {"pretrained": str(checkpoint_dir), "device": "cpu", "dtype": "float64"}
        lm = KVPress(batch_size=batch_size, **model, **protocol, **arguments)
        found = lm.loglikelihood_rolling(documents, disable_tqdm=True)
        return found, lm.describe()["tasks"]["s"]["max_stream_bytes"]

    (plain, num_bytes), (one, num_packed), (other, _) = streamed(1), streamed(1, **packing), streamed(3, **packing)
    assert largest_difference(one, plain) > 1e-3
    assert largest_difference(one, other) < 1e-6
    assert num_packed < 0.15 * num_bytes, "after a chunk all that is held is packed"


@pytest.mark.parametrize("packing", [{"kv_quant": "int4", **OF_ENTRIES}, {"kv_quant": "fp8"}], ids=str)
def test_presses_that_act_while_text_is_generated_evict_packed_entries(
    checkpoint_dir: Path, packing: dict[str, Any]
) -> None:
    press = {"press": "prefill_decoding:snapkv+knorm", "window_size": 8, "target_size": 24, "compression_interval": 4}
    plain, _, _ = answered(checkpoint_dir, **press)
    scores, texts, record = answered(checkpoint_dir, **packing, **press)
    others, other_texts, _ = answered(checkpoint_dir, batch_size=4, **packing, **press)
    assert largest_difference(scores, plain) > 1e-4
    assert largest_difference(scores, others) < 1e-6 and texts == other_texts
    assert record["tasks"]["g"]["num_decode_compressions"] == 3


def test_groups_of_several_entries_are_refused_where_single_ones_are_evicted(checkpoint_dir: Path) -> None:
    for protocol in (
        {"press": "decoding:knorm", "target_size": 24},
        {"press": "knorm", "rolling": "stream", "stream_budget": 40, "stream_chunk": 16},
    ):
        with pytest.raises(UsageError, match="does not divide a head's 16 dims.*use one of 8, 16$"):
            KVPress(pretrained=str(checkpoint_dir), kv_quant="int4", kv_layout="token", kv_group=64, **protocol)


def test_none_is_full_precision_however_it_is_read() -> None:
    for value in (None, "none"):
        assert parse_arguments({"kv_quant": value, "kv_group": 32})[0].quantization is None
    found = parse_arguments({"kv_quant": "int2", "kv_group": "32", "kv_layout": "token"})[0].quantization
    assert found is not None and (found.bits, found.group, found.layout) == (2, 32, "token")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kv_quant": "int3"}, "choose one of none, int8, int4, int2, fp8"),
        ({"kv_quant": "int4", "kv_group": 12}, "multiple of 8"),
        ({"kv_quant": "int4", "kv_group": 0}, "at least 8"),
        ({"kv_quant": "int4", "kv_layout": "channel"}, "choose one of kivi, token"),
        ({"kv_group": 32}, "add kv_quant"),
        ({"kv_quant": "int4", "rolling": "stream", "press": "knorm", "stream_budget": 64}, "add kv_layout=token"),
        ({"kv_quant": "int4", "press": "decoding:knorm", "target_size": 64}, "add kv_layout=token"),
        ({"kv_quant": "fp8", "press": "cam:knorm", "target_size": 64, "merge_budget": 4}, "changes values"),
        ({"kv_quant": "fp8", "press": "decoding:knorm", "target_size": 64, "kv_residual": 8}, "use kv_residual=0"),
        ({"kv_quant": "int4", "press": "knorm", "kv_residual": 8}, "use kv_residual=0"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_arguments(arguments)
    assert "\n" not in str(caught.value)
