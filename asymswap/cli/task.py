"""`asymswap task`: a file to write one's own data, inputs, metric and loss into."""

import typer

from asymswap.planning import shipped


def task() -> None:
    """Example: asymswap task > my_task.py"""
    typer.echo((shipped.shipped_folder() / "my_task.py").read_text(encoding="utf-8"), nl=False)
