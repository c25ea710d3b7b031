"""YOLO models of ultralytics: `ultralytics:yolov8n.yaml`, their own `.pt` files, and the network in a `YOLO` object.

Such a file is a pickle of the network, read as data: no class is imported from it. The network is built anew from its
yaml, whose rows may name layers alone, and which is kept as an argument, so that a checkpoint needs no other file. The
way back is a file that ultralytics reads, where blocks with swaps are of classes of this module: its folding of batch
norms, which reads `conv.weight`, leaves them alone.
"""

import copy
import itertools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import ops

from asymswap.checkpoint import MODULE_HEADER, Header, header_to_json, stored_in
from asymswap.errors import SourceError, listed, near_names, reason_of
from asymswap.fileformats.model_file import modules_in
from asymswap.fileformats.state_dict import State, compare
from asymswap.fileformats.torch_files import RawFile
from asymswap.graph.trace import find_convs
from asymswap.models.family import Arguments, Family, Fit, package
from asymswap.models.opened import OpenedModel
from asymswap.types import Origin, Preprocessing
from asymswap.utils.files import whole_file
from asymswap.utils.tensors import deep_copy

PREFIX = "ultralytics:"
_MOST_LAYERS, _MOST_WIDTH = 1_000, 100_000  # of a yaml, which a file may claim; the largest known have 60 and 2,048
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_ACTIVATION = re.compile(r"(?:torch\.)?nn\.(\w+)\(((?:\w+=)?[\w.-]*)\)")
_TRIED = "8."
_TASKS = ("detect", "segment", "pose", "obb", "classify")
_TAKES = ("num_classes", "channels", "task", "names", "size", "built_for", "fused", "yaml")


class Ultralytics(Family):
    """Networks of ultralytics; of the arguments `yaml` is the architecture, `names` its classes, `size` its images'.

    `num_classes` may differ from `built_for`, which the widths of the head follow: ultralytics keeps the hidden layers
    of the head where it trains for other classes. `fused`: it has folded the batch norms.
    """

    private = False
    channels = "channels"

    def canonical(self, reference: str) -> str | None:
        named = re.fullmatch(rf"{PREFIX}([\w./\\ -]*\w)", reference)
        return named and f"{PREFIX}{named[1]}" + ".yaml" * (not named[1].endswith((".yaml", ".yml")))

    def construct(self, reference: str, arguments: Arguments) -> nn.Module:
        tasks = package("ultralytics.nn.tasks")
        for unknown in [name for name in arguments if name not in _TAKES]:
            raise SourceError(f"{reference} does not take {unknown!r}; it takes {', '.join(_TAKES)}")
        config, names = arguments.get("yaml"), arguments.get("names")
        config = _checked(_yaml(reference) if config is None else config, reference)
        task = arguments.get("task") or tasks.guess_model_task(config)
        if task not in _TASKS:
            raise SourceError(f"{reference} is for the task {task!r}; asymswap builds those for {listed(_TASKS, 9)}")
        made = package("ultralytics").YOLO.task_map.fget(None)[task]["model"]  # it does not look at the object
        classes, built_for = arguments.get("num_classes"), arguments.get("built_for")
        channels = arguments.get("channels", config.get("channels", 3))
        model: Any = made(config, ch=channels, nc=built_for or classes, verbose=False)
        model.task = task
        if built_for and classes:
            _answer_(model, classes)
        if isinstance(names, Mapping) and len(names) == len(model.names):
            model.names = {int(number): str(name) for number, name in names.items()}
        if arguments.get("fused"):
            model.fuse(verbose=False)
        return model  # type: ignore[no-any-return]

    def weights(self, reference: str, name: str | None, arguments: Arguments) -> OpenedModel:
        """Return the network with random weights, for a yaml has no others."""
        if name is not None:
            return super().weights(reference, name, arguments)
        return self.describe(self.build(reference, arguments), reference, arguments, "random, as a yaml has none")

    def describe(self, model: nn.Module, reference: str, arguments: Arguments, weights: str) -> OpenedModel:
        """Describe the network with its whole yaml, so that it can be built again wherever its file lies."""
        opened = super().describe(model, reference, {**arguments, **_settled(model)}, weights)
        notes, version = opened.notes, str(package("ultralytics").__version__)
        if arguments.get("fused"):
            notes += ("ultralytics folded its batch norms before; to train on, convert the file from before that",)
        if not version.startswith(_TRIED):
            notes += (f"ultralytics {version} is installed; asymswap was tried with {_TRIED}x",)
        return replace(opened, notes=notes)

    def preprocessing(self, reference: str, model: nn.Module, arguments: Arguments) -> Preprocessing:
        """Return what ultralytics does: values of 0 to 1, at 640 x 640 (224 for classes) where the file has no size."""
        own: Any = model
        size, channels = arguments.get("size"), int(own.yaml.get("channels", 3))
        known = isinstance(size, int) and 0 < size < 10_000
        side: Any = size if known else 224 if getattr(own, "task", "") == "classify" else 640
        plain = Preprocessing(channels, (side, side), (0.0,) * channels, (1.0,) * channels, resize=side)
        return replace(plain, normalization_from="family", size_from="file" if known else "family")

    def fit(self, reference: str, arguments: Arguments, state: State) -> Fit:
        """Find out whether batch norms were folded; the numbers become float32, as ultralytics stores halves."""
        floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        if any(".conv." in key for key in state) and not any(".bn." in key for key in state):
            arguments = {**arguments, "fused": True}
        fit = super().fit(reference, arguments, floats)
        # The last convs of the classes, (classes, hidden, 1, 1): hidden layers for other classes than the yaml's.
        last = [shape for key, shape, _ in fit.difference.shapes if re.search(r"cv3\.\d\.2\.weight", key)]
        if last and last[0]:
            given = {**arguments, "num_classes": last[0][0], "built_for": last[0][1]}
            fit = Fit(given, floats, compare(self.on_meta(reference, given), floats))
        return fit

    def origin_of(self, model: nn.Module) -> Origin | None:
        """Return from what ultralytics builds this very structure again, for a module that it has built; else None."""
        if "ultralytics.nn.tasks" not in sys.modules or not isinstance(getattr(model, "yaml", None), Mapping):
            return None
        try:
            arguments = _settled(model)
            reference = PREFIX + _name(arguments["yaml"])
            fit = self.fit(reference, arguments, model.state_dict())
            again = self.on_meta(reference, fit.arguments)
        except (TypeError, ValueError, SourceError):
            return None
        # Whether activations write into their input changes no number, and is not the yaml's to say.
        first, second = (re.sub(r"(, )?inplace=\w+", "", str(network)) for network in (again, model))
        return Origin(reference, fit.arguments) if first == second and not fit.difference else None


class KeptConv(nn.Module):
    """A conv of ultralytics with a swap in it: what it was, by a class that ultralytics does not fold."""

    conv: nn.Module
    bn: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Take and return feature maps of N x C x H x W."""
        x = self.conv(x)
        return self.act(self.bn(x) if hasattr(self, "bn") else x)  # type: ignore[no-any-return]


class KeptBranches(nn.Module):
    """Parallel branches of ultralytics (RepConv, RepVGGDW) with a swap in one, which it does not fold either."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Take and return feature maps of N x C x H x W."""
        branches = [getattr(self, name, None) for name in ("conv", "conv1", "conv2", "bn")]
        return self.act(sum(branch(x) for branch in branches if branch is not None))  # type: ignore[no-any-return]


def named_in(value: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the reference and arguments of the network in what was read of a file; None for any other file."""
    for record in modules_in(value):
        held = record.state
        if record.name.startswith("ultralytics.") and isinstance(held.get("yaml"), dict):
            found = {key: held[key] for key in ("task", "names", "yaml") if key in held}
            for told in (held.get("args"), value.get("train_args") if isinstance(value, Mapping) else None):
                if isinstance(told, Mapping) and isinstance(told.get("imgsz"), int):
                    found["size"] = told["imgsz"]
            return PREFIX + _name(held["yaml"]), _plain(found)
    return None


def network_of(model: nn.Module) -> nn.Module:
    """Return the network in a `YOLO` object, any other module as it is; raise SourceError for one without weights."""
    if not any(f"{one.__module__}.{one.__name__}" == "ultralytics.engine.model.Model" for one in type(model).__mro__):
        return model
    inside = model.model
    if not isinstance(inside, nn.Module):
        raise SourceError(f"the {type(model).__name__} runs {inside}, an exported file; give the one of its .pt file")
    return inside


def header_in(model: nn.Module) -> Header | None:
    """Return the header that `save` has left on a network with swaps, which training by ultralytics keeps."""
    text = vars(model).get(MODULE_HEADER)
    stored = stored_in(RawFile({"asymswap": text, "state_dict": {}}), type(model).__name__) if text else None
    return None if stored is None else stored.header


def save(opened: OpenedModel, path: Path) -> None:
    """Write a network of ultralytics, swaps and all, as a `.pt` file that `YOLO(path)` reads; raise SourceError."""
    network = _kept_(deep_copy(opened.model), opened.header())
    version = package("ultralytics").__version__
    content = {"epoch": -1, "model": network, "ema": None, "train_args": {"task": network.task}, "version": version}
    with whole_file(path) as draft, draft.open("wb") as file:
        torch.save(content, file)


def load_yolo(path: Path) -> Any:
    """Return a `YOLO` object of a file that `save` has written, which trains on with the swaps in it."""

    class SwappedYOLO(package("ultralytics").YOLO):  # type: ignore[misc]
        def train(self, trainer: Any = None, **options: Any) -> Any:
            trainer = trainer or self._smart_load("trainer")
            return super().train(type(trainer.__name__, (_Keeping, trainer), {}), **options)

    return SwappedYOLO(str(path))


class _Keeping:
    """A trainer of ultralytics whose network gets the swaps of the one that it starts from."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Return the network for the data's classes, with all swaps, and all weights but those of other classes."""
        header = None if weights is None else header_in(weights)
        if header is None:
            return super().get_model(cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[no-any-return, misc]
        network: Any = deep_copy(weights).float()
        origin, data = header.origin, getattr(self, "data", {})
        if len(network.names) != data["nc"]:
            if {type(conv) for conv in _last_convs(network)} != {nn.Conv2d}:
                what = "its convs of the classes are swapped, or it has none; leave them out by `exclude`"
                raise SourceError(f"the network has {len(network.names)} classes and the data {data['nc']}: {what}")
            _answer_(network, data["nc"])
            origin = replace(origin, arguments={**origin.arguments, **_settled(network)})
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return _kept_(network.train(), replace(header, origin=origin))  # type: ignore[no-any-return]


def _kept_(network: Any, header: Header) -> Any:
    """Put blocks with swaps in them out of reach of ultralytics' folding, and leave the header on the network."""
    modules = package("ultralytics.nn.modules")
    plain = {name for name, (conv, _) in find_convs(network).items() if type(conv) is nn.Conv2d}
    for name, module in network.named_modules():
        if isinstance(module, modules.Conv) and f"{name}.conv" not in plain:
            if type(module) not in (modules.Conv, modules.DWConv):
                raise SourceError(f"{name}, a {type(module).__name__}, cannot hold a swap in a file of ultralytics")
            module.__class__ = KeptConv
            vars(module).pop("forward", None)
    for module in network.modules():
        branches = isinstance(module, modules.RepConv | modules.block.RepVGGDW)
        if branches and any(isinstance(child, KeptConv) for child in module.children()):
            module.__class__ = KeptBranches
    setattr(network, MODULE_HEADER, json.dumps(header_to_json(header)))
    return network


def _name(config: Mapping[str, Any]) -> str:
    """Return the file name of a yaml, where it is one that a reference can hold."""
    name = Path(str(config.get("yaml_file") or "")).name
    return name if re.fullmatch(r"[\w.-]+\.ya?ml", name) else "model.yaml"


def _settled(model: Any) -> dict[str, Any]:
    """Return the arguments that build the network's structure again."""
    found = {"yaml": model.yaml, "names": model.names, "task": getattr(model, "task", None)}
    built_for = model.yaml["nc"]
    classes = getattr([*model.model][-1], "nc", built_for)
    return _plain(found if classes == built_for else {**found, "num_classes": classes, "built_for": built_for})


def _last_convs(model: Any) -> list[Any]:
    """Return the convs that give the scores of a detector's classes, at each of its scales."""
    heads = [getattr([*model.model][-1], name, None) for name in ("cv3", "one2one_cv3")]
    return [branch[-1] for head in heads if isinstance(head, nn.ModuleList) for branch in head]  # type: ignore[index]


def _answer_(model: Any, classes: int) -> None:
    """Give a detector another number of classes, as ultralytics does: new last convs, all else as it is."""
    head = model.model[-1]
    for conv in _last_convs(model):
        conv.out_channels = classes
        conv.weight = nn.Parameter(conv.weight.new_empty(classes, *conv.weight.shape[1:]))
        conv.bias = nn.Parameter(conv.weight.new_empty(classes))
        conv.reset_parameters()
    head.nc, head.no = classes, head.no - head.nc + classes
    head.bias_init()
    model.names = {number: str(number) for number in range(classes)}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as a file holds them; raise SourceError for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(arguments, allow_nan=False))  # type: ignore[no-any-return]
    except (TypeError, ValueError, RecursionError) as error:
        raise SourceError(f"the yaml of the network is no plain data: {reason_of(error)}") from None


def _yaml(reference: str) -> dict[str, Any]:
    """Read the yaml that a reference names: a file, or one of the package's, with the letter of a size in its name."""
    name = reference.removeprefix(PREFIX)
    folder = Path(package("ultralytics").__file__).parent / "cfg" / "models"
    known = sorted({path.name for path in folder.rglob("*.yaml")})
    unscaled = re.sub(r"(\d+)([nslmx])(.*)", r"\1\3", Path(name).name)
    if not Path(name).is_file() and name not in known and unscaled not in known:
        sized = [re.sub(r"(\d+)(.*)", rf"\1{letter}\2", one) for one in known for letter in "nsmlx"]
        raise SourceError(f"ultralytics has no {name}, and no such file is here{near_names(name, sized)}")
    return package("ultralytics.nn.tasks").yaml_model_load(name)  # type: ignore[no-any-return]


def _checked(config: Any, reference: str) -> dict[str, Any]:
    """Return a copy of a yaml whose rows name layers alone; raise SourceError for any other."""
    # ultralytics looks names up among all that its module imports, calls what it finds, and evaluates the activation.
    found = copy.deepcopy(config) if isinstance(config, dict) else {}
    parts: list[Any] = [found.get("backbone"), found.get("head")]
    if not all(isinstance(part, list) and part for part in parts):
        raise SourceError(f"{reference} has no yaml with a backbone and a head")
    layers, repeats = package("ultralytics.nn.modules"), 0
    for row in itertools.chain(*parts):
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[1], int) or not isinstance(row[3], list):
            raise SourceError(f"the yaml of {reference} has a row that is not [from, number, module, arguments]: {row}")
        name, repeats = str(row[2]), repeats + max(row[1], 1)
        home, _, last = name.rpartition(".")
        owner = {"": layers, "nn": nn, "torchvision.ops": ops}.get(home)
        made = getattr(owner, last, None)
        allowed = isinstance(made, type) and issubclass(made, nn.Module) and last != "TorchVision"
        if not allowed and name != "Silence":
            known = [one for one in dir(layers) if isinstance(getattr(layers, one), type)]
            raise SourceError(f"the yaml of {reference} names {name!r}, which is no layer{near_names(name, known)}")
    numbers = _NUMBER.findall(str([value for value in found.values() if not isinstance(value, str)]))  # no file's name
    if repeats > _MOST_LAYERS or max(map(float, numbers), default=0) > _MOST_WIDTH:
        raise SourceError(f"the yaml of {reference} asks for more layers or channels than any network has")
    activation = found.get("activation")
    plain = _ACTIVATION.fullmatch(str(activation)) if activation else None
    if activation and (plain is None or not isinstance(getattr(nn, plain[1], None), type)):
        raise SourceError(f"the yaml of {reference} has the activation {activation!r}; it must be one of torch.nn's")
    return found
