"""Only regular files of a bounded size are read, whatever a path leads to, and each is opened once."""

import os
import shutil
import signal
import socket
import sys

import mlx.core as mx
import pytest

from mlx_hla import cli, data, files
from mlx_hla.errors import InputError
from mlx_hla.files import open_regular, read_bytes, write_atomic
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import load_tensors
from mlx_hla.tokenizer import Tokenizer, train_tokenizer

CONFIG = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 32}


@pytest.fixture(autouse=True)
def _in_time():
    """A test that hangs in an open or fills the memory fails after some seconds."""

    def late(*_):
        raise AssertionError("still at it after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def f(x):\n    return x\nimport os\n" * 30], 380)
    save(folder, LanguageModel(ModelConfig(**CONFIG)), tokenizer)
    return folder


def pipe(path):
    os.mkfifo(path)


def link_to_pipe(path):
    os.mkfifo(path.with_name("a-pipe"))
    path.symlink_to(path.with_name("a-pipe"))


def device(path):
    path.symlink_to("/dev/zero")


def sock(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has some 100 characters at most
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


def folder(path):
    path.mkdir()


def nothing(path):
    path.symlink_to(path.with_name("nowhere"))


KINDS = [pipe, link_to_pipe, device, sock, folder, nothing]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)


@kinds
def test_what_is_no_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / "x.py"
    kind(path)
    with pytest.raises(InputError, match=r"x\.py: cannot read it") as e:
        read_bytes(path, 100)
    if kind in (pipe, link_to_pipe, device, folder):
        name = {pipe: "pipe", link_to_pipe: "pipe", device: "device", folder: "folder"}[kind]
        assert f"it is a {name}, no regular file" in str(e.value)


@kinds
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_model_of_something_else(model, tmp_path, name, kind):
    there = tmp_path / "m"
    shutil.copytree(model, there)
    (there / "tokenizer.json").unlink()  # or it would do for the other
    (there / name).unlink()
    kind(there / name)
    with pytest.raises(InputError, match=f"{name}: cannot read it"):
        load(there)
    with pytest.raises(InputError, match="cannot read it"):
        Tokenizer.load(there / name)


@kinds
def test_a_corpus_of_something_else(tmp_path, kind):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"f{i}.py").write_text(f"x = {i}\n" * 3)
    kind(corpus / "odd.py")
    found = data.load_corpus(corpus, 0.3)
    assert len(found.train) + len(found.valid) == 20
    if kind not in (folder, nothing):
        with pytest.raises(InputError, match=r"odd\.py: cannot read it"):
            data.load_corpus(corpus / "odd.py")


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read_bytes(path, 4)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: no byte of it is on the disk
    for read in (Tokenizer.load, ModelConfig.load, lambda p: load_tensors(p, {})):
        with pytest.raises(InputError, match="larger than"):
            read(path)
    with pytest.raises(InputError, match="larger than"):
        data.load_corpus(path)


def test_a_file_that_grows_after_the_check_is_still_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    before = os.fstat

    def grown(number):
        result = before(number)
        path.write_bytes(b"1" * 1000)
        return result

    monkeypatch.setattr(files.os, "fstat", grown)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        read_bytes(path, 10)


def test_each_file_is_opened_once(model, monkeypatch):
    opened = []
    monkeypatch.setattr(files.os, "open", lambda path, *a, f=os.open: opened.append(str(path)) or f(path, *a))
    load(model)
    assert sorted(os.path.basename(p) for p in opened) == [
        "config.json",
        "hla.py",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_weights_come_from_the_file_that_was_checked(model, tmp_path, monkeypatch):
    """Another file takes its place between the check and the reading."""
    path = tmp_path / "w.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2,))})
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros((2,))})
    read = mx.load

    def swapped(file, **options):
        os.replace(tmp_path / "other.safetensors", path)
        return read(file, **options)

    monkeypatch.setattr(mx, "load", swapped)
    assert load_tensors(path, {"a": mx.zeros((2,))})["a"].tolist() == [1, 1]


def test_weights_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((1000,))})
    read = mx.load

    def cut(file, **options):
        os.truncate(path, 200)
        return read(file, **options)

    monkeypatch.setattr(mx, "load", cut)
    with pytest.raises(InputError, match=r"w\.safetensors"):
        load_tensors(path, {"a": mx.zeros((1000,))})


def test_names_that_no_file_can_have(tmp_path):
    for name in ("a\0b", "x" * 5000, ""):
        with pytest.raises(InputError, match="cannot read it"), open_regular(name, 10):
            pass


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = tmp_path / "x"
    make = {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/null"), "folder": os.mkdir}
    make[kind](path)
    with pytest.raises(InputError, match=rf"x: cannot write it \(it is a {kind}, no regular file\)"):
        write_atomic(path, lambda file: file.write(b"x"))
    assert list(tmp_path.iterdir()) == [path]
    assert not path.is_file()


def test_a_prompt_without_an_end_is_refused(monkeypatch, capsys, model):
    with open("/dev/zero", "rb") as zero:
        monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": zero, "isatty": lambda self: False})())
        assert cli.main(["generate", "--model", str(model), "--max-tokens", "1"]) == 1
    assert "the prompt on stdin is larger than" in capsys.readouterr().err
