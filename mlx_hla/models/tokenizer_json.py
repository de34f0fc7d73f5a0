"""SentencePiece models as `tokenizer.json` of Hugging Face's `tokenizers`, and back, with the same tokens.

Both are byte-pair encodings that merge the best pair of neighbours until none is left; they say "best" in
different words. SentencePiece scores the piece that a merge makes, and takes the leftmost of equals. A
`tokenizer.json` lists the pairs in order. So the list holds every split of every piece into two, the pieces
in the order of their ids, which is that of their scores.

The vocabulary holds spaces as spaces, where SentencePiece has U+2581. That character and NUL are then in no
piece, and fall back to byte tokens, as `Tokenizer` writes them.

A foreign SentencePiece model may normalise text, or be no byte-pair encoding: it has no such file. Nothing
here needs protobuf or `tokenizers`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlx_hla.errors import InputError
from mlx_hla.tokenizer import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = {UNK: UNKNOWN, BOS: CONTROL, EOS: CONTROL}
# Pieces that merges make; the cost of listing their splits grows with the square of it.
MAX_PIECE = 64
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Vocabulary(NamedTuple):
    """The tokens by id: their texts, with spaces as spaces, and what they are."""

    texts: list[str]
    kinds: list[int]

    def of(self, *kinds: int) -> dict[str, int]:
        return {t: i for i, (t, k) in enumerate(zip(self.texts, self.kinds, strict=True)) if k in kinds}

    def is_plain(self) -> bool:
        """Whether `tokenizer_json` says all there is to say of it."""
        normal = self.of(NORMAL)
        return (
            len(set(self.texts)) == len(self.texts)
            and {self.texts[i]: self.kinds[i] for i in self.of(UNKNOWN, CONTROL).values()} == SPECIAL
            and len(self.of(BYTE)) == 256
            and all(_BYTE.fullmatch(t) for t in self.of(BYTE))
            and set(self.kinds) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}
            and all(t and SPACE not in t and "\0" not in t for t in self.texts)
            # mlx-lm's detokenizer takes what begins like a byte token for one
            and all(len(t) <= MAX_PIECE and not t.startswith("<0x") for t in normal)
        )


def tokenizer_json(proto: bytes) -> dict[str, Any] | None:
    """The content of `tokenizer.json` for a SentencePiece model; None: it has none with the same tokens."""
    try:
        vocabulary = _read(proto)
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        return None
    return None if vocabulary is None or not vocabulary.is_plain() else _content(vocabulary)


def tokenizer_config() -> dict[str, Any]:
    """The content of `tokenizer_config.json`: without it, transformers takes the file for another kind."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is three characters
        "model_max_length": 10**30,
    }


def sentencepiece_model(content: object, name: str) -> bytes:
    """The SentencePiece model that a `tokenizer.json` was made from, or one with the same tokens."""
    vocabulary = _vocabulary_in(content)
    if vocabulary is None or not vocabulary.is_plain() or _content(vocabulary) != content:
        raise InputError(f"{name}: not a tokenizer that mlx-hla wrote")
    return _write(vocabulary)


def _content(vocabulary: Vocabulary) -> dict[str, Any]:
    def added(ids: Mapping[str, int], special: bool) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [{"id": i, "content": text, **flags, "special": special} for text, i in ids.items()]

    normal = vocabulary.of(NORMAL)
    merges = [
        [text[:cut], text[cut:]]
        for text in normal
        # Of overlapping pairs that make the same piece, as in a row of spaces, the longer left is leftmost.
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos_id = vocabulary.texts.index(BOS)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(vocabulary.of(UNKNOWN, CONTROL), True)
        + added(vocabulary.of(USER_DEFINED), False),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"SpecialToken": {"id": BOS, "type_id": 1}}, pair],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
        },
        # Exactly these three: mlx-lm has a fast detokenizer for them. The first finds nothing to replace.
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(vocabulary.texts)},
            "merges": merges,
        },
    }


def _vocabulary_in(content: object) -> Vocabulary | None:
    """What a `tokenizer.json` claims to hold; the rest of it is compared with what that would give."""
    try:
        values: Any = content
        ids, added = values["model"]["vocab"], values["added_tokens"]
        fixed = {token["content"] for token in added if not token["special"]}
        if sorted(ids.values()) != list(range(len(ids))) or not all(type(i) is int for i in ids.values()):
            return None
        "".join(ids).encode()
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError):
        return None
    texts = sorted(ids, key=ids.__getitem__)

    def kind(text: str) -> int:
        if _BYTE.fullmatch(text):
            return BYTE
        return SPECIAL.get(text, USER_DEFINED if text in fixed else NORMAL)

    return Vocabulary(texts, [kind(text) for text in texts])


# --- protobuf, as far as sentencepiece_model.proto needs it. Wire types: 0 a number, 2 bytes, 5 a float


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if not byte & 128:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        value: Any
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _field(number: int, value: int | float | bytes) -> bytes:
    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def _read(proto: bytes) -> Vocabulary | None:
    """The pieces; None unless text is encoded as it stands, by merges in the order of the pieces' ids."""
    fields = list(_fields(proto))
    # TrainerSpec: model_type 3, treat_whitespace_as_suffix 24, byte_fallback 35
    trainer: dict[int, Any] = dict(_fields(b"".join(v for k, v in fields if k == 2)))
    # NormalizerSpec: precompiled_charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer: dict[int, Any] = {2: b"", 3: 1, 4: 1, 5: 1}
    normalizer |= dict(_fields(b"".join(v for k, v in fields if k == 3)))
    as_it_stands = [normalizer[k] for k in (2, 3, 4, 5)] == [b"", 0, 0, 1]
    if trainer.get(3, 1) != BPE or trainer.get(24, 0) or not trainer.get(35, 0) or not as_it_stands:
        return None
    texts, kinds, last = [], [], float("inf")
    for piece in (dict(_fields(v)) for k, v in fields if k == 1):
        kind = piece.get(3, NORMAL)
        text = piece[1].decode()
        if kind == NORMAL:
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            if not score < last:
                return None
            last = score
        texts.append(text.replace(SPACE, " ") if kind in (NORMAL, USER_DEFINED) else text)
        kinds.append(kind)
    return Vocabulary(texts, kinds)


def _write(vocabulary: Vocabulary) -> bytes:
    out, rank = [], 0
    for text, kind in zip(*vocabulary, strict=True):
        written = text.replace(" ", SPACE) if kind in (NORMAL, USER_DEFINED) else text
        score = 0.0
        if kind == NORMAL:
            score, rank = float(-rank), rank + 1
        out.append(_field(1, _field(1, written.encode()) + _field(2, score) + _field(3, kind)))
    unknown, bos, eos = (vocabulary.texts.index(name) for name in (UNK, BOS, EOS))
    trainer = [(3, BPE), (4, len(vocabulary.texts)), (35, 1), (40, unknown), (41, bos), (42, eos)]
    out.append(_field(2, b"".join(_field(number, value) for number, value in trainer)))
    out.append(_field(3, _field(1, b"identity") + _field(3, 0) + _field(4, 0)))
    return b"".join(out)
