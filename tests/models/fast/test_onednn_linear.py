"""Linear layers by oneDNN compute what PyTorch's own do, only where that is wanted, and leave the model as it was."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress
from references import largest_difference
from torch import Tensor, nn

from lm_eval_kvpress.engine import online_softmax
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import Pack, score
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models.fast import onednn_linear
from lm_eval_kvpress.models.fast.onednn_linear import AMD_BOUNDS, NEVER, Bounds, linear, quick_forwards
from lm_eval_kvpress.models.pressable import PressableModel

TOLERANCE = 1e-5  # 40 products of normal numbers are rounded to 1e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that oneDNN multiplied by, on a machine that is made to prefer it."""
    if not (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")):
        pytest.skip("this PyTorch has no oneDNN for x86")
    assert onednn_linear._operator_works(), "the operator is gone or has changed: linear_layers must follow"
    weights: list[Tensor] = []
    by_onednn = onednn_linear._by_onednn

    def recorded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(weight)
        return by_onednn(hidden, weight, bias)

    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: AMD_BOUNDS["AVX512"])
    monkeypatch.setattr(onednn_linear, "_by_onednn", recorded)
    with torch.inference_mode():
        yield weights


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 40), (17, 40), (3, 5, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_of_any_shape_equal_pytorchs(calls: list[Tensor], shape: tuple[int, ...], has_bias: bool) -> None:
    hidden, weight = torch.randn(shape), torch.randn(90, 40)
    bias = torch.randn(90) if has_bias else None
    strided = torch.randn(*shape[:-1], 80)[..., ::2]
    for factors in [
        (hidden, weight, bias),
        (strided, weight, bias),
        (hidden, weight[7:30], bias if bias is None else bias[7:30]),
    ]:
        product, expected = linear(*factors), nn.functional.linear(*factors)
        assert product.shape == expected.shape
        torch.testing.assert_close(product, expected, rtol=0, atol=TOLERANCE)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("instructions", "rows", "width", "goes_there"),
    [
        ("AVX512", (4, 8), 2_048, True),
        ("AVX512", (33,), 2_048, False),
        ("AVX512", (2, 64), 2_048, True),
        ("AVX2", (4, 8), 2_048, True),
        ("AVX2", (2, 64), 2_048, False),
        ("AVX2", (2,), 2_047, False),
    ],
)
def test_code_is_generated_for_few_rows_and_for_large_products(
    calls: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    instructions: str,
    rows: tuple[int, ...],
    width: int,
    goes_there: bool,
) -> None:
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: AMD_BOUNDS[instructions])
    hidden, weight = torch.randn(*rows, 512), torch.randn(width, 512) / 16
    product, expected = linear(hidden, weight, None), nn.functional.linear(hidden, weight)
    torch.testing.assert_close(product, expected, rtol=0, atol=TOLERANCE)
    assert len(calls) == goes_there


@pytest.mark.parametrize("num_bytes", [2**22, 1_000])
def test_every_linear_layer_of_a_scoring_run_goes_that_way_and_none_stays_changed(
    calls: list[Tensor],
    make_pressable: Callable[..., PressableModel],
    monkeypatch: pytest.MonkeyPatch,
    num_bytes: int,
) -> None:
    model = make_pressable()
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: Bounds(weight=0, product=0))
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", num_bytes)
    tokens, packs = torch.arange(1, 31)[None], [Pack((31, 32), ((5, 6, 7), (8, 9)))]

    def scores() -> list[float]:
        [[one, other]] = score(model, prefill(model, tokens, None), packs)
        return [*one.logprobs, *other.logprobs]

    by_onednn = scores()
    used = {weight.untyped_storage().data_ptr() for weight in calls}
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    assert used == {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert sum(weight.numel() for weight in calls) == (
        2 * sum(layer.weight.numel() for layer in layers) - model.model.get_output_embeddings().weight.numel()
    ), "the prefill has no head"
    assert not any("forward" in layer.__dict__ for layer in layers)
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: NEVER)
    num_calls = len(calls)
    assert largest_difference(by_onednn, scores()) < TOLERANCE
    assert len(calls) == num_calls


def test_a_layer_keeps_its_hooks_and_a_forward_that_somebody_else_put_there(calls: list[Tensor]) -> None:
    hooked, replaced, hidden = nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3)
    others = replaced.forward = lambda hidden: 7 * hidden
    with hooked.register_forward_hook(lambda layer, args, output: 2 * output), quick_forwards([hooked, replaced]):
        assert torch.allclose(hooked(hidden), 2 * nn.functional.linear(hidden, hooked.weight, hooked.bias), atol=1e-6)
        assert torch.equal(replaced(hidden), 7 * hidden)
        with quick_forwards([hooked]):
            hooked(hidden)
        assert "forward" in hooked.__dict__, "whoever lent it takes it back"
    assert len(calls) == 2
    assert "forward" not in hooked.__dict__ and replaced.__dict__["forward"] is others


def test_a_weight_that_a_hook_puts_there_is_the_one_that_counts(calls: list[Tensor]) -> None:
    """As ``torch.nn.utils.prune`` and ``weight_norm`` do."""
    layer, other, hidden = nn.Linear(3, 4, bias=False), nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3)
    with layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", other)), quick_forwards([layer]):
        assert torch.allclose(layer(hidden), hidden @ other.T, atol=1e-6)
    assert len(calls) == 1


def test_weights_that_multiply_in_a_way_of_their_own_are_left_alone(calls: list[Tensor]) -> None:
    class Doubling(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(function, types, args, kwargs or {})
            return 2 * result.as_subclass(Tensor) if function is nn.functional.linear else result

    layer, hidden = nn.Linear(3, 4, bias=False), torch.randn(2, 3)
    expected = 2 * (hidden @ layer.weight.T)
    layer.weight = nn.Parameter(layer.weight.as_subclass(Doubling))
    with quick_forwards([layer]):
        assert torch.allclose(layer(hidden), expected, atol=1e-6)
    assert not calls


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_prefill_multiplies_as_one_of_its_own(
    calls: list[Tensor],
    make_pressable_llama: Callable[..., PressableModel],
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
) -> None:
    """Else a sweep could keep other entries than a single run, where scores are nearly tied."""
    monkeypatch.setattr(onednn_linear, "bounds_here", lambda: Bounds(weight=0, product=0))
    model, context = make_pressable_llama(), tuple(range(1, 31))
    press = SnapKVPress(0.5, window_size=4)
    if shared:
        prefills = SharedPrefills(model)
        prefills.run([context], for_cache_only=True)
        prefills.compress([context], press)
    else:
        prefill(model, torch.tensor([context]), press, for_cache_only=True)
    queries = [attention.q_proj.weight.data_ptr() for attention in model.attentions]
    assert [sum(weight.data_ptr() == query for weight in calls) for query in queries] == [2, 2, 2], "layer and press"


def test_an_exception_leaves_no_forward_behind(calls: list[Tensor]) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(RuntimeError), quick_forwards([layer]):
        layer(torch.randn(2, 5))
    assert "forward" not in layer.__dict__


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # `flags` sets that too
def test_gradients_autocast_other_dtypes_and_a_disabled_onednn_go_pytorchs_way(calls: list[Tensor]) -> None:
    hidden, layer = torch.randn(2, 3), nn.Linear(3, 4)

    def both(hidden: Tensor, layer: nn.Linear) -> None:
        linear(hidden, layer.weight, layer.bias)
        with quick_forwards([layer]):
            layer(hidden)

    with torch.inference_mode(False), torch.enable_grad():
        both(torch.randn(2, 3), layer)
    with torch.autocast("cpu", torch.bfloat16):
        both(hidden, layer)
    with torch.backends.mkldnn.flags(enabled=False):
        both(hidden, layer)
    both(hidden.bfloat16(), nn.Linear(3, 4, dtype=torch.bfloat16))
    assert not calls
    both(hidden, layer)
    assert len(calls) == 2


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, TypeError, None])
def test_an_operator_that_is_absent_or_wrong_is_not_used(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch, fault: type[Exception] | None
) -> None:
    def faulty(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if fault is not None:
            raise fault
        return nn.functional.linear(hidden, weight)  # the bias is lost

    assert onednn_linear._operator_works()
    monkeypatch.setattr(onednn_linear, "_by_onednn", faulty)
    assert not onednn_linear._operator_works()


@pytest.mark.parametrize(
    ("changed", "bounds"),
    [
        ({}, AMD_BOUNDS["AVX512"]),
        ({"capability": "AVX2"}, AMD_BOUNDS["AVX2"]),
        ({"capability": "DEFAULT"}, NEVER),
        ({"processor": "GenuineIntel"}, NEVER),
        ({"works": False}, NEVER),
        ({"mkl": False}, NEVER),
    ],
)
def test_a_known_processor_and_a_working_operator_decide(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], bounds: Bounds
) -> None:
    here = {"capability": "AVX512", "processor": "AuthenticAMD", "works": True, "mkl": True, **changed}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here["capability"])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: here["mkl"])
    monkeypatch.setattr(onednn_linear, "_processor", lambda: f"vendor_id\t: {here['processor']}")
    monkeypatch.setattr(onednn_linear, "_operator_works", lambda: here["works"])
    assert onednn_linear.bounds_here.__wrapped__() == bounds


def test_without_a_list_of_processors_their_name_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "Path", lambda _: Path("/no/such/file"))
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    assert "AuthenticAMD" in onednn_linear._processor()
