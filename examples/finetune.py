"""Adapt the shipped model to a folder of code or text; then let it write.

    python examples/finetune.py --data ~/notes                      LoRA, into runs/adapter
    python examples/finetune.py --data chats.jsonl --type dora --bits 4

Takes every option of `mlx-hla finetune`; from Python the same is
`mlx_hla.tune.finetune(FinetuneConfig(data="notes"))`. Needs the extra `lm`.
"""

import sys

from mlx_hla.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
