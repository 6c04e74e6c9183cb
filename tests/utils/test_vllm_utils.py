"""What the engine module checks without vLLM: options and configuration."""

import sys
from pathlib import Path

import pytest

from utils.vllm_utils import (
    EngineConfig,
    compilation_config,
    engine_env,
    validate_engine_options,
    vllm_version,
)


def test_unknown_engine_option_is_named_with_the_version() -> None:
    problems = validate_engine_options(
        {"enable_chunked_prefill": True, "enable_chunked_refill": True}
    )
    assert len(problems) == 1
    assert "enable_chunked_refill" in problems[0] and vllm_version() in problems[0]
    assert "enable_chunked_prefill" in problems[0]  # the near name is offered
    assert "vllm" not in sys.modules


def test_own_engine_options_cannot_be_given() -> None:
    (problem,) = validate_engine_options({"logprobs_mode": "raw_logprobs"})
    assert "logprobs_mode" in problem and "temperature" in problem


def test_engine_config_names_all_problems(tmp_path: Path, tiny_model_dir: Path) -> None:
    assert EngineConfig(str(tiny_model_dir)).problems() == []
    config = EngineConfig(
        str(tmp_path / "nothing"),
        dtype="float16",
        max_num_seqs=0,
        weight_transfer_backend="mail",
        extra={"x": 1},
    )
    text = "\n".join(config.problems())
    for word in ("nothing", "float16", "max_num_seqs is 0", "mail", "'x'"):
        assert word in text


def test_engine_env_sets_threads_on_cpu_only() -> None:
    assert engine_env("cpu", 2)["OMP_NUM_THREADS"] == "2"
    assert "TORCH_COMPILE_DISABLE" not in engine_env("cuda")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 8, 20, 64])
def test_graphs_cover_every_decode_batch_and_no_more(max_num_seqs: int) -> None:
    sizes = compilation_config(max_num_seqs)["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        padded = min(size for size in sizes if size >= batch)
        assert padded - batch < 8
