"""Write the pages of docs/reference/ that are made of code: recipes, commands, errors, the Python interface.

The first is made from the JSON Schema (`asymswap recipes --schema`) and the shipped recipes, the second from the
command line itself, the others from docstrings. `--check` compares instead of writing.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo

import asymswap
from asymswap import errors, replacements
from asymswap.cli import commands
from asymswap.planning.recipe import GROUPS, json_schema, read_about
from asymswap.planning.shipped import read_recipe_text, shipped_names

DOCS = Path(__file__).parents[1] / "docs" / "reference"
WRITTEN = "<!-- Written by benchmarks/make_reference.py; change that, or what it reads, not this. -->"

Schema = Mapping[str, Any]

RECIPES_HEAD = """\
# Recipes

{written}

A recipe is a TOML file. It says which convs are replaced (`match`), by what (`swap`), and what the result may cost
(`[budget]`). It is data: nothing in it is executed, and an unknown key is an error that suggests similar names.

```bash
asymswap recipes                      # list the shipped recipes
asymswap recipes 3x3-only > my.toml   # copy one to start your own
asymswap recipes my.toml              # check it
asymswap recipes --schema             # the JSON Schema behind this page, for your editor
```

```toml
# mine.toml
summary = "Dense 3x3 convs of the last two stages become pairs; the model keeps 70 % of its MACs"

[[rules]]
match = {{ names = ["layer3.*", "layer4.*"], kernel = "3x3", groups = "dense", in_channels = {{ min = 64 }} }}
swap = {{ kind = "separable", order = "auto" }}

[budget]
macs = 0.7
over = "model"
```

How to write values:

- **size**: `"3x5"` (height x width), `3` for both sides, or a list of alternatives;
- **range**: `{{ min = 16, max = 64 }}`, ends included, or only one of them; for sizes it holds for both sides; a single
  number matches exactly;
- **words**: one, or a list of alternatives;
- **globs**: match whole names: `layer1.*` does not match `layer10.conv`.

A dry run shows what a recipe would do to a network. Its plan can be edited and replayed:

```bash
asymswap convert digits-resnet --recipe 3x3-only --dry-run --write-plan plan.json
asymswap convert digits-resnet --plan plan.json
```

On the command line, `--set rank=8` changes a setting of every rule whose kind has it, and `--macs`, `--params`,
`--latency` and `--max-drop` replace the budget.
"""

RECIPES_MIDDLE = """\
## `swap`

`kind` names one of the kinds below ([their mathematics](kinds.md)); every other key is a setting of that kind. One of
`rank`, `ratio` and `energy` sets the size; without them the recipe needs a budget, which chooses it. A swap that has
more MACs or parameters than the conv is not made unless `allow_growth = true`; the report says so.

Several kinds in a list are a choice, made at every conv that the rule matches:

```toml
swap = [{ kind = "separable" }, { kind = "low-rank" }, { kind = "cross" }]
```

- A kind that cannot take the conv is left out. If none can, the conv is kept, and the report gives the reason of each.
- With a budget, the kind and size are taken that lose least for what they cost. A kind whose size is given takes
  part with that size, and the conv may also stay as it is.
- Without a budget, or where every kind that can take the conv has its own size, the first in the list that saves
  something is taken.

The plan and the report say which kind each conv got.
"""

COMMANDS_HEAD = """\
# Commands

{written}

Exit codes: 0 done; 1 failed: one line `error: …` on stderr says what, which, the value and what to do, and nothing is
written; 2 wrong usage; 130 after Ctrl-C. No file is overwritten without `--force`. `asymswap COMMAND --help` prints the
same as this page.
"""


def recipes_page() -> str:
    """The keys of recipes, from the schema, and the shipped recipes."""
    schema = json_schema()
    parts = schema["$defs"]
    text = [
        RECIPES_HEAD.format(written=WRITTEN),
        "## The file",
        fields(schema, skip=("rules", "budget")) + "\n" + fields(schema, only=("rules", "budget"), head=False),
        "## `[[rules]]`",
        paragraph(parts["Rule"]),
        fields(parts["Rule"]),
        "## `match`",
        paragraph(parts["Match"]),
        fields(parts["Match"]),
        "The operations of `followed_by` and `preceded_by`: "
        + words(parts["Match"]["properties"]["followed_by"])
        + ".",
        "## `[budget]`",
        paragraph(parts["Budget"]),
        fields(parts["Budget"]),
        RECIPES_MIDDLE,
    ]
    for swap in parts["Swap"]["oneOf"]:
        kind = replacements.load(swap["title"])
        text += [f"### `{swap['title']}`", f"Function: {kind.PRESERVES}.", fields(swap, skip=("kind",))]
    text += ["## Shipped recipes", *shipped()]
    return "\n\n".join(part.strip("\n") for part in text) + "\n"


def shipped() -> Iterator[str]:
    """Each shipped recipe, group by group, with its own text."""
    for group in GROUPS:
        yield f"### {group}"
        for name in shipped_names():
            about = read_about(name)
            if about.group == group:
                yield f"#### `{name}`\n\n{about.summary}.\n\n```toml\n{read_recipe_text(name)[0].strip()}\n```"


def paragraph(schema: Schema) -> str:
    """The description of a schema."""
    return inspect.cleandoc(schema["description"])


def fields(schema: Schema, skip: tuple[str, ...] = (), only: tuple[str, ...] = (), head: bool = True) -> str:
    """A table of the keys: values, default, meaning."""
    rows = [
        f"| `{name}` | {cell(values(part))} | {default(part, name in schema.get('required', ()))} | {meaning(part)} |"
        for name, part in schema["properties"].items()
        if name not in skip and (not only or name in only)
    ]
    return "\n".join((["| key | values | default | meaning |", "| --- | --- | --- | --- |"] if head else []) + rows)


def meaning(part: Schema) -> str:
    """The description in one line."""
    if "description" not in part:
        raise SystemExit(f"a field without a docstring: {part}")
    return cell(" ".join(part["description"].split()))


def cell(text: str) -> str:
    """Escape text for a cell of a table."""
    return text.replace("|", "\\|")


def default(part: Schema, required: bool) -> str:
    """The default of a key, as text."""
    value = part.get("default")
    if required:
        return "must be given"
    if value is None or value == "" or value == [] or isinstance(value, dict):
        return ""
    return f"`{toml(value)}`"


def toml(value: Any) -> str:
    """A value as it is written in a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def values(part: Schema) -> str:
    """The values that a key takes, in a few words."""
    if "$ref" in part:
        name = str(part["$ref"]).rpartition("/")[2]
        known = {"Match": "[`match`](#match)", "Swap": "[`swap`](#swap)", "Budget": "[`[budget]`](#budget)"}
        return {**known, "SizeRange": "range of sizes"}.get(name, name.lower())
    if part.get("title") == "Size":
        return "size"
    if "anyOf" in part or "oneOf" in part:
        choices = [each for each in part.get("anyOf", part.get("oneOf")) if each != {"type": "null"}]
        return " or ".join(dict.fromkeys(map(values, choices)))
    if "const" in part:
        return f"`{toml(part['const'])}`"
    if "enum" in part:
        return ", ".join(f"`{toml(each)}`" for each in part["enum"]) if len(part["enum"]) < 9 else "word"
    return plain(part)


def plain(part: Schema) -> str:
    """The values of a type without choices."""
    kind = str(part["type"])
    if kind == "array":
        return "tables" if part["items"].get("$ref") == "#/$defs/Rule" else "list of these"
    if kind in ("number", "integer"):
        return ("whole number" if kind == "integer" else "number") + bounds(part)
    return {"boolean": "`true`, `false`", "string": "text"}[kind]


def bounds(part: Schema) -> str:
    """The limits of a number."""
    low = [f"at least {part['minimum']:g}"] if "minimum" in part else []
    low += [f"above {part['exclusiveMinimum']:g}"] if "exclusiveMinimum" in part else []
    high = [f"at most {part['maximum']:g}"] if "maximum" in part else []
    high += [f"below {part['exclusiveMaximum']:g}"] if "exclusiveMaximum" in part else []
    return ", ".join(["", *low, *high])


def words(part: Schema) -> str:
    """All words of a list, in code."""
    return ", ".join(f"`{word}`" for each in part["anyOf"] for word in each.get("enum", ()))


def commands_page() -> str:
    """Every command with its arguments and options, as in `--help`."""
    text = [COMMANDS_HEAD.format(written=WRITTEN)]
    for command in map(commands.function, commands.SUMMARIES):
        about, _, example = inspect.cleandoc(command.__doc__ or "").partition("Example: ")
        text += [f"## `asymswap {command.__name__}`", " ".join(about.split())]
        text += [f"Example: `{example.strip()}`"] if example else []
        panels: dict[str, list[str]] = {}
        for option in map(Parameter, *zip(*typing.get_type_hints(command, include_extras=True).items(), strict=True)):
            if option.name != "return":
                given = inspect.signature(command).parameters[option.name].default
                panels.setdefault(option.info.rich_help_panel or "", []).append(option.row(given))
        for panel, rows in panels.items():
            text += [f"**{panel}**"] if panel else []
            text += ["\n".join(["| option | value | default | what |", "| --- | --- | --- | --- |", *rows])]
    return "\n\n".join(part.strip("\n") for part in text) + "\n"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command's function: its name and its annotation, from which Typer makes the option."""

    name: str
    hint: Any

    @property
    def info(self) -> Any:
        """Its typer.Option or typer.Argument."""
        return self.hint.__metadata__[0]

    @property
    def taken(self) -> tuple[type, ...]:
        """The types of its value."""
        plain = typing.get_args(self.hint)[0]
        parts = typing.get_args(plain) or (plain,)
        return tuple(part for part in parts if part is not type(None))

    def row(self, given: Any) -> str:
        """Its row of the table."""
        argument = isinstance(self.info, ArgumentInfo)
        # With Annotated, the first name stands where a default value would.
        given_names = (self.info.default, *(self.info.param_decls or ()))
        names = [name for name in given_names if isinstance(name, str) and name.startswith("-")]
        plain = self.name.replace("_", "-")
        names = names or ([f"--{plain}", f"--no-{plain}"] if self.taken == (bool,) else [f"--{plain}"])
        shown = f"{self.name.upper()}" if argument else ", ".join(f"`{each}`" for each in names)
        return f"| {shown} | {self.value()} | {self.default(given)} | {cell(' '.join(self.info.help.split()))} |"

    def value(self) -> str:
        """The type of its value, in a word."""
        plain = typing.get_args(self.hint)[0]
        for part in (plain, *typing.get_args(plain)):
            if typing.get_origin(part) is typing.Literal:
                return ", ".join(f"`{choice}`" for choice in typing.get_args(part))
        (kind, *_) = self.taken
        if isinstance(kind, type) and issubclass(kind, Enum):
            return ", ".join(f"`{choice.value}`" for choice in kind)
        words = {bool: "", int: "whole number", float: "number", Path: "file", str: "text"}
        return words.get(kind, "text, several times")

    def default(self, given: Any) -> str:
        """Its default, as text."""
        if given is inspect.Parameter.empty:
            return "must be given"
        if isinstance(self.info.show_default, str):
            return f"`{self.info.show_default}`" if "<" in self.info.show_default else self.info.show_default
        return "" if given is None or given is False else f"`{getattr(given, 'value', given)}`"


ERRORS_HEAD = """\
# What the errors mean

{written}

On the command line an error is one line, `error: …`, that says what, which, the value and what to do; the exit code is
1, and nothing is written. A typing mistake is code 2, Ctrl-C 130. With `--debug` the traceback shows where it arose. In
Python the same text is that of an exception. Arguments are named there as in Python, and as options by the commands.

"""


def errors_page() -> str:
    """Return the page of the error classes, by their docstrings."""
    every = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.AsymswapError)]
    parts = [f"## `{one.__name__}`\n\n{inspect.cleandoc(one.__doc__ or '')}\n" for one in every]
    line = "`unexpected …; this is a bug` is a fault of asymswap: please report it, with what `--debug` prints.\n"
    return ERRORS_HEAD.format(written=WRITTEN) + "\n".join([*parts, line])


# The public names in the order of their page.
PYTHON = {
    "Opening": ["open_model", "OpenedModel"],
    "Converting": ["candidates", "plan", "convert", "save", "load", "sweep"],
    "After a conversion": ["finetune", "evaluate", "compare", "benchmark", "write_report", "offsets"],
    "Deploying": ["fuse", "save_fused", "export", "as_yolo"],
    "Options": ["Calibration", "PreprocessingOptions", "Metric", "Timing", "Training"],
    "Results": ["Conversion", "Fusion", "FineTuned", "AsymswapError"],
}


def python_page() -> str:
    """Return the page of the Python interface: what stands by hand before the mark, then signatures and docstrings."""
    by_hand = (DOCS / "python.md").read_text(encoding="utf-8").partition(WRITTEN)[0]
    parts = []
    for title, names in PYTHON.items():
        parts.append(f"## {title}")
        parts += [about(name, getattr(asymswap, name)) for name in names]
    return by_hand + "\n\n".join([WRITTEN, *parts]) + "\n"


def about(name: str, what: Any) -> str:
    """Return the section of a public name: of a function its signature, of a class its fields and methods."""
    head = [f"### `{name}`"]
    if not isinstance(what, type):
        what = inspect.unwrap(what)
        return "\n\n".join([*head, signature(source_of(what), "asymswap."), docstring(what)])
    tree = source_of(what)
    methods = [part for part in tree.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    parts = [docstring(what), fields_of(what)]
    for method in methods:
        prefix = "property: " if any(ast.unparse(one) == "property" for one in method.decorator_list) else ""
        call = ast.unparse(method.args).removeprefix("self").removeprefix(", ")
        shown = method.name if prefix else f"{method.name}({call})"
        returns = f" -> {ast.unparse(method.returns)}" if method.returns is not None else ""
        parts.append(f"- {prefix}`{shown}{returns}`: {' '.join((ast.get_docstring(method) or '').split())}")
    return "\n\n".join([*head, *filter(None, parts)]).replace("\n\n- ", "\n- ").replace("|\n- ", "|\n\n- ")


def source_of(what: Any) -> Any:
    """Return the syntax tree of a function or a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(what))).body[0]


def docstring(what: Any) -> str:
    """Return the docstring; a public name must have one."""
    found = inspect.getdoc(what)
    if not found:
        raise SystemExit(f"a public name without a docstring: {what}")
    return found


def signature(function: ast.FunctionDef, prefix: str) -> str:
    """Return the signature as Python, an argument a line where it is long."""
    arguments = [ast.unparse(one) for one in (*function.args.posonlyargs, *function.args.args)]
    defaults = function.args.defaults
    for number, value in enumerate(defaults, len(arguments) - len(defaults)):
        arguments[number] += f" = {ast.unparse(value)}"
    arguments += ["*"] if function.args.kwonlyargs else []
    for one, value in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        arguments.append(ast.unparse(one) + ("" if value is None else f" = {ast.unparse(value)}"))
    returns = f") -> {ast.unparse(function.returns)}" if function.returns is not None else ")"
    line = f"{prefix}{function.name}({', '.join(arguments)}{returns}"
    if len(line) > 100:
        line = "\n".join([f"{prefix}{function.name}(", *(f"    {one}," for one in arguments), returns])
    return f"```text\n{line}\n```"


def fields_of(what: type) -> str:
    """Return a table of a dataclass's own fields: type, default, and its help text or comment."""
    if not dataclasses.is_dataclass(what):
        return ""
    types = {
        ast.unparse(part.target): ast.unparse(part.annotation)
        for part in source_of(what).body
        if isinstance(part, ast.AnnAssign)
    }
    rows = []
    for one in dataclasses.fields(what):
        if one.name in types:
            known = one.default is not dataclasses.MISSING
            given = f"`{one.default!r}`" if known and one.default is not None and one.default != "" else ""
            rows.append([f"`{one.name}`", f"`{types[one.name]}`", given, one.metadata.get("help", "")])
    head = ["field", "type", "default", "what"]
    if not any(row[3] for row in rows):
        head, rows = head[:3], [row[:3] for row in rows]
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGES = {"recipes.md": recipes_page, "commands.md": commands_page, "errors.md": errors_page, "python.md": python_page}


def main() -> None:
    """Write the pages, or with `--check` list those that are out of date."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run benchmarks/make_reference.py")


if __name__ == "__main__":
    main()
