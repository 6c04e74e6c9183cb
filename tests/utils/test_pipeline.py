import os
import signal
import sys
import time

import pytest

from tests.timers import timer_when
from utils import pipeline
from utils.pipeline import StageError, TimeLimit, flags, run_command


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_flags_spell_lists_and_leave_out_what_is_not_given():
    values = {
        "task_ids": (3, 6),
        "video_episodes": ["0:1"],
        "env_gpu_id": None,
        "gpu": 0,
        "crop": False,
    }
    expected = ["--task_ids", "3", "6", "--video_episodes", "0:1", "--gpu", "0", "--no_crop"]
    assert flags(values) == expected


SAVES = (
    "import signal, sys, time\n"
    "signal.signal(signal.{name}, lambda *_: (print('saved'), sys.exit({code})))\n"
    "print('begun'); time.sleep(600)"
)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_command_is_asked_to_stop_in_time_and_is_not_taken_as_failed(
    name, code, tmp_path, monkeypatch
):
    lines = []
    monkeypatch.setattr(pipeline.threading, "Timer", timer_when(lambda: lines == ["begun"]))
    ended = run_command(
        python(SAVES.format(name=name, code=code)), tmp_path / "log", lines.append,
        stop_after_s=3.0, stop_signal=getattr(signal, name),
    )  # fmt: skip
    assert not ended and lines == ["begun", "saved"]


def test_a_command_is_asked_to_stop_when_its_time_is_over(tmp_path):
    started = time.monotonic()
    assert not run_command(
        python("import time; time.sleep(600)"),
        tmp_path / "log",
        lambda line: None,
        stop_after_s=0.5,
    )
    assert 0.5 <= time.monotonic() - started < 500


def test_a_command_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "KILL_AFTER_S", 1.0)
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf'); time.sleep(600)"
    started = time.monotonic()
    assert not run_command(python(code), tmp_path / "log", lambda line: None, stop_after_s=2.0)
    assert time.monotonic() - started < 500


def test_an_interruption_lets_the_command_save_however_much_it_says(tmp_path):
    code = (
        "import signal, sys, time\n"
        "def save(*_):\n    print('x' * 300_000)\n    open(sys.argv[1], 'w').write('saved')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\nprint('begun', flush=True); time.sleep(600)"
    )

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command((*python(code), str(tmp_path / "file")), tmp_path / "log", interrupt)
    assert (tmp_path / "file").read_text() == "saved"


def test_a_command_that_ends_before_the_limit_is_judged_by_its_code(tmp_path):
    assert run_command(python("print(1)"), tmp_path / "log", lambda line: None, stop_after_s=60.0)
    with pytest.raises(StageError, match="code 3"):
        run_command(
            python("raise SystemExit(3)"), tmp_path / "log", lambda line: None, stop_after_s=60.0
        )


def test_a_stage_gets_its_own_variables_and_pieces_add_to_one_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTER", "kept")
    code = "import os; print(os.environ['INNER'], os.environ['OUTER'])"
    for value in ("a", "b"):
        run_command(python(code), tmp_path / "log", lambda line: None, environment={"INNER": value})
    text = (tmp_path / "log").read_text()
    assert "a kept\n" in text and "b kept\n" in text and text.count("$ ") == 2
    assert "INNER" not in os.environ


def test_time_limit_counts_down_and_may_be_absent():
    assert TimeLimit(None).left_s == float("inf")
    limit = TimeLimit(10_000.0)
    first = limit.left_s
    time.sleep(0.02)
    assert 9_000 < limit.left_s < first <= 10_000
