"""The models of timm by name, where it is installed: built, filled with published weights, described, built again.

A name is that of an architecture, `resnet50`, or of one with the tag of published weights, `resnet50.a1_in1k`: the
weights say how many classes there are and how large an image is. timm reads weights from the cache of Hugging Face's
hub or of torch.hub, or downloads them into it; it unpickles with torch's restricted unpickler.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import socket
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from types import ModuleType
from typing import Any

from torch import nn

from asymswap.errors import SourceError, near_names
from asymswap.fileformats.state_dict import State, compare
from asymswap.types import Preprocessing

PREFIX = "timm:"

# Where weights are looked for and what is made of them is for --weights to say: as arguments of a stored reference
# these could make a checkpoint read other files, or download some.
_CHOSEN_ELSEWHERE = ("cache_dir", "checkpoint_path")
# Errors of a library that downloads are of its own classes, which are no errors of the system.
_DOWNLOADERS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


def exact_hint(name: str) -> str:
    """For a message: that timm has a model of this very name, where timm is installed; nothing otherwise."""
    architecture = name.partition(".")[0]
    # To a mistyped name timm, which takes seconds to load, has nothing to say unless it is there.
    if not architecture or importlib.util.find_spec("timm") is None or not _timm().is_model(architecture):
        return ""
    return f"; timm has one: {PREFIX}{name}"


def split(name: str) -> tuple[str, str | None]:
    """The architecture and the tag of published weights in a name."""
    architecture, _, tag = name.partition(".")
    return architecture, tag or None


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model with random weights, downloading nothing.

    Raises SourceError where timm is not installed, has no such model, or cannot build it so.
    """
    return _create(name, arguments, pretrained=False)


def build_pretrained(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The model with published weights, the tag of these, and what timm has to remark on them.

    Raises SourceError where there are none, where they are neither in a cache nor can be downloaded, or do not fit.
    """
    _check_name(name)
    config = _config(name)
    if config is None or not config.has_weights:
        raise SourceError(
            f"timm's {name} has no published weights; use --weights FILE, or --weights none for random ones"
        )
    full = f"{split(name)[0]}.{config.tag}" if config.tag else name
    with _listening() as remarks:
        try:
            file = _in_hubs_cache(config)
            if file is None and config.hf_hub_id:
                _find_hub()
            own = {} if file is None else {"pretrained_cfg_overlay": {"file": file}}
            model = _create(full, arguments, pretrained=True, **own)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(_why_no_weights(full, arguments, error)) from None
    classes = arguments.get("num_classes", config.num_classes)
    if classes not in (config.num_classes, 0):
        remarks.append(f"the classifier is random: the published weights tell {config.num_classes} classes apart")
    return model, config.tag or "DEFAULT", tuple(remarks)


def settled(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those that timm takes from the tag's description, which another version of timm may change."""
    config = _config(name)
    own: dict[str, Any] = {}
    if config is not None:
        if config.num_classes >= 0:
            own["num_classes"] = config.num_classes
        if config.input_size[0] != 3:
            own["in_chans"] = config.input_size[0]
        if config.fixed_input_size:
            own["img_size"] = list(config.input_size[1:])
    return {**own, **arguments}


def preprocessing(model: nn.Module, arguments: Mapping[str, Any]) -> Preprocessing:
    """How timm's own evaluation prepares an image for a model that it has built with these arguments."""
    _timm()
    from timm.data import resolve_data_config

    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    data = resolve_data_config({}, pretrained_cfg=config)
    channels, *size = data["input_size"]
    channels = arguments.get("in_chans", channels)
    fixed = arguments.get("img_size")
    height, width = size if fixed is None else (fixed, fixed) if isinstance(fixed, int) else fixed
    mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
    own = len(mean) == len(std) == channels
    return Preprocessing(
        channels=channels,
        size=(height, width),
        mean=mean if own else (0.5,) * channels,
        std=std if own else (0.5,) * channels,
        # What is not cropped is squeezed to its size at once.
        resize=math.floor(max(height, width) / data["crop_pct"]) if data["crop_mode"] == "center" else None,
        interpolation=data["interpolation"],
        normalization_from="family" if own else "assumed",
        size_from="family",
    )


def with_current_keys(state: State, model: nn.Module) -> State:
    """A published state dict under timm's own keys, where it fits the model so; unchanged where it does not.

    timm's files are partly in the form in which the model's authors had published them.
    """
    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None or not compare(model, state):
        return state
    try:
        converted = convert(dict(state), model)
    except Exception:
        # It looks for what it knows, and may fall over anything else.
        return state
    return state if compare(model, converted) else converted


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifying layers; none for other models."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def made_by_timm(model: nn.Module) -> str | None:
    """The name of the architecture that a module says it is one of, if timm defines its class."""
    config = getattr(model, "pretrained_cfg", None)
    if "timm" not in sys.modules or not type(model).__module__.startswith("timm.") or not isinstance(config, Mapping):
        return None
    name = config.get("architecture")
    return name if isinstance(name, str) and _timm().is_model(name) else None


def arguments_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments with which timm has built a model, as far as it remembers; None where JSON cannot hold them."""
    own = {"num_classes": getattr(model, "num_classes", None), "in_chans": getattr(model, "in_chans", None)}
    arguments = {key: value for key, value in own.items() if isinstance(value, int)}
    arguments |= getattr(model, "_model_args", {})
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError):
        return None
    return plain


def version() -> str:
    """The installed timm's version."""
    return str(_timm().__version__)


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise SourceError(
                f"timm cannot be imported: {error}; install it again: pip install 'asymswap[timm]'"
            ) from None
        raise SourceError(
            f"models of {PREFIX} need timm, which is not installed; install it: pip install 'asymswap[timm]'"
        ) from None
    return timm


def _registry() -> ModuleType:
    _timm()
    import timm.models

    registry: ModuleType = timm.models
    return registry


def _config(name: str) -> Any:
    """timm's description of the weights of a name, or None where it has none."""
    return _registry().get_pretrained_cfg(name)


def _check_name(name: str) -> None:
    """Raise SourceError, with near names, for an architecture or a tag that the installed timm lacks."""
    architecture, tag = split(name)
    timm, registry = _timm(), _registry()
    if not timm.is_model(architecture):
        hint = near_names(architecture, timm.list_models()) or "; timm.list_models() lists them"
        raise SourceError(f"timm {timm.__version__} has no model {architecture!r}{hint}")
    renamed = registry.get_deprecated_models()
    if architecture in renamed:
        now = f"; its name is now {PREFIX}{renamed[architecture]}" if renamed[architecture] else ", it was removed"
        raise SourceError(f"timm {timm.__version__} has no model {architecture!r} any more{now}")
    tags = [other.partition(".")[2] for other in registry.get_arch_pretrained_cfgs(architecture)]
    if tag is not None and tag not in tags:
        known = [other for other in tags if other]
        hint = near_names(tag, known) or f"; known: {', '.join(known[:8]) or 'none'}"
        raise SourceError(f"timm's {architecture} has no weights {tag!r}, no FILE of that name either{hint}")


def _create(name: str, arguments: Mapping[str, Any], pretrained: bool, **own: Any) -> nn.Module:
    _check_name(name)
    for key in arguments:
        if key.startswith("pretrained") or key in _CHOSEN_ELSEWHERE:
            raise SourceError(f"{key!r} is not an argument for timm's {name}; choose weights with --weights")
    # Both TOML and JSON know lists only, where timm asks for a pair or a tuple of sizes.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = _timm().create_model(name, pretrained=pretrained, **given, **own)
    except Exception as error:
        if pretrained:
            raise
        with_what = f" with {dict(arguments)}" if arguments else ""
        raise SourceError(f"timm cannot build {name}{with_what}: {_reason(error)}") from None
    return model


def _in_hubs_cache(config: Any) -> str | None:
    """The file of these weights in the hub's cache.

    The hub's client would ask the network first whether there is a newer one, and where there is no network it would
    ask for half a minute.
    """
    from huggingface_hub import try_to_load_from_cache

    name = config.hf_hub_filename or "model.safetensors"
    if not config.hf_hub_id or config.custom_load or not name.endswith(".safetensors"):
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    found = try_to_load_from_cache(repository, name, revision=revision or None)
    return found if isinstance(found, str) else None


def _find_hub() -> None:
    """Raise OSError at once where the hub's address is not known, for which its client would ask again and again."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Keep timm and the hub's client from writing to the screen; what timm warns of is for the report to tell."""
    remarks: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remarks.append(" ".join(record.getMessage().split()).rstrip("."))

    own, hub, listener = logging.getLogger("timm"), logging.getLogger("huggingface_hub"), Listener(logging.WARNING)
    before = own.propagate, hub.level
    own.addHandler(listener)
    own.propagate = False
    hub.setLevel(logging.CRITICAL)
    try:
        with _no_bars():
            yield remarks
    finally:
        own.removeHandler(listener)
        own.propagate = before[0]
        hub.setLevel(before[1])


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Let the hub's client draw its progress on a terminal only."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _why_no_weights(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    """Why a model could not be had with its weights, for a message; raises SourceError where it can't be had at all."""
    chain = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    where = "use --weights none for random weights or --weights FILE for a state_dict"
    if any(isinstance(e, OSError | HTTPException) or type(e).__module__.startswith(_DOWNLOADERS) for e in chain):
        # The hub's client wraps what has happened in a paragraph of its own.
        told = _reason(getattr(error, "reason", None) or error.__cause__ or error)
        return f"the weights {name} of timm are in no cache and cannot be downloaded ({told}); {where}"
    # The arguments may be to blame: then it can't be built without weights either.
    build(name, arguments)
    return f"cannot load the weights {name} of timm: {_reason(error)}; {where}"


def _reason(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
