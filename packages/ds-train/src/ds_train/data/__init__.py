"""From text to batches: documents, the token file, packed sequences."""

from ds_train.data.corpus import state_of_the_union
from ds_train.data.documents import Document, count_bytes, hold_out
from ds_train.data.files import FileReport, read_files
from ds_train.data.packing import PackedSequences
from ds_train.data.token_file import TokenFile, open_token_file, write_token_file

__all__ = [
    "Document",
    "FileReport",
    "PackedSequences",
    "TokenFile",
    "count_bytes",
    "hold_out",
    "open_token_file",
    "read_files",
    "state_of_the_union",
    "write_token_file",
]
