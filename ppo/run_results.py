"""Numbers of finished runs from their own files: results.json of evaluations, metrics.jsonl of PPO, a run's pieces.

Rates are in 0..1, times in seconds. An evaluation made in parts (a share of the tasks each) reads as one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ppo.envs.base import get_suite
from ppo.evaluation import EpisodeResult, summarize
from utils.reports.figures import CurvePoint, Rate
from utils.reports.page import Evaluation
from utils.reports.statistics import mcnemar_p, newcombe_interval

Results = Mapping[str, Any]
Episode = tuple[int, int]  # task, initial state
Metrics = Sequence[Mapping[str, float]]


def merge_results(parts: Sequence[Results]) -> dict[str, Any]:
    """One results.json for parts of an evaluation, which must be of different tasks and otherwise alike.

    Raises ValueError if two parts have a task in common, or differ in what was evaluated.
    """
    for name in ("checkpoint_fingerprint", "task_suite_name", "seed", "temperature"):
        if len({repr(part.get(name)) for part in parts}) > 1:
            raise ValueError(
                f"parts of an evaluation differ in {name}: {[part.get(name) for part in parts]}"
            )
    per_task = sorted(
        (task for part in parts for task in part["per_task"]), key=lambda task: task["task_id"]
    )
    if max(Counter(task["task_id"] for task in per_task).values()) > 1:
        raise ValueError("two parts of an evaluation have a task in common")
    episodes = [episode for part in parts for episode in part["episodes"]]
    episodes.sort(key=lambda e: (e["task_id"], e["init_state_id"]))
    names = EpisodeResult.__dataclass_fields__
    overall: dict[str, Any] = summarize(
        [EpisodeResult(**{n: e[n] for n in names if n in e}) for e in episodes]
    )
    for name in ("void", "dropped_attempts"):
        overall[name] = sum(part["overall"].get(name, 0) for part in parts)
    remarks = list(dict.fromkeys(remark for part in parts for remark in part.get("remarks", [])))
    return {
        **{
            name: parts[0].get(name)
            for name in ("task_suite_name", "checkpoint_fingerprint", "seed", "temperature")
        },
        "overall": overall,
        "per_task": per_task,
        "episodes": episodes,
        "remarks": remarks,
        "wall_s": sum(part.get("time", {}).get("wall_s", 0.0) for part in parts),
    }


def read_evaluation(label: str, results: Results) -> Evaluation:
    """Rates of a results.json (or eval_final.json)."""

    def rate(name: str, part: Mapping[str, Any]) -> Rate:
        return Rate(name, part["successes"], part["episodes"], *part["wilson_95"])

    tasks = tuple(rate(part["instruction"], part) for part in results["per_task"])
    return Evaluation(label, rate(label, results["overall"]), tasks)


def outcomes(results: Results) -> dict[tuple[int, int], bool]:
    """Success by (task, initial state)."""
    return {(e["task_id"], e["init_state_id"]): e["success"] for e in results["episodes"]}


def compare(before: Results, after: Results) -> dict[str, Any]:
    """What `after` gains over `before`: points with their interval, and initial states that turned either way."""
    old, new = outcomes(before), outcomes(after)
    both = old.keys() & new.keys()
    num_won, num_lost = (
        sum(new[key] > old[key] for key in both),
        sum(new[key] < old[key] for key in both),
    )
    rates = [(part["overall"]["rate"], part["overall"]["wilson_95"]) for part in (before, after)]
    low, high = newcombe_interval(*rates[0], *rates[1])
    return {
        "gain_points": round(100 * (after["overall"]["rate"] - before["overall"]["rate"]), 2),
        "gain_points_95": [round(100 * low, 2), round(100 * high, 2)],
        "states_turned_to_success": num_won,
        "states_turned_to_failure": num_lost,
        "mcnemar_p": mcnemar_p(num_won, num_lost),
    }


def summarize_policy(results: Results, before: Results | None = None) -> dict[str, Any]:
    """What summary.json says about one policy: overall and per task, and its gain over `before`."""
    shown = (
        "successes",
        "episodes",
        "rate",
        "wilson_95",
        "mean_length",
        "mean_length_success",
        "void",
    )
    summary = {name: results["overall"][name] for name in shown if name in results["overall"]}
    tasks = ("task_id", "instruction", *shown)
    summary["per_task"] = [
        {name: task[name] for name in tasks if name in task} for task in results["per_task"]
    ]
    return summary | (compare(before, results) if before is not None else {})


# ---------------------------------------------------------------------------------------------- PPO


def training_lines(metrics: Metrics) -> list[Mapping[str, float]]:
    """Lines of training steps: those of evaluations alone are left out."""
    return [line for line in metrics if "time/step_s" in line]


def settling_steps(ppo_args: Mapping[str, Any]) -> int:
    """Environment steps of a PPO run after which every environment's first episode has ended; `ppo_args`: args.json."""
    limit = ppo_args["max_env_length"] or get_suite(ppo_args["task_suite_name"]).max_steps
    return int(ppo_args["vllm_num_engines"] * ppo_args["local_rollout_batch_size"] * limit)


def curve_points(metrics: Metrics, settled_at: int = 0) -> tuple[CurvePoint, ...]:
    """Success of the sampled training episodes, by environment steps and by seconds of training steps.

    What is reported before `settled_at` (`settling_steps`) counts with the first point from there
    on. Runs report episodes in the order of their start (`ppo.collector`), so that nothing is.
    Older ones did so in the order of their end and began with successes alone, because failures
    take the whole time limit.
    """
    points, seconds, early, early_successes = [], 0.0, 0, 0.0
    for line in training_lines(metrics):
        seconds += line["time/step_s"] + line.get("time/checkpoint_s", 0.0)
        if "rollout/success_rate" in line:
            steps, count = (
                int(line["time/env_steps_total"]),
                int(line["rollout/num_episodes"]) + early,
            )
            successes = line["rollout/success_rate"] * (count - early) + early_successes
            if steps < settled_at:
                early, early_successes = count, successes
            else:
                points.append(CurvePoint(steps, successes / count, count, seconds))
                early, early_successes = 0, 0.0
    return tuple(points)


def ppo_phases(
    metrics: Metrics, stage_s: float, rest: str = "start-up and saving"
) -> dict[str, float]:
    """Split `stage_s` seconds of PPO by the driver's time/ metrics; what remains is called `rest`.

    With `--async_depth 1` the engine and the environments work beside the updates: only waiting for them is time spent.
    """

    def total(name: str) -> float:
        return sum(line.get(f"time/{name}", 0.0) for line in metrics)

    working, collecting = total("generate_s") + total("wait_env_s"), total("collect_s")
    phases = {
        "engine generating": total("generate_s"),
        "waiting for environments": total("wait_env_s"),
        "collecting, the rest": max(0.0, collecting - working),
    }
    if working > collecting:
        phases = {"waiting for rollouts, beside the updates": collecting}
    phases |= {
        "updates": total("update_s"),
        "weight sync": total("sync_s"),
        "greedy evaluation": total("eval_s"),
    }
    phases[rest] = max(0.0, stage_s - sum(phases.values()))
    return phases


def piece_spans(pieces: Sequence[Mapping[str, Any]], metrics: Metrics) -> list[tuple[float, float]]:
    """Of each piece with a finished training step: seconds after its start at which training began, and its end."""
    step_s = {int(line["step"]): line["time/step_s"] for line in training_lines(metrics)}
    return [
        (
            max(0.0, piece["first_step_s"] - step_s.get(int(piece["first_step"]), 0.0)),
            piece["seconds"],
        )
        for piece in pieces
        if "first_step" in piece
    ]


def summarize_ppo(metrics: Metrics, pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json says about a PPO run that may have been made in pieces.

    `wall_s` is all of the pieces' time: `startup_s` until each began its first training step (all of a piece that
    finished none), and `training_s`, the rest, with checkpoints, stopping, and steps that were given up or repeated.
    """
    spans = piece_spans(pieces, metrics)
    wall_s, training_s = sum(p["seconds"] for p in pieces), sum(end - start for start, end in spans)
    lines = training_lines(metrics)
    env_steps = int(max((line["time/env_steps_total"] for line in lines), default=0))
    last = curve_points(metrics)[-10:]
    episodes = sum(point.num_episodes for point in last)
    summary: dict[str, Any] = {
        "env_steps": env_steps,
        "training_steps": len(lines),
        "wall_s": round(wall_s, 1),
        "startup_s": round(wall_s - training_s, 1),
        "training_s": round(training_s, 1),
        "num_pieces": len(pieces),
        "time_split_s": {
            k: round(v, 1)
            for k, v in ppo_phases(metrics, training_s, "saving and stopping").items()
        },
    }
    if training_s > 0:
        summary["env_steps_per_s"] = round(env_steps / training_s, 1)
    if episodes:
        rate = sum(point.success_rate * point.num_episodes for point in last) / episodes
        summary["sampled_success_last_10_steps"] = round(rate, 4)
    return summary


# ---------------------------------------------------------------------------------------------- episodes to watch


def choose_episodes(before: Results, after: Results, count: int) -> list[dict[str, Any]]:
    """At most `count` episodes that PPO turned from failure to success (then any), one per task while that lasts."""
    solved = {(e["task_id"], e["init_state_id"]) for e in after["episodes"] if e["success"]}
    turned = [
        e
        for e in before["episodes"]
        if not e["success"] and (e["task_id"], e["init_state_id"]) in solved
    ]
    seen: Counter[int] = Counter()
    order: list[tuple[int, int, dict[str, Any]]] = []
    for episode in turned or before["episodes"]:
        order.append((seen[episode["task_id"]], len(order), episode))
        seen[episode["task_id"]] += 1
    return [episode for *_, episode in sorted(order, key=lambda item: item[:2])[:count]]


def choose_columns(
    before: Results, after: Results, recorded: set[Episode], count: int
) -> list[Episode]:
    """At most `count` recorded episodes: one per task, such that turned to success first, then other tasks' first."""
    old, new = outcomes(before), outcomes(after)
    turned = [key for key in sorted(recorded) if new[key] and not old[key]]
    first: dict[int, tuple[int, int]] = {}
    for key in [*turned, *sorted(recorded)]:
        first.setdefault(key[0], key)
    return sorted(list(first.values())[:count])
