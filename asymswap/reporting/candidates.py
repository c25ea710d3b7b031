"""How the candidates of a model are shown: for a terminal, and as a plot."""

from rich.text import Text

from asymswap.reporting import format as fmt
from asymswap.reporting.pages import add_legend, new_figure, picture_of
from asymswap.reporting.tables import WIDE, Column, Screen, Table, written
from asymswap.results.candidates import Candidates
from asymswap.types import Candidate, Cost

_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo")  # kinds differ in these as well as in their colours


def candidates_view(found: Candidates, width: int | None) -> Screen:
    """Return what the candidates hold, and every conv with what a pair would save, or why it is no candidate."""
    rows, total, wide = found.rows, found.total, width is None or width >= WIDE

    def outlook(row: Candidate) -> str | Text:
        cost = row.site.cost
        if row.becomes is not None:
            return f"{row.kind}: costs {fmt.share(row.becomes.macs, cost.macs)}" + " of the MACs" * wide
        if row.reason is not None:
            return written(row.reason, style="dim")
        if row.half is None:
            return row.kind
        saved = cost - row.half.cost
        text = f"{'rank' if row.kind == 'separable' else row.kind} {row.half.rank}: {fmt.share(saved.macs, cost.macs)}"
        return text + f" / {fmt.share(saved.params, cost.params)}" * wide

    pairs = sorted({row.kind for row in rows if row.half is not None}, reverse=True)
    columns = [
        Column("Layer", "site.name", side="fold"),
        Column("Conv", lambda row: row.site.conv.describe(), side="left"),
        Column("MACs", "site.cost.macs", fmt.count),
        Column("Share", lambda row: fmt.share(row.site.cost.macs, total.macs)),
        Column("Params", "site.cost.params", fmt.count, least=WIDE),
        Column("Map", "site.feature_map", fmt.extent, least=WIDE),
        Column("Even at", lambda row: row.break_even.rank if row.break_even and not row.becomes else None, least=WIDE),
        Column(("Half of it saves" if wide else "Saves") if pairs else "Becomes", lambda row: row, outlook, "fold"),
    ]
    lines = [
        f"Model: {fmt.count(total.macs)}MACs ({fmt.count(total.flops)}FLOPs), {fmt.count(total.params)} parameters, "
        f"for {found.input}; read by {found.traced_by}."
    ]
    if pairs:
        what = "Saves: by a pair of half the rank up to which one saves anything, of the conv's MACs."
        if wide:
            what = "Even at: the largest rank of a pair that still saves something. Half of it saves: this share of "
            what += "the conv's MACs / parameters."
        lines.append(f"{what} Pairs are {' or, where it says so, '.join(pairs)}.")
    lines += map(fmt.sentence, found.notes)
    little = bool(rows) and (not total.macs or found.held.macs / total.macs < 0.05)
    warnings = [*found.warnings, *(["little can be gained here"] if little else [])]
    return Screen(_verdict(found), warnings, [[Table(columns, rows)]], lines, width)


def _verdict(found: Candidates) -> str:
    if not found.rows:
        return f"{found.reference} has no Conv2d: there is nothing to swap"
    number, total = sum(row.reason is None for row in found.rows), found.total
    return (
        f"{found.reference}: {number} of {len(found.rows)} convs are candidates; they hold "
        f"{fmt.share(found.held.macs, total.macs)} of the MACs and {fmt.share(found.held.params, total.params)} of the "
        "parameters"
    )


def draw(found: Candidates, form: str = "svg") -> bytes:
    """Draw each conv's share of MACs and parameters, coloured by kind, grey if it is no candidate; needs matplotlib."""
    rows, total = found.rows, found.total
    rest = total - sum((row.site.cost for row in rows), start=Cost(0, 0))
    kinds = [row.kind if row.reason is None else None for row in rows]
    told = dict.fromkeys(filter(None, kinds))
    coloured = [(kind, f"candidate: {kind}", f"C{n}", _HATCHES[n % len(_HATCHES)]) for n, kind in enumerate(told)]
    series = [*coloured, (None, "no candidate", "0.6", "")]
    figure = new_figure(min(60.0, max(7.2, 1.5 + 0.16 * len(rows))), 6.4)
    upper, lower = figure.subplots(2, sharex=True)
    for axes, what, title in ((upper, "macs", "MACs"), (lower, "params", "parameters")):
        whole = getattr(total, what) or 1
        named = []
        for kind, name, colour, hatch in series:
            places = [place for place, one in enumerate(kinds) if one == kind]
            shares = [100 * getattr(rows[place].site.cost, what) / whole for place in places]
            named.append((axes.bar(places, shares, color=colour, hatch=hatch, edgecolor="white", linewidth=0), name))
        axes.set_ylabel(f"share of the {title} in %")
        axes.grid(axis="y", alpha=0.3)
    add_legend(upper, named, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    names = [fmt.clean(row.site.name) for row in rows]
    lower.set_xticks(range(len(rows)), names, rotation=90, fontsize=7, parse_math=False)
    lower.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    no_conv = f"what is no conv holds {fmt.share(rest.macs, total.macs)} and {fmt.share(rest.params, total.params)}"
    figure.suptitle(fmt.clean(f"{_verdict(found)};\n{no_conv}"), parse_math=False, fontsize=9)
    return picture_of(figure, form)
