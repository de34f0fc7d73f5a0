"""Every valid UTF-8 text round-trips, whole or streamed token by token."""

import random

import pytest

from mlx_hla.errors import InputError
from mlx_hla.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n",
    "import os\n\nfor name in os.listdir('.'):\n    print(name, len(name))\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 420)


AWKWARD = [
    "",
    " ",
    "\n",
    "\0",
    "a\0b",
    "\u2581",
    " \u2581 \u2581\u2581",
    "<s></s><unk>",
    "<0x41><0x00>",
    "\t\tx\r\n\r\n   \f\v",
    "   leading and trailing   ",
    "\n\u2581\u2581\u2581\u2581x",
    "\n    x",
    "\ufeffbom",
    "naïve café 🎉👩‍👩‍👧 日本語 עברית",
    "e\u0301 ﬁ Å \u00a0 \u3000 \u200b \u2028 \u2029 \x85",
    "\U0010ffff\ue000\ufffe",
    "x" * 5000,
    " " * 3001,
]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_every_code_point_round_trips(tokenizer):
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for start in range(0, len(points), 20000):
        text = "".join(map(chr, points[start : start + 20000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_text_round_trips(tokenizer):
    rng = random.Random(0)
    palette = "ab_ (\n\t\r\0\u2581\u00a0<s>é日🎉\u200d\u0301"
    for _ in range(2000):
        points = (
            rng.choice(palette) if rng.random() < 0.8 else chr(rng.randrange(0xD800)) for _ in range(30)
        )
        text = "".join(points)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_symbols_in_text_are_text(tokenizer):
    ids = tokenizer.encode("<s></s>")
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
    marked = tokenizer.encode("x", bos=True, eos=True)
    assert (marked[0], marked[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(marked) == "x"


def test_stream_gives_only_whole_characters(tokenizer):
    text = "é日🎉 x\u2581\0"
    stream = tokenizer.stream()
    parts = [stream.add(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert all("\ufffd" not in p for p in parts)


def test_stream_replaces_bytes_that_are_no_text(tokenizer):
    stream = tokenizer.stream()
    first = tokenizer.encode("é")[0]
    assert stream.add(first) == ""
    assert stream.add(tokenizer.encode("x")[0]) == "\ufffdx"
    stream.add(first)
    assert stream.finish() == "\ufffd"


def test_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("\n        ")) == 1


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 420).proto == tokenizer.proto


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    again = Tokenizer.load(tmp_path / "tokenizer.model")
    assert again.vocab_size == tokenizer.vocab_size == 420


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"not a model at all", b"\xff" * 4096])
def test_wrong_file_is_refused(tmp_path, content, capfd):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.load(path)


def test_missing_file_and_bad_text(tokenizer, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize(
    ("size", "match"),
    [(100, "at least 363"), (500.0, "whole number"), (True, "whole number"), ("500", "whole number")],
)
def test_impossible_sizes_are_refused(size, match):
    with pytest.raises(InputError, match=match):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("size", [363, 380, 2000])
@pytest.mark.parametrize("text", ["a b", "hello", "xxxxxx", "1", "def f(x):\n    return x\n", "\n\n"])
def test_a_tiny_corpus_gives_what_it_can(text, size):
    tokenizer = train_tokenizer([text], size)
    assert 363 <= tokenizer.vocab_size <= size
    for sample in (text, "".join(map(chr, range(1, 127)))):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_many_characters_need_a_larger_vocabulary():
    text = "".join(map(chr, range(0x4E00, 0x4F00)))
    with pytest.raises(InputError, match=r"vocab_size must be at least 6\d\d for this corpus, got 400"):
        train_tokenizer([text], 400)
    assert train_tokenizer([text], 700).vocab_size == 700
