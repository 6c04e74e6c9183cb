"""What the engine module checks without vLLM: options, configuration, names and shapes of a weight update."""

import sys
from pathlib import Path

import pytest
import torch

from utils.vllm_utils import EngineConfig, compilation_config, engine_env, validate_engine_options, vllm_version
from utils.weight_transfer import WeightReceiver, WeightUpdateError, bucket_manifest, manifest_problems

SHAPES = {"a.weight": (2, 3), "b.weight": (4,)}
WEIGHTS = [("a.weight", torch.ones(2, 3)), ("b.weight", torch.ones(4))]


def test_unknown_engine_option_is_named_with_the_version() -> None:
    problems = validate_engine_options({"enable_chunked_prefill": True, "enable_chunked_refill": True})
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
        str(tmp_path / "nothing"), dtype="float16", max_num_seqs=0, weight_transfer_backend="mail", extra={"x": 1}
    )
    text = "\n".join(config.problems())
    for word in ("nothing", "float16", "max_num_seqs is 0", "mail", "'x'"):
        assert word in text


def test_engine_env_sets_threads_on_cpu_only() -> None:
    assert engine_env("cpu", 2)["OMP_NUM_THREADS"] == "2"
    assert "TORCH_COMPILE_DISABLE" not in engine_env("cuda")


def test_manifest_must_be_exact() -> None:
    assert manifest_problems(SHAPES, bucket_manifest([WEIGHTS[:1], WEIGHTS[1:]])) == []
    assert manifest_problems(SHAPES, [("a.weight", (2, 3))]) == ["1 missing: b.weight"]
    assert manifest_problems(SHAPES, [("a.weight", (2, 3))], complete=False) == []
    assert manifest_problems(SHAPES, [*SHAPES.items(), ("c", (1,))]) == ["1 unexpected: c"]
    assert manifest_problems(SHAPES, [*SHAPES.items(), ("b.weight", (4,))]) == ["1 sent more than once: b.weight"]
    assert manifest_problems(SHAPES, {"a.weight": (3, 2), "b.weight": (4,)}.items()) == [
        "1 wrong shape: a.weight is (3, 2), not (2, 3)"
    ]
    many = manifest_problems({f"p{i}": (1,) for i in range(10)}, [])
    assert many == ["10 missing: p0, p1, p2, p3 and 6 more"]


class RecordingLLM:
    """Stands for vLLM's LLM: it notes which calls of the transfer interface came."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.llm_engine = self

    def __getattr__(self, name: str):
        return lambda *args: self.calls.append(name)


def test_receiver_checks_names_before_the_first_call() -> None:
    llm = RecordingLLM()
    receiver = WeightReceiver(llm, {**SHAPES, "rotary_emb.inv_freq": (2,)}, "nccl")
    info = {"names": ["a.weight"], "shapes": [[2, 3]], "dtype_names": ["bfloat16"]}
    with pytest.raises(WeightUpdateError, match="1 missing: b.weight"):
        receiver.update([info], [("a.weight", [2, 3])], 1)
    assert llm.calls == ["init_weight_transfer_engine"]
    assert receiver.problem is not None and receiver.version == 0


def test_receiver_counts_headers_and_clears_caches() -> None:
    llm = RecordingLLM()
    receiver = WeightReceiver(llm, SHAPES, "nccl")
    infos = [
        {"names": ["a.weight"], "shapes": [[2, 3]], "dtype_names": ["bfloat16"]},
        {"names": ["b.weight"], "shapes": [[4]], "dtype_names": ["float32"]},
    ]
    report = receiver.update(infos, list(SHAPES.items()), 3)
    assert (report.num_params, report.num_bytes, report.version) == (2, 2 * 6 + 4 * 4, 3)
    session = ["start_weight_update", "update_weights", "update_weights", "finish_weight_update"]
    assert llm.calls[1:5] == session
    assert llm.calls[5:] == ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
    assert receiver.problem is None


def test_receiver_refuses_what_the_manifest_did_not_announce() -> None:
    llm = RecordingLLM()
    receiver = WeightReceiver(llm, SHAPES, "object_store")
    wrong = [{"weights": [WEIGHTS[0]]}, {"weights": [("b.weight", torch.ones(5))]}]
    with pytest.raises(WeightUpdateError, match=r"after 1 of 2 parameters.*b.weight is \(5,\)"):
        receiver.update(wrong, list(SHAPES.items()), 1)
    assert llm.calls.count("update_weights") == 1 and llm.calls[-1] == "finish_weight_update"
    assert receiver.update([{"weights": WEIGHTS}], list(SHAPES.items()), 2).version == 2


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 8, 20, 64])
def test_graphs_cover_every_decode_batch_and_no_more(max_num_seqs: int) -> None:
    sizes = compilation_config(max_num_seqs)["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        padded = min(size for size in sizes if size >= batch)
        assert padded - batch < 8
