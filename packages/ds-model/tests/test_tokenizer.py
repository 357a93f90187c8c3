"""Any text comes back, special tokens have DeepSeek's names, files are Hugging Face's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from ds_model.byte_level_bpe import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS
from ds_model.errors import TokenizerError
from ds_model.tokenizer import Tokenizer

TEXTS = [
    "Four score and seven years ago our fathers brought forth on this continent",
    "a new nation, conceived in liberty, and dedicated to the proposition\n" * 3,
    "that all men are created equal. 1863, 1864 and 1865.",
]
TOKENIZER = Tokenizer.train(TEXTS, 340)
TALK = [{"role": "user", "content": "all men?"}]


@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(SPECIAL_TOKENS))).map("".join))
def test_special_names_in_text_come_back_as_text_when_split(text):
    ids = TOKENIZER.encode(text, split_special_tokens=True)
    assert min(ids, default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_have_the_first_ids_in_order():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(8))
    roles = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    assert roles == (0, 1, 2)  # as in the released V3
    assert TOKENIZER.encode(f"a{EOS_TOKEN}b")[1] == 1
    assert TOKENIZER.decode([0, 1, 2]) == ""
    everything = TOKENIZER.decode([0, 1, 2], skip_special_tokens=False)
    assert everything == BOS_TOKEN + EOS_TOKEN + PAD_TOKEN


def test_vocab_size_is_kept_and_merges_are_learnt():
    assert TOKENIZER.vocab_size == 340
    assert max(max(ids) for ids in TOKENIZER.encode_batch(TEXTS)) < 340
    assert all(len(TOKENIZER.encode(text)) < len(text) / 1.5 for text in TEXTS[:2])


def test_special_tokens_of_one_s_own():
    tokenizer = Tokenizer.train(TEXTS, 300, special_tokens=["<end>"], chat_template=None)
    assert tokenizer.token_to_id("<end>") == 0
    assert tokenizer.eos_token_id is None


def test_saved_and_read_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.encode_batch(TEXTS) == TOKENIZER.encode_batch(TEXTS)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 1, 2)
    assert read.apply_chat_template(TALK) == TOKENIZER.apply_chat_template(TALK)
    first = (tmp_path / "tokenizer.json").read_bytes()
    read.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_reads_what_released_and_newer_directories_write(tmp_path):
    """Tokens as mappings, named templates, and a template in a file of its own, which wins."""
    TOKENIZER.save_pretrained(tmp_path)
    settings = {
        "bos_token": {"__type": "AddedToken", "content": BOS_TOKEN, "lstrip": False},
        "eos_token": EOS_TOKEN,
        "model_max_length": 131072,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "named"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = Tokenizer.from_pretrained(tmp_path)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 1, None)
    assert read.apply_chat_template(TALK, tokenize=False) == "named"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}own")
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.apply_chat_template(TALK, tokenize=False) == f"{BOS_TOKEN}own"
    read.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert kept["model_max_length"] == 131072
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "{{ bos_token }}own"


def test_reads_a_directory_without_settings(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert read.eos_token_id is None


def test_special_tokens_are_added_only_on_request(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("B $A", special_tokens=[("B", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    released = Tokenizer.from_pretrained(tmp_path)
    plain = TOKENIZER.encode("all men")
    assert released.encode("all men") == plain
    assert released.encode("all men", add_special_tokens=True) == [0, *plain]


def test_chat_ends_where_the_answer_begins():
    ids = TOKENIZER.apply_chat_template(TALK)
    user, assistant = (TOKENIZER.token_to_id(f"<｜{role}｜>") for role in ("User", "Assistant"))
    assert ids == [0, user, *TOKENIZER.encode("all men?"), assistant]
    assert TOKENIZER.apply_chat_template(TALK, add_generation_prompt=False) == ids[:-1]


def test_no_chat_template_is_said():
    plain = Tokenizer.train(TEXTS, 300, chat_template=None)
    with pytest.raises(TokenizerError, match="no chat_template"):
        plain.apply_chat_template(TALK)


@pytest.mark.parametrize("text", ["\ud83d", "ok\udfff"])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(TokenizerError, match="not text"):
        TOKENIZER.encode(text)


def test_bad_ids_are_refused_or_nothing():
    with pytest.raises(TokenizerError, match="-1 is negative"):
        TOKENIZER.decode([3, -1])
    assert TOKENIZER.decode([10**6]) == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=file) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match="file can't be written"):
        TOKENIZER.save_pretrained(tmp_path / "file")
