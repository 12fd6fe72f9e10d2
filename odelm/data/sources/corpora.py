"""The four corpora as TFDS builders: where their files are, how they are read, and their cards."""

from odelm.data.sources import archives
from odelm.data.sources.document_shards import Source, whole
from odelm.data.sources.documents import Records, labelled, pile_documents, python_documents, text_documents
from odelm.data.sources.files import ENDINGS, JSONL_ENDINGS, find_files, python_files, text_files
from odelm.data.sources.tfds import CorpusBuilder


class PythonSource(CorpusBuilder):
    """The standard library of the running interpreter, one document per file."""

    description = "The source files of the running Python interpreter's standard library, a document a file."
    citation = "Python Software Foundation. The Python Standard Library. Python Software Foundation License."
    homepage = "https://docs.python.org/3/library"

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(python_files())

    @staticmethod
    def read(source: Source) -> Records:
        return python_documents(source.path, "python_source")


class Text(CorpusBuilder):
    """The user's own files of text."""

    description = "Text files, a document each, and JSON lines and Parquet with a field of text, a document a line."
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The directory holds the files, in folders or not: {', '.join(ENDINGS)}."

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(text_files(source))

    @staticmethod
    def read(source: Source, field: str = "text") -> Records:
        return text_documents(source.path, field)


class OpenWebText(CorpusBuilder):
    """OpenWebText from its archive, the folder that it unpacks to, or JSON lines."""

    description = (
        "Web pages linked from Reddit posts with three or more upvotes, in the manner of the WebText that GPT-2 was "
        "trained on: about 8 million documents, 38 GB of text."
    )
    citation = (
        "@misc{Gokaslan2019OpenWeb, title={OpenWebText Corpus}, author={Gokaslan, Aaron and Cohen, Vanya}, "
        "howpublished={http://Skylion007.github.io/OpenWebTextCorpus}, year={2019}}"
    )
    homepage = "https://skylion007.github.io/OpenWebTextCorpus"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the archive (openwebtext.tar.xz, about 12 GB) by the links on "
        "https://skylion007.github.io/OpenWebTextCorpus and put it into the directory as it is, or unpack it there "
        "once, to the folder `openwebtext` with files urlsf_subset*_data.xz. The corpus as JSON lines with a field "
        "`text` (.jsonl, plain or compressed) is read too."
    )

    @staticmethod
    def sources(source: str) -> list[Source]:
        files = find_files(source, (*archives.OUTER, archives.INNER, *ENDINGS))
        found = []
        for file in files:
            found += archives.members(file) if file.name.endswith(archives.OUTER) else whole([file])
        return found

    @staticmethod
    def read(source: Source) -> Records:
        if source.path.name.endswith(archives.OUTER):
            return archives.outer_documents(source)
        if source.path.name.endswith(archives.INNER):
            return archives.extracted_documents(source.path)
        return labelled(text_documents(source.path), archives.COMPONENT)


class Pile(CorpusBuilder):
    """The Pile from its shards, with the name of each document's set."""

    label = "pile_set_name"
    description = "Text of 22 sets, from books and papers to code and web pages: 825 GiB in English."
    citation = (
        "@article{gao2020pile, title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling}, "
        "author={Gao, Leo and Biderman, Stella and Black, Sid and others}, journal={arXiv preprint arXiv:2101.00027}, "
        "year={2020}}"
    )
    homepage = "https://pile.eleuther.ai"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the training shards (00.jsonl.zst to 29.jsonl.zst, or some of them) into the directory. Each line is "
        '{"text": ..., "meta": {"pile_set_name": ...}}. The held-out split is made from them, by a hash of each '
        "document: leave the Pile's own validation and test shards elsewhere."
    )

    @staticmethod
    def sources(source: str) -> list[Source]:
        return whole(find_files(source, JSONL_ENDINGS))

    @staticmethod
    def read(source: Source) -> Records:
        return pile_documents(source.path)


BUILDERS: dict[str, type[CorpusBuilder]] = {
    "python_source": PythonSource,
    "text": Text,
    "openwebtext": OpenWebText,
    "pile": Pile,
}
