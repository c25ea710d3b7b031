"""Writes asymswap/fileformats/allowlist.txt: the classes that a pickled module may name.

These are the subclasses of nn.Module that torch.nn and torchvision define, by the names under which pickle finds
them, and nothing else: no function, no GraphModule, which is made from code that stands in the file, and no lazy
module, which has no weights yet and changes its class when it is run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import torchvision
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

OUT = Path(__file__).parents[1] / "asymswap" / "fileformats" / "allowlist.txt"
ROOTS = (nn.modules, torchvision.models, torchvision.ops)


def main() -> None:
    found = {"torch.nn.parallel.data_parallel.DataParallel"}
    for root in ROOTS:
        for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                own = inspect.isclass(value) and value.__module__ == module.__name__ and value.__qualname__ == name
                if own and issubclass(value, nn.Module) and not issubclass(value, fx.GraphModule | LazyModuleMixin):
                    found.add(f"{module.__name__}.{name}")
    OUT.write_text("".join(f"{name}\n" for name in sorted(found)), encoding="utf-8")
    print(f"{len(found)} classes -> {OUT}")


if __name__ == "__main__":
    main()
