import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.timers import timer_when
from utils import pipeline
from utils.pipeline import Stage, StageError, TimeLimit
from utils.stage_ledger import Ledger, OutOfTimeError, StageBusyError, run_stage

# Counts to 3 in a file, or to the first number that it is to wait after, until it is stopped; prints training steps as
# the driver does.
COUNTING = """
import pathlib, signal, sys, time
file = pathlib.Path(sys.argv[1])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
done = int(file.read_text()) if file.exists() else 0
for n in range(done + 1, 4):
    print(f"INFO step {n}/3 | success 0.5", flush=True)
    file.write_text(str(n))
    while sys.argv[2] == str(n) and not stop:
        time.sleep(0.01)
    if stop:
        break
"""


def stage(code: str = "print('hello')", *argv: str, **options) -> Stage:
    options = {"settings": {"lr": "0.1"}, **options}
    return Stage("one", "the first", (sys.executable, "-c", code, *argv), **options)


@pytest.fixture
def ledger(tmp_path):
    for name in ("stages", "logs"):
        (tmp_path / name).mkdir()
    return Ledger(tmp_path / "stages")


def run(made: Stage, ledger: Ledger, limit_s: float | None = None, reserve_s: float = 0.0) -> None:
    run_stage(made, ledger, ledger.folder.parent / "logs", TimeLimit(limit_s), reserve_s)


def test_a_finished_stage_has_a_marker_and_is_not_repeated(ledger, tmp_path):
    made = stage(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    run(made, ledger)
    run(made, ledger)
    assert (tmp_path / "ran").read_text() == "x"
    marker = ledger.marker("one")
    assert marker["command"] == list(made.command) and marker["settings"] == {"lr": "0.1"}
    assert (
        marker["seconds"] == pytest.approx(ledger.seconds("one"), abs=0.01)
        and marker["num_pieces"] == 1
    )


def test_a_failed_stage_has_no_marker_and_begins_anew(ledger, tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(StageError, match="code 4"):
        run(stage("raise SystemExit(4)"), ledger)
    assert ledger.marker("one") is None and ledger.pieces("one")[0]["outcome"] == "failed"
    changed = stage(settings={"lr": "0.2"}, scrap=tmp_path / "half")
    assert ledger.problems(changed) == []  # nothing is kept of it
    run(changed, ledger)
    assert not (tmp_path / "half").exists() and len(ledger.pieces("one")) == 1


def test_a_stage_that_was_stopped_goes_on_and_its_pieces_add_up(ledger, tmp_path, monkeypatch):
    file = tmp_path / "count"
    monkeypatch.setattr(pipeline.threading, "Timer", timer_when(file.exists))
    made = stage(COUNTING, str(file), "1", stop_signal=signal.SIGTERM, scrap=tmp_path / "never",
                 is_complete=lambda: file.exists() and file.read_text() == "3")  # fmt: skip
    with pytest.raises(OutOfTimeError, match="goes on next time"):
        run(made, ledger, limit_s=1000.0, reserve_s=0.5)
    monkeypatch.undo()
    assert ledger.is_kept(made) and not ledger.is_done(made)
    assert ledger.problems(
        dataclasses.replace(made, settings={"lr": "0.2"})
    )  # begun: its settings are fixed
    first = ledger.pieces("one")[0]
    assert first["outcome"] == "stopped" and first["first_step"] == 1
    assert 0.0 < first["first_step_s"] <= first["seconds"]
    run(made, ledger, limit_s=1000.0)
    pieces = ledger.pieces("one")
    assert [p["outcome"] for p in pieces] == ["stopped", "done"]
    assert ledger.marker("one")["seconds"] == pytest.approx(
        sum(p["seconds"] for p in pieces), abs=0.01
    )
    assert ledger.marker("one")["num_pieces"] == 2


def test_a_stage_that_cannot_go_on_is_only_begun_if_it_will_end(ledger):
    with pytest.raises(OutOfTimeError, match="the first is not begun: .* it needs 3000"):
        run(stage(needs_s=3000.0), ledger, limit_s=2000.0)
    assert ledger.pieces("one") == []
    run(
        stage(needs_s=1000.0), ledger, limit_s=2000.0, reserve_s=1500.0
    )  # the reserve is of those that are stopped


def test_a_result_that_is_missing_is_an_error(ledger):
    with pytest.raises(StageError, match="its result is not there"):
        run(stage(is_complete=lambda: False), ledger)


def test_changed_settings_of_a_finished_stage_are_refused_by_name(ledger):
    run(stage(settings={"lr": "0.1", "steps": "5"}), ledger)
    (lr, new) = ledger.problems(stage(settings={"lr": "0.2", "steps": "5", "new": "1"}))
    assert "stage one is done with --lr 0.1, now 0.2" in lr and "another --run_dir" in lr
    assert "--new (absent), now 1" in new
    assert ledger.problems(stage(settings={"steps": "5", "lr": "0.1"})) == []


def test_a_stage_whose_input_was_made_anew_is_refused(ledger):
    before = dataclasses.replace(stage(), name="zero")
    after = dataclasses.replace(stage(), after=("zero",))
    run(before, ledger)
    run(after, ledger)
    assert ledger.problems(after) == []
    (ledger.folder / "zero.json").unlink()
    run(before, ledger)
    assert "zero was made anew since" in ledger.problems(after)[0]


def test_two_invocations_do_not_run_the_same_stage(ledger):
    holding = (
        "import sys, time; from pathlib import Path; from utils.stage_ledger import Ledger\n"
        f"with Ledger(Path({str(ledger.folder)!r})).lock('one'): print('held', flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StageBusyError, match="stage one is being run by another"):
            run(stage(), ledger)
        assert ledger.is_busy("one") and not ledger.is_busy("two")
    finally:
        other.kill()
        other.wait()
    assert not ledger.is_busy("one")
    run(stage(), ledger)  # the lock goes with its process


def test_a_piece_that_was_cut_off_before_its_marker_is_not_repeated(ledger, tmp_path):
    made = stage(
        "raise SystemExit(9)", stop_signal=signal.SIGTERM, is_complete=(tmp_path / "result").exists
    )
    with pytest.raises(KeyboardInterrupt), ledger.piece(made):
        (tmp_path / "result").write_text("")
        raise KeyboardInterrupt
    run(made, ledger)
    assert ledger.marker("one")["num_pieces"] == 1


def test_a_piece_under_way_is_on_record_in_case_the_machine_is_taken_away(ledger, monkeypatch):
    monkeypatch.setattr("utils.stage_ledger.HEARTBEAT_S", 0.0)
    with ledger.piece(stage()) as piece:
        time.sleep(0.05)
        piece.beat()
        record = json.loads((ledger.folder / "one.pieces.json").read_text())["pieces"][0]
        assert record["outcome"] == "running" and record["seconds"] >= 0.05
        piece.beat(step=7)
        time.sleep(0.05)
        piece.beat(step=8)
        piece.end("done")
    assert ledger.pieces("one")[0]["first_step"] == 7
