"""Makes fixtures/beams_v4.json: what transformers 4.49 gives in group and constrained beam search.

    python -m venv v4 && v4/bin/pip install torch==2.13.0 'transformers==4.49.*'
    PYTHONPATH=tests v4/bin/python tests/parity/make_beams_v4.py

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


def draw(r: random.Random, number: int) -> dict[str, Any]:
    """One call; a third each of groups, forced words and constraint objects."""
    count = r.randint(1, 3)
    length = r.randint(1, 6)
    alike = r.random() < 0.4
    token = lambda: r.randint(1, 60)  # noqa: E731
    call: dict[str, Any] = {
        "model": r.choice(["llama", "table"]),
        "prompts": [[token() for _ in range(length if alike else r.randint(1, 6))] for _ in range(count)],
    }
    if number % 3 == 0:
        groups, size = r.randint(2, 3), r.randint(1, 3)
        call |= {"num_beam_groups": groups, "num_beams": groups * size, "diversity_penalty": r.choice([0.3, 1.0, 5.0])}
    else:
        call["num_beams"] = r.randint(2, 5)
        words = [_words(r) for _ in range(r.randint(1, 3))]
        if number % 3 == 1:
            call["force_words_ids"] = words
        else:
            call["constraints"] = [["one of" if isinstance(w[0], list) else "phrase", w] for w in words]
            if r.random() < 0.4:
                call["constraints"].append(["sevens", r.randint(1, 3)])
    ends = [e for e in r.sample(range(1, 61), r.choice([1, 1, 4, 15])) if str(e) not in _numbers(call)]
    call["eos_token_id"] = r.choice([None, ends[0], ends]) if ends else None
    call["pad_token_id"] = r.choice([0, 60]) if call["eos_token_id"] is None or r.random() < 0.7 else None
    call["num_return_sequences"] = r.randint(1, call["num_beams"])
    call["length_penalty"] = r.choice([1.0, 0.0, -1.5, 2.0])
    call["early_stopping"] = r.choice([False, True, "never"])
    call["max_new_tokens"] = r.randint(1, 14)
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
    if count == 1 and call["eos_token_id"] is not None:  # in company, rows that are only filled up are asked about too
        more["stop"] = True
    return call | {name: more[name] for name in r.sample(sorted(more), r.choice([0, 0, 1, 2]))}


def _numbers(call: dict[str, Any]) -> set[str]:
    text = str(call.get("force_words_ids", call.get("constraints", "")))
    return set("".join(c if c.isdigit() else " " for c in text).split())


def _words(r: random.Random) -> list[Any]:
    """A phrase, or alternatives of which some begin alike and none with all of another."""
    if r.random() < 0.5:
        return [r.randint(1, 60) for _ in range(r.randint(1, 4))]
    first, kept = r.randint(1, 60), []
    for _ in range(r.randint(2, 4)):
        phrase = [first] * (r.random() < 0.6) + [r.randint(1, 12) for _ in range(r.randint(1, 3))]
        if not any(phrase[: len(k)] == k or k[: len(phrase)] == phrase for k in kept):
            kept.append(phrase)
    return kept


def make_model(kind: str) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.CONFIG)).eval()
    model.load_state_dict(tiny.weights())
    if kind == "table":
        forward = model.forward

        def look_up(input_ids: Any, **kwargs: Any) -> Any:
            out = forward(input_ids=input_ids, **kwargs)
            positions = kwargs["position_ids"].expand(input_ids.shape[0], -1)[:, -input_ids.shape[1] :]
            out.logits = tiny.look_up(input_ids, positions)[:, -out.logits.shape[1] :]
            return out

        look_up.__wrapped__ = forward  # type: ignore[attr-defined]
        model.forward = look_up
    return model


def answer(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Sequences and scores; where it is right, also which beams they are of and their running totals."""
    kwargs = tiny.arguments({k: v for k, v in call.items() if k != "model"}, transformers)
    kwargs["return_dict_in_generate"] = True
    try:
        out = model.generate(**kwargs, output_scores=True)
    except (
        RuntimeError,
        TypeError,
    ):  # an output that lacks a constraint has no beam indices there: it fails
        return {"sequences": model.generate(**kwargs).sequences.tolist()}
    result = {"sequences": out.sequences.tolist(), "sequences_scores": out.sequences_scores.tolist()}
    if "num_beam_groups" not in call and out.beam_indices is not None:
        totals = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        result |= {"beam_indices": out.beam_indices.tolist(), "totals": totals.tolist()}
    return result


def main() -> None:
    assert transformers.__version__.startswith("4.49.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    models = {kind: make_model(kind) for kind in ("llama", "table")}
    r = random.Random(4)
    calls = [draw(r, number) for number in range(CALLS)]
    with torch.no_grad():
        lines = [json.dumps({"call": call, "result": answer(models[call["model"]], call)}) for call in calls]
    path = Path(__file__).parent / "fixtures" / "beams_v4.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
