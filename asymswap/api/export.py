"""A converted model as a file that other programs run: ONNX, torch.export's .pt2, or a plain state dict.

Programs (ONNX and .pt2) are run beside the model in PyTorch before they take their place on the disk: what computes
something else is never written. A state dict computes nothing; it holds the model's own tensors.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from asymswap.api.progress import Shows, shows_progress
from asymswap.calibration.agreement import Against
from asymswap.calibration.config import Calibration
from asymswap.checkpoint import save_state
from asymswap.data.inputs import open_inputs, settle_on
from asymswap.errors import AsymswapError, OutputError, SourceError, check_choice, reason_of
from asymswap.measure import int8, runtimes
from asymswap.models import transformers_models, ultralytics_models
from asymswap.models.converted import original_of, save_checkpoint
from asymswap.models.opened import OpenedModel, input_warnings
from asymswap.models.opening import Model, open_for_verb
from asymswap.planning.fuse import fuse_model
from asymswap.results.convert import Check, ExportReport, FileRow
from asymswap.utils.files import check_output, whole_file
from asymswap.utils.inputs import Inputs, sizes
from asymswap.utils.tensors import deep_copy, map_tensors

Form = Literal["onnx", "pt2", "state-dict", "ultralytics", "transformers"]
SUFFIXES: dict[Form, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "pt2": (".pt2",),
    "ultralytics": (".pt",),
    "state-dict": (".pt", ".pth", ".safetensors"),
    "transformers": ("",),
}


@shows_progress
def export(
    model: Model,
    path: str | Path,
    *,
    form: Form | None = None,
    fuse: bool = True,
    dynamic_size: bool = False,
    quantize: Literal["int8"] | None = None,
    calibration: Calibration | None = None,
    force: bool = False,
    seed: int = 0,
    example_inputs: Any = None,
    progress: Shows = True,
) -> ExportReport:
    """Write a model as ONNX, as .pt2 or as a plain state dict; the first two are run beside PyTorch.

    `form` follows the file's ending by default; `ultralytics` is a file that `YOLO` reads, with the swaps,
    `transformers` a folder with the config and a checkpoint, which `from_pretrained` refuses with the way to load it.
    With `fuse`, replacements that fuse exactly are fused before. The batch may have any size, with `dynamic_size` the
    height and width too. With `quantize` the ONNX file computes in int8, its ranges measured on the inputs of
    `calibration`; how far it answers as the model does is measured on the inputs that are held back. Raises
    AsymswapError where the model cannot be exported, or the file computes something else.
    """
    path = Path(path)
    by_suffix = {suffix: known for known, suffixes in SUFFIXES.items() for suffix in suffixes if suffix}
    form = form or by_suffix.get(path.suffix)
    if form is None:
        raise OutputError(f"{path}: an export ends in one of {', '.join(by_suffix)}; or give `form=…`")
    check_choice("the form", form, SUFFIXES)
    if path.suffix not in SUFFIXES[form]:
        ends = " or ".join(SUFFIXES[form]) or "no suffix: it is a folder"
        raise OutputError(f"{path}: the file of a {form} export ends in {ends}")
    if quantize is not None:
        check_choice("what to quantise to", quantize, ("int8",))
        if form != "onnx":
            raise AsymswapError(f"int8 is for ONNX files, and {path} is to be {form}; leave out `quantize=…`")
    if (quantize is None) != (calibration is None or calibration.data is None):
        raise AsymswapError("`quantize=int8` goes with `calibration=…`, inputs to measure its ranges on; give both")
    check_output(path, force)
    versions: tuple[str, ...] = (f"torch {torch.__version__}",)
    if form == "onnx":
        versions = runtimes.check_installed("ONNX", "onnx", runtimes.ONNX_RUNTIME)
    opened = open_for_verb(model, progress, example_inputs=example_inputs)
    if form in ("ultralytics", "transformers") and not opened.origin.reference.startswith(f"{form}:"):
        raise SourceError(f"{opened.reference} is no network of {form}, but {opened.origin.reference}")
    if opened.preprocessing.form == "image-list":
        boxes = f"{opened.reference} takes lists of images and keeps a number of boxes that depends on them"
        raise AsymswapError(f"{boxes}: export its backbone from Python with torch.onnx.export")
    ready, fused, as_original = opened.model, 0, not any(plan.swaps for plan in opened.plans)
    if fuse and opened.plans and form not in ("ultralytics", "transformers"):  # which train on with the swaps
        ready, left, rows = fuse_model(ready, original_of(opened), opened.plans, progress)
        fused, as_original = sum(row.outcome != "left" for row in rows), not left
    elif quantize is not None or not opened.may_share:
        ready = deep_copy(ready)
    opened = replace(opened, model=ready.eval())
    inputs, rotated, agreement, warnings = None, 0, None, input_warnings(opened)
    if calibration is not None:
        opened = settle_on(opened, calibration.given())
        inputs = open_inputs(opened, calibration.given(), calibration.images, calibration.seed)[0]
        rotated = int8.rotate_(ready, {swap.site for plan in opened.plans for swap in plan.swaps})
    progress("exporting", 0, 1)
    checks, dynamic = list[Check](), tuple[str, ...]()
    if form == "ultralytics":
        ultralytics_models.save(opened, path)
    elif form == "transformers":
        path = transformers_models.save(opened, path, lambda file: save_checkpoint(file, ready, opened.header()))
    elif form != "state-dict":
        dynamic = ("batch", "height", "width") if dynamic_size else ("batch",)
        with whole_file(path) as draft:
            checks = _write_program(opened, form, draft, dynamic_size, seed)
            if form == "onnx" and any(node.op_type == "DeformConv" for node in runtimes.nodes_of(draft)):
                warnings += (
                    "DeformConv is in the file: ONNX Runtime runs it on the CPU, and OpenVINO does not read it "
                    "(docs/reference/kinds.md tells what runs where)",
                )
            if inputs is not None and calibration is not None:
                progress("quantising", 0, 1)
                int8.quantize(draft, inputs)
                step = partial(progress, "comparing")
                agreement = Against(opened, calibration).agreement(int8.FileModel(draft), step)
    elif as_original:
        save_state(path, ready)
    else:
        raise AsymswapError(
            f"a plain state_dict is one that {opened.origin.reference} loads, and some replacements do not fuse to its "
            "convs; export to onnx or pt2, or use asymswap.load"
        )
    progress("exporting", 1, 1)
    return ExportReport(
        model=opened.reference,
        form=form,
        runner={"onnx": "ONNX Runtime", "pt2": "torch.export"}.get(form, "none"),
        fused=fused,
        checks=tuple(checks),
        dynamic=dynamic,
        int8=agreement,
        rotated=rotated,
        opset=runtimes.OPSET if form == "onnx" else None,
        files=(FileRow(str(path), path.stat().st_size),),
        versions=versions,
        warnings=warnings,
    )


def as_yolo(model: Model, path: str | Path | None = None, *, force: bool = False) -> Any:
    """Return ultralytics' `YOLO` object of a converted network: it predicts, validates, exports and trains on.

    The network is written to `path`, a `.pt` file, for `YOLO` reads files; without one, `model` is such a file already,
    as `export(…, form="ultralytics")` and training write it. Training keeps the swaps; a plain `YOLO(path)` predicts
    the same, but builds the original network anew to train it. Raises AsymswapError for a network of another family.
    """
    if path is not None:
        export(model, path, form="ultralytics", force=force, progress=False)
    elif not isinstance(model, str | Path):
        raise AsymswapError("give a `path` to write the network to, such as yolov8n-acnet.pt: YOLO reads files")
    elif not Path(model).is_file():
        raise SourceError(f"no file {model}; give one that export wrote for ultralytics, or a model and a path")
    return ultralytics_models.load_yolo(Path(path or str(model)))


def _write_program(opened: OpenedModel, form: Form, draft: Path, dynamic_size: bool, seed: int) -> list[Check]:
    """Write a model in eval mode as ONNX or .pt2, and return the checks that run it beside PyTorch."""
    model, takes, dtype = opened.model, opened.preprocessing, opened.dtype()
    if form == "onnx" and dtype in (torch.float64, torch.bfloat16):
        raise AsymswapError(
            f"ONNX Runtime has no convolutions of {str(dtype).removeprefix('torch.')} on the processor; export a model "
            'of float32, or give `form="pt2"`'
        )
    inputs = opened.probe(2, seed)
    batch = torch.export.Dim("batch")

    def sizes_of(one: torch.Tensor) -> dict[int, Any] | None:
        free = (one.dim() - 2, one.dim() - 1) if dynamic_size else ()
        return {0: batch, **dict.fromkeys(free, torch.export.Dim.AUTO)} if one.shape[:1] == (2,) else None

    shapes = map_tensors(inputs, sizes_of)
    run: Callable[[Inputs], Any]
    if form == "onnx":
        runtimes.write_onnx(model, inputs, shapes, draft)
        session = runtimes.open_session(draft)
        runner, run = "ONNX Runtime", lambda given: runtimes.forward_in(session, given)()
    else:
        with runtimes.quiet(), runtimes.failing_clearly("torch.export"):
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            draft.write_bytes(buffer.getvalue())
            loaded = torch.export.load(io.BytesIO(draft.read_bytes())).module()
        runner, run = "the exported program", lambda given: loaded(*given)
    tried = [(1, takes.size), (3, takes.size)]
    if dynamic_size and opened.example_inputs is None:
        tried.append((3, (takes.size[0] * 3 // 2, takes.size[1] * 5 // 4)))
    checks = []
    for images, size in tried:
        inputs = replace(opened, preprocessing=replace(takes, size=size)).probe(images, seed)
        with torch.no_grad():
            expected = model(*inputs)
        try:
            with torch.no_grad():
                found = run(inputs)
        except Exception as error:  # each program has errors of its own
            raise AsymswapError(
                f"{runner} does not take {sizes(inputs)}: {reason_of(error, 150)}; its code fixes a size that may "
                "differ, so export it with the library that it is from; nothing was written"
            ) from error
        check = Check(sizes(inputs), *runtimes.widest_gap(expected, found))
        if not check.largest <= check.allowed:
            gap = f"{check.largest:.1e} at most, where {check.allowed:.0e} are allowed; nothing was written"
            raise AsymswapError(f"{runner} computes something else than PyTorch on {check.inputs}: {gap}")
        checks.append(check)
    return checks
