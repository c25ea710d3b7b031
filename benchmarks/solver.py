"""How far the error of a solved pair is above the smallest possible one, and how long solving takes.

    python benchmarks/solver.py --calibration-cache resnet20.safetensors dncnn.safetensors [--minutes 10] [--seed 0]
        [--out benchmarks/results/solver.json] [--markdown docs/results/calibration-experiments.md]

The files are what `asymswap convert --calibration-cache FILE` writes. Layers, orders and ranks (their logarithm
uniform up to the full rank), with and without the weight of the outputs, are drawn until the minutes are over; a third
are random kernels on random covariances with a decaying spectrum. The optimum is the least that torch's L-BFGS finds in
float64 over the first conv, the second being projected out in plain matrices: from the solution, and from two
starts drawn at random (one above rank 16).
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measured import machine_text, markdown_table, state, write_json
from torch import Tensor

from asymswap.calibration.gather import load_statistics
from asymswap.factorize import covariance
from asymswap.factorize.statistics import SiteStatistics

MARK = ("<!-- benchmarks/solver.py -->", "<!-- end of benchmarks/solver.py -->")
EXACT = 1e-9
"""Errors below this share of the output's energy are left out of the figures: there is nothing to compare."""


def random_statistics(draw: random.Random, seed: int) -> SiteStatistics:
    """A random kernel on a random covariance whose spectrum decays by two to four orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    inputs, outputs = draw.choice((8, 16, 32)), draw.choice((8, 16, 32))
    length = 9 * inputs
    q = torch.linalg.qr(torch.randn(length, length, generator=g, dtype=torch.float64)).Q
    cov = (q * torch.logspace(0, -draw.uniform(2, 4), length, dtype=torch.float64)) @ q.mT
    kernel = torch.randn(1, outputs, length, generator=g, dtype=torch.float64)
    slopes = torch.randn(2 * outputs, outputs, generator=g, dtype=torch.float64) * torch.logspace(0, -1, outputs)
    mean, zero = torch.zeros(1, length, dtype=torch.float64), torch.zeros(1, outputs, dtype=torch.float64)
    return SiteStatistics(mean, cov[None], kernel, zero, (slopes.mT @ slopes)[None], 10_000)


class Plain:
    """The problem in plain matrices: T = P^1/2 W S^1/2, of which a pair leaves what is outside (I (x) V) S^1/2."""

    def __init__(self, problem: covariance.Problem) -> None:
        self.taps = problem.w_GOKM.shape[2]
        self.root = torch.linalg.cholesky(problem.s_GKMKM.flatten(3).flatten(1, 2)[0])
        self.weight_root = torch.linalg.cholesky(problem.p_GOO[0])
        self.target = self.weight_root.mT @ problem.w_GOKM.flatten(2)[0] @ self.root

    def left(self, v_RM: Tensor) -> Tensor:
        """The error of the best second conv."""
        wide = torch.einsum("rm,kmd->krd", v_RM, self.root.unflatten(0, (self.taps, -1))).flatten(0, 1)
        factor = torch.linalg.cholesky(wide @ wide.mT)
        kept = torch.linalg.solve_triangular(factor, wide @ self.target.mT, upper=False)
        return self.target.square().sum() - kept.square().sum()

    def of_pair(self, v_RM: Tensor, h_OKR: Tensor) -> float:
        """The error of a pair as it is."""
        kernel = torch.einsum("okr,rm->okm", h_OKR, v_RM).flatten(1)
        return float((self.target - self.weight_root.mT @ kernel @ self.root).square().sum())

    def descended(self, start_RM: Tensor) -> float:
        """The error that a long L-BFGS ends at."""
        v = torch.linalg.qr(start_RM.mT).Q.mT.contiguous().requires_grad_()
        least = float(self.left(v.detach()))
        options = {"history_size": 30, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-7 * max(least, 1e-300)}
        descent = torch.optim.LBFGS([v], max_iter=200, max_eval=250, tolerance_grad=0, **options)

        def closure() -> Tensor:
            descent.zero_grad()
            error = self.left(v)
            error.backward()
            return error

        descent.step(closure)
        return min(least, float(self.left(v.detach())))


def measure(
    name: str, statistics: SiteStatistics, vertical_first: bool, weighted: bool, draw: random.Random
) -> dict[str, Any]:
    """One layer, order and rank."""
    if not weighted:
        statistics = SiteStatistics(**{**vars(statistics), "weight_GOO": None})
    problem = covariance.arrange(statistics, (3, 3), vertical_first)
    _, outputs, taps, rows = problem.w_GOKM.shape
    full = min(rows, outputs * taps)
    rank = int(full ** draw.random())
    begin = time.process_time()
    a_GAR, b_GRB = covariance.factors(problem, rank)
    seconds = time.process_time() - begin
    plain = Plain(problem)
    v_RM = a_GAR[0].mT
    error = plain.of_pair(v_RM, b_GRB[0].unflatten(1, (outputs, taps)).permute(1, 2, 0))
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    factor = plain.root[:rows, :rows]
    drawn = [torch.randn(rank, rows, generator=g, dtype=torch.float64) for _ in range(2 if rank <= 16 else 1)]
    starts = [v_RM, *(torch.linalg.solve_triangular(factor, v, upper=False, left=False) for v in drawn)]
    least = min(error, *(plain.descended(start) for start in starts))
    return {
        "layer": name,
        "vertical_first": vertical_first,
        "weighted": weighted,
        "rows": taps * rows,
        "rank": rank,
        "full": full,
        "error": error / float(plain.target.square().sum()),
        "above": error / least - 1,
        "ms": 1e3 * seconds,
    }


def survey(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure drawn cases until the minutes are over, each source in its turn."""
    draw = random.Random(args.seed)
    sources = [(file.stem, list(load_statistics(file)[0].items())) for file in args.calibration_cache]
    found: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        number = len(found) % (len(sources) + 1)
        if number == len(sources):
            name, statistics = "random", random_statistics(draw, len(found))
        else:
            stem, layers = sources[number]
            layer, statistics = draw.choice(layers)
            name = f"{stem} {layer}"
        if statistics.target_GOD.shape[0] == 1 and statistics.target_GOD.shape[2] % 9 == 0:
            found.append(measure(name, statistics, draw.random() < 0.5, draw.random() < 0.7, draw))
    return found


def rows_of(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each source and one for all: the gaps in percent, and the processor time of a solution."""
    inexact = [case for case in found if case["error"] > EXACT]
    rows = []
    for name in [*dict.fromkeys(case["layer"].split()[0] for case in inexact), "all"]:
        some = [case for case in inexact if name in ("all", case["layer"].split()[0])]
        gaps = sorted(case["above"] for case in some)
        at_ninety = gaps[int(0.9 * (len(gaps) - 1))]
        figures = [f"{100 * gap:.2f}" for gap in (median(gaps), at_ninety, gaps[-1])]
        times = sorted(case["ms"] for case in some)
        rows.append([name, f"{len(some)}", *figures, f"{median(times):.0f}", f"{times[-1]:.0f}"])
    return rows


COLUMNS = ["layers of", "cases", "median %", "90 % of them %", "worst %", "median ms", "longest ms"]


def write_section(page: Path, found: list[dict[str, Any]]) -> None:
    """Put the table between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARK[0])
    _, end, after = rest.partition(MARK[1])
    assert end, f"{page} lacks {MARK[0]} and {MARK[1]}"
    shown = markdown_table(COLUMNS, rows_of(found))
    page.write_text(f"{before}{MARK[0]}\n{shown}\n\nMachine: {machine_text()}.\n{MARK[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-cache", type=Path, nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = survey(args)
    print(markdown_table(COLUMNS, rows_of(found)))
    for case in sorted(found, key=lambda case: -case["above"] * (case["error"] > EXACT))[:8]:
        print(f"{100 * case['above']:.2f} % {case}")
    if args.out is not None:
        write_json(args.out, {"state": state(), "cases": found})
    if args.markdown is not None:
        write_section(args.markdown, found)


if __name__ == "__main__":
    main()
