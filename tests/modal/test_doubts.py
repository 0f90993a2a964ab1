import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_functions.doubts import flag_doubtful
from modal_functions.transcript import Segment

SURE = Segment(0, 2, "", avg_logprob=-0.3, no_speech_prob=0.1, compression_ratio=1.5)
LOOPED = ("repetition",)


def flags(*texts: str) -> list[tuple[str, ...]]:
    return [s.flags for s in flag_doubtful([replace(SURE, text=text) for text in texts])]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({}, ()),
        ({"compression_ratio": 2.4, "avg_logprob": -1.0, "no_speech_prob": 0.6}, ()),
        ({"compression_ratio": 2.41}, ("repetition",)),
        ({"avg_logprob": -1.01}, ("low_confidence",)),
        ({"no_speech_prob": 0.61, "avg_logprob": -0.51}, ("no_speech",)),
        ({"no_speech_prob": 0.95, "avg_logprob": -0.49}, ()),
        (
            {"compression_ratio": 9.0, "avg_logprob": -2.0, "no_speech_prob": 0.9},
            ("repetition", "low_confidence", "no_speech"),
        ),
    ],
)
def test_whispers_own_marks(marks: dict[str, Any], expected: tuple[str, ...]) -> None:
    (flagged,) = flag_doubtful([replace(SURE, text="Good morning.", **marks)])
    assert flagged == replace(SURE, text="Good morning.", flags=expected, **marks)


def test_the_same_sentence_again_and_again() -> None:
    texts = ["Welcome to the show.", "Thank you.", "Thank you!", "thank you", "Now the news."]
    assert flags(*texts) == [(), LOOPED, LOOPED, LOOPED, ()]
    assert flags(*texts[:3], *texts[4:]) == [(), (), (), ()]  # twice happens


def test_two_sentences_in_turns() -> None:
    turns = ["I'm going home.", "All right then."] * 3
    assert flags("Where to?", *turns, "See you soon.") == [(), *[LOOPED] * 6, ()]


def test_one_sentence_with_a_loop_inside() -> None:
    assert flags("And so we go on and we go on and we go on and we go on.") == [LOOPED]
    assert flags("no no no no no no no no no") == [LOOPED]
    assert flags("ご視聴ありがとうございました" * 3) == [LOOPED]


def test_what_people_say_twice_is_no_loop() -> None:
    texts = ["No, no, no, no!", "It was very, very, very cold.", "Yes.", "Yes.", "Yes.", "1000000."]
    assert flags(*texts) == [()] * len(texts)


def test_flags_are_set_anew() -> None:
    assert flag_doubtful([replace(SURE, text="Hello.", flags=("repetition",))])[0].flags == ()
    assert flag_doubtful([]) == ()


@given(st.lists(st.text(st.sampled_from("ab. é你"), max_size=30), max_size=12))
def test_any_text_can_be_judged(texts: list[str]) -> None:
    assert len(flags(*texts)) == len(texts)
    assert flags(*texts) == flags(*(text.upper() for text in texts))


def test_ten_hours_are_judged_quickly() -> None:
    texts = [f"This is sentence number {n * 7919} of a long talk." for n in range(9000)]
    started = time.process_time()
    assert flags(*texts) == [()] * len(texts)
    assert time.process_time() - started < 10
