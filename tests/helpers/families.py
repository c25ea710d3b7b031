"""Tests over every model of torchvision: `make test` runs one of each family, `pytest -m nightly` the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from torch import nn
from torchvision import models

from asymswap.models.builders import OWN, TORCHVISION, family_of


def one_of_each_family(references: Iterable[str], tried: Iterable[str] = ()) -> list[Any]:
    """The references (NAME, NAME@WEIGHTS, torchvision:NAME, or others) as parameters, most of them marked nightly.

    A family is what one file of torchvision builds; its smallest is marked slow, unless a reference in `tried` is of
    that family. Other references than torchvision's are families of their own.
    """
    met = {_family(reference) for reference in tried}
    found = []
    for reference in sorted(references, key=_size):
        family = _family(reference)
        found.append(pytest.param(reference, marks=pytest.mark.nightly if family in met else pytest.mark.slow))
        met.add(family)
    return found


def known_references() -> list[str]:
    """Every reference that names a network which needs no further package, in its full form."""
    return OWN.names() + TORCHVISION.names()


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a full reference with random weights."""
    return family_of(reference).build(reference, arguments)


def _name(reference: str) -> str:
    return reference.removeprefix("torchvision:").partition("@")[0]


def _size(reference: str) -> int:
    """Parameters of a reference of torchvision's, as its published weights say; 0 of others."""
    name = _name(reference)
    weights = list(models.get_model_weights(name)) if name in models.list_models() else []
    return min((weight.meta["num_params"] for weight in weights), default=0)


def _family(reference: str) -> str:
    name = _name(reference)
    return models.get_model_builder(name).__module__ if name in models.list_models() else reference
