"""Flag lines of a hostile user: each is refused by name before anything starts, or accepted where it makes sense."""

import dataclasses
import importlib.util
import runpy
import subprocess
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tyro

from utils.command_line import REFUSED, Bound

ROOT = Path(__file__).parents[1]
DRIVER, EVALUATION = "ppo_vllm_ray_fsdp_vla.py", "run_libero_eval_vllm.py"
DEMOS, FINETUNE, MERGE = (f"vla-scripts/{name}.py" for name in ("make_demos", "finetune", "merge"))
QUICK_START, TINY = (f"vla-scripts/{name}.py" for name in ("quickstart", "make_tiny_vla"))
BASE, SCRATCH = (f"vla-scripts/{name}.py" for name in ("make_base_model", "libero_from_scratch"))
HELD_OUT = "vla-scripts/check_held_out.py"

# Program, flags, and a part of the message that names what is wrong. In the flags {model} is a whole model folder,
# {tmp} a folder with `file`, `loop` (a link to itself), `gone` (a link to nothing) and `other/thesis.txt`.
REFUSED_LINES = [
    (DRIVER, "--max_approx_kl nan", "--max_approx_kl nan must be above 0"),
    (DRIVER, "--max_approx_kl inf", "--max_approx_kl inf"),
    (DRIVER, "--max_approx_kl -0.01", "--max_approx_kl -0.01"),
    (DRIVER, "--max_approx_kl 0", "leave the flag out for no limit"),
    (DRIVER, "--learning_rate 1e12", "--learning_rate 1000000000000.0 must be above 0 and at most 1"),
    (DRIVER, "--learning_rate nan", "--learning_rate nan"),
    (DRIVER, "--value_learning_rate -1e-3", "--value_learning_rate -0.001"),
    (DRIVER, "--value_learning_rate inf", "--value_learning_rate inf"),
    (DRIVER, "--use_lora --lora_rank 1000000000", "--lora_rank 1000000000 must be at least 1 and at most 4096"),
    (DRIVER, "--use_lora --lora_rank 0", "--lora_rank 0"),
    (DRIVER, "--use_lora --lora_alpha nan", "--lora_alpha nan"),
    (DRIVER, "--use_lora --lora_alpha -4", "--lora_alpha -4"),
    (DRIVER, "--use_lora --lora_dropout nan", "--lora_dropout nan"),
    (DRIVER, "--use_lora --lora_dropout 1", "--lora_dropout 1.0 must be at least 0 and below 1"),
    (DRIVER, "--lora_dropout 0.1", "--lora_dropout 0.1 has no effect without --use_lora"),
    (DRIVER, "--lora_rank 8", "--lora_rank 8 has no effect without --use_lora"),
    (DRIVER, "--keep_last 2", "--keep_last 2 has no effect without --save_freq"),
    (DRIVER, "--save_video", "--save_video True has no effect without --eval_freq or --eval_final"),
    (DRIVER, "--trainer_num_threads 1000000000", "--trainer_num_threads 1000000000"),
    (DRIVER, "--engine_num_threads 5000000000", "--engine_num_threads 5000000000"),
    (DRIVER, "--sync_bucket_mib 1000000000", "--sync_bucket_mib 1000000000"),
    (DRIVER, "--local_rollout_batch_size 1000000000", "--local_rollout_batch_size 1000000000"),
    (DRIVER, "--num_steps 2000000000", "--num_steps 2000000000"),
    (DRIVER, "--num_steps 900000 --total_episodes 100000000", "= 14400000 samples of a training step"),
    (DRIVER, "--num_env_processes 1000000000", "--num_env_processes 1000000000"),
    (DRIVER, "--num_env_groups 1000000000", "--num_env_groups 1000000000"),
    (DRIVER, "--vllm_num_engines 1000000000", "--vllm_num_engines 1000000000"),
    (DRIVER, "--vllm_tensor_parallel_size 1000000000", "--vllm_tensor_parallel_size 1000000000"),
    (DRIVER, "--actor_num_gpus_per_node [1000000000]", "--actor_num_gpus_per_node"),
    (DRIVER, "--local_mini_batch_size 1000000000", "--local_mini_batch_size 1000000000"),
    (DRIVER, "--per_device_train_batch_size 1000000000", "--per_device_train_batch_size 1000000000"),
    (DRIVER, "--per_device_forward_batch_size 1000000000", "--per_device_forward_batch_size 1000000000"),
    (DRIVER, "--num_epochs 1000000000", "--num_epochs 1000000000"),
    (DRIVER, "--value_init_steps 1000", "--value_init_steps 1000 leaves the policy none of the run's 48"),
    (DRIVER, "--policy_lr_warmup_steps 1000", "--policy_lr_warmup_steps 1000 is longer than the run's 48"),
    (DRIVER, "--env_timeout_s 1e-9", "--env_timeout_s 1e-09 must be at least 0.1"),
    (DRIVER, "--hang_timeout_s 1e-9", "--hang_timeout_s 1e-09"),
    (DRIVER, "--hang_timeout_s inf", "--hang_timeout_s inf"),
    (DRIVER, "--placement_timeout_s nan", "--placement_timeout_s nan"),
    (DRIVER, "--gamma nan", "--gamma nan"),
    (DRIVER, "--lam -inf", "--lam -inf"),
    (DRIVER, "--cliprange nan", "--cliprange nan"),
    (DRIVER, "--cliprange_high inf", "--cliprange_high inf"),
    (DRIVER, "--cliprange_value nan", "--cliprange_value nan"),
    (DRIVER, "--entropy_coef nan", "--entropy_coef nan"),
    (DRIVER, "--beta -1", "--beta -1"),
    (DRIVER, "--vf_coef inf", "--vf_coef inf"),
    (DRIVER, "--max_grad_norm nan", "--max_grad_norm nan"),
    (DRIVER, "--temperature 0", "--temperature 0.0"),
    (DRIVER, "--importance_weight_cap nan --async_depth 1", "--importance_weight_cap nan"),
    (DRIVER, "--curriculum_tau 0", "--curriculum_tau 0.0"),
    (DRIVER, "--best_min_delta nan", "--best_min_delta nan"),
    (DRIVER, "--gpu_memory_utilization nan", "--gpu_memory_utilization nan"),
    (DRIVER, "--activation_memory_budget nan --compile", "--activation_memory_budget nan"),
    (DRIVER, "--seed -1", "--seed -1"),
    (DRIVER, "--seed 100000000000000000000000000", "--seed (a number above 1e20)"),
    (DRIVER, "--max_restarts -1", "--max_restarts -1"),
    (DRIVER, "--task_ids 1 1", "--task_ids 1 1 names 1 twice"),
    (DRIVER, "--task_ids -1", "--task_ids -1"),
    (DRIVER, "--task_suite_name .:x", "'.:x' is not of the form package.module:ATTRIBUTE"),
    (DRIVER, "--task_suite_name :x", "':x' is not of the form"),
    (DRIVER, "--task_suite_name a..b:c", "'a..b:c' is not of the form"),
    (DRIVER, "--task_suite_name no_such_module:SUITE", "ModuleNotFoundError: No module named 'no_such_module'"),
    (DRIVER, "--task_suite_name os:path", "os:path is not a TaskSuite"),
    (DRIVER, "--task_suite_name tests.data.broken_suite:SUITE", "raises RuntimeError: the licence has expired"),
    (DRIVER, "--engine_args [1]", "--engine_args '[1]' is not a JSON object"),
    (DRIVER, "--engine_args 7", "--engine_args '7' is not a JSON object"),
    (DRIVER, "--engine_args {", "--engine_args '{' is not JSON"),
    (DRIVER, '--engine_args {"block_size":NaN}', "NaN is not JSON"),
    (DRIVER, '--engine_args {"block_size":16,"block_size":32}', "names block_size twice"),
    (DRIVER, '--engine_args {"max_model_len":8}', '--engine_args {"max_model_len": 8} must be a whole number from'),
    (DRIVER, '--engine_args {"max_model_len":9999999}', '{"max_model_len": 9999999}'),
    (DRIVER, '--engine_args {"block_sise":16}', "'block_sise' is unknown"),
    (DRIVER, '--engine_args {"block_size":"large"}', "'block_size' is 'large': vLLM wants int | None"),
    (DRIVER, '--engine_args {"seed":1}', "'seed' cannot be given"),
    (DRIVER, "--exp_id .", "--exp_id '.'"),
    (DRIVER, "--exp_id ..", "--exp_id '..'"),
    (DRIVER, "--exp_id ../../x", "--exp_id '../../x' is a path, not a name"),
    (DRIVER, "--exp_id /tmp/x", "--exp_id '/tmp/x' is a path, not a name"),
    (DRIVER, "--exp_id a/b", "--exp_id 'a/b' is a path, not a name"),
    (DRIVER, "--exp_id .hidden", "--exp_id '.hidden' is no name"),
    (DRIVER, "--exp_id=-rf", "--exp_id '-rf' is no name"),
    (DRIVER, "--exp_id=", "--exp_id '' is no name"),
    (DRIVER, "--exp_id " + "x" * 201, "has 201 bytes: use at most 200"),
    (DRIVER, "--exp_id " + "ü" * 101, "has 202 bytes"),
    (DRIVER, "--exp_id a\nb", "holds a control character"),
    (DRIVER, "--run_id_note ../../x", "--run_id_note '../../x' is a path, not a name"),
    (DRIVER, "--vla_path " + "x" * 300, "its longest name 300"),
    (DRIVER, "--vla_path a\0b", "--vla_path 'a\\x00b' holds a control character"),
    (DRIVER, "--run_root_dir=", "--run_root_dir is empty"),
    (DRIVER, "--run_root_dir {tmp}/file", "file is a file, not a folder"),
    (DRIVER, "--run_root_dir {tmp}/file/below", "file is a file, not a folder"),
    (DRIVER, "--run_root_dir /proc/runs", "/proc cannot be written to"),
    (DRIVER, "--run_root_dir {tmp}/loop", "Too many levels of symbolic links"),
    (DRIVER, "--run_root_dir {tmp}/gone", "is a link to nowhere, which is not there"),
    (DRIVER, "--run_root_dir {tmp} --exp_id other", "exists and is not empty"),
    (DRIVER, "--run_root_dir {tmp} --exp_id other --overwrite", "is not recognisably a PPO run"),
    (DRIVER, "--run_root_dir {tmp} --exp_id other --resume auto", "holds no PPO run"),
    (DRIVER, "--run_root_dir {models} --exp_id tiny --overwrite", "is --vla_path"),
    (DRIVER, "--run_root_dir {models} --exp_id tiny --resume auto", "is --vla_path"),
    (EVALUATION, "--temperature nan", "--temperature nan"),
    (EVALUATION, "--temperature 0.001", "--temperature 0.001"),
    (EVALUATION, "--num_envs 1000000000", "--num_envs 1000000000"),
    (EVALUATION, "--num_processes 1000000000", "--num_processes 1000000000"),
    (EVALUATION, "--step_timeout_s 1e-9", "--step_timeout_s 1e-09"),
    (EVALUATION, "--startup_timeout_s nan", "--startup_timeout_s nan"),
    (EVALUATION, "--video_fps inf", "--video_fps inf"),
    (EVALUATION, "--gpu_memory_utilization nan", "--gpu_memory_utilization nan"),
    (EVALUATION, "--task_ids 1 1", "--task_ids 1 1 names 1 twice"),
    (EVALUATION, "--task_suite_name .:x", "'.:x' is not of the form"),
    (EVALUATION, "--engine_args [1]", "is not a JSON object"),
    (EVALUATION, '--engine_args {"max_model_len":4}', "must be a whole number from"),
    (EVALUATION, "--video_episodes 0:x", "--video_episodes 0:x"),
    (EVALUATION, "--seed -1", "--seed -1"),
    (EVALUATION, "--local_log_dir {tmp}/file/x", "is a file, not a folder"),
    (EVALUATION, "--local_log_dir /proc/x", "/proc cannot be written to"),
    (EVALUATION, "--local_log_dir {tmp}/loop/x", "Too many levels of symbolic links"),
    (EVALUATION, "--run_id_note ../x", "--run_id_note '../x' is a path"),
    (DEMOS, "--num_episodes 1000000000000", "--num_episodes 1000000000000 must be at least 1 and at most 1e+06"),
    (DEMOS, "--num_processes 1000000000", "--num_processes 1000000000"),
    (DEMOS, "--task_ids 1 1", "--task_ids 1 1 names 1 twice"),
    (DEMOS, "--imperfection nan", "--imperfection nan"),
    (DEMOS, "--haste nan", "--haste nan"),
    (DEMOS, "--image_size 1000000", "--image_size 1000000"),
    (DEMOS, "--max_env_length 0", "--max_env_length 0"),
    (DEMOS, "--task_suite_name .:x", "--task_suite_name .:x"),
    (DEMOS, "--output_dir {tmp}/file/x", "is a file, not a folder"),
    (DEMOS, "--output_dir /proc/x", "/proc cannot be written to"),
    (DEMOS, "--output_dir {tmp}/loop", "Too many levels of symbolic links"),
    (DEMOS, "--output_dir {tmp}/foreign --overwrite", "is not recognisably a dataset of make_demos.py"),
    (FINETUNE, "--learning_rate 1e12", "--learning_rate 1000000000000.0"),
    (FINETUNE, "--weight_decay nan", "--weight_decay nan"),
    (FINETUNE, "--max_grad_norm inf", "--max_grad_norm inf"),
    (FINETUNE, "--cache_gib inf", "--cache_gib inf"),
    (FINETUNE, "--use_lora --lora_rank 1000000000", "--lora_rank 1000000000"),
    (FINETUNE, "--lora_dropout 0.1", "--lora_dropout 0.1 has no effect without --use_lora"),
    (FINETUNE, "--num_threads 1000000000", "--num_threads 1000000000"),
    (FINETUNE, "--data_num_threads 1000000000", "--data_num_threads 1000000000"),
    (FINETUNE, "--per_device_train_batch_size 1000000000", "--per_device_train_batch_size 1000000000"),
    (FINETUNE, "--shuffle_buffer_size 10000000000000", "--shuffle_buffer_size 10000000000000"),
    (FINETUNE, "--warmup_steps 300000", "--warmup_steps 300000 must be below --max_steps"),
    (FINETUNE, "--output_dir=", "--output_dir is empty"),
    (FINETUNE, "--output_dir {tmp}/file/x", "is a file, not a folder"),
    (FINETUNE, "--output_dir /proc/x", "/proc cannot be written to"),
    (FINETUNE, "--output_dir {tmp}/loop", "Too many levels of symbolic links"),
    (FINETUNE, "--output_dir {model} --overwrite", "is --vla_path"),
    (FINETUNE, "--output_dir {models} --overwrite", "contains --vla_path"),
    (FINETUNE, "--output_dir {tmp}/other --overwrite", "is not recognisably a fine-tuning run"),
    (FINETUNE, "--output_dir . --overwrite", "is the working directory"),
    (FINETUNE, "--output_dir / --overwrite", "is the root of the file system"),
    (FINETUNE, "--run_id_note a/b", "--run_id_note 'a/b' is a path"),
    (MERGE, "--output_dir {tmp}/other", "exists and is not empty"),
    (MERGE, "--output_dir {tmp}/other --overwrite", "is not recognisably a model that merge.py wrote"),
    (MERGE, "--output_dir {model} --overwrite", "is --vla_path"),
    (MERGE, "--output_dir {tmp}/file/x", "is a file, not a folder"),
    (MERGE, "--output_dir /proc/x", "/proc cannot be written to"),
    (MERGE, "--output_dir {tmp}/loop/x", "Too many levels of symbolic links"),
    (MERGE, "--output_dir a\0b", "holds a control character"),
    (QUICK_START, "--seed -1", "--seed -1"),
    (QUICK_START, "--run_dir {tmp}/other --overwrite", "is not recognisably a quick start"),
    (QUICK_START, "--run_dir .. --overwrite", "contains the working directory"),
    (QUICK_START, "--run_dir {tmp}/file/x", "is a file, not a folder"),
    (QUICK_START, "--run_dir /proc/x", "/proc cannot be written to"),
    (TINY, "--llm_dim 1000000000", "--llm_dim 1000000000 must be from 1 to"),
    (TINY, "--llm_dim 8192 --llm_depth 256 --llm_heads 8", "weights: at most 1e+09"),
    (TINY, "--patch_size 0", "--patch_size 0 must be from 1"),
    (TINY, "--vision_heads 0", "--vision_heads 0 must be from 1"),
    (TINY, "--image_size -56", "--image_size -56 must be from 1"),
    (TINY, "--seed -1", "--seed -1"),
    (TINY, "--output_dir {tmp}/other", "exists and is not empty"),
    (TINY, "--output_dir /proc/x", "/proc cannot be written to"),
    (BASE, "--learning_rate nan", "--learning_rate nan"),
    (BASE, "--max_time_s nan", "--max_time_s nan"),
    (BASE, "--num_frames 100", "--num_frames 100"),
    (BASE, "--num_workers 1000000000", "--num_workers 1000000000"),
    (BASE, "--kinds point point", "--kinds point point names point twice"),
    (BASE, "--kinds colour", "--kinds colour"),
    (BASE, "--device abacus", "--device 'abacus'"),
    (BASE, "--model.llm_heads 0", "--model.llm_heads 0"),
    (SCRATCH, "--time_limit_s nan", "--time_limit_s nan"),
    (SCRATCH, "--reserve_s inf", "--reserve_s inf"),
    (SCRATCH, "--eval_parts 1000000000", "--eval_parts 1000000000"),
    (SCRATCH, "--num_envs 1000000000", "--num_envs 1000000000"),
    (SCRATCH, "--task_ids 1 1", "--task_ids 1 1 names 1 twice"),
    (SCRATCH, "--estimate sft=nan", "--estimate sft=nan"),
    (SCRATCH, "--run_dir {tmp}/file/x", "is a file, not a folder"),
    (SCRATCH, "--run_dir {tmp}/foreign", "holds model and is not a run of this program"),
    (HELD_OUT, "--task_ids 1 1", "--task_ids 1 1 names 1 twice"),
    (HELD_OUT, "--num_layouts 1000000000", "--num_layouts 1000000000"),
    (HELD_OUT, "--output {tmp}/other/thesis.txt", "exists and is not a result of this program"),
    (HELD_OUT, "--output /proc/x/y.json", "/proc cannot be written to"),
]  # fmt: skip

# What is unusual and right.
ACCEPTED_LINES = [
    (DRIVER, "--max_approx_kl 0.02 --async_depth 1 --importance_weight_cap 3"),
    (DRIVER, "--exp_id 2026-11-28_run.1+lr=3e-4"),
    (DRIVER, "--value_model_type vla --lora_rank 8"),
    (DRIVER, "--save_freq 5 --keep_last 2 --eval_final --save_video"),
    (DRIVER, "--value_init_steps 47"),
    (DRIVER, '--engine_args {"max_num_batched_tokens":4096,"max_model_len":128}'),
    (DRIVER, "--run_root_dir {tmp}/new/er --exp_id x --overwrite"),
    (DRIVER, "--run_root_dir {tmp} --exp_id empty --overwrite"),
    (DRIVER, "--run_root_dir {tmp} --exp_id crashed --overwrite"),
    (DRIVER, "--run_root_dir {tmp} --exp_id never --resume auto"),
    (EVALUATION, "--save_video all --video_fps 30 --temperature 0.01"),
    (DEMOS, "--output_dir {tmp}/data --num_episodes 1 --overwrite"),
    (FINETUNE, "--output_dir {tmp}/empty --overwrite"),
    (QUICK_START, "--run_dir {tmp}/quick"),
    (TINY, "--output_dir {tmp}/empty"),
    (BASE, "--max_time_s inf"),
    (SCRATCH, "--run_dir {tmp}/new --gpus 0 1 --colocate"),
    (HELD_OUT, "--output {tmp}/held_out.json"),
]

# Flags without which a program does not start, or which would hide what a line is about.
GIVEN = {
    DRIVER: "--vla_path {model} --dataset_name tabletop --device cpu --run_root_dir {tmp}/runs",
    EVALUATION: "--pretrained_checkpoint {model} --unnorm_key tabletop --local_log_dir {tmp}/logs",
    DEMOS: "--output_dir {tmp}/demos",
    FINETUNE: "--vla_path {model} --data_root_dir {data} --output_dir {tmp}/sft",
    MERGE: "--vla_path {model} --adapter_dir {model} --output_dir {tmp}/merged",
    QUICK_START: "--run_dir {tmp}/quickstart",
    TINY: "--output_dir {tmp}/tiny",
    BASE: "--output_dir {tmp}/base",
    SCRATCH: "--run_dir {tmp}/scratch",
    HELD_OUT: "--task_suite_name libero_spatial",
}


@cache
def program_module(program: str) -> dict[str, Any]:
    """The names of a program that is loaded as a module, so that nothing of it runs."""
    name = f"hostile_{Path(program).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / program)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(sys.modules[name])
    return vars(sys.modules[name])


def problems_of(program: str, words: list[str]) -> str:
    """What the program says about its command line; empty if it would start. As in its main()."""
    module = program_module(program)
    args = module["Args"]
    options = {} if program == BASE else {"use_underscores": True}
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes) if program == TINY else ()
    parsed = tyro.cli(args, args=words, config=config, **options)
    try:
        found = module["validate"](parsed)
        if program == DRIVER:
            exp_dir = Path(module["make_plan"](parsed, has_gpus=False).exp_dir)
            module["check_files"](parsed, exp_dir)
        for check in {DEMOS: ["check_output"], FINETUNE: ["check_files"]}.get(program, []):
            found += module[check](parsed)
    except ValueError as refused:
        return str(refused)
    return "\n".join(found or [])


@pytest.fixture
def places(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("empty", "other", "crashed", "foreign/model", "foreign/tabletop_no_noops/1.0.0"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("other", "foreign/model", "foreign/tabletop_no_noops/1.0.0"):
        (tmp_path / name / "thesis.txt").write_text("precious")
    line = "2026-11-28 07:22:01,123 INFO ppo_vla.driver: 48 training steps\n"
    (tmp_path / "crashed" / "log.txt").write_text(line)
    return {"tmp": tmp_path, "model": tiny_model_dir, "models": tiny_model_dir.parent}


def words_of(program: str, line: str, places: dict[str, Path], data: Path) -> list[str]:
    def words(text: str) -> list[str]:
        for name, place in {**places, "data": data}.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text.split(" ")

    return words(GIVEN[program]) + words(line)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the one episode that fine-tuning wants to find."""
    root = tmp_path_factory.mktemp("data")
    demos = program_module(DEMOS)
    demos["main"](demos["Args"](output_dir=str(root), num_episodes=1, task_ids=(0,), image_size=28))
    return root


@pytest.mark.parametrize(
    ("program", "line", "message"), REFUSED_LINES, ids=[f"{i}" for i in range(len(REFUSED_LINES))]
)
def test_a_hostile_line_is_refused_by_name(program, line, message, places, data):
    before = sorted(path for path in places["tmp"].rglob("*"))
    assert message in problems_of(program, words_of(program, line, places, data))
    assert sorted(path for path in places["tmp"].rglob("*")) == before, "checking left something"


@pytest.mark.parametrize(("program", "line"), ACCEPTED_LINES)
def test_an_unusual_line_that_makes_sense_is_accepted(program, line, places, data):
    assert problems_of(program, words_of(program, line, places, data)) == ""


def test_the_lines_are_many():
    assert len(REFUSED_LINES) >= 100
    assert {program for program, _, _ in REFUSED_LINES} == set(GIVEN)


@pytest.mark.parametrize("program", sorted(GIVEN))
def test_every_number_that_a_program_takes_has_a_bound(program):
    module = program_module(program)
    bounds: dict[str, Bound] = module.get("BOUNDS", {})
    if program == DRIVER:
        from ppo.arguments import BOUNDS as bounds
    bounded = {name for names in bounds for name in names.split()}
    hints = typing.get_type_hints(module["Args"])
    inherited = set()
    if program == TINY:  # validate_tiny knows the sizes
        from prismatic.extern.hf.tiny_config import SIZE_LIMITS

        inherited = set(SIZE_LIMITS)
    for field in dataclasses.fields(module["Args"]):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float}:
            assert field.name in bounded | inherited, f"{program}: --{field.name}"


@pytest.mark.parametrize("program", sorted(set(GIVEN) - {DRIVER}))
def test_a_refused_line_ends_every_program_with_the_same_code(program, places, monkeypatch, data):
    line = {MERGE: "--output_dir /proc/x"}.get(program)
    line = line or next(line for name, line, _ in REFUSED_LINES if name == program)
    words = words_of(program, line, places, data)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert ended.value.code == REFUSED


def test_the_driver_refuses_with_the_same_code_and_is_not_started_again(places, data):
    words = words_of(DRIVER, "--max_restarts 3 --task_suite_name .:x", places, data)
    done = subprocess.run(
        [sys.executable, DRIVER, *words], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == REFUSED and "Traceback" not in done.stderr
    assert done.stderr.count("'.:x' is not of the form") == 1
