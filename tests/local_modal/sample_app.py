"""Functions for the tests of the local Modal: each does one thing that a remote function may do."""

import os
import time
from pathlib import Path
from typing import NoReturn

import modal

APP = "tests.local_modal.sample_app:app"

app = modal.App("sample")

volume = modal.Volume.from_name("sample-volume", create_if_missing=True)
image = modal.Image.debian_slim().pip_install("numpy").env({"SAMPLE": "1"})
secret = modal.Secret.from_name("sample-secret")


class Fault(Exception):
    """Known to both sides."""


@app.function()
def double(value: int) -> int:
    print(f"doubling {value}", flush=True)  # noqa: T201 -- what a container prints is captured
    return 2 * value


@app.function(max_containers=4)
async def echo(value: object) -> object:
    return value


@app.function()
def delegate(value: int) -> int:
    return double.remote(value)


@app.function()
def wait_for(path: str) -> int:
    """Return the process id once the file exists."""
    while not Path(path).exists():
        time.sleep(0.01)
    return os.getpid()


@app.function()
def refuse_to_end(path: str) -> NoReturn:
    """Take no notice of a cancel."""
    while True:
        try:
            Path(path).touch()
            time.sleep(0.01)
        except BaseException:  # noqa: BLE001 -- that is its point
            continue


@app.function()
def note_cancel(started: str, cancelled: str) -> None:
    try:
        Path(started).touch()
        time.sleep(60)
    except BaseException as error:
        Path(cancelled).write_text(type(error).__name__)
        raise


@app.function()
def fail(message: str) -> NoReturn:
    raise Fault(message)


@app.function()
def fail_with_what_the_caller_lacks() -> NoReturn:
    import sys
    from types import ModuleType

    module = ModuleType("only_here")
    error = type("OnlyHere", (Exception,), {"__module__": "only_here"})
    module.OnlyHere = error  # type: ignore[attr-defined]
    sys.modules["only_here"] = module
    raise error


@app.function()
def time_out_itself() -> NoReturn:
    raise TimeoutError("the function's own")


@app.function(timeout=1)
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@app.function()
def die() -> NoReturn:
    os._exit(1)


@app.function(retries=modal.Retries(max_retries=2, initial_delay=0.0, backoff_coefficient=1.0))
def fail_until(path: str) -> str:
    """Fail until it has been tried as often as retries allow."""
    with Path(path).open("a") as tries:
        tries.write("x")
    if len(Path(path).read_text()) < 3:
        raise Fault("again")
    return "at last"


@app.function(scaledown_window=2)
def pid() -> int:
    return os.getpid()


@app.cls(image=image, volumes={"/weights": volume}, gpu="L4", secrets=[secret], max_containers=1)
@modal.concurrent(max_inputs=2)
class Model:
    name: str = modal.parameter()
    size: int = modal.parameter(default=1)
    entered = 0
    busy = False

    @modal.enter()
    def load(self) -> None:
        self.entered += 1

    @modal.method()
    def transcribe(self, text: str) -> tuple[str, str, int, int, int]:
        assert not self.busy, "one input at a time"
        self.busy = True
        time.sleep(0.01)
        self.busy = False
        return self.name, text, self.size, self.entered, os.getpid()


@app.cls()
class Broken:
    @modal.enter()
    def load(self) -> None:
        raise Fault("no weights")

    @modal.method()
    def transcribe(self) -> None: ...


@app.cls()
class Stillborn:
    @modal.enter()
    def load(self) -> None:
        os._exit(3)

    @modal.method()
    def transcribe(self) -> None: ...
