import subprocess
import tarfile

import pytest

from utils import collecting
from utils.collecting import collect, split_file


def test_large_archives_come_in_parts_that_cat_puts_together(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "MAX_BYTES", 4096)
    monkeypatch.setattr(split_file, "__defaults__", (4096,))
    run, target = tmp_path / "run", tmp_path / "out"
    (run / "ppo/base").mkdir(parents=True)
    (run / "ppo/base/weights").write_bytes(bytes(range(256)) * 50)
    outside = tmp_path / "elsewhere" / "sft"
    outside.mkdir(parents=True)
    (outside / "config.json").write_text("{}")
    (run / "summary.json").write_text("{}")
    files = [run / "ppo/base/weights", outside / "config.json"]
    for _ in range(2):  # again: the parts of before are replaced
        written = collect(
            target, [run / "summary.json", run / "absent"], {"models.tar": (run, files)}
        )
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in written)
    assert (
        max(p.stat().st_size for p in target.iterdir()) <= 4096
        and (target / "models.tar.part03").exists()
    )
    subprocess.run("cat models.tar.part* | tar x -C ../back", shell=True, cwd=target, check=False)
    (tmp_path / "back").mkdir()
    subprocess.run("cat models.tar.part* | tar x -C ../back", shell=True, cwd=target, check=True)
    assert (tmp_path / "back/ppo/base/weights").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "back/sft/config.json").read_text() == "{}"


def test_small_archives_are_whole_and_too_many_files_are_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(collecting, "MAX_FILES", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").write_text("x")
    warnings = []
    monkeypatch.setattr(collecting.logger, "warning", lambda *args: warnings.append(args))
    (one,) = collect(
        tmp_path / "out", [], {"records.tar.gz": (tmp_path / "run", [tmp_path / "run/a"])}
    )
    with tarfile.open(one) as archive:
        assert archive.getnames() == ["a"]
    assert not warnings
    collect(tmp_path / "out", [tmp_path / "run/a"], {})
    assert len(warnings) == 1


@pytest.mark.parametrize("size", [0, 10])
def test_a_small_file_stays_as_it_is(size, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * size)
    assert split_file(tmp_path / "a", 10) == [tmp_path / "a"]
