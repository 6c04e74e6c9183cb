"""What may be removed with --overwrite: an output of the same program, and nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest

from prismatic.model_files import write_checksums
from utils.command_line import CommandLineError
from utils.output_folders import (
    FINETUNING_RUN,
    PPO_RUN,
    holds_something,
    output_problems,
    place_problems,
    remove_output,
)

LOG_LINE = "2026-11-28 07:22:01,123 INFO ppo_vla.driver: 48 training steps\n"
PPO_FLAGS = {"vla_path": "base", "task_suite_name": "tabletop", "total_episodes": 640}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of all weights: a model with a tokenizer file of its own name, and checkpoints."""
    folder = tmp_path / "runs" / "run"
    (folder / "step_2" / "training_state").mkdir(parents=True)
    (folder / "model.safetensors").write_text("")
    (folder / "config.json").write_text("{}")
    (folder / "some_tokenizer.model").write_text("")
    write_checksums(folder)
    (folder / "args.json").write_text(json.dumps(PPO_FLAGS))
    (folder / "log.txt").write_text(LOG_LINE)
    for name in ("metrics.jsonl", "events.out.tfevents.1.host", "curriculum.json"):
        (folder / name).write_text("")
    return folder


def refusal(folder: Path, **inputs: Path) -> str:
    with pytest.raises(CommandLineError) as error:
        remove_output("--exp_id", folder, PPO_RUN, inputs)
    assert list(folder.iterdir()), "something was removed"
    assert output_problems("--exp_id", folder, PPO_RUN, inputs=inputs, overwrite=True)
    return str(error.value)


def test_a_run_of_the_same_program_is_removed(run):
    assert output_problems("--exp_id", run, PPO_RUN, overwrite=True) == []
    remove_output("--exp_id", run, PPO_RUN, {"vla_path": run.parents[1] / "base"})
    assert not run.exists() and run.parent.exists()


@pytest.mark.parametrize("first_line", ["", LOG_LINE])
def test_a_run_that_died_with_only_a_log_is_removed(tmp_path, first_line):
    (tmp_path / "crashed").mkdir()
    (tmp_path / "crashed" / "log.txt").write_text(first_line)
    remove_output("--exp_id", tmp_path / "crashed", PPO_RUN)
    assert not (tmp_path / "crashed").exists()


def test_a_log_of_something_else_does_not_make_a_run(tmp_path):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "log.txt").write_text("Dear diary,\n")
    assert "is not recognisably a PPO run" in refusal(tmp_path / "diary")


def test_one_file_that_no_run_writes_keeps_the_folder(run):
    (run / "thesis.tex").write_text("of years")
    assert "holds thesis.tex, which a PPO run does not" in refusal(run)


def test_a_run_of_another_program_is_kept(run):
    (run / "args.json").write_text('{"vla_path": "base", "data_root_dir": "data", "max_steps": 3}')
    assert "is not recognisably a PPO run" in refusal(run)
    (run / "curriculum.json").unlink()
    assert output_problems("--output_dir", run, FINETUNING_RUN, overwrite=True) == []


def test_an_input_is_kept_whatever_path_names_it(run, monkeypatch):
    link = run.parents[1] / "link"
    link.symlink_to(run)
    monkeypatch.chdir(run.parent)
    for vla_path in (run, link, Path("run"), run / "step_2" / ".."):
        assert "is --vla_path" in refusal(run, vla_path=vla_path)


def test_a_folder_that_contains_an_input_or_lies_inside_one_is_kept(run):
    assert "contains --load_adapter_checkpoint" in refusal(
        run, load_adapter_checkpoint=run / "step_2"
    )
    assert "lies inside --data_root_dir" in refusal(run, data_root_dir=run.parent)


def test_a_link_is_not_followed(run):
    link = run.parents[1] / "link"
    link.symlink_to(run)
    assert "is a link" in refusal(link)
    assert (run / "args.json").exists()


def test_a_run_below_a_linked_root_is_removed(run):
    root = run.parents[1] / "scratch"
    root.symlink_to(run.parent)
    remove_output("--exp_id", root / "run", PPO_RUN)
    assert not run.exists()


def test_links_inside_a_run_do_not_take_their_targets_along(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    (run / "videos").symlink_to(tmp_path / "elsewhere")
    remove_output("--exp_id", run, PPO_RUN)
    assert not run.exists() and (tmp_path / "elsewhere" / "precious").exists()


def test_working_directory_and_home_are_kept_even_if_they_look_like_runs(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(run / "step_2")
        assert "contains the working directory" in refusal(run)
    monkeypatch.setenv("HOME", str(run))
    assert "is the home folder" in refusal(run)
    assert "root of the file system" in output_problems("--output_dir", "/", PPO_RUN)[0]


def test_what_was_put_there_after_the_check_is_kept(run):
    assert output_problems("--exp_id", run, PPO_RUN, overwrite=True) == []
    (run / "notes").mkdir()
    assert "holds notes" in refusal(run)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file, not a folder" in place_problems("--x", tmp_path / "file" / "a" / "b")[0]
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write anywhere
        assert "cannot be written to" in place_problems("--x", tmp_path / "closed" / "a")[0]
    assert "/proc cannot be written to" in place_problems("--x", "/proc/a")[0]
    assert place_problems("--x", tmp_path / "new" / "er") == []
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_rank_is_just_trying_counts_as_empty(tmp_path):
    (tmp_path / ".write-test-abc").mkdir()
    assert not holds_something(tmp_path)


def test_the_model_that_a_run_starts_from_survives_overwrite(tiny_model_dir, tmp_path):
    import ppo_vllm_ray_fsdp_vla as driver
    from tests.test_driver import small_args

    model = shutil.copytree(tiny_model_dir, tmp_path / "runs" / "sft")
    before = sorted(file.name for file in model.iterdir())
    args = small_args(model, tmp_path / "runs", exp_id="sft", overwrite=True)
    with pytest.raises(CommandLineError, match=r"--exp_id .*/runs/sft is --vla_path"):
        driver.main(args)
    assert sorted(file.name for file in model.iterdir()) == before
