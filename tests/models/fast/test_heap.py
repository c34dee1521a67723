"""Freed memory stays with the process, in a process of its own: the limits hold for all of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lm_eval_kvpress.models.fast.heap import VARIABLES

PROGRAM = """
import ctypes, resource, sys
from lm_eval_kvpress.models.fast.heap import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [c.malloc(20 * 2**20) for _ in range(4)]
        for block in blocks:
            c.memset(block, 1, 20 * 2**20)
        for block in blocks:
            c.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if "keep" in sys.argv else None
faults()
print(kept, faults())
"""
PAGES = 10 * 4 * 20 * 2**20 // os.sysconf("SC_PAGESIZE")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are those of glibc")


def run(*arguments: str, **variables: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_used_again() -> None:
    kept, faults = run("keep")
    assert kept == "True" and faults < PAGES / 1000
    assert run()[1] > 10 * (faults + 10), "glibc gives it back"


@pytest.mark.parametrize("name", VARIABLES)
def test_who_has_set_a_limit_is_obeyed(name: str) -> None:
    assert run("keep", **{name: "131072"})[0] == "False"


@pytest.mark.parametrize(("name", "kept"), [("malloc.trim_threshold", "False"), ("pthread.rseq", "True")])
def test_tunables_of_other_parts_are_no_limit(name: str, kept: str) -> None:
    assert run("keep", GLIBC_TUNABLES=f"glibc.{name}=0")[0] == kept
