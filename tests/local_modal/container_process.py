"""Modal's own container entrypoint, in a process that ends with the server that started it."""

import os
import runpy
import sys
import threading


def _end_with_the_server() -> None:
    """Read from a pipe that nobody writes to: its end is the server's end, by kill -9 too."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are no business of the functions
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    runpy.run_module("modal._container_entrypoint", run_name="__main__")
