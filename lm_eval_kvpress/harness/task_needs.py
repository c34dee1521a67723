"""What the field's long-context tasks need before they make their texts: libraries, sentences, a tokenizer, room.

RULER measures its texts with a tokenizer that it finds in lm-eval's metadata, where the model's arguments stand as
well. It does not know ``pretrained=builtin`` or the default checkpoint of ``pythia-kvpress``. What is missing is said
in one line, before texts are made or weights are read.

Knows lm-eval's names of tasks, their metadata and checkpoints as folders or hub names. Does not know settings, presses
or how texts are made.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained
from lm_eval_kvpress.presses.values import Range, parse_number

DEFAULT_CHECKPOINTS = {"pythia-kvpress": "EleutherAI/pythia-2.8b"}
"""Our models that need no ``pretrained`` -> what they load."""

OURS = (*DEFAULT_CHECKPOINTS, "kvpress")

ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "ruler", "longcxt")
"""Tasks that cut essays into sentences by NLTK's ``punkt_tab``, and RULER's group and tag."""

RULER = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_*",
    *ESSAYS,
)

LIBRARIES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    RULER: ("nltk", "wonderwords", "scipy"),
    ("longbench", "longbench_*"): ("jieba", "fuzzywuzzy", "rouge"),
    ("minerva_math*",): ("sympy", "math_verify", "antlr4"),
}
"""Tasks -> the modules of lm-eval's extras that they import."""

LENGTHS = "max_seq_lengths"
RULERS_LENGTH = 4096
"""Tokens of RULER's texts where the metadata do not say (``DEFAULT_SEQ_LENGTHS`` of lm-eval's ``tasks/ruler``)."""


def prepared(
    model: str, arguments: Mapping[str, Any], metadata: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, Any]:
    """lm-eval's metadata, with the tokenizer of the model that will run.

    Args:
        model: lm-eval's name of the model; for others than ours nothing is looked at.
        arguments: of the model.
        metadata: as lm-eval has it, the model's arguments among them.
        tasks: names as given.

    Raises:
        UsageError: in one line, if something is missing or a length does not fit.
    """
    if model not in OURS:
        return dict(metadata)
    pretrained = arguments.get("pretrained") or DEFAULT_CHECKPOINTS.get(model)
    _check_libraries(tasks)
    _check_sentences(tasks)
    if isinstance(pretrained, str) and pretrained:
        _check_lengths(pretrained, arguments, metadata.get(LENGTHS), tasks)
        return with_tokenizer({"pretrained": pretrained, **metadata})
    return dict(metadata)


def with_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, with the folder of the tokenizer where the model is the built-in one."""
    named = metadata.get("tokenizer") or metadata.get("pretrained")
    return {**metadata, "tokenizer": resolve_pretrained(BUILTIN)} if named == BUILTIN else dict(metadata)


def _stand_for(task: str, names: Sequence[str]) -> bool:
    """Whether a task as typed is one of these, or a wildcard for one. Names may hold wildcards, too."""
    return any(fnmatchcase(task, name) or fnmatchcase(name, task) for name in names)


def _check_libraries(tasks: Sequence[str]) -> None:
    for task in tasks:
        needed = [library for names, libraries in LIBRARIES.items() if _stand_for(task, names) for library in libraries]
        missing = [library for library in needed if importlib.util.find_spec(library) is None]
        if missing:
            raise UsageError(
                f"task '{task}' needs {', '.join(missing)}: pip install 'lm-eval-kvpress[longcontext]', which brings "
                "what lm-eval's long-context tasks import"
            )


def _check_sentences(tasks: Sequence[str]) -> None:
    for task in tasks:
        if _stand_for(task, ESSAYS) and not _has_punkt():
            raise UsageError(
                f"task '{task}' cuts essays into sentences by NLTK's punkt_tab, which is neither here nor to be had: "
                "run `python -m nltk.downloader punkt_tab` where there is a network, and name its folder in NLTK_DATA"
            )


def _has_punkt() -> bool:
    """Whether NLTK finds its data, after one try to download them, as RULER would try."""
    import nltk  # of an extra

    for is_last in (False, True):
        try:
            nltk.data.find("tokenizers/punkt_tab")
            return True
        except LookupError:
            if not is_last:
                nltk.download("punkt_tab", quiet=True)
    return False


def _check_lengths(pretrained: str, arguments: Mapping[str, Any], lengths: Any, tasks: Sequence[str]) -> None:
    """Refuse texts that are longer than the model: their beginnings would be cut off, and the needle with them."""
    are_rulers = not lengths and any(_stand_for(task, RULER) for task in tasks)
    longest, limit = RULERS_LENGTH if are_rulers else max(_numbers(lengths), default=0), arguments.get("max_length")
    if limit is not None:
        limit = parse_number("max_length", int, limit, Range(low=1))
    if not limit and longest and not arguments.get("allow_extrapolation"):
        limit = _positions(pretrained)
    if limit and longest > limit:
        asked = f"RULER's texts have {longest} tokens" if are_rulers else f"{LENGTHS}={lengths}"
        raise UsageError(
            f"{asked}: {pretrained} takes {limit} tokens at most, a text with its answer: give shorter lengths "
            f"(--metadata '{{\"{LENGTHS}\": [{limit // 2}]}}'), or a model of more positions"
        )


def _numbers(lengths: Any) -> Iterator[int]:
    """RULER takes numbers, BABILong one word such as ``4k`` or ``1M``."""
    for length in lengths if isinstance(lengths, list | tuple) else [lengths]:
        word = re.fullmatch(r"(\d+)([km]?)", str(length).lower())
        if word:
            yield int(word[1]) * {"": 1, "k": 1024, "m": 1024**2}[word[2]]


def _positions(pretrained: str) -> int | None:
    """Those of the checkpoint; None where it cannot be read, which loading it will say."""
    from transformers import AutoConfig  # takes a second, and only such tasks need it

    try:
        config = AutoConfig.from_pretrained(resolve_pretrained(pretrained))
    except (OSError, ValueError):
        return None
    return getattr(config, "max_position_embeddings", None)
