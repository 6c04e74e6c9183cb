"""Spares in real Ray: one becomes the actor that it stands beside, and one that is of no use is not in the way."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import ray

from utils.ray_utils import start_ray
from utils.spares import SpareActors, spare_class, wait_until_gone


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray(None)
    yield
    ray.shutdown()


class Counter:
    """An actor whose constructor may fail."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError(f"{start} is no start")
        self.number = start

    def add(self) -> int:
        self.number += 1
        return self.number

    def process(self) -> int:
        return os.getpid()


def prepare() -> None:
    os.environ["PREPARED"] = "yes"


def nothing() -> None:
    """No preparation."""


def actor(start: int):
    return ray.remote(Counter).options(num_cpus=0).remote(start)


def spares(arguments, **actors) -> SpareActors:
    def start(index: int):
        pid = ray.get(actors["first"].process.remote()) if actors else 0
        return ray.remote(spare_class(Counter)).options(num_cpus=0).remote(nothing, pid)

    return SpareActors("counter", 1, start, arguments)


def test_a_spare_becomes_the_actor_once_its_predecessor_is_gone():
    first = actor(10)
    kept = spares(lambda index: (100 + index,), first=first)
    assert kept.take(0) is None and kept.beginning() == []
    kept.prepare()
    waiting = kept._waiting[0]
    kept.prepare()
    assert kept._waiting[0] is waiting  # one is enough
    ray.get(waiting.ready.remote())
    taken = kept.take(0)
    (beginning,) = kept.beginning()
    assert ray.wait([beginning], timeout=1.0)[0] == []  # the first one lives
    ray.kill(first)
    ray.get(beginning)
    assert ray.get(taken.add.remote()) == 101
    assert kept.take(0) is None and kept.beginning() == []
    kept.prepare()  # the first one is gone, its successor is not known here
    assert kept.take(0) is None


def test_what_the_constructor_raises_is_the_beginnings_error():
    kept = spares(lambda index: (-1,))
    kept.prepare()
    assert kept.take(0) is not None
    with pytest.raises(ValueError, match="-1 is no start"):
        ray.get(kept.beginning())


def test_a_dead_spare_is_not_taken():
    kept = spares(lambda index: (1,))
    kept.prepare()
    ray.kill(kept._waiting[0])
    assert kept.take(0) is None and kept.beginning() == []
    kept.prepare()
    assert kept.take(0) is not None
    ray.get(kept.beginning())


def test_a_spare_prepares_before_it_is_anything():
    kind = spare_class(Counter)
    assert kind.__name__ == "SpareCounter" and issubclass(kind, Counter)
    spare = kind(prepare, 0)
    assert os.environ.pop("PREPARED") == "yes" and not hasattr(spare, "number")
    spare.begin(4)
    assert spare.add() == 5


def test_waiting_for_a_process_ends_with_it_or_with_the_time():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = time.monotonic()
    wait_until_gone(process.pid, 0.3)
    assert process.poll() is None and time.monotonic() - start >= 0.3
    process.kill()
    wait_until_gone(process.pid, 5000.0)  # a zombie: nobody has waited for it
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    wait_until_gone(process.pid, 5000.0)
