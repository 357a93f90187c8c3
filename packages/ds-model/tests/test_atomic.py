"""A file is the old one or the new one, whatever happens in between."""

import resource

import pytest

from ds_model.checkpoint import atomic


def test_a_write_replaces_and_leaves_no_draft(tmp_path):
    place = tmp_path / "file"
    place.write_bytes(b"old")
    atomic.write(place, b"new")
    assert place.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    place = tmp_path / "file"
    place.write_bytes(b"old")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))  # writing beyond it is an OSError
    try:
        with pytest.raises(OSError, match="large"):
            atomic.write(place, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert place.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_draft_is_hidden_and_beside_its_file(tmp_path):
    draft = atomic.partial(tmp_path / "model.safetensors")
    assert draft.parent == tmp_path
    assert draft.name.startswith(".")
    assert not draft.match("*.safetensors")
