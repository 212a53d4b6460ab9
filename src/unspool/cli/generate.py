"""`unspool generate`: a prompt in, its continuation out."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError
from unspool.cli.text import Clock, Printer, Text, complete, continuation, dim, encode_chat, load_model, room, rows_of

if TYPE_CHECKING:
    from unspool.config import GenerationConfig
    from unspool.generate.outputs import GenerateOutput
    from unspool.tokenization import BatchEncoding, Tokenizer

__all__ = ["Request", "encode", "read_prompt", "run"]


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the command, as its options say."""

    prompt: str | None
    model: ModelOptions
    settings: dict[str, Any]
    chat: bool
    system: str | None
    echo: bool
    stream: bool
    as_json: bool
    quiet: bool


def run(request: Request) -> None:
    """Generate and print."""
    if request.system is not None and not request.chat:
        raise UsageError("--system needs --chat")
    prompt = read_prompt(request.prompt)
    model, tokenizer = load_model(request.model)
    inputs = encode(tokenizer, prompt, request.chat, request.system)
    prompt_ids: list[int] = inputs["input_ids"][0].tolist()
    settings = room(model, len(prompt_ids), request.settings)
    several = rows_of(model, settings) > 1
    streamed = request.stream and not request.as_json and not several
    lead = prompt if request.echo and not request.chat else ""
    clock = Clock(Printer(tokenizer, prompt_ids, lead=dim(lead)) if streamed else None)
    output = complete(model, tokenizer, inputs, settings, clock)
    texts = _texts(output, prompt_ids, tokenizer, settings, model.generation_config)
    if request.as_json:
        _write(json.dumps(_report(prompt, len(prompt_ids), texts, clock), ensure_ascii=False) + "\n")
    elif streamed:
        _write("" if texts[0].text.endswith("\n") else "\n")
    else:
        _write("---\n".join(f"{dim(lead)}{text.text.removesuffix(chr(10))}\n" for text in texts))
    if not request.quiet:
        full = not several and texts[0].finish_reason == "length"
        clock.say(sum(text.tokens for text in texts), "; stopped at the limit of tokens" if full else "")


def read_prompt(argument: str | None) -> str:
    """The argument, or all of stdin less its last line break."""
    if argument is not None and argument != "-":
        return argument
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no prompt: write unspool generate "Once upon a time", or pipe a text in')
    return sys.stdin.read().removesuffix("\n")


def encode(tokenizer: Tokenizer, prompt: str, chat: bool, system_message: str | None) -> BatchEncoding:
    """The prompt as it is, or as a question by the model's chat template.

    Raises:
        UsageError: a system message without `chat`, or a model without template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    system = [] if system_message is None else [{"role": "system", "content": system_message}]
    return encode_chat(tokenizer, [*system, {"role": "user", "content": prompt}])


def _texts(
    output: GenerateOutput,
    prompt_ids: list[int],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    defaults: GenerationConfig,
) -> list[Text]:
    """What each row wrote."""
    ends = settings.get("eos_token_id", defaults.eos_token_id)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pad = settings.get("pad_token_id", defaults.pad_token_id)
    reasons = output.finish_reasons or []
    rows: list[list[int]] = output.sequences[:, len(prompt_ids) :].tolist()
    return [continuation(tokenizer, prompt_ids, row, ends, pad, why) for row, why in zip(rows, reasons, strict=True)]


def _report(prompt: str, prompt_tokens: int, texts: list[Text], clock: Clock) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "outputs": [{"text": text.text, "tokens": text.tokens, "finish_reason": text.finish_reason} for text in texts],
        "tokens_per_second": round(clock.rate(sum(text.tokens for text in texts)), 3),
        "time_to_first_token": round(clock.time_to_first_token, 6),
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
