"""InfiniteBench's data set for lm-eval's tasks: in lm-eval 0.4.13 none of them can read it.

Their YAML writes the features in a form that ``datasets`` refuses, and four tasks ask for splits ``..._en`` that the
data set calls ``..._eng``. Knows lm-eval's class of tasks. Does not know models or presses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

DATASET = "xinrongzhang2022/InfiniteBench"


def read_data_set() -> None:
    """Have lm-eval's InfiniteBench tasks read their data set; other tasks download theirs as before."""
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download
    if hasattr(download, "reads_infinitebench"):
        return

    @functools.wraps(download)
    def download_and_find_split(self: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.DATASET_PATH != DATASET:
            download(self, dataset_kwargs, **kwargs)
            return
        download(self, _with_features(dataset_kwargs or {}), **kwargs)
        split = self.config.test_split
        if split not in self.dataset and f"{split}g" in self.dataset:
            self.dataset[split] = self.dataset[f"{split}g"]

    download_and_find_split.reads_infinitebench = True  # type: ignore[attr-defined]
    ConfigurableTask.download = download_and_find_split


def _with_features(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{"dtype": ..., "sequence": true}`` as the features that are meant; in any other form they are left alone."""
    import datasets

    features = given.get("features") or {}
    if not all(isinstance(kind, dict) and "dtype" in kind and "_type" not in kind for kind in features.values()):
        return dict(given)
    values = {name: datasets.Value(kind["dtype"]) for name, kind in features.items()}
    read = {
        name: datasets.Sequence(values[name]) if features[name].get("sequence") else values[name] for name in values
    }
    return {**given, "features": datasets.Features(read)} if read else dict(given)
