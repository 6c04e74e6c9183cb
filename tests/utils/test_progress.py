"""Progress of long tasks: what is logged where there is no terminal, by a clock that the test sets."""

import logging

from utils.progress import LOG_INTERVAL_S, ProgressReport


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_every_interval_with_the_time_left(caplog):
    clock, logger = Clock(), logging.getLogger("test_progress")
    with caplog.at_level("INFO"), ProgressReport(logger, "episodes", 100, clock=clock) as progress:
        for _ in range(20):
            clock.now += LOG_INTERVAL_S / 10
            progress.advance(note="all solved")
    # 3 s each: after 10 and 20 of them a line, 90 and 80 left
    assert caplog.messages == [
        "10 of 100 episodes, all solved, about 4:30 left",
        "20 of 100 episodes, all solved, about 4:00 left",
    ]


def test_what_an_earlier_process_did_is_counted_but_not_timed(caplog):
    clock, logger = Clock(), logging.getLogger("test_progress")
    report = ProgressReport(logger, "episodes", 1000, num_done=900, clock=clock)
    clock.now += LOG_INTERVAL_S
    with caplog.at_level("INFO"):
        report.advance(10)
    assert caplog.messages == ["910 of 1000 episodes, about 4:30 left"]


def test_a_short_task_logs_nothing(caplog):
    clock, logger = Clock(), logging.getLogger("test_progress")
    with caplog.at_level("INFO"), ProgressReport(logger, "episodes", 3, clock=clock) as progress:
        for _ in range(3):
            clock.now += 1
            progress.advance()
    assert caplog.messages == []
