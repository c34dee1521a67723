"""Linear layers by oneDNN compute what PyTorch's own do, only where that is wanted, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from references import largest_difference
from torch import Tensor, nn

from lm_eval_kvpress import linear_layers
from lm_eval_kvpress.engine import PressableModel, prefill
from lm_eval_kvpress.linear_layers import linear, quick_forwards
from lm_eval_kvpress.scoring import Pack, score

TOLERANCE = 1e-5  # 40 products of normal numbers are rounded to 1e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that oneDNN multiplied by, on a machine that is made to prefer it."""
    if not linear_layers._operator_works():
        pytest.skip("this PyTorch has no oneDNN operator for linear layers")
    weights: list[Tensor] = []
    by_onednn = linear_layers._by_onednn

    def recorded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(weight)
        return by_onednn(hidden, weight, bias)

    monkeypatch.setattr(linear_layers, "_is_faster_here", lambda: True)
    monkeypatch.setattr(linear_layers, "_by_onednn", recorded)
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


@pytest.mark.parametrize(("shape", "goes_there"), [((4, 8, 512), True), ((33, 512), False), ((2, 64, 512), True)])
def test_code_is_generated_for_few_rows_and_for_large_products(
    calls: list[Tensor], shape: tuple[int, ...], goes_there: bool
) -> None:
    hidden, weight = torch.randn(shape), torch.randn(2_048, 512) / 16  # 128 rows of it are large
    product, expected = linear(hidden, weight, None), nn.functional.linear(hidden, weight)
    torch.testing.assert_close(product, expected, rtol=0, atol=TOLERANCE)
    assert len(calls) == goes_there


def test_every_linear_layer_of_a_scoring_run_goes_that_way_and_none_stays_changed(
    calls: list[Tensor], make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pressable()
    monkeypatch.setattr(linear_layers, "LARGE_PRODUCT", 0)
    tokens, packs = torch.arange(1, 31)[None], [Pack((31, 32), ((5, 6, 7), (8, 9)))]

    def scores() -> list[float]:
        [[one, other]] = score(model, prefill(model, tokens, None), packs)
        return [*one.logprobs, *other.logprobs]

    by_onednn = scores()
    used = {weight.data_ptr() for weight in calls}
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    assert used == {layer.weight.data_ptr() for layer in layers}
    assert not any("forward" in layer.__dict__ for layer in layers)
    monkeypatch.setattr(linear_layers, "_is_faster_here", lambda: False)
    num_calls = len(calls)
    assert largest_difference(by_onednn, scores()) < TOLERANCE
    assert len(calls) == num_calls


def test_a_layer_keeps_its_hooks_and_a_forward_that_somebody_else_put_there(calls: list[Tensor]) -> None:
    hooked, replaced, hidden = nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(2, 3)
    others = replaced.forward = lambda hidden: 7 * hidden
    with hooked.register_forward_hook(lambda layer, args, output: 2 * output), quick_forwards([hooked, replaced]):
        assert torch.allclose(hooked(hidden), 2 * nn.functional.linear(hidden, hooked.weight, hooked.bias))
        assert torch.equal(replaced(hidden), 7 * hidden)
        with quick_forwards([hooked]):
            hooked(hidden)
        assert "forward" in hooked.__dict__, "whoever lent it takes it back"
    assert len(calls) == 2
    assert "forward" not in hooked.__dict__ and replaced.__dict__["forward"] is others


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
    monkeypatch: pytest.MonkeyPatch, fault: type[Exception] | None
) -> None:
    def faulty(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if fault is not None:
            raise fault
        return nn.functional.linear(hidden, weight)  # the bias is lost

    monkeypatch.setattr(linear_layers, "_by_onednn", faulty)
    monkeypatch.setattr(linear_layers, "_processor_is_amd", lambda: True)
    assert not linear_layers._is_faster_here.__wrapped__()


@pytest.mark.parametrize(("vendor", "is_amd"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_maker_of_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, vendor: str, is_amd: bool
) -> None:
    file = tmp_path_factory.mktemp("proc") / "cpuinfo"
    monkeypatch.setattr(linear_layers, "Path", lambda _: file)
    monkeypatch.setattr("platform.processor", lambda: f"AMD64 Family 25 Model 17 Stepping 1, {vendor}")
    assert linear_layers._processor_is_amd() == is_amd, "elsewhere than on Linux"
    file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n", encoding="utf-8")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert linear_layers._processor_is_amd() == is_amd
