"""Names of kvpress's own evaluation run here, or say why not."""

from __future__ import annotations

import kvpress
import pytest

from lm_eval_kvpress.presses.names import resolve_alias
from lm_eval_kvpress.presses.parse import parse_press

# The keys of ``PRESS_REGISTRY`` in kvpress's ``evaluation/evaluate_registry.py``: those that run, those that run with a
# file, and the others.
EVALUATED = (
    *("adakv_snapkv", "block_keydiff", "chunkkv", "critical_adakv_expected_attention", "critical_adakv_snapkv"),
    *("critical_expected_attention", "critical_snapkv", "cur", "expected_attention", "keydiff", "lagkv", "knorm"),
    *("observed_attention", "pyramidkv", "random", "snap_think", "snapkv", "streaming_llm", "think", "tova"),
    *("compactor", "adakv_compactor", "no_press", "merging_knorm", "merging_snapkv", "merging_expected_attention"),
    *("kvcompose", "kvcompose_unstructured", "kvzip", "kvzip_plus", "finch"),
)
NEED_STATISTICS = (
    *("duo_attention", "duo_attention_on_the_fly", "kvzap_linear", "kvzap_mlp", "kvzap_mlp_head", "kvzap_mlp_layer"),
    *("lukv", "merging_kvzap_mlp", "qfilter"),
)
NOT_HERE = (
    *("fastkvzip", "RestoreKV", "RestoreKV_plus", "cam_streaming_llm", "cam_knorm", "cam_adakv_snapkv", "cam_tova"),
    *("decoding_knorm", "decoding_streaming_llm", "decoding_tova", "decoding_qfilter"),
    *("decoding_adakv_expected_attention_e2", "decoding_adakv_snapkv", "decoding_keydiff"),
)


@pytest.mark.parametrize("name", EVALUATED)
def test_names_of_kvpress_evaluation_run(name: str) -> None:
    spec = parse_press(name)
    assert spec.is_none or isinstance(spec.for_question(9).build(400), kvpress.BasePress)


@pytest.mark.parametrize("name", NEED_STATISTICS)
def test_names_of_kvpress_evaluation_that_need_statistics_say_which_command_takes_them(name: str) -> None:
    given = {"threshold": 0.1} if resolve_alias(name)[0].startswith("dms:") else {}
    with pytest.raises(ValueError, match=r"needs statistics=FILE.safetensors: lm-eval-kvpress calibrate \w+") as caught:
        parse_press(name, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NOT_HERE)
def test_names_of_kvpress_evaluation_that_cannot_run_say_why(name: str) -> None:
    with pytest.raises(ValueError, match="not supported: it ") as caught:
        parse_press(name)
    assert "\n" not in str(caught.value)


def test_aliases_bring_their_own_defaults() -> None:
    assert parse_press("merging_expected_attention").arguments["epsilon"] == 0.01
    assert parse_press("merging_expected_attention", {"epsilon": 0.5}).arguments["epsilon"] == 0.5
    assert parse_press("critical_expected_attention").arguments["use_vnorm"] is False
    assert parse_press("expected_attention").arguments["use_vnorm"] is True
    assert parse_press("chunkkv").name == "chunkkv:snapkv"
