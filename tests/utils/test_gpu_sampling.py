import time

import pytest

from utils.gpu_sampling import GpuSample, read_samples, sampling, summarize_samples

FAKE = """#!/bin/sh
echo "$@" >{asked}
while :; do echo "3, 2026/11/25 12:00:00.250, 35, 2048"; sleep 0.05; done
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in on the PATH; returns the file that its arguments go to."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(FAKE.format(asked=tmp_path / "asked"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path / "asked"


def test_samples_are_taken_while_the_block_runs_and_added_to_those_of_earlier_pieces(
    nvidia_smi, tmp_path
):
    file = tmp_path / "logs/gpu.csv"
    counts = [0]
    for _ in range(2):
        with sampling([3, 5], file):
            while len(read_samples(file)) <= counts[-1]:
                time.sleep(0.01)
        counts.append(len(read_samples(file)))
    assert 0 < counts[1] < counts[2]
    time.sleep(0.3)
    assert len(read_samples(file)) == counts[2], "it goes on sampling"
    assert "--id=3,5" in nvidia_smi.read_text() and "-l 1" in nvidia_smi.read_text()
    sample = read_samples(file)[0]
    assert (sample.gpu, sample.utilization, sample.memory_mib) == (3, 35.0, 2048.0)
    assert (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(sample.time_s)) == "2026-11-25 12:00:00"
    )


def test_nothing_is_sampled_without_a_gpu_or_nvidia_smi(nvidia_smi, tmp_path, monkeypatch):
    with sampling([], tmp_path / "gpu.csv"):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with sampling([0], tmp_path / "gpu.csv"):
        pass
    assert not (tmp_path / "gpu.csv").exists() and read_samples(tmp_path / "gpu.csv") == []


def test_only_samples_within_the_spans_count():
    samples = [GpuSample(0, t, 10.0 * t, 1024.0 * t) for t in range(1, 6)] + [
        GpuSample(1, 5.0, 7.0, 512.0)
    ]
    assert summarize_samples(samples, [(1.5, 2.5), (4.0, 9.0)]) == {
        "0": {"mean_utilization_percent": 36.7, "peak_memory_gib": 5.0, "num_samples": 3},
        "1": {"mean_utilization_percent": 7.0, "peak_memory_gib": 0.5, "num_samples": 1},
    }  # fmt: skip
    assert (
        summarize_samples(samples, [(7.0, 9.0)]) is None
        and summarize_samples([], [(0.0, 9.0)]) is None
    )
