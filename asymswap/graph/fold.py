"""Folding batch norms into the convs before them, as whoever deploys a network does."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from asymswap.errors import TraceError
from asymswap.graph.surgery import swap
from asymswap.graph.trace import trace
from asymswap.utils.inputs import Inputs


def fold_norms(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy in eval mode that computes the same, where every batch norm that can be is folded into its conv.

    All other tensors are the model's own. A norm stays where more than one conv, or something else than a conv, feeds
    it, and where torch.fx cannot follow the model. Of the `inputs` only shapes and dtypes matter.
    """
    folded: dict[str, nn.Module] = {}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        try:
            sites = trace(model, inputs).sites
        except TraceError:
            sites = ()
        for site in sites:
            norm = None if site.norm_behind is None else model.get_submodule(site.norm_behind)
            if type(norm) is not nn.BatchNorm2d or norm.running_var is None or norm._forward_hooks:
                continue
            # A site that is refused has hooks, shared weights, or a forward of its own.
            if site.refusal is None and len(site.calls) == 1 and not site.aliases:
                conv = cast(nn.Conv2d, model.get_submodule(site.name))
                eval_conv, eval_norm = (swap(one, {}, share=True).eval() for one in (conv, norm))
                folded[site.name] = fuse_conv_bn_eval(cast(nn.Conv2d, eval_conv), cast(nn.BatchNorm2d, eval_norm))
                folded[cast(str, site.norm_behind)] = nn.Identity()
    return swap(model, folded, share=True).eval()
