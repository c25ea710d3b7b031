"""The networks that can be built from a reference alone, without running the user's code.

They are torchvision's, our own, and timm's where it is installed.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from asymswap.errors import SourceError
from asymswap.fileformats.state_dict import Difference, State, compare
from asymswap.models import fingerprints, networks, timm_models, torchvision_models
from asymswap.types import Origin
from asymswap.utils.tensors import WithinMemory, WithoutMemory, allocated, list_tensors

DIGITS = "digits-resnet"

_MOST_NUMBERS = 2**30
"""Bytes of weights, where a network that nobody has filled yet takes memory: a file may claim any arguments for it."""


def known_references() -> list[str]:
    """Every reference that names a network which needs no further package, in its full form."""
    own = [DIGITS, *(f"cifar:{name}" for name in networks.BUILDERS)]
    return own + [f"torchvision:{name}" for name in torchvision_models.names()]


def canonical(reference: str) -> str | None:
    """The full form of a reference to a known network (`resnet18` is `torchvision:resnet18`), or None for others.

    What follows `timm:` is taken as it is: whether it names a model is for timm to say, which takes seconds to load.
    """
    if reference.startswith(timm_models.PREFIX):
        return reference
    if reference == DIGITS or (reference.startswith("cifar:") and reference[6:] in networks.BUILDERS):
        return reference
    name = reference.removeprefix("torchvision:")
    return f"torchvision:{name}" if name in torchvision_models.names() else None


def near(reference: str) -> str:
    """Which known references come close to one that is none, as a user writes them, for a message."""
    written = [text.removeprefix("torchvision:") for text in known_references()]
    wanted = reference.removeprefix("torchvision:")
    # Without a prefix, our own networks are found too; of two by one name, torchvision's comes last and counts.
    names = {name if ":" in wanted else name.removeprefix("cifar:"): name for name in written}
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(names[name] for name in close)}?" if close else ""


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a full reference, with random weights; raises SourceError for arguments that it does not take.

    torchvision's networks take `in_channels` here too: their first conv is then made anew.
    """
    try:
        if reference.startswith("torchvision:"):
            own = {key: value for key, value in arguments.items() if key != "in_channels"}
            model = torchvision_models.build(reference.removeprefix("torchvision:"), own)
            if "in_channels" in arguments:
                _set_channels_(model, reference, arguments["in_channels"])
            return model
        if reference.startswith(timm_models.PREFIX):
            return timm_models.build(reference.removeprefix(timm_models.PREFIX), arguments)
        return _build_own(reference, arguments)
    except SourceError:
        raise
    except Exception as error:
        # Builders check little: a wrong argument may come to light anywhere in them, as any error.
        if not arguments:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{reference} does not take {dict(arguments)}: {reason[:200]}") from None


def on_meta(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a full reference with its weights on the meta device: enough to compare keys and shapes.

    Some run themselves while they are built (ssdlite), which needs numbers: these have theirs, a gigabyte at most. The
    random numbers of others are not touched. Raises SourceError as `build` does.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with WithoutMemory(torch.empty):
                return build(reference, arguments)
        except Exception:
            # What is wrong with the arguments is wrong again.
            with WithinMemory(_MOST_NUMBERS):
                return build(reference, arguments)


def build_unset(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The same network with unset weights, to load a state dict into: no memory is taken before that is done."""
    model = on_meta(reference, arguments)
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    every = [tensor for module in model.modules() for tensor in list_tensors(dict(vars(module)))]
    if not any(tensor.is_meta for tensor in every):
        return model
    if any(tensor.is_meta and id(tensor) not in stored for tensor in every):
        # What no state dict brings has to be computed.
        with torch.random.fork_rng(devices=[]):
            return build(reference, arguments)
    return allocated(model)


def _build_own(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    builder = networks.digits_resnet if reference == DIGITS else networks.BUILDERS[reference.removeprefix("cifar:")]
    unknown = sorted(set(arguments) - {"num_classes", "in_channels"})
    if unknown:
        raise SourceError(f"{reference} does not take {unknown[0]!r}; it takes num_classes and in_channels")
    return builder(**arguments)


def _set_channels_(model: nn.Module, reference: str, channels: Any) -> None:
    """Give the network another number of input channels: its first conv becomes one of those, with random weights."""
    name, conv = next((item for item in model.named_modules() if isinstance(item[1], nn.Conv2d)), ("", None))
    task = torchvision_models.task(reference.removeprefix("torchvision:"))
    if conv is None or task not in ("classification", "segmentation"):
        raise SourceError(f"{reference} does not take 'in_channels'; its input has the channels of an image")
    if type(channels) is not int or channels < 1 or channels % conv.groups:
        raise SourceError(f"{reference} cannot have in_channels={channels!r}; give a whole number from 1 on")
    if channels == conv.in_channels:
        return
    other = nn.Conv2d(
        channels, conv.out_channels, cast(Any, conv.kernel_size), cast(Any, conv.stride), cast(Any, conv.padding),
        cast(Any, conv.dilation), conv.groups, conv.bias is not None, conv.padding_mode,
    )  # fmt: skip
    model.set_submodule(name, other)


def fit(reference: str, arguments: Mapping[str, Any], state: State) -> tuple[dict[str, Any], Difference]:
    """The arguments, class count and input channels as a state dict shows them among them, and how it differs then.

    The network is built without weights. Raises SourceError where it does not take the given arguments.
    """
    match = fingerprints.match_of(reference, fingerprints.shapes_of(state))
    if match is not None:
        guess = {**match.arguments, **arguments}
        return guess, compare(on_meta(reference, guess), state)
    # What has been edited, so that its keys are not the table's, may still be explained by the arguments alone.
    plain = on_meta(reference, arguments)
    guess = {**_guess(reference, plain, state), **arguments}
    if guess != dict(arguments):
        try:
            difference = compare(on_meta(reference, guess), state)
        except SourceError:
            difference = None
        if difference is not None and not difference:
            return guess, difference
    return dict(arguments), compare(plain, state)


def shapes(reference: str, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a network's state dict, counters of batches left out; it is built without weights."""
    return fingerprints.shapes_of(on_meta(reference, arguments).state_dict())


def nearest(state: State, progress: Callable[[int, int], None]) -> list[tuple[float, str]]:
    """Every known classifier by how much of the state dict it shares, from 1 (all keys and shapes) down, best first.

    Likeness is the number of common (key, shape) pairs over that of all. The networks are built without weights.
    """
    own = set(fingerprints.shapes_of(state).items())
    references = [DIGITS, *(f"cifar:{name}" for name in networks.BUILDERS)]
    references += [f"torchvision:{name}" for name in torchvision_models.classifiers()]
    found = []
    for done, reference in enumerate(references, start=1):
        pairs = _shapes(reference)
        found.append((len(own & pairs) / max(len(own | pairs), 1), reference))
        progress(done, len(references))
    return sorted(found, key=lambda item: (-item[0], item[1]))


@functools.cache
def _shapes(reference: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset(shapes(reference, {}).items())


def versions(origin: Origin) -> dict[str, str]:
    """The versions of further packages that are needed to build a network again."""
    return {"timm": timm_models.version()} if origin.reference.startswith(timm_models.PREFIX) else {}


def origin_of_timm(model: nn.Module) -> Origin | None:
    """From what timm builds this very structure again, where the module is one that timm has built; None otherwise."""
    name = timm_models.made_by_timm(model)
    arguments = None if name is None else timm_models.arguments_of(model)
    if name is None or arguments is None:
        return None
    reference, arguments = f"{timm_models.PREFIX}{name}", timm_models.settled(name, arguments)
    try:
        again = on_meta(reference, arguments)
    except SourceError:
        return None
    return Origin(reference, arguments) if _same_structure(model, again) else None


def _same_structure(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models agree in all but their weights: names and classes, attributes, shapes."""
    first, second = (dict(model.named_modules(remove_duplicate=False)) for model in (one, other))
    if first.keys() != second.keys() or compare(one, other.state_dict()):
        return False
    return all(
        type(module) is type(second[name])
        and vars(module).keys() == vars(second[name]).keys()
        and _plain_attributes(module) == _plain_attributes(second[name])
        for name, module in first.items()
    )


def _plain_attributes(module: nn.Module) -> dict[str, str]:
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: repr(value) for name, value in vars(module).items() if name != "training" and isinstance(value, plain)
    }


def _guess(reference: str, model: nn.Module, state: State) -> dict[str, Any]:
    """Arguments that would explain how the state differs from the network as it is built by default."""
    difference = compare(model, state)
    classes = {have[0] for _, have, want in difference.shapes if have and have[1:] == want[1:]}
    channels = {
        have[1]
        for _, have, want in difference.shapes
        if len(have) == len(want) == 4 and have[0] == want[0] and have[2:] == want[2:]
    }
    guess: dict[str, Any] = {}
    if len(classes) == 1:
        guess["num_classes"] = classes.pop()
    if len(channels) == 1:
        guess["in_chans" if reference.startswith(timm_models.PREFIX) else "in_channels"] = channels.pop()
    if difference.missing and all(key.lower().startswith("aux") for key in difference.missing):
        # torchvision drops the auxiliary heads of its own pretrained models.
        guess["aux_logits"] = False
    heads = timm_models.classifier_of(model)
    if heads and difference.missing and all(key.rpartition(".")[0] in heads for key in difference.missing):
        # A backbone, as timm writes it for those who want its features.
        guess["num_classes"] = 0
    return guess
