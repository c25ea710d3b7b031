"""Batch norms of several processes that share their statistics, on any device; torch's own does so on GPUs only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors; so is its gradient, for each process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _summed(x: Tensor) -> Tensor:
    return _Sum.apply(x)  # type: ignore[no-any-return]  # torch leaves it untyped


class SharedBatchNorm(_BatchNorm):
    """A batch norm over the images of all processes: the parameters, buffers and keys of the one that it stands for."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats, self.training = norm.affine, norm.track_running_stats, norm.training
        self._parameters, self._buffers = norm._parameters, norm._buffers

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions after the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, …) by the mean and variance over all processes."""
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count_here = torch.full((1,), values.numel() / values.shape[1], dtype=values.dtype, device=x.device)
        sums = _summed(torch.cat([values.sum(axes), count_here]))
        count = sums[-1].detach()
        mean_C = sums[:-1] / count
        centred = values - mean_C.view(shape)
        variance_C = _summed(centred.square().sum(axes)) / count
        self._track_(mean_C.detach(), variance_C.detach() * (count / (count - 1)))
        result = centred * (variance_C + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(x.dtype)

    def _track_(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), part)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), part)


def share_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its batch norms replaced, in place, by ones that share statistics."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    if type(model) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        assert isinstance(model, _BatchNorm)
        return SharedBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, share_statistics(child, device))
    return model
