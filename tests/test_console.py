"""The console of a program shows its own lines and warnings that mean something, nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT

# What silences libraries on this machine must not decide these tests.
QUIET = (
    "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "TF_CPP_MIN_LOG_LEVEL", "PYTHONWARNINGS",
    "TOKENIZERS_PARALLELISM", "VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL",
)  # fmt: skip
OWN_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) ")


def foreign_lines(output: str) -> list[str]:
    """Lines that are no log lines of this project, nor rows of its tables."""

    def is_own(line: str) -> bool:
        return not line.strip() or OWN_LINE.match(line) is not None or line[0] in " ┏┃┡│└"

    return [line for line in output.splitlines() if not is_own(line)]


def console_of(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in QUIET}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demos")
    flags = ["--output_dir", str(folder), "--num_episodes", "2", "--image_size", "28"]
    return folder, console_of("vla-scripts/make_demos.py", *flags)


def test_recording_fine_tuning_and_merging_show_their_own_lines_only(
    demos, tiny_model_dir, tmp_path
):
    data, recording = demos
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model = ["--vla_path", str(tiny_model_dir)]
    fine_tuning = console_of(
        "vla-scripts/finetune.py", *model, "--data_root_dir", str(data), "--output_dir", str(adapter),
        "--dataset_name", "tabletop_no_noops", "--max_steps", "1", "--per_device_train_batch_size", "2",
        "--device", "cpu", "--use_lora", "--enable_gradient_checkpointing",
    )  # fmt: skip
    merging = console_of(
        "vla-scripts/merge.py", *model, "--adapter_dir", str(adapter), "--output_dir", str(merged)
    )
    assert "2 episodes" in recording and "step 1/1" in fine_tuning and "logits agree" in merging
    for output in (recording, fine_tuning, merging):
        assert foreign_lines(output) == []


def test_making_a_tiny_model_shows_its_own_lines_only(tmp_path):
    output = console_of("vla-scripts/make_tiny_vla.py", "--output_dir", str(tmp_path / "tiny"))
    assert "M parameters" in output and foreign_lines(output) == []


REAL_WARNINGS = """
import sys, warnings
from transformers import PreTrainedConfig
from transformers.utils import logging
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
processor, model = load_processor(sys.argv[1]), load_model(sys.argv[1])
PreTrainedConfig.from_pretrained(sys.argv[1])  # here the model's type is not said
warnings.warn("a warning of Python", FutureWarning)
list(logging.tqdm(range(3), desc="a bar of transformers"))
"""


def test_real_warnings_and_the_bars_of_others_still_show(tiny_model_dir):
    output = console_of("-c", REAL_WARNINGS, str(tiny_model_dir))
    assert output.count("You are using a model of type `openvla`") == 1
    assert "a warning of Python" in output and "a bar of transformers: 100%" in output
