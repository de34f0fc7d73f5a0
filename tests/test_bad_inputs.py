"""Nothing that a user gives ends in a traceback, a crash, a hang, a loss or silence: see `bad_inputs`.

A fixed sample runs every time, all of them with `pytest -m fuzz`.
"""

import pytest
from bad_inputs import SAMPLE, all_cases, sample
from bad_inputs.canaries import CANARIES, GOOD
from bad_inputs.pool import Watched

ALL = all_cases()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    worker = Watched(tmp_path_factory.mktemp("bad"))
    yield worker
    worker.close()


def check(watched, name):
    if why := ALL[name].skipped:
        pytest.skip(why)
    wrong = watched.wrong(name)
    assert wrong is None, f"{name}: {wrong}"


@pytest.mark.parametrize("name", sample())
def test_a_sample(watched, name):
    check(watched, name)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ALL)
def test_all(watched, name):
    check(watched, name)


def test_there_are_enough_of_them_from_every_area():
    assert len(sample()) == len(set(sample())) == 100
    assert {case.area for case in ALL.values()} == set(SAMPLE)
    assert len(ALL) >= 600
    assert all(name.isascii() and len(name) < 120 for name in ALL)


def test_they_are_the_same_every_time():
    names = list(ALL)
    all_cases.cache_clear()
    assert list(all_cases()) == names


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A watch with so little patience and memory that a test of it is cheap."""
    worker = Watched(tmp_path_factory.mktemp("strict"), seconds=3, room=1 << 28)
    yield worker
    worker.close()


@pytest.mark.parametrize("name", CANARIES)
def test_what_is_wrong_is_seen(strict, name):
    wrong = strict.wrong(f"canary:{name}")
    assert wrong is not None
    assert CANARIES[name][0] in wrong


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_passes(strict, name):
    assert strict.wrong(f"canary:good-{name}") is None
