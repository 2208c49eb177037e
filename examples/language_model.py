"""Compress a GPT-2-shaped language model and generate with the reloaded result."""

from typing import Any

import torch

import rankopt
from rankopt.vision import import_torchvision


def main() -> None:
    """Search, apply, save, load, generate."""
    import_torchvision()  # transformers imports it
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> Any:
        config = GPT2Config(
            vocab_size=500, n_embd=96, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config).eval()

    model = build()
    ids = torch.randint(3, 500, (2, 16))
    plan = rankopt.search(model, "macs<=60%", example_inputs={"input_ids": ids})
    rankopt.save(rankopt.apply(model, plan), "gpt2-small.safetensors")
    small: Any = rankopt.load(build(), "gpt2-small.safetensors")
    words = small.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(words.shape, f"{len(plan.changes)} sites decomposed")


if __name__ == "__main__":
    main()
