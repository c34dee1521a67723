"""The versions that this project runs with: `make matrix` tests one after the other, each in an environment of its own.

A cell is a Python, a torch and a transformers. Everything else is what `constraints.txt` pins, where that fits. The
tests are a choice: what touches the libraries' inner parts. `docs/versions.md` holds the last result.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.stop_on_first_error = False

NEWEST = ("2.13", "5.2")
CELLS = [
    ("3.10", *NEWEST),
    ("3.11", *NEWEST),
    ("3.12", *NEWEST),
    ("3.13", *NEWEST),
    ("3.11", "2.13", "5.1"),
    ("3.11", "2.13", "5.0"),
    ("3.11", "2.5", "5.0"),
]
"""Python, torch, transformers: each at its newest with all others, each at its oldest once."""

SMOKE = (
    *("tests/test_startup.py", "tests/cache", "tests/engine/test_prefill.py", "tests/engine/test_scoring.py"),
    *("tests/models/test_gpt_neox.py", "tests/models/test_llama_like.py", "tests/presses/test_build.py"),
    *("tests/harness/test_plugin.py", "tests/api/test_model.py", "tests/report/test_markdown.py"),
)
"""What a cell runs."""

OF_THE_CELL = {
    *("torch", "sympy", "triton", "numpy", "setuptools", "dill", "multiprocess", "fsspec"),
    *("transformers", "tokenizers", "huggingface-hub", "hf-xet", "accelerate", "datasets", "evaluate", "peft"),
}
"""Packages whose versions follow from the cell: their pins are left out."""


@nox.session
@nox.parametrize(("python", "torch", "transformers"), CELLS)
def smoke(session: nox.Session, torch: str, transformers: str) -> None:
    """Test one combination of versions."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(_constraints(), encoding="utf-8")
    asked = [f"torch=={torch}.*", f"transformers=={transformers}.*"]
    session.install("--constraint", str(constraints), *asked, "-e", ".[dev]")
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = session.posargs or SMOKE
    session.run(
        "python", "-m", "pytest", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", *tests, env=environment
    )


def _constraints() -> str:
    """The tested set without what a cell chooses."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.partition("==")[0].lower().replace("_", "-") not in OF_THE_CELL)
