"""The trained tokenizer, foreign ones, and encoding in pieces."""

import time
from pathlib import Path

import numpy as np
import pytest
from small_corpus import documents
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from odelm import tokenizer as tokenizers
from odelm.errors import InputError


def train(vocab_size: int = 300) -> Tokenizer:
    return tokenizers.train(documents(40), vocab_size=vocab_size, max_bytes=10_000)


def bert() -> Tokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "field"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(names[:5])
    return tokenizer


def flat(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [number for run in tokenizers.encode(tokenizer, texts, batch_bytes=1000) for number in run]


def test_special_tokens_come_first_and_any_bytes_round_trip():
    tokenizer = train()
    names = ["<|pad|>", "<|endoftext|>", "<|cls|>", "<|sep|>", "<|mask|>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == 300
    text = "naïve ✓ \t\x00 日本\r\n"
    assert tokenizer.decode(flat(tokenizer, [text])) == text


def test_training_reads_at_most_the_bytes_it_is_given():
    def texts():
        yield "ab ab ab "
        yield "cd cd " + "yz yz yz yz"
        pytest.fail("read on past the limit")

    tokens = tokenizers.train(texts(), vocab_size=300, max_bytes=len("ab ab ab cd cd ")).get_vocab()
    assert {"ab", "cd"} <= tokens.keys() and "yz" not in tokens


def test_pieces_give_the_tokens_of_the_whole():
    text = " ".join(documents(40) * 100)
    assert len(list(tokenizers._pieces(text))) > 3
    tokenizer = train()
    assert flat(tokenizer, [text, "b"]) == [*tokenizer.encode(text).ids, 1, *tokenizer.encode("b").ids, 1]


def test_text_that_spells_a_special_token_stays_text():
    tokenizer = train()
    ids = flat(tokenizer, ["a <|endoftext|> b"])
    assert ids.count(1) == 1 and ids[-1] == 1
    assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_roles_are_found_in_foreign_tokenizers():
    roles = {role: tokenizers.special_id(bert(), role) for role in tokenizers.NAMES}
    assert roles == {"pad": 0, "end": 3, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizers.special_ids(bert()).tolist() == [0, 1, 2, 3, 4]
    assert flat(bert(), ["the field", "field"]) == [5, 6, 3, 6, 3]


def test_an_absent_special_token_is_named():
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match=r"no mask token; expected one of .*\[MASK\]"):
        tokenizers.special_id(plain, "mask")


def test_padding_and_truncation_of_a_file_are_put_off(tmp_path: Path):
    tokenizer = bert()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert flat(tokenizers.load(tmp_path / "tokenizer.json"), ["the the the field"]) == [5, 5, 5, 6, 3]


@pytest.mark.parametrize("content", ["{}", "not json", '{"model": {"type": "Unheard"}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer.json") as caught:
        tokenizers.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_impossible_sizes(tmp_path: Path):
    with pytest.raises(InputError, match="absent.json is not a file"):
        tokenizers.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="expected 261 or more"):
        train(vocab_size=260)
    with pytest.raises(InputError, match="has 300 tokens, more than model.vocab_size 299"):
        tokenizers.check_size(train(), 299)


def test_long_runs_do_not_hold_up_training():
    """Unbroken, a run of 100,000 characters takes some four seconds, and one of 400,000 sixteen times as long."""
    since = time.process_time()
    tokenizers.train(["x" * 400_000, " " * 400_000, "a word " * 1000], vocab_size=300, max_bytes=10**7)
    assert time.process_time() - since < 5


def test_a_unigram_does_not_read_special_tokens_in_text():
    """As ALBERT's and XLM-R's, it has them among its pieces."""
    special = ["<pad>", "<unk>", "</s>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*documents(40), "a </s> b <pad> <>/ s p d"], trainer)
    text = "the </s> field <pad></s>"
    assert tokenizer.token_to_id("</s>") in tokenizer.encode(text).ids, "the model reads it: nothing is tested"
    ids = np.concatenate(list(tokenizers.encode(tokenizer, [text, "a depth"])))
    numbers = [tokenizer.token_to_id(name) for name in ("<pad>", "</s>")]
    assert (ids == numbers[0]).sum() == 0 and (ids == numbers[1]).sum() == 2 and ids[-1] == numbers[1]
    shown = tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace(" ", "").replace("\u2581", "")
    assert shown == "the</s>field<pad></s></s>adepth</s>"


def foreign(pre, normalizer=None, *, extra: str = "") -> Tokenizer:
    """Returns a BPE of single bytes or characters, so that every character of the text can be seen in its tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|endoftext|>", *alphabet, *extra])}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FOREIGN = {
    "GPT-2": (foreign(BYTES), True),
    "GPT-2, lower case": (foreign(BYTES, normalizers.Lowercase()), True),
    "BERT": (foreign(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()), True),
    "words": (foreign(pre_tokenizers.WhitespaceSplit()), True),
    "a space in front": (foreign(pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
    "without words": (foreign(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), False),
    "Metaspace": (foreign(pre_tokenizers.Metaspace(), extra="▁\n"), False),
    "Llama": (foreign(None, LLAMA, extra="▁\n"), False),
    "Strip": (foreign(BYTES, normalizers.Strip()), False),
    "NFKC": (foreign(BYTES, normalizers.NFKC()), False),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_long_document_has_the_tokens_that_its_tokenizer_gives_it(name):
    tokenizer, in_pieces = FOREIGN[name]
    assert tokenizers.cuts_at_words(tokenizer) == in_pieces
    for text in ("word " * 14_000, "word\n" * 14_000, " a  b\n\n c's\t" * 8_000, "Σας  ΣΑΣ \u00a0x" * 8_000):
        assert flat(tokenizer, [text])[:-1] == tokenizer.encode(text, add_special_tokens=False).ids


def test_added_tokens_may_span_a_cut():
    tokenizer = foreign(BYTES)
    tokenizer.add_tokens(["word word"])
    assert not tokenizers.cuts_at_words(tokenizer)
    text = "word " * 30_000
    assert flat(tokenizer, [text])[:-1] == tokenizer.encode(text, add_special_tokens=False).ids


def test_the_end_token_may_have_any_name():
    tokenizer = foreign(BYTES)
    tokenizer.add_special_tokens(["[STOP]"])
    stop = tokenizer.token_to_id("[STOP]")
    ids = [number for run in tokenizers.encode(tokenizer, ["ab", "c"], end="[STOP]") for number in run]
    assert [place for place, number in enumerate(ids) if number == stop] == [2, 4]
    assert tokenizers.end_id(tokenizer, "[STOP]") == stop and tokenizers.end_id(tokenizer) == 0
    with pytest.raises(InputError, match="no token '\\[END\\]', which data.end_token says"):
        tokenizers.end_id(tokenizer, "[END]")


def wordpiece() -> Tokenizer:
    vocab = ["[UNK]", "the", "field", "##s", "grow", "##n", ",", "."]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        ("▁the", -1.0),
        ("▁field", -1.0),
        ("s", -1.0),
        ("▁grow", -1.0),
        ("▁", -2.0),
        ("field", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def fallback() -> Tokenizer:
    """Llama's: characters that are in no token become their bytes."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)} | {"▁": 257, "a": 258, "b": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = LLAMA
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


CONTINUED = {
    "WordPiece": (wordpiece(), "the field", "the fields grown", "s grown"),
    "Metaspace": (unigram(), "the field", "the field grows", " grows"),
    "bytes": (train(), "na", "naïve ✓", "ïve ✓"),
    "fallback": (fallback(), "a b", "a b aß", " aß"),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_continuation_is_decoded_after_its_prompt(name):
    tokenizer, prompt, whole, expected = CONTINUED[name]
    given = tokenizer.encode(prompt, add_special_tokens=False).ids
    ids = tokenizer.encode(whole, add_special_tokens=False).ids
    assert ids[: len(given)] == given, "the prompt is the beginning for this to test anything"
    assert prompt + tokenizers.decode_after(tokenizer, given, ids[len(given) :]) == whole
    assert tokenizers.decode_after(tokenizer, given, ids[len(given) :]) == expected
    if name in ("WordPiece", "Metaspace", "fallback"):
        assert tokenizer.decode(ids[len(given) :]) != expected, "decoded alone it is another text"
