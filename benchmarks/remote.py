"""An object in a process of its own, for benchmarks whose parts need an environment or a GPU for themselves."""

import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

ANSWER_TIMEOUT_S = 600.0


def serve(pipe: Connection, target: Any) -> None:
    """Answer `(method, args, kwargs)` with `("value", result)` or `("error", traceback)`; ends after `close`."""
    while True:
        method, args, kwargs = pipe.recv()
        try:
            pipe.send(("value", getattr(target, method)(*args, **kwargs)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
        if method == "close":
            return


class Remote:
    """An object in a process of its own that sees only the GPU `gpu` of this machine."""

    def __init__(self, main: Any, *args: Any, gpu: int | None, **env: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        saved = dict(os.environ)
        os.environ |= env  # read by the child when Python and CUDA start
        try:
            self.process = context.Process(target=main, args=(child, *args), daemon=False)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ |= saved
        child.close()

    def start(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call `method` there; `answer` waits for it."""
        self.pipe.send((method, args, kwargs))

    def answer(self) -> Any:
        """What the last call returned. Raises RuntimeError with the other process's traceback."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not self.pipe.poll(1.0):
            if not self.process.is_alive() and not self.pipe.poll(0):
                raise RuntimeError(
                    f"{self.process.name} ended with exit code {self.process.exitcode}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.process.name} did not answer within {ANSWER_TIMEOUT_S:.0f} s"
                )
        kind, value = self.pipe.recv()
        if kind == "error":
            raise RuntimeError(f"in {self.process.name}:\n{value}")
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call and wait."""
        self.start(method, *args, **kwargs)
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.start("close")
            self.process.join(60)
        if self.process.is_alive():
            self.process.terminate()
