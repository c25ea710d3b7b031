"""What a student is taught: labels, probabilities, features; and where its teacher comes from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asymswap
from asymswap.checkpoint import read_checkpoint
from asymswap.data.batches import Batch
from asymswap.data.metrics import all_scores
from asymswap.errors import SourceError
from asymswap.fileformats.detect import sha256
from asymswap.measure.fidelity import caught, feature_error
from asymswap.models.networks import digits_resnet
from asymswap.models.opening import open_model
from asymswap.training import distillation
from asymswap.training.config import Training
from asymswap.training.distillation import ORIGINAL, Teacher, blocks_around, find_teacher
from asymswap.training.objective import Objective, divergence
from asymswap.types import Origin, Swap


class Scores(nn.Module):
    """A classifier whose scores are its parameters, times the image's mean."""

    def __init__(self, *rows: float) -> None:
        super().__init__()
        self.layer = nn.Linear(1, len(rows), bias=False)
        self.layer.weight = nn.Parameter(torch.tensor(rows)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)))  # type: ignore[no-any-return]


def taught(teacher: Teacher, **settings: Any) -> Objective:
    return Objective(Training(distill=teacher.description, **settings), teacher)


def loss_of(objective: Objective, student: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the student's scores."""
    loss, right = objective.loss(student, student, Batch((images, labels), len(images)))
    scores = all_scores(student(images))[0]
    assert int(right) == int((scores.argmax(1) == labels).sum())
    return loss, scores


IMAGES = torch.ones(2, 1, 2, 2)
LABELS = torch.tensor([0, 2])


def test_labels_alone_are_cross_entropy_summed() -> None:
    student = Scores(1.0, 2.0, -1.0)
    loss, scores = loss_of(Objective(Training(label_smoothing=0.1)), student, IMAGES, LABELS)
    expected = F.cross_entropy(scores, LABELS, label_smoothing=0.1) * 2
    torch.testing.assert_close(loss, expected)


def test_divergence_by_hand() -> None:
    """Two classes at temperature 2: sum of p log(p / q), times 4."""
    target, scores = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    expected = 4 * (p * torch.log(p / 0.5) + (1 - p) * torch.log((1 - p) / 0.5))
    torch.testing.assert_close(divergence(target, scores, 2.0), expected)
    assert float(divergence(scores, scores, 2.0)) == 0.0


def test_both_parts_and_the_features_add_up() -> None:
    student, master = Scores(1.0, 2.0, -1.0), Scores(0.5, 2.5, 0.0)
    teacher = Teacher(master, "master", {"layer": "layer"})
    objective = taught(teacher, distill_weight=0.75, temperature=2.0, distill_features=3.0)
    loss, scores = loss_of(objective, student, IMAGES, LABELS)
    target = master(IMAGES)
    features = (scores - target).square().mean() / target.var()
    expected = 0.75 * divergence(target, scores, 2.0) + 0.25 * F.cross_entropy(scores, LABELS, reduction="sum")
    torch.testing.assert_close(loss, expected + 3.0 * 2 * features)
    loss.backward()
    assert student.layer.weight.grad is not None
    assert master.layer.weight.grad is None
    assert not student.layer._forward_hooks


def test_scores_may_be_compared_instead_of_probabilities() -> None:
    """Scores 1, 2, -1 instead of 0.5, 2.5, 0: squares 0.25, 0.25 and 1 beside 0.25 and 6.25, for each of two images."""
    student, teacher = Scores(1.0, 2.0, -1.0), Teacher(Scores(0.5, 2.5, 0.0), "master", {})
    loss, scores = loss_of(taught(teacher, distill_weight=0.8, distill_loss="mse"), student, IMAGES, LABELS)
    expected = 0.8 * 2 * 1.5 / 6.5 + 0.2 * F.cross_entropy(scores, LABELS, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    student = Scores(1.0, 2.0)
    teacher = Teacher(Scores(1.0, 2.0), "twin", {"layer": "layer"})
    loss, _ = loss_of(taught(teacher, distill_weight=1.0, distill_features=1.0), student, IMAGES, LABELS)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)


def test_auxiliary_classifiers_count_a_little() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            return torch.tensor([[1.0, 0.0]]).expand(2, -1), None, torch.tensor([[0.0, 3.0]]).expand(2, -1)

    labels = torch.tensor([0, 1])
    loss, scores = loss_of(Objective(Training()), Two(), IMAGES, labels)
    main, auxiliary = (torch.tensor([row, row]) for row in ([1.0, 0.0], [0.0, 3.0]))
    assert torch.equal(scores, main)
    parts = [F.cross_entropy(part, labels, reduction="sum") for part in (main, auxiliary)]
    torch.testing.assert_close(loss, parts[0] + 0.3 * parts[1])


def test_scores_by_name_as_classifiers_of_transformers_return_them() -> None:
    class Named(Scores):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    found, plain = (loss_of(Objective(Training()), kind(1.0, 2.0, -1.0), IMAGES, LABELS) for kind in (Named, Scores))
    assert torch.equal(found[0], plain[0])


def test_what_is_no_classifier_or_no_teacher_of_these_classes() -> None:
    with pytest.raises(SourceError, match=r"returns 2x3x4, not images x class scores"):
        all_scores(torch.zeros(2, 3, 4))
    student, teacher = Scores(1.0, 2.0), Teacher(Scores(1.0, 2.0, 3.0), "wide", {})
    with pytest.raises(
        SourceError, match=r"the teacher wide scores 3 classes, the model 2; give one of the same classes"
    ):
        loss_of(taught(teacher), student, IMAGES, torch.tensor([0, 1]))
    objective = taught(Teacher(Scores(1.0, 2.0), "same", {}), distill_features=1.0)
    with pytest.raises(SourceError, match=r"no block of the teacher has the same output"):
        loss_of(objective, student, IMAGES, torch.tensor([0, 1]))


def stored(tmp_path: Path, reference: Any, **options: Any) -> Any:
    asymswap.save(
        asymswap.convert(asymswap.open_model(reference, **options), "3x3-only"), tmp_path / "x.asym.pt", force=True
    )
    return read_checkpoint(tmp_path / "x.asym.pt").header


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])


def test_blocks_are_the_innermost_modules_that_are_no_lists() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 1)), Block(), Block())
    swaps = [Swap(name, "separable", {}) for name in ("0", "1.0", "2.convs.0", "2.convs.1", "3.convs.0", "4")]
    assert blocks_around(swaps, model, model) == {name: name for name in ("0", "1.0", "2", "3")}
    # What the other lacks cannot be compared.
    assert blocks_around(swaps, model, model[:3]) == {name: name for name in ("0", "1.0", "2")}


def test_a_layer_that_has_taken_over_a_batch_norm_gives_what_that_gives() -> None:
    teacher = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    nn.init.uniform_(teacher[1].weight)
    conversion = asymswap.convert(
        asymswap.open_model(teacher, input_size=(2, 8, 8)), "acnet-branch-bn", overrides={"allow_growth": True}, seed=0
    )
    blocks = blocks_around(conversion.plan.swaps, conversion.model, teacher)
    assert blocks == {"0": "1"}
    images = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), caught(teacher, blocks.values()) as taught, caught(conversion.model, blocks) as learned:
        teacher(images.clone())
        conversion.model.eval()(images.clone())
    error = feature_error(taught, learned, blocks)
    assert error is not None
    assert float(error) == pytest.approx(0.0, abs=1e-9)


def test_the_original_of_a_name(tmp_path: Path) -> None:
    header = stored(tmp_path, "digits-resnet")
    teacher = find_teacher(header, ORIGINAL, digits_resnet())
    assert teacher.description == "digits-resnet"
    assert teacher.blocks == {name: name for name in ("layer1.0", "layer1.1", "layer2.0", "layer2.1")}
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_original_of_a_file_must_be_the_file_that_was_converted(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    model = digits_resnet()
    torch.save(model.state_dict(), path)
    for options in ({"arch": "digits-resnet"}, {}):
        header = stored(tmp_path, path, **options) if options else stored(tmp_path, "digits-resnet", weights=str(path))
        teacher = find_teacher(header, ORIGINAL, digits_resnet(), tmp_path)
        for key, tensor in teacher.model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])
    torch.save(digits_resnet().state_dict(), path)
    with pytest.raises(SourceError, match=r"mine.pt is no longer the file that was converted .its SHA-256 differs"):
        find_teacher(header, ORIGINAL, digits_resnet(), tmp_path)
    path.unlink()
    with pytest.raises(SourceError, match=r"mine.pt is not beside the checkpoint in .*; put it there, or give the te"):
        find_teacher(header, ORIGINAL, digits_resnet(), tmp_path)


def test_no_path_in_a_checkpoint_is_followed(tmp_path: Path) -> None:
    """Neither that of the original's file, nor weights that look like one, though the file is there."""
    path = tmp_path / "mine.pt"
    torch.save(digits_resnet().state_dict(), path)
    header = stored(tmp_path, path, arch="digits-resnet")
    other = tmp_path / "other"
    other.mkdir()
    for folder in (None, other):
        with pytest.raises(SourceError, match=r"the original mine\.pt is not beside the checkpoint"):
            find_teacher(header, ORIGINAL, digits_resnet(), folder)
    report = {**header.provenance["report"]}
    report["model"] = {**report["model"], "weights": str(path), "sha256": None}
    lying = replace(header, provenance={**header.provenance, "report": report})
    with pytest.raises(SourceError, match=r"names the weights '.*mine\.pt', a path, which is not followed"):
        find_teacher(lying, ORIGINAL, digits_resnet(), tmp_path)


def test_a_file_beside_the_checkpoint_is_never_run_for_its_name(tmp_path: Path) -> None:
    """As a reference `net.py:Net` would run net.py, whatever file has that name and the recorded hash."""
    (tmp_path / "net.py").write_text("from pathlib import Path; Path(__file__).with_name('canary').touch()")
    named = tmp_path / "net.py:Net"
    torch.save(digits_resnet().state_dict(), named)
    header = stored(tmp_path, "digits-resnet")
    report = {**header.provenance["report"]}
    report |= {"files": [{"path": named.name}]}
    report["model"] = {**report["model"], "reference": named.name, "sha256": sha256(named), "weights": "file"}
    for origin in ("class:net.Net", header.origin.reference):
        lying = replace(header, origin=Origin(origin), provenance={**header.provenance, "report": report})
        with pytest.raises(SourceError, match="is not beside the checkpoint"):
            find_teacher(lying, ORIGINAL, digits_resnet(), tmp_path)
    assert not (tmp_path / "canary").exists()


def test_nothing_is_downloaded_for_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    header = stored(tmp_path, "digits-resnet")
    report = {"model": {"reference": "torchvision:alexnet", "weights": "DEFAULT"}}
    lying = replace(header, origin=Origin("torchvision:alexnet"), provenance={"report": report})
    with pytest.raises(SourceError, match="nothing is downloaded on a checkpoint's word"):
        find_teacher(lying, ORIGINAL, digits_resnet(), tmp_path)


@pytest.mark.parametrize("weights", ["DEFAULT", "other"])
def test_the_original_has_the_arguments_and_weights_that_are_stored(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its arguments a yaml would be read from the path; without its weights timm would take its own default."""
    asked: list[dict[str, Any]] = []

    def refuse(_: str, **options: Any) -> None:
        asked.append(options)
        raise ZeroDivisionError

    monkeypatch.setattr(distillation, "open_model", refuse)
    header = stored(tmp_path, "digits-resnet")
    for reference, arguments in (
        ("timm:resnet18", {"in_chans": 1}),
        ("ultralytics:/etc/net.yaml", {"yaml": {"nc": 1}}),
    ):
        report = {"model": {"reference": reference, "weights": weights}}
        told = replace(header, origin=Origin(reference, arguments), provenance={"report": report})
        with pytest.raises(ZeroDivisionError):
            find_teacher(told, ORIGINAL, digits_resnet(), tmp_path)
        assert (asked[-1]["weights"], asked[-1]["arguments"]) == (weights, arguments)


def test_originals_that_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the original digits-resnet had random weights, which are not kept"):
        find_teacher(stored(tmp_path, "digits-resnet", weights="none"), ORIGINAL, digits_resnet())
    with pytest.raises(SourceError, match=r"does not say which model it was made from; give the teacher, `distill=…`"):
        find_teacher(
            asymswap.convert(asymswap.open_model(digits_resnet(), input_size=(1, 8, 8)), "3x3-only").header,
            ORIGINAL,
            digits_resnet(),
        )
    with pytest.raises(SourceError, match=r"the teacher digit-resnet cannot be used: no model 'digit-resnet'"):
        find_teacher(stored(tmp_path, "digits-resnet"), "digit-resnet", digits_resnet())


def test_code_that_a_checkpoint_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_code.py").write_text(
        "from asymswap.models.networks import digits_resnet\nruns = []\n"
        "def net():\n    runs.append(1)\n    return digits_resnet()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    header = stored(tmp_path, "user_code:net", input_size=(1, 8, 8))
    import user_code  # type: ignore[import-not-found]

    before = len(user_code.runs)
    with pytest.raises(SourceError, match=r"the original was built by user_code:net, which is code or a file of yours"):
        find_teacher(header, ORIGINAL, digits_resnet())
    assert len(user_code.runs) == before
    assert find_teacher(header, "user_code:net", digits_resnet()).description == "user_code:net"


@pytest.mark.parametrize("kind", ["skeleton", "class"])
@pytest.mark.parametrize("told", [{}, {"sha256": True}])
def test_an_origin_that_reads_like_code_is_never_imported(
    kind: str, told: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint could claim it: the origin of a whole module, beside a model's name instead of its file's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path(f"{kind}.py").write_text("from pathlib import Path\nPath('sprung').touch()\nbuild = None\n")
    weights = tmp_path / "w.pt"
    torch.save(digits_resnet().state_dict(), weights)
    model: dict[str, str] = {"reference": "digits-resnet", "weights": "DEFAULT"}
    if told:
        model["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    header = replace(
        stored(tmp_path, "digits-resnet"),
        origin=Origin(f"{kind}:build"),
        provenance={"report": {"model": model, "files": [{"path": str(weights)}]}},
    )
    with pytest.raises(SourceError, match=r"does not say which file it was made from; give the teacher, `distill=…`"):
        find_teacher(header, ORIGINAL, digits_resnet())
    with pytest.raises(SourceError, match=rf"no model '{kind}:build', and no such file"):
        open_model(f"{kind}:build")
    assert not Path("sprung").exists()
