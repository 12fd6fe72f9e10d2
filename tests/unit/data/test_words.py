"""Where words start, against what the tokenizers library itself splits text into."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from odelm.data.spans import find_words
from odelm.errors import InputError
from odelm.tokenizer import train

PIECES = "field flows norm the of Über naïve 日本 é x 42 7 !? . ( _ --".split()
TEXTS = [" ".join(PIECES[i:] + PIECES[:i]) for i in range(len(PIECES))] * 3
ASCII = [piece for piece in PIECES if piece.isascii()]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def byte_level() -> Tokenizer:
    return train(TEXTS, vocab_size=300, max_bytes=10_000)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=60, special_tokens=BERT, show_progress=False)
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"],
        unk_token="<unk>",
        initial_alphabet=sorted(set("".join(ASCII))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    return {"byte_level": byte_level(), "wordpiece": wordpiece(), "unigram": unigram()}


def texts(pieces: list[str], spaces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces + 3 * spaces), min_size=1, max_size=30).map("".join)


def starts(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    return find_words(tokenizer).starts(np.array([ids], np.int32))[0].tolist()


def changes(values: list) -> list[bool]:
    return [i == 0 or value != values[i - 1] for i, value in enumerate(values)]


@settings(deadline=None, max_examples=200)
@given(text=texts(PIECES, [" ", "  ", "\n", "\t", " \n "]))
@example("flows42 norm_x(Überflows)\n\n  naïve日本 x")
def test_byte_level_words_are_those_of_the_pre_tokenizer_and_white_space_stands_alone(kinds, text: str):
    encoding = kinds["byte_level"].encode(text)
    blank = [text[start:stop].isspace() for start, stop in encoding.offsets]
    new = zip(changes(encoding.word_ids), blank, [False, *blank], strict=False)
    assert starts(kinds["byte_level"], encoding.ids) == [any(reasons) for reasons in new]


@settings(deadline=None, max_examples=200)
@given(text=texts([*PIECES, "unseenz"], [" ", "\n"]))
def test_wordpiece_words_are_those_of_the_pre_tokenizer(kinds, text: str):
    encoding = kinds["wordpiece"].encode(text)
    if encoding.ids:
        assert starts(kinds["wordpiece"], encoding.ids) == changes(encoding.word_ids)


@settings(deadline=None, max_examples=200)
@given(text=texts(ASCII, [" ", "  "]))
def test_metaspace_words_are_those_of_the_pre_tokenizer(kinds, text: str):
    encoding = kinds["unigram"].encode(text)
    assert starts(kinds["unigram"], encoding.ids) == changes(encoding.word_ids)


@pytest.mark.parametrize("kind", ["byte_level", "wordpiece", "unigram"])
def test_the_texts_have_words_of_several_tokens(kinds, kind: str):
    """Or the tests above would say nothing."""
    ids = kinds[kind].encode("flows field 42 norm flowsfield").ids
    assert sum(starts(kinds[kind], ids)) == 5 and len(ids) > 7


@pytest.mark.parametrize("kind", ["byte_level", "wordpiece", "unigram"])
def test_special_tokens_continue_nothing_and_nothing_continues_them(kinds, kind: str):
    tokenizer = kinds[kind]
    ids = tokenizer.encode("flowsfield").ids
    assert sum(starts(tokenizer, ids)) == 1 and len(ids) > 3
    for special in range(5):
        cut = [*ids[:2], special, special, *ids[2:]]
        assert starts(tokenizer, cut) == [True, False, True, True, True] + [False] * (len(ids) - 3)


def test_a_contraction_keeps_what_follows_it_without_a_space():
    tokenizer = train(["it's don't " * 20], vocab_size=270, max_bytes=1000)
    encoding = tokenizer.encode("it'sx")
    assert encoding.tokens == ["it", "'s", "x"] and encoding.word_ids == [0, 1, 2]
    assert starts(tokenizer, encoding.ids) == [True, True, False]


def test_added_tokens_are_words_of_their_own():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("flowsnorm", normalized=False)])
    encoding = tokenizer.encode("xflowsnormx")
    assert encoding.tokens == ["x", "flowsnorm", "x"] and starts(tokenizer, encoding.ids) == [True] * 3


def test_sentencepiece_as_llama_wrote_it():
    """Without Metaspace: a normalizer puts the mark, a decoder takes it."""
    vocabulary = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, "<0x0A>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    ids = tokenizer.encode("aa a").ids
    assert ids == [3, 2, 3] and starts(tokenizer, ids) == [True, False, True]


def clip() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, model",
    [(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"), (clip(), "BPE")],
    ids=["WordLevel", "end_of_word_suffix"],
)
def test_another_kind_is_an_error(tokenizer: Tokenizer, model: str):
    with pytest.raises(
        InputError, match=f"words start is unknown for this tokenizer: it is {model} without .*mask_unit='token'"
    ):
        find_words(tokenizer)


def test_the_byte_alphabet_is_gpt2s():
    """Each token of one byte has the class of that byte."""
    tokenizer = byte_level()
    words = find_words(tokenizer)
    for byte in range(128):
        (number,) = tokenizer.encode(chr(byte)).ids
        character = bytes([byte])
        alone = words.first[number] == -1
        assert alone == character.isspace()
        same = [words.last[number] == words.last[tokenizer.token_to_id(other)] for other in "a1!"]
        assert same == [character.isalpha(), character.isdigit(), not (character.isalnum() or character.isspace())]
