"""Texts as numbers, and back."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbll.data.vocabulary import BytePairs, Characters, Words, load_vocabulary

TEXT = "the quick brown fox\njumps over the lazy dog .\n \n the dog <unk> sleeps . \n" * 5


@pytest.fixture(scope="module")
def byte_pairs():
    return BytePairs.of([TEXT], 290)


def test_characters_are_numbered_in_their_order():
    vocabulary = Characters.of(["bca", "ab\n"])
    assert vocabulary.alphabet == "\nabc"
    assert vocabulary.encode("cab") == [3, 1, 2]
    assert vocabulary.decode([3, 1, 2]) == "cab"
    assert vocabulary.decode([vocabulary.start]) == "\n"
    with pytest.raises(ValueError, match="the vocabulary has no 'd', 'é': write the text without"):
        vocabulary.encode("écad")


@given(st.text(alphabet=string.ascii_letters + "äß€😀\n ", max_size=60))
def test_characters_come_back(text):
    vocabulary = Characters.of([text + "\n", "zzz"])
    assert len(vocabulary) == len(set(text + "\nz"))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_words_and_line_ends_by_frequency():
    vocabulary = Words.of([" b a b \n", " c \n"])
    # Twice: <eos> and b, in this order; once: a and c; never: <unk>.
    assert vocabulary.words == ["<eos>", "b", "a", "c", "<unk>"]
    assert vocabulary.encode(" a d \n b") == [2, 4, 0, 1]
    assert vocabulary.decode([2, 4, 0, 1]) == " a <unk> \n b"
    assert vocabulary.words[vocabulary.start] == "<eos>"


def test_a_published_line_comes_back():
    text = " \n = Title = \n \n Word word <unk> . \n"
    vocabulary = Words.of([text])
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.text(max_size=80))
def test_byte_pairs_are_lossless_whatever_the_text(byte_pairs, text):
    assert byte_pairs.decode(byte_pairs.encode(text)) == text


def test_byte_pairs_are_learnt_from_the_text(byte_pairs):
    assert len(byte_pairs) == 290
    tokens = byte_pairs.encode(TEXT)
    assert len(tokens) < len(TEXT) / 2
    assert max(tokens) < 290
    assert byte_pairs.decode(byte_pairs.encode("the")[:1]) == "the"
    assert byte_pairs == BytePairs.of([TEXT], 290)
    assert byte_pairs.start not in tokens


def test_what_is_stored_is_read(tmp_path, byte_pairs):
    file = tmp_path / "vocabulary.json"
    for vocabulary in (byte_pairs, Words.of([TEXT]), Characters.of([TEXT])):
        file.write_text(vocabulary.json())
        found = load_vocabulary(file)
        assert found == vocabulary
        assert found.start == vocabulary.start
        assert found.encode(TEXT) == vocabulary.encode(TEXT)
    assert load_vocabulary(file) != Characters.of(["abc"])


@pytest.mark.parametrize("alphabet", ["", "ba", "aab"])
def test_an_alphabet_is_sorted(alphabet):
    with pytest.raises(ValueError, match=f"sorted, each once, and one at least; got '{alphabet}'"):
        Characters(alphabet)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"kind": "letters", "content": "ab"}',
        '{"kind": ["characters"], "content": "ab"}',
        '{"kind": "bytepairs", "content": {}}',
        '{"kind": "bytepairs", "content": "ab"}',
        '{"kind": "characters", "content": ["a"]}',
        '{"kind": "characters", "content": "ba"}',
        '{"kind": "words", "content": ["a"]}',
        '{"kind": "words", "content": 3}',
        "\xff",
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "vocabulary.json"
    with pytest.raises(ValueError, match=r"there is no vocabulary .*vocabulary\.json"):
        load_vocabulary(file)
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"vocabulary\.json holds no vocabulary"):
        load_vocabulary(file)
