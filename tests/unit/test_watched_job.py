import os
from pathlib import Path

import pytest

from histoscale.bench.watched_job import WatchedJob
from histoscale.errors import RunError


def job(code: str) -> WatchedJob:
    return WatchedJob(["-u", "-c", code], os.environ)


def test_lines_are_found_in_their_order_with_the_time_they_came() -> None:
    watched = job("import time; print('one', 1); time.sleep(0.2); print('one', 2)")
    first, second = watched.wait_for("one"), watched.wait_for("one")
    watched.finish()
    assert (first.text, second.text) == ("one 1", "one 2")
    assert second.time_s - first.time_s > 0.1


def test_a_job_that_ends_without_the_line_is_refused_with_what_it_printed() -> None:
    watched = job("print('something else')")
    with pytest.raises(RunError, match="the job ended without a line") as caught:
        watched.wait_for("checkpoint")
    assert "something else" in str(caught.value)


def test_a_job_that_does_not_print_the_line_in_time_is_refused() -> None:
    watched = job("import time; time.sleep(60)")
    with pytest.raises(RunError, match=r"went on for 0\.2 s without a line"):
        watched.wait_for("checkpoint", timeout_s=0.2)
    watched.end()
    assert watched.process.returncode is not None


@pytest.mark.parametrize(
    ("code", "timeout_s", "said"),
    [("import sys; sys.exit(3)", 60.0, "the job failed"), ("import time; time.sleep(60)", 0.2, "did not end within")],
)
def test_a_job_that_fails_or_goes_on_is_refused(code: str, timeout_s: float, said: str) -> None:
    watched = job(code)
    with pytest.raises(RunError, match=said):
        watched.finish(timeout_s)
    watched.end()


def test_the_root_is_the_working_directory(tmp_path: Path) -> None:
    watched = WatchedJob(["-c", "import os; print(os.getcwd())"], os.environ, tmp_path)
    watched.finish()
    assert watched.text == str(tmp_path.resolve())


def test_lines_of_a_second_start_follow_those_of_the_first() -> None:
    watched = job("print('begun')")
    assert watched.status(60.0) == 0
    mark = watched.mark
    watched.start()
    assert watched.after(mark, "begun", 60.0).number == mark == 1
    watched.finish()
