"""Where a run's records go: a file, a Prometheus endpoint, both or neither."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.records.meter import Recorder

logger = logging.getLogger("lm_eval_kvpress")


def open_recorders(throughput_log: Path | None, metrics_port: int | None, rank: int = 0) -> Iterator[Recorder]:
    """Open what records are written to; it stays open as long as the process.

    Args:
        throughput_log: ``FILE.jsonl`` or ``FILE.csv``; other ranks than 0 write to ``FILE.rankN`` beside it.
        metrics_port: port on 127.0.0.1 for rank 0; rank N takes the Nth port after it.

    Raises:
        UsageError: if one cannot be opened, or the library for the endpoint is missing.
    """
    if throughput_log is not None:
        own = throughput_log.with_stem(f"{throughput_log.stem}.rank{rank}") if rank else throughput_log
        yield ThroughputLog(own)
    if metrics_port is not None:
        yield _metrics_server(metrics_port + rank)


def _metrics_server(port: int) -> Recorder:
    try:
        from lm_eval_kvpress.records.prometheus import MetricsServer  # needs an extra

        server = MetricsServer(port)
        logger.info("metrics_port: live figures at http://127.0.0.1:%d/metrics while this process lasts", port)
        return server
    except ImportError as error:
        raise UsageError("metrics_port needs prometheus-client: pip install 'lm-eval-kvpress[metrics]'") from error
    except OSError as error:
        raise UsageError(f"metrics_port={port} cannot be opened: {error.strerror}") from error
