"""A task in GLUE's format, small enough for a test."""

from pathlib import Path


def write_rte(folder: Path, *, train: int = 24, dev: int = 10) -> Path:
    """Writes train.tsv and dev.tsv of RTE in a folder of the task's name, and returns the folder that has it.

    The pairs are of the words of the fixture `corpus`; in an entailment both sentences have the same.
    """
    for name, count in (("train", train), ("dev", dev)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(count):
            same = i % 3 != 0
            second = f"word{i % 41} and" if same else f"word{(i + 7) % 41} and word3"
            lines.append(f"{i}\tword{i % 41} and\t{second}\t{'entailment' if same else 'not_entailment'}")
        path = folder / "RTE" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return folder
