"""Broken safetensors files, for those who must refuse them."""

from hypothesis import strategies as st


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """Cut a file off anywhere, or overwrite any byte of its header."""
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans(), label="truncate"):
        return whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    place = data.draw(st.integers(0, header - 1), label="place")
    byte = data.draw(st.integers(0, 255), label="byte")
    return whole[:place] + bytes([byte]) + whole[place + 1 :]
