"""What the examples of a page expect of the reader: files, and names that the Python code uses.

    python tests/helpers/prepared.py README.md FOLDER

writes the files into a folder that exists; `yours(page)` is the Python code that defines the names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def _resnet18(folder: Path, name: str = "model.pt") -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18(num_classes=10).state_dict(), folder / name)


def _cifar(folder: Path, name: str = "model.pt") -> nn.Module:
    from asymswap.models.networks import BUILDERS

    torch.manual_seed(0)
    network = BUILDERS["resnet20"]().eval()
    torch.save(network.state_dict(), folder / name)
    return network


def _digits(folder: Path, name: str = "model.pt") -> None:
    from safetensors.torch import load_file

    from asymswap.models.networks import DIGITS_WEIGHTS

    torch.save(load_file(DIGITS_WEIGHTS), folder / name)


def _photos(folder: Path, train: int = 12, test: int = 6) -> None:
    """Pictures of digits, ten folders of classes for training and for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        own = images[labels == label][: train + test].reshape(-1, 8, 8)
        for number, pixels in enumerate(own):
            part = folder / "photos" / ("train" if number < train else "test") / str(label)
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).save(part / f"{number:03}.png")


def _convert(folder: Path, name: str, model: str, recipe: str, arch: str | None = None, **options: object) -> None:
    import asymswap

    asymswap.save(asymswap.convert(asymswap.open_model(model, arch=arch), recipe, **options), folder / name)  # type: ignore[arg-type]


def _readme(folder: Path) -> None:
    _resnet18(folder)
    _cifar(folder, "resnet20.pt")
    _photos(folder, train=3, test=2)  # of 224 x 224 for the ResNet-18


def _after_conversion(folder: Path) -> None:
    _cifar(folder)
    _photos(folder)
    _convert(folder, "model.asym.pt", str(folder / "model.pt"), "weighted-offset", arch="cifar:resnet20")


def _benchmarking(folder: Path) -> None:
    _convert(folder, "digits-resnet.asym.pt", "digits-resnet", "half-macs")


def _calibration(folder: Path) -> None:
    _cifar(folder)
    _photos(folder)


def _checkpoints(folder: Path) -> None:
    model = _cifar(folder)
    state = model.state_dict()
    torch.save({"epoch": 7, "state_dict": state, "state_dict_ema": state}, folder / "training.pt")


def _finetuning(folder: Path) -> None:
    _digits(folder)
    _photos(folder)
    _convert(folder, "model.asym.pt", str(folder / "model.pt"), "half-macs", overrides={"budget.macs": 0.25})


def _kinds(folder: Path) -> None:
    _convert(folder, "model.asym.pt", "digits-resnet", "acnet-branch-bn")
    _convert(folder, "pairs.asym.pt", "digits-resnet", "3x3-only")


def _models(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    _resnet18(folder, "mine.pt")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), folder / "model.safetensors")
    code = (
        "from torch import nn\n\n\ndef Net(width=16):\n"
        "    halves = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]\n"
        "    return Own(*halves)\n\n\nclass Own(nn.Sequential):\n    pass\n\n\nsmall = Net\n"
    )
    for file in ("path/to/net.py", "mypackage/nets.py"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(code, encoding="utf-8")
    (folder / "mypackage" / "__init__.py").touch()
    scope: dict[str, Callable[[], nn.Module]] = {}
    exec(code, scope)
    torch.save(scope["Net"]().state_dict(), folder / "weights.pt")


def _reports(folder: Path) -> None:
    _resnet18(folder)
    for name, recipe in (("a.asym.pt", "acnet"), ("b.asym.pt", "acnet-branch-bn")):
        _convert(folder, name, str(folder / "model.pt"), recipe, arch="resnet18")


_FILES = {
    "README.md": _readme,
    "after-conversion.md": _after_conversion,
    "benchmarking.md": _benchmarking,
    "calibration.md": _calibration,
    "checkpoints.md": _checkpoints,
    "finetuning.md": _finetuning,
    "kinds.md": _kinds,
    "models.md": _models,
    "reports.md": _reports,
}

_NAMES = {
    "README.md": """
import torch
from torch import nn
from torchvision.models import resnet18

def MyNet():
    return resnet18(num_classes=10)

torch.manual_seed(0)
my_module = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)
""",
    "finetuning.md": """
import torch
from torch.utils.data import DataLoader
from asymswap.models.networks import DIGITS_PREPROCESSING
from asymswap.data.datasets import open_data

torch.manual_seed(0)
loader = DataLoader(open_data("digits", DIGITS_PREPROCESSING, "train"), 128, shuffle=True)
""",
    "models.md": """
import sys
sys.path.insert(0, "path/to")
from net import Net
""",
}


def prepare(page: str, folder: Path) -> None:
    """Write the files that the examples of this page expect."""
    _FILES.get(page, lambda folder: None)(folder)


def yours(page: str) -> str:
    """Python code that runs before that of the page, in place of the reader's own."""
    return _NAMES.get(page, "")


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]))
