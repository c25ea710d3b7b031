"""ONNX files in int8, by ONNX Runtime's static quantisation, and pairs of convs made ready for it.

What passes between the two convs of a pair may be multiplied by any matrix whose inverse the second conv takes in. A
random rotation gives all channels there, which share one step of int8, much the same range, as for the weights of large
language models (Ashkboos et al., 2024, QuaRot). On a DnCNN it loses less than ranges that are made equal channel by
channel (docs/results/int8.md).
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from asymswap.measure.runtimes import failing_clearly, forward_in, open_session, quiet
from asymswap.utils.inputs import Inputs
from asymswap.utils.tensors import generator_for, list_tensors


def rotate_(model: nn.Module, sites: Iterable[str]) -> int:
    """Mix the channels between the two convs of the pairs at these sites, in place; return the number of pairs.

    What the model computes stays, up to rounding. Before it, both convs get weights of one scale.
    """
    number = 0
    for site in sites:
        parts = list(model.get_submodule(site).children())
        if len(parts) != 2 or not all(type(part) is nn.Conv2d for part in parts):
            continue
        reduce, expand = (cast(nn.Conv2d, part) for part in parts)
        first, second, groups = reduce.weight.detach(), expand.weight.detach(), expand.groups
        w_GRx = first.double().flatten(1).unflatten(0, (groups, -1))
        h_GORx = second.double().flatten(2).unflatten(0, (groups, -1))
        norm_GR = w_GRx.norm(dim=2)
        scale_GR = torch.where(norm_GR > 0, (h_GORx.norm(dim=(1, 3)) / norm_GR).sqrt(), 0.0)
        scale_GR = torch.where(scale_GR > 0, scale_GR, 1.0)
        drawn = torch.randn(2 * w_GRx.shape[1:2], generator=generator_for(site), dtype=torch.float64)
        mix_GSR = torch.linalg.qr(drawn).Q.to(first.device) * scale_GR[:, None, :]
        back_GRS = mix_GSR.mT / scale_GR.square()[:, :, None]
        with torch.no_grad():
            first.copy_((mix_GSR @ w_GRx).reshape(first.shape))
            second.copy_(torch.einsum("gorx,grs->gosx", h_GORx, back_GRS).reshape(second.shape))
            if reduce.bias is not None:
                bias_GR1 = reduce.bias.double().unflatten(0, (groups, -1))[:, :, None]
                reduce.bias.copy_((mix_GSR @ bias_GR1).flatten())
        number += 1
    return number


def quantize(path: Path, batches: Iterable[Inputs]) -> None:
    """Replace an ONNX file by one in int8, its ranges measured on the inputs.

    Weights have a step for each output channel; activations are unsigned, which runs fastest on x86 processors.
    """
    with quiet(), failing_clearly("int8"), tempfile.TemporaryDirectory(prefix="asymswap-") as folder:
        from onnxruntime import quantization

        names, prepared = [item.name for item in open_session(path).get_inputs()], Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        arrays = ([tensor.cpu().numpy() for tensor in list_tensors(batch)] for batch in batches)
        named = (dict(zip(names, one, strict=True)) for one in arrays)
        quantization.quantize_static(
            str(prepared),
            str(path),
            SimpleNamespace(get_next=lambda: next(named, None)),  # what is asked of a CalibrationDataReader
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


class FileModel(nn.Module):
    """An ONNX file as a module, to be measured as one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = open_session(path)

    def forward(self, *inputs: Any) -> Any:
        found = forward_in(self._session, inputs)()
        return found[0] if len(found) == 1 else found
