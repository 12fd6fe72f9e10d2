"""`python -m odelm.data`: corpora prepared by one command, shown, and found by training."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from odelm.programs.data import main

SETS = ("Github", "PubMed Abstracts", "StackExchange")


def pile(folder: Path, *, spoilt: bool = False) -> Path:
    """Writes two shards of three sets in turn, twenty documents each, and returns their folder."""
    folder.mkdir()
    for shard in range(2):
        lines = []
        for number in range(30):
            words = " ".join(f"word{(shard + 7 * number + 3 * k) % 41}" for k in range(40))
            lines.append(json.dumps({"text": words, "meta": {"pile_set_name": SETS[number % 3]}}))
        if spoilt:
            lines[11] = '{"text": "cut sh'
        data = "\n".join(lines).encode()
        (folder / f"{shard:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    return folder


def wordpiece(path: Path) -> Path:
    """Writes a tokenizer as BERT's is, with its special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"word{number}" for number in range(41)], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    source = pile(tmp_path / "pile")
    return ["--corpus=pile", f"--source={source}", f"--data_dir={tmp_path / 'data'}", "--valid_fraction=0.2"]


def test_prepare_tells_what_it_made_and_training_finds_it(options: list[str], capfd, call, tmp_path: Path):
    made = ["prepare", *options, "--vocab_size=300", "--exclude=PubMed Abstracts"]
    assert main(made) == 0
    told = capfd.readouterr()
    assert re.search(r"^train +Github +\d+ .*%", told.out, re.MULTILINE)
    table, flags = told.out.split("train on it with: ")
    assert "PubMed" not in table and "PubMed" in flags
    assert re.search(r"prepared pile: .* MB in .* s$", told.err.rstrip())
    assert main(made) == 0
    again = capfd.readouterr()
    assert again.err == "" and again.out == told.out
    small = ["--config.train.updates=2", "--config.train.length=16", "--config.train.batch_size=2"]
    small += ["--config.step_sampling.counts=(3,)", "--config.train.eval_steps=(3,)", "--config.model.width=16"]
    result = call("train.py", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *shlex.split(flags), *small)
    assert result.returncode == 0, result.stderr
    assert "prepared" not in result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["data_wait"] <= 1 for record in records if "loss" in record)
    assert main(["show", f"--workdir={tmp_path / 'run'}", "--batches=2"]) == 0
    shown = capfd.readouterr().out
    assert "train batch 1: tokens int32 (2, 16)" in shown and "Github" in shown


def test_show_tells_that_a_folder_is_no_run(tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    assert main(["show", f"--workdir={tmp_path}"]) == 2
    assert "is a Hugging Face folder, not a run" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--packing=segments"], r"segments int32 \(4, 32\).*word\d"),
        (["--packing=documents"], r"of padding"),
        (["--kind=encoder", "--mask_unit=span"], r"\[.+->.+\]"),
        (["--kind=encoder", "--sentence_order"], r"order_weights float32.*\(order [01]\)"),
        (["--split=validation", "--start=1"], r"validation batch 1"),
        (["--components=Github,StackExchange", "--weights=1,3"], r"train +StackExchange"),
    ],
)
def test_show_prints_batches_as_text(options: list[str], arguments: list[str], expected: str, capfd):
    # Rows of 32 tokens, of documents of more: some end within.
    assert main(["show", *options, "--vocab_size=300", "--length=32", *arguments]) == 0
    assert re.search(expected, capfd.readouterr().out, re.DOTALL)


def test_masks_and_boundaries_stand_where_they_are(options: list[str], tmp_path: Path, capfd):
    """The words that were there stand in the brackets and outside them, whatever the model is shown."""
    tokenizer = wordpiece(tmp_path / "tokenizer.json")
    arguments = ["--kind=encoder", "--packing=documents", "--length=64", "--mask_unit=word"]
    assert main(["show", *options, f"--tokenizer={tokenizer}", *arguments]) == 0
    rows = [line for line in capfd.readouterr().out.splitlines() if re.match(r"\d: \[CLS\]", line)]
    assert len(rows) == 4
    for row in rows:
        restored = re.sub(r"\[(\w+)->[^ ]*?\](?=word|\[| |$)", r" \1 ", row)
        numbers = [int(number) for number in re.findall(r"word(\d+)", restored)]
        # Each word of a document is three after the last, and this tokenizer's [SEP] is its end token.
        assert all((after - before) % 41 == 3 for before, after in itertools.pairwise(numbers))
        assert len(numbers) == 40 and "->" not in restored and restored.count("‖") == 1


def test_a_tokenizer_of_ones_own(options: list[str], tmp_path: Path, capfd):
    tokenizer = wordpiece(tmp_path / "tokenizer.json")
    assert main(["prepare", *options, f"--tokenizer={tokenizer}"]) == 0
    told = capfd.readouterr().out
    size = max(Tokenizer.from_file(str(tokenizer)).get_vocab().values()) + 1
    assert f"--config.data.tokenizer={tokenizer}" in told and f"--config.model.vocab_size={size}" in told


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--corpus=python_source"], "python_source has none"),
        (["--beam_options=a=b"], "there is no --beam_runner"),
        (["--corpus=pail"], "did you mean 'pile'"),
        (["--corpus=tfds:nonesuch"], "catalogue has no 'nonesuch'"),
        (["--source=/nowhere"], "'/nowhere' does not exist"),
        (["--components=Githib"], "did you mean 'Github'"),
        (["--valid_fraction=2"], "valid_fraction is 2"),
        (["--vocab_size=20"], "vocabulary is 20 tokens, expected 261"),
        (["--tokenizer=/nowhere.json"], "/nowhere.json is not a file"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], change: list[str], expected: str, capfd):
    assert main(["prepare", *options, *change]) == 2
    told = capfd.readouterr()
    assert told.err.count("\n") == 1 and expected in told.err and told.out == ""


def test_bad_records_stop_or_are_counted(tmp_path: Path, capfd):
    options = ["prepare", "--corpus=pile", f"--source={pile(tmp_path / 'pile', spoilt=True)}", "--vocab_size=300"]
    options += [f"--data_dir={tmp_path / 'data'}", "--valid_fraction=0.2"]
    assert main(options) == 2
    assert re.search(r"00.jsonl.zst, line 12 is not JSON .*on_bad_record=skip", capfd.readouterr().err)
    assert main([*options, "--on_bad_record=skip"]) == 0
    told = capfd.readouterr()
    assert "left out: 2 records that cannot be read" in told.out and "01.jsonl.zst, line 12 is not JSON" in told.out
    assert "2 records that cannot be read left out" in told.err


def test_an_interrupted_prepare_is_resumed(options: list[str], monkeypatch):
    def interrupted(*arguments: object, **named: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("odelm.data.prepare.write_token_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(["prepare", *options, "--vocab_size=300"])
    assert main(["prepare", *options, "--vocab_size=300"]) == 0
