"""How far a converted model's outputs and kernels are from the original's; and whether it can be converted at all.

Some networks look at what their layers are: they pad only before an nn.Conv2d, or collect the outputs of these alone.
`check_stand_ins` hides convs in modules that compute exactly the same: the calls and the outputs must not change.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymswap import replacements
from asymswap.errors import AsymswapError
from asymswap.graph.surgery import swap
from asymswap.graph.trace import Trace, conv_hooks, find_convs, read_conv
from asymswap.measure.statistics import wilson_interval
from asymswap.results.evaluate import OutputAgreement
from asymswap.types import Call, Plan
from asymswap.utils.inputs import Inputs, copied, portions, samples_in, sizes, with_values
from asymswap.utils.tensors import device_of, eval_mode, hooked, list_tensors, map_tensors

_SAME = 1e-4  # largest relative difference of equal outputs: threads may add numbers in another order
# Peaks of images, and between which root mean squares their pixels are; what is between the two is no image.
_PEAKS = {1.0: (0.0, 1.0), 255.0: (8.0, 255.0)}
_LAST_PARTS = 3
_KNOWN = 2**30  # bytes of the original's outputs that are kept
WHOLE = ("",)  # the model itself, by torch's name for it, as the only part whose outputs are compared


@dataclass
class Sums:
    """The difference of any number of `tensors` from others: squared differences and squared values, in float64."""

    tensors: int = 0
    squares: float = 0.0
    energy: float = 0.0
    largest: float = 0.0  # absolute difference of two numbers

    def add(self, one: Tensor, other: Tensor) -> None:
        """Compare the second of two tensors of the same shape with the first; of complex numbers both parts."""
        self.tensors += 1
        one, other = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (one, other))
        # Subtracting close numbers loses nothing in the tensors' own precision; only the sums need more.
        dtype = torch.promote_types(one.dtype, torch.float32)
        gap = other.to(dtype) - one.to(dtype)
        self.squares += float(torch.linalg.vector_norm(gap, dtype=torch.float64)) ** 2
        self.energy += float(torch.linalg.vector_norm(one.to(dtype), dtype=torch.float64)) ** 2
        largest = float(gap.abs().max()) if gap.numel() else 0.0
        # max keeps a NaN that comes first, and drops one that comes second.
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)

    @property
    def relative(self) -> float:
        """The norm of the difference relative to the norm of the first tensors."""
        return math.sqrt(self.squares / self.energy) if self.energy else (0.0 if not self.squares else math.inf)


@dataclass(frozen=True)
class Fidelity:
    """Differences of the whole model's output, and of each swapped site's kernel and output on the original's input."""

    output: Sums
    site_outputs: Mapping[str, Sums]
    kernels: Mapping[str, float]  # of the replacements that are equivalent to a kernel of the original size


def compared_parts(traced: Trace) -> tuple[str, ...]:
    """Return the parts whose outputs show whether two versions of a model compute the same.

    Which boxes a detector keeps jumps where scores are close: there we compare what torch.fx could read, and the convs
    outside of it.
    """
    if traced.on_meta:
        return WHOLE
    inside = tuple(f"{part}." if part else "" for part in traced.parts)
    outside = [site.name for site in traced.sites if not f"{site.name}.".startswith(inside)]
    return (*traced.parts, *outside)


def measure_fidelity(
    original: nn.Module, converted: nn.Module, plan: Plan, inputs: Inputs, parts: Sequence[str] = WHOLE
) -> Fidelity:
    """Run both models on the same inputs in eval mode and compare; both are unchanged afterwards.

    Each replacement, and each of the `parts`, gets the original's own input, so that a site's error is its own. One
    that has folded a batch norm is compared with conv and batch norm, and its kernel not at all.
    """
    sums = {swap.site: Sums() for swap in plan.swaps}
    norms = {swap.site: original.get_submodule(swap.absorbs) for swap in plan.swaps if swap.absorbs is not None}

    def see(name: str, seen: Tensor, output: Tensor) -> None:
        if name in sums:
            expected = norms[name](output) if name in norms else output
            sums[name].add(expected, converted.get_submodule(name)(seen))

    with conv_hooks(original, see):
        output = compare_outputs(original, converted, inputs, parts)
    convs, kernels = find_convs(original), {}
    for one in (one for one in plan.swaps if one.absorbs is None):
        (kind, settings), conv = replacements.load_swap(one), convs[one.site][0]
        fused = kind.fuse(converted.get_submodule(one.site), read_conv(conv), settings)
        if fused is not None and fused.weight.shape == conv.weight.shape:
            kernel = Sums()
            kernel.add(conv.weight.detach(), fused.weight.detach())
            kernels[one.site] = kernel.relative
    return Fidelity(output, sums, kernels)


def compare_outputs(one: nn.Module, other: nn.Module, inputs: Inputs, parts: Sequence[str] = WHOLE) -> Sums:
    """Compare the outputs of both models, or of their parts, on the same inputs in eval mode.

    Each part of `other` gets the input of the same part of `one`. Both are unchanged afterwards. Raises AsymswapError
    where they give no tensor, or tensors of other sizes.
    """
    sums, results = Sums(), defaultdict[str, list[Any]](list)

    def run(name: str, args: Any, kwargs: Any) -> None:
        # On copies: a part may write into its inputs.
        args, kwargs = map_tensors((args, kwargs), Tensor.clone)
        results[name].append(other.get_submodule(name)(*args, **kwargs))

    def compare(name: str, _: Any, __: Any, output: Any) -> None:
        ones, others = list_tensors(output), list_tensors(results[name].pop())
        if [tensor.shape for tensor in ones] != [tensor.shape for tensor in others]:
            shapes = (sizes(tuple(tensors)) or "no tensor" for tensors in (others, ones))
            raise AsymswapError("outputs of {} cannot be compared with those of {}".format(*shapes))
        for mine, its in zip(ones, others, strict=True):
            sums.add(mine, its)

    with eval_mode(one, other), torch.no_grad(), hooked(one, parts, before=run, after=compare):
        for portion in portions(inputs):
            one(*portion)
    if parts and not sums.tensors:
        raise AsymswapError(
            "the model gives no tensor that could be compared; let its forward return tensors, or lists, tuples, "
            "dicts or dataclasses of them"
        )
    return sums


def difference(teacher: object, student: object) -> Tensor:
    """Return the squared difference of all outputs relative to the teacher's squares."""
    gaps, wholes = [], []
    for one, other in zip(list_tensors(teacher), list_tensors(student), strict=True):
        if one.is_floating_point():
            gaps.append((other.float() - one.float()).square().sum())
            wholes.append(one.float().square().sum())
    return torch.stack(gaps).sum() / torch.stack(wholes).sum().clamp_min(1e-12)


def feature_error(taught: Mapping[str, Any], learned: Mapping[str, Any], blocks: Mapping[str, str]) -> Tensor | None:
    """Return the squared error of the blocks' outputs relative to the teacher's variance; None without equal shapes."""
    errors = []
    for own, theirs in blocks.items():
        target, output = taught.get(theirs), learned.get(own)
        if isinstance(target, Tensor) and isinstance(output, Tensor) and target.shape == output.shape:
            errors.append((output.float() - target.float()).square().mean() / target.float().var().clamp_min(1e-12))
    return torch.stack(errors).mean() if errors else None


@contextmanager
def caught(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Collect the output of the last call of each named module while the block lasts."""
    outputs: dict[str, Any] = {}
    with hooked(model, names, after=lambda name, _, __, output: outputs.update({name: output})):
        yield outputs


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested output with its name: keys, fields and numbers, joined by dots."""
    if isinstance(output, Tensor):
        yield name, output
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, list | tuple):
        items = enumerate(output) if len(output) > 1 else [("", one) for one in output]
    elif hasattr(output, "__dataclass_fields__"):
        items = vars(output).items()
    for key, item in items:
        yield from named_outputs(item, ".".join(part for part in (name, str(key)) if part))


@dataclass
class _Output(Sums):
    shape: Sequence[int] = ()  # of a network's own output: in parts, a map of three channels is no image
    same: int = 0
    votes: int = 0
    cosines: float = 0.0
    rows: int = 0
    numbers: int = 0

    def add(self, one: Tensor, other: Tensor) -> None:
        super().add(one, other)
        self.numbers += one.numel()
        if one.dim() >= 2 and one.shape[1] >= 2 and one.is_floating_point():
            self.same += int((one.argmax(1) == other.argmax(1)).sum())
            self.votes += one.numel() // one.shape[1]
            self.cosines += float(F.cosine_similarity(one.double().flatten(1), other.double().flatten(1)).sum())
            self.rows += len(one)

    def result(self, name: str, scores: bool) -> OutputAgreement:
        """Return the measure that suits the output: scores, embeddings, images, other values."""
        relative, shape = self.relative, self.shape
        if scores and self.votes:
            interval = wilson_interval(self.same, self.votes)
            return OutputAgreement(name, "top-1", self.same / self.votes, relative, interval)
        if len(shape) == 2 and self.rows:
            return OutputAgreement(name, "cosine", self.cosines / self.rows, relative)
        size, error = math.sqrt(self.energy / self.numbers), self.squares / self.numbers
        peak = next((peak for peak, (low, high) in _PEAKS.items() if low <= size <= high), None)
        if len(shape) == 4 and shape[1] in (1, 3) and peak is not None:
            value = math.inf if error == 0 else 10 * math.log10(peak**2 / error)
            return OutputAgreement(name, "PSNR", value, relative, peak=peak)
        return OutputAgreement(name, "relative error", relative, relative)


def measure_agreement(
    original: nn.Module,
    other: nn.Module,
    batches: Iterable[tuple[Inputs, Inputs]],
    scores: bool,
    parts: Sequence[str] = WHOLE,
    step: Callable[[int], None] = lambda _: None,
    known: dict[int, dict[str, Tensor]] | None = None,
) -> tuple[OutputAgreement, ...]:
    """Compare both networks' outputs on batches of inputs, the own ones of each; each output by its name.

    `scores`: outputs of two dimensions are scores of classes, and a map of several channels scores for each pixel.
    Where outputs depend on values (a detector's boxes), those of the last `parts` are compared, in either network's own
    run. Outputs whose sizes differ are left out. `known` has the original's outputs of batches by their numbers; those
    that it lacks are put into it while they take little memory.
    """
    known = {} if known is None else known
    found: dict[str, _Output] = {}
    whole, done = tuple(parts) == WHOLE, 0

    def outputs_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        seen = defaultdict[str, list[Any]](list)
        with hooked(model, parts, after=lambda name, _, __, output: seen[name].append(output)):
            model(*copied(inputs))
        return dict(named_outputs(dict(list(seen.items())[-_LAST_PARTS:])))

    with eval_mode(original, other), torch.inference_mode():
        for number, (batch, own) in enumerate(batches):
            ones = known[number] = known[number] if number in known else outputs_of(original, batch)
            if sum(tensor.nbytes for kept in known.values() for tensor in kept.values()) > _KNOWN:
                del known[number]
            others = outputs_of(other, own)
            for name, one in ones.items():
                its = others.get(name)
                if its is not None and its.shape == one.shape and one.numel():
                    found.setdefault(name, _Output(shape=one.shape if whole else ())).add(one, its)
            done += samples_in(batch)
            step(done)
    # In the network's own order, for the first decides.
    return tuple(one.result(name, scores) for name, one in found.items())


class _StandIn(nn.Module):
    """Computes the same as the module that it holds, hidden from the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)

    def forward(self, input: Tensor) -> Any:
        return self.held[0](input)


def check_stand_ins(model: nn.Module, names: Sequence[str], inputs: Inputs) -> None:
    """Raise AsymswapError, with the name, if the model's code would not run a replacement as it runs the module."""
    filled = with_values(inputs, device_of(model))
    try:
        outputs, calls = _run(model, (), names, filled)
    except Exception:
        # A model that does not run on random numbers cannot be checked here; the converted model is run later.
        return

    def gap(others: Sequence[Tensor]) -> float:
        """Return the relative difference from the outputs before; infinite if their number or sizes differ."""
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in others]:
            return math.inf
        sums = Sums()
        for one, other in zip(outputs, others, strict=True):
            if not torch.equal(one.nan_to_num(), other.nan_to_num()):
                sums.add(one, other)
        return sums.relative

    def change(hidden: Sequence[str]) -> str | None:
        """Describe what changes with stand-ins for these modules, if anything."""
        try:
            after, calls_after = _run(model, hidden, hidden, filled)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        told = (describe_calls(name, calls_after[name], calls[name]) for name in hidden)
        other = next((one for one in told if one is not None), None)
        if other is not None or gap(after) <= _SAME:
            return other
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in after]:
            return "the model's outputs are others in number or size"
        # A model that draws random numbers, or has a state, is not the same twice either.
        if gap(_run(model, (), hidden, filled)[0]) > _SAME:
            return None
        return f"the model's output changes by {gap(after):.1e} although the layer computes the same"

    if (reason := change(names)) is None:
        return
    single = ((name, change([name])) for name in names)
    name, why = next(((name, why) for name, why in single if why is not None), (", ".join(names[:4]), reason))
    holders = [key for key, part in model.named_children() if find_convs(part)]
    inside = f", or give the network itself if it is the attribute {holders[0]!r}" if len(holders) == 1 else ""
    raise AsymswapError(
        f"{name} cannot be swapped: the model's code treats it unlike a module of another class ({why}); keep it by a "
        f"rule with keep = true{inside}"
    )


def _run(
    model: nn.Module, hidden: Sequence[str], names: Sequence[str], inputs: Inputs
) -> tuple[list[Tensor], dict[str, list[Call]]]:
    """Return the outputs of a run with stand-ins for the `hidden` modules, and the calls of the named ones."""
    # A copy, since a forward may build or fuse things in its own model.
    copied = swap(model, {name: _StandIn(model.get_submodule(name)) for name in hidden}, share=True)
    calls: dict[str, list[Call]] = {name: [] for name in names}

    def see(name: str, args: Any, kwargs: Any, output: Any) -> None:
        seen = args[0] if args else next(iter(kwargs.values()))
        calls[name].append(Call.of(seen.shape, output.shape))

    with hooked(copied, names, after=see), eval_mode(copied), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [tensor.clone() for tensor in list_tensors(copied(*inputs))], calls


def describe_calls(name: str, calls: Sequence[Call], expected: Sequence[Call]) -> str | None:
    """Describe how the calls of a module differ from the expected ones; None if they are the same."""
    if len(calls) != len(expected):
        return f"{name} is called {len(calls)} times instead of {len(expected)}"
    for call, other in zip(calls, expected, strict=True):
        if call != other:
            old, new = (f"{c.batch} of {c.input[0]}x{c.input[1]} to {c.output[0]}x{c.output[1]}" for c in (other, call))
            return f"{name} is called on {new} pixels instead of {old}"
    return None
