"""`unspool inspect`: a prompt in, and how its continuation came about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.cli.generate import encode, read_prompt
from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, note
from unspool.cli.text import load_model, room, rows_of

if TYPE_CHECKING:
    from unspool.generate.outputs import GenerateOutput
    from unspool.hub import CausalLM
    from unspool.tokenization import Tokenizer

__all__ = ["Request", "run"]

# New tokens when nobody names a limit; more would be much to look at.
NEW_TOKENS = 100

# Bytes of scores and logits to keep; beyond, only the likeliest tokens of each step are.
MOST_KEPT = 1 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the command, as its options say."""

    prompt: str | None
    model: ModelOptions
    settings: dict[str, Any]
    chat: bool
    system: str | None
    assistant: str | None
    html: Path | None
    every: bool
    top: int


def run(request: Request) -> None:
    """Generate, and show or write what there is to see."""
    if request.system is not None and not request.chat:
        raise UsageError("--system needs --chat")
    if request.top < 1:
        raise UsageError(f"--top {request.top}: at least 1 alternative must be shown")
    if request.html is not None and not request.html.absolute().parent.is_dir():
        raise UsageError(f"--html: there is no folder {request.html.absolute().parent}")
    prompt = read_prompt(request.prompt)
    model, tokenizer = load_model(request.model)
    output = _output(model, tokenizer, prompt, request)
    from unspool.inspection import inspect

    ends = request.settings.get("eos_token_id", model.generation_config.eos_token_id)
    seen = inspect(
        output, tokenizer, top=request.top, eos_token_id=ends, title=f"unspool inspect: {request.model.model}"
    )
    if request.html is not None:
        note(f"wrote {seen.save(request.html)}")
        return
    from rich.console import Console

    Console().print(seen.terminal(every=request.every))


def _output(model: CausalLM, tokenizer: Tokenizer, prompt: str, request: Request) -> GenerateOutput:
    """Generate with everything recorded that is to be shown."""
    from unspool.generate.outputs import GenerateOutput

    inputs = encode(tokenizer, prompt, request.chat, request.system)
    limited = {"max_new_tokens", "max_length"} & request.settings.keys()
    settings = request.settings if limited else {**request.settings, "max_new_tokens": NEW_TOKENS}
    settings = room(model, inputs["input_ids"].shape[1], settings)
    rows = max(rows_of(model, settings), int(settings.get("num_beams", model.generation_config.num_beams) or 1))
    steps = int(settings.get("max_new_tokens") or settings["max_length"])
    small = 2 * 4 * rows * steps * model.spec.vocab_size <= MOST_KEPT
    kept = {"output_scores": True, "output_logits": True} if small else {"output_top_logprobs": request.top}
    assistant = None
    if request.assistant is not None:
        assistant, _ = load_model(replace(request.model, model=request.assistant, revision=None))
    output = model.generate(
        **inputs.to(model.device),
        **settings,
        **kept,
        tokenizer=tokenizer,
        assistant_model=assistant,
        return_dict_in_generate=True,
    )
    assert isinstance(output, GenerateOutput)
    return output
