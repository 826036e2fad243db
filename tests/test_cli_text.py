"""Texts are cut so that every token after the first is scored exactly once, and no byte is lost."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitless.cli.errors import InputError
from logitless.cli.text import BosRule, Text, TokenisedText, Window, bos_rule, read_texts, split_pieces, tokenise
from models import text_tokenizer


@given(count=st.integers(2, 700), size=st.integers(1, 130))
def test_windows_score_every_token_after_the_first_exactly_once(count: int, size: int) -> None:
    tokens = TokenisedText(Text("t", ""), list(range(count)), [""] * count)
    windows = list(tokens.windows(size))
    assert [target for window in windows for target in window.targets] == list(range(1, count))
    assert [window.index for window in windows] == list(range(len(windows)))
    for window in windows:
        assert 1 <= len(window.inputs) == len(window.targets) <= size
        assert [target - 1 for target in window.targets] == window.inputs
        assert window.start == window.targets[0]


@given(st.text(min_size=2))
def test_pieces_of_a_byte_tokenizer_join_to_the_text_and_its_bytes(content: str) -> None:
    tokens = tokenise(text_tokenizer(), Text("t", content), None)
    assert "".join(tokens.pieces) == content
    assert len(tokens.ids) == len(content.encode())
    # A character of several bytes belongs to the token that completes it.
    first = content[0].encode()
    assert tokens.scored_bytes == len(content.encode()) - (1 if len(first) == 1 else 0)


def test_pieces_keep_what_no_token_covers() -> None:
    assert split_pieces(" ab  cd ", [(1, 3), (5, 7)]) == [" ab", "  cd "]
    assert split_pieces("a😀b", [(0, 1), (1, 2), (1, 2), (2, 3)]) == ["a", "", "😀", "b"]


def test_max_tokens_is_the_number_of_tokens_scored() -> None:
    tokens = tokenise(text_tokenizer(), Text("t", "abcdefgh"), 3)
    assert tokens.scored_tokens == 3
    assert tokens.pieces == ["a", "b", "c", "d"]
    assert tokenise(text_tokenizer(), Text("t", "abc"), 30).scored_tokens == 2


def test_a_character_cut_off_by_max_tokens_is_not_counted() -> None:
    tokens = tokenise(text_tokenizer(), Text("t", "a😀b"), 2)
    assert tokens.scored_tokens == 2
    assert tokens.scored_bytes == 0


def test_bos_follows_the_tokenizer() -> None:
    assert bos_rule(text_tokenizer()).token is None
    assert bos_rule(text_tokenizer(bos=True)).token == 0


def test_bos_precedes_every_window_but_never_itself() -> None:
    rule = BosRule(0, "")
    assert rule.prefix(Window(0, 1, [5, 6], [6, 7])) == [0]
    assert rule.prefix(Window(3, 1, [0, 6], [6, 7])) == [0]
    assert rule.prefix(Window(0, 1, [0, 6], [6, 7])) == []
    assert BosRule(None, "").prefix(Window(0, 1, [5], [6])) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "is empty"), (b" \n\t", "is empty"), (b"ab\xff", "not UTF-8 text: byte 2")],
)
def test_unusable_texts_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_texts([path])


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="1 token; two are needed"):
        tokenise(text_tokenizer(), Text("t", "a"), None)
