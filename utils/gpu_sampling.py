"""GPUs' utilisation and memory, sampled once a second by nvidia-smi beside a run; nothing on machines without it."""

import contextlib
import datetime
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GpuSample:
    """One line: the GPU's number, seconds since 1970, utilisation in percent, memory in MiB."""

    gpu: int
    time_s: float
    utilization: float
    memory_mib: float


@contextlib.contextmanager
def sampling(gpus: Sequence[int], file: Path) -> Iterator[None]:
    """Append a sample of each of `gpus` (nvidia-smi's numbers) to `file` every second while the block runs."""
    program = shutil.which("nvidia-smi")
    if not gpus or program is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    query = "--query-gpu=index,timestamp,utilization.gpu,memory.used"
    with file.open("a") as output:
        process = subprocess.Popen(
            [program, f"--id={','.join(map(str, gpus))}", query, "--format=csv,noheader,nounits", "-l", "1"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def read_samples(file: Path) -> list[GpuSample]:
    """All samples of a file; lines that are cut or say that a value is not available are left out."""
    samples = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            gpu, when, utilization, memory = line.split(",")
            moment = datetime.datetime.strptime(when.strip(), "%Y/%m/%d %H:%M:%S.%f")
            samples.append(
                GpuSample(int(gpu), moment.timestamp(), float(utilization), float(memory))
            )
    return samples


def summarize_samples(
    samples: Sequence[GpuSample], spans: Sequence[tuple[float, float]]
) -> dict[str, dict[str, float]] | None:
    """By GPU number: mean utilisation (percent) and largest memory (GiB) in the spans of time; None without samples."""
    within = [s for s in samples if any(start <= s.time_s <= end for start, end in spans)]
    summary: dict[str, dict[str, float]] = {}
    for gpu in sorted({s.gpu for s in within}):
        mine = [s for s in within if s.gpu == gpu]
        summary[str(gpu)] = {
            "mean_utilization_percent": round(sum(s.utilization for s in mine) / len(mine), 1),
            "peak_memory_gib": round(max(s.memory_mib for s in mine) / 1024, 2),
            "num_samples": len(mine),
        }
    return summary or None
