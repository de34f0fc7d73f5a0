"""A SentencePiece tokenizer for source code that gives every valid UTF-8 text back exactly.

Pieces are BPE over identity-normalised text; what they do not cover falls back to one token per byte.
SentencePiece writes spaces as U+2581, so that character never reaches it, nor does NUL, which a C string
would end at: both are cut out of the text and written as byte tokens. Decoding is a table from token to
bytes, so that text can be streamed token by token however its characters fall across tokens.
"""

from __future__ import annotations

import codecs
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes
from mlx_hla.settings import check_whole

SPACE = "\u2581"  # what SentencePiece writes for a space
MAX_MODEL_BYTES = 16 * 2**20
# A line break with the indentation that follows it is one token: Python is full of them.
NEWLINES = ["\n"] + ["\n" + SPACE * (4 * depth) for depth in range(1, 9)]
_UNSAFE = re.compile("([\0" + SPACE + "])")
_CHUNK = 50_000
_PRINTABLE = "".join(chr(c) for c in range(33, 127))


def _sentencepiece():
    with warnings.catch_warnings():  # its SWIG types warn on import under Python 3.12 and later
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece
    return sentencepiece


class Tokenizer:
    """Text to token ids and back. `bos_id` opens a document, `eos_id` closes it; neither has any text."""

    def __init__(self, proto: bytes, name: str = "tokenizer.model"):
        if not isinstance(proto, bytes):
            raise InputError(f"{name}: a SentencePiece model is bytes, got {type(proto).__name__}")
        if not 0 < len(proto) <= MAX_MODEL_BYTES:
            raise InputError(f"{name}: {len(proto)} bytes is not the size of a SentencePiece model")
        sp = _sentencepiece().SentencePieceProcessor()
        try:
            sp.LoadFromSerializedProto(proto)
            pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
        except Exception as e:  # the C++ side raises several types, all meaning "not a model"
            raise InputError(f"{name}: not a SentencePiece model") from e
        self.proto = proto
        self._sp = sp
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        self._byte_ids: dict[int, int] = {}
        table = []
        for i, piece in enumerate(pieces):
            if sp.is_byte(i):
                byte = int(piece[3:5], 16)
                self._byte_ids[byte] = i
                table.append(bytes([byte]))
            elif sp.is_control(i) or sp.is_unknown(i):
                table.append(b"")
            else:
                table.append(piece.replace(SPACE, " ").encode())
        self._bytes = table
        if len(self._byte_ids) != 256 or self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{name}: the tokenizer must have byte fallback and the tokens <s> and </s>")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        try:
            if token >= 0:
                return self._bytes[token]
        except (IndexError, TypeError, ValueError):  # ValueError: an array of several
            pass
        raise InputError(f"a token must be from 0 to {self.vocab_size - 1}, got {repr(token)[:60]}")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"only text can be encoded, got {repr(text)[:60]}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text holds a lone surrogate, which UTF-8 cannot write") from None
        ids = [self.bos_id] if bos else []
        for part in _UNSAFE.split(text):
            if part in ("\0", SPACE):
                ids += [self._byte_ids[b] for b in part.encode()]
            elif part:
                ids += self._sp.encode(part)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if not isinstance(ids, Iterable):
            raise InputError(f"tokens must come as a list, got {repr(ids)[:60]}")
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 (a model can write them) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> Detokenizer:
        return Detokenizer(self)

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.proto)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        return cls(read_bytes(path, MAX_MODEL_BYTES), str(path))


class Detokenizer:
    """Tokens in, text out as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn a BPE of `vocab_size` tokens, or of as many as the texts give. Equal texts, equal tokenizers."""
    check_whole("vocab_size", vocab_size, 1)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"the texts must be a list of texts, got {repr(texts)[:60]}")
    fixed = 3 + 256 + len(NEWLINES) + len(_PRINTABLE) + 1
    if vocab_size < fixed:
        raise InputError(f"vocab_size must be at least {fixed} (bytes, indents, ASCII), got {vocab_size}")
    size, extra, reason = vocab_size, list[str](), ""
    for _ in range(4):
        try:
            return Tokenizer(_learn([*texts, *extra], size))
        except (RuntimeError, OSError) as e:
            reason = " ".join(str(e).split())
        most = re.search(r"too high .*<= (\d+)", reason)
        if most and int(most[1]) >= fixed:
            size = int(most[1])
        elif (most or "sentences_.empty" in reason) and not extra:
            extra = [" ".join(_PRINTABLE)]  # too little text to hold even the characters that it must have
        elif least := re.search(r"required_chars.* vs (\d+)", reason):
            raise InputError(f"vocab_size must be at least {least[1]} for this corpus, got {size}")
        else:
            break
    raise InputError(f"no tokenizer of {size} tokens can be learnt from this corpus: {reason}")


def _learn(texts: Sequence[str], vocab_size: int) -> bytes:
    out = io.BytesIO()
    # Its "sentences" have a largest length, beyond which it drops them: cut the texts into pieces below it.
    sentences = (_UNSAFE.sub("", t[i : i + _CHUNK]) for t in texts for i in range(0, len(t), _CHUNK))
    _sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=out,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,  # lets "self." and "):" be pieces
        user_defined_symbols=NEWLINES,
        required_chars=_PRINTABLE,
        character_coverage=0.9999,
        max_sentence_length=8 * _CHUNK,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()
