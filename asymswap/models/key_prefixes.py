"""What a state dict may be meant to be, once the prefixes are off that training frameworks put before its keys."""

from __future__ import annotations

from dataclasses import dataclass

from asymswap.fileformats.state_dict import State, strip_prefixes

# A network and its moving average side by side, a teacher and a student: more than four are not looked at.
_MOST_SIDE_BY_SIDE = 4
# Where mmpretrain keeps the two parts of a classifier.
_TWO_PARTS = ("backbone.", "head.")


@dataclass(frozen=True)
class View:
    """A state dict without a prefix that its keys carry, and without what does not carry it.

    `whole` says that nothing was left out which would compute: only a loss's weights, a metric's state, or copies of
    the very same network.
    """

    state: State
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    whole: bool = True

    def notes(self) -> tuple[str, ...]:
        """What was done to the keys, for the report; nothing for a state dict as it is."""
        if not self.prefix:
            return ()
        others = ", ".join(self.left_out[:3])
        if len(self.left_out) > 3:
            others += f" and {len(self.left_out) - 3} more"
        return (f"keys without their '{self.prefix}'" + (f"; left out (--key chooses): {others}" if others else ""),)


def views(state: State) -> list[View]:
    """The ways in which a state dict may be meant, the plainest first.

    Training frameworks put the network into a module of theirs: all keys, or all but those of a loss or a metric, then
    begin with the same part (`model.`, `net.`, `backbone.` …), which is taken off, twice at most.
    """
    found = [View(state)]
    if {key.partition(".")[0] for key in state} == {part.removesuffix(".") for part in _TWO_PARTS}:
        bare = {key.partition(".")[2]: tensor for key, tensor in state.items()}
        if len(bare) == len(state):
            found.append(View(bare, "' and '".join(_TWO_PARTS)))
    first = _below(View(state))
    return [*found, *first, *(further for view in first for further in _below(view))]


def _below(view: View) -> list[View]:
    """The views one prefix further, those of most keys first."""
    groups: dict[str, State] = {}
    for key, tensor in view.state.items():
        first, dot, rest = key.partition(".")
        groups.setdefault(first + dot, {})[rest] = tensor
    found = []
    for prefix, part in sorted(groups.items(), key=lambda item: -len(item[1]))[:_MOST_SIDE_BY_SIDE]:
        if not prefix.endswith(".") or len(part) * _MOST_SIDE_BY_SIDE < len(view.state):
            continue
        others = {name: group for name, group in groups.items() if name != prefix}
        left_out = tuple(f"{view.prefix}{name}{rest}" for name, group in others.items() for rest in group)
        counts = [t for group in others.values() if group.keys() != part.keys() for t in group.values() if t.ndim >= 2]
        whole = view.whole and not counts
        found.append(View(strip_prefixes(part), view.prefix + prefix, view.left_out + left_out, whole))
    return found
