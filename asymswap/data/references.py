"""The names of data, and what is wrong with one that is none; without torch."""

from pathlib import Path

from asymswap.errors import SourceError, near_names

COLLECTIONS = ("cifar10", "cifar100", "fashion-mnist", "mnist")
"""The names of torchvision's data, before a colon and the folder that holds it."""
PAIRED = {"pairs": "INPUTS,TARGETS", "masks": "IMAGES,MASKS"}
"""The names in references to images that go with others, which are no classes: see `asymswap.data.metrics`."""
TENSORS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
HOW_TO_NAME = (
    "give digits, or a folder that holds one folder of images for each class, or "
    f"{', '.join(f'{name}:PATH' for name in COLLECTIONS)}, or a file of tensors ({', '.join(TENSORS)})"
)


def check_reference(reference: str) -> None:
    """Raise SourceError for a reference to data that names nothing; what is in a folder or file is not looked at."""
    name, colon, _ = reference.partition(":")
    place = Path(reference).expanduser()
    if reference == "digits" or (colon and (name in COLLECTIONS or name in PAIRED)):
        return
    if not place.exists():
        hint = near_names(name if colon else reference, ["digits", *COLLECTIONS]) or f"; {HOW_TO_NAME}"
        raise SourceError(f"data {reference!r} is neither a known name nor an existing folder{hint}")
    if not place.is_dir() and (place.suffix not in TENSORS or not place.is_file()):
        raise SourceError(f"data {reference!r} is a file; {HOW_TO_NAME}")
