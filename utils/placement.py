"""Which node, bundle and share of a GPU each trainer and engine of a run gets: arithmetic only, no Ray is started.

Trainer ranks of one entry of `trainers_per_node` sit on one node, of different entries on different nodes, so the ranks
of a node are contiguous. An engine, with all GPUs of its tensor parallelism and its environment processes, sits on one
node; it is put on a node that is in use already if it fits there, for its weights then need not cross the network.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import NamedTuple


class Node(NamedTuple):
    """One node of a cluster: its GPUs and CPU slots as the scheduler counts them, and what it is called in messages.

    cores, memory_gib: what a run may use of its cores and its available main memory; 0 where that is not known.
    """

    gpus: int
    cpus: int
    name: str = "this machine"
    node_id: str = ""
    cores: int = 0
    memory_gib: float = 0.0


class EngineShare(NamedTuple):
    """What each engine may use of its node: cores (for environment processes) and GiB of main memory.

    num_engines: engines on the node with the least memory for each. node_name: its name.
    """

    cores: int
    memory_gib: float
    num_engines: int
    node_name: str


@dataclass(frozen=True)
class Demand:
    """What a run asks for.

    trainers_per_node: ranks on each of as many nodes. num_env_processes: of one engine. device: cpu or cuda; on cpu
    nobody needs GPUs. With colocate, trainer i and engine i share a GPU.
    """

    trainers_per_node: tuple[int, ...]
    num_engines: int
    tensor_parallel_size: int = 1
    num_env_processes: int = 0
    colocate: bool = False
    device: str = "cuda"

    @property
    def num_trainers(self) -> int:
        """Ranks on all nodes."""
        return sum(self.trainers_per_node)

    @property
    def engine_gpus(self) -> int:
        """GPUs that one engine has for itself."""
        return 0 if self.colocate or self.device == "cpu" else self.tensor_parallel_size

    @property
    def trainer_gpus(self) -> int:
        """GPUs of one trainer, a colocated engine's included."""
        return 0 if self.device == "cpu" else 1

    @property
    def worker_cpus(self) -> int:
        """CPU slots of one engine: its own process and those of its environments."""
        return 1 + self.num_env_processes

    @property
    def trainer_cpus(self) -> int:
        """CPU slots of one trainer, with those of a colocated engine."""
        return 1 + (self.worker_cpus if self.colocate else 0)

    @property
    def num_cpus(self) -> int:
        """CPU slots of the whole run."""
        return self.num_trainers + self.num_engines * self.worker_cpus

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole run."""
        return self.num_trainers * self.trainer_gpus + self.num_engines * self.engine_gpus


@dataclass(frozen=True)
class Placement:
    """Bundles of one placement group, and the bundle of every actor.

    bundles: resources of each. node_ids: the node that each is pinned to. trainer_bundles: by rank. engine_bundles: by
    engine. trainer_gpus, engine_gpus: what each actor takes of its bundle, halves where two share a GPU. lines: who
    sits where, one line a node.
    """

    bundles: tuple[dict[str, float], ...]
    node_ids: tuple[str, ...]
    trainer_bundles: tuple[int, ...]
    engine_bundles: tuple[int, ...]
    trainer_gpus: float
    engine_gpus: float
    lines: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes in use."""
        return len(set(self.node_ids))


def request_problems(demand: Demand) -> list[str]:
    """Layouts that no cluster can hold: colocated engines of several GPUs, or of another number than the trainers."""
    if not demand.colocate:
        return []
    problems = []
    if demand.tensor_parallel_size > 1:
        problems.append(
            f"--colocate with --vllm_tensor_parallel_size {demand.tensor_parallel_size}: a trainer and an engine share "
            "one GPU, so an engine has one: use --vllm_tensor_parallel_size 1, or separate GPUs (without --colocate)"
        )
    if demand.num_engines != demand.num_trainers:
        problems.append(
            f"--colocate puts one engine beside each trainer: {_count(demand.num_trainers, 'trainer')} and "
            f"{_count(demand.num_engines, 'engine')} do not match: use --vllm_num_engines {demand.num_trainers}"
        )
    return problems


def placement_problems(demand: Demand, nodes: Sequence[Node]) -> list[str]:
    """Why `demand` does not fit on `nodes`, one sentence each with what would fit; empty when it does."""
    problems = request_problems(demand)
    if problems or _assign(demand, nodes) is not None:
        return problems
    fixes = [flags for flags, _ in _alternatives(demand, nodes)]
    return [_problem(demand, nodes) + (f": use {' or '.join(fixes)}" if fixes else "")]


def place(demand: Demand, nodes: Sequence[Node]) -> Placement:
    """Bundles, their nodes and everybody's bundle; earlier nodes are preferred among equal ones.

    Raises ValueError with the problems when it does not fit.
    """
    assigned = None if request_problems(demand) else _assign(demand, nodes)
    if assigned is None:
        raise ValueError("\n".join(placement_problems(demand, nodes)))
    node_of_rank = [
        node
        for node, n in zip(assigned[0], demand.trainers_per_node, strict=True)
        for _ in range(n)
    ]
    node_of_engine = node_of_rank if demand.colocate else assigned[1]
    trainer = _resources(demand.trainer_cpus, demand.trainer_gpus)
    bundles, bundle_nodes = [trainer] * len(node_of_rank), list(node_of_rank)
    if not demand.colocate:
        bundles += [_resources(demand.worker_cpus, demand.engine_gpus)] * demand.num_engines
        bundle_nodes += node_of_engine
    ranks = tuple(range(demand.num_trainers))
    share = demand.trainer_gpus / 2 if demand.colocate else None
    return Placement(
        bundles=tuple(bundles),
        node_ids=tuple(nodes[i].node_id for i in bundle_nodes),
        trainer_bundles=ranks,
        engine_bundles=ranks if demand.colocate else tuple(range(len(ranks), len(bundles))),
        trainer_gpus=float(demand.trainer_gpus) if share is None else share,
        engine_gpus=float(demand.engine_gpus) if share is None else share,
        lines=tuple(_describe(nodes, node_of_rank, node_of_engine)),
    )


def engine_share(demand: Demand, nodes: Sequence[Node]) -> EngineShare | None:
    """The smallest share of cores and of memory that an engine has on its node, whatever its environment processes.

    None if `demand` fits on no nodes or there are none.
    """
    bare = replace(demand, num_env_processes=0)
    assigned = _assign(bare, nodes) if nodes and not request_problems(demand) else None
    if assigned is None:
        return None
    trainers = dict(zip(assigned[0], demand.trainers_per_node, strict=True))
    engines = trainers if demand.colocate else Counter(assigned[1])
    cores, shares = [], []
    for i, count in engines.items():
        node = nodes[i]
        slots = (node.cpus - trainers.get(i, 0)) // count - 1
        cores.append(min((node.cores or node.cpus) // count, slots))
        shares.append(((node.memory_gib or float("inf")) / count, count, node.name))
    return EngineShare(max(1, min(cores)), *min(shares))


def _resources(cpus: int, gpus: int) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})


def _assign(demand: Demand, nodes: Sequence[Node]) -> tuple[list[int], list[int]] | None:
    """Node (by index) of each entry of trainers_per_node and of each engine; None if they do not fit.

    Trainers get the nodes that leave room for all engines, among these the ones that leave the fewest GPUs idle.
    """
    counts = Counter(_kind(demand, node) for node in nodes)
    kinds = list(counts)
    groups = sorted(demand.trainers_per_node, reverse=True)
    wanted = 0 if demand.colocate else demand.num_engines

    def left(kind: tuple[int, int], ranks: int) -> tuple[int, int]:
        return kind[0] - ranks * demand.trainer_gpus, kind[1] - ranks * demand.trainer_cpus

    @cache
    def search(k: int, remaining: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]] | None:
        """Best (engines that fit, minus the GPUs left on trainers' nodes, kinds of the nodes of groups k...)."""
        if k == len(groups):
            free = (_capacity(demand, kind) * n for kind, n in zip(kinds, remaining, strict=True))
            return min(wanted, sum(free)), 0, ()
        best = None
        for i, kind in enumerate(kinds):
            rest = left(kind, groups[k])
            if not remaining[i] or min(rest) < 0:
                continue
            found = search(k + 1, remaining[:i] + (remaining[i] - 1,) + remaining[i + 1 :])
            if found is None:
                continue
            option = (
                min(wanted, found[0] + _capacity(demand, rest)),
                found[1] - rest[0],
                (i, *found[2]),
            )
            if best is None or option[:2] > best[:2]:
                best = option
        return best

    found = search(0, tuple(counts[kind] for kind in kinds))
    if found is None or found[0] < wanted:
        return None
    trainer_nodes = _nodes_of_kinds(demand, nodes, [kinds[i] for i in found[2]])
    return trainer_nodes, _engine_nodes(demand, nodes, trainer_nodes, wanted)


def _kind(demand: Demand, node: Node) -> tuple[int, int]:
    """GPUs and CPU slots; nodes with more slots than the run could ever use are of one kind."""
    return node.gpus, min(node.cpus, demand.num_cpus)


def _capacity(demand: Demand, free: tuple[int, int]) -> int:
    """Engines that fit into `free` GPUs and CPU slots of one node."""
    by_cpus = free[1] // demand.worker_cpus
    return min(by_cpus, free[0] // demand.engine_gpus) if demand.engine_gpus else by_cpus


def _nodes_of_kinds(
    demand: Demand, nodes: Sequence[Node], kinds: Sequence[tuple[int, int]]
) -> list[int]:
    """Nodes for the entries of trainers_per_node, given the kinds chosen for them from the largest down."""
    order = sorted(range(len(kinds)), key=lambda k: -demand.trainers_per_node[k])
    kind_of_entry = dict(zip(order, kinds, strict=True))
    unused = list(range(len(nodes)))
    chosen = []
    for entry in range(len(kinds)):
        node = next(i for i in unused if _kind(demand, nodes[i]) == kind_of_entry[entry])
        unused.remove(node)
        chosen.append(node)
    return chosen


def _engine_nodes(
    demand: Demand, nodes: Sequence[Node], trainer_nodes: Sequence[int], wanted: int
) -> list[int]:
    """Node of each engine: evenly over the nodes in use, then the next unused one."""
    ranks = dict(zip(trainer_nodes, demand.trainers_per_node, strict=True))
    room = [
        _capacity(
            demand, (n.gpus - ranks.get(i, 0) * demand.trainer_gpus, n.cpus - ranks.get(i, 0))
        )
        for i, n in enumerate(nodes)
    ]
    order = list(trainer_nodes) + [i for i in range(len(nodes)) if i not in ranks]
    engines: Counter[int] = Counter()
    for _ in range(wanted):
        fitting = [i for i in order if engines[i] < room[i]]
        engines[min(fitting, key=lambda i: (i not in ranks and not engines[i], engines[i]))] += 1
    return [i for i in order for _ in range(engines[i])]


def _describe(
    nodes: Sequence[Node], node_of_rank: Sequence[int], node_of_engine: Sequence[int]
) -> list[str]:
    """One line for each node in use: "node 10.0.0.1: trainers 0-7, engine 0"."""
    lines = []
    for node in dict.fromkeys([*node_of_rank, *node_of_engine]):
        parts = []
        for name, places in (("trainer", node_of_rank), ("engine", node_of_engine)):
            numbers = [i for i, place in enumerate(places) if place == node]
            if numbers:
                parts.append(f"{name}{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}")
        lines.append(f"node {nodes[node].name}: {', '.join(parts)}")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _problem(demand: Demand, nodes: Sequence[Node]) -> str:
    """What is missing when `demand` does not fit: CPU slots, GPUs, nodes for the trainers, or room for the engines."""
    gpus, trainers, tp = (
        [node.gpus for node in nodes],
        demand.trainers_per_node,
        demand.tensor_parallel_size,
    )
    unlimited = [node._replace(cpus=10**9) for node in nodes]
    if _assign(demand, unlimited) is not None:
        return (
            f"CPU slots are short: a trainer needs 1, an engine {demand.worker_cpus} on its node (itself and "
            f"{demand.num_env_processes} environment processes), the cluster's nodes have "
            f"{[node.cpus for node in nodes]}; slots need not be cores (ray start --num-cpus N)"
        )
    without_engines = replace(demand, num_engines=0, colocate=False)
    trainers_fit = _assign(without_engines, unlimited) is not None
    if demand.num_gpus > sum(gpus) and (trainers_fit or len(trainers) == 1):
        return f"needs {_count(demand.num_gpus, 'GPU')} ({_parties(demand)}), the cluster has {sum(gpus)}"
    if not trainers_fit:
        needs = f"--actor_num_gpus_per_node {_list(trainers)} needs {_count(len(trainers), 'node')}"
        if demand.device == "cpu":
            return f"{needs}, the cluster has {len(nodes)}"
        each = " each" if len(trainers) > 1 else ""
        alike = len(set(trainers)) == 1
        with_gpus = (
            _count(trainers[0], "GPU") + each if alike else f"{', '.join(map(str, trainers))} GPUs"
        )
        return f"{needs} with {with_gpus}, the cluster's nodes have {gpus}"
    if tp > max(gpus):
        return f"an engine of {tp} GPUs (--vllm_tensor_parallel_size) needs one node with {tp}, the nodes have {gpus}"
    return f"{_parties(demand)}: not every engine finds {_count(tp, 'GPU')} on one node beside the trainers of {gpus}"


def _alternatives(demand: Demand, nodes: Sequence[Node]) -> Iterator[tuple[str, Demand]]:
    """Flags to give instead and what they ask for; of each kind the first that fits is enough."""
    changes = (
        [_shared_layout(demand, nodes)]
        if demand.num_gpus > sum(node.gpus for node in nodes)
        else []
    )
    changes += [_fewer_trainers(demand, nodes)]
    if not demand.colocate:
        changes += [
            [(f"--vllm_tensor_parallel_size {n}", replace(demand, tensor_parallel_size=n))
             for n in range(demand.tensor_parallel_size - 1, 0, -1)],
            [(f"--vllm_num_engines {n}", replace(demand, num_engines=n)) for n in range(demand.num_engines - 1, 0, -1)],
        ]  # fmt: skip
    changes += [
        [(f"--num_env_processes {n}", replace(demand, num_env_processes=n))
         for n in range(demand.num_env_processes - 1, 0, -1)]
    ]  # fmt: skip
    for options in changes:
        yield from next(
            ([option] for option in options if _assign(option[1], nodes) is not None), []
        )


def _ranks_that_fit(demand: Demand, nodes: Sequence[Node]) -> tuple[int, ...]:
    """As many of the wanted ranks a node as the largest nodes have GPUs (on cpu: all of them on one node)."""
    if demand.device == "cpu":
        return (demand.num_trainers,)
    wanted = demand.trainers_per_node
    have = sorted((node.gpus for node in nodes if node.gpus), reverse=True)[: len(wanted)]
    return tuple(min(h, w) for h, w in zip(have, sorted(wanted, reverse=True), strict=False))


def _shared_layout(demand: Demand, nodes: Sequence[Node]) -> list[tuple[str, Demand]]:
    """Colocated on the GPUs that are there."""
    ranks = _ranks_that_fit(demand, nodes)
    shared = replace(
        demand,
        trainers_per_node=ranks,
        num_engines=sum(ranks),
        tensor_parallel_size=1,
        colocate=True,
    )
    flags = ["--colocate"]
    if ranks != demand.trainers_per_node:
        flags.append(f"--actor_num_gpus_per_node {_list(ranks)}")
    if shared.num_engines != demand.num_engines:
        flags.append(f"--vllm_num_engines {shared.num_engines}")
    if demand.tensor_parallel_size > 1:
        flags.append("--vllm_tensor_parallel_size 1")
    return [(" ".join(flags), shared)] if ranks and not demand.colocate else []


def _fewer_trainers(demand: Demand, nodes: Sequence[Node]) -> list[tuple[str, Demand]]:
    """The wanted trainers cut to what the nodes have, then to less and less on all of them."""
    most = _ranks_that_fit(demand, nodes)
    layouts = [tuple(min(n, limit) for n in most) for limit in range(max(most, default=0), 0, -1)]
    options = []
    for ranks in dict.fromkeys(layouts):
        engines = f" --vllm_num_engines {sum(ranks)}" if demand.colocate else ""
        num_engines = sum(ranks) if demand.colocate else demand.num_engines
        changed = replace(demand, trainers_per_node=ranks, num_engines=num_engines)
        options.append((f"--actor_num_gpus_per_node {_list(ranks)}{engines}", changed))
    return options


def _parties(demand: Demand) -> str:
    """Who wants the GPUs: 2 trainers + 1 engine."""
    trainers = _count(demand.num_trainers, "trainer")
    if demand.colocate:
        return f"{trainers}, an engine beside each"
    engines = _count(demand.num_engines, "engine")
    return f"{trainers} + {engines}" + (
        f" x {demand.engine_gpus} GPUs" if demand.engine_gpus > 1 else ""
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _list(numbers: Sequence[int]) -> str:
    """As typed: "[8,8]"."""
    return f'"[{",".join(map(str, numbers))}]"'
