"""What the start-up file costs every Python of an environment: starts with it and without it, in turns.

Two fresh environments hold nothing but what a wheel of this package puts there for it, or nothing. The figure is the
median over the pairs of the difference, with the 95 % bootstrap interval. The last line of stdout is one JSON document.

    python -m scripts.benchmarks.startup                   a hundred pairs: ten seconds
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from scripts.benchmarks.measuring import count, estimate
from scripts.machine import ROOT

PACKAGE = ROOT / "lm_eval_kvpress"
STARTUP_FILE = "lm_eval_kvpress_startup.pth"
HAS_HOOK = "import sys; print(any(finder.__module__ == 'lm_eval_kvpress._startup' for finder in sys.meta_path))"


def environment(folder: Path, *, with_hook: bool) -> Path:
    """The interpreter of a fresh environment."""
    venv.create(folder, symlinks=True)
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_preferred_scheme("prefix")
    site_packages = Path(sysconfig.get_path("purelib", scheme, {"base": str(folder)}))  # Python 3.10 has no "venv"
    if with_hook:
        (site_packages / PACKAGE.name).mkdir()
        for name in ("__init__.py", "_startup.py"):
            shutil.copy(PACKAGE / name, site_packages / PACKAGE.name)
        shutil.copy(PACKAGE / "_startup.pth", site_packages / STARTUP_FILE)
    python = folder / "bin" / "python"
    assert start(python, HAS_HOOK) == f"{with_hook}\n"  # and the code is compiled, as an installer leaves it
    return python


def start(python: Path, code: str = "pass") -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([python, "-c", code], env=variables, check=True, capture_output=True, text=True).stdout


def seconds(python: Path) -> float:
    begin = time.perf_counter()
    start(python)
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=count, default=100, help="default: %(default)s")
    pairs = parser.parse_args(arguments).pairs
    with tempfile.TemporaryDirectory() as folder:
        pythons = [environment(Path(folder) / str(with_hook), with_hook=with_hook) for with_hook in (False, True)]
        times: dict[Path, list[float]] = {python: [] for python in pythons}
        for pair in range(pairs):
            for python in pythons if pair % 2 else reversed(pythons):
                times[python].append(seconds(python))
    without, with_hook = (times[python] for python in pythons)
    cost = estimate([1e3 * (b - a) for a, b in zip(without, with_hook, strict=True)])
    bare = estimate([1e3 * value for value in without])
    print(f"a start takes {bare.median:.1f} ms, with the start-up file {cost.median:.2f} ms more", end=" ")
    print(f"[{cost.low:.2f}, {cost.high:.2f}]")
    print(json.dumps({"pairs": pairs, "bare_ms": bare.median, "cost_ms": vars(cost)}))


if __name__ == "__main__":
    main()
