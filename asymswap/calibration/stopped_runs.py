"""Real forward passes of both networks, stopped at the current layer: for models whose graph is not what runs.

The original runs once for many sites: of each site's output only the sampled positions are kept. The converted network
runs for every site, up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from asymswap.calibration.gather import (
    Batches,
    Images,
    PatchSums,
    choose_positions,
    outputs_at,
    patches_of,
    positions_for,
    within,
)
from asymswap.graph.trace import conv_hooks, conv_input
from asymswap.types import Site
from asymswap.utils.tensors import generator_for


class _Stop(BaseException):
    """Ends a forward pass; no `except Exception` in a model's code catches it."""


def stop_at_sites(
    model: nn.Module, converted: nn.Module, sites: Sequence[Site], images: Images
) -> Iterator[tuple[str, PatchSums | str]]:
    """Yield each site in call order, with the sums of its patches and target outputs, or why there are none.

    The replacement must be solved before the next site is asked for.
    """
    by_name = {site.name: site for site in sites}

    def call_order() -> list[str]:
        """Return the convs in the order in which they run on the first batch."""
        seen: dict[str, None] = {}
        with conv_hooks(model, lambda name, _, __: seen.setdefault(name)):
            for _, batch in images.batches():
                model(batch.clone())
                break
        return [name for name in seen if name in by_name]

    def output_bytes(site: Site) -> float:
        return 4.0 * images.count * positions_for(site, images.count) * site.conv.out_channels

    order = [by_name[name] for name in images.team.first(call_order)]
    for group in within(images.memory_gib * 2**30, order, output_bytes):
        targets = _targets(model, group, images)
        for site in group:
            conv = cast(nn.Conv2d, model.get_submodule(site.name))
            sums = PatchSums(conv, targets=True)
            reason = _add_runs(conv, converted, site.name, sums, targets.pop(site.name), images.batches)
            reasons = [one for one in images.team.gather(reason) if one is not None]
            yield site.name, reasons[0] if reasons else sums


@dataclass
class _Target:
    """The original network at one site for one batch: its input's shape, some positions, and the outputs there."""

    input: torch.Size
    at: tuple[Tensor, Tensor]
    outputs_GON: Tensor
    calls: int = 1


def _targets(model: nn.Module, group: Sequence[Site], images: Images) -> dict[str, dict[int, _Target]]:
    """Return the targets for each site and batch."""
    most = {site.name: positions_for(site, images.count) for site in group}
    found: dict[str, dict[int, _Target]] = {site.name: {} for site in group}
    for number, batch in images.batches():

        def see(name: str, seen: Tensor, output: Tensor, number: int = number) -> None:
            if name not in found:
                return
            if number in found[name]:
                found[name][number].calls += 1
                return
            conv = cast(nn.Conv2d, model.get_submodule(name))
            at = choose_positions(output.shape[-2:], most[name], generator_for(images.seed, name, number))
            found[name][number] = _Target(seen.shape, at, outputs_at(output, conv.groups, at))

        with conv_hooks(model, see):
            model(batch.clone())
    return found


def _add_runs(
    conv: nn.Conv2d,
    converted: nn.Module,
    name: str,
    sums: PatchSums,
    targets: Mapping[int, _Target],
    batches: Batches,
) -> str | None:
    """Add the site's patches in the converted network; return why they do not fit the targets, if so."""
    if any(target.calls > 1 for target in targets.values()):
        return "it runs several times in a forward pass"
    for number, batch in batches():
        seen = _input_at(converted, name, batch)
        target = targets.get(number)
        if seen is None and target is None:
            continue
        if seen is None or target is None or seen.shape != target.input:
            return "it runs on inputs of another size, or another number of times, in the converted network"
        try:
            sums.add(patches_of(conv, seen, target.at), target.outputs_GON)
        except ValueError:
            return "its input in the converted network is not finite"
    return None


def _input_at(converted: nn.Module, name: str, batch: Tensor) -> Tensor | None:
    """Return the input of the named module's first call; None where it is not called."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(conv_input(args, kwargs))
        raise _Stop

    handle = converted.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        converted(batch.clone())
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
