"""Prefill: the cache holds what the press kept and nothing else; batches and padding change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import kvpress
import pytest
import torch
from references import MASKS, PRESSES, REROTATES, distinct_tokens, kept_by_press, largest_difference, press_run
from torch import Tensor, nn
from transformers.models.gpt_neox import modeling_gpt_neox

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, stack
from lm_eval_kvpress.engine import scoring
from lm_eval_kvpress.engine.prefill import prefill, prefill_padded
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

MakePressable = Callable[..., PressableModel]
TOLERANCE = 2e-5

# What else kvpress can run on GPTNeoX under sdpa, for the independence of rows.
MORE_PRESSES: dict[str, Callable[[], Any]] = {
    "keydiff": lambda: kvpress.KeyDiffPress(0.5),
    "lagkv": lambda: kvpress.LagKVPress(0.5, lag_size=8),
    "non_causal_attention": lambda: kvpress.NonCausalAttnPress(0.5, chunk_size=16),
    "cur": lambda: kvpress.CURPress(0.5),
    "think": lambda: kvpress.ThinKPress(0.5, window_size=8),
    "cap": lambda: kvpress.CapPress(0.5),
    "key_rerotation:snapkv": lambda: kvpress.KeyRerotationPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "adakv:knorm": lambda: kvpress.AdaKVPress(kvpress.KnormPress(0.5)),
    "criticalkv:snapkv": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "merging:snapkv": lambda: kvpress.MergingPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "chunk:knorm": lambda: kvpress.ChunkPress(kvpress.KnormPress(0.5), chunk_length=16),
    "block:keydiff": lambda: kvpress.BlockPress(kvpress.KeyDiffPress(0.5), block_size=16),
    "composed": lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.SnapKVPress(0.3, window_size=4)]),
    "per_layer:knorm": lambda: kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.2, 0.5, 0.7]),
}
MIXES_ROWS: dict[str, Callable[[], Any]] = {
    "random": lambda: kvpress.RandomPress(0.5, seed=1),
    "compactor": lambda: kvpress.CompactorPress(0.5, sink_size_start=2, sink_size_end=2, chunk_size=16),
    "chunkkv:snapkv": lambda: kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5, window_size=8), chunk_length=4),
    "entropy_chunkkv:snapkv": lambda: kvpress.EntropyGatedChunkKVPress(kvpress.SnapKVPress(0.5, window_size=8)),
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, make_pressable: MakePressable) -> PressableModel:
    return make_pressable(request.param)


@pytest.fixture(scope="module")
def sdpa_model(make_pressable: MakePressable) -> PressableModel:
    return make_pressable("sdpa")


def skip_refused(model: PressableModel, name: str) -> None:
    if name in MASKS and model.model.config._attn_implementation == "eager":
        pytest.skip("kvpress refuses to mask heads under eager attention")


def prefilled(model: PressableModel, contexts: list[list[int]], name: str) -> CompressedCache:
    return prefill(model, torch.tensor(contexts), PRESSES[name](), rerotates=name in REROTATES)


def contexts_of(length: int, count: int = 4) -> list[list[int]]:
    return [distinct_tokens(length, 211, seed) for seed in range(count)]


def probe(model: PressableModel, cache: CompressedCache) -> list[float]:
    """Scores of the same continuation over each row: a fingerprint of what the row attends to."""
    packs = [Pack((5,), ((7, 9, 11),))] * len(cache.num_seen)
    return [value for row in scoring.score(model, cache, packs) for branch in row for value in branch.logprobs]


def evicted_by_engine(found: LayerKV, full: Tensor) -> Tensor:
    """``(B, H, T)``, from the kept values of a layer and all of them; values no press here changes."""
    if found.hidden is not None:
        return found.hidden
    return ~(full[:, :, :, None] == found.values[:, :, None]).all(dim=-1).any(dim=-1)


# ---------------------------------------------------------------------------------------------- one prefill


@pytest.mark.parametrize("name", PRESSES)
def test_the_cache_holds_what_the_press_kept(model: PressableModel, name: str) -> None:
    skip_refused(model, name)
    (context,) = contexts_of(45, 1)
    cache = prefilled(model, [context], name)
    expected = kept_by_press(model, context, name)
    full = press_run(model, context, None)
    for index, (found, whole) in enumerate(zip(cache.layers, full.layers, strict=True)):
        assert torch.equal(evicted_by_engine(found, whole.values)[0], expected.hidden[index])
    assert cache.kept() == [(~expected.hidden).sum(2).float().mean(1).tolist()]
    assert (cache.num_seen, cache.next_position) == ((45,), (expected.next_position,))


def test_streaming_llm_keeps_the_sinks_and_the_last_tokens(model: PressableModel) -> None:
    (context,) = contexts_of(45, 1)
    evicted = kept_by_press(model, context, "streaming_llm").hidden
    kept = [place for place in range(45) if not evicted[0, 0, place]]
    assert kept == [0, 1, 2, 3, *range(45 - 22 + 4, 45)]
    assert (evicted == evicted[0, 0]).all()


def test_pyramid_lengths_differ_by_layer(model: PressableModel) -> None:
    """The tests below show nothing of masks by layer if they do not."""
    cache = prefilled(model, contexts_of(45, 1), "pyramidkv")
    assert len({found.num_entries for found in cache.layers}) == 3


@pytest.mark.parametrize("name", PRESSES)
def test_the_last_hidden_state_is_that_of_the_full_cache(model: PressableModel, name: str) -> None:
    skip_refused(model, name)
    contexts = contexts_of(45, 2)
    cache = prefilled(model, contexts, name)
    assert cache.last_hidden is not None
    with torch.no_grad():
        expected = model.model(torch.tensor(contexts)).logits[:, -1]
        torch.testing.assert_close(model.logits(cache.last_hidden), expected, atol=TOLERANCE, rtol=0)


def test_a_cache_keeps_no_more_hidden_states_alive_than_the_last(model: PressableModel) -> None:
    cache = prefilled(model, contexts_of(45, 2), "knorm")
    assert cache.last_hidden is not None
    num_bytes = cache.last_hidden.untyped_storage().nbytes()
    assert num_bytes == 2 * 64 * 4, "the storage of a slice is that of the whole prefill"


def test_a_failed_prefill_changes_no_later_score(sdpa_model: PressableModel) -> None:
    """Entries that a masking press marked before it failed must not be faked in other caches."""

    class Stumbles(kvpress.AdaKVPress):
        def compress(self, module: nn.Module, *args: Any) -> Any:
            if module.layer_idx == 1:
                raise RuntimeError("stumbled")
            return super().compress(module, *args)

    cache = prefilled(sdpa_model, contexts_of(45, 1), "none")
    before = probe(sdpa_model, cache)
    with pytest.raises(RuntimeError, match="stumbled"):
        prefill(sdpa_model, torch.tensor(contexts_of(30, 1)), Stumbles(kvpress.KnormPress(0.5)))
    assert probe(sdpa_model, cache) == before


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", [*PRESSES, *MORE_PRESSES])
def test_a_batched_prefill_equals_single_ones(sdpa_model: PressableModel, name: str) -> None:
    if name == "random":
        pytest.skip("draws for the whole batch: see test_presses_that_mix_rows")
    build = {**PRESSES, **MORE_PRESSES}[name]
    contexts, rerotates = contexts_of(45), name.startswith("key_rerotation")

    def run(rows: list[list[int]]) -> CompressedCache:
        return prefill(sdpa_model, torch.tensor(rows), build(), rerotates=rerotates)

    single = [value for context in contexts for value in probe(sdpa_model, run([context]))]
    assert largest_difference(probe(sdpa_model, run(contexts)), single) < TOLERANCE


@pytest.mark.parametrize("name", MIXES_ROWS)
def test_presses_that_mix_rows(sdpa_model: PressableModel, name: str) -> None:
    """These must be prefilled one context at a time; a press that leaves this list may be batched."""
    contexts = contexts_of(45)

    def run(rows: list[list[int]]) -> CompressedCache:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return prefill(sdpa_model, torch.tensor(rows), MIXES_ROWS[name]())

    single = [value for context in contexts for value in probe(sdpa_model, run([context]))]
    assert largest_difference(probe(sdpa_model, run(contexts)), single) > 1e-2


@pytest.mark.parametrize("name", PRESSES)
def test_a_ragged_stack_equals_its_rows(model: PressableModel, name: str) -> None:
    skip_refused(model, name)
    caches = [prefilled(model, contexts_of(length, 1), name) for length in (45, 24, 60, 24)]
    stacked = stack(caches)
    assert stacked.kept() == [cache.kept()[0] for cache in caches]
    alone = [value for cache in caches for value in probe(model, cache)]
    assert largest_difference(probe(model, stacked), alone) < TOLERANCE
    picked = probe(model, stacked.select([2, 0]))
    assert largest_difference(picked, probe(model, caches[2]) + probe(model, caches[0])) < TOLERANCE


def test_presses_and_plain_contexts_stack_into_one_batch(model: PressableModel) -> None:
    names = [name for name in PRESSES if name not in MASKS or model.model.config._attn_implementation == "sdpa"]
    caches = [prefilled(model, contexts_of(30 + index, 1), name) for index, name in enumerate(names)]
    caches.append(model.empty_cache(1))
    alone = [value for cache in caches for value in probe(model, cache)]
    assert largest_difference(probe(model, stack(caches)), alone) < TOLERANCE


@pytest.mark.parametrize(
    "lengths, side_by_side",
    [
        ((45,), None),
        ((45, 45), None),
        ((45, 1, 24, 60), None),
        ((45, 1, 24, 60), ([0, 1], [2], [3])),
        ((45, 45), ([0], [1])),
        ((60, 60, 24), ([0, 1], [2])),
    ],
    ids=str,
)
def test_a_padded_prefill_equals_single_ones(
    model: PressableModel, lengths: tuple[int, ...], side_by_side: Sequence[list[int]] | None
) -> None:
    contexts = [distinct_tokens(length, 211, length) for length in lengths]
    padded = prefill_padded(model, contexts, side_by_side=side_by_side)
    assert all((layer.hidden is None) == (len(set(lengths)) == 1) for layer in padded.layers)
    singles = [prefilled(model, [context], "none") for context in contexts]
    assert padded.kept() == [[float(length)] * 3 for length in lengths]
    assert padded.num_seen == padded.next_position == lengths
    assert largest_difference(probe(model, padded), [v for one in singles for v in probe(model, one)]) < TOLERANCE
    assert padded.last_hidden is not None
    expected = torch.cat([one.last_hidden for one in singles if one.last_hidden is not None])
    torch.testing.assert_close(padded.last_hidden, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_stays_near_full_precision(make_pressable: MakePressable, attn: str, dtype: torch.dtype) -> None:
    """In 16 bit a mask's lowest number plus a score can overflow: ragged, padded and head-wise batches stay finite."""
    figures = {}
    for kind in (torch.float32, dtype):
        model = make_pressable(attn, dtype=kind)
        plain = prefill_padded(model, contexts_of(20, 1) + contexts_of(33, 1))
        pressed = prefilled(model, contexts_of(45, 2), "streaming_llm")
        rows = [plain, pressed, model.empty_cache(1)]
        if attn == "sdpa":
            rows.append(prefilled(model, contexts_of(40, 1), "adakv:snapkv"))
        figures[kind] = probe(model, stack(rows))
    assert all(math.isfinite(value) for value in figures[dtype])
    same_entries = 15  # AdaKV may keep others in 16 bit
    assert largest_difference(figures[dtype][:same_entries], figures[torch.float32][:same_entries]) < 0.5


# ---------------------------------------------------------------------------------------------- for the cache only


@pytest.mark.parametrize("press", ["none", "snapkv", "adakv:knorm", "per_layer:knorm"])
@pytest.mark.parametrize("reads_outputs", [True, False])
def test_a_prefill_for_the_cache_only_makes_the_same_cache(
    make_pressable: MakePressable, make_pressable_llama: MakePressable, press: str, reads_outputs: bool
) -> None:
    arguments = {"snapkv": {"window_size": 8}, "per_layer:knorm": {"compression_ratios": [0.2, 0.5, 0.7]}}
    spec = parse_press(press, arguments.get(press, {}))
    for model in (make_pressable(), make_pressable_llama()):
        tokens = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(3))
        whole = prefill(model, tokens, spec.build(40))
        lean = prefill(model, tokens, spec.build(40), for_cache_only=True, reads_outputs=reads_outputs)
        assert lean.last_hidden is None
        assert not any("forward" in module.__dict__ for module in (model.last_feed_forward, *model.attentions))
        assert (lean.num_seen, lean.next_position, lean.kept()) == (whole.num_seen, whole.next_position, whole.kept())
        for one, other in zip(lean.layers, whole.layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        padded = prefill_padded(model, [[1, 2, 3], [4, 5, 6, 7]], for_cache_only=True)
        for one, other in zip(padded.layers, prefill_padded(model, [[1, 2, 3], [4, 5, 6, 7]]).layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(prefill(model, tokens, None).last_hidden, whole.last_hidden), "nothing is left behind"


@pytest.mark.parametrize("press", [None, kvpress.KnormPress(0.5)])
def test_a_prefill_for_the_cache_ends_at_the_last_keys_unless_a_press_reads_more(
    make_pressable: MakePressable, press: Any
) -> None:
    model, calls = make_pressable(), list[str]()
    tokens = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(3))
    last = model.attentions[-1]
    with (
        last.query_key_value.register_forward_hook(lambda *_: calls.append("keys")),
        last.dense.register_forward_hook(lambda *_: calls.append("attention")),
        model.last_feed_forward.dense_4h_to_h.register_forward_hook(lambda *_: calls.append("feed-forward")),
    ):
        prefill_padded(model, tokens.tolist(), for_cache_only=True)
        prefill(model, tokens, press, for_cache_only=True, reads_outputs=False)
        assert calls == ["keys", "keys"]
        prefill(model, tokens, press, for_cache_only=True)
        assert calls[2:] == (["keys"] if press is None else ["keys", "attention"])
        calls.clear()
        prefill(model, tokens, press)
    assert sorted(calls) == ["attention", "feed-forward", "keys"]


def test_a_prefill_that_ends_early_is_quick_to_its_end(
    make_pressable: MakePressable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_pressable(), torch.tensor(contexts_of(45, 2))
    monkeypatch.setattr(modeling_gpt_neox, "apply_rotary_pos_emb", None)
    prefill(model, tokens, kvpress.KnormPress(0.5), for_cache_only=True, reads_outputs=False)


def test_under_eager_attention_every_layer_gives_its_weights(make_pressable: MakePressable) -> None:
    """TOVA and SnapKV score from weights where they are given, and from their own otherwise: in every layer alike."""
    weights: list[Any] = []

    class Looks(kvpress.TOVAPress):
        def score(self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
            weights.append(attentions)
            return super().score(module, hidden, keys, values, attentions, kwargs)

    model, tokens = make_pressable("eager"), torch.tensor(contexts_of(45, 2))
    prefill(model, tokens, Looks(0.5), for_cache_only=True, reads_outputs=False)
    assert [tuple(given.shape) for given in weights] == [(2, 4, 45, 45)] * 3


def test_a_press_that_reads_outputs_is_given_them(make_pressable: MakePressable) -> None:
    outputs: list[Any] = []

    class Reads(kvpress.KnormPress):
        def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
            outputs.append(output[0])
            return super().forward_hook(module, input, kwargs, output)

    model, tokens = make_pressable(), torch.tensor(contexts_of(45, 2))
    prefill(model, tokens, Reads(0.5), for_cache_only=True)
    assert [tuple(output.shape) for output in outputs] == [(2, 45, 64)] * 3
