"""The process between pgscribe and its embedded Postgres: ends the server when its parent ends.

Run as a script (`python -I -S embedded_guardian.py UID GID command...`): it must start fast and
imports only the standard library. Its standard input is a pipe whose other end only the parent
holds; the operating system closes that end however the parent dies.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

# A fast shutdown, then an immediate one (in which the postmaster itself gives its children five
# seconds), then the end.
SHUTDOWN_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 7.0), (signal.SIGKILL, 3.0))


# Coverage cannot follow into a process started with -I -S.
def shut_down_when_parent_ends(server: subprocess.Popen[bytes]) -> None:  # pragma: no cover
    """Wait for the parent's end, then bring the server down, however long that takes."""
    os.read(0, 1)  # nothing is ever written: this returns at end of file
    for number, patience in SHUTDOWN_STEPS:
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


def main(uid: str, gid: str, *command: str) -> int:  # pragma: no cover
    """Run `command` as the given account (as is, where `uid` is empty) until it ends."""
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        user=int(uid) if uid else None,
        group=int(gid) if uid else None,
        extra_groups=[] if uid else None,
    )
    # Whoever signals a whole family of processes means the parent: it may still need the database
    # while it winds down, and its end is what ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=shut_down_when_parent_ends, args=(server,), daemon=True).start()
    return server.wait()


if __name__ == "__main__":  # pragma: no cover
    sys.exit(main(*sys.argv[1:]))
