"""The rooms of the package and what each may import. Imports run downward only; each library has few owners.

A new module needs a line here: that is where one decides what it may know.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lm_eval_kvpress"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# Room -> the rooms and libraries that it may import, inside functions as well; the standard library is free.
MAY_IMPORT: dict[str, set[str]] = {
    # layer 0: values, presses, a model's own parts; no engine
    "__init__": set(),
    "presses": {"press_arguments", "press_catalog", "press_grammar", "kvpress"},
    "press_grammar": {"press_arguments", "press_catalog"},
    "press_arguments": {"press_catalog"},
    "press_catalog": {"kvpress", "transformers"},
    "neox": {"torch", "transformers"},
    "neox_forward": {"torch", "transformers"},
    "triton_support": {"torch", "triton"},
    "neox_step": {
        *("cache", "decode_attention", "decode_kernels", "neox_forward", "triton_support"),
        *("torch", "transformers"),
    },
    "step_trial": {"cache", "neox_step", "triton_support", "torch", "transformers"},
    "decode_attention": {"torch", "triton"},
    "decode_kernels": {"torch", "triton"},
    "native": {"torch", "transformers"},
    "grouped_attention": {"grouped_kernel", "torch", "transformers"},
    "grouped_kernel": {"decode_attention", "triton_support", "torch"},
    "heap": set(),
    "plan": set(),
    "identity": {"lm_eval", "torch", "transformers"},
    "cache": {"torch", "transformers"},
    "telemetry": {"torch"},
    "recall": set(),
    "results": set(),
    "dense": {"torch", "transformers"},
    "linear_layers": {"torch"},
    "press_formulas": {"torch"},
    "plugin": {"lm_eval"},
    "stream_window": {"torch", "transformers"},
    "stream_store": set(),
    "throughput": {"telemetry", "throughput_records", "numpy"},
    "throughput_records": {"numpy"},
    "throughput_log": {"throughput_records"},
    "metrics": {"throughput_records", "prometheus_client"},
    "stream_press": {"presses"},
    "answer_cache": set(),
    "decoding_spec": {"press_catalog", "press_grammar", "presses"},
    "_startup": {"plugin"},
    # layer 1: the engine, from a model up to a batch of compressed contexts; token ids in, tensors out
    "engine": {"cache", "linear_layers", "torch", "transformers"},
    "head": {"engine", "torch"},
    "scoring": {"engine", "cache", "head", "torch", "transformers"},
    "decode_steps": {"engine", "cache", "torch"},
    "decode_graph": {"decode_steps", "engine", "torch"},
    "decode_press": {"engine", "cache", "streaming", "torch"},
    "decoding": {"decode_graph", "decode_press", "decode_steps", "engine", "cache", "torch", "transformers"},
    "generation": {"decoding", "torch", "transformers"},
    "compression": {"engine", "cache", "presses", "shared_prefill", "telemetry", "torch"},
    "shared_prefill": {"cache", "engine", "linear_layers", "telemetry", "torch", "transformers"},
    "ledger": {"presses", "telemetry"},
    "auto_batch": {"engine", "presses", "torch"},
    "runner": {
        *("cache", "compression", "decode_graph", "decode_press", "decoding", "decoding_spec", "engine", "generation"),
        *("plan", "scoring", "telemetry", "throughput", "torch"),
    },
    "work": {"ledger", "plan", "runner", "telemetry", "throughput", "torch"},
    "ranks": {"telemetry", "throughput_records"},
    "streaming": {"engine", "cache", "stream_window", "torch", "transformers"},
    # layer 2: the lm-eval model, and how lm-eval finds it
    "arguments": {"decoding_spec", "presses", "stream_press", "lm_eval"},
    "stream_run": {
        *("arguments", "engine", "plan", "stream_press", "stream_store", "streaming", "telemetry"),
        *("throughput", "tqdm"),
    },
    "encoding": {"lm_eval"},
    "record": {"arguments", "ranks", "telemetry"},
    "parity": {"recall", "lm_eval", "torch"},
    "loading": {"arguments", "native", "lm_eval", "safetensors", "torch", "transformers"},
    "adapter": {
        *(
            "loading",
            "answer_cache",
            "auto_batch",
            "arguments",
            "parity",
            "presses",
            "neox",
            "native",
            "plan",
            "telemetry",
        ),
        *("compression", "engine", "generation", "ledger", "loading", "runner", "shared_prefill", "throughput", "work"),
        *("decode_graph", "encoding", "linear_layers", "ranks", "record", "stream_run", "stream_store"),
        *("grouped_attention", "heap", "identity", "neox_forward", "step_trial", "throughput_log", "metrics"),
        *("lm_eval", "torch", "tqdm", "transformers"),
    },
    # layer 3: the commands
    "checks": {"adapter", "arguments", "cache", "dense", "parity", "presses", "recall", "torch", "transformers"},
    "checks_model": {"checks", "dense", "neox", "parity", "torch"},
    "checks_kept": {
        *("adapter", "cache", "checks", "dense", "engine", "parity", "press_formulas", "torch", "transformers"),
    },
    "checks_scores": {
        *("adapter", "cache", "checks", "checks_kept", "decode_graph", "decoding", "parity", "scoring"),
        *("lm_eval", "torch", "transformers"),
    },
    "checks_results": {"adapter", "arguments", "checks", "parity", "plugin", "lm_eval", "torch"},
    "verify": {"checks", "checks_model", "checks_kept", "checks_scores", "checks_results", "lm_eval", "torch"},
    "sweep_plan": {"arguments", "decoding_spec", "presses", "lm_eval", "yaml"},
    "sweep_store": {"stream_store", "runner", "scoring", "telemetry"},
    "sweep_model": {
        *(
            "adapter",
            "arguments",
            "ledger",
            "loading",
            "presses",
            "runner",
            "shared_prefill",
            "sweep_plan",
            "sweep_store",
        ),
        *("throughput_log", "work", "tqdm"),
    },
    "sweep": {
        *("adapter", "arguments", "identity", "plugin", "stream_store", "sweep_model", "sweep_plan", "sweep_store"),
        *("lm_eval", "rich"),
    },
    # layer 3, over result files alone: neither torch nor lm-eval
    "report_samples": {"results", "numpy"},
    "report_bootstrap": {"numpy"},
    "report_table": {"report_bootstrap", "report_samples", "results", "numpy"},
    "report_streams": {"report_table", "results", "numpy"},
    "report_trust": {"report_table", "results"},
    "report_columns": {"report_table", "results"},
    "report_text": {"report_columns", "report_table", "results"},
    "report_html": {"report_columns", "report_table", "report_text", "results", "itables", "jinja2", "plotly"},
    "report_latex": {"report_columns", "report_table", "report_text"},
    "report_figures": {"report_columns", "report_table", "report_text", "results", "matplotlib"},
    "report": {
        *("report_columns", "report_figures", "report_html", "report_latex", "report_table", "report_text"),
        *("report_streams", "report_trust", "results"),
    },
    "cli": {"presses", "plugin", "lm_eval"},
    "__main__": {"cli"},
}

# Library (or part of one) -> the only rooms that import it.
OWNERS = {
    "itables": {"report_html"},
    "matplotlib": {"report_figures"},
    "plotly": {"report_html"},
    "kvpress": {"presses", "press_catalog"},
    "lm_eval": {
        *("adapter", "arguments", "encoding", "identity", "loading", "plugin", "cli", "parity", "checks_scores"),
        *("checks_results", "sweep", "sweep_plan", "verify"),
    },
    "transformers.models": {"neox", "neox_forward", "neox_step", "step_trial", "stream_window", "streaming"},
    "triton": {"decode_attention", "decode_kernels", "triton_support"},
}

ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports anywhere, relative names resolved, less the standard library."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"{PACKAGE.name}.{node.module or alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] not in sys.stdlib_module_names)


def our_rooms(room: str) -> set[str]:
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix).partition(".")[0] for name in imports(PACKAGE / f"{room}.py") if prefix in name}


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_what_it_may(room: str) -> None:
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what the new module {room!r} may import"
    prefix = f"{PACKAGE.name}."
    found = {name.removeprefix(prefix).partition(".")[0] for name in imports(PACKAGE / f"{room}.py")}
    assert found - MAY_IMPORT[room] == set()


@pytest.mark.parametrize("library", OWNERS)
def test_library_is_imported_by_its_owners_only(library: str) -> None:
    users = {
        room
        for room in ROOMS
        for name in imports(PACKAGE / f"{room}.py")
        if name == library or name.startswith(f"{library}.")
    }
    assert users - OWNERS[library] == set()


def test_no_room_imports_itself_in_a_circle() -> None:
    TopologicalSorter({room: our_rooms(room) for room in ROOMS}).prepare()


def layer_of(room: str) -> int:
    """As docs/architecture.md has it, whose table names rooms or patterns of rooms."""
    (layer,) = [
        int(layer)
        for layer, patterns in re.findall(r"^\| (\d) \| ([^|]*) \|", ARCHITECTURE, re.MULTILINE)
        if any(fnmatch(room, pattern) for pattern in re.findall(r"`([^`]+)`", patterns))
    ]
    return layer


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"__init__", "__main__"}))
def test_the_documentation_gives_every_room_a_layer_above_what_it_imports(room: str) -> None:
    assert layer_of(room) >= max(map(layer_of, our_rooms(room)), default=0)


def test_the_documentation_names_no_room_that_is_gone() -> None:
    named = re.findall(r"^\| \d \| ([^|]*) \|", ARCHITECTURE, re.MULTILINE)
    for pattern in re.findall(r"`([^`]+)`", " ".join(named)):
        assert any(fnmatch(room, pattern) for room in ROOMS), pattern


def test_every_imported_library_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml: Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[\s\[<>=~!;]", requirement)[0].replace("-", "_").lower() for requirement in required}
    files = [path for folder in (PACKAGE, ROOT / "tasks", ROOT / "scripts") for path in folder.rglob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in imports(path)}
    own = {PACKAGE.name, *(path.stem for path in files)}
    distributions = {"yaml": "pyyaml"}  # where the two names differ
    assert {distributions.get(name, name) for name in imported - own} - declared == set()
