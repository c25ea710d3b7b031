"""The names of the networks that need no further package, and near ones for a mistyped one; without torch."""

import difflib
import functools
from importlib import resources


@functools.cache
def stored_networks() -> dict[str, int]:
    """Return the channels of the input of each network in the shipped list, 0 where they vary, by full reference."""
    text = resources.files(__package__).joinpath("fingerprints.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return {row[0]: int(row[7] or 0) for row in rows}


def near(reference: str) -> str:
    """Say, for a message, which networks come close to a name that is none, as a user writes them."""
    name = reference.removeprefix("torchvision:")
    written = [text.removeprefix("torchvision:") for text in stored_networks()]
    # Without a prefix, our own networks are found too; of two by one name, torchvision's comes last and counts.
    names = {text if ":" in name else text.removeprefix("cifar:"): text for text in written}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    known = "; known are torchvision's names, timm:…, cifar:…, digits-resnet, module:factory"
    return f"; did you mean {', '.join(names[text] for text in close)}?" if close else known
