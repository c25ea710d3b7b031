"""`asymswap task`: a file to write one's own data, inputs, metric and loss into."""

import typer


def task() -> None:
    """Example: asymswap task > my_task.py"""
    from asymswap.planning.shipped import shipped_folder

    typer.echo((shipped_folder() / "my_task.py").read_text(encoding="utf-8"), nl=False)
