"""Guards lm-eval's ``--use_cache``, which keys answers by the request alone, whatever the press.

Knows the cache as a mapping. Does not know models or presses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from lm_eval_kvpress.errors import UsageError

OWNER = "lm_eval_kvpress.owner"


def claim(cache: MutableMapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Enters whose answers the cache holds.

    Args:
        identity: everything that answers depend on besides the request.

    Raises:
        UsageError: in one line, if it holds the answers of something else.
    """
    mine = json.loads(json.dumps(identity, sort_keys=True))
    if OWNER not in cache:
        if len(cache):
            raise UsageError("use_cache holds answers of unknown origin: choose another file")
        cache[OWNER] = mine
        return
    owner = cache[OWNER]
    changed = sorted(key for key in owner.keys() | mine.keys() if owner.get(key) != mine.get(key))
    if changed:
        raise UsageError(
            f"use_cache holds answers under another setting ({', '.join(changed)} differ), and lm-eval would hand them "
            "out for this one: choose another file"
        )
