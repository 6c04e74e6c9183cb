"""Types and ranges of everything in a checkpoint's JSON files, checked before anything starts.

Each object has a table: name -> (whether a value is right, what it must be). A new field gets a line there. Values that
are right by themselves and contradict each other are found in the functions below the tables.
"""

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo.envs.base import ACTION_DIM
from ppo.utils.curriculum import Curriculum
from prismatic.model_files import is_int, is_list_of, is_number, read_json_object

Rule = tuple[Callable[[Any], bool], str]
Rules = Mapping[str, Rule]

MAX_COUNT, MAX_RANKS, MAX_TASK = 1 << 53, 1 << 16, 1 << 20
# A task's longest episode in any suite has 600 actions of 28 bytes.
MAX_ACTION_BYTES = 4 * ACTION_DIM << 20


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def _int(low: int, high: int) -> Rule:
    return lambda value: is_int(value, low, high), f"a whole number from {low} to {high}"


def _list(rule: Rule) -> Rule:
    return lambda value: is_list_of(value, rule[0]), f"a list; each entry {rule[1]}"


def _numbers(is_right: Callable[[Any], bool], what: str) -> Rule:
    return (
        lambda value: isinstance(value, dict) and all(map(is_right, value.values())),
        f"an object that maps names to {what}",
    )


def _is_real(value: Any) -> bool:
    """A number that is not NaN; the maximum of a ratio may be infinite."""
    return is_number(value) or (isinstance(value, float) and math.isinf(value))


def _is_actions(value: Any) -> bool:
    """Whole actions of finite float32, in base64."""
    if not isinstance(value, str) or len(value) > MAX_ACTION_BYTES:
        return False
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    is_whole = len(data) % (4 * ACTION_DIM) == 0
    return is_whole and bool(np.isfinite(np.frombuffer(data, np.float32)).all())


def _is_request(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    task_id, init_state_id, seed = value
    is_state = init_state_id is None or is_int(init_state_id, 0, MAX_TASK)
    return is_int(task_id, 0, MAX_TASK) and is_state and is_int(seed, 0, MAX_COUNT)


COUNT = _int(0, MAX_COUNT)
NUMBER: Rule = (is_number, "a finite number")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
TEXT: Rule = (lambda value: isinstance(value, str), "text")
BOOL: Rule = (lambda value: isinstance(value, bool), "true or false")
REQUEST: Rule = (_is_request, "[task, initial state or null, seed]")

STATE: Rules = {
    "format": _int(1, 1 << 16),
    "step": COUNT,
    "num_minibatches": _or_null(COUNT),
    "num_trainers": _int(1, MAX_RANKS),
    "flags": OBJECT,
    "best": OBJECT,
    "curriculum": OBJECT,
    "worlds": _list(OBJECT),
    "rollout": _or_null(OBJECT),
}
BEST: Rules = {
    "average": NUMBER,
    "average_step": NUMBER,
    "num_episodes": COUNT,
    "best": _or_null(NUMBER),
    "last_saved_step": _or_null(COUNT),
}
CURRICULUM: Rules = {
    "task_ids": _list(_int(0, MAX_TASK)),
    "ema": _list(NUMBER),
    "num_episodes": _list(COUNT),
    "num_successes": _list(COUNT),
    "rng": OBJECT,
}
WORLD: Rules = {
    "num_steps": COUNT,
    "ended": _list(OBJECT),
    "num_episodes": _list(COUNT),
    "running": _or_null(_list(OBJECT)),
    "num_replaced": COUNT,
    "num_not_repeated": COUNT,
}
RUNNING: Rules = {
    "request": REQUEST,
    "next_request": REQUEST,
    "actions": (_is_actions, f"actions of {ACTION_DIM} finite float32 each, in base64"),
    "image": TEXT,
}
ROLLOUT: Rules = {
    "episodes": _list(OBJECT),
    "worker_stats": _list(_numbers(is_number, "finite numbers")),
    "metrics": _numbers(_is_real, "numbers"),
}
EPISODE: Rules = {
    "task_id": _int(0, MAX_TASK),
    "init_state_id": _or_null(_int(0, MAX_TASK)),
    "seed": COUNT,
    "success": BOOL,
    "length": _int(1, MAX_COUNT),
    "episode_return": NUMBER,
    "num_dropped": COUNT,
    "start_step": COUNT,
}
# What the driver reads of a worker's statistics; others may be there.
WORKER_STATISTICS = (
    "policy_version", "collect_s", "num_void_steps", "mem_gib", "generate_s", "wait_env_s", "num_replaced",
    "num_not_repeated", "envs_gib",
)  # fmt: skip
RANK: Rules = {"update": _or_null(OBJECT)}
UPDATE: Rules = {"num_done": OBJECT, "averages": OBJECT}
NUM_DONE: Rules = {"value": COUNT, "policy": COUNT}
AVERAGES: Rules = {
    "sums": _numbers(_is_real, "numbers"),
    "maxima": _numbers(_is_real, "numbers"),
}
# Flags whose values are looked into; the others are only compared with this run's.
FLAGS: Rules = {
    **dict.fromkeys(("vla_path", "load_adapter_checkpoint", "data_root_dir"), _or_null(TEXT)),
    **dict.fromkeys(("num_steps", "local_rollout_batch_size", "vllm_num_engines"), COUNT),
}


def object_problems(
    where: str, value: Mapping[str, Any], rules: Rules, optional: tuple[str, ...] = ()
) -> list[str]:
    """Fields of one object that are missing, unknown, or not what the table says."""
    problems = [
        f"{where} has no {name}" for name in rules if name not in value and name not in optional
    ]
    problems += [f"{where} has {name[:40]!r}, which is unknown" for name in value.keys() - rules]
    return problems + _value_problems(where, value, rules)


def _value_problems(where: str, value: Mapping[str, Any], rules: Rules) -> list[str]:
    return [
        f"{where}.{name} is {str(value[name])[:60]}: it must be {description}"
        for name, (is_right, description) in rules.items()
        if name in value and not is_right(value[name])
    ]


def state_problems(content: Mapping[str, Any]) -> list[str]:
    """What is wrong inside a `state.json`: types, ranges, and parts that contradict each other."""
    if problems := object_problems("state", content, STATE):
        return problems
    problems = object_problems("best", content["best"], BEST)
    problems += _value_problems("flags", content["flags"], FLAGS)
    problems += _curriculum_problems(content["curriculum"])
    if not content["worlds"]:
        problems.append("worlds is empty: there is one for each engine")
    for i, world in enumerate(content["worlds"]):
        problems += _world_problems(f"worlds[{i}]", world)
    if content["rollout"] is not None:
        problems += _rollout_problems(content["rollout"])
    return problems or _contradictions(content)


def _contradictions(content: Mapping[str, Any]) -> list[str]:
    """Parts of a well-formed state that do not belong together."""
    flags, worlds = content["flags"], content["worlds"]
    num_engines = flags.get("vllm_num_engines", len(worlds))
    problems = (
        [f"worlds has {len(worlds)} entries for --vllm_num_engines {num_engines}"]
        if len(worlds) != num_engines
        else []
    )
    num_envs = flags.get("local_rollout_batch_size")
    problems += [
        f"worlds[{i}] has {len(world['num_episodes'])} environments for --local_rollout_batch_size {num_envs}"
        for i, world in enumerate(worlds)
        if num_envs is not None and len(world["num_episodes"]) != num_envs
    ]
    requests = [
        episode[name]
        for world in worlds
        for episode in world["running"] or []
        for name in ("request", "next_request")
    ]
    tasks = {request[0] for request in requests}
    tasks |= {episode["task_id"] for episode in (content["rollout"] or {}).get("episodes", [])}
    tasks |= {episode["task_id"] for world in worlds for episode in world["ended"]}
    known = content["curriculum"]["task_ids"]
    if unknown := sorted(tasks - set(known)):
        problems.append(f"episodes are of tasks {unknown[:5]}, the curriculum has {known[:20]}")
    return problems


def _curriculum_problems(curriculum: Mapping[str, Any]) -> list[str]:
    if problems := object_problems("curriculum", curriculum, CURRICULUM):
        return problems
    try:
        Curriculum(curriculum["task_ids"], min_prob=0.0).load_state_dict(dict(curriculum))
    except ValueError as error:
        return [f"curriculum: {error}"]
    return []


def _world_problems(where: str, world: Mapping[str, Any]) -> list[str]:
    if problems := object_problems(where, world, WORLD):
        return problems
    running = world["running"]
    if running is not None and len(running) != len(world["num_episodes"]):
        problems.append(
            f"{where} has {len(running)} running episodes for {len(world['num_episodes'])} environments"
        )
    for i, episode in enumerate(running or []):
        problems += object_problems(f"{where}.running[{i}]", episode, RUNNING)
    return problems + _episodes_problems(f"{where}.ended", world["ended"])


def _episodes_problems(where: str, episodes: list[Mapping[str, Any]]) -> list[str]:
    return [
        problem
        for i, episode in enumerate(episodes)
        for problem in object_problems(f"{where}[{i}]", episode, EPISODE, ("num_dropped",))
    ]


def _rollout_problems(rollout: Mapping[str, Any]) -> list[str]:
    if problems := object_problems("rollout", rollout, ROLLOUT):
        return problems
    problems += _episodes_problems("rollout.episodes", rollout["episodes"])
    if not rollout["worker_stats"]:
        problems.append("rollout.worker_stats is empty: there are some for each engine")
    return problems + [
        f"rollout.worker_stats[{i}] has no {name}"
        for i, statistics in enumerate(rollout["worker_stats"])
        for name in WORKER_STATISTICS
        if name not in statistics
    ]


def read_rank(folder: Path, rank: int) -> dict[str, Any]:
    """A trainer rank's `rank_<R>.json`. Raises ValueError naming the file and what is wrong, OSError without it."""
    file = folder / f"rank_{rank}.json"
    content = read_json_object(file)
    if problems := _rank_problems(content):
        raise ValueError(f"{file} is damaged: {'; '.join(problems[:5])}")
    return content


def _rank_problems(content: Mapping[str, Any]) -> list[str]:
    # Older versions also counted optimizer steps, which nothing reads.
    known = {name: value for name, value in content.items() if name != "optimizer_steps"}
    if problems := object_problems("rank", known, RANK):
        return problems
    update = known["update"]
    if update is None:
        return []
    if problems := object_problems("update", update, UPDATE):
        return problems
    problems = object_problems("update.num_done", update["num_done"], NUM_DONE)
    problems += object_problems("update.averages", update["averages"], AVERAGES)
    if not problems:
        sums = update["averages"]["sums"]
        problems += [
            f"update.averages.sums has {name} without its count {name}#"
            for name in sums
            if not name.endswith("#") and f"{name}#" not in sums
        ]
    return problems
