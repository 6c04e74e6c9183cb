"""Where trainers and engines go: layouts worked out by hand, every small one, and what is said of those that fail."""

import itertools

import pytest

from utils.placement import (
    Demand,
    EngineShare,
    Node,
    engine_share,
    place,
    placement_problems,
    request_problems,
)


def nodes(*gpus: int, cpus: int = 64) -> list[Node]:
    """Nodes a, b, ... with these GPUs."""
    return [Node(n, cpus, name, f"id-{name}") for n, name in zip(gpus, "abcdefgh", strict=False)]


def where(demand: Demand, cluster: list[Node]) -> str:
    """Nodes of the ranks and, after a bar, of the engines: "aa|b"."""
    placement = place(demand, cluster)
    letters = [node_id.removeprefix("id-") for node_id in placement.node_ids]
    trainers = "".join(letters[i] for i in placement.trainer_bundles)
    return f"{trainers}|{''.join(letters[i] for i in placement.engine_bundles)}"


def problem(demand: Demand, *gpus: int, cpus: int = 64) -> str:
    (text,) = placement_problems(demand, nodes(*gpus, cpus=cpus))
    with pytest.raises(ValueError, match=r"\w"):
        place(demand, nodes(*gpus, cpus=cpus))
    return text


@pytest.mark.parametrize(
    ("demand", "gpus", "expected"),
    [
        (Demand((1,), 1), (2,), "a|a"),
        (Demand((6,), 2), (8,), "aaaaaa|aa"),
        (Demand((2,), 2, tensor_parallel_size=2), (6,), "aa|aa"),
        # trainers on one node, all engines on the other
        (Demand((4,), 4), (4, 4), "aaaa|bbbb"),
        # an engine beside the trainers of each node
        (Demand((3, 3), 2), (4, 4), "aaabbb|ab"),
        # the trainers must leave the four GPUs of b to the engine
        (Demand((2,), 1, tensor_parallel_size=4), (2, 4), "aa|b"),
        # the larger entry comes second, and only a has its GPUs
        (Demand((1, 4), 1), (4, 2), "baaaa|b"),
        # best fit: the trainers take the smaller node although a comes first
        (Demand((2,), 3, tensor_parallel_size=1), (4, 2), "bb|aaa"),
        # three nodes, one of them without GPUs
        (Demand((2, 2), 1, tensor_parallel_size=2), (0, 2, 4, 2), "bbdd|c"),
        (Demand((2, 2), 4, colocate=True), (2, 2), "aabb|aabb"),
        (Demand((1, 1), 1, device="cpu"), (0, 0), "ab|a"),
        (Demand((2,), 2, device="cpu"), (0, 0), "aa|aa"),
    ],
)
def test_layouts(demand, gpus, expected):
    assert placement_problems(demand, nodes(*gpus)) == []
    assert where(demand, nodes(*gpus)) == expected


def machine(gpus: int, cores: int, memory_gib: float, name: str = "a", cpus: int = 10**6) -> Node:
    return Node(gpus, cpus, name, f"id-{name}", cores, memory_gib)


@pytest.mark.parametrize(
    ("demand", "cluster", "expected"),
    [
        (Demand((1,), 1), [machine(2, 32, 200.0)], EngineShare(32, 200.0, 1, "a")),
        # Two colocated engines on one node, and two of a separate layout.
        (Demand((2,), 2, colocate=True), [machine(2, 32, 200.0)], EngineShare(16, 100.0, 2, "a")),
        (Demand((6,), 2), [machine(8, 96, 900.0)], EngineShare(48, 450.0, 2, "a")),
        # The smallest share counts, of cores and of memory apart: one engine on a, two on b.
        (
            Demand((3, 2), 3),
            [machine(4, 8, 100.0), machine(4, 64, 180.0, "b")],
            EngineShare(8, 90.0, 2, "b"),
        ),
        # A node without an engine does not count.
        (Demand((1,), 1), [machine(0, 1, 1.0), machine(2, 32, 200.0, "b")], EngineShare(32, 200.0, 1, "b")),
        # CPU slots: 12, less one for each trainer and engine.
        (Demand((1,), 1), [machine(2, 32, 200.0, cpus=12)], EngineShare(10, 200.0, 1, "a")),
        (Demand((2,), 2, colocate=True), [machine(2, 32, 200.0, cpus=12)], EngineShare(4, 100.0, 2, "a")),
        (Demand((1,), 1), [machine(2, 1, 200.0, cpus=2)], EngineShare(1, 200.0, 1, "a")),
        # Nothing is known about the machine: its CPU slots are taken for cores.
        (Demand((1,), 1), [Node(2, 9, "a", "id-a")], EngineShare(7, float("inf"), 1, "a")),
        (Demand((1,), 1), [], None),
        (Demand((9,), 1), [machine(2, 32, 200.0)], None),
        (Demand((2,), 1, colocate=True), [machine(2, 32, 200.0)], None),
    ],
)  # fmt: skip
def test_what_each_engine_has_of_its_node(demand, cluster, expected):
    assert engine_share(demand, cluster) == expected


def test_bundles_hold_what_the_actors_take():
    separate = place(Demand((2,), 1, tensor_parallel_size=2, num_env_processes=8), nodes(4))
    assert separate.bundles == ({"CPU": 1.0, "GPU": 1.0},) * 2 + ({"CPU": 9.0, "GPU": 2.0},)
    assert (separate.trainer_bundles, separate.engine_bundles) == ((0, 1), (2,))
    assert (separate.trainer_gpus, separate.engine_gpus, separate.num_nodes) == (1.0, 2.0, 1)
    pairs = place(Demand((1, 1), 2, num_env_processes=8, colocate=True), nodes(1, 1))
    assert pairs.bundles == ({"CPU": 10.0, "GPU": 1.0},) * 2
    assert (pairs.trainer_bundles, pairs.engine_bundles, pairs.trainer_gpus, pairs.engine_gpus) == (
        (0, 1), (0, 1), 0.5, 0.5,
    )  # fmt: skip
    assert pairs.node_ids == ("id-a", "id-b") and pairs.num_nodes == 2
    cpu = place(Demand((1,), 1, num_env_processes=2, device="cpu"), nodes(0))
    assert (
        cpu.bundles == ({"CPU": 1.0}, {"CPU": 3.0}) and cpu.trainer_gpus == cpu.engine_gpus == 0.0
    )


def test_lines_say_who_sits_where():
    placement = place(Demand((8, 8), 4), nodes(8, 10, 8, 2))
    assert placement.lines == (
        "node a: trainers 0-7",
        "node c: trainers 8-15",
        "node b: engines 0-3",
    )


def brute_force_fits(demand: Demand, gpus: tuple[int, ...]) -> bool:
    """Try every assignment of entries to nodes; engines of one size then fit greedily."""
    for chosen in itertools.permutations(range(len(gpus)), len(demand.trainers_per_node)):
        left = list(gpus)
        for node, ranks in zip(chosen, demand.trainers_per_node, strict=True):
            left[node] -= ranks
        if (
            min(left) >= 0
            and sum(n // demand.tensor_parallel_size for n in left) >= demand.num_engines
        ):
            return True
    return False


def test_a_layout_is_found_exactly_when_there_is_one():
    fits = 0
    for gpus in itertools.combinations_with_replacement(range(5), 3):
        for trainers in [(1,), (2,), (3,), (1, 1), (1, 3), (3, 1), (2, 1, 1)]:
            for engines, tp in itertools.product((1, 2, 3), (1, 2)):
                demand = Demand(trainers, engines, tp)
                expected = brute_force_fits(demand, gpus)
                assert (placement_problems(demand, nodes(*gpus)) == []) is expected, (demand, gpus)
                fits += expected
                if expected:
                    check_within_limits(demand, nodes(*gpus))
    assert 100 < fits < 1400


def check_within_limits(demand: Demand, cluster: list[Node]) -> None:
    placement = place(demand, cluster)
    ranks = [placement.node_ids[i] for i in placement.trainer_bundles]
    for node in cluster:
        bundles = [
            b
            for b, i in zip(placement.bundles, placement.node_ids, strict=True)
            if i == node.node_id
        ]
        assert (
            sum(b.get("GPU", 0) for b in bundles) <= node.gpus
            and sum(b["CPU"] for b in bundles) <= node.cpus
        )
    groups = [(len(list(group))) for _, group in itertools.groupby(ranks)]
    assert tuple(groups) == demand.trainers_per_node and len(set(ranks)) == len(groups)


@pytest.mark.parametrize(
    ("demand", "gpus", "expected"),
    [
        (
            Demand((2,), 1), (2,),
            "needs 3 GPUs (2 trainers + 1 engine), the cluster has 2: use --colocate --vllm_num_engines 2 or "
            '--actor_num_gpus_per_node "[1]"',
        ),
        (Demand((1,), 1), (1,), "needs 2 GPUs (1 trainer + 1 engine), the cluster has 1: use --colocate"),
        (Demand((1,), 1), (0,), "needs 2 GPUs (1 trainer + 1 engine), the cluster has 0"),
        (
            Demand((6,), 2, tensor_parallel_size=2), (8,),
            "needs 10 GPUs (6 trainers + 2 engines x 2 GPUs), the cluster has 8: use --colocate --vllm_num_engines 6 "
            '--vllm_tensor_parallel_size 1 or --actor_num_gpus_per_node "[4]" or --vllm_tensor_parallel_size 1 or '
            "--vllm_num_engines 1",
        ),
        (
            Demand((8, 8), 2), (8, 4),
            '--actor_num_gpus_per_node "[8,8]" needs 2 nodes with 8 GPUs each, the cluster\'s nodes have [8, 4]: use '
            '--colocate --actor_num_gpus_per_node "[8,4]" --vllm_num_engines 12 or --actor_num_gpus_per_node "[6,4]"',
        ),
        (
            Demand((2, 3), 1), (2, 2, 2),
            '--actor_num_gpus_per_node "[2,3]" needs 2 nodes with 2, 3 GPUs, the cluster\'s nodes have [2, 2, 2]: use '
            '--actor_num_gpus_per_node "[2,2]"',
        ),
        (
            Demand((4,), 1), (3, 3),
            '--actor_num_gpus_per_node "[4]" needs 1 node with 4 GPUs, the cluster\'s nodes have [3, 3]: use '
            '--actor_num_gpus_per_node "[3]"',
        ),
        (
            Demand((1,), 1, tensor_parallel_size=2), (1, 1, 1),
            "an engine of 2 GPUs (--vllm_tensor_parallel_size) needs one node with 2, the nodes have [1, 1, 1]: use "
            "--vllm_tensor_parallel_size 1",
        ),
        (
            Demand((3, 3), 1, tensor_parallel_size=2), (4, 4),
            "6 trainers + 1 engine x 2 GPUs: not every engine finds 2 GPUs on one node beside the trainers of [4, 4]: "
            'use --actor_num_gpus_per_node "[2,2]" or --vllm_tensor_parallel_size 1',
        ),
        (
            Demand((2, 2), 4, colocate=True), (2, 1),
            '--actor_num_gpus_per_node "[2,2]" needs 2 nodes with 2 GPUs each, the cluster\'s nodes have [2, 1]: use '
            '--actor_num_gpus_per_node "[2,1]" --vllm_num_engines 3',
        ),
        (
            Demand((1, 1), 1, device="cpu"), (0,),
            '--actor_num_gpus_per_node "[1,1]" needs 2 nodes, the cluster has 1: use --actor_num_gpus_per_node "[2]"',
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_would(demand, gpus, expected):
    assert problem(demand, *gpus) == expected


def test_environment_processes_need_cpu_slots_beside_their_engine():
    text = problem(Demand((6,), 2, num_env_processes=48), 8)
    assert text.startswith("CPU slots are short: a trainer needs 1, an engine 49 on its node")
    assert "the cluster's nodes have [64]" in text and "ray start --num-cpus" in text
    # 6 trainers leave 58 slots: two engines of 29
    assert text.endswith("use --vllm_num_engines 1 or --num_env_processes 28")
    assert placement_problems(Demand((6,), 2, num_env_processes=28), nodes(8)) == []
    assert where(Demand((1,), 1, num_env_processes=30, colocate=True), nodes(1, cpus=32)) == "a|a"
    assert "use --num_env_processes 30" in problem(
        Demand((1,), 1, num_env_processes=31, colocate=True), 1, cpus=32
    )  # fmt: skip


def test_colocated_layouts_that_no_cluster_can_hold():
    assert (
        request_problems(Demand((2,), 1)) == request_problems(Demand((2,), 2, colocate=True)) == []
    )
    (tensor_parallel,) = request_problems(Demand((2,), 2, tensor_parallel_size=2, colocate=True))
    assert (
        "--colocate with --vllm_tensor_parallel_size 2" in tensor_parallel
        and "share one GPU" in tensor_parallel
    )
    (unequal,) = request_problems(Demand((2, 2), 1, colocate=True))
    assert "4 trainers and 1 engine do not match: use --vllm_num_engines 4" in unequal
    assert placement_problems(Demand((2, 2), 1, colocate=True), nodes(8, 8)) == [unequal]


def test_many_nodes_are_no_search_without_end():
    cluster = [Node(8 - i % 2, 400 + i, f"n{i}", str(i)) for i in range(40)]
    assert placement_problems(Demand((4,) * 12, 244), cluster) == []
    (text,) = placement_problems(Demand((4,) * 12, 253), cluster)
    assert text.startswith("needs 301 GPUs (48 trainers + 253 engines), the cluster has 300: use ")
