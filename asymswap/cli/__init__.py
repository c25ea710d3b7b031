"""The command line: parse, call, render; one file a command."""

import time

STARTED = time.perf_counter()
"""When the command began, before its libraries were loaded."""
