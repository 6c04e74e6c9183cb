"""What the from-scratch run has in its folder: where everything lies, and the numbers of all policies in it.

A run's folder may be filled by several invocations, with different variants of PPO; all of them are read here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from ppo.run_results import (
    compare,
    curve_points,
    merge_results,
    piece_spans,
    settling_steps,
    summarize_policy,
    summarize_ppo,
)
from prismatic.model_files import read_json
from utils.collecting import collect
from utils.gpu_sampling import read_samples, summarize_samples
from utils.logging_utils import read_metrics
from utils.reports.figures import CurvePoint
from utils.stage_ledger import Ledger

SUPERVISED = "supervised"
MAIN = "main"  # the evaluation that the claim is about
# What `collect` takes besides the report, relative to the run's folder.
RECORDS = (
    "stages/*.json", "logs/*", "held_out.json", "eval/*/*/*/*/results.json", "eval/*/*/*/*/eval.log",
    "sft/metrics.jsonl", "sft/args.json", "sft/dataset_statistics.json",
)  # fmt: skip
PPO_RECORDS = (
    "metrics.jsonl",
    "args.json",
    "log.txt",
    "metadata.json",
    "curriculum.json",
    "cut/*/metrics.jsonl",
)
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "base_model.json", "metadata.json", "checksums.json",
    "dataset_statistics.json",
)  # fmt: skip


@dataclass(frozen=True)
class Paths:
    """Where the parts of a run lie."""

    run_dir: Path
    sft_dir: Path | None = None

    @property
    def data(self) -> Path:
        """RLDS demonstrations."""
        return self.run_dir / "data"

    @property
    def model(self) -> Path:
        """The random model."""
        return self.run_dir / "model"

    @property
    def sft(self) -> Path:
        """The supervised policy."""
        return self.sft_dir or self.run_dir / "sft"

    @property
    def stages(self) -> Path:
        """Markers of the stages."""
        return self.run_dir / "stages"

    @property
    def logs(self) -> Path:
        """Output of the stages, and samples of the GPU."""
        return self.run_dir / "logs"

    def ppo(self, variant: str) -> Path:
        """A PPO run's folder."""
        return self.run_dir / "ppo" / variant

    def policy(self, name: str) -> Path:
        """Model folder of the supervised policy, or a variant's merged one."""
        return self.sft if name == SUPERVISED else self.run_dir / "merged" / name

    def evaluation(self, policy: str, kind: str) -> Path:
        """Folder of an evaluation's parts."""
        return self.run_dir / "eval" / policy / kind

    @property
    def held_out(self) -> Path:
        """Result of the check of the initial states."""
        return self.run_dir / "held_out.json"

    def gpu_samples(self, variant: str) -> Path:
        """Samples of the GPU during a PPO run."""
        return self.logs / f"ppo.{variant}.gpu.csv"


class ScratchRun:
    """A run's folder, read once.

    Args:
        paths: where things lie.
        num_tasks: of a whole evaluation; one that is not whole counts as absent.
    """

    def __init__(self, paths: Paths, num_tasks: int) -> None:
        self.paths, self.num_tasks, self.ledger = paths, num_tasks, Ledger(paths.stages)

    @cached_property
    def variants(self) -> list[str]:
        """PPO runs that were begun, in the order they were."""
        files = self.paths.stages.glob("ppo.*.pieces.json")
        names = [file.name.removeprefix("ppo.").removesuffix(".pieces.json") for file in files]
        return sorted(names, key=lambda name: self.ledger.pieces(f"ppo.{name}")[0]["started"])

    @cached_property
    def evaluations(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Whole evaluations by policy and kind, their parts put together."""
        found = {}
        for folder in sorted((self.paths.run_dir / "eval").glob("*/*")):
            policy, kind = folder.parts[-2:]
            parts = [read_json(file) for file in self._part_files(policy, kind)]
            if sum(len(part["per_task"]) for part in parts) == self.num_tasks:
                found[policy, kind] = merge_results(parts)
        return found

    def _part_files(self, policy: str, kind: str) -> list[Path]:
        """results.json of each part that is done."""
        parts = sorted(
            self.paths.evaluation(policy, kind).glob("*"), key=lambda folder: int(folder.name)
        )
        done = [
            folder
            for folder in parts
            if self.ledger.marker(f"eval.{policy}.{kind}.{folder.name}") is not None
        ]
        return [max(folder.glob("*/results.json")) for folder in done]

    def videos(self, policy: str) -> dict[tuple[int, int], Path]:
        """Videos of the main evaluation by task and initial state: those that are here, records travel without them."""
        found = {}
        for file in self._part_files(policy, MAIN):
            for episode in read_json(file)["episodes"]:
                if episode.get("video") and (video := file.parent / episode["video"]).exists():
                    found[episode["task_id"], episode["init_state_id"]] = video
        return found

    def metrics(self, variant: str) -> list[dict[str, float]]:
        """A PPO run's metrics so far."""
        exp_dir = self.paths.ppo(variant)
        return read_metrics(exp_dir) if (exp_dir / "metrics.jsonl").exists() else []

    def curve(self, variant: str) -> tuple[CurvePoint, ...]:
        """A PPO run's learning curve so far."""
        if not (metrics := self.metrics(variant)):
            return ()
        return curve_points(
            metrics, settling_steps(read_json(self.paths.ppo(variant) / "args.json"))
        )

    def ppo_summary(self, variant: str) -> dict[str, Any]:
        """A PPO run's numbers so far, with its GPU's where they were sampled."""
        metrics, pieces = self.metrics(variant), self.ledger.pieces(f"ppo.{variant}")
        summary = {
            "is_done": self.ledger.marker(f"ppo.{variant}") is not None,
            **summarize_ppo(metrics, pieces),
        }
        starts = [piece["started"] for piece in pieces if "first_step" in piece]
        spans = [
            (s + a, s + b) for s, (a, b) in zip(starts, piece_spans(pieces, metrics), strict=True)
        ]
        gpu = summarize_samples(read_samples(self.paths.gpu_samples(variant)), spans)
        return summary | ({"gpu": gpu} if gpu else {})

    def checks(self) -> dict[str, Any]:
        """Evaluations of other kinds than the main one, and the held-out check of the layouts."""
        kinds = sorted({kind for _, kind in self.evaluations} - {MAIN})
        found: dict[str, Any] = {kind: self.policies(kind) for kind in kinds}
        held_out = self.paths.held_out
        return found | ({"held_out": read_json(held_out)} if held_out.exists() else {})

    def policies(self, kind: str = MAIN) -> dict[str, Any]:
        """Every evaluated policy's numbers, the supervised one first."""
        before = self.evaluations.get((SUPERVISED, kind))
        found = {SUPERVISED: summarize_policy(before)} if before else {}
        for variant in self.variants:
            if (variant, kind) in self.evaluations:
                found[variant] = summarize_policy(self.evaluations[variant, kind], before)
        return found

    def pairs(self) -> list[dict[str, Any]]:
        """Every two evaluated variants compared on the same initial states; `before` is the one named first."""
        evaluated = [name for name in self.variants if (name, MAIN) in self.evaluations]
        return [
            {
                "before": a,
                "after": b,
                **compare(self.evaluations[a, MAIN], self.evaluations[b, MAIN]),
            }
            for a, b in combinations(evaluated, 2)
        ]

    def remarks(self) -> list[str]:
        """What the evaluations say must be said beside every rate."""
        return list(
            dict.fromkeys(
                text for results in self.evaluations.values() for text in results["remarks"]
            )
        )

    def stage_seconds(self) -> dict[str, dict[str, Any]]:
        """Every stage that was begun: seconds over its pieces, their number, and whether it is done."""
        files = sorted(
            self.paths.stages.glob("*.pieces.json"),
            key=lambda f: read_json(f)["pieces"][0]["started"],
        )
        names = [file.name.removesuffix(".pieces.json") for file in files]
        return {
            name: {
                "seconds": round(self.ledger.seconds(name), 1),
                "num_pieces": len(self.ledger.pieces(name)),
                "is_done": self.ledger.marker(name) is not None,
            }
            for name in names
        }

    def collect(self, target: Path) -> None:
        """Put what matters into a folder: summary, report, figure and grid as they are, all records in one archive."""
        root = self.paths.run_dir
        plain = [root / name for name in ("summary.json", "report.html", "figure.svg", "grid.mp4")]
        found: list[Path] = []
        for pattern in (*RECORDS, *(f"ppo/*/{name}" for name in PPO_RECORDS)):
            found += [file for file in root.glob(pattern) if file.is_file()]
        collect(target, plain, {"records.tar.gz": (root, found)})

    def collect_models(self, target: Path) -> None:
        """Put the supervised model and the PPO runs into a folder, as an archive in parts.

        The supervised model is left out if it came from elsewhere. Of a finished run it is the adapter, of another all
        that it needs to go on where the archive is unpacked: its folder and its records.
        """
        found = (
            []
            if self.paths.sft_dir
            else [f for f in self.paths.sft.glob("*") if "tfevents" not in f.name]
        )
        for variant in self.variants:
            folder, name = self.paths.ppo(variant), f"ppo.{variant}"
            if self.ledger.marker(name) is not None:
                found += [file for name in ADAPTER_FILES if (file := folder / name).exists()]
            else:
                found += [
                    *folder.rglob("*"),
                    self.paths.stages / f"{name}.pieces.json",
                    self.paths.gpu_samples(variant),
                ]
        collect(
            target,
            [],
            {"models.tar": (self.paths.run_dir, [file for file in found if file.is_file()])},
        )


def summarize_run(
    run: ScratchRun,
    recipe: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[str],
) -> dict[str, Any]:
    """What summary.json holds: rates in 0..1, times in seconds. `wanted`: the stages that this run is to have."""
    stages = run.stage_seconds()
    return {
        "is_complete": all(stages.get(name, {}).get("is_done") for name in wanted),
        "task_suite_name": next((r["task_suite_name"] for r in run.evaluations.values()), "LIBERO"),
        "remarks": run.remarks(),
        "policies": run.policies(),
        "pairs": run.pairs(),
        "ppo": {
            name: {"changes": changes.get(name, {}), **run.ppo_summary(name)}
            for name in run.variants
        },
        "checks": run.checks(),
        "stages": stages,
        "recipe": recipe,
    }
