from histoscale.cluster.control import Progress
from histoscale.cluster.watching import _eta, _ProgressPrinter


def progress(step: int, note: str = "") -> Progress:
    return Progress(step, 100, {"loss": 1.5}, 1e-3, 20.0, 0.01, note)


def test_the_first_the_committed_and_the_last_step_are_shown() -> None:
    told: list[str] = []
    printer = _ProgressPrinter(told.append)
    printer.show([progress(1), progress(2), progress(3, "checkpoint committed"), progress(4)])
    printer.show([progress(5), progress(6)], last=True)
    assert [line.split(" | ")[0] for line in told] == ["step 1/100", "step 3/100", "step 6/100"]
    assert told[0] == "step 1/100 | loss 1.5000 | lr 1.00e-03 | 20.0 tiles/s, 1% waiting"
    assert told[1].endswith("| checkpoint committed")


def test_steps_that_come_again_tell_of_a_restart() -> None:
    told: list[str] = []
    printer = _ProgressPrinter(told.append)
    printer.show([progress(7), progress(8), progress(6)])
    assert "the workers were started again and go on from step 5" in told


def test_the_rest_is_told_in_hours_minutes_and_seconds() -> None:
    assert _eta(3661.4) == " | ETA 1:01:01"
