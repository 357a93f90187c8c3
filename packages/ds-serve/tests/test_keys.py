"""Who may ask, and how often."""

import hashlib

import pytest

from ds_serve import Keys
from ds_serve.api.errors import ApiError

FILE = f"""
[keys.alice]
key = "alice-has-a-key"
requests_per_minute = 2

[keys.bob]
sha256 = "{hashlib.sha256(b"bob-has-another").hexdigest()}"
requests_at_once = 1
tokens_per_minute = 100
"""


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return Keys.from_file(path)


def refused(call, *arguments):
    with pytest.raises(ApiError) as error, call(*arguments):
        pass
    return error.value


def test_keys_are_known_by_text_or_by_hash(keys):
    assert keys.name_of("Bearer alice-has-a-key") == "alice"
    assert keys.name_of("bearer bob-has-another") == "bob"
    for wrong in (None, "", "Bearer", "Bearer alice", "Basic alice-has-a-key", "Bearer \ud800"):
        with pytest.raises(ApiError) as error:
            keys.name_of(wrong)
        assert (error.value.status_code, error.value.code) == (401, "invalid_api_key")
    assert Keys().name_of(None) == "anyone"


def test_requests_a_minute(keys):
    for _ in range(2):
        with keys.admitted("alice"):
            pass
    error = refused(keys.admitted, "alice")
    assert error.status_code == 429
    assert "2 requests a minute; try again in" in error.detail
    assert 1 <= int(error.headers["Retry-After"]) <= 60


def test_requests_at_once(keys):
    with keys.admitted("bob"):
        assert "1 requests at once" in refused(keys.admitted, "bob").detail
    with keys.admitted("bob"):
        pass


def test_tokens_a_minute_are_counted_when_an_answer_is_done(keys):
    with keys.admitted("bob"):
        keys.spent("bob", 99)
    with keys.admitted("bob"):
        keys.spent("bob", 5_000)  # more than is left: it takes what is left
    assert "100 tokens a minute" in refused(keys.admitted, "bob").detail
    keys.spent("anyone", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold tables"),
        ("x = 1", "must hold tables"),
        ("[keys]", "must hold tables"),
        ("[keys.a]", "give key or sha256"),
        ('[keys.a]\nkey = "short"', "keys.a key"),
        ('[keys.a]\nkey = "long enough"\nrequests = 3', "keys.a requests"),
        ('[keys.a]\nkey = "long enough"\nrequests_per_minute = 0', "requests_per_minute"),
        ("[keys.a", "can't be read"),
    ],
    ids=str,
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"keys\.toml") as error:
        Keys.from_file(path)
    assert words in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="can't be read"):
        Keys.from_file(tmp_path / "none.toml")
