"""The corpus that ships with the project: the State of the Union addresses, 1790 to 2021."""

import lzma
from importlib import resources

from ds_train.data.documents import Document


def state_of_the_union() -> list[Document]:
    """Reads the 233 addresses (10.8 MB of text) in order of time.

    Source and licence (CC0 1.0, collection PDDL 1.0) stand in `data/sotu/README.md`.

    Returns:
        Documents named by year, speaker and party, as in `2021_joseph_r_biden_d`.
    """
    folder = resources.files("ds_train.data") / "sotu"
    raw = lzma.decompress((folder / "sotu.txt.xz").read_bytes())
    rows = (folder / "index.tsv").read_text(encoding="utf-8").splitlines()
    names, starts = zip(*(row.split("\t") for row in rows), strict=True)
    ends = [*map(int, starts[1:]), len(raw)]
    return [
        Document(name, raw[int(start) : end].decode().strip())
        for name, start, end in zip(names, starts, ends, strict=True)
    ]
