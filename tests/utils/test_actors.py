"""Pools of actors in real Ray: who dies is made again and brought to where it was, whenever that is noticed."""

import os
import time

import pytest
import ray

from utils.actors import ActorPool
from utils.ray_utils import start_ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray(None)
    yield
    ray.shutdown()


class Counter:
    """Counts from what it was given, or from what it is restored to."""

    def __init__(self) -> None:
        self.number = 0

    def add(self) -> int:
        self.number += 1
        return self.number

    def load(self, number: int) -> None:
        self.number = number

    def process(self) -> int:
        return os.getpid()

    def end(self) -> None:
        os._exit(1)


class Pool(ActorPool):
    """Two counters; new ones go on from 100 and the index, and what was restored is noted."""

    def __init__(self) -> None:
        self.restored: list[list[int]] = []
        self.num_started = 0
        super().__init__("counter", self.start_one, 2, self.restore, ping="process")

    def start_one(self, index: int):
        self.num_started += 1
        return ray.remote(Counter).options(num_cpus=0).remote()

    def restore(self, indices: list[int]) -> None:
        ray.get([self.actors[i].load.remote(100 + i) for i in indices])
        self.restored.append(indices)

    def add(self, calls=()) -> list[int]:
        return self.on_each(lambda index: self.actors[index].add.remote(), "adding", calls)

    def end(self, index: int) -> None:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(self.actors[index].end.remote())

    def look_until(self, num_replaced: int) -> None:
        deadline = time.monotonic() + 500
        while self.num_replaced < num_replaced and time.monotonic() < deadline:
            self.start_for_dead("they rest")
            time.sleep(0.05)
        assert self.num_replaced == num_replaced


def test_one_that_died_is_restored_and_called_again():
    pool = Pool()
    assert pool.add() == [1, 1]
    pool.end(1)
    assert pool.add() == [2, 102]
    assert pool.restored == [[1]] and pool.num_replaced == 1


def test_who_dies_while_there_is_nothing_to_do_is_started_at_once_and_restored_before_use():
    pool = Pool()
    living = pool.actors[0]
    for _ in range(20):  # nobody has died
        pool.start_for_dead("they rest")
    assert pool.num_started == 2 and not pool.restore_started()
    pool.end(1)
    pool.look_until(1)
    for _ in range(20):  # once is enough
        pool.start_for_dead("they rest")
    assert pool.num_started == 3 and pool.restored == []
    assert pool.restore_started() and pool.restored == [[1]]
    assert pool.add() == [1, 102] and pool.actors[0] is living
    pool.end(1)  # its successor is looked after, too
    pool.look_until(2)
    assert pool.restore_started() and not pool.restore_started()


@pytest.mark.parametrize("is_noticed", [False, True])
@pytest.mark.parametrize("dies_before_its_call", [False, True])
def test_what_a_dead_one_has_returned_is_not_used(dies_before_its_call: bool, is_noticed: bool):
    pool = Pool()
    if dies_before_its_call:
        pool.end(0)
    calls = [actor.add.remote() for actor in pool.actors]
    if not dies_before_its_call:
        ray.wait(calls, num_returns=2)
        pool.end(0)
    if is_noticed:
        pool.look_until(1)
    assert pool.add(calls) == [101, 1]
    assert pool.restored == [[0]] and pool.num_started == 3 and pool.num_replaced == 1
