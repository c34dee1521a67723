"""Statistics of a model belong to its weights: whose they are, and the refusal of those of others.

Knows a press that reads statistics, and the weights' checksum. Does not know how statistics are taken.
"""

from __future__ import annotations

from collections.abc import Iterable

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.identity import weights_fingerprint
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.statistics import tensors_for


def identity_of_weights(model: PressableModel) -> dict[str, str]:
    """What tells weights from others: dtype and checksum, in the basis in which the model is used."""
    with model.in_use():
        return {"dtype": str(model.model.dtype).removeprefix("torch."), "weights": weights_fingerprint(model.model)}


def check_statistics(press: PressSpec, model: PressableModel) -> None:
    """Refuse a press with the statistics of other weights. Published ones do not say whose they are: shapes must do.

    Raises:
        UsageError: in one line.
    """
    statistics = press.statistics
    if statistics is None:
        return
    with model.in_use(), model.presented():
        tensors_for(statistics.press, statistics.file, model.model)
    if not statistics.metadata:
        return
    made_for = statistics.metadata.get("press", "")
    if ":" in made_for and made_for != press.name:
        raise UsageError(
            f"statistics={statistics.file} are those of press={made_for}, not {press.name}: calibrate {press.name}"
        )
    own = identity_of_weights(model)
    if statistics.metadata.get("dtype") != own["dtype"]:
        raise UsageError(
            f"statistics={statistics.file} were taken in {statistics.metadata.get('dtype')}, and this model is in "
            f"{own['dtype']}: calibrate it in that dtype"
        )
    if statistics.metadata.get("weights") != own["weights"]:
        raise UsageError(
            f"statistics={statistics.file} are of other weights ({statistics.metadata.get('model')}, checksum "
            f"{statistics.metadata.get('weights')}) than these (checksum {own['weights']}): calibrate this model"
        )


def hashes_of_statistics(presses: Iterable[PressSpec]) -> dict[str, str]:
    """By file, the hash of the statistics that presses read."""
    found = (press.statistics for press in presses)
    return {f"statistics {item.file}": item.sha256 for item in found if item is not None}
