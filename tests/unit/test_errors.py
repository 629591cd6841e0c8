import pickle

import pytest

from histoscale import errors
from histoscale.errors import ClusterError, HistoscaleError, RunError, SlideError, StorageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HistoscaleError)]


def test_a_diagnosis_says_what_value_expectation_and_remedy_in_one_line() -> None:
    error = SlideError("a slide is odd", value=3, expected="an even\none", remedy="turn it around")
    assert str(error) == "a slide is odd (got 3; expected an even one). Turn it around."


def test_what_alone_is_a_sentence() -> None:
    assert str(SlideError("a slide is odd")) == "a slide is odd."


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel_between_processes(kind: type[HistoscaleError]) -> None:
    error = kind("what", value="v", expected="e", remedy="r")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert back.transient is False


@pytest.mark.parametrize("kind", [StorageError, ClusterError, RunError])
def test_what_may_pass_by_itself_still_may_after_the_journey(kind: type[HistoscaleError]) -> None:
    error = kind("away", remedy="wait", transient=True)
    assert pickle.loads(pickle.dumps(error)).transient is True
    assert str(error) == "away. Wait."


def test_every_error_stands_in_the_tree_of_the_module() -> None:
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in KINDS)
