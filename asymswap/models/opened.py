"""A model that has been opened: the module with its origin, its preprocessing and example inputs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from asymswap.checkpoint import Header
from asymswap.errors import TraceError, reason_of, visible
from asymswap.measure.macs import Costs, count_costs
from asymswap.models.preprocessing import size_warning
from asymswap.types import Fed, Origin, Plan, Preprocessing
from asymswap.utils import inputs as made_inputs
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import deep_copy, device_of, map_tensors

GIVEN = "as given"
"""The weights of a module that was handed over."""


@dataclass(frozen=True)
class OpenedModel:
    """A module with its origin, its preprocessing and its conversions so far; see `open_model`. No verb changes it.

    `reference` is the user's name for it, `weights` where its weights are from, `file` what it was read from, `sha256`
    its hash; `plans` and `provenance` are an asymswap checkpoint's, `skeleton` is the stored structure of a module that
    no reference can build, `base` the unconverted model where the user gave it, `seconds` how long the opening took.
    `private`: no code but ours, torch's and torchvision's made it, so that nobody else holds its tensors;
    `handed_over`: it is for one verb only, whose result may share its tensors. `example_inputs` are the user's own
    arguments of one forward pass, in place of images. `fed` says for a report how images are prepared, once that is
    settled, `fed_warnings` are its first lines. `device` is the one asked for; where none is, `on_device` decides.
    """

    model: nn.Module
    origin: Origin
    preprocessing: Preprocessing
    weights: str
    notes: tuple[str, ...] = ()
    skeleton: bytes | None = None
    reference: str = ""
    file: Path | None = None
    sha256: str | None = None
    plans: tuple[Plan, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    base: nn.Module | None = field(default=None, repr=False)
    seconds: float = 0.0
    private: bool = False
    handed_over: bool = False
    example_inputs: Inputs | None = field(default=None, repr=False)
    fed: Fed | None = None
    fed_warnings: tuple[str, ...] = ()
    device: torch.device | None = None

    def __repr__(self) -> str:
        return visible(f"<OpenedModel {self.reference}: {self.origin.reference}, weights {self.weights}>")

    @property
    def may_share(self) -> bool:
        """True where a result may hold this model's tensors."""
        return self.private and self.handed_over

    def header(self) -> Header:
        """Return the header of a checkpoint of this model."""
        return Header(self.origin, self.plans, self.preprocessing, self.provenance, self.skeleton)

    def on_device(self, choose: bool = True) -> Self:
        """Return it where images run, copied if need be: on the device asked for, else a GPU rather than the CPU.

        Only with `choose` is a GPU chosen: a user's metric may make inputs of its own on the CPU.
        """
        own, wanted = device_of(self.model), self.device
        if wanted is None and choose and own.type == "cpu" and torch.cuda.is_available():
            wanted = torch.device("cuda", torch.cuda.current_device())
        if wanted in (None, own):
            return self
        example = map_tensors(self.example_inputs, lambda tensor: tensor.to(wanted))
        return replace(self, model=deep_copy(self.model).to(wanted), example_inputs=example)

    def example(self) -> Inputs:
        """Return one input of the right size and dtype: enough to trace and to count; on the meta device if made."""
        return self.example_inputs or made_inputs.example(self.preprocessing, self.dtype())

    def probe(self, images: int = 2, seed: int = 0, dtype: torch.dtype | None = None) -> Inputs:
        """Return inputs to run: a number of random images by the seed, or the user's example as often as that."""
        if self.example_inputs is not None:
            return made_inputs.repeated(self.example_inputs, images)
        made = made_inputs.probe(self.preprocessing, dtype or self.dtype(), images, seed)
        return tuple(map_tensors(one, lambda tensor: tensor.to(device_of(self.model))) for one in made)

    def takes(self) -> str:
        """Return the size of one input: `3x224x224`, or of every tensor of the user's example."""
        return self.preprocessing.describe() if self.example_inputs is None else made_inputs.sizes(self.example_inputs)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point parameter, and so of the input."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)


def input_warnings(*opened: OpenedModel) -> tuple[str, ...]:
    """Return what to know of how models are fed, or that nobody gave the size of their input."""
    lines: list[str] = []
    for one in opened:
        if one.fed is not None:
            lines += one.fed_warnings
        elif one.example_inputs is None:
            lines += [f"{one.reference}: {line}" for line in size_warning(one.preprocessing)]
    return tuple(dict.fromkeys(lines))


def costs_of(opened: OpenedModel, names: Iterable[str] = ()) -> Costs:
    """Return the cost of an opened model and of the named modules in it; raise TraceError where it does not run."""
    about = f"an input of {made_inputs.sizes(opened.example())}"
    try:
        costs = count_costs(opened.model, opened.example(), names)
    except Exception as error:  # a network may raise anything for an input that it does not take
        what = f"{opened.reference} does not run on {about}: {reason_of(error, 200)}"
        raise TraceError(f"{what}; give another `input_size=…`") from error
    if costs.total.macs == 0:
        raise TraceError(
            f"{opened.reference} costs 0 MACs on {about}: no convolution, linear layer or matrix product was seen to "
            "run; give the network itself if this is a wrapper around it"
        )
    return costs
