"""The structure of a module without its weights, as bytes: for models that were pickled whole.

Only modules made of allowlisted classes have one. It is what torch.save makes of the module with every tensor of its
state dict on the meta device, and it is read like any other pickle.
"""

from __future__ import annotations

import io
import pickle

import torch
from torch import Tensor, nn

from asymswap.errors import SourceError
from asymswap.fileformats.detect import FileKind
from asymswap.fileformats.pickle_objects import is_allowed_module
from asymswap.fileformats.torch_files import is_plain, load_object
from asymswap.utils.tensors import allocated, copy_with


def to_structure(model: nn.Module) -> bytes | None:
    """The structure of a module as bytes; None where it holds anything that could not be read back."""
    if not is_allowed_module(model):
        return None
    stored = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    buffer = io.BytesIO()
    try:
        torch.save(copy_with(model, stored, lambda tensor: tensor.to("meta")), buffer)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        # Hooks and other attributes of the user's own may not even be picklable.
        return None
    return buffer.getvalue() if is_plain(buffer, "the model's structure") else None


def from_structure(data: bytes) -> nn.Module:
    """The module of that structure, with unset weights on the CPU; raises SourceError for what is not allowed."""
    module = load_object(
        io.BytesIO(data), FileKind.TORCH, trust_pickle=False, label="the checkpoint's stored structure"
    )
    if not isinstance(module, nn.Module):
        raise SourceError(f"the checkpoint's stored structure is a {type(module).__name__}, not a module")
    return allocated(module)
