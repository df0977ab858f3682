"""Pieces of a streamed text: joined they are the text, and none is half a character."""

import random

import pytest
from checkpoints import make_tokenizer

from tinysteer.text.streaming import HALF, TextStream, overlap

TOKENIZER = make_tokenizer()
TEXTS = {
    "plain": "To be, or not to be.",
    "two bytes each": "Übergröße äöü",
    "three bytes each": "鸡蛋和面包。世界",
    "four bytes each": "🙂🚀🧑‍🚀👩‍👩‍👧",
    "all at once": "a é 世 🙂\n\t\0 z",
}


def encode(text: str) -> list[int]:
    """One id a byte."""
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def decode(ids) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def stream(ids, limit=10**6, stop_ids=(), stop=(), decode=decode) -> tuple[list[str], TextStream]:
    """Push ids until the stream is done -> its pieces, and the stream."""
    row, pieces = TextStream(decode, limit, frozenset(stop_ids), stop), []
    for token in ids:
        if row.done:
            break
        pieces.append(row.push(token))
    return pieces, row


def joined(ids, limit, **options) -> str:
    pieces, row = stream(ids, limit, **options)
    assert row.done
    return "".join(pieces)


@pytest.mark.parametrize("name", TEXTS)
def test_no_piece_of_a_valid_text_is_half_a_character(name):
    text = TEXTS[name]
    pieces, row = stream(encode(text))
    assert "".join(pieces) == text
    assert not any(HALF in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)  # each as soon as it is whole
    assert not row.done


def test_pieces_joined_are_what_all_ids_decode_to():
    for seed in range(200):
        draw = random.Random(seed)
        ids = [draw.randrange(259) for _ in range(draw.randrange(1, 60))]  # special ones too
        assert joined(ids, len(ids)) == decode(ids)


def test_pieces_joined_are_the_text_where_spaces_depend_on_their_place():
    """As in SentencePiece: the first word of what is decoded loses its space."""
    words = {7: " one", 8: " two", 9: ",", 0: ""}

    def decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    pieces, _ = stream([7, 8, 0, 9, 8, 0, 0, 7], decode=decode)
    assert "".join(pieces) == "one two, two one"


def test_bytes_that_are_no_character_are_shown_once_that_is_certain():
    broken = encode("é")[:1]
    assert stream(broken + encode("ab"))[0] == ["", f"{HALF}a", "b"]
    assert joined(broken, 1) == HALF
    assert joined([*broken, 2], 9, stop_ids=[2]) == HALF


def test_a_limit_of_n_shows_n_tokens():
    ids = encode("abc")
    assert [joined(ids, limit) for limit in range(4)] == ["", "a", "ab", "abc"]
    assert len(stream(ids, 2)[0]) == 2


def test_a_stop_id_ends_the_text_and_is_not_in_it():
    ids = [*encode("ab"), 2, *encode("c")]
    assert joined(ids, 9, stop_ids=[2, 0]) == "ab"
    b, c = encode("bc")
    assert joined(ids, 9, stop_ids=[b]) == "a"
    pieces, row = stream(ids, 9, stop_ids=[c])
    assert "".join(pieces) == "ab"
    assert row.ids == ids[:-1]


def test_a_stop_string_ends_the_text_and_is_not_in_it():
    assert joined(encode("one\nQ: two"), 99, stop=["\nQ:"]) == "one"
    assert joined(encode("\nQ: two"), 99, stop=["\nQ:"]) == ""
    assert joined(encode("weiß 🙂"), 99, stop=["🙂"]) == "weiß "


def test_what_only_begins_like_a_stop_string_is_shown_as_soon_as_it_is_known_not_to_be():
    assert stream(encode("a\nQ\nb"), stop=["\nQ:"])[0] == ["a", "", "", "\nQ", "\nb"]


def test_what_is_held_back_is_shown_at_the_end():
    ids = encode("a\nQ")
    assert joined(ids, 3, stop=["\nQ:"]) == "a\nQ"
    assert joined([*ids, 2], 9, stop_ids=[2], stop=["\nQ:"]) == "a\nQ"


OVERLAPPING = {
    "one begins as the other ends": (["abc", "cde"], "xabcde", "x"),
    "one within the other": (["bc", "abcd"], "xabcd", "xa"),
    "one begins the other": (["ab", "abc"], "xabc", "x"),
    "one ends the other": (["bc", "abc"], "xabc", "x"),
    "one overlaps itself": (["aab"], "xaaab", "xa"),
    "a false start of one hides another": (["abab!", "bac"], "xababac", "xaba"),
}


@pytest.mark.parametrize("how", OVERLAPPING)
def test_of_stop_strings_that_overlap_the_first_to_be_complete_ends_the_text(how):
    stop, text, expected = OVERLAPPING[how]
    assert joined(encode(text), 99, stop=stop) == expected
    assert joined(encode(text), 99, stop=stop[::-1]) == expected


def test_the_text_ends_at_the_same_place_however_it_comes_in_pieces():
    for seed in range(500):
        draw = random.Random(seed)
        text = "".join(draw.choices("ab\n🙂", k=30))
        stop = ["".join(draw.choices("ab\n🙂", k=draw.randrange(1, 6))) for _ in range(3)]
        tokens = [""]
        for character in text:  # tokens of up to a few characters
            tokens[-1] += character
            if draw.random() < 0.4:
                tokens.append("")

        def decode(ids, tokens=tokens):
            return "".join(tokens[i] for i in ids)

        pieces, _ = stream(range(len(tokens)), len(tokens), stop=stop, decode=decode)
        ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
        assert "".join(pieces) == text[: min(ends)[1] if ends else None]


def test_overlap_is_the_longest_end_that_begins_the_other():
    assert overlap("xab", "abc") == 2
    assert overlap("abc", "abc") == 0  # the whole is found, not begun
    assert overlap("aa", "aab") == 2
    assert overlap("", "abc") == 0
