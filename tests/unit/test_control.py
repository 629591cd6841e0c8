"""What the driver, the workers and the controller of a run tell each other; no actor, and a clock by hand."""

import logging
from types import SimpleNamespace

from histoscale.cluster.control import Member, News, Progress, RunControl, Wish, warnings_told
from histoscale.observe.timeline import Kind

SILENCE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def progress(step: int) -> Progress:
    return Progress(step, 100, {"loss": 1.0}, 0.1, 10.0, 0.0)


def member(rank: int) -> Member:
    return Member(rank, f"node{rank}", None)


def running(workers: int = 2) -> tuple[RunControl, Clock]:
    clock = Clock()
    control = RunControl(now=clock)
    for rank in range(workers):
        control.enlist(member(rank))
    return control, clock


def test_the_wish_is_the_answer_to_the_next_step() -> None:
    control, _ = running()
    assert control.tell(progress(1)) is Wish.GO_ON
    control.want(Wish.COMMIT_AND_STOP)
    assert control.tell(progress(2)) is Wish.COMMIT_AND_STOP


def test_a_restart_is_asked_for_once_and_told_with_its_reason() -> None:
    control, _ = running()
    control.ask_restart(Kind.PREEMPTION_NOTICE, "a node is taken away")
    control.ask_restart(Kind.RESIZE, "two workers more")
    assert control.tell(progress(1)) is Wish.COMMIT_AND_RESTART
    text = "the workers commit and start again: a node is taken away"
    assert control.drain(SILENCE_S).news == [News(text, Kind.PREEMPTION_NOTICE, 0, 2, text)]


def test_a_stop_goes_before_a_restart() -> None:
    control, _ = running()
    control.ask_restart(Kind.RESIZE, "two workers more")
    control.want(Wish.COMMIT_AND_STOP)
    assert control.tell(progress(1)) is Wish.COMMIT_AND_STOP


def test_the_next_attempt_goes_on_and_its_restart_is_measured() -> None:
    control, clock = running()
    control.tell(progress(5))
    control.ask_restart(Kind.RESIZE, "two workers more")
    assert control.over(Kind.RESTART, "") == 5
    clock.now_s = 12.0
    assert control.enlist(member(0)) == 2
    (asked, over) = control.drain(SILENCE_S).news
    assert (asked.kind, over) == (None, News("", Kind.RESIZE, 5, 2, "two workers more"))
    assert control.tell(progress(4)) is Wish.GO_ON
    (restarted,) = control.drain(SILENCE_S).news
    assert restarted.text == "restarted on 1 workers in 12 s, 2 steps done again"
    outlook = control.outlook()
    assert outlook is not None
    assert (outlook.workers, outlook.step, outlook.steps, outlook.restart_s) == (1, 4, 100, 12.0)


def test_before_the_first_restart_the_start_stands_for_its_price() -> None:
    control, clock = running()
    clock.now_s = 20.0
    for step in range(1, 4):
        control.tell(progress(step))
        clock.now_s += 0.5
    outlook = control.outlook()
    assert outlook is not None
    assert (outlook.restart_s, outlook.step_s) == (20.0, 0.5)


def test_nothing_is_asked_of_workers_that_are_not_there() -> None:
    control, _ = running(workers=0)
    control.ask_restart(Kind.RESIZE, "two workers more")
    assert control.drain(SILENCE_S).news == []
    assert control.outlook() is None
    assert control.over(Kind.CRASH, "died") == 0


def test_who_gives_no_sign_of_life_is_silent() -> None:
    control, clock = running()
    clock.now_s = 50.0
    control.beat(1, 1)
    control.beat(0, 0)
    control.beat(1, 7)
    clock.now_s = 61.0
    told = control.drain(SILENCE_S)
    assert [each.rank for each in told.members] == [0, 1]
    assert [each.rank for each in told.silent] == [0]
    control.over(Kind.CRASH, "the workers failed")
    assert control.drain(SILENCE_S).silent == []


def test_what_a_worker_warns_of_stands_in_the_log_of_the_job() -> None:
    control, _ = running()
    handle = SimpleNamespace(warn=SimpleNamespace(remote=control.warn))
    log = logging.getLogger("histoscale.checkpoint.writer")
    with warnings_told(handle, 1):
        log.warning("the checkpoint of step %d was not committed", 4)
        log.info("nothing to tell")
    log.warning("nobody listens any more")
    (news,) = control.drain(SILENCE_S).news
    assert (news.text, news.kind) == ("warning: worker 1: the checkpoint of step 4 was not committed", None)


def test_a_group_that_could_not_be_started_leaves_no_member_behind() -> None:
    control, clock = running(workers=1)
    control.wait("waiting for nodes")
    assert control.drain(SILENCE_S).members == []
    assert control.enlist(member(1)) == 2
    control.beat(1, 1)
    assert control.enlist(member(0)) == 2
    clock.now_s = 61.0
    control.beat(1, 0)
    told = control.drain(SILENCE_S)
    assert [each.rank for each in told.members] == [1, 0]
    assert [each.rank for each in told.silent] == [1, 0], "beats of the attempt before are not theirs"


def test_how_long_no_step_was_told_of_is_counted_from_the_start_of_the_attempt() -> None:
    control, clock = running()
    clock.now_s = 30.0
    assert control.drain(SILENCE_S).quiet_s == 30.0
    control.tell(progress(1))
    clock.now_s = 70.0
    assert control.drain(SILENCE_S).quiet_s == 40.0
    control.over(Kind.CRASH, "died")
    assert control.drain(SILENCE_S).quiet_s == 0.0
    clock.now_s = 90.0
    control.enlist(member(0))
    clock.now_s = 95.0
    assert control.drain(SILENCE_S).quiet_s == 5.0
