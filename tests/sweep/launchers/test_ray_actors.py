"""A Ray that is not there, or does not start, is one line."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.errors import UsageError

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lm-eval-kvpress[ray]'")

from lm_eval_kvpress.sweep.launchers.ray_actors import _connect  # noqa: E402


@pytest.mark.parametrize(
    ("error", "address", "line"),
    [
        (Exception("The current node timed\n out during startup."), None, "Ray does not start on this machine .The"),
        (ConnectionError("nobody listens"), "auto", "ray_address=auto: there is no Ray cluster .nobody"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(
    error: Exception, address: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=line) as raised:
        _connect(address)
    assert "\n" not in str(raised.value)


def test_another_error_of_ray_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: {}["nothing"])
    with pytest.raises(KeyError):
        _connect(None)
