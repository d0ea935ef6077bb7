"""A calibration that takes turns with something else keeps to its share of the time, part by part."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.calibrate import Part
from runtime.alongside import Alongside
from runtime.calibrate import SMOKE, calibrating
from runtime.rounds import Measuring
from runtime.turns import Turn
from tests.conftest import TinyCheckpoint


class Rounds:
    """Parts that log their rounds; a part brings back a hand-off named after it."""

    def __init__(self, shares: Mapping[str, float], n_rounds: Mapping[str, int]) -> None:
        self.log: list[str] = []
        self.parts = {name: Turn(share, lambda n=name: self._measure(n, n_rounds[n])) for name, share in shares.items()}

    def _measure(self, name: str, n_rounds: int) -> Measuring:
        for number in range(1, n_rounds + 1):
            self.log.append(name)
            yield number / n_rounds
        return Part(handoff_s={name: 1.0})


def names(parts: Mapping[str, Part]) -> list[str]:
    return [name for part in parts.values() for name in part.handoff_s]


def test_parts_of_equal_shares_take_turns():
    rounds = Rounds({"a": 1.0, "b": 1.0}, {"a": 2, "b": 2})
    calibration = Alongside(rounds.parts, 4, names)  # type: ignore[arg-type]
    for done in (["a"], ["a", "b"], ["a", "b", "a"], ["a", "b", "a", "b"]):
        calibration.turn()
        assert rounds.log == done


def test_half_of_the_turns_measure_half_of_every_part():
    rounds = Rounds({"short": 1.0, "long": 3.0}, {"short": 10, "long": 30})
    calibration = Alongside(rounds.parts, 100, names)  # type: ignore[arg-type]
    for _ in range(50):
        calibration.turn()
    assert 4 <= rounds.log.count("short") <= 6
    assert 14 <= rounds.log.count("long") <= 16


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.1, 9), st.integers(1, 20)), min_size=1),
    st.integers(1, 50),
    st.integers(0, 60),
)
def test_all_parts_are_whole_in_the_end_however_many_turns_were_taken(parts, n_turns, n_taken):
    rounds = Rounds({n: share for n, (share, _) in parts.items()}, {n: count for n, (_, count) in parts.items()})
    calibration = Alongside(rounds.parts, n_turns, names)  # type: ignore[arg-type]
    for _ in range(n_taken):
        calibration.turn()
    assert calibration.profile() == list(parts)
    assert {n: rounds.log.count(n) for n in parts} == {n: count for n, (_, count) in parts.items()}


@pytest.mark.slow
def test_a_machine_is_calibrated_between_other_work(tiny_checkpoint: TinyCheckpoint):
    folder, n_turns = tiny_checkpoint("llama"), 7
    with calibrating(folder, n_turns, "emulated", extent=SMOKE) as calibration:
        for _ in range(n_turns):
            calibration.turn()
        profile = calibration.profile()
    assert profile.device == "emulated"
    assert {curve.op for curve in profile.curves} >= {"attn", "ffn", "head", "sample"}
