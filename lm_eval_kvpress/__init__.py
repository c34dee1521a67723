"""lm-eval-kvpress: honest evaluation of KV-cache compression.

Importing the package loads nothing: start-up runs it in every interpreter of the environment (`_startup`). The version
is looked up where it is asked for; it comes from the git tag at the time of installation.
"""

__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("lm-eval-kvpress")
