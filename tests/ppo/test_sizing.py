"""How many processes environments get on machines of known cores and memory: hand-worked numbers."""

import dataclasses

import pytest

from ppo.envs.sizing import EnvSizes, MemoryCost, balanced, choose_sizes, memory_shortage

# A process 1 GiB with its first simulator, each further simulator 0.1, a canvas 0.5; 12 simulators and 3 canvases for
# the first environment of a process, 3 and 1 more for each further one.
COST = MemoryCost(1.0, 0.1, 0.5, 12, 3, 3)
TASKS = 10


def choose(num_envs, cores, memory_gib, *, cost=COST, tasks=TASKS, given=None):
    return choose_sizes(num_envs, tasks, cores, memory_gib, cost, given)


def test_a_process_takes_what_its_simulators_and_canvases_take():
    # One environment: two simulators and one canvas at least; 12 and 3 in the end. Three: 6 and 3; 18 and 5.
    assert COST.least_gib(1, TASKS) == pytest.approx(1.0 + 0.1 + 0.5)
    assert COST.most_gib(1, TASKS) == pytest.approx(1.0 + 11 * 0.1 + 3 * 0.5)
    assert COST.least_gib(3, TASKS) == pytest.approx(1.0 + 5 * 0.1 + 3 * 0.5)
    assert COST.most_gib(3, TASKS) == pytest.approx(1.0 + 17 * 0.1 + 5 * 0.5)
    # Three environments and 0.2 GiB for each further task: five tasks among six simulators, ten among 18.
    tasks = dataclasses.replace(COST, task_gib=0.2)
    assert tasks.least_gib(3, 5) == pytest.approx(COST.least_gib(3, 5) + 4 * 0.2)
    assert tasks.most_gib(3, TASKS) == pytest.approx(COST.most_gib(3, TASKS) + 9 * 0.2)
    assert tasks.least_gib(1, TASKS) == pytest.approx(COST.least_gib(1, TASKS) + 0.2)
    # With one task: a running and a next simulator for each environment, one canvas for all.
    assert COST.most_gib(3, 1) == COST.least_gib(3, 1) == pytest.approx(1.0 + 5 * 0.1 + 0.5)


@pytest.mark.parametrize(
    ("num_envs", "cores", "expected"),
    [
        (96, 32, 32),
        (48, 16, 16),
        (48, 64, 48),  # never more processes than environments
        (
            48,
            20,
            16,
        ),  # with 20 some would have three environments too, and all would wait for those
        (5, 4, 3),
        (7, 1, 1),
    ],
)
def test_with_enough_memory_there_is_a_process_for_each_core(num_envs, cores, expected):
    assert choose(num_envs, cores, 10_000.0) == EnvSizes(expected)
    assert balanced(num_envs, cores) == expected


def test_fewer_processes_share_simulators_where_memory_is_short():
    # Four environments a process on 12 cores: 1 + 20 x 0.1 + 6 x 0.5 = 6 GiB each, 72 in all; in six processes of
    # eight: 1 + 32 x 0.1 + 10 x 0.5 = 9.2 each, 55.2 in all. A fifth of the memory is for others.
    assert choose(48, 12, 72.1 / 0.8).num_processes == 12
    assert choose(48, 12, 71.9 / 0.8).num_processes < 12
    assert choose(48, 12, 55.3 / 0.8).num_processes == 6
    assert choose(48, 12, 55.1 / 0.8).num_processes < 6
    assert choose(48, 12, 55.3 / 0.8).max_simulators is None


def test_the_last_process_keeps_fewer_simulators_before_it_outgrows_the_memory():
    # One process of four environments: 1 + 20 x 0.1 + 3 = 6 GiB with 12 + 9 simulators, 5.4 with 6 + 9, 5 with 2 + 9.
    assert choose(4, 2, 6.01 / 0.8) == EnvSizes(1)
    assert choose(4, 2, 5.41 / 0.8) == EnvSizes(1, 6)
    assert choose(4, 2, 4.0 / 0.8) == EnvSizes(1, 2)
    assert choose(4, 2, 5.41 / 0.8).options == {"max_simulators": 6} and EnvSizes(3).options == {}


def test_a_number_of_processes_that_is_given_stays_and_simulators_give_way():
    assert choose(4, 2, 1000.0, given=4) == EnvSizes(4)
    # Four processes of one environment: 3.6 GiB each with 12 simulators, 3.0 with 6.
    assert choose(4, 2, 12.01 / 0.8, given=4) == EnvSizes(4, 6)


def test_light_environments_share_two_processes_whatever_the_machine():
    assert choose(32, 64, 0.1, cost=None) == EnvSizes(2)
    assert choose(1, 64, 0.1, cost=None) == EnvSizes(1)
    assert choose(32, 2, 0.1, cost=None, given=5) == EnvSizes(5)
    assert memory_shortage(32, 5, TASKS, 0.1, None) is None


def test_what_cannot_start_is_refused_with_what_it_needs_and_what_fits():
    # 96 processes of one environment: 1.6 GiB each.
    assert memory_shortage(96, 96, TASKS, 153.7, COST) is None
    shortage = memory_shortage(96, 96, TASKS, 120.0, COST)
    assert shortage is not None and shortage.needed_gib == pytest.approx(153.6)
    # 48 of two environments: 1 + 0.3 + 1 = 2.3 each, 110.4; with n processes of one and 48 - n/2 ... of two.
    assert shortage.num_processes is not None and 48 <= shortage.num_processes < 96
    assert memory_shortage(96, shortage.num_processes, TASKS, 120.0, COST) is None
    assert memory_shortage(96, shortage.num_processes + 1, TASKS, 120.0, COST) is not None
    # Not even one process: of 40 environments, 1 + 79 x 0.1 + 10 x 0.5 = 13.9 GiB; nine need 1 + 1.7 + 4.5 = 7.2.
    shortage = memory_shortage(40, 4, TASKS, 7.3, COST)
    assert shortage is not None
    assert (shortage.num_processes, shortage.num_envs) == (None, 9)
    nothing = memory_shortage(1, 1, TASKS, 1.5, COST)
    assert nothing is not None and (nothing.num_processes, nothing.num_envs) == (None, 0)


def test_what_is_chosen_starts_wherever_anything_could():
    for memory_gib in (2.0, 4.0, 8.0, 16.0, 64.0):
        for num_envs in (1, 2, 5, 16, 48):
            for canvas_gib in (0.0, 0.5):
                cost = dataclasses.replace(COST, canvas_gib=canvas_gib)
                sizes = choose(num_envs, 8, memory_gib, cost=cost)
                possible = memory_shortage(num_envs, 1, TASKS, memory_gib, cost) is None
                chosen = memory_shortage(num_envs, sizes.num_processes, TASKS, memory_gib, cost)
                assert (chosen is None) == possible
