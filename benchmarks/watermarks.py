"""How often the green-list mark is found in the built-in model's stories: the table of docs/watermarking.md.

python benchmarks/watermarks.py [--stories 24]
"""

from __future__ import annotations

import argparse

import torch

import unspool

SETTINGS = {
    "the model's own: `temperature=0.7, top_p=0.9`": {"temperature": 0.7, "top_p": 0.9},
    "`temperature=1.0, top_p=1.0`": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
}
LENGTHS = (100, 200, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=24)
    stories = parser.parse_args().stories
    model, tokenizer = unspool.load("storyteller", dtype="float32")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids

    def texts(**kwargs: object) -> torch.Tensor:
        """`[stories, 400]` new tokens, past the end of a story too."""
        out = model.generate(
            ids,
            num_return_sequences=stories,
            max_new_tokens=LENGTHS[-1],
            do_sample=True,
            seed=0,
            eos_token_id=None,
            **kwargs,
        )
        return out[:, ids.shape[1] :]

    print("| settings | `bias` |" + "".join(f" {length} tokens |" for length in LENGTHS))
    print("|---|---:|" + "---:|" * len(LENGTHS))
    for name, settings in SETTINGS.items():
        plain = texts(**settings)
        for bias in (0.0, 2.0, 4.0, 8.0):
            mark = unspool.WatermarkingConfig(bias=bias or 2.0, seeding_scheme="lefthash")
            detector = unspool.WatermarkDetector(model.config, "cpu", mark, ignore_repeated_ngrams=True)
            out = texts(watermarking_config=mark, **settings) if bias else plain
            found = [float(detector(out[:, :length]).mean()) for length in LENGTHS]
            shown = f"{bias:g}" if bias else "no mark"
            print(f"| {name} | {shown} |" + "".join(f" {share:.0%} |" for share in found), flush=True)


if __name__ == "__main__":
    main()
