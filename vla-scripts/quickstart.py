"""The whole loop on one CPU machine: demonstrations, fine-tuning, PPO, merge, evaluations, and a report.

    bash scripts/quickstart.sh --seed 0 --run_dir runs/quickstart

does the set-up and calls this. Each stage is a command that works by itself (it is logged in full); its output goes to
RUN_DIR/logs. Ends with a table, `summary.json` and `report.html` in RUN_DIR. Nothing in an existing RUN_DIR is touched
without --overwrite.
"""

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import get_console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import ResetRequest, get_suite
from ppo.run_results import (
    choose_episodes,
    curve_points,
    ppo_phases,
    read_evaluation,
    settling_steps,
    training_lines,
)
from utils.command_line import REFUSED, Bound, CommandLineError, bound_problems
from utils.logging_utils import format_duration, get_logger, read_metrics
from utils.output_folders import QUICK_START, output_problems, remove_output
from utils.pipeline import SHOWN, Stage, StageError, flags, run_command
from utils.reports import figures
from utils.reports.figures import Series, percent, to_svg
from utils.reports.page import (
    Clip,
    Clips,
    Key,
    Page,
    Plot,
    Section,
    TaskRates,
    Tile,
    TimeSplit,
    rate_tiles,
    render,
    settings_table,
)

logger = get_logger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tabletop"
BASE_MODEL = ROOT / "assets" / "tabletop-base"
INPUTS = {"vla_path": BASE_MODEL}
MARKER = "quickstart.json"  # in every run's folder: only a folder with this file is ever replaced
BOUNDS = {"seed": Bound(0, 1e12, reason="a larger one is a slip")}
NUM_CLIP_PAIRS = 4
CURVE_KEYS = (
    Key("greedy, supervised", figures.BEFORE, is_dot=True),
    Key("greedy, after PPO", figures.AFTER, is_dot=True),
    Key("sampled, while training", figures.COLOURS[1]),
)
SHOWN_PPO_FLAGS = (
    "num_steps", "local_rollout_batch_size", "num_epochs", "local_mini_batch_size", "learning_rate",
    "value_learning_rate", "value_init_steps", "lora_rank", "temperature", "cliprange", "ratio_level", "gamma", "lam",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Show the whole loop on this machine: about a quarter of an hour on two cores."""

    seed: int = 0
    """Decides demonstrations, fine-tuning and PPO; >= 0. Evaluations always use the same initial states and seed."""
    run_dir: Path = Path("runs/quickstart")
    """Folder to write: must not exist, or be empty."""
    overwrite: bool = False
    """Replace an earlier quick start in --run_dir."""


# The quick start's hyper-parameters; PPO's are in its launch script. docs/RECIPE.md says how they were found.
DEMOS = {"num_episodes": 1000, "imperfection": 0.85, "image_size": 56}
FINETUNE = {
    "max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 5e-4, "lr_scheduler_type": "cosine",
    "warmup_steps": 20, "freeze_vision_backbone": True, "image_aug": False, "save_freq": 0, "num_threads": 2,
}  # fmt: skip
PPO_TITLE = "PPO with LoRA"
PPO_SCRIPT = "scripts/train_tabletop_cpu.sh"


@dataclass(frozen=True)
class Paths:
    """Where the parts of a run lie."""

    run_dir: Path

    @property
    def data(self) -> Path:
        """RLDS demonstrations."""
        return self.run_dir / "data"

    @property
    def sft(self) -> Path:
        """The supervised policy."""
        return self.run_dir / "sft"

    @property
    def ppo(self) -> Path:
        """PPO's folder: metrics, the final adapter, eval_final.json."""
        return self.run_dir / "ppo"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.run_dir / "merged"

    def evaluation(self, name: str) -> Path:
        """Where evaluation `name` makes its folder."""
        return self.run_dir / f"eval_{name}"

    def results(self, name: str) -> dict[str, Any]:
        """The results.json of evaluation `name`."""
        (file,) = self.evaluation(name).glob("*/results.json")
        return json.loads(file.read_text())


def make_stages(args: Args) -> list[Stage]:
    """All stages in order, with their whole command lines."""
    paths = Paths(args.run_dir)
    seed = {"seed": args.seed}
    commands: list[tuple[str, str, str, dict[str, Any]]] = [
        ("demos", "demonstrations", "vla-scripts/make_demos.py",
         {"task_suite_name": SUITE, "output_dir": paths.data, **DEMOS, **seed}),
        ("finetune", "supervised fine-tuning", "vla-scripts/finetune.py",
         {"vla_path": BASE_MODEL, "data_root_dir": paths.data, "dataset_name": f"{SUITE}_no_noops",
          "output_dir": paths.sft, **FINETUNE, **seed}),
        ("eval_sft", "evaluation of the supervised policy", "run_libero_eval_vllm.py",
         {"pretrained_checkpoint": paths.sft, "task_suite_name": SUITE, "local_log_dir": paths.evaluation("sft")}),
        ("ppo", PPO_TITLE, PPO_SCRIPT,
         {"vla_path": paths.sft, "run_root_dir": args.run_dir, "exp_id": paths.ppo.name, "eval_final": True, **seed}),
        ("merge", "merge", "vla-scripts/merge.py",
         {"vla_path": paths.sft, "adapter_dir": paths.ppo, "output_dir": paths.merged}),
        ("eval_merged", "evaluation of the merged model", "run_libero_eval_vllm.py",
         {"pretrained_checkpoint": paths.merged, "task_suite_name": SUITE,
          "local_log_dir": paths.evaluation("merged")}),
    ]  # fmt: skip
    programs = {".py": sys.executable, ".sh": "bash"}
    return [
        Stage(name, title, (programs[script[-3:]], str(ROOT / script), *flags(values)))
        for name, title, script, values in commands
    ]


def validate(args: Args) -> None:
    """Raise CommandLineError with everything that keeps the run from starting."""
    from utils.checkpoint_utils import (
        check_model_dir,
    )  # imports torch: seconds that --help need not take

    problems = bound_problems(args, BOUNDS) + check_model_dir(BASE_MODEL)
    problems += output_problems(
        "--run_dir", args.run_dir, QUICK_START, inputs=INPUTS, overwrite=args.overwrite
    )
    if problems:
        raise CommandLineError(
            "cannot start:\n" + "\n".join(f"- {problem}" for problem in problems)
        )


def run_stages(stages: Sequence[Stage], run_dir: Path) -> dict[str, float]:
    """Run all stages one after the other; returns {title: seconds}. Raises StageError at the first that fails."""
    (run_dir / "logs").mkdir()
    seconds = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for number, stage in enumerate(stages, 1):
        logger.info("[%d/%d] %s", number, len(stages), stage.title)
        started = time.perf_counter()
        console = get_console()
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task(stage.title)

            def on_line(line: str, progress: Progress = progress, task: Any = task) -> None:
                if match := SHOWN.search(line):
                    logger.info("      %s", match[0])
                    progress.update(task, description=match[0].split("|")[0])

            try:
                run_command(stage.command, run_dir / "logs" / f"{number}_{stage.name}.log", on_line)
            except StageError as error:
                raise StageError(f"{stage.title} failed:\n{error}") from None
        seconds[stage.title] = time.perf_counter() - started
        logger.info(
            "[%d/%d] %s: done in %s",
            number,
            len(stages),
            stage.title,
            format_duration(seconds[stage.title]),
        )
    return seconds


def summarize(args: Args, ppo_s: float, wall_s: float) -> dict[str, Any]:
    """Return what summary.json holds: rates in 0..1, times in seconds without the set-up of packages."""
    paths = Paths(args.run_dir)
    sft, merged = (paths.results(name)["overall"] for name in ("sft", "merged"))
    final = json.loads((paths.ppo / "eval_final.json").read_text())["overall"]
    return {
        "sft_success_rate": sft["rate"],
        "ppo_success_rate": final["rate"],
        "merged_success_rate": merged["rate"],
        "num_eval_episodes": merged["episodes"],
        "ppo_env_steps": int(
            max(line.get("time/env_steps_total", 0) for line in read_metrics(paths.ppo))
        ),
        "ppo_wall_s": round(ppo_s, 1),
        "wall_s": round(wall_s, 1),
        "seed": args.seed,
    }


def replay(
    model_dir: Path, label: str, episodes: Sequence[dict[str, Any]], work_dir: Path
) -> list[Clip]:
    """Play evaluated episodes again, greedily, with the plain PyTorch model; returns a clip of each, at 256 pixels.

    Initial state and noise are the evaluation's, so that the outcome is too; an episode that ends otherwise (the engine
    rounds differently) is logged.
    """
    from prismatic.extern.hf.modeling_prismatic import load_model
    from prismatic.extern.hf.processing_prismatic import load_processor
    from prismatic.vla.action_normalization import (
        load_norm_stats,
        resolve_unnorm_key,
        to_env_action,
    )
    from utils.reports.videos import save_video

    suite, model, processor = get_suite(SUITE), load_model(model_dir), load_processor(model_dir)
    unnorm_key = resolve_unnorm_key(load_norm_stats(model_dir), SUITE)
    clips = []
    for number, episode in enumerate(episodes):
        instruction = suite.instructions[episode["task_id"]]
        env = suite.make_env(model.config.image_sizes[0])
        image = env.reset(
            ResetRequest(episode["task_id"], episode["init_state_id"], episode["seed"])
        )
        frames, step = [env.render(256)], None
        while step is None or not (step.terminated or step.truncated):
            action = model.predict_action(image, instruction, unnorm_key, processor=processor)
            step = env.step(to_env_action(action))
            image = step.image
            frames.append(env.render(256))
        env.close()
        file = work_dir / f"{model_dir.name}_{number}.mp4"
        save_video(file, frames, fps=5)
        clips.append(Clip(file.read_bytes(), label, instruction, step.success))
        if step.success != episode["success"]:
            logger.warning("%s: the replay of %s ended otherwise", label, file.name)
    return clips


def make_clips(paths: Paths) -> tuple[Clip, ...]:
    """Episodes before and after PPO, side by side."""
    results = {name: paths.results(name) for name in ("sft", "merged")}
    chosen = choose_episodes(results["sft"], results["merged"], NUM_CLIP_PAIRS)
    outcome = {(e["task_id"], e["init_state_id"]): e for e in results["merged"]["episodes"]}
    after_chosen = [outcome[e["task_id"], e["init_state_id"]] for e in chosen]
    folder = paths.run_dir / "videos"
    folder.mkdir()
    before = replay(paths.sft, "supervised", chosen, folder)
    after = replay(paths.merged, "after PPO", after_chosen, folder)
    return tuple(clip for pair in zip(before, after, strict=True) for clip in pair)


def make_report(
    args: Args, summary: dict[str, Any], stage_s: dict[str, float], clips: tuple[Clip, ...]
) -> str:
    """Return the report's HTML."""
    paths = Paths(args.run_dir)
    metrics = read_metrics(paths.ppo)
    ppo_args = json.loads((paths.ppo / "args.json").read_text())
    warmup = training_lines(metrics)[: ppo_args["value_init_steps"]]
    settings = {f"make_demos {k}": v for k, v in DEMOS.items()} | {
        f"finetune {k}": v for k, v in FINETUNE.items()
    }
    settings |= {f"PPO {name}": ppo_args[name] for name in SHOWN_PPO_FLAGS}
    before = read_evaluation("supervised", paths.results("sft"))
    final = json.loads((paths.ppo / "eval_final.json").read_text())
    after = read_evaluation("after PPO", final)
    env_steps = summary["ppo_env_steps"]
    warmup_steps = max((int(line["time/env_steps_total"]) for line in warmup), default=0)
    greedy = (
        (0.0, before.overall, figures.BEFORE),
        (float(env_steps), after.overall, figures.AFTER),
    )
    points = curve_points(metrics, settling_steps(ppo_args))
    curve = Series("sampled, while training", figures.COLOURS[1], points, greedy)
    plot = figures.learning_curves([curve], max_x=env_steps, warmup_x=warmup_steps)
    note = "The shaded steps train only the critic. " if warmup_steps else ""
    note += "Training samples its actions, so its rate is not the greedy one."
    merged = percent(summary["merged_success_rate"])
    wall_s = format_duration(sum(stage_s.values()))
    return render(
        Page(
            title=f"PPO on a small OpenVLA policy: {SUITE}, seed {args.seed}",
            lead="A supervised policy, improved by PPO with LoRA, then merged into one model. "
            f"Success is greedy, on the same {summary['num_eval_episodes']} fixed episodes.",
            tiles=[
                *rate_tiles(before, after),
                Tile(merged, "merged model", "as a plain model folder"),
                Tile(wall_s, "whole run", f"{env_steps:,} environment steps of PPO"),
            ],
            sections=[
                Section("Learning curve", [Plot(to_svg(plot, "learning curve"), CURVE_KEYS)], note),
                Section(
                    "Success per task",
                    [TaskRates(before, after)],
                    "Greedy actions on the fixed initial states, with 95 % Wilson intervals.",
                ),
                Section(
                    "Episodes",
                    [Clips(clips)] if clips else [],
                    "The same initial states before and after PPO, greedy actions.",
                ),
                Section(
                    "Where the time went",
                    [
                        TimeSplit("Whole run", stage_s),
                        TimeSplit("PPO", ppo_phases(metrics, stage_s[PPO_TITLE])),
                    ],
                ),
                Section(
                    "How it was run",
                    [
                        settings_table(
                            {"command": f"bash scripts/quickstart.sh --seed {args.seed}"}
                            | {name: str(value) for name, value in settings.items()}
                        )
                    ],
                ),
            ],
        )
    )


def show_table(summary: dict[str, Any], paths: Paths) -> None:
    """Print the short table that ends the run."""
    table = Table(
        title=f"tabletop, {summary['num_eval_episodes']} fixed episodes, greedy", show_header=False
    )
    gain = 100 * (summary["ppo_success_rate"] - summary["sft_success_rate"])
    table.add_row("supervised policy", percent(summary["sft_success_rate"]))
    table.add_row(
        "after PPO (base + adapter)",
        f"{percent(summary['ppo_success_rate'])}  ({gain:+.1f} points)",
    )
    table.add_row("merged model", percent(summary["merged_success_rate"]))
    table.add_row(
        "PPO",
        f"{summary['ppo_env_steps']:,} environment steps, {format_duration(summary['ppo_wall_s'])}",
    )
    table.add_row("whole run", format_duration(summary["wall_s"]))
    table.add_row("report", str(paths.run_dir / "report.html"))
    get_console().print(table)


def main(args: Args) -> None:
    """Run everything. Raises CommandLineError before anything is written, StageError when a stage fails."""
    started = time.perf_counter()
    validate(args)
    if args.overwrite:
        remove_output("--run_dir", args.run_dir, QUICK_START, INPUTS)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    paths = Paths(args.run_dir)
    (paths.run_dir / MARKER).write_text(
        json.dumps({key: str(value) for key, value in asdict(args).items()}) + "\n"
    )
    logger.info("quick start in %s, logs in %s", paths.run_dir, paths.run_dir / "logs")
    stage_s = run_stages(make_stages(args), paths.run_dir)
    logger.info("playing %d episodes again for the report", 2 * NUM_CLIP_PAIRS)
    replay_started = time.perf_counter()
    clips = make_clips(paths)
    stage_s["episodes for this report"] = time.perf_counter() - replay_started
    summary = summarize(args, stage_s[PPO_TITLE], time.perf_counter() - started)
    (paths.run_dir / "report.html").write_text(make_report(args, summary, stage_s, clips))
    (paths.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show_table(summary, paths)


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__, use_underscores=True)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that the running stage is ended too
    try:
        main(arguments)
    except CommandLineError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
    except (ValueError, StageError) as error:
        logger.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("interrupted; %s is incomplete", arguments.run_dir)
        sys.exit(130)
