"""`asymswap fuse` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked

import asymswap
from asymswap.models.networks import digits_resnet

Run = Callable[..., Any]
RULE = "[[rules]]\nmatch = {{ kernel = '3x3', in_channels = {{ min = 8 }} }}\nswap = {{ {} }}\n"


def converted(run: Run, swap: str, name: str = "in.asym.pt") -> Path:
    Path("recipe.toml").write_text(RULE.format(swap))
    run("convert", "digits-resnet", "--recipe", "recipe.toml", "-o", name, "--force", "-q")
    return Path(name)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["out.pt", "out.safetensors"])
def test_a_fused_file_loads_in_a_fresh_process_and_computes_the_same(run: Run, form: str, probe: torch.Tensor) -> None:
    """Moved taps give a larger conv, which the checkpoint has to rebuild."""
    path = converted(run, "kind = 'offset', limit = 1.5")
    conversion = asymswap.convert("digits-resnet", "recipe.toml")
    with torch.no_grad():
        for name, parameter in conversion.model.named_parameters():
            if name.endswith("raw_offsets"):
                parameter.uniform_(-1, 1)
    asymswap.save(conversion, path, force=True)
    run("fuse", str(path), "-o", form)
    code = (
        "import asymswap, torch; m = asymswap.load('%s'); "
        "x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)); torch.save(m(x).detach(), 'y.pt'); "
        "print(sorted({type(m).__name__ for m in m.modules()}))"
    )
    done = forked(code % form, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "Offset" not in done.stdout
    with torch.no_grad():
        expected = conversion.model(probe)
    assert torch.allclose(torch.load("y.pt"), expected, atol=1e-5)


def test_as_original_needs_nothing_of_ours(run: Run, probe: torch.Tensor) -> None:
    path = converted(run, "kind = 'acb', bn = 'branch'")
    data = json.loads(run("fuse", str(path), "--as-original", "-o", "plain.pt", "--json").out)
    assert (data["schema"], data["as_original"]) == (1, True)
    assert {row["outcome"] for row in data["sites"]} == {"fused"}
    model = digits_resnet()
    model.load_state_dict(torch.load("plain.pt", weights_only=True))
    with torch.no_grad():
        assert torch.allclose(model.eval()(probe), asymswap.load(path)(probe), atol=1e-5)


def test_an_export_tells_its_form(run: Run) -> None:
    path = converted(run, "kind = 'acb', bn = 'branch'")
    data = json.loads(run("export", str(path), "--to", "state-dict", "-o", "plain.pt", "--json").out)
    assert (data["schema"], data["form"]) == (1, "state-dict")


def test_the_screen_tells_what_was_fused_and_what_was_left(run: Run) -> None:
    path = converted(run, "kind = 'acb'")
    out = run("fuse", str(path)).out
    for text in ("8 of 8 replacements fused", "8 acb: fused", "state dict fits digits-resnet", "in.fused.pt"):
        assert text in out
    shown = run("show", "in.fused.pt").out
    assert "Fused" in shown


def test_what_cannot_be_fused(run: Run, refusal: Run) -> None:
    path = converted(run, "kind = 'separable', rank = 9")
    assert "nothing to fuse (separable: one conv would cost more; --separable" in refusal("fuse", str(path))
    run("fuse", str(path), "--separable", "-o", "whole.pt")
    assert "nothing to fuse (it holds no replacement)" in refusal("fuse", "whole.pt", "-o", "again.pt")
    assert "has no plan: all that was swapped has been fused back" in refusal("show", "whole.pt", "--plan")
    offset = converted(run, "kind = 'offset'", "moved.pt")
    state = torch.load(offset, weights_only=True)
    for key, tensor in state["state_dict"].items():
        if key.endswith("raw_offsets"):
            tensor.fill_(0.3)
    torch.save(state, offset)
    assert "does not fit digits-resnet: layer1.0.conv1 (offset) is resized" in refusal(
        "fuse", str(offset), "--as-original", "-o", "never.pt"
    )
    assert not Path("never.pt").exists()
    assert "exists already" in refusal("fuse", str(path), "--separable", "-o", "whole.pt")
