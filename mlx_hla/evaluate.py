"""How good a model is: nats per byte of text (`losses`), and the share of its completions that are Python.

Share that parses. A prompt is the first line of a function at the top level of a validation file, drawn with
replacement. The model continues it for a number of tokens at most. What follows the function, from the first
later line that begins in column 0, is cut off; a text that ran out of tokens loses its last, unfinished line.
The sample counts if `ast.parse` accepts the rest. A function without a body does not parse.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from mlx_hla.errors import InputError
from mlx_hla.generate import generate_step
from mlx_hla.losses import Scorer, token_losses
from mlx_hla.models import LanguageModel
from mlx_hla.sampling import Sampling
from mlx_hla.settings import check_whole
from mlx_hla.tokenizer import Tokenizer

__all__ = [
    "ParseResult",
    "Scorer",
    "complete_function",
    "cut_function",
    "function_headers",
    "next_statement",
    "parse",
    "parse_share",
    "token_losses",
]


def function_headers(texts: Sequence[str]) -> list[str]:
    """The first lines, `def ...:`, of the functions at the top level of Python texts."""
    headers = []
    for text in texts:
        tree = parse(text)
        lines = text.split("\n")
        for node in tree.body if tree else ():
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                line = lines[node.lineno - 1].rstrip()
                if line.endswith(":"):
                    headers.append(line)
    return headers


def parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in a text are not ours to report
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def next_statement(text: str) -> int | None:
    """Where the first line after the header begins in column 0, if there is one."""
    at = text.find("\n")
    while 0 <= at < len(text) - 1:
        if not text[at + 1].isspace():
            return at + 1
        at = text.find("\n", at + 1)
    return None


def cut_function(text: str, ended: bool) -> str:
    """The function at the head of `text`. `ended`: the model closed the document, its last line is whole."""
    at = next_statement(text)
    if at is not None:
        return text[:at]
    return text if ended else text[: text.rfind("\n") + 1]


class ParseResult(NamedTuple):
    share: float
    samples: int
    texts: list[str]  # as they were cut


def parse_share(
    model: LanguageModel,
    tokenizer: Tokenizer,
    headers: Sequence[str],
    *,
    samples: int,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    on_sample=lambda done: None,
) -> ParseResult:
    """Sample completions of randomly drawn headers and count those that parse (see above)."""
    check_whole("samples", samples, 1)
    check_whole("max_tokens", max_tokens, 1)
    if not headers:
        raise InputError("no function headers to complete: the validation text is no Python with functions")
    if not isinstance(headers, list | tuple) or not all(isinstance(header, str) for header in headers):
        raise InputError(f"headers must be a list of texts, got {repr(headers)[:60]}")
    sampling = Sampling(seed=0) if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling, got {repr(sampling)[:60]}")
    rng = random.Random(sampling.seed)
    texts = []
    for n in range(samples):
        header = rng.choice(headers)
        one = Sampling(**{**vars(sampling), "seed": rng.getrandbits(32)})
        texts.append(complete_function(model, tokenizer, header, max_tokens, one))
        on_sample(n + 1)
    return ParseResult(sum(parse(t) is not None for t in texts) / samples, samples, texts)


def complete_function(
    model: LanguageModel, tokenizer: Tokenizer, header: str, max_tokens: int, sampling: Sampling
) -> str:
    detokenizer, text, ended = tokenizer.stream(), header, False
    ids = tokenizer.encode(header, bos=True)
    for token, _ in generate_step(model, ids, sampling=sampling, max_tokens=max_tokens):
        ended = token == tokenizer.eos_id
        text += detokenizer.add(token)
        if ended or next_statement(text) is not None:
            break
    return cut_function(text + detokenizer.finish(), ended)
