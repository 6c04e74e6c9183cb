"""A full disk, a read-only folder, a killed process: one error that names a file, and what was there before stays."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo.utils.curriculum import CurriculumManager
from prismatic.model_files import checksum_problems
from prismatic.vla.datasets.store import EpisodeStore
from utils import checkpoint_utils

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def mounted(folder: Path, size_kib: int) -> Iterator[Path]:
    """A file system of its own in memory, so small that it fills up."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def weights(value: float, num_kib: int) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((256,), value) for i in range(num_kib)}  # 1 KiB each


def save(folder: Path, source: Path, value: float, num_kib: int) -> None:
    files = {"metadata.json": {"value": value}}
    checkpoint_utils.save_model_dir(
        folder, weights(value, num_kib), source, json_files=files, overwrite=True
    )


def assert_untouched(folder: Path, value: float) -> None:
    assert checksum_problems(folder) == []
    assert load_file(folder / "model.safetensors")["layer.0"].unique().tolist() == [value]
    assert json.loads((folder / "metadata.json").read_text()) == {"value": value}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "something is left beside it"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_full_disk_leaves_the_last_checkpoint_and_is_named(source, tmp_path):
    with mounted(tmp_path / "disk", 512) as disk:
        save(disk / "best_return", source, 1.0, 100)
        with pytest.raises(OSError, match="No space left on device.*best_return") as caught:
            save(disk / "best_return", source, 2.0, 600)
        assert caught.value.errno == errno.ENOSPC
        assert_untouched(disk / "best_return", 1.0)
        # Now the weights fit and the first small file does not: its `write` knows no name.
        needed = (disk / "best_return" / "model.safetensors").stat().st_blocks * 512
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - needed))
        with pytest.raises(OSError, match="No space left on device.*best_return") as caught:
            save(disk / "best_return", source, 3.0, 100)
        assert caught.value.filename == str(disk / "best_return")
        (disk / "filler").unlink()
        assert_untouched(disk / "best_return", 1.0)
        save(disk / "best_return", source, 4.0, 100)
        assert_untouched(disk / "best_return", 4.0)


def test_a_full_disk_leaves_the_last_curriculum(tmp_path):
    with mounted(tmp_path / "disk", 64) as disk:
        manager = CurriculumManager(3)
        manager.save(str(disk / "curriculum.json"))
        before = (disk / "curriculum.json").read_text()
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        manager.report_results([0, 1], [True, False])
        with pytest.raises(OSError, match="No space left on device.*curriculum.json"):
            manager.save(str(disk / "curriculum.json"))
        assert (disk / "curriculum.json").read_text() == before
        assert sorted(p.name for p in disk.iterdir()) == ["curriculum.json", "filler"]


def test_a_read_only_run_folder_is_named_and_stays(source, tmp_path):
    with mounted(tmp_path / "disk", 512) as disk:
        save(disk / "best_return", source, 1.0, 100)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system.*best_return") as caught:
            save(disk / "best_return", source, 2.0, 100)
        assert caught.value.errno == errno.EROFS
        with pytest.raises(OSError, match="Read-only file system.*curriculum.json"):
            CurriculumManager(3).save(str(disk / "curriculum.json"))
        assert_untouched(disk / "best_return", 1.0)


def test_a_limit_on_file_sizes_ends_like_a_full_disk(source, tmp_path):
    """RLIMIT_FSIZE needs no rights, so this half runs everywhere."""
    save(tmp_path / "runs" / "best_return", source, 1.0, 100)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom tests.test_disk_faults import save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, 200 << 10))\n"
        "try:\n    save(Path(sys.argv[1]), Path(sys.argv[2]), 2.0, 600)\n"
        "except OSError as error:\n    print('REFUSED', error)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "runs" / "best_return"), str(source)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "REFUSED [Errno 27] File too large" in done.stdout and "best_return" in done.stdout, (
        done.stderr[-2000:]
    )
    assert_untouched(tmp_path / "runs" / "best_return", 1.0)


def test_a_file_where_the_folder_should_be_is_named(source, tmp_path):
    (tmp_path / "runs").write_text("mine")
    for target in (tmp_path / "runs", tmp_path / "runs" / "best_return"):
        with pytest.raises(OSError, match=str(tmp_path / "runs")):
            save(target, source, 1.0, 1)
    assert (tmp_path / "runs").read_text() == "mine"


def killed_while_writing(folder: Path) -> int:
    """Process id of a process that was killed within `atomic_directory(folder)`."""
    code = (
        "import sys, time\nfrom utils.checkpoint_utils import atomic_directory\n"
        "with atomic_directory(sys.argv[1], overwrite=True) as partial:\n"
        "    (partial / 'half').write_text('half')\n    print('writing', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    return process.pid


def test_what_a_killed_process_left_is_named_and_cleaned_by_the_next(source, tmp_path):
    target = tmp_path / "runs" / "best_return"
    save(target, source, 1.0, 2)
    pid = killed_while_writing(target)
    assert sorted(p.name for p in target.parent.iterdir()) == [
        f".best_return.partial-{pid}",
        "best_return",
    ]
    save(target, source, 2.0, 2)
    assert_untouched(target, 2.0)


def test_a_folder_that_was_being_replaced_comes_back(source, tmp_path):
    """Killed between the two renames: the earlier folder has its temporary name, the new one is not there yet."""
    target = tmp_path / "runs" / "best_return"
    save(target, source, 1.0, 2)
    pid = killed_while_writing(target)
    target.rename(target.with_name(f".best_return.old-{pid}"))
    running = target.with_name(f".other.partial-{os.getppid()}")
    running.mkdir()
    cleaned = checkpoint_utils.clean_interrupted_writes(target.parent)
    assert {p.name for p in cleaned} == {f".best_return.old-{pid}", f".best_return.partial-{pid}"}
    assert running.exists(), "its process runs"
    running.rmdir()
    assert_untouched(target, 1.0)
    assert checkpoint_utils.clean_interrupted_writes(tmp_path / "nowhere") == []


def test_an_interrupted_recording_survives_a_damaged_record_of_itself(tmp_path):
    store = EpisodeStore(tmp_path / "store", {"seed": 0})
    store.folder.mkdir()
    for text in ("{", "[]", "\udcff".encode("utf-8", "surrogateescape").decode("latin1")):
        (store.folder / "recording.json").write_text(text)
        (problem,) = store.problems()
        assert "recording.json" in problem
