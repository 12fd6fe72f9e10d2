"""What a prepared corpus holds, as a table, and rows of batches as text."""

import numpy as np
from rich.table import Table
from tokenizers import Tokenizer

from odelm import tokenizer as tokenizers
from odelm.config import SPLITS
from odelm.data.loader import Batch
from odelm.data.overlap import Overlap
from odelm.data.prepare import LEFT_OUT
from odelm.data.tokens import Prepared, index

BOUNDARY, NEWLINE = " ‖ ", "⏎"


def table(prepared: Prepared) -> Table:
    """Returns documents, tokens, bytes a token and document lengths, by split and component."""
    splits = index(prepared.directory)["splits"]
    made = Table(box=None, pad_edge=False)
    for column in ("split", "component"):
        made.add_column(column, no_wrap=True)
    for column in ("documents", "tokens", "share", "bytes/token", "median", "90 %", "longest document"):
        made.add_column(column, justify="right", no_wrap=True)
    for split, streams in zip(SPLITS, (prepared.train, prepared.validation), strict=True):
        for name, stream in streams.items():
            counts = [unit["components"].get(name, {"bytes": 0}) for unit in splits[split]["units"]]
            tokens = int(stream.lengths.sum())
            middle, high, longest = np.percentile(stream.lengths, [50, 90, 100], method="lower")
            made.add_row(
                split,
                name,
                f"{len(stream.lengths):,}",
                f"{tokens:,}",
                f"{tokens / splits[split]['tokens']:.1%}",
                f"{sum(count['bytes'] for count in counts) / tokens:.2f}",
                *(f"{int(length):,}" for length in (middle, high, longest)),
            )
    return made


def left_out(prepared: Prepared) -> list[str]:
    """Returns a line for each kind of record that preparing left out, for each of the first bad records, and for the
    text that both splits share."""
    left = index(prepared.directory)["left_out"]
    lines = [f"left out: {left[name]} {what}" for name, what in LEFT_OUT if left.get(name)] + left["bad"]
    # Corpora prepared by earlier versions have no such count.
    counted = index(prepared.directory).get("overlap")
    return lines if counted is None else [*lines, str(Overlap(**counted))]


def row_text(tokenizer: Tokenizer, batch: Batch, row: int, *, end_token: str = "") -> str:
    """Returns a row of a batch as one line: what is to be predicted as [word->shown], documents separated by a bar.

    For a decoder, the text after the bar counts as a new document only with segments. Padding is counted, not shown.
    """
    tokens = batch["tokens"][row].tolist()
    predicted = _predicted(batch, row) if "positions" in batch else {}
    real = int(batch["mask"][row].sum()) if "mask" in batch else _real(batch, row)
    end = tokenizers.end_id(tokenizer, end_token)
    text, run = "", []
    for place, token in enumerate(tokens[:real]):
        if place in predicted or token == end:
            text += _decoded(tokenizer, run)
            run = []
            text += BOUNDARY if token == end and place not in predicted else ""
            text += _change(tokenizer, predicted[place], token) if place in predicted else ""
        else:
            run.append(token)
    text += _decoded(tokenizer, run)
    padding = f" (+ {len(tokens) - real} of padding)" if real < len(tokens) else ""
    order = f" (order {batch['order'][row]})" if "order" in batch else ""
    return text + padding + order


def _predicted(batch: Batch, row: int) -> dict[int, int]:
    counted = batch["weights"][row] > 0
    return dict(zip(batch["positions"][row][counted].tolist(), batch["targets"][row][counted].tolist(), strict=True))


def _real(batch: Batch, row: int) -> int:
    """Returns how many tokens of a decoder's row have a target that counts: those before the padding."""
    counted = np.flatnonzero(batch["weights"][row])
    return int(counted[-1]) + 1 if len(counted) else 0


def _change(tokenizer: Tokenizer, target: int, shown: int) -> str:
    seen = "=" if shown == target else _decoded(tokenizer, [shown])
    return f"[{_decoded(tokenizer, [target])}->{seen}]"


def _decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False).replace("\n", NEWLINE) if tokens else ""
