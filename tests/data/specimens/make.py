"""Make specimens: a file of each kind that asymswap writes, for tests/test_specimens.py.

    python tests/data/specimens/make.py FOLDER [NAME ...]

Run only to add specimens of a new format or a new kind, all or those of the names given, into a new folder beside the
old ones. What exists is never overwritten: old files are there to be read by later versions as they were written.

FOLDER holds, as far as they were asked for:

    checkpoints/     converted and fused networks; their weights have been moved, so that no offset and no norm is idle
    plan.json        with the recipe that made it, plan.toml
    evidence.*       what calibration saw (safetensors), of one small conv, and the recipe of it
    sweep.json       the state of a sweep, and its recipe, sweep.toml
    tuned.run/       a run of finetune that was interrupted in its second epoch
    expected.*       inputs and outputs (safetensors), and in its metadata what else the files must give

Outputs are those of the networks in memory, before they are written. Only the best and last checkpoint of a run are
written before anybody could ask them; their outputs are those of the files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import asymswap

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "helpers"))

import specimen_nets as nets  # noqa: E402

RULE = '[[rules]]\nmatch = {{ kernel = {{ min = "{}" }} }}\nswap = {{ kind = {} }}\noptional = true\n'
SWAPS = {
    "separable": '"separable", rank = 2',
    "separable-relu": '"separable", rank = 2, between = "relu", allow_growth = true',
    "separable-bn": '"separable", rank = 2, between = "bn", allow_growth = true',
    "separable-bn-relu": '"separable", rank = 2, between = "bn-relu", allow_growth = true',
    "low-rank": '"low-rank", rank = 2',
    "cross": '"cross", bias = true',
    "acb": '"acb", bn = "shared"',
    "branches": '"branches", branches = ["1x1", "identity?", "edge", "pair", "1x11"], bn = "branch", start = "share"',
    "acb-branch": '"acb", bn = "branch", eps = 0.001, momentum = "cumulative"',
    "offset": '"offset", limit = 1.5',
    "weighted-offset": '"weighted-offset", limit = 0.5',
    "predicted-offset": '"predicted-offset"',
    "predicted-offset-mask": '"predicted-offset", mask = true, offset_groups = 2',
    "resized": '"resized", kernel = "5x5", bias = true',
}
PLAN = """
[[rules]]
match = { names = "conv1" }
swap = { kind = "acb", bn = "branch" }

[[rules]]
match = { names = "layer1.0.*", kernel = "3x3" }
swap = { kind = "separable", ratio = 0.5 }

[[rules]]
match = { names = "layer1.1.*", kernel = "3x3" }
swap = { kind = "weighted-offset" }

[[rules]]
match = { names = "layer2.0.conv1" }
swap = { kind = "predicted-offset", mask = true }

[[rules]]
match = { names = "layer2.0.conv2" }
keep = true

[[rules]]
match = { names = "layer2.1.*", kernel = "3x3" }
swap = { kind = "cross" }
"""
EVIDENCE = """
[[rules]]
match = { names = "conv1" }
swap = { kind = "separable", rank = 2 }
"""
SWEEP = """
[[rules]]
match = { kernel = "3x3", in_channels = { min = 16 } }
swap = { kind = "separable" }
"""
SWEEP_OPTIONS = ("digits-resnet", "--recipe", "sweep.toml", "--evaluate", "digits", "-o", "sweep.json")
BUDGETS = "0.6,0.4"
TRAINING = {"epochs": 2, "batch_size": 256, "lr": 0.002, "ema": 0.5, "save_every": 4}
"""Twelve steps, six an epoch, at small learning rates: whatever a processor rounds stays small."""


class Made:
    """What a folder is to hold beside its files."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.told: dict[str, Any] = {"checkpoints": {}}

    def add(self, name: str, model: nn.Module, size: tuple[int, int, int]) -> None:
        """What a network gives for an input of this size."""
        x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            self.tensors |= {f"{name}/input": x, f"{name}/output": model.eval()(x)}

    def checkpoint(
        self, name: str, made: asymswap.Conversion | asymswap.Fusion, net: str | None, size: tuple[int, int, int]
    ) -> None:
        """Write a checkpoint in both forms; `net` builds the network where the file does not say how."""
        self.add(name, made.model, size)
        self.told["checkpoints"][name] = {"net": net, "keys": list(made.model.state_dict())}
        Path("checkpoints").mkdir(exist_ok=True)
        for suffix in ("pt", "safetensors"):
            path = f"checkpoints/{name}.{suffix}"
            if isinstance(made, asymswap.Fusion):
                asymswap.save_fused(made, path)
            else:
                asymswap.save(made, path)


def seen(net: nn.Module) -> nn.Module:
    """The network with batch norms that have seen something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.running_mean, -0.3), (module.running_var, 0.5), (module.weight, 0.5)):
                    assert tensor is not None
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return net.eval()


def moved(made: asymswap.Conversion) -> asymswap.Conversion:
    """The conversion with its weights somewhere else, as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in (*made.model.named_parameters(), *made.model.named_buffers()):
            if tensor.is_floating_point() and name in made.model.state_dict():  # fixed filters stay what they are
                # Offsets far enough for their limit to be felt.
                scale, low = (2.0, 0.5) if name.endswith("raw_offsets") else (0.1, 0.0)
                tensor.add_(scale * (torch.rand(tensor.shape, generator=generator) - low))
    return made


def converted(net: nn.Module, swap: str, recipe: str | None = None) -> asymswap.Conversion:
    if recipe is None:
        least = "1x1" if swap == SWAPS["low-rank"] else "3x3"
        Path("swap.toml").write_text(RULE.format(least, swap), encoding="utf-8")
    made = asymswap.convert(asymswap.open_model(seen(net), input_size=nets.SIZE), recipe or "swap.toml")
    Path("swap.toml").unlink(missing_ok=True)
    return moved(made)


def of_kind(name: str) -> Callable[[Made], None]:
    return lambda made: made.checkpoint(name, converted(nets.Net(), SWAPS[name]), "Net", nets.SIZE)


def acnet(made: Made) -> None:
    """By the recipe that users take; the batch norms of the network go into the branches."""
    conversion = converted(nets.Net(), "", "acnet-branch-bn")
    assert any(swap.absorbs for swap in conversion.plan.swaps)
    made.checkpoint("acnet-branch-bn", conversion, "Net", nets.SIZE)


def twice(made: Made) -> None:
    """Two plans in one file."""
    one, other = '"separable", rank = 2', '"acb", bn = "branch"'
    rule = '[[rules]]\nmatch = {{ names = "{}" }}\nswap = {{ kind = {} }}\n'
    Path("one.toml").write_text(rule.format("stem", one), encoding="utf-8")
    Path("other.toml").write_text(rule.format("grouped", other), encoding="utf-8")
    network = nn.Sequential()
    for name, layer in nets.Net().named_children():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            network.add_module(name, layer)
    asymswap.save(asymswap.convert(asymswap.open_model(seen(network), input_size=nets.SIZE), "one.toml"), "one.pt")
    conversion = moved(asymswap.convert(asymswap.open_model("one.pt", input_size=nets.SIZE), "other.toml"))
    for name in ("one.toml", "other.toml", "one.pt"):
        Path(name).unlink()
    made.checkpoint("twice", conversion, None, nets.SIZE)


def extra(made: Made) -> None:
    made.checkpoint("extra-state", converted(nets.ExtraNet(nets.extra_state()), SWAPS["acb"]), "ExtraNet", nets.SIZE)


def tied(made: Made) -> None:
    made.checkpoint("tied", converted(nets.TiedNet(), SWAPS["separable"]), "TiedNet", nets.SIZE)


def structure(made: Made) -> None:
    made.checkpoint("structure", converted(nets.structure(), SWAPS["separable"]), None, nets.SIZE)


def fused(made: Made) -> None:
    """Into the convs and batch norms that were, and into convs with larger kernels."""
    for name, swap in (("fused", "acb-branch"), ("fused-offset", "weighted-offset")):
        conversion = converted(nets.Net(), SWAPS[swap])
        made.checkpoint(name, asymswap.fuse(asymswap.open_model(conversion, arch=nets.Net())), "Net", nets.SIZE)


def digits(made: Made) -> None:
    """Of a network that its reference builds."""
    made.checkpoint(
        "digits-resnet", asymswap.convert("digits-resnet", "3x3-only", overrides={"rank": 1}), None, (1, 8, 8)
    )


def plan(made: Made) -> None:
    Path("plan.toml").write_text(PLAN, encoding="utf-8")
    command("convert", "digits-resnet", "--recipe", "plan.toml", "--dry-run", "--write-plan", "plan.json")
    made.add("plan", asymswap.convert("digits-resnet", "plan.toml").model, (1, 8, 8))


def evidence(made: Made) -> None:
    Path("evidence.toml").write_text(EVIDENCE, encoding="utf-8")
    wanted = asymswap.Calibration("digits", images=64, cache=Path("evidence.safetensors"), sequential=False)
    made.add("evidence", asymswap.convert("digits-resnet", "evidence.toml", calibration=wanted).model, (1, 8, 8))


def sweep(made: Made) -> None:
    Path("sweep.toml").write_text(SWEEP, encoding="utf-8")
    command("sweep", *SWEEP_OPTIONS, "--macs", BUDGETS)
    made.told["sweep"] = {"options": SWEEP_OPTIONS, "budgets": [float(text) for text in BUDGETS.split(",")]}


class Interrupt:
    """Ends a training, as its user might, two steps after a state was saved."""

    def begin(self, outset: Any) -> None:
        pass

    def step(self, row: Any) -> None:
        if row.step == 10:
            raise KeyboardInterrupt

    def epoch(self, row: Any) -> None:
        pass


def finetune(made: Made) -> None:
    """With the checkpoint that it starts from, checkpoints/digits-resnet.pt."""
    start, training = "checkpoints/digits-resnet.pt", asymswap.Training(**TRAINING)  # type: ignore[arg-type]
    if not Path(start).exists():
        digits(made)
    torch.set_num_threads(1)
    # The run that nothing interrupts: what it keeps is of its first epoch, so that its last weights are noted too.
    made.add("tuned", asymswap.finetune(start, "digits", training, output="whole.pt").model, (1, 8, 8))
    made.add("finished", asymswap.load("whole.run/last.pt"), (1, 8, 8))
    shutil.rmtree("whole.run")
    Path("whole.pt").unlink()
    with suppress(KeyboardInterrupt):
        asymswap.finetune(start, "digits", training, output="tuned.pt", callback=Interrupt())
    options = [text for name, value in TRAINING.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    made.told["finetune"] = {
        "options": [start, "--data", "digits", "--device", "cpu", *options, "-o", "tuned.pt"],
        "step": 8,
    }
    for name in ("best", "last"):
        model = asymswap.load(f"tuned.run/{name}.pt")
        made.add(name, model, (1, 8, 8))
        made.told["checkpoints"][name] = {"net": None, "keys": list(model.state_dict())}


MAKERS: dict[str, Callable[[Made], None]] = {
    **{name: of_kind(name) for name in SWAPS},
    "acnet-branch-bn": acnet,
    "twice": twice,
    "extra-state": extra,
    "tied": tied,
    "structure": structure,
    "fused": fused,
    "digits-resnet": digits,
    "plan": plan,
    "evidence": evidence,
    "sweep": sweep,
    "finetune": finetune,
}


def command(*arguments: str) -> None:
    """The command line of this checkout, in the folder of the draft."""
    subprocess.run([sys.executable, "-m", "asymswap", *arguments, "-q"], check=True)


def main(folder: Path, names: list[str]) -> None:
    """Make these specimens, or all, in a folder that must not exist."""
    if folder.exists():
        raise SystemExit(f"{folder} exists, and specimens are never overwritten: give the name of a new folder")
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        raise SystemExit(f"no specimen {unknown[0]!r}; there are {', '.join(MAKERS)}")
    with tempfile.TemporaryDirectory() as draft:
        os.chdir(draft)
        made = Made()
        for name in names or MAKERS:
            torch.manual_seed(0)
            MAKERS[name](made)
        save_file(made.tensors, "expected.safetensors", metadata={"specimens": json.dumps(made.told)})
        os.chdir(HERE)
        shutil.copytree(draft, folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(str(__doc__))
    main(HERE / sys.argv[1], sys.argv[2:])
