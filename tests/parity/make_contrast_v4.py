"""Makes fixtures/contrast_v4.json: what transformers 4.49 gives in contrastive search and with DoLa.

    python -m venv v4 && v4/bin/pip install torch==2.13.0 'transformers==4.49.*'
    PYTHONPATH=tests v4/bin/python tests/parity/make_contrast_v4.py

The calls are drawn from a fixed seed, and the models are those of `tiny.py`, so that the file comes out the same.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers

CALLS = 90
CLASSES = {"llama": "Llama", "deep": "Llama", "mistral": "Mistral", "gpt2": "GPT2"}


def draw(r: random.Random, number: int) -> dict[str, Any]:
    """One call; half of them of each kind."""
    token = lambda: r.randint(1, 60)  # noqa: E731
    search = number % 2 == 0
    kind = r.choice(["llama", "mistral", "gpt2"] if search else ["deep", "mistral", "gpt2"])
    call: dict[str, Any] = {"model": kind}
    alike, count = r.random() < 0.4, r.randint(1, 3)
    if search:
        call |= {"penalty_alpha": r.choice([0.2, 0.6, 0.9]), "top_k": r.randint(2, 7)}
    else:
        layers = len([name for name in tiny.weights(kind) if name.endswith(("q_proj.weight", "c_attn.weight"))])
        some = sorted(r.sample(range(layers), r.randint(1, 4)))
        call["dola_layers"] = r.choice(["low", "high", some])
        if call["dola_layers"] != [some[0]]:  # of several layers, version 4 takes one for all rows
            count = 1
        if r.random() < 0.5:
            call |= {"do_sample": True, "seed": r.randint(0, 99), "temperature": r.choice([0.7, 1.5])}
    length = r.randint(1, 9)
    call["prompts"] = [[token() for _ in range(length if alike else r.randint(1, 9))] for _ in range(count)]
    ends = r.sample(range(1, 61), r.choice([1, 1, 4, 15]))
    call["eos_token_id"] = r.choice([None, ends[0], ends])
    call["pad_token_id"] = r.choice([0, 60])
    call["max_new_tokens"] = r.randint(1, 24)
    more: dict[str, Any] = {
        "no_repeat_ngram_size": r.randint(1, 3),
        "min_new_tokens": r.randint(1, 6),
        "bad_words_ids": [[token()], [token(), token()]],
        "suppress_tokens": [token() for _ in range(5)],
        "shift": True,
        "allow": True,
    }
    if alike:  # transformers 4 penalises pads too
        more["repetition_penalty"] = 1.3
    if count == 1:
        more["stop"] = True
    return call | {name: more[name] for name in r.sample(sorted(more), r.choice([0, 0, 1, 2]))}


def make_model(kind: str) -> Any:
    name = CLASSES[kind]
    config = getattr(transformers, f"{name}Config")(**tiny.CONFIGS[kind], attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing = model.load_state_dict(tiny.weights(kind), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def answer(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Sequences; of every step, the sum of the scores and logits of each row that are finite."""
    kwargs = tiny.arguments({k: v for k, v in call.items() if k not in ("model", "seed")}, transformers)
    torch.manual_seed(call.get("seed", 0))
    out = model.generate(**kwargs, return_dict_in_generate=True, output_scores=True, output_logits=True)
    return {"sequences": out.sequences.tolist(), "scores": tiny.sums(out.scores), "logits": tiny.sums(out.logits)}


def main() -> None:
    assert transformers.__version__.startswith("4.49.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    models = {kind: make_model(kind) for kind in CLASSES}
    r = random.Random(7)
    calls = [draw(r, number) for number in range(CALLS)]
    with torch.no_grad():
        lines = [json.dumps({"call": call, "result": answer(models[call["model"]], call)}) for call in calls]
    path = Path(__file__).parent / "fixtures" / "contrast_v4.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
