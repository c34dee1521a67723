"""The Prometheus endpoint: off unless asked for, on loopback only, its figures those of the records."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress

pytest.importorskip("prometheus_client", reason="needs the extra 'metrics'")

from prometheus_client.parser import text_string_to_metric_families

from lm_eval_kvpress.records.prometheus import MetricsServer


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name.removeprefix("lm_eval_kvpress_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_served_is_what_the_summary_says(
    checkpoint_dir: Path, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", press="knorm", metrics_port=free_port)
    assert f"live figures at http://127.0.0.1:{free_port}/metrics" in caplog.text
    context = "the cold river ran past an old mill " * 10
    lm.loglikelihood([Instance("loglikelihood", {}, (context, " geese"), 0, ("t", 0, 1))], disable_tqdm=True)
    lm.generate_until(
        [Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 5}), 0, ("g", 0, 1))], disable_tqdm=True
    )
    figures, summary = scraped(free_port), lm.describe()["throughput"]
    for phase in ("prefill", "press", "score", "decode"):
        assert figures["phase_seconds_total", phase, "knorm"] == pytest.approx(summary[phase]["seconds"])
    for phase in ("prefill", "score", "decode"):
        assert figures["tokens_total", phase, "knorm"] == summary[phase]["num_tokens"]
    assert figures["requests_total", "generate_until"] == 1
    assert figures["time_to_first_token_seconds_count",] == 1
    assert figures["time_to_first_token_seconds_sum",] == pytest.approx(summary["ttft_sec"]["p50"])
    assert figures["kv_bytes", "allocated"] < figures["kv_bytes", "before"]
    with pytest.raises(UsageError, match=f"metrics_port={free_port} cannot be opened"):
        KVPress(pretrained=str(checkpoint_dir), device="cpu", metrics_port=free_port)


def test_it_listens_on_loopback_alone() -> None:
    server = MetricsServer(0)
    assert server._server.server_address[0] == "127.0.0.1"
    server.close()


def test_it_is_off_by_default(checkpoint_dir: Path) -> None:
    assert KVPress(pretrained=str(checkpoint_dir), device="cpu").session.settings.metrics_port is None


@pytest.mark.parametrize("port", [0, -1, 65_536, "http", True])
def test_a_wrong_port_is_one_line(checkpoint_dir: Path, port: object) -> None:
    with pytest.raises(UsageError, match="metrics_port"):
        KVPress(pretrained=str(checkpoint_dir), metrics_port=port)
