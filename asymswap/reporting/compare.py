"""How a comparison is shown."""

from asymswap.reporting import format as fmt
from asymswap.reporting.tables import WIDE, Column, Screen, Table, score_column
from asymswap.results.evaluate import Comparison


def comparison_view(comparison: Comparison, width: int | None) -> Screen:
    """Return a row for each model, and the fine print below."""
    models, first, timing = comparison.models, comparison.models[0], comparison.timing
    wide = width is None or width >= WIDE
    scores = list({score.name: score for row in models for score in row.scores}.values())
    columns = [
        Column("Model", "model", side="fold", code=True),
        Column("MACs", "cost.macs", fmt.count),
        Column("of 1st", lambda row: fmt.share(row.cost.macs, first.cost.macs), least=WIDE),
        Column("Params", "cost.params", fmt.count),
        Column("of 1st", lambda row: fmt.share(row.cost.params, first.cost.params), least=WIDE),
        Column("Weights", "weights_bytes", fmt.size, least=WIDE),
    ]
    if any(row.file_bytes is not None for row in models):
        columns.append(Column("File", "file_bytes", fmt.size))
    if timing is not None:
        columns += [
            Column("ms", "latency.minimum", fmt.milliseconds),
            Column("Median", "latency.median", fmt.milliseconds, least=WIDE),
            Column("of 1st", lambda row: fmt.time_share(row.latency_ratio, row is first), least=WIDE),
        ]
    columns.append(Column("Output", "gap.relative", fmt.error))
    if any(row.gap is not None and row.gap.agreement is not None for row in models):
        columns.append(Column("Agree", "gap.agreement", fmt.percent, least=WIDE))
    # There is hardly room for top-5; its change is in the fine print.
    columns += [score_column(score, least=130 if score.name == "top-5" else 0) for score in scores]
    # Twelve columns of figures leave the names of the models too little with two blanks between them.
    table = Table(columns, models, gap=1 if wide else 2)
    lines = [f"Output: relative difference from {first.model}'s, on {comparison.outputs_on}."]
    if timing is not None:
        lines.append(
            f"ms: one forward pass, {fmt.setting(timing)} of {timing.machine}; all models in turn, "
            f"{timing.rounds} rounds at most, their minimum." + " Of 1st: the median of the rounds' ratios." * wide
        )
        lines += fmt.doubts(first.model, ((row.model, row.latency_ratio) for row in models[1:]))
    if comparison.data is not None:
        of_them = f", {comparison.images:,} of them" if comparison.images else ""
        lines.append(f"{fmt.measured_on(scores, comparison.data)}{of_them}.")
    for row in models[1:]:
        changes = [
            f"{one.name} {fmt.score_change(one.value - other.value, one.unit)}"
            for one, other in zip(row.scores, first.scores, strict=False)
        ]
        lines += [f"{row.model} beside the first: {', '.join(changes)}."] if changes else []
        if row.against_first is not None:
            lines.append(
                f"{row.model} alone is right on {row.against_first.only_this} images, {first.model} alone on "
                f"{row.against_first.only_first} (McNemar's exact test: p = {row.against_first.p:.2g})."
            )
    if len({row.input for row in models}) > 1:
        lines.append("Inputs: " + ", ".join(f"{row.model} {row.input}" for row in models) + ".")
    lines += fmt.fed_by_model((row.model, row.fed) for row in models)
    lines += [f"{row.model}: {note}." for row in models for note in row.notes]
    left = " Of 1st: what is left of the first model's." * wide
    lines.append(f"MACs of one forward pass, batch 1; FLOPs are 2 x MACs.{left}")
    return Screen("", comparison.warnings, [[table]], lines, width)
