"""How much faster each decoding mode is than what it is measured against, as a table of ratios.

    python benchmarks/modes.py [beams ...] [--rounds 5] [--threads 2] [--patience 60] [--quick]

Both sides of a mode do the same work in one process, in turn, so that a busy minute of the machine falls on both; the
ratio is the median over rounds of one pair each. Modes without a name on the command line are all of them.
A mode is an entry of ``MODES``: what it is against, the ratio to reach, and how to make its two sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import NAMES, checkpoint, copier
from quiet import Disturbed, undisturbed

Side = Callable[[], Any]
"""Does a mode's work once."""


class Pair(NamedTuple):
    """The two sides of a mode, and other ratios that need no clock: name, value, target."""

    ours: Side
    other: Side
    facts: tuple[tuple[str, float, str], ...] = ()


class Mode(NamedTuple):
    """What a mode is measured against, the ratio to reach, and what makes its sides (with fewer tokens, if quick)."""

    title: str
    against: str
    target: float
    make: Callable[[bool], Pair]


@cache
def unspool_model(shape: str) -> Any:
    import unspool

    return unspool.AutoModelForCausalLM.from_pretrained(checkpoint(shape), dtype="bfloat16")


@cache
def transformers_model(shape: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint(shape), dtype=torch.bfloat16)


def prompt(rows: int, tokens: int) -> torch.Tensor:
    """Random ids that both shapes have."""
    return torch.randint(3, 49000, (rows, tokens), generator=torch.Generator().manual_seed(0))


def beams(quick: bool) -> Pair:
    """Four beams on a prompt of 512 tokens, and the bytes of keys and values that either side keeps for them."""
    new = 8 if quick else 64
    ids = prompt(1, 512)
    given = {"num_beams": 4, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "early_stopping": True}
    ours, other = unspool_model("T"), transformers_model("T")
    mask = torch.ones_like(ids)
    stored = other.generate(ids, attention_mask=mask, return_dict_in_generate=True, **given).past_key_values
    theirs = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored.layers)
    memory = store_bytes(lambda: ours.generate(ids, **given)) / theirs
    return Pair(
        lambda: ours.generate(ids, **given),
        lambda: other.generate(ids, attention_mask=mask, **given),
        (("peak bytes of keys and values", memory, "≤ 0.45"),),
    )


def store_bytes(call: Side) -> int:
    """Bytes of the largest store of keys and values that a call makes."""
    from unspool.cache import PagedStore

    sizes: list[int] = []
    original = PagedStore.extend

    def extend(store: Any, row: Any, tokens: int) -> bool:
        sizes.append(sum(pool.nbytes for pools in (store.keys, store.values) for pool in pools.values()))
        return original(store, row, tokens)

    PagedStore.extend = extend  # type: ignore[method-assign]
    try:
        call()
    finally:
        PagedStore.extend = original  # type: ignore[method-assign]
    return max(sizes)


def contrastive(quick: bool) -> Pair:
    """Four candidates in contrastive search beside four beams, which feed as many tokens."""
    model, ids = unspool_model("T"), prompt(1, 512)
    given = {"max_new_tokens": 8 if quick else 64, "do_sample": False, "pad_token_id": 0}
    return Pair(
        lambda: model.generate(ids, penalty_alpha=0.6, top_k=4, **given),
        lambda: model.generate(ids, num_beams=4, **given),
    )


def dola(quick: bool) -> Pair:
    """Contrast with the upper half's layers beside plain greedy decoding."""
    model, ids = unspool_model("T"), prompt(4, 128)
    given = {"max_new_tokens": 8 if quick else 64, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.2}
    return Pair(lambda: model.generate(ids, dola_layers="high", **given), lambda: model.generate(ids, **given))


@cache
def storyteller(name: str) -> Any:
    import unspool

    return unspool.load(name)


STORIES = ["Once upon a time", "The little fox", "One day, Lily", "A boy named Tom"]
STORIES += ["In the forest", "The old man", "There was a dog", "Mia found a"]
COPIED = 144  # tokens of a story that is said again


@cache
def stories(length: int) -> torch.Tensor:
    """24 stories of the built-in model, cut to ``length`` tokens, the last of which is the end token: [24, length]."""
    model, tokenizer = storyteller("storyteller")
    begun = tokenizer(STORIES, return_tensors="pt", padding=True)
    told = model.generate(**begun, max_new_tokens=240, num_return_sequences=12, seed=0).tolist()
    marks = {tokenizer.pad_token_id, tokenizer.bos_token_id, end := tokenizer.eos_token_id}
    texts = [[token for token in row if token not in marks] for row in told]
    return torch.tensor([text[: length - 1] + [end] for text in texts if len(text) >= length][:24])


def lookup(rows: int, quick: bool) -> Pair:
    """Stories said again by a model that copies its prompt: drafts from the prompt, or one token after another.

    What a story says more than once leads to wrong drafts. The texts must be the same with drafts as without.
    """
    import unspool

    model, _ = unspool.load(copier(COPIED))
    ids = stories(COPIED)
    groups = ids[: max(rows, 3) if quick else None].split(rows)
    given = {"max_new_tokens": COPIED, "do_sample": False, "return_dict_in_generate": True}

    def said(**more: Any) -> list[Any]:
        return [model.generate(group, **given, **more) for group in groups]

    drafts = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}
    ours, other = said(**drafts), said()
    right = []
    for group, drafted, plain in zip(groups, ours, other, strict=True):
        if not drafted.sequences.equal(plain.sequences):
            raise SystemExit("prompt lookup changed the text")
        right.append((plain.sequences[:, COPIED:] == group).double().mean().item())
    accepted = statistics.mean(out.acceptance_rate for out in ours)
    facts = (("tokens copied rightly", statistics.mean(right), "1"), ("drafted tokens accepted", accepted, "shown"))
    return Pair(lambda: said(**drafts), said, facts)


def assisted(rows: int, quick: bool) -> Pair:
    """The built-in model with the built-in draft model, at its own settings, against itself without."""
    model, tokenizer = storyteller("storyteller")
    draft, _ = storyteller("storyteller-draft")
    prompts = tokenizer(STORIES[:rows], return_tensors="pt", padding=True)
    given = {"max_new_tokens": 16 if quick else 120, "do_sample": False}
    return Pair(
        lambda: model.generate(**prompts, **given, assistant_model=draft),
        lambda: model.generate(**prompts, **given),
    )


def rules(quick: bool, **more: Any) -> Pair:
    """The last tokens of 2,000 with rules that look at all of them, against the same without."""
    model, (_, tokenizer) = unspool_model("T"), storyteller("storyteller")
    if "stop_strings" in more:
        more["tokenizer"] = tokenizer
    ids = prompt(1, 1984) % tokenizer.vocab_size
    given = {"max_new_tokens": 4 if quick else 32, "do_sample": False, "pad_token_id": 0}
    kept = model.generate(ids[:, :-1], max_new_tokens=1, return_dict_in_generate=True).past_key_values
    return Pair(
        lambda: model.generate(ids, past_key_values=kept, **given, **more),
        lambda: model.generate(ids, past_key_values=kept, **given),
    )


COPYING = f"prompt lookup, stories of {COPIED} tokens said again"
MODES: dict[str, Mode] = {
    "beams": Mode(f"4 beams, prompt of 512, {NAMES['T']} shape, bf16", "transformers", 1.5, beams),
    "contrastive": Mode(f"contrastive search, top_k=4, {NAMES['T']} shape, bf16", "our 4 beams", 0.8, contrastive),
    "dola": Mode(f"DoLa, 8 early layers, 4 prompts, {NAMES['T']} shape, bf16", "our greedy", 0.7, dola),
    "lookup": Mode(COPYING + ", 1 row", "plain greedy", 1.5, partial(lookup, 1)),
    "lookup8": Mode(COPYING + ", 8 rows", "plain greedy", 1.5, partial(lookup, 8)),
    "assisted": Mode("built-in draft, 1 row", "plain greedy", 1.3, partial(assisted, 1)),
    "assisted8": Mode("built-in draft, 8 rows", "plain greedy", 1.0, partial(assisted, 8)),
    "stop_strings": Mode(
        f"stop_strings at 2,000 tokens, {NAMES['T']} shape", "without", 0.95, partial(rules, stop_strings=["The end!?"])
    ),
    "ngrams": Mode(
        f"no_repeat_ngram_size at 2,000 tokens, {NAMES['T']} shape",
        "without",
        0.95,
        partial(rules, no_repeat_ngram_size=3),
    ),
}


def ratio(pair: Pair, rounds: int, patience: float) -> list[float]:
    """Time of the other side over ours, of each round in which nobody disturbed."""

    def both() -> float:
        times = []
        for side in (pair.ours, pair.other):
            began = time.perf_counter()
            side()
            times.append(time.perf_counter() - began)
        return times[1] / times[0]

    pair.ours()
    pair.other()
    found: list[float] = []
    for _ in range(rounds):
        try:
            found.append(undisturbed(lambda _: both(), patience)[0])
        except Disturbed:
            continue
    return found


def line(mode: Mode, pair: Pair, found: list[float]) -> str:
    """A mode's rows of the table."""
    if not found:
        return f"| {mode.title} | {mode.against} | no quiet moment | ≥ {mode.target} |"
    middle = statistics.median(found)
    spread = f"{middle:.2f} ({min(found):.2f} to {max(found):.2f})"
    rows = [f"| {mode.title} | {mode.against} | {spread} | ≥ {mode.target} |"]
    rows += [f"| … {name} | {mode.against} | {value:.2f} | {target} |" for name, value, target in pair.facts]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet moment, per round")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all works")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"unknown {sorted(unknown)}; there are {list(MODES)}")
    torch.set_num_threads(args.threads)
    table = "| mode | against | times as fast, median (range) | target |\n|---|---|---:|---|\n"
    with torch.no_grad():
        for name in args.modes or MODES:
            pair = MODES[name].make(args.quick)
            table += line(MODES[name], pair, ratio(pair, 1 if args.quick else args.rounds, args.patience)) + "\n"
    print(table, end="")
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
