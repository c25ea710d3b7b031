"""What a family of networks is: how its references are built, filled with weights, and fed."""

import contextlib
import functools
import importlib
import inspect
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from asymswap.errors import SourceError, listed, near_names, reason_of
from asymswap.fileformats.state_dict import Difference, State, compare
from asymswap.models.fingerprints import matches, shapes_of
from asymswap.models.opened import OpenedModel
from asymswap.types import Origin, Preprocessing
from asymswap.utils.tensors import WithinMemory, WithoutMemory, allocated, list_tensors

Arguments = Mapping[str, Any]

OTHER_WEIGHTS = 'use `weights="none"` for random weights or `weights="FILE"` for a state_dict'


@dataclass(frozen=True)
class Fit:
    """How a state dict fits a network: the arguments that come closest, the state dict by its keys, what differs."""

    arguments: dict[str, Any]
    state: State
    difference: Difference

    def alike(self) -> int:
        return len(self.state) - len(self.difference.unexpected) - len(self.difference.shapes)


class Family(ABC):
    """Networks that are built in one way from a full reference and arguments."""

    private = True  # no code but ours, torch's and torchvision's builds them
    channels = "in_channels"  # the argument that sets the number of input channels
    prefix = ""  # of all full references

    def names(self) -> list[str]:
        """Return the full references of all networks, where they can be listed."""
        return []

    def canonical(self, reference: str) -> str | None:
        """Return the full form of a reference, which may lack the prefix; None where it names no network of these."""
        full = self.prefix + reference.removeprefix(self.prefix)
        return full if full in self.names() else None

    @abstractmethod
    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        """Build the network with random weights; raise whatever the builder does for a wrong argument."""

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """Return what a network takes, where `describe` is the one below."""
        raise NotImplementedError

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """Return the network with published weights, the default ones where `name` is None; raise SourceError."""
        raise SourceError(f"{reference} has no published weights; {OTHER_WEIGHTS}")

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """Describe a network of this family that has been built and filled."""
        preprocessing = self.preprocessing(reference, model, arguments)
        return OpenedModel(model, Origin(reference, dict(arguments)), preprocessing, weights, private=self.private)

    def build(self, reference: str, arguments: Arguments) -> nn.Module:
        """Build the network with random weights; raise SourceError for arguments that it does not take."""
        try:
            return self.construct(reference, arguments)
        except Exception as error:
            # Builders check little: a wrong argument may come to light anywhere in them, as any error.
            if isinstance(error, SourceError) or not arguments:
                raise
            hint = near_keyword(error, arguments)
            raise SourceError(f"{reference} does not take {dict(arguments)}: {reason_of(error, 200)}{hint}") from None

    def on_meta(self, reference: str, arguments: Arguments) -> nn.Module:
        """Build the network with its weights on the meta device: enough to compare keys and shapes."""
        with torch.random.fork_rng(devices=[]):
            try:
                with WithoutMemory(torch.empty):
                    return self.build(reference, arguments)
            except Exception:
                # Some run themselves while they are built (ssdlite), which needs numbers: these have theirs, a gigabyte
                # at most. What is wrong with the arguments is wrong again.
                with WithinMemory():
                    return self.build(reference, arguments)

    def build_unset(self, reference: str, arguments: Arguments) -> nn.Module:
        """Build the network with unset weights, to load a state dict into: no memory is taken before that is done."""
        model = self.on_meta(reference, arguments)
        stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        every = [tensor for module in model.modules() for tensor in list_tensors(dict(vars(module)))]
        unset = {id(tensor) for tensor in every if tensor.is_meta}
        if not unset <= stored:
            # What no state dict brings has to be computed.
            with torch.random.fork_rng(devices=[]):
                return self.build(reference, arguments)
        return allocated(model) if unset else model

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        """Find the arguments that a state dict shows, such as class count and input channels, and what differs then."""
        for match in matches(shapes_of(state)):
            if match.reference == reference:
                guess = {**match.arguments, **arguments}
                return Fit(guess, state, compare(self.on_meta(reference, guess), state))
        # What has been edited, so that its keys are not the table's, may still be explained by the arguments alone.
        plain = self.on_meta(reference, arguments)
        difference = compare(plain, state)
        guess = {**self._guess(plain, difference), **arguments}
        if guess != dict(arguments):
            with contextlib.suppress(SourceError):
                guessed = compare(self.on_meta(reference, guess), state)
                if not guessed:
                    return Fit(guess, state, guessed)
        return Fit(dict(arguments), state, difference)

    def _guess(self, model: nn.Module, difference: Difference) -> dict[str, Any]:
        """Return arguments that would explain how a state dict differs from the network as it is built by default."""
        classes, channels = set(), set()
        for _, have, want in difference.shapes:
            if have and have[1:] == want[1:]:
                classes.add(have[0])
            if len(have) == len(want) == 4 and have[0] == want[0] and have[2:] == want[2:]:
                channels.add(have[1])
        found = {"num_classes": classes, self.channels: channels}
        return {name: values.pop() for name, values in found.items() if len(values) == 1}


def package(name: str) -> Any:
    """Import a package that only one family needs, or a part of it; raise SourceError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        whole = name.partition(".")[0]
        what = f"{whole} cannot be imported: {error}; install it again"
        if error.name == whole:
            what = f"models of {whole}: need {whole}, which is not installed; install it"
        raise SourceError(f"{what}: pip install 'asymswap[{whole}]'") from None


def near_keyword(error: BaseException, arguments: Arguments) -> str:
    """Name, for a message, what is close to an argument that a builder has handed on to a callable without it."""
    said = re.search(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or said is None or said[2] not in arguments:
        return ""
    # The error is raised where the call is, and names what was called.
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    for given in (*frame.f_locals.values(), *frame.f_globals.values()):
        value = given.func if isinstance(given, functools.partial) else given
        called = [vars(one).get("__init__") for one in value.__mro__] if isinstance(value, type) else [value]
        for one in called:
            if isinstance(one, FunctionType) and one.__qualname__ == said[1]:
                takes = [name for name in inspect.signature(one).parameters if name != "self"]
                return near_names(said[2], takes) or f"; it takes {', '.join(takes)}"
    return ""


def check_weights(what: str, name: str, known: Collection[str]) -> None:
    """Raise SourceError for published weights that there are not, with near names or all of them."""
    if name not in known:
        hint = near_names(name, known) or f"; known: {listed([*known], 8) or 'none'}"
        raise SourceError(f"{what} has no weights {name!r}, no FILE of that name either{hint}")


def check_arguments(what: str, arguments: Arguments) -> None:
    """Refuse arguments that choose weights: a stored reference could read other files, or download some."""
    for name in arguments:
        if name.startswith(("weights", "pretrained")) or name in ("progress", "cache_dir", "checkpoint_path"):
            raise SourceError(f"{name!r} is not an argument for {what}; choose weights with `weights=…`")


def from_weights(opened: OpenedModel) -> OpenedModel:
    """Return the model with its preprocessing marked as known from published weights."""
    known = replace(opened.preprocessing, normalization_from="weights", size_from="weights")
    return replace(opened, preprocessing=known)


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of a network's input, as its first conv has it."""
    # The conv that is defined first may not run first: if it has many channels, one that takes 1 or 3 is believed.
    channels = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)] or [3]
    return channels[0] if channels[0] <= 4 else next((one for one in channels if one in (1, 3)), channels[0])
