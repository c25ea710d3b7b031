"""Ranks and costs of separable pairs, by rank and order."""

from __future__ import annotations

from typing import Any

from asymswap.replacements import _pairs, separable
from asymswap.types import ConvSpec, Cost, Site


def full_rank(conv: ConvSpec, order: separable.Order) -> int:
    return _pairs.full_rank(conv, separable.Settled(rank=1, order=order))


def pair_cost(site: Site, rank: int, order: separable.Order, **more: Any) -> Cost:
    return separable.Separable().cost(site, separable.Settled(rank=rank, order=order, **more))
