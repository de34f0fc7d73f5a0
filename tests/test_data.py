"""The corpus, its split, and batches that depend on seed and step alone."""

import json

import numpy as np
import pytest

from mlx_hla import data
from mlx_hla.errors import InputError
from mlx_hla.losses import windows
from mlx_hla.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        file = tmp_path / f"part{i % 3}" / f"file{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def f{i}(x):\n    return x + {i}\n" * 5)
    return tmp_path


def test_split_is_by_file_and_deterministic(folder):
    one, two = data.load_corpus(folder, 0.25), data.load_corpus(folder, 0.25)
    assert one == two
    assert len(one.train) + len(one.valid) == 40
    assert 2 <= len(one.valid) <= 20
    assert not set(one.train) & set(one.valid)


def test_a_file_keeps_its_side_when_others_change(folder):
    before = data.load_corpus(folder, 0.25)
    (folder / "new.py").write_text("print('new')\n")
    after = data.load_corpus(folder, 0.25)
    assert set(before.train) <= set(after.train)
    assert set(before.valid) <= set(after.valid)
    assert before.digest != after.digest


def test_unreadable_repeated_and_foreign_files(folder):
    (folder / "binary.py").write_bytes(b"\xff\xfe\x00bad")
    (folder / "copy.py").write_text((folder / "part0" / "file0.py").read_text())
    (folder / "image.png").write_bytes(b"png")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("no")
    corpus = data.load_corpus(folder, 0.25)
    assert corpus.skipped == 1
    assert len(corpus.train) + len(corpus.valid) == 40
    assert "1 files left out" in corpus.describe()


def test_one_file_is_split_inside(tmp_path):
    file = tmp_path / "only.txt"
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(b"line %d\r\n" % i for i in range(100)))
    corpus = data.load_corpus(file, 0.1)
    assert corpus.train == ("".join(f"line {i}\n" for i in range(90)),)
    assert corpus.valid == ("".join(f"line {i}\n" for i in range(90, 100)),)


def test_max_bytes_samples(folder):
    for most in (70, 1000, 1001):
        part = data.load_corpus(folder, 0.25, max_bytes=most)
        assert most - 33 < sum(map(len, part.train + part.valid)) <= most  # whole lines
    with pytest.raises(InputError, match="too small to split"):
        data.load_corpus(folder, 0.25, max_bytes=1)


def test_max_bytes_stops_inside_a_file(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(10_000)))
    corpus = data.load_corpus(tmp_path / "one.txt", 0.1, max_bytes=700)
    assert "".join(corpus.train + corpus.valid) == "".join(f"line {i}\n" for i in range(88))


@pytest.mark.parametrize("piece", [7, 64, 1000])
def test_a_long_file_is_read_in_pieces_that_end_with_a_line(tmp_path, monkeypatch, piece):
    text = "".join(f"é日🎉 {i}\r\n" for i in range(300))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = data.load_corpus(tmp_path / "long.txt", 0.1)
    monkeypatch.setattr(data, "PIECE_BYTES", piece)
    texts = [t for _, t in data._texts(tmp_path / "long.txt", b"", None)]
    assert len(texts) > 3
    assert all(t.endswith("\n") for t in texts) or piece < 12
    assert "".join(texts) == text.replace("\r\n", "\n") == "".join(whole.train + whole.valid)


def test_what_was_left_out_and_why(folder, tmp_path):
    (folder / "latin.py").write_bytes("x = 'é'\n".encode("latin-1") * 3)
    assert "1 files left out (" in data.load_corpus(folder, 0.25).describe()
    assert "latin.py: no UTF-8 (byte 5)" in data.load_corpus(folder, 0.25).describe()
    with pytest.raises(InputError, match=r"latin\.py: no UTF-8 \(byte 5\), and no other encoding is read"):
        data.load_corpus(folder / "latin.py")
    (folder / "cut.py").write_bytes("é".encode()[:1])
    with pytest.raises(InputError, match=r"cut\.py: no UTF-8 \(byte 0\)"):
        data.load_corpus(folder / "cut.py")


def test_suffixes(tmp_path):
    for i in range(20):
        (tmp_path / f"a{i}.swift").write_text(f"let x = {i}\n" * 3)
        (tmp_path / f"b{i}.h").write_text(f"int x{i};\n" * 3)
    said = r"no files that end in \.jsonl, .*\.txt, but in \.(swift|h) \(20\), .* \(20\): choose with suffix"
    with pytest.raises(InputError, match=said):
        data.load_corpus(tmp_path)
    swift, both = (data.load_corpus(tmp_path, 0.3, suffix=s) for s in ("swift", ".h, .swift"))
    assert len(swift.train + swift.valid) == 20
    assert len(both.train + both.valid) == 40
    for bad in ("", ".swift,", "a/b", "tar.gz", 3):
        with pytest.raises(InputError, match="suffix must be"):
            data.load_corpus(tmp_path, suffix=bad)


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": f"document {i}\nwith é\n", "id": i}) for i in range(200)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n\n")
    one, two = data.load_corpus(tmp_path, 0.25), data.load_corpus(tmp_path / "some.jsonl", 0.25)
    assert one.digest == two.digest
    assert 25 < len(one.valid) < 75
    assert set(one.train + one.valid) == {f"document {i}\nwith é\n" for i in range(200)}
    (tmp_path / "some.jsonl").write_text("\n".join(reversed([*lines, '{"text": "another"}'])))
    more = data.load_corpus(tmp_path, 0.25)  # a document keeps its side
    assert set(one.train) <= set(more.train)
    assert set(one.valid) <= set(more.valid)
    part = data.load_corpus(tmp_path, 0.2, 600)
    assert 500 < sum(len(t.encode()) for t in part.train + part.valid) <= 600


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": 3}', 'line 2 is no object with a "text"'),
        ('{"body": "x"}', 'line 2 is no object with a "text"'),
        ('["x"]', 'line 2 is no object with a "text"'),
        ('{"text": "\\ud800"}', 'line 2 is no object with a "text"'),
        ('{"text": "x"', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
    ids=range(6),
)
def test_bad_json_lines(tmp_path, line, match):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=match):
        data.load_corpus(tmp_path / "x.jsonl")


def test_arguments_have_types(folder):
    for bad in (0.0, 1, float("nan"), "0.1", None, True):
        with pytest.raises(InputError, match="validation fraction"):
            data.load_corpus(folder, bad)
    for bad in (0, -1, 1.5, float("nan"), "9", True):
        with pytest.raises(InputError, match="max_bytes"):
            data.load_corpus(folder, 0.2, bad)
    with pytest.raises(InputError, match="the corpus must be a path"):
        data.load_corpus("")


@pytest.mark.parametrize("content", [None, b"", b"  \n\n", b"\xff\xff"])
def test_empty_corpus_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.py").write_bytes(content)
    with pytest.raises(InputError, match="corpus is empty"):
        data.load_corpus(tmp_path)


def test_missing_corpus_and_bad_fraction(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        data.load_corpus(tmp_path / "none")
    with pytest.raises(InputError, match="fraction"):
        data.load_corpus(tmp_path, 1.0)


@pytest.fixture
def more(tmp_path_factory):
    """A folder of three more texts, two of them JSON lines."""
    extra = tmp_path_factory.mktemp("more")
    (extra / "one.py").write_text("print('one')\n")
    lines = [json.dumps({"text": f"print('{name}')\n", "path": f"{name}.py"}) for name in ("two", "three")]
    (extra / "others.jsonl").write_text("\n".join(lines))
    (extra / "SOURCES.json").write_text('{"not": "read"}')
    return extra


def test_extra_trains_and_does_not_validate(folder, more):
    plain, both = data.load_corpus(folder, 0.25), data.load_corpus(folder, 0.25, extra=more)
    assert both.valid == plain.valid
    assert both.train[: len(plain.train)] == plain.train
    assert set(both.train) - set(plain.train) == {f"print('{n}')\n" for n in ("one", "two", "three")}
    assert both.digest not in (plain.digest, data.load_corpus(folder, 0.25, extra=more / "one.py").digest)
    assert both == data.load_corpus(folder, 0.25, extra=str(more))
    assert f"{folder}, to train with {more}: {len(both.train)} + " in both.describe()


def test_extra_leaves_out_what_validates(folder, more):
    plain = data.load_corpus(folder, 0.25)
    valid, train = plain.valid[0], plain.train[0]
    (more / "copy.py").write_bytes(valid.replace("\n", "\r\n").encode())
    (more / "copies.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (valid + "\n", train)))
    both = data.load_corpus(folder, 0.25, extra=more)
    assert len(both.train) == len(plain.train) + 3
    assert not {t.strip() for t in both.train} & {t.strip() for t in both.valid}
    for left in ("one.py", "others.jsonl"):
        (more / left).unlink()
    with pytest.raises(InputError, match=r"no more text to train on \(2 files\)"):
        data.load_corpus(folder, 0.25, extra=more)


def test_suffix_is_for_extra_too_and_max_bytes_is_not(folder, more):
    part = data.load_corpus(folder, 0.25, 700, extra=more)
    assert set(part.train) - set(data.load_corpus(folder, 0.25, 700).train) == {
        f"print('{n}')\n" for n in ("one", "two", "three")
    }
    python = data.load_corpus(folder, 0.25, suffix=".py", extra=more)
    assert set(python.train) - set(data.load_corpus(folder, 0.25).train) == {"print('one')\n"}


def test_repeat_lets_the_split_texts_count_for_more(folder, more):
    plain, both = data.load_corpus(folder, 0.25), data.load_corpus(folder, 0.25, extra=more, repeat=3)
    assert both.valid == plain.valid
    assert both.train[: 3 * len(plain.train)] == plain.train * 3
    assert len(both.train) == 3 * len(plain.train) + 3
    assert both.digest != data.load_corpus(folder, 0.25, extra=more).digest
    for bad in (0, 1001, 1.5):
        with pytest.raises(InputError, match="repeat must be"):
            data.load_corpus(folder, 0.25, repeat=bad)


def test_bad_extra(folder, more):
    for bad, match in ((folder / "none", "none: no such file"), ("", "extra must be a path")):
        with pytest.raises(InputError, match=match):
            data.load_corpus(folder, 0.25, extra=bad)
    with pytest.raises(InputError, match=r"no files that end in \.swift, but in"):
        data.load_corpus(folder / "part0" / "file0.py", 0.25, suffix="swift", extra=more)
    (more / "others.jsonl").write_text('{"text": 3}')
    assert "1 files left out" in data.load_corpus(folder, 0.25, extra=more).describe()
    with pytest.raises(InputError, match=r"others\.jsonl: line 1 is no object"):
        data.load_corpus(folder, 0.25, extra=more / "others.jsonl")


def test_standard_library():
    corpus = data.load_corpus()
    assert len(corpus.train) > 100
    assert sum(map(len, corpus.train)) > 3e6
    assert sum(map(len, corpus.valid)) > 5e4
    assert not any("class TestCase(unittest.TestCase)" in t for t in corpus.train[:50])


def test_stream_and_byte_counts(folder):
    corpus = data.load_corpus(folder, 0.25)
    tokenizer = train_tokenizer(corpus.train, 380)
    stream = data.encode_texts(tokenizer, corpus.valid)
    assert stream.dtype == np.uint16
    assert (stream == tokenizer.bos_id).sum() == len(corpus.valid)
    assert data.bytes_per_token(tokenizer)[stream].sum() == sum(len(t.encode()) for t in corpus.valid)
    assert tokenizer.decode(stream.tolist()) == "".join(corpus.valid)


def test_batches_depend_on_seed_and_step_only():
    stream = np.arange(1000, dtype=np.uint16)
    batches = data.Batches(stream, 4, 16, seed=3)
    batch = np.array(batches[7])
    assert batch.shape == (4, 17)
    assert (np.diff(batch, axis=1) == 1).all()
    assert (batch == np.array(data.Batches(stream, 4, 16, seed=3)[7])).all()
    assert (batch != np.array(batches[8])).any()
    assert (batch != np.array(data.Batches(stream, 4, 16, seed=4)[7])).any()


def test_batches_reach_both_ends():
    batches = data.Batches(np.arange(20, dtype=np.uint16), 64, 16, seed=0)
    starts = {int(s) for s in np.array(batches[0])[:, 0]}
    assert starts == {0, 1, 2, 3}
    with pytest.raises(InputError, match="fewer than one window"):
        data.Batches(np.arange(16, dtype=np.uint16), 1, 16, seed=0)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
def test_windows_predict_every_token_once(length):
    stream = np.arange(length, dtype=np.uint16)
    seen, shapes = [], set()
    for tokens, real in windows(stream, 2, 16):
        shapes.add(tokens.shape)
        seen += tokens[:, 1:][real].tolist()
    assert seen == list(range(1, length))
    assert shapes == {(min(2, -(-(length - 1) // 16)), min(16, length - 1) + 1)}  # one, and no larger


def test_windows_of_nothing():
    with pytest.raises(InputError, match="too few"):
        next(windows(np.zeros(1, np.uint16), 1, 4))
