"""Stock commands of mlx-lm's, end to end: each on a folder of ours, and what it writes back under ours."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial

import mlx.core as mx
import pytest

from mlx_hla import cli
from mlx_hla.generate import generate
from mlx_hla.losses import token_losses
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import read_header
from mlx_hla.models.lm import Block
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.trees import flat

pytest.importorskip("mlx_lm")
from mlx_lm import utils

SMALL = {"vocab_size": 380, "dims": 64, "num_layers": 2, "num_heads": 2, "hidden_dims": 128, "context": 64}
TEXT = "def f(x):\n    return x\nimport os, sys\n"
PROMPT = "def fibonacci(n):"
GREEDY = Sampling(temperature=0)
STOCK = utils.load_model


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A command registers, and leaves nothing behind for the next test."""
    monkeypatch.setattr(utils, "load_model", STOCK)
    monkeypatch.delitem(sys.modules, "mlx_lm.models.hla", raising=False)
    monkeypatch.setattr(Block, "__call__", Block.__call__)  # --grad-checkpoint changes the class


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model in float32, where mlx-lm and we compute the same."""
    folder = tmp_path_factory.mktemp("shipped")
    save(folder, *load(PRETRAINED, mx.float32), mx.float32)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    tokenizer = train_tokenizer([TEXT * 30], 380)
    save(folder, LanguageModel(ModelConfig(**SMALL), seed=5), tokenizer, mx.float32)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder of training text for `lora`."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"{TEXT}x = {i}\n" * (1 + i % 3)}) for i in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def lm(*words):
    assert cli.main(["lm", *map(str, words)]) == 0


def written(folder):
    return sorted(f.name for f in folder.iterdir())


def same_under_both(folder, tol=1e-5):
    """Our loader and mlx-lm's give one model; the logits of ours."""
    ours, tokenizer = load(folder, mx.float32)
    theirs, other = utils.load(str(folder))
    theirs.set_dtype(mx.float32)
    ids = tokenizer.encode(TEXT, bos=True)
    assert other.encode(TEXT) == ids
    a, b = ours(mx.array([ids])), theirs(mx.array([ids]))
    assert mx.allclose(a, b, rtol=tol, atol=tol)
    return a


# --- convert


MODES = {
    "4": (["--q-bits", "4"], {"group_size": 64, "bits": 4, "mode": "affine"}),
    "8": (["--q-bits", "8"], {"group_size": 64, "bits": 8, "mode": "affine"}),
    "mxfp4": (["--q-mode", "mxfp4"], {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_folder_runs_under_ours(shipped, tmp_path, capsys, mode):
    flags, entry = MODES[mode]
    folder = tmp_path / "q"
    lm("convert", "--model", shipped, "--mlx-path", folder, "-q", *flags)
    capsys.readouterr()
    assert "tokenizer.model" not in written(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == entry
    header = read_header(folder / "model.safetensors")
    packed = {name for name, (dtype, _) in header.items() if dtype == "U32"}
    # The embedding, and in each block two matrices of the mixer and three of the MLP; the gates stay.
    assert not any("_gate." in name for name in packed)
    assert len(packed) == 1 + 6 * 5
    assert header["layers.1.mixer.decay_gate.weight"][0] == "F32"
    assert (
        cli.main(["generate", "--model", str(folder), "--prompt", PROMPT, "--max-tokens", "9", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["generation_tokens"] == 9
    assert cli.main(["info", "--model", str(folder), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["quantization"] == entry
    assert info["parameters"] == 5_890_694
    same_under_both(folder, 1e-3)


def test_a_recipe_of_mixed_bits(small, tmp_path):
    folder = tmp_path / "q"
    flags = ["--quant-predicate", "mixed_4_6", "--q-group-size", "32"]
    lm("convert", "--model", small, "--mlx-path", folder, "-q", *flags)
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert {m["bits"] for m in entry.values() if isinstance(m, dict)} == {4, 6}
    same_under_both(folder, 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_spares_the_decay_gate(small, tmp_path, dtype):
    folder = tmp_path / "c"
    lm("convert", "--model", small, "--mlx-path", folder, "--dtype", dtype)
    header = read_header(folder / "model.safetensors")
    kinds = {name: kind for name, (kind, _) in header.items()}
    gates = {name for name in kinds if "decay_gate" in name}
    assert len(gates) == 4
    assert {kinds[name] for name in gates} == {"F32"}
    assert {kind for name, kind in kinds.items() if name not in gates} == {
        "F16" if dtype == "float16" else "BF16"
    }
    before, after = same_under_both(small), same_under_both(folder)
    assert mx.allclose(before, after, atol=0.05)


def test_a_converted_folder_converts_again(small, tmp_path):
    lm("convert", "--model", small, "--mlx-path", tmp_path / "q", "-q", "--q-bits", "8")
    lm("convert", "--model", tmp_path / "q", "--mlx-path", tmp_path / "d", "--dequantize")
    assert "quantization" not in json.loads((tmp_path / "d/config.json").read_text())
    assert mx.allclose(same_under_both(small), same_under_both(tmp_path / "d"), atol=0.1)
    model, tokenizer = load(tmp_path / "d")
    save(tmp_path / "ours", model, tokenizer, mx.float32)  # and is one of ours again
    assert "tokenizer.model" in written(tmp_path / "ours")


# --- lora and fuse


@pytest.mark.parametrize(
    ("kind", "bits"), [("lora", None), ("dora", None), ("full", None), ("lora", "4"), ("lora", "mxfp4")]
)
def test_tune_and_fuse(small, rows, tmp_path, kind, bits):
    base, tuned, fused = small, tmp_path / "adapter", tmp_path / "fused"
    if bits:
        base = tmp_path / "q"
        lm("convert", "--model", small, "--mlx-path", base, "-q", *MODES[bits][0])
    flags = ["--iters", 4, "--batch-size", 2, "--num-layers", -1, "--learning-rate", 1e-3, "--val-batches", 1]
    flags += ["--max-seq-length", 64, "--fine-tune-type", kind, *(["--grad-checkpoint"] if bits else [])]
    lm("lora", "--model", base, "--train", "--data", rows, "--adapter-path", tuned, *flags)
    names = mx.load(str(tuned / "adapters.safetensors")).keys()
    for part in ("qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(part in name for name in names)
    lm("fuse", "--model", base, "--adapter-path", tuned, "--save-path", fused)
    assert "tokenizer.model" not in written(fused)
    after = same_under_both(fused, 1e-3)
    adapted, tokenizer = utils.load(str(base), adapter_path=str(tuned))
    want = adapted(mx.array([tokenizer.encode(TEXT)]))
    # Fusing rounds a quantised base once more.
    assert mx.allclose(after, want, atol=0.5 if bits else 1e-3)
    assert not mx.allclose(after, same_under_both(base), atol=1e-3)
    ours = load(fused)[0]
    assert flat(ours.parameters()).keys() == flat(load(base)[0].parameters()).keys()


# --- prompts that are kept


def test_a_prompt_is_read_once(shipped, tmp_path, capsys):
    path = tmp_path / "prompt.safetensors"
    lm("cache_prompt", "--model", shipped, "--prompt", PROMPT, "--prompt-cache-file", path)
    state, first = path.stat().st_size, capsys.readouterr().out
    assert "Saving" in first
    assert state < 2_500_000
    longer = tmp_path / "longer.safetensors"
    lm("cache_prompt", "--model", shipped, "--prompt", PROMPT * 50, "--prompt-cache-file", longer)
    assert longer.stat().st_size == state  # whatever was read
    capsys.readouterr()
    lm("generate", "--prompt-cache-file", path, "--prompt", "\n    ", "-m", 8, "--temp", 0)
    out = capsys.readouterr().out
    # mlx-lm begins every prompt with <s>, one that goes on from a cache too.
    model, tokenizer = load(shipped, mx.float32)
    ids = tokenizer.encode(PROMPT, bos=True) + tokenizer.encode("\n    ", bos=True)
    want = generate(model, tokenizer, ids, max_tokens=8, sampling=GREEDY)
    assert out.split("=" * 10 + "\n")[1].rstrip("\n") == want.rstrip("\n")


def test_benchmark(small, capsys):
    lm("benchmark", "--model", small, "-p", 32, "-g", 8, "-b", 2, "-n", 1)
    assert "Averages" in capsys.readouterr().out


def test_perplexity(shipped, tmp_path, monkeypatch, capsys):
    """Of one text, cut as the command cuts it; the loss is ours."""
    pytest.importorskip("datasets")
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm(
        "perplexity",
        "--model",
        shipped,
        "--data-path",
        tmp_path / "data",
        "--num-samples",
        2,
        "--sequence-length",
        64,
    )
    said = float(capsys.readouterr().out.split("Perplexity: ")[1].split()[0])
    model, tokenizer = load(shipped, mx.float32)
    ids = mx.array(tokenizer.encode(text, bos=True)[:128]).reshape(2, 64)
    want = mx.exp(token_losses(model, model.parameters(), ids).mean()).item()
    assert said == pytest.approx(want, rel=1e-3)


# --- server


@pytest.fixture(scope="module")
def server(shipped):
    """A function that posts to `mlx-hla lm server`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_hla", "lm", "server", "--model", str(shipped), "--port", str(port)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=offline)
    here = f"http://127.0.0.1:{port}"

    def post(**body):
        body = {"temperature": 0, "max_tokens": 12, **body}
        request = urllib.request.Request(
            f"{here}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{here}/health"):
                break
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.25)
        post.base_url = f"{here}/v1"
        yield post
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


PROMPTS = [
    PROMPT,
    "import os\n\n\n",
    "class Stack:\n    def push(self, item):\n",
    "x = [",
    "for i in ",
    '"""',
]


def test_the_server_answers_streams_and_reuses(server, shipped):
    model, tokenizer = load(shipped, mx.float32)
    prompt = "import os\n\n\ndef walk(top):\n    for name in os.listdir(top):\n"
    want = generate(model, tokenizer, prompt, max_tokens=12, sampling=GREEDY)
    first = json.loads(server(prompt=prompt))
    assert first["choices"][0]["text"] == want
    usage = first["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(prompt, bos=True))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    again = json.loads(server(prompt=prompt))  # all but the last token is known
    assert again["choices"][0]["text"] == want
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    longer = json.loads(server(prompt=prompt + want + "\n    return"))
    assert longer["usage"]["prompt_tokens_details"]["cached_tokens"] >= usage["total_tokens"] - 1
    whole = generate(model, tokenizer, prompt + want + "\n    return", max_tokens=12, sampling=GREEDY)
    assert longer["choices"][0]["text"] == whole
    other = json.loads(server(prompt="y = 1\n"))
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    lines = [
        line[6:] for line in server(prompt=prompt, stream=True).splitlines() if line.startswith("data: ")
    ]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert len([p for p in pieces if p]) > 3
    assert "".join(pieces) == want
    # A stop is a row of tokens to mlx-lm, so a text that begins and ends where tokens do.
    ids = tokenizer.encode(prompt + want)[len(tokenizer.encode(prompt)) :]
    stopped = json.loads(server(prompt=prompt, stop=[tokenizer.decode(ids[2:4])]))["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == tokenizer.decode(ids[:2])


def test_an_openai_client(server, shipped):
    """Whole, streamed and stopped, through the client that programs use."""
    openai = pytest.importorskip("openai")
    model, tokenizer = load(shipped, mx.float32)
    want = generate(model, tokenizer, PROMPT, max_tokens=12, sampling=GREEDY)
    with openai.OpenAI(base_url=server.base_url, api_key="none") as client:
        ask = partial(
            client.completions.create, model="default_model", prompt=PROMPT, max_tokens=12, temperature=0
        )
        whole = ask()
        assert whole.choices[0].text == want
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        pieces = [chunk.choices[0].text for chunk in ask(stream=True) if chunk.choices]
        assert "".join(pieces) == want
        assert len(pieces) > 3
        ids = tokenizer.encode(PROMPT + want)[len(tokenizer.encode(PROMPT)) :]
        stopped = ask(stop=[tokenizer.decode(ids[2:4])])
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].text == tokenizer.decode(ids[:2])


def test_requests_at_once_get_what_they_would_get_alone(server, shipped):
    model, tokenizer = load(shipped, mx.float32)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda p: server(prompt=p), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        want = generate(model, tokenizer, prompt, max_tokens=12, sampling=GREEDY)
        assert json.loads(answer)["choices"][0]["text"] == want
