"""A run's throughput for Prometheus, as it goes: the OpenMetrics text format over HTTP, on this machine only.

Knows prometheus-client, which the extra ``metrics`` installs. Names follow its conventions: base units, ``_total`` for
what only grows.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord

LOOPBACK = "127.0.0.1"
PREFIX = "lm_eval_kvpress"
TTFT_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TPOT_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class MetricsServer:
    """Serves what it is handed at ``http://127.0.0.1:PORT/metrics`` until it is closed.

    Args:
        port: 0 for any free one.

    Raises:
        OSError: if the port is taken.
    """

    def __init__(self, port: int) -> None:
        registry = CollectorRegistry()
        of_phase, of_type = ["phase", "press"], ["request_type", "press"]
        self._seconds = Counter(f"{PREFIX}_phase_seconds", "Seconds per phase", of_phase, registry=registry)
        self._tokens = Counter(f"{PREFIX}_tokens", "Tokens per phase, padding left out", of_phase, registry=registry)
        self._batches = Counter(f"{PREFIX}_batches", "Batches run", of_type, registry=registry)
        self._requests = Counter(f"{PREFIX}_requests", "Requests answered", ["request_type"], registry=registry)
        self._ttft = Histogram(f"{PREFIX}_time_to_first_token_seconds", "TTFT", buckets=TTFT_BUCKETS, registry=registry)
        self._tpot = Histogram(
            f"{PREFIX}_time_per_output_token_seconds", "TPOT", buckets=TPOT_BUCKETS, registry=registry
        )
        self._kv_bytes = Gauge(f"{PREFIX}_kv_bytes", "KV cache of the newest request", ["state"], registry=registry)
        self._server, self._thread = start_http_server(port, addr=LOOPBACK, registry=registry)
        self.port: int = self._server.server_port

    def add(self, record: BatchRecord | RequestRecord) -> None:
        if isinstance(record, BatchRecord):
            for phase in ("prefill", "press", "score", "decode"):
                self._seconds.labels(phase, record.press).inc(getattr(record, f"{phase}_sec"))
            self._tokens.labels("prefill", record.press).inc(record.num_prefill_tokens)
            output = "decode" if record.request_type == "generate_until" else "score"
            self._tokens.labels(output, record.press).inc(record.num_output_tokens)
            self._batches.labels(record.request_type, record.press).inc()
            return
        self._requests.labels(record.request_type).inc()
        if record.ttft_sec is not None:
            self._ttft.observe(record.ttft_sec)
        if record.tpot_sec is not None:
            self._tpot.observe(record.tpot_sec)
        for state in ("before", "allocated", "effective"):
            self._kv_bytes.labels(state).set(getattr(record, f"kv_bytes_{state}"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
