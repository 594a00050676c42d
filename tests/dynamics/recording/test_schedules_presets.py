import re

import pytest

from dynamics.recording import PRESETS, at, preset_named
from dynamics.recording.schedules import schedule_of


def captured(schedule) -> list[int]:
    return [step for step in range(1, 201) if schedule(step)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("economy", [1, 4, 16, 64, 100, 200]),
        ("standard", [1, 2, 4, 8, 16, 32, 50, 64, 100, 128, 150, 200]),
        ("full", [1, 2, 4, 8, *range(10, 201, 10), 16, 32, 64, 128]),
    ],
)
def test_default_steps(name, steps):
    assert captured(PRESETS[name].schedule) == sorted(steps)


def test_each_preset_records_more_than_the_one_before():
    recorded = [(preset.gradient_spectra, preset.increment_cosines) for preset in PRESETS.values()]
    assert recorded == [(False, False), (True, False), (True, True)]


def test_wishes_replace_the_default_and_add_up():
    assert captured(schedule_of(PRESETS["full"], interval=100, steps=[3], schedule=at(5))) == [3, 5, 100, 200]
    assert captured(schedule_of(PRESETS["economy"])) == captured(PRESETS["economy"].schedule)


def test_a_preset_that_is_none_is_refused():
    message = "Expected the preset economy, standard, full, got 'business'."
    with pytest.raises(ValueError, match=re.escape(message)):
        preset_named("business")
