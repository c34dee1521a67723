"""What Triton raises where its kernels cannot be made, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CalledProcessError
from types import SimpleNamespace


def _made_by_triton() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError("some source", SimpleNamespace(lineno=1, col_offset=0), "no such thing")


REFUSALS: dict[str, tuple[Callable[[], Exception], str]] = {
    "no compiler": (lambda: RuntimeError("Failed to find C compiler. Set CC.\nmore of it"), "C compiler. Set CC."),
    "no headers": (lambda: CalledProcessError(1, ["gcc", "main.c"]), "returned non-zero exit status 1."),
    "no libcuda": (lambda: AssertionError("libcuda.so cannot found!"), "libcuda.so cannot found!"),
    "another glibc": (lambda: ImportError("GLIBC_2.38 not found"), "GLIBC_2.38 not found"),
    "an old GPU": (lambda: IndexError("map::at"), "map::at"),
    "a full disk": (lambda: OSError(28, "No space left on device"), "No space left on device"),
    "Triton's own": (_made_by_triton, "no such thing"),
    "nothing said": (RuntimeError, "RuntimeError()"),
}
