"""The training loop, on accelerate, of one process.

Every random number is a function of the seed and of the place in the run. So the next step depends on the weights, the
optimizer's state and a few counters alone, and a resumed run gives the same result as one that was never interrupted.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asymswap.checkpoint import read_checkpoint
from asymswap.data.batches import Batch, Source, to_device
from asymswap.errors import AsymswapError, reason_of
from asymswap.replacements.predicted_offset import PredictorConv2d
from asymswap.results.finetune import EpochRow, RunStart, Scores, StepRow
from asymswap.training.config import EPOCHS, Callback, Training, check_same
from asymswap.training.objective import Objective, Validator, check_gradient
from asymswap.training.run_folder import RunFolder
from asymswap.utils.distributed import Team
from asymswap.utils.tensors import first_not_finite, map_tensors, random_state_kept, seed_

_LOOK_ON_GPU = 10  # steps after which the loss is fetched from a GPU: each time the GPU waits

_IN_EVAL_MODE = "trained in eval mode, without batch statistics: its outputs in train mode are not those of the teacher"
_NOT_SHARED = "each process keeps its own batch statistics; the first one's are saved (they are shared on GPUs only)"


@dataclass
class Progress:
    """The state of a run: epochs and steps done, the steps within the epoch and their sums, and the best so far."""

    epoch: int = 0
    step: int = 0
    within: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    skipped: int = 0
    skipped_in_all: int = 0
    before: Scores | None = None
    best: Scores | None = None
    best_epoch: int = 0
    last: Scores | None = None


@dataclass
class Trainer:
    """A training run.

    `model` is trained in place; `replacements` are the names of its new layers; `identity` is what a resumed run must
    share; `write` writes a checkpoint with a model's weights to a file.
    """

    model: nn.Module
    source: Source
    settings: Training
    objective: Objective
    validator: Validator | None
    replacements: Sequence[str]
    identity: Mapping[str, Any]
    team: Team
    folder: RunFolder | None
    callback: Callback
    write: Callable[[Path, nn.Module, Progress], None]
    device: torch.device | None = None

    def __post_init__(self) -> None:
        settings, team, source = self.settings, self.team, self.source
        self.accelerator = make_accelerator(settings, team, self.device, all_used=self.objective.labels)
        self.progress = Progress()
        self.best: Mapping[str, Tensor] | None = None
        device = self.accelerator.device
        raw = self.model.to(device)
        if settings.channels_last:
            raw = raw.to(memory_format=torch.channels_last)
        if team.size > 1 and device.type == "cuda":
            raw = nn.SyncBatchNorm.convert_sync_batchnorm(raw)
        self.raw, self._frozen_norms = raw, choose_trained_(raw, settings, self.replacements)
        norms = sum(isinstance(module, _BatchNorm) for module in raw.modules())
        apart = team.size > 1 and device.type != "cuda" and norms > len(self._frozen_norms)
        self.notes = [*source.notes, *([_NOT_SHARED] if apart else [])]
        self.average = None
        if settings.ema is not None:
            self.average = AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        self._kept_model: nn.Module = raw if self.average is None else self.average.module
        self.runner, self.optimizer = self.accelerator.prepare(raw, make_optimizer(raw, settings))
        self._parts: dict[str, Any] = {"model": raw, "average": self.average, "optimizer": self.optimizer}
        self._parts["scaler"] = self.accelerator.scaler
        if self.objective.teacher is not None:
            self.objective.teacher.model.to(device).to(memory_format=torch.channels_last)
        self.steps = settings.steps or (settings.epochs or EPOCHS) * source.steps
        self._pending, self._rate = torch.zeros(3, device=device), 0.0
        self._look_every = 1 if device.type == "cpu" else _LOOK_ON_GPU

    def run(self, resume: bool) -> Progress:
        """Train, with `resume` from the state in the folder on; afterwards `best` holds the weights to keep."""
        folder, cudnn = self.folder, torch.backends.cudnn
        flags = cudnn.deterministic, cudnn.benchmark
        with random_state_kept():
            try:
                if self.settings.deterministic:
                    # The same kernels every time: bit for bit the same run, on as many threads.
                    cudnn.deterministic, cudnn.benchmark = True, False
                if resume:
                    self._restore()
                progress = self.progress
                if folder is not None:
                    # All wait for the first: the others would else begin to train for a run that cannot be written.
                    self.team.first(lambda: folder.begin(progress.step, self.identity))
                self._eval_mode = self.objective.trains_in_eval_mode(self.raw, self.source)
                self.notes += [_IN_EVAL_MODE] if self._eval_mode else []
                if progress.before is None:
                    progress.before = self._validate(self.raw)
                epochs, note = -(-self.steps // self.source.steps), "; ".join(self.notes)
                self.callback.begin(RunStart(epochs, self.steps, progress.step, progress.before, note))
                patience = self.settings.patience or math.inf
                while progress.step < self.steps and progress.epoch - progress.best_epoch < patience:
                    self._epoch()
            except (RuntimeError, MemoryError, ValueError) as error:
                self._explain(error)
                raise
            finally:
                cudnn.deterministic, cudnn.benchmark = flags
            if folder is not None:
                folder.close()
        return progress

    def _epoch(self) -> None:
        """Train for the rest of one epoch, validate and save."""
        progress, settings = self.progress, self.settings
        start, here = time.perf_counter(), 0
        end = min(self.source.steps, progress.within + self.steps - progress.step)
        self.runner.train(not self._eval_mode)
        for norm in self._frozen_norms:
            norm.eval()
        with closing(self.source.groups(progress.epoch, progress.within)) as groups:
            while progress.within < end:
                group, size = next(groups)
                self._step(group, size)
                progress.step, progress.within, here = progress.step + 1, progress.within + 1, here + size
                # An epoch's last step is saved with its end.
                last = progress.within == end
                due = settings.save_every is not None and progress.step % settings.save_every == 0
                if due or last or progress.step % self._look_every == 0:
                    self._check_loss()
                    self._report(StepRow, here / (time.perf_counter() - start))
                if due and not last:
                    self._check_weights()
                    self._save()
        self._end_epoch(here, time.perf_counter() - start)

    def _end_epoch(self, trained: int, seconds: float) -> None:
        """Validate, keep the weights if they are the best so far, and save."""
        progress = self.progress
        self._check_weights()
        # Running statistics differ between processes that do not share them: the first one's are kept.
        self.team.follow_(self._kept_model)
        validation, best = self._validate(self._kept_model), progress.best
        better = True
        if self.validator is not None and validation is not None and best is not None:
            better = self.validator.rank(validation) > self.validator.rank(best)
        progress.last = validation
        about = {"validation": validation, "best": better and validation is not None, "skipped": progress.skipped}
        self._report(EpochRow, trained / seconds if seconds else 0.0, seconds=seconds, **about)
        progress.skipped_in_all += progress.skipped
        progress.epoch += 1
        progress.within, progress.loss, progress.correct, progress.seen, progress.skipped = 0, 0.0, 0.0, 0.0, 0
        if better:
            progress.best, progress.best_epoch = validation, progress.epoch
            self.best = map_tensors(dict(self._kept_model.state_dict()), lambda tensor: tensor.detach().cpu().clone())
        self._save(better)

    def _step(self, group: Sequence[Batch], size: int) -> None:
        """Make one step on `size` images over all processes."""
        seed_(self.settings.seed, "step", self.progress.step, self.team.rank)
        self._rate = set_rate_(self.optimizer, self.progress.step, self.steps, self.settings)
        for number, batch in enumerate(group, start=1):
            with nullcontext() if number == len(group) else self.accelerator.no_sync(self.runner):
                self._learn(batch, size)
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.raw.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.raw)

    def _learn(self, batch: Batch, size: int) -> None:
        placed = to_device(batch, self.accelerator.device)
        with self.accelerator.autocast():
            loss, right = self.objective.loss(self.raw, self.runner, placed)
        # Gradients are averaged over the processes: this factor makes it the gradient of the mean over all images.
        self.accelerator.backward(loss * self.team.size / size)
        if all(parameter.grad is None for parameter in self.raw.parameters()):
            check_gradient(loss.detach(), "the loss")
        counts = (loss.detach(), right, torch.tensor(batch.count))
        self._pending += torch.stack([count.to(self._pending) for count in counts])
        self.progress.skipped += batch.skipped

    def _check_loss(self) -> None:
        """Add up the sums of all processes since the last call; raise AsymswapError if the loss is not finite."""
        loss, correct, seen = self.team.sum(self._pending.double().cpu()).tolist()
        self._pending.zero_()
        progress = self.progress
        progress.loss += loss
        progress.correct += correct
        progress.seen += seen
        if not math.isfinite(progress.loss):
            raise self._diverged(f"the loss is {loss:g} at step {progress.step}")

    def _check_weights(self) -> None:
        found = first_not_finite(self.raw)
        if found is not None:
            raise self._diverged(f"{found[0]!r} holds {found[1]} after step {self.progress.step}")

    def _diverged(self, what: str) -> AsymswapError:
        folder = self.folder
        good = "" if folder is None or not folder.last.exists() else f"; the last good checkpoint is {folder.last}"
        half = ", or `precision=bf16`" if self.settings.precision == "fp16" else ""
        where = f"(epoch {self.progress.epoch + 1}, `lr={self.settings.base_lr:g}`)"
        advice = f"try a smaller `lr=…`, `clip=1` or a longer `warmup=…`{half}"
        return AsymswapError(f"{what} {where}: stopped{good}; {advice}")

    def _explain(self, error: Exception) -> None:
        """Raise an error of torch in the user's words, if the user can do something about it."""
        text, settings, own = str(error), self.settings, self.source.unit == "batches"
        size = "a batch of the data" if own else f"`batch_size={settings.batch}`"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            half = "batches of half the size" if own else f"`batch_size={max(1, settings.batch // 2)}`"
            advice = f"{half} with `accumulate={2 * settings.accumulate}` gives the same step"
            raise AsymswapError(f"not enough memory for {size}; {advice}") from error
        if "more than 1 value per channel" in text:
            what = size if own else f"{self.source.count} {self.source.unit} with {size}"
            larger = "larger batches" if own else "a larger `batch_size=…`"
            raise AsymswapError(f"a batch norm got a single image, of {what}; give {larger}") from error
        if self.team.size > 1 and any(word in text for word in ("gloo", "NCCL", "Connection")):
            what = "another process of the run has died, and none can go on without it"
            advice = "`resume=True` continues the run, as torchrun does by itself with --max-restarts 3"
            raise AsymswapError(f"{what}; {advice}") from error

    def _validate(self, model: nn.Module) -> Scores | None:
        if self.validator is None:
            return None
        with self.accelerator.autocast():
            found = self.validator.measure(model)
        before = self.progress.before
        if not all(math.isfinite(value) for value in found.values()):
            raise self._diverged(f"the validation loss is {found['loss']:g} at step {self.progress.step}")
        if before is not None and before.keys() != found.keys():
            names = f"{', '.join(found)}, before {', '.join(before)}"
            raise AsymswapError(f"`evaluate=…` gave {names}; give the same names")
        return found if before is None else {name: found[name] for name in before}

    def _report(self, kind: type[StepRow], speed: float, **more: Any) -> None:
        """Tell of a step, or at the end of an epoch of all of it."""
        if not self.team.leads:
            return
        progress = self.progress
        sums = {"loss": progress.loss, "top1": progress.correct} if self.objective.labels else {"loss": progress.loss}
        scores = {name: value / max(1.0, progress.seen) for name, value in sums.items()}
        row = kind(progress.epoch + 1, progress.step, scores, self._rate, speed, self.source.unit, **more)
        if self.folder is not None:
            self.folder.add(row)
        if isinstance(row, EpochRow):
            self.callback.epoch(row)
        else:
            self.callback.step(row)

    def _save(self, better: bool = False) -> None:
        """Save all that the next step depends on; at the end of an epoch first the checkpoints."""
        folder, progress = self.folder, self.progress
        if folder is None:
            return

        def write() -> None:
            if progress.within == 0:
                for path in (folder.best, folder.last) if better else (folder.last,):
                    self.write(path, self._kept_model, progress)
            states = {name: None if part is None else part.state_dict() for name, part in self._parts.items()}
            folder.save_state({"identity": dict(self.identity), "progress": asdict(progress), **states})

        self.team.first(write)

    def _restore(self) -> None:
        """Continue from the state in the folder, if there is one."""
        folder = self.folder
        if folder is None or (found := self.team.first(folder.read_state)) is None:
            return
        check_same(self.identity, found["identity"], folder.folder)
        for name, part in self._parts.items():
            if part is not None:
                part.load_state_dict(found[name])
        self.progress = TypeAdapter(Progress).validate_python(found["progress"])
        if self.progress.best_epoch:
            best = self.team.first(lambda: read_checkpoint(folder.best))
            self.best = {**best.state, **best.extra}


def make_accelerator(settings: Training, team: Team, device: torch.device | None = None, all_used: bool = True) -> Any:
    """Return accelerate's Accelerator, by default on a GPU; `all_used`: every trained weight is in every loss."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    # One process may train several times, and accelerate keeps the first run's precision for good.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Several processes without GPUs would each train on its own if accelerate did not know that this is meant.
    cpu = device == torch.device("cpu") or (team.size > 1 and not torch.cuda.is_available())
    given = {} if device is None or team.size > 1 else {"ACCELERATE_TORCH_DEVICE": str(device)}
    try:
        mixed = "no" if settings.precision == "fp32" else settings.precision
        parallel = DistributedDataParallelKwargs(find_unused_parameters=not all_used)
        with patch_environment(**given):
            accelerator = Accelerator(mixed_precision=mixed, cpu=cpu, kwargs_handlers=[parallel])
    except ValueError as error:
        what = f"`precision={settings.precision}` is not available here ({reason_of(error)})"
        raise AsymswapError(f"{what}; try bf16 or fp32") from None
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would silently train in fp32.
        raise AsymswapError("`precision=fp16` needs a GPU; use bf16 or fp32")
    if accelerator.num_processes != team.size:
        what = f"{accelerator.num_processes} processes were started and {team.size} of them train together"
        raise AsymswapError(f"{what}; call finetune with the team of asymswap.utils.distributed.joined()")
    return accelerator


def choose_trained_(model: nn.Module, settings: Training, replacements: Iterable[str]) -> list[nn.Module]:
    """Freeze, in place, what is not trained; return the batch norms whose statistics must not change either."""
    what, roots, frozen = settings.train, tuple(replacements), list[nn.Module]()
    for name, module in model.named_modules():
        norm, new = isinstance(module, _BatchNorm), any(f"{name}.".startswith(f"{root}.") for root in roots)
        if norm and (settings.freeze_bn or (what == "new" and not new)):
            frozen.append(module)
        if what != "all":
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(norm if what == "bn" else new)
    if what != "all" and not any(parameter.requires_grad for parameter in model.parameters()):
        lacking = "batch norm" if what == "bn" else "replaced layer"
        raise AsymswapError(f"`train={what}` has nothing to train: the model has no {lacking}; use `train=all`")
    return frozen


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Return the optimizer over the trained parameters; biases, offsets and those of normalisations do not decay."""
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "offsets": []}
    predictors = [module for module in model.modules() if isinstance(module, PredictorConv2d)]
    predicting = {id(parameter) for module in predictors for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moves = "offset" in name.rpartition(".")[2] or id(parameter) in predicting
            groups["offsets" if moves else "decayed" if parameter.ndim > 1 else "plain"].append(parameter)
    options: list[dict[str, object]] = []
    for name, parameters in groups.items():
        rate = settings.base_lr * (settings.offset_lr_scale if name == "offsets" else 1)
        decay = settings.decay if name == "decayed" else 0.0
        if parameters:
            options.append({"params": parameters, "name": name, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(options, lr=settings.base_lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(options, lr=settings.base_lr)


def set_rate_(optimizer: torch.optim.Optimizer, step: int, steps: int, settings: Training) -> float:
    """Set every group's learning rate for a step (counted from 0) of `steps`; return the largest."""
    warm, factor = round(settings.warmup * steps), 1.0
    if step < warm:
        factor = (step + 1) / (warm + 1)
    elif settings.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
