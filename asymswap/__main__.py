"""`python -m asymswap` is the command `asymswap`."""

from asymswap.cli.main import main

main()
