"""The graph of a model as data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asymswap.errors import TraceError
from asymswap.graph.flow import read_flow as flow_of
from asymswap.graph.nodes import NodeGraph
from asymswap.graph.trace import trace


def read_flow(model: nn.Module) -> NodeGraph:
    return flow_of(model, trace(model, (torch.ones(1, 4, 8, 8),)))


class Block(nn.Module):
    """A conv, a batch norm and an activation that runs twice, around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.act(self.norm(self.conv(self.act(x))) + x)
        return made


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Around(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if x.sum() > 0:
                x = part(x)
        return x


def test_every_operation_and_what_flows_between() -> None:
    flow = read_flow(Block())
    assert [node.operation for node in flow.nodes] == ["input", "relu", "conv", "batch_norm", "add", "relu", "output"]
    assert [node.conv for node in flow.nodes if node.conv] == ["conv"]
    place = {node.key: number for number, node in enumerate(flow.nodes)}
    assert {(place[one], place[other]) for one, other in flow.edges} == {
        (0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (4, 5), (5, 6),
    }  # fmt: skip


def test_the_model_is_neither_run_nor_changed() -> None:
    model = Block().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    read_flow(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_does_not_trace_whole_comes_in_parts() -> None:
    flow = read_flow(Around(Block(), Block()))
    assert [node.conv for node in flow.nodes if node.conv] == ["parts.0.conv", "parts.1.conv"]
    assert len({node.key for node in flow.nodes}) == len(flow.nodes) == 14
    assert all(one.split("/")[0] == other.split("/")[0] for one, other in flow.edges)


def test_a_model_without_any_traceable_part() -> None:
    with pytest.raises(TraceError, match=r"torch\.fx cannot trace any part of the model that holds a Conv2d"):
        read_flow(Untraceable())
