"""Texts are cut so that every token after the first is scored exactly once, and no byte is lost."""

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from logitless.cli.errors import InputError
from logitless.cli.memory import MemoryMeter
from logitless.cli.text import BosRule, Text, TokenisedText, Window, bos_rule, read_texts, split_pieces, tokenise
from logitless.cli.tokenizer import TextTokenizer
from models import save_model, text_tokenizer
from test_cli_compare import command


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


def test_a_byte_order_mark_is_no_text_and_is_said(tmp_path: Path) -> None:
    path, plain = tmp_path / "marked", tmp_path / "plain"
    path.write_bytes(b"\xef\xbb\xbfab\xef\xbb\xbf")
    plain.write_text("ab\ufeff", "utf-8")
    (text,), (other,) = read_texts([path]), read_texts([plain])
    assert text.content == other.content == "ab\ufeff"
    assert text.digest == other.digest
    assert text.notes == (f"{path}: the byte order mark it begins with is no text and is left out",)
    assert tokenise(text_tokenizer(), text, None).notes == text.notes
    assert other.notes == ()


def test_special_tokens_that_a_text_spells_are_counted_and_said() -> None:
    tokens = tokenise(text_tokenizer(), Text("t", "a<s>b<s>c"), None)
    assert tokens.ids.count(0) == 2
    assert tokens.notes == (
        "t spells the special token '<s>' 2 times: it is read as that token, as this model's tokenizer does",
    )
    assert (
        tokenise(text_tokenizer(), Text("t", "a<s>b<s>c"), 1)
        .notes[0]
        .startswith("t spells the special token '<s>' 1 t")
    )
    assert tokenise(text_tokenizer(), Text("t", "a< s>b"), None).notes == ()


class Watched:
    """A backend that keeps the lengths of what it is asked to split."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.lengths = backend, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.lengths.append(len(text))
        return self.backend.encode(text, **options)


@pytest.mark.parametrize(
    "content",
    [
        "word " * 40_000,
        "a" * 200_000,
        " " * 199_999 + "b",
        "\n\n\n  9,\n" * 20_000,
        "😀🇩🇪" * 20_000,
        "".join(map(chr, range(0x4E00, 0x9000))) * 6,
    ],
)
@pytest.mark.parametrize("count", [1, 200])
def test_a_few_tokens_of_a_long_text_are_those_of_the_whole(content: str, count: int) -> None:
    for tokenizer in (text_tokenizer(), merged_tokenizer()):
        watched = Watched(tokenizer.backend)
        few = tokenise(replace(tokenizer, backend=watched), Text("t", content), count)
        whole = tokenise(tokenizer, Text("t", content), None)
        assert few.ids == whole.ids[: count + 1]
        assert few.pieces == whole.pieces[: count + 1]
        assert few.scored_bytes == sum(len(piece.encode()) for piece in whole.pieces[1 : count + 1])
        if tokenizer is text_tokenizer():
            assert sum(watched.lengths) < 10_000


@pytest.mark.parametrize("line", ["some words of a long text, 1234\n", "一段很长的文字，1234。😀\n"])
def test_two_hundred_tokens_of_ten_megabytes_cost_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    model, big = save_model(tmp_path / "model", max_position_embeddings=1024), tmp_path / "big.txt"
    big.write_text(line * (10_000_000 // len(line.encode())), "utf-8")
    arguments = ("--text", big, "--max-tokens", 200, "--json", tmp_path / "out.json")
    assert command(monkeypatch, "score", model, *arguments) == 0  # what is imported and allocated once
    started = time.process_time()
    with MemoryMeter() as meter:
        assert command(monkeypatch, "score", model, *arguments) == 0
        use = meter.use()
    assert time.process_time() - started < 2
    assert use.growth is not None
    assert use.growth < 100_000_000
    assert json.loads((tmp_path / "out.json").read_text())["overall"]["tokens"] == 200


@functools.cache
def merged_tokenizer() -> TextTokenizer:
    """Learn merges over whole lines, so that tokens are long and a text's end changes those before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["word " * 9, "a" * 33, "   b" * 9, "\n\n\n  9,\n" * 9, "😀🇩🇪" * 9], trainer)
    return TextTokenizer(backend, None, "a test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00", "looks like UTF-16: convert it with iconv"),
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ab\xff", "not UTF-8 text: byte 2"),
    ],
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
