"""Stream a continuation of a prompt from the model that ships with the package.

python examples/generate.py "def fibonacci(n):"
"""

import sys

from mlx_hla.generate import stream_generate
from mlx_hla.models import load
from mlx_hla.sampling import Sampling

prompt = sys.argv[1] if len(sys.argv) > 1 else "def fibonacci(n):"
model, tokenizer = load()
print(prompt, end="")
for chunk in stream_generate(model, tokenizer, prompt, max_tokens=150, sampling=Sampling(seed=0)):
    print(chunk.text, end="", flush=True)
print(f"\n{chunk.generation_tps:.1f} tokens/s, {chunk.peak_memory:.2f} GB")
