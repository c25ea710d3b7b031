"""The models of timm by name, where it is installed: build them, fill them with published weights, describe them.

A name is an architecture, `resnet50`, or an architecture with the tag of published weights, `resnet50.a1_in1k`: the
weights say how many classes there are and how large an image is. timm reads weights from the cache of Hugging Face's
hub or of torch.hub, or downloads them into it; it unpickles with torch's restricted unpickler.
"""

import contextlib
import json
import logging
import math
import socket
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.client import HTTPException
from logging.handlers import MemoryHandler
from typing import Any

from torch import nn

from asymswap.errors import SourceError, near_names, reason_of
from asymswap.fileformats.state_dict import Difference, State, compare
from asymswap.models import family
from asymswap.models.family import Arguments, Family, Fit, package
from asymswap.models.opened import OpenedModel
from asymswap.models.preprocessing import with_channels
from asymswap.types import Origin, Preprocessing

PREFIX = "timm:"

# Errors of a library that downloads are of its own classes, which are no errors of the system.
_DOWNLOADERS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


class Timm(Family):
    """`timm:NAME`, where the name may hold the tag of published weights: `timm:resnet50.a1_in1k`, or with an @."""

    private = False
    channels = "in_chans"

    def canonical(self, reference: str) -> str | None:
        """Return the reference itself: whether timm has such a model only timm knows, which takes seconds to load."""
        return reference if reference.startswith(PREFIX) else None

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        _check(_name(reference), arguments)
        return _create(_name(reference), arguments)

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """Return the model with published weights, and timm's remarks on them as notes; raise SourceError."""
        architecture, _, tag = _name(reference).partition(".")
        named = "" if name in (None, "DEFAULT") else name
        if tag and named not in ("", tag):
            raise SourceError(f'{reference} names weights and `weights="{named}"` others; give one of them')
        full = ".".join(filter(None, (architecture, named or tag)))
        _check(full, arguments)
        config = package("timm").models.get_pretrained_cfg(full)
        if config is None or not config.has_weights:
            return super().weights(f"timm's {full}", name, arguments)
        full = f"{architecture}.{config.tag}" if config.tag else full
        with _listening() as remarks:
            try:
                model = _create(full, arguments, pretrained=True, **_in_hubs_cache(config))
            except Exception as error:
                chain = (error, error.__cause__, error.__context__)
                expected = (OSError, HTTPException)
                if any(isinstance(e, expected) or type(e).__module__.startswith(_DOWNLOADERS) for e in chain):
                    # The hub's client wraps what has happened in a paragraph of its own.
                    reason = reason_of(getattr(error, "reason", None) or error.__cause__ or error)
                    what = f"the weights {full} of timm are in no cache and cannot be downloaded ({reason})"
                else:
                    # The arguments may be to blame: then it can't be built without weights either.
                    self.build(PREFIX + full, arguments)
                    what = f"cannot load the weights {full} of timm: {reason_of(error)}"
                raise SourceError(f"{what}; {family.OTHER_WEIGHTS}") from None
        classes = arguments.get("num_classes", config.num_classes)
        if classes not in (config.num_classes, 0):
            remarks.append(f"the classifier is random: the published weights tell {config.num_classes} classes apart")
        opened = replace(self.describe(model, PREFIX + full, arguments, config.tag or "DEFAULT"), notes=tuple(remarks))
        return family.from_weights(opened) if opened.preprocessing.normalization_from == "family" else opened

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """Describe a filled model; what follows from the tag is stored, which another version of timm may not know."""
        name = _name(reference)
        return super().describe(model, PREFIX + name.partition(".")[0], _settled(name, arguments), weights)

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """Return how timm's own evaluation prepares an image for a model that it has built with these arguments."""
        config = getattr(model, "pretrained_cfg", None) or {}
        data = package("timm.data").resolve_data_config({}, pretrained_cfg=config)
        channels, *size = data["input_size"]
        fixed = arguments.get("img_size")
        height, width = size if fixed is None else (fixed, fixed) if isinstance(fixed, int) else fixed
        mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
        # An image that is not cropped is resized to its final size at once.
        resize = math.floor(max(height, width) / data["crop_pct"]) if data["crop_mode"] == "center" else None
        known = Preprocessing(len(mean), (height, width), mean, std, resize, data["interpolation"])
        known = replace(known, normalization_from="family", size_from="family")
        return with_channels(known, arguments.get("in_chans", channels))

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        """Fit as any family does; some of timm's files are in the form in which the model's authors published them."""
        plain = self.on_meta(reference, arguments)
        convert = getattr(sys.modules.get(type(plain).__module__), "checkpoint_filter_fn", None)
        if convert is not None and compare(plain, state):
            # It looks for what it knows, and may fall over anything else.
            with contextlib.suppress(Exception):
                converted = convert(dict(state), plain)
                state = state if compare(plain, converted) else converted
        return super().fit(reference, arguments, state)

    def _guess(self, model: nn.Module, difference: Difference) -> dict[str, Any]:
        guess = super()._guess(model, difference)
        names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        heads = (names,) if isinstance(names, str) else tuple(names)
        if heads and difference.missing and all(key.rpartition(".")[0] in heads for key in difference.missing):
            # A backbone, as timm writes it for those who want its features.
            guess["num_classes"] = 0
        return guess

    def origin_of(self, model: nn.Module) -> Origin | None:
        """Return from what timm builds this very structure again, for a module that timm has built; else None."""
        name = made_by_timm(model)
        if name is None:
            return None
        own = {key: getattr(model, key, None) for key in ("num_classes", "in_chans")}
        given = {key: value for key, value in own.items() if isinstance(value, int)} | getattr(model, "_model_args", {})
        try:
            arguments = _settled(name, json.loads(json.dumps(given, allow_nan=False)))
            again = self.on_meta(PREFIX + name, arguments)
        except (TypeError, ValueError, SourceError):
            # JSON cannot hold the arguments, or timm does not take them again.
            return None
        same = _outline(model) == _outline(again) and not compare(model, again.state_dict())
        return Origin(PREFIX + name, arguments) if same else None


def _outline(model: nn.Module) -> dict[str, Any]:
    """Return the class of every module, the names of its attributes, and the plain ones among them."""
    plain = (bool, int, float, str, tuple, type(None))
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: repr(value) if isinstance(value, plain) else "" for key, value in vars(module).items()}
        found[name] = (type(module), own | {"training": ""})
    return found


def _settled(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Add the arguments that timm takes from the tag's description, which another version of timm may change."""
    config = package("timm").models.get_pretrained_cfg(name)
    if config is None:
        return dict(arguments)
    own = {"num_classes": config.num_classes} if config.num_classes >= 0 else {}
    if config.input_size[0] != 3:
        own["in_chans"] = config.input_size[0]
    if config.fixed_input_size:
        own["img_size"] = list(config.input_size[1:])
    return {**own, **arguments}


def _name(reference: str) -> str:
    """Return the model's name in a reference, the tag of weights behind a dot, as timm has it."""
    return reference.removeprefix(PREFIX).replace("@", ".")


def made_by_timm(model: nn.Module) -> str | None:
    """Return the name of a module's architecture, if timm defines its class; else None."""
    config = getattr(model, "pretrained_cfg", None)
    if "timm" not in sys.modules or not type(model).__module__.startswith("timm.") or not isinstance(config, Mapping):
        return None
    name = config.get("architecture")
    return name if isinstance(name, str) and package("timm").is_model(name) else None


def _check(name: str, arguments: Arguments) -> None:
    """Raise SourceError for arguments that choose weights, and for a name or a tag that the installed timm lacks."""
    family.check_arguments(f"timm's {name}", arguments)
    architecture, _, tag = name.partition(".")
    installed = package("timm")
    if not installed.is_model(architecture):
        hint = near_names(architecture, installed.list_models()) or "; timm.list_models() lists them"
        raise SourceError(f"timm {installed.__version__} has no model {architecture!r}{hint}")
    renamed = installed.models.get_deprecated_models()
    if architecture in renamed:
        now = f"; its name is now {PREFIX}{renamed[architecture]}" if renamed[architecture] else ", it was removed"
        raise SourceError(f"timm {installed.__version__} has no model {architecture!r} any more{now}")
    if tag:
        tags = [other.partition(".")[2] for other in installed.models.get_arch_pretrained_cfgs(architecture)]
        family.check_weights(f"timm's {architecture}", tag, [*filter(None, tags)])


def _create(name: str, arguments: Arguments, **own: Any) -> nn.Module:
    # Both TOML and JSON know lists only, where timm asks for a pair or a tuple of sizes.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    with warnings.catch_warnings(action="ignore"):
        return package("timm").create_model(name, **given, **own)  # type: ignore[no-any-return]


def _in_hubs_cache(config: Any) -> dict[str, Any]:
    """Name the file of these weights in the hub's cache, where its client would first ask the network for a newer."""
    name = config.hf_hub_filename or "model.safetensors"
    if not config.hf_hub_id:
        return {}
    if not config.custom_load and name.endswith(".safetensors"):
        repository, _, revision = config.hf_hub_id.partition("@")
        found = package("huggingface_hub").try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return {"pretrained_cfg_overlay": {"file": found}}
    find_hub()
    return {}


def find_hub() -> None:
    """Raise OSError at once where the hub's address is not known, for which its client would ask again and again."""
    constants = package("huggingface_hub.constants")
    if not constants.HF_HUB_OFFLINE and not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Keep the hub's client from writing to the screen, and collect timm's warnings for the report."""
    remarks: list[str] = []
    own, hub, listener = logging.getLogger("timm"), logging.getLogger("huggingface_hub"), MemoryHandler(1000)
    listener.setLevel(logging.WARNING)
    with contextlib.ExitStack() as ending:
        ending.callback(hub.setLevel, hub.level)
        hub.setLevel(logging.CRITICAL)
        own.addHandler(listener)
        ending.callback(own.removeHandler, listener)
        yield remarks
    remarks += [" ".join(record.getMessage().split()).rstrip(".") for record in listener.buffer]
