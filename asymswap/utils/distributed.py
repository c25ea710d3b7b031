"""Several processes that work on one conversion or training, as `torchrun` starts them.

torch is loaded only if there are several: the command line asks here before it shows its first progress bar.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The rank of this process among `size`, which must all make the same calls in order; one exchanges nothing."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    @property
    def _exchange(self) -> Any:
        return importlib.import_module("torch.distributed")

    def share(self, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Return every `size`-th of all items, with its number."""
        return ((number, item) for number, item in enumerate(items) if number % self.size == self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors of one shape, the same bits in every process."""
        if self.size == 1:
            return tensor
        total = tensor.detach().cpu().contiguous().clone()
        self._exchange.all_reduce(total)
        return total.to(tensor.device)

    def first(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which the first process alone does; where it fails, all do."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]  # what work returned, or the error
        if self.leads:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        self._exchange.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return cast("T", box[0])

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their numbers."""
        values = [value] * self.size
        if self.size > 1:
            self._exchange.all_gather_object(values, value)
        return values

    def follow_(self, module: nn.Module) -> None:
        """Give the module, in place, the parameters and buffers that it has in the first process."""
        for tensor in itertools.chain(module.parameters(), module.buffers()) if self.size > 1 else ():
            sent = tensor.detach().cpu().contiguous()
            self._exchange.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


ALONE = Team()


def in_team() -> bool:
    """True if `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def end_process(code: str | int | None) -> NoReturn:
    """End this process with the code of a `SystemExit`, after its exit handlers, but without Python's own teardown.

    Threads of DistributedDataParallel's process group outlive it (torch 2.14), and abort the process where one drops a
    tensor during the teardown. `multiprocessing` ends its processes like this too.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)  # noqa: T201  # as Python itself does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextmanager
def joined(gpus: bool = False) -> Iterator[Team]:
    """Join the team in which `torchrun` started this process, with `gpus` for their tensors too; else a team of one."""
    if not in_team():
        yield ALONE
        return
    import torch
    from torch import distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() and torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(days=1)  # for the others: the first one alone may polish for hours
    # torchrun keeps one store for all its attempts, with the addresses of processes that died.
    store, rank, size = next(rendezvous("env://", timeout=patience))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # public, but not named in __all__
    # gloo reports its peers on stdout (torch 2.9): send that to stderr.
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
