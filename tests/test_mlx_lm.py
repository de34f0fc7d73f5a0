"""The language model under mlx-lm: the same numbers, its caches, its batches, its loader."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.generate import generate, generate_step
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, load, save
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.trees import flat

pytest.importorskip("mlx_lm")
import mlx_lm
from mlx_lm import utils
from mlx_lm.generate import batch_generate
from mlx_lm.generate import generate_step as their_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.perplexity import eval_ppl

from mlx_hla import mlx_lm as adapter
from mlx_hla.mlx_lm import Model, ModelArgs

TINY = {"vocab_size": 380, "dims": 32, "num_layers": 2, "num_heads": 2, "hidden_dims": 64, "context": 32}
PROMPT = "def fibonacci(n):"
GREEDY = Sampling(temperature=0)
STOCK = utils.load_model


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Each test registers for itself."""
    monkeypatch.setattr(utils, "load_model", STOCK)
    monkeypatch.delitem(sys.modules, "mlx_lm.models.hla", raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\nimport os, sys\n" * 30], 380)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model in float32, where mlx-lm and we compute the same."""
    folder = tmp_path_factory.mktemp("shipped")
    save(folder, *load(PRETRAINED, mx.float32), mx.float32)
    return folder


@pytest.fixture(scope="module")
def theirs(shipped):
    """(model, tokenizer) as mlx-lm loads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_model", STOCK)
        adapter.register()
        return utils.load(str(shipped))


def pair(**changes):
    config = ModelConfig(**{**TINY, **changes})
    ours = LanguageModel(config, seed=3)
    model = Model(ModelArgs("hla", config))
    model.update(ours.parameters())
    return ours, model


def tokens(seed, *shape):
    return mx.random.randint(3, 380, shape, key=mx.random.key(seed))


class NoStop:
    """As much of a tokenizer as `batch_generate` needs."""

    eos_token_ids = ()
    decode = staticmethod(str)


def greedy(model, prompt, count, cache=None):
    steps = their_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)
    return [int(token) for token, _ in steps]


VARIANTS = {
    "hla2": {},
    "first": {"operator": "first"},
    "ahla": {"operator": "ahla"},
    "hla3": {"operator": "hla3"},
    "mixed": {"operator": "mixed"},
    "order-4": {"operator": 4},
    "rope": {"rope_theta": 10000.0},
    "hybrid": {"layers": ("window", "readout"), "window": 5},
    "no-conv": {"conv_size": 0, "decay": "fixed"},
    "normalize": {"normalize": True, "num_kv_heads": 1, "output_gate": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_logits_whole_and_in_pieces(variant):
    ours, model = pair(**VARIANTS[variant])
    assert flat(model.parameters()).keys() == flat(ours.parameters()).keys()
    x = tokens(0, 2, 9)
    want = ours(x)
    assert mx.array_equal(model(x), want)
    cache, own = make_prompt_cache(model), ours.make_cache()
    assert all(c.empty() for c in cache)
    for piece in (x[:, :6], x[:, 6:7], x[:, 7:]):
        assert mx.array_equal(model(piece, cache=cache), ours(piece, own))
    assert sum(c.nbytes for c in cache) == sum(c.nbytes for c in own)
    assert flat(model.parameters()).keys() == flat(ours.parameters()).keys()


@pytest.mark.parametrize("variant", ["hla2", "rope", "normalize", "no-conv", "hybrid"])
def test_a_batch_of_different_lengths_equals_each_alone(variant):
    _, model = pair(**VARIANTS[variant])

    prompts = [tokens(n, n).tolist() for n in (1, 40, 7, 23, 40, 2)]
    solo = [greedy(model, prompt, 8) for prompt in prompts]
    for options in ({}, {"prefill_step_size": 16}, {"prefill_batch_size": 2, "completion_batch_size": 3}):
        got = batch_generate(model, NoStop, prompts, max_tokens=8, return_token_ids=True, **options)
        assert got.token_ids == solo
    # And go on from caches, in a batch again.
    caches = [make_prompt_cache(model) for _ in prompts[:3]]
    for prompt, cache in zip(prompts, caches, strict=False):
        model(mx.array([prompt]), cache=cache)
    more = [tokens(50 + n, n).tolist() for n in (3, 1, 9)]
    got = batch_generate(model, NoStop, more, caches, max_tokens=6, return_token_ids=True)
    want = [greedy(model, a + b, 6) for a, b in zip(prompts, more, strict=False)]
    assert got.token_ids == want


def test_only_padding_takes_the_masked_path(monkeypatch):
    """With a mask a call costs twice as much."""
    _, model = pair()
    seen = []

    def spied(cache, T, f=adapter._mask):
        mask = f(cache, T)
        seen.append((T, None if mask is None else mask.tolist()))
        return mask

    monkeypatch.setattr(adapter, "_mask", spied)

    def run(*lengths):
        seen.clear()
        prompts = [tokens(n, n).tolist() for n in lengths]
        batch_generate(model, NoStop, prompts, max_tokens=5, prefill_step_size=8)
        return [mask for _, mask in seen if mask is not None]

    assert run(9, 9, 9) == []
    assert len(seen) > 5
    for lengths in ((30, 5, 12), (30, 28)):
        masks = run(*lengths)
        assert masks
        assert all(not all(map(all, mask)) for mask in masks)
        assert all(mask is None for T, mask in seen[-5:] if T == 1)


def test_a_cache_is_saved_and_continued(tmp_path):
    _, model = pair(rope_theta=100.0)
    prompt, more = tokens(1, 20).tolist(), tokens(2, 5).tolist()
    want = greedy(model, prompt + more, 12)
    cache = make_prompt_cache(model)
    list(their_step(mx.array(prompt), model, max_tokens=0, prompt_cache=cache))
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    again = load_prompt_cache(path)
    assert greedy(model, more, 12, again) == want
    assert greedy(model, more, 12, load_prompt_cache(path)) == want


def test_what_ships_says_the_same_under_mlx_lm(theirs, shipped):
    model, tokenizer = theirs
    ours, own = load(shipped, mx.float32)
    prompt = own.encode(PROMPT, bos=True)
    assert tokenizer.encode(PROMPT) == prompt
    want = [t for t, _ in generate_step(ours, prompt, sampling=GREEDY, max_tokens=40)]
    assert greedy(model, prompt, 40) == want
    prompts = [PROMPT, "import os\n", "class Stack:\n    def push(self, item):\n        " * 5, "x"]
    ids = [own.encode(p, bos=True) for p in prompts]
    got = batch_generate(model, tokenizer, ids, max_tokens=20, return_token_ids=True)
    for p, found in zip(ids, got.token_ids, strict=True):
        alone = [t for t, _ in generate_step(ours, p, sampling=GREEDY, max_tokens=20)]
        assert found == (alone[: alone.index(2)] if 2 in alone else alone)


def test_perplexity_is_that_of_our_loss(theirs, shipped):
    model, _ = theirs
    ours, own = load(shipped, mx.float32)
    ids = own.encode(Path(__file__).read_text(encoding="utf-8"), bos=True)[:257]
    x = mx.array([ids[:128], ids[128:256]])
    found, _ = eval_ppl(model, x, batch_size=1)
    logits = ours(x)[:, :-1]
    chosen = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), x[:, 1:, None], axis=-1)
    assert found == pytest.approx(mx.exp(-chosen.mean()).item(), rel=1e-5)


# --- the loader


def text_of(out):
    """What `mlx_lm generate` printed between its two lines."""
    return out.split("=" * 10 + "\n")[1].rstrip("\n")


def test_generate_needs_no_flag_and_says_so(shipped, capsys):
    flags = ["--model", str(shipped), "--prompt", PROMPT, "-m", "30", "--temp", "0"]
    assert cli.main(["lm", "generate", *flags]) == 0
    out, err = capsys.readouterr()
    ours = generate(*load(shipped, mx.float32), PROMPT, max_tokens=30, sampling=GREEDY)
    assert text_of(out) == ours.rstrip("\n")
    assert err == f"mlx-hla: mlx-lm {mlx_lm.__version__} generate, with the architecture hla registered\n"


def test_stock_mlx_lm_runs_it_with_its_flag(shipped):
    """In a process that has not heard of us."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(shipped), "--prompt", PROMPT]
    command += ["-m", "30", "--temp", "0", "--trust-remote-code"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = generate(*load(shipped, mx.float32), PROMPT, max_tokens=30, sampling=GREEDY)
    assert text_of(done.stdout) == ours.rstrip("\n")
    with pytest.raises(ValueError, match="requires importing and running a custom module"):
        utils.load(str(shipped))


def test_the_loader_runs_nothing_from_a_folder(tmp_path, tokenizer):
    adapter.register()
    mark = tmp_path / "ran"
    folder = tmp_path / "m"
    save(folder, pair()[0], tokenizer)
    for name in ("hla.py", "evil.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(InputError, match=r"hla\.py: not the file that mlx-hla writes"):
        utils.load(str(folder))
    (folder / "hla.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"model_file": "evil.py"}, {"auto_map": {"x": "evil.x"}}):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=r"model_file must be|unknown keys"):
            utils.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(utils.load(str(folder), return_config=True)[2]["model_file"], str)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.x", None]}})
    )
    with pytest.raises(InputError, match="names code to run"):  # some commands always trust tokenizers
        utils.load(str(folder), tokenizer_config={"trust_remote_code": True})
    assert not mark.exists()


def test_other_models_are_mlx_lms(tmp_path, tokenizer):
    adapter.register()
    adapter.register()  # twice is once
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 8, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, got = utils.load_model(tmp_path, strict=False)
    assert type(model).__module__ == "mlx_lm.models.llama"
    assert got == config
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_file": "x.py"}))
    with pytest.raises(ValueError, match="requires importing and running a custom module"):
        utils.load_model(tmp_path, strict=False)


@pytest.mark.parametrize("mixers", [{"operator": "softmax"}, {"layers": ("hla2", "softmax")}], ids=str)
def test_full_softmax_attention_is_refused(mixers):
    with pytest.raises(InputError, match="full softmax attention does not run under mlx-lm"):
        Model(ModelArgs("hla", ModelConfig(**TINY, **mixers)))


NO_MLX_LM = """
import sys
sys.modules["{name}"] = None
sys.argv = ["mlx-hla", "lm", "generate", "--model", "x"]
from mlx_hla.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["mlx_lm", "transformers"])
def test_without_mlx_lm_the_command_names_the_extra(tmp_path, name):
    script = NO_MLX_LM.format(name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr == "mlx-hla: error: mlx-lm is missing or of another version: pip install 'mlx-hla[lm]'\n"
    )


def test_wrong_words(capsys):
    assert cli.main(["lm", "dance"]) == 1
    assert "CLI requires a subcommand" in capsys.readouterr().err
    for words, match in (
        (["lm"], "COMMAND"),
        (["lm", "generate", "--flag"], "unrecognized arguments: --flag"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
        assert match in capsys.readouterr().err


def test_folders_without_tokenizer_model_are_whole_for_mlx_lm(shipped, tmp_path):
    adapter.register()
    folder = tmp_path / "m"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    _, tokenizer = utils.load(str(folder), lazy=True)
    assert tokenizer.decode(tokenizer.encode(PROMPT), skip_special_tokens=True) == PROMPT
