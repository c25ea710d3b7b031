"""Inputs of a network's forward: made by its preprocessing, or taken out of a user's batches."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError, call, reason_of
from asymswap.types import Preprocessing
from asymswap.utils.tensors import eval_mode, list_tensors, map_tensors, seeded

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


def with_values(inputs: Inputs, device: torch.device | None = None) -> Inputs:
    """Return the inputs on a device, with random numbers from 0 to 1, always the same, in place of meta tensors."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        return (torch.rand(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_meta else tensor).to(device)

    return tuple(map_tensors(one, fill) for one in inputs)


def copied(inputs: Inputs) -> Inputs:
    """Return copies of the inputs, since a model may change them in place."""
    return tuple(map_tensors(one, Tensor.clone) for one in inputs)


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
    return _resampled(inputs, lambda samples: samples[start:stop])


def repeated(inputs: Inputs, count: int) -> Inputs:
    """Return the first sample as often as asked for."""
    return _resampled(inputs, lambda all: all[:1] * count if isinstance(all, list) else torch.cat([all[:1]] * count))


def _resampled(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    count = samples_in(inputs)

    def resample(value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return change(value)
        return map_tensors(value, lambda tensor: change(tensor) if tensor.shape[:1] == (count,) else tensor)

    return tuple(map(resample, inputs))


def arguments_of(model: nn.Module, batch: Any, inputs: Callable[[Any], Any] | None = None) -> Inputs:
    """Return the arguments of the model's forward that a batch holds; raise SourceError where they do not fit it.

    `inputs(batch)` returns them: a tensor, a tuple, or a dict by the forward's names. By default a tensor is the input,
    of a pair (inputs, labels) the first, and of a dict the entries that the forward has.
    """
    signature = inspect.signature(model.forward)
    found = batch if inputs is None else call("`inputs=…`", inputs, batch)
    if inputs is None and isinstance(found, list | tuple):
        if not 1 <= len(found) <= 2:
            raise SourceError(f"a batch holds {len(found)} parts: give `inputs=…`, which says what the network gets")
        # Detectors take a list of images, which loaders give as a tuple.
        found = [*found[0]] if isinstance(found[0], tuple) else found[0]
    if inputs is None and isinstance(found, Mapping):
        found = {name: value for name, value in found.items() if name in signature.parameters}
    try:
        if not isinstance(found, Mapping):
            arguments = found if isinstance(found, tuple) else (found,)
            signature.bind(*arguments)
            if not list_tensors(arguments):
                raise TypeError("it holds no tensor")
            return arguments
        bound = signature.bind(**found)
        for name in bound.arguments:
            if signature.parameters[name].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
                raise TypeError(f"{name!r} has no position")
    except TypeError as error:
        what = f"the batch ({type(batch).__name__})" if inputs is None else "what `inputs=…` returned"
        raise SourceError(
            f"{what} does not fit forward{signature} of {type(model).__name__}: {reason_of(error)}; give as `inputs=…` "
            "a function of the batch that returns the arguments, as a tensor, a tuple or a dict by their names"
        ) from None
    last = next(reversed(bound.arguments), None)
    bound.apply_defaults()
    # Defaults behind the last argument are left out.
    return () if last is None else bound.args[: list(bound.arguments).index(last) + 1]


def placed(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs on the model's device, floating-point ones in its dtype."""
    own = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(()))
    moved: Inputs = map_tensors(
        inputs, lambda one: one.to(own.device, own.dtype if one.is_floating_point() else one.dtype)
    )
    return moved


def output_of(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of inputs, which are placed for it first, in eval mode and without gradients."""
    with eval_mode(model), torch.no_grad():
        return model(*placed(model, inputs))


def sizes(inputs: Inputs) -> str:
    """Return the inputs' sizes, such as `1x3x224x224`, separated by commas."""
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in list_tensors(inputs))


def _make(preprocessing: Preprocessing, count: int, make: Callable[..., Tensor]) -> Inputs:
    channels, size = preprocessing.channels, preprocessing.size
    if preprocessing.form == "image-list":
        return ([make(channels, *size) for _ in range(count)],)
    if preprocessing.form == "image-pair":
        return make(count, channels, *size), make(count, channels, *size)
    frames = (preprocessing.frames,) if preprocessing.form == "clips" else ()
    return (make(count, channels, *frames, *size),)
