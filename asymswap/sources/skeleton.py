"""The structure of a module without its weights, as bytes: for models that were pickled whole.

Only modules made of allowlisted classes have one. It is what torch.save makes of the module with every tensor of its
state dict on the meta device, and it is read through the restricted unpickler like any other pickle.
"""

from __future__ import annotations

import io
import itertools

import torch
from torch import nn

from asymswap.errors import SourceError
from asymswap.sources.files import FileKind
from asymswap.sources.unpickle import load_object
from asymswap.tensors import copy_with


def to_skeleton(model: nn.Module) -> bytes:
    """The structure of a module as bytes."""
    stored = model.state_dict(keep_vars=True).values()
    buffer = io.BytesIO()
    torch.save(copy_with(model, stored, lambda tensor: tensor.to("meta")), buffer)
    return buffer.getvalue()


def from_skeleton(data: bytes) -> nn.Module:
    """The module of that structure, with unset weights on the CPU; raises SourceError for what is not allowed."""
    module = load_object(
        io.BytesIO(data), FileKind.TORCH, trust_pickle=False, label="the checkpoint's stored structure"
    )
    if not isinstance(module, nn.Module):
        raise SourceError(f"the checkpoint's stored structure is a {type(module).__name__}, not a module")
    ghosts = [t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_meta]
    return copy_with(module, ghosts, lambda tensor: torch.empty_like(tensor, device="cpu"))
