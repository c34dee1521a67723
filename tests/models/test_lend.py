"""What is lent is taken back, whatever happened meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_eval_kvpress.models.lend import lend


class Owner:
    kind = "of the class"


def test_attributes_are_set_and_put_back() -> None:
    owner = Owner()
    owner.__dict__.update(own=1)
    with lend(owner, own=2, kind="lent", new=3):
        assert (owner.own, owner.kind, owner.new) == (2, "lent", 3)  # type: ignore[attr-defined]
    assert owner.__dict__ == {"own": 1} and owner.kind == "of the class"


def test_an_exception_takes_them_back_too() -> None:
    owner = Owner()
    with pytest.raises(KeyError), lend(owner, new=1):
        raise KeyError
    assert owner.__dict__ == {}


def test_what_was_deleted_or_changed_meanwhile_is_put_back() -> None:
    owner = Owner()
    owner.__dict__.update(first=1, second=2)
    with lend(owner, first=10, second=20, third=30):
        del owner.__dict__["first"], owner.__dict__["third"]
        owner.__dict__["second"] = 200
    assert owner.__dict__ == {"first": 1, "second": 2}


def test_a_module_lent_to_a_module_is_no_submodule_of_it() -> None:
    owner, part = nn.Linear(2, 2), nn.Linear(3, 3)
    with lend(owner, part=part, forward=lambda x: x + 1):
        assert owner.part is part and len(list(owner.parameters())) == 2
        assert torch.equal(owner(torch.ones(2)), torch.full((2,), 2.0))
    assert "part" not in owner.__dict__ and "forward" not in owner.__dict__


def test_a_submodule_registered_under_a_lent_name_is_taken_off_and_an_older_one_is_kept() -> None:
    owner, other = nn.Sequential(nn.ReLU()), nn.Linear(3, 3)
    older = owner[0]
    with lend(owner, rotary=other), lend(owner, **{"0": other}):
        owner.rotary = other
        assert list(owner._modules) == ["0", "rotary"] and owner.__dict__["0"] is other
    assert dict(owner._modules) == {"0": older} and not {"rotary", "0"} & owner.__dict__.keys()


def test_loans_may_be_nested() -> None:
    owner = Owner()
    with lend(owner, new=1):
        with lend(owner, new=2):
            assert owner.new == 2  # type: ignore[attr-defined]
        assert owner.new == 1  # type: ignore[attr-defined]
    assert owner.__dict__ == {}
