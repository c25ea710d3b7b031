"""Inputs of a network's forward: made by its preprocessing, or taken out of a user's batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, reason_of
from asymswap.types import Preprocessing
from asymswap.utils.tensors import list_tensors, map_tensors, seeded

Inputs = tuple[Any, ...]
"""The positional arguments of one forward pass."""

PORTION = 3 * 224 * 224
"""Numbers in the inputs of one forward pass, if there is a choice: one image of the usual size, or many small ones."""


def example(preprocessing: Preprocessing, dtype: torch.dtype) -> Inputs:
    """Return one input of the right sizes and dtype on the meta device: enough to trace and to count."""
    return _make(preprocessing, 1, lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))


def probe(preprocessing: Preprocessing, dtype: torch.dtype, images: int = 2, seed: int = 0) -> Inputs:
    """Return random inputs: normal, like normalised images; for networks that normalise lists, from 0 to 1."""
    generator = seeded(seed)
    draw = torch.rand if preprocessing.form == "image-list" else torch.randn
    return _make(preprocessing, images, lambda *shape: draw(*shape, generator=generator).to(dtype))


def with_values(inputs: Inputs) -> Inputs:
    """Return the inputs with random numbers from 0 to 1, always the same, in place of meta tensors."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_meta else tensor

    filled: Inputs = map_tensors(inputs, fill)
    return filled


def copied(inputs: Inputs) -> Inputs:
    """Return copies of the inputs, since a model may change them in place."""
    copies: Inputs = map_tensors(inputs, Tensor.clone)
    return copies


def portions(inputs: Inputs) -> Iterator[Inputs]:
    """Yield the inputs in order, in portions of at most PORTION numbers, but at least one sample."""
    count = samples_in(inputs)
    each = sum(tensor.numel() for tensor in list_tensors(inputs)) // count
    step = max(1, PORTION // max(1, each))
    for start in range(0, count, step):
        yield samples_of(inputs, start, start + step)


def samples_in(inputs: Inputs) -> int:
    """Return the number of samples: the length of the first argument, a tensor or a list, or of its first tensor."""
    if isinstance(inputs[0], list):
        return len(inputs[0])
    return next((len(tensor) for tensor in list_tensors(inputs) if tensor.dim()), 1)


def samples_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return some of the samples: all that is as long as there are samples is cut, tensors and lists alike."""
    count = samples_in(inputs)

    def cut(value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return value[start:stop]
        return map_tensors(value, lambda tensor: tensor[start:stop] if tensor.shape[:1] == (count,) else tensor)

    return tuple(map(cut, inputs))


def repeated(inputs: Inputs, count: int) -> Inputs:
    """Return the first sample as often as asked for."""
    samples = samples_in(inputs)

    def repeat(value: Any) -> Any:
        if isinstance(value, list) and len(value) == samples:
            return value[:1] * count
        return map_tensors(value, lambda one: torch.cat([one[:1]] * count) if one.shape[:1] == (samples,) else one)

    return tuple(map(repeat, inputs))


class Replayed:
    """The items of an iterator, which gives them once, for any number of readings: what was read is kept."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator, self._kept = iterator, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while True:
            if place == len(self._kept):
                try:
                    self._kept.append(next(self._iterator))
                except StopIteration:
                    return
            yield self._kept[place]
            place += 1


def arguments_of(model: nn.Module, batch: Any, inputs: Callable[[Any], Any] | None = None) -> Inputs:
    """Return the positional arguments of the model's forward that are in a user's batch.

    `inputs` turns a batch into one argument, a tuple of arguments, or a dict of them by name. Without it a tensor is
    the argument, of a sequence such as (inputs, labels) the first, and of a dict what the forward has a name for.
    Raises SourceError, with the forward's signature, where that does not fit.
    """
    signature = inspect.signature(model.forward)
    if inputs is not None:
        try:
            given = inputs(batch)
        except Exception as error:  # the user's own code
            raise SourceError(f"`inputs=` fails on a batch: {type(error).__name__}: {reason_of(error, 200)}") from error
    else:
        given = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if isinstance(given, Mapping):
            given = {name: given[name] for name in signature.parameters if name in given}
    named = {str(name): value for name, value in given.items()} if isinstance(given, Mapping) else {}
    values = () if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
    try:
        bound = signature.bind(*values, **named)
    except TypeError as error:
        raise _unfit(signature, str(error)) from None
    if named:
        # By position: trailing defaults are left out, those in between are given.
        places = [one for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
        last = max((number for number, one in enumerate(places) if one.name in bound.arguments), default=-1)
        values = tuple(bound.arguments.get(one.name, one.default) for one in places[: last + 1])
        if len(set(named) - {one.name for one in places}):
            raise _unfit(signature, "it takes some of them by name only; wrap it in a module that takes them by place")
    if not list_tensors(values):
        raise _unfit(signature, f"a batch of {type(batch).__name__} holds no tensor for it")
    return values


def placed(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs on the model's device, floating-point ones in its dtype."""
    own = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(()))
    moved: Inputs = map_tensors(
        inputs, lambda one: one.to(own.device, own.dtype if one.is_floating_point() else one.dtype)
    )
    return moved


def _unfit(signature: inspect.Signature, reason: str) -> SourceError:
    return SourceError(f"the batch does not fit forward{signature}: {reason}; give `inputs=`, a function of a batch")


def sizes(inputs: Inputs) -> str:
    """Return the inputs' sizes, such as `1x3x224x224`, separated by commas."""
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in list_tensors(inputs))


def describe(inputs: Inputs) -> str:
    """Describe the inputs for a message: `an input of 1x3x224x224`."""
    return f"an input of {sizes(inputs)}"


def _make(preprocessing: Preprocessing, count: int, make: Callable[..., Tensor]) -> Inputs:
    channels, size = preprocessing.channels, preprocessing.size
    if preprocessing.form == "image-list":
        return ([make(channels, *size) for _ in range(count)],)
    if preprocessing.form == "image-pair":
        return make(count, channels, *size), make(count, channels, *size)
    frames = (preprocessing.frames,) if preprocessing.form == "clips" else ()
    return (make(count, channels, *frames, *size),)
