"""Nested tensors, and computations side by side on several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import InitVar, dataclass

import pytest
import torch
from torch import Tensor, nn

from asymswap.utils.tensors import WithoutMemory, list_tensors, map_tensors, side_by_side


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Torch has two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Pair:
    left: Tensor
    right: list[Tensor]
    checked: InitVar[bool]
    name: str = "pair"

    def __post_init__(self, checked: bool) -> None:
        assert checked


def test_dataclasses_are_rebuilt_with_their_tensors_changed() -> None:
    pair = Pair(torch.ones(2), [torch.zeros(3)], True, "a")
    changed = map_tensors({"pair": pair}, lambda tensor: tensor + 1)["pair"]
    assert (changed.left.tolist(), changed.right[0].tolist(), changed.name) == ([2, 2], [1, 1, 1], "a")
    assert (pair.left.tolist(), pair.right[0].tolist()) == ([1, 1], [0, 0, 0])
    assert [tensor.numel() for tensor in list_tensors([pair, Pair])] == [2, 3]


def test_results_come_in_the_order_of_the_items_and_steps_are_told() -> None:
    steps: list[int] = []
    assert side_by_side(lambda item: item**2, range(20), steps.append) == [item**2 for item in range(20)]
    assert steps == list(range(1, 21))
    assert side_by_side(lambda item: item, []) == []


def test_two_are_at_work_at_once(threads: int) -> None:
    meeting = threading.Barrier(threads, timeout=60)
    assert sorted(side_by_side(lambda _: meeting.wait(), range(threads))) == [0, 1]


def test_each_has_one_thread_of_torch_and_the_rest_is_as_before(threads: int) -> None:
    assert set(side_by_side(lambda _: torch.get_num_threads(), range(12))) == {1}
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [0])
    assert torch.get_num_threads() == threads


def test_the_first_exception_in_the_items_order_is_raised_and_the_rest_is_left() -> None:
    begun: list[int] = []
    failed = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            failed.set()
            raise ValueError(item)
        if item == 0:
            assert failed.wait(60)
            raise KeyError(item)
        failed.wait(60)

    with pytest.raises(KeyError):
        side_by_side(work, range(10_000))
    assert len(begun) < 10_000


def test_what_takes_much_room_comes_first_and_alone() -> None:
    at_work: list[int] = []
    company: dict[int, int] = {}

    def work(item: int) -> int:
        at_work.append(item)
        time.sleep(0.01)
        company[item] = len(at_work)
        at_work.remove(item)
        return -item

    assert side_by_side(work, range(9), alone=lambda item: item % 3 == 2) == [-item for item in range(9)]
    assert list(company)[:3] == [2, 5, 8]
    assert [company[item] for item in (2, 5, 8)] == [1, 1, 1]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    matrices = [torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (90, 300)]

    def solve(a: Tensor) -> Tensor:
        return torch.linalg.eigh(a @ a.mT).eigenvectors

    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(side_by_side(solve, matrices))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_without_memory_what_has_numbers_is_filled_and_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    real = torch.zeros(3)
    with WithoutMemory(torch.empty):
        layer = nn.Conv2d(3, 8, 3)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.trunc_normal_(tensor=layer.bias)
        assert nn.init.constant_(real, 2.0) is real
    assert layer.weight.is_meta
    assert layer.bias is not None
    assert layer.bias.is_meta
    assert real.tolist() == [2, 2, 2]
    assert torch.equal(torch.get_rng_state(), before)
