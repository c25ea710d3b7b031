"""Writing a model: modules swapped by name, and batch norms folded into convs, on a deep copy."""

import contextlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from asymswap.errors import PlanError, TraceError
from asymswap.graph.trace import trace
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import deep_copy, is_channels_last, loose_tensors


def swap(model: nn.Module, replacements: Mapping[str, nn.Module], share: bool = False) -> nn.Module:
    """Return a deep copy of the model with each named module replaced by the given one; the model stays unchanged.

    With `share` the copy's other parameters and buffers are those of the model: to be run, not to be changed. A module
    that is registered under several names is swapped under all of them; the weights of what is swapped are not copied.
    Every other module keeps its class, name, hooks and mode, every other parameter its hooks, attributes and
    trainability. Raises PlanError for a model whose copy is another.
    """
    # deepcopy asks its memo first: whoever refers to the module, by whatever path, gets the replacement.
    memo: dict[int, Any] = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    # It refuses tensors that were computed; whoever keeps one (weight_norm) computes it again.
    memo |= {id(tensor): tensor.detach().clone() for tensor in loose_tensors(model) if not tensor.is_leaf}
    if share:
        memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    swapped = deep_copy(model, memo)
    inside = {id(part) for new in replacements.values() for part in new.modules()}
    old = dict(model.named_modules())
    for name, module in swapped.named_modules():
        if id(module) in inside or name in replacements:
            continue
        before = old.get(name)
        if before is None or before.training != module.training or before._buffers.keys() != module._buffers.keys():
            raise PlanError(f"a copy of the model is not the same at {name!r}; does its class define __deepcopy__?")
        for key, parameter in before._parameters.items():
            own = module._parameters.get(key)
            if own is None or parameter is None or own is parameter:
                continue
            # What torch does not copy.
            for attribute, value in vars(parameter).items():
                vars(own).setdefault(attribute, value)
            for hook in (parameter._backward_hooks or {}).values():
                own.register_hook(hook)
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                own.register_post_accumulate_grad_hook(hook)
    return swapped


def take_over_(replacement: nn.Module, conv: nn.Conv2d, norm: nn.Module | None = None) -> nn.Module:
    """Give a replacement, in place, the conv's device, mode, trainability and memory format; return it.

    Its own batch norms get mode and trainability of `norm`, a batch norm that it has taken over.
    """
    replacement.to(conv.weight.device).train(conv.training)
    for name, parameter in replacement.named_parameters():
        own = conv.bias if name.rpartition(".")[2] == "bias" and conv.bias is not None else conv.weight
        parameter.requires_grad_(own.requires_grad)
    for part in replacement.modules():
        if norm is not None and isinstance(part, nn.modules.batchnorm._NormBase):
            part.train(norm.training)
            part.requires_grad_(all(parameter.requires_grad for parameter in norm.parameters()))
    if is_channels_last(conv.weight):
        replacement.to(memory_format=torch.channels_last)
    return replacement


def fold_norms(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy in eval mode that computes the same, where every batch norm that can be is folded into its conv.

    All other tensors are the model's own. A norm stays where anything but one conv feeds it, and where torch.fx cannot
    follow the model. Of the `inputs` only shapes and dtypes matter.
    """
    folded: dict[str, nn.Module] = {}
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with contextlib.suppress(TraceError):
        for site in trace(model, inputs).sites if has_norms else ():
            # A site that is refused has hooks, shared weights, or a forward of its own.
            if site.norm_behind is None or site.refusal is not None or len(site.calls) != 1 or site.aliases:
                continue
            norm = model.get_submodule(site.norm_behind)
            if type(norm) is nn.BatchNorm2d and norm.running_var is not None and not norm._forward_hooks:
                pair = (swap(one, {}, share=True).eval() for one in (model.get_submodule(site.name), norm))
                folded[site.name] = fuse_conv_bn_eval(*cast(Any, pair))
                folded[site.norm_behind] = nn.Identity()
    return swap(model, folded, share=True).eval()
