"""tokenizer.json gives SentencePiece's tokens, encoded and in mlx-lm's detokenizer, and leads back."""

import copy
import json
import random

import pytest

from mlx_hla.errors import InputError
from mlx_hla.models import PRETRAINED
from mlx_hla.models.tokenizer_json import sentencepiece_model, tokenizer_config, tokenizer_json
from mlx_hla.tokenizer import SPACE, Tokenizer, train_tokenizer

CODE = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n"
RUNS = "abababab aaaaaaa        x          ==== ==== ======== xyxyxyxy\n\n\n\n" + CODE
PALETTES = (
    "ab_ (\n\t\r\0\u2581\u00a0<s>é日🎉\u200d\u0301",
    " \u2581\n",
    "".join(map(chr, range(33))) + "\x7f\x85\u2028\ufeff\ufffd\ufffe",
    "<s></s><unk><0x41>",
    "日本語 中文 한국어 עברית العربية ไทย ελληνικά кириллица",
    "🎉👩‍👩‍👧🇩🇪👍🏽\ufe0f",
)


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.load(PRETRAINED / "tokenizer.model")


@pytest.fixture(scope="module")
def small():
    return train_tokenizer([RUNS] * 20, 420)


def texts(rng, tokenizer, count):
    """Random texts of many kinds, without lone surrogates."""
    pieces = [tokenizer.decode([i]) for i in range(3, tokenizer.vocab_size)]
    letters = [p for p in pieces if len(p) == 1 and p != "\ufffd"]

    def anything():
        c = rng.choice((rng.randrange(0x250), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
        return chr(c)

    def part():
        kind = rng.randrange(8)
        n = rng.choice((1, 2, 3, 5, 8, 20))
        if kind == 0:
            return "".join(rng.choices(rng.choice(PALETTES), k=n))
        if kind == 1:
            return "".join(anything() for _ in range(n))
        if kind == 2:
            return "".join(rng.choices(pieces, k=n))
        if kind == 3:  # a short word again and again, where merges overlap
            return "".join(rng.choices(letters, k=rng.randint(1, 3))) * n
        if kind == 4:
            return rng.choice((" ", "\n", "\t", SPACE, "\0")) * rng.choice((1, 2, 4, 7, 33, 120))
        if kind == 5:
            return "\n" + " " * rng.randrange(40) + rng.choice(pieces)
        if kind == 6:
            at = rng.randrange(len(RUNS))
            return RUNS[at : at + n]
        piece = rng.choice(pieces)
        return piece[rng.randrange(len(piece) + 1) :] + piece

    return ["".join(part() for _ in range(rng.randint(1, 4))) for _ in range(count)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """mlx-lm's tokenizer from the files of one of ours."""
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")

    def build(tokenizer):
        folder = tmp_path_factory.mktemp("tokenizer")
        content = tokenizer_json(tokenizer.proto)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
        return utils.load(folder)

    return build


def differences(ours, theirs, rebuilt, batch):
    """How many of the texts have other tokens, decode to another text, or stream to another text."""
    wrong = []
    for text, ids in zip(batch, theirs._tokenizer(batch)["input_ids"], strict=True):
        want = ours.encode(text, bos=True)
        same = ids == want == rebuilt.encode(text, bos=True)
        stream, parts = theirs.detokenizer, []
        for token in want[1:]:
            stream.add_token(token)
            parts.append(stream.last_segment)
        stream.finalize()
        parts.append(stream.last_segment)
        # mlx-lm's detokenizer has a space for every U+2581, whatever it came from.
        same &= "".join(parts) == text.replace(SPACE, " ") and ours.decode(want) == text
        if not same:
            wrong.append(text)
    return wrong


@pytest.mark.parametrize("which", ["shipped", "small"])
def test_random_texts_have_the_same_tokens(request, theirs, which):
    ours = request.getfixturevalue(which)
    rebuilt = Tokenizer(sentencepiece_model(tokenizer_json(ours.proto), "x"))
    batch = ["", " ", "\0", SPACE, "x" * 5000, " " * 3001, *texts(random.Random(1), ours, 2000)]
    other = theirs(ours)
    assert differences(ours, other, rebuilt, batch) == []
    assert [
        other.decode(ids, skip_special_tokens=True) for ids in other._tokenizer(batch)["input_ids"]
    ] == batch


def test_overlapping_merges_of_one_piece_go_from_the_left(theirs, shipped):
    """Where a + b and b + c are the same piece, "the leftmost" and "the first of the list" could differ."""
    merges = {tuple(m) for m in tokenizer_json(shipped.proto)["model"]["merges"]}
    pieces = {part for m in merges for part in (*m, "".join(m))}
    triples = {
        (a, b, (a + b)[len(b) :])
        for a, b in merges
        if (a + b).startswith(b) and (b, (a + b)[len(b) :]) in merges
    }
    assert len(triples) > 100
    batch = []
    for a, b, c in triples:
        batch += [x + a + b + c + y for x in ("", "(", "x", " ", a) for y in ("", ")", "x", " ", c)]
        batch += [p + b + c for p in pieces if p.endswith(a)] + [a + b + p for p in pieces if p.startswith(c)]
    found = theirs(shipped)._tokenizer(batch)["input_ids"]
    assert [t for t, ids in zip(batch, found, strict=True) if ids != shipped.encode(t, bos=True)] == []


@pytest.mark.fuzz
@pytest.mark.parametrize(("which", "count"), [("shipped", 800_000), ("small", 200_000)])
def test_a_million_random_texts_have_the_same_tokens(request, theirs, which, count):
    ours = request.getfixturevalue(which)
    rebuilt = Tokenizer(sentencepiece_model(tokenizer_json(ours.proto), "x"))
    other, rng = theirs(ours), random.Random(2)
    for _ in range(count // 4000):
        assert differences(ours, other, rebuilt, texts(rng, ours, 4000)) == []


def test_a_lone_surrogate_is_refused(theirs, shipped):
    with pytest.raises(InputError, match="lone surrogate"):
        shipped.encode("a\ud800")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        theirs(shipped).encode("a\ud800")


def test_ends_and_special_tokens(theirs, shipped):
    other = theirs(shipped)
    assert (other.bos_token_id, other.eos_token_id) == (shipped.bos_id, shipped.eos_id) == (1, 2)
    assert other.eos_token_ids == {2}
    assert len(other) == shipped.vocab_size
    assert type(other.detokenizer).__name__ == "SPMStreamingDetokenizer"
    assert other.encode("<s>x", add_special_tokens=False) == shipped.encode("<s>x")


@pytest.mark.parametrize("which", ["shipped", "small"])
def test_it_leads_back(request, which):
    ours = request.getfixturevalue(which)
    content = tokenizer_json(ours.proto)
    proto = sentencepiece_model(json.loads(json.dumps(content)), "x")
    assert tokenizer_json(proto) == content
    again = Tokenizer(proto)
    assert (again.vocab_size, again.bos_id, again.eos_id) == (ours.vocab_size, 1, 2)
    assert all(again.token_bytes(i) == ours.token_bytes(i) for i in range(ours.vocab_size))


def test_every_size_of_tokenizer_has_its_file():
    for size in (363, 380, 700):
        tokenizer = train_tokenizer([CODE * 9], size)
        assert len(tokenizer_json(tokenizer.proto)["model"]["vocab"]) == tokenizer.vocab_size


def damaged(content):
    """(what is wrong, content) for one fault each."""

    def changed(path, value):
        new = copy.deepcopy(content)
        at = new
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return new

    vocab = content["model"]["vocab"]
    yield "no object", [1]
    yield "empty", {}
    yield "no model", changed(("model",), None)
    yield "a list for the vocabulary", changed(("model", "vocab"), list(vocab))
    yield "an id twice", changed(("model", "vocab", "def"), 7)
    yield "an id that is text", changed(("model", "vocab", "<s>"), "1")
    yield "an id too many", changed(("model", "vocab", "def"), 10**9)
    yield (
        "no byte",
        changed(("model", "vocab"), {("x" * 5 if t == "<0x41>" else t): i for t, i in vocab.items()}),
    )
    yield (
        "a surrogate",
        changed(("model", "vocab"), {("\ud800" if t == "e" else t): i for t, i in vocab.items()}),
    )
    yield "U+2581", changed(("model", "vocab"), {(SPACE if t == "e" else t): i for t, i in vocab.items()})
    yield (
        "a long piece",
        changed(("model", "vocab"), {("e" * 999 if t == "e" else t): i for t, i in vocab.items()}),
    )
    yield "another merge", changed(("model", "merges", 0), ["e", "e"])
    yield "merges in another order", changed(("model", "merges"), content["model"]["merges"][::-1])
    yield "a normalizer", changed(("normalizer",), {"type": "Lowercase"})
    yield "another decoder", changed(("decoder", "decoders", 2), {"type": "Strip"})
    yield "a key more", {**content, "x": 1}


def test_other_files_are_refused(small):
    content = tokenizer_json(small.proto)
    for what, other in damaged(content):
        with pytest.raises(InputError, match="file: not a tokenizer that mlx-hla wrote"):
            pytest.fail(f"{what}: taken ({sentencepiece_model(other, 'file')[:20]})")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"pad_id": 3},
        {"control_symbols": ["<tool>"]},
        {"bos_piece": "<begin>"},
    ],
    ids=str,
)
def test_other_sentencepiece_models_have_no_such_file(options, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = tmp_path / "model"
    ours = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines() * 20),
        model_prefix=str(out),
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **{**ours, **options},
    )
    proto = out.with_suffix(".model").read_bytes()
    assert tokenizer_json(proto) is None
    assert tokenizer_json(proto[:-3]) is None
