"""One side of `compare_commits`: the model of one checkout, which answers requests whenever it is told to.

Runs as a process of its own, from its text, with the checkout first on the path. The checkout may be much older than
this file, so nothing of the package is named here: lm-eval's registry has the model, entered at start-up.

A line of JSON comes in, a line goes out:

    {"load": {model arguments}}                                -> {"package": its folder}
    {"set": {model arguments}, "request_type", "requests"}     -> {}
    {"run": true}                                              -> {"seconds", "answers"}
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, TextIO

import torch


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, out)


def serve(commands: TextIO, out: TextIO) -> None:
    from lm_eval.api.instance import Instance

    base = lm = None
    request_type, instances = "", list[Instance]()
    for line in commands:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if "load" in command:
            base = model_class()(**command["load"])
            answer["package"] = os.path.dirname(sys.modules["lm_eval_kvpress"].__file__ or "")
        elif "set" in command:
            assert base is not None, "load comes first"
            lm = model_class()(pretrained=base.model, tokenizer=base.tokenizer, **command["set"])
            request_type = command["request_type"]
            requests = enumerate(command["requests"])
            instances = [Instance(request_type, {}, tuple(args), 0, ("bench", doc, 1)) for doc, args in requests]  # type: ignore[arg-type]
        else:
            start = time.perf_counter()
            answer["answers"] = getattr(lm, request_type)(list(instances), disable_tqdm=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=out, flush=True)


def model_class() -> Any:
    import lm_eval.models  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import get_model

    return get_model("kvpress")


if __name__ == "__main__":
    main()
