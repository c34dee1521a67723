"""Scores made tile by tile equal those of whole rows of logits, and no more than a tile is alive at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from references import largest_difference
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress.engine import online_softmax
from lm_eval_kvpress.engine.token_logprobs import token_scores
from lm_eval_kvpress.models.pressable import PressableModel

NUM_ROWS, NUM_TOKENS = 40, 150
TOLERANCE = 1e-5  # logits of up to 30 are rounded to 2e-6, in products of another order otherwise


def subject(model: PressableModel, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and tokens with their sources: at first each row's most likely token, then any."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, model.model.config.hidden_size, generator=generator).to(dtype)
    sources = torch.randint(NUM_ROWS, (NUM_TOKENS,), generator=generator)
    targets = torch.randint(model.num_logits, (NUM_TOKENS,), generator=generator)
    with torch.inference_mode():
        targets[:50] = model.logits(hidden).argmax(dim=-1)[sources[:50]]
    return hidden, sources, targets


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


@pytest.mark.parametrize("rows", [1, 7, 40, 2_048])
@pytest.mark.parametrize("num_bytes", [1, 700, 6_000, 2**23])
def test_tiles_of_any_size_equal_whole_rows_and_keep_within_their_bytes(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch, rows: int, num_bytes: int
) -> None:
    hidden, sources, targets = subject(model)
    logits = model.logits(hidden).double()
    expected = logits.log_softmax(dim=-1)[sources, targets]
    tiles, starts = list[tuple[int, int]](), list[int]()
    whole = PressableModel.logits

    def recorded(model: PressableModel, hidden: Tensor, start: int, end: int) -> Tensor:
        logits = whole(model, hidden, start, end)
        tiles.append(tuple(logits.shape))
        starts.append(start)
        return logits

    monkeypatch.setattr(online_softmax, "TILE_ROWS", rows)
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", num_bytes)
    monkeypatch.setattr(PressableModel, "logits", recorded)
    logprobs, greedy = token_scores(model, hidden, sources, targets)
    assert largest_difference(logprobs.tolist(), expected.tolist()) < TOLERANCE
    assert torch.equal(greedy, logits.argmax(dim=-1)[sources] == targets)
    assert all(greedy[:50]) and not all(greedy)
    assert sum(height * width for height, width in tiles) == NUM_ROWS * model.num_logits, "each logit is made once"
    assert all(4 * height * width <= max(num_bytes, 4 * height) for height, width in tiles)
    if 4 * 16 * min(rows, NUM_ROWS) <= num_bytes:
        assert not any(start % 16 for start in starts), "only the last tile may be of an odd width"


@pytest.mark.parametrize("num_bytes", [400, 3_000, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_maxima_the_first_is_greedy_in_whichever_tile_it_lies(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_bytes: int,
) -> None:
    model = make_pressable(dtype=dtype)
    weight = model.model.get_output_embeddings().weight
    with torch.inference_mode():
        weight.copy_((8 * weight).round())  # of whole numbers, products are exact in tiles of any width
        half = len(weight) // 2
        weight[1:half:2] = weight[0 : half - 1 : 2].clone()  # most maxima occur next to each other
        weight[half : 2 * half] = weight[:half].clone()  # and all of them far apart
        weight[2 * half :] = 0
        hidden, sources, targets = subject(model, dtype)
        hidden = (3 * hidden).round().to(dtype)
        logits = model.logits(hidden)
        targets[:50] = (logits.argmax(dim=-1)[sources[:50]] + half) % (2 * half)  # the later ones
        targets[50:100] = logits.argmax(dim=-1)[sources[50:100]]
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", num_bytes)
    _, greedy = token_scores(model, hidden, sources, targets)
    assert torch.equal(greedy, logits.argmax(dim=-1)[sources] == targets)
    tied = logits[sources, targets] == logits.amax(dim=-1)[sources]
    assert all(tied[:100]) and not any(greedy[:50]) and all(greedy[50:100])


def test_a_head_with_a_hook_is_run_on_fewer_whole_rows(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pressable()
    hidden, sources, targets = subject(model)
    plain, _ = token_scores(model, hidden, sources, targets)
    layer, num_rows = model.model.get_output_embeddings(), list[int]()
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", 4 * 7 * model.num_logits + 1)
    with layer.register_forward_hook(lambda *call: num_rows.append(len(call[2])) or 2 * call[2]):
        assert not model.head_can_be_cut
        doubled, _ = token_scores(model, hidden, sources, targets)
        assert num_rows == [7, 7, 7, 7, 7, 5]
        expected = model.logits(hidden).double().log_softmax(dim=-1)[sources, targets]
    assert largest_difference(doubled.tolist(), expected.tolist()) < TOLERANCE
    assert largest_difference(doubled.tolist(), plain.tolist()) > 0.1
    assert model.head_can_be_cut


def test_a_head_with_a_bias_is_cut_with_it(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pressable()
    layer = model.model.get_output_embeddings()
    layer.bias = nn.Parameter(torch.linspace(-3, 3, model.num_logits), requires_grad=False)
    hidden, sources, targets = subject(model)
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", 500)
    logprobs, _ = token_scores(model, hidden, sources, targets)
    expected = model.logits(hidden).double().log_softmax(dim=-1)[sources, targets]
    assert largest_difference(logprobs.tolist(), expected.tolist()) < TOLERANCE


def test_large_logits_lose_nothing_by_powers_of_two(model: PressableModel) -> None:
    """log2(e) is rounded to fp32 in a sum's terms: undone by any other number, logits of 150 were 2e-6 off."""
    hidden, sources, _ = subject(model)
    hidden *= 150 / model.logits(hidden).max()
    logits = model.logits(hidden)
    targets = logits.argmax(dim=-1)[sources]
    logprobs, _ = token_scores(model, hidden, sources, targets)
    expected = logits.double().log_softmax(dim=-1)[sources, targets]
    assert 100 < logits.max() < 200 and (logprobs.double() - expected).abs().max() < 3e-7


def test_a_part_of_the_vocabulary_may_be_impossible(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the whole of a row's first tiles."""
    model = make_pressable()
    layer = model.model.get_output_embeddings()
    layer.bias = nn.Parameter(torch.zeros(model.num_logits), requires_grad=False)
    layer.bias[:100] = -torch.inf
    hidden, sources, targets = subject(model)
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", 3_000)
    targets = targets.clamp(min=100)
    logprobs, _ = token_scores(model, hidden, sources, targets)
    expected = model.logits(hidden).double().log_softmax(dim=-1)[sources, targets]
    assert largest_difference(logprobs.tolist(), expected.tolist()) < TOLERANCE


def test_what_is_not_finite_stays_not_finite(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, sources, targets = subject(model)
    hidden[3, 5] = float("nan")
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", 3_000)
    logprobs, _ = token_scores(model, hidden, sources, targets)
    assert torch.equal(logprobs.isnan(), sources == 3)


def test_a_token_without_a_logit_is_refused(model: PressableModel) -> None:
    """It would go into no tile, and what memory held before would be its score."""
    hidden, sources, targets = subject(model)
    targets[20] = model.num_logits
    with pytest.raises(ValueError, match="token id 211 is beyond the 211 logits"):
        token_scores(model, hidden, sources, targets)
    nothing, _ = token_scores(model, hidden, sources[:0], targets[:0])
    assert nothing.shape == (0,)


class Packed(nn.Linear):
    """As quantised heads are: the weight has another shape than the matrix that it stands for."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = nn.Parameter(plain.weight.detach().reshape(1, -1), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.view(self.out_features, -1).T


def test_a_packed_head_is_run_whole(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    hidden, sources, targets = subject(model)
    expected, _ = token_scores(model, hidden, sources, targets)
    model.model.set_output_embeddings(Packed(model.model.get_output_embeddings()))
    found, _ = token_scores(model, hidden, sources, targets)
    assert not model.head_can_be_cut and largest_difference(found.tolist(), expected.tolist()) < TOLERANCE
