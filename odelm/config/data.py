"""Which text a model is trained on, and how it becomes rows of tokens."""

from dataclasses import dataclass

from odelm.config.checks import check_types, choice, freeze_lists, positive
from odelm.config.describe import described
from odelm.config.tasks import TASKS
from odelm.errors import InputError

CORPORA = ("python_source", "text", "openwebtext", "pile")
ON_BAD_RECORD = ("error", "skip")
MASK_UNITS = ("token", "word", "span")
PACKINGS = ("auto", "concatenate", "segments", "documents")
SPLITS = ("train", "validation")


@described
@dataclass(frozen=True)
class DataConfig:
    """Which text a model is trained on, and how it becomes rows of tokens."""

    corpus: str = "python_source"
    """`python_source` (the standard library of the running interpreter), `text` (your own files), `openwebtext`,
    `pile`, or `tfds:NAME` for one of the TFDS catalogue."""
    source: str = ""
    """A file, folder or glob. For `text`: .txt, .jsonl and .ndjson, each plain, .gz, .xz or .zst, .json of lines if it
    is compressed, and .parquet; what is hidden is passed over, and links are followed. For `openwebtext`: its archive,
    unpacked or not, or .jsonl. For `pile`: its .jsonl.zst shards. For `tfds:NAME`: the folder of TFDS."""
    task: str = ""
    """A task of GLUE to fine-tune an encoder on, in place of a corpus: a name of `odelm.config.TASKS`. `source` is then
    the folder of its TSV files, or the folder that holds the folders of the tasks; of the other options here only
    `data_dir`, `tokenizer`, `vocab_size`, `tokenizer_bytes` and `workers` apply."""
    train_share: float = 0.0
    """Of a task whose files include no train.tsv (some copies of QNLI): the share of dev.tsv to train on, such as 0.8,
    drawn once for all seeds; the rest is evaluated. 0 reads train.tsv."""
    components: tuple[str, ...] = ()
    """The parts of the corpus to use, by name: for `pile` its sets, for `text` the names of the .jsonl files and of
    the folders of .txt files. Empty is all."""
    exclude: tuple[str, ...] = ()
    """Parts of the corpus to leave out; nothing of them is kept on disk."""
    weights: tuple[float, ...] = ()
    """The share of each of `components` in training, to a hundredth of the smallest, so that each crosses its epochs at
    its own rate. Empty takes every window once an epoch. Evaluation takes each held-out window once in either case."""
    on_bad_record: str = "error"
    """What to do with a record that cannot be read: `error` names it and stops, `skip` leaves it out and counts."""
    text_field: str = "text"
    """For `text`: the field of JSON lines, or the column of Parquet, that holds the text."""
    text_feature: str = "text"
    """For `tfds:NAME`: the feature that holds the text."""
    data_dir: str = "~/.cache/odelm"
    """Where prepared corpora, tokenizers and tokens are kept and found again."""
    tokenizer: str = ""
    """Path of a `tokenizer.json` to use; empty trains a byte-level BPE on the corpus."""
    end_token: str = ""
    """The token of the tokenizer that ends a document; empty finds it by its usual names (`odelm.tokenizer.NAMES`)."""
    vocab_size: int | None = None
    """Vocabulary of a trained tokenizer; None is model.vocab_size."""
    valid_fraction: float = 0.02
    """Share of documents held out, chosen by a stable hash of each document; of a single .txt file, its last part."""
    valid_source: str = ""
    """A file, folder or glob of text of your own (.txt and .jsonl, as for `text`) to evaluate on, in place of the
    held-out share of the corpus, which stays out of training all the same."""
    tokenizer_bytes: int = 20_000_000
    """How much text, in bytes, the tokenizer is trained on."""
    packing: str = "auto"
    """What a row holds. `concatenate`: a window of all documents in a row, which see each other. `segments`: the same
    windows, but a token sees its own document only, and positions restart in each. `documents`: tokens of one
    document, the row padded where it ends. `auto`: `documents` for a model with sentence order, else `concatenate`."""
    mask_rate: float = 0.15
    """Encoder only: the share of tokens to predict."""
    mask_unit: str = "token"
    """Encoder only: what is masked as one: a `token`, a whole `word`, or a `span` of one to three words (ALBERT's)."""
    workers: int = 0
    """Processes that make batches, beside the one that trains; 0 makes them in its threads."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    def validate(self) -> "DataConfig":
        check_types(self, "data")
        self._validate_task()
        if not self.corpus.startswith("tfds:"):
            choice("data.corpus", self.corpus, CORPORA)
            if self.corpus != "python_source" and not self.source and not self.task:
                raise InputError(
                    f"data.corpus is {self.corpus!r}, but data.source is empty: give a file, a folder or a glob"
                )
        choice("data.on_bad_record", self.on_bad_record, ON_BAD_RECORD)
        choice("data.packing", self.packing, PACKINGS)
        choice("data.mask_unit", self.mask_unit, MASK_UNITS)
        self._validate_components()
        if not 0.0 < self.valid_fraction < 1.0:
            raise InputError(f"data.valid_fraction is {self.valid_fraction}, expected a number between 0 and 1")
        if not 0.0 < self.mask_rate < 1.0:
            raise InputError(f"data.mask_rate is {self.mask_rate}, expected a number between 0 and 1, such as 0.15")
        if self.vocab_size is not None:
            positive("data.vocab_size", self.vocab_size)
        positive("data.tokenizer_bytes", self.tokenizer_bytes)
        if self.workers < 0:
            raise InputError(f"data.workers is {self.workers}, expected 0 or more")
        return self

    def _validate_task(self) -> None:
        if self.task:
            choice("data.task", self.task, TASKS)
            if not self.source:
                raise InputError(
                    f"data.task is {self.task!r}, but data.source is empty: give the folder of its files "
                    "(train.tsv, dev.tsv), or the folder that holds the folders of the tasks"
                )
        if not 0.0 <= self.train_share < 1.0:
            raise InputError(
                f"data.train_share is {self.train_share}, expected a share of dev.tsv below 1, such as 0.8, or 0"
            )
        if self.train_share and not self.task:
            raise InputError("data.train_share divides the dev.tsv of a task, but data.task is empty: name one")

    def _validate_components(self) -> None:
        named = self.components + self.exclude
        if named and self.corpus not in ("text", "pile"):
            raise InputError(
                f"data.components and data.exclude apply to the corpora 'text' and 'pile' only; {self.corpus!r} has no "
                "components"
            )
        if len(set(named)) < len(named):
            raise InputError(f"data.components and data.exclude name a part twice: {', '.join(named)}")
        if self.weights and len(self.weights) != len(self.components):
            raise InputError(
                f"data.weights has {len(self.weights)} entries, expected one for each of the {len(self.components)} "
                "data.components, or none"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"data.weights is {self.weights}, expected positive numbers")
