"""The commands and their help. A command reads its options and returns its work, which runs outside typer.

typer turns Ctrl-C, a closed pipe and the end of the input into errors of its own; the work must see them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from unspool.cli.options import refuse, split, structure, with_shared_options
from unspool.cli.run import UsageError

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Text from language models: the built-in storyteller, a checkpoint folder, or an id on the Hugging Face Hub.",
    epilog="Try: unspool generate 'Once upon a time'",
)

Work = Callable[[], None]

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="PATH_OR_ID", help="Built-in name, folder or Hub id.", rich_help_panel="Model"
    ),
]


def _flag(*names: str, help: str, **more: Any) -> Any:
    """A switch, shown without typer's `<bool>`."""
    return typer.Option(*names, help=help, metavar="", show_default=False, **more)


def _structure(metavar: str, help: str) -> Any:
    """An option that says what the text must be."""
    return typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel="Structure")


def _mode(metavar: str, help: str) -> Any:
    """An option that says how tokens are found."""
    return typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel="Mode")


def _load(metavar: str, help: str, **more: Any) -> Any:
    """An option that says what is asked of the model."""
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Load", **more)


def _version(asked: bool) -> None:
    if asked:
        from unspool import __version__

        print(f"unspool {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, _flag("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
@with_shared_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="How the text begins; - or nothing reads stdin.")
    ] = None,
    model: Model = "storyteller",
    chat: Annotated[bool, _flag("--chat", help="Ask it as a question, by the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, with --chat.")] = None,
    json_schema: Annotated[str | None, _structure("FILE_OR_JSON", "Write JSON that this schema describes.")] = None,
    regex: Annotated[str | None, _structure("PATTERN", "Write text that matches this regular expression.")] = None,
    grammar: Annotated[str | None, _structure("FILE", "Write text of this Lark grammar.")] = None,
    no_echo: Annotated[bool, _flag("--no-echo", help="Print only what follows the prompt.")] = False,
    no_stream: Annotated[bool, _flag("--no-stream", help="Print the text at the end, at once.")] = False,
    as_json: Annotated[bool, _flag("--json", help="Print one JSON object instead of text.")] = False,
    source: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="Prompts, a JSON object a line.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Where they go on, with --input.", show_default=False),
    ] = None,
    watch: Annotated[bool, _flag("--watch", help="Show the engine's numbers live, with --input.")] = False,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No closing line on stderr.")] = False,
    **options: Any,
) -> Work:
    """Continue a text, or with --input and --output every text of a file.

    The text goes to stdout as it is made. A closing line on stderr gives tokens, tokens/s, and time to first token.
    Lines of a file look like {"prompt": "Once", "max_new_tokens": 20}; a run that was killed can be started again.
    """
    from unspool.cli.generate import Request, run

    chosen, settings = split(model, {**options, **structure(json_schema, regex, grammar)})
    if source is not None or target is not None:
        from unspool.cli.batch import BatchFiles, run as run_batch

        if source is None or target is None or prompt is not None:
            raise UsageError("--input and --output go together, and without a PROMPT")
        unused = {"--system": system, "--no-echo": no_echo, "--no-stream": no_stream, "--json": as_json}
        refuse(unused, "has no meaning with --input; a line may have messages of its own, and becomes one JSON object")
        return partial(run_batch, BatchFiles(source, target), chosen, settings, chat, quiet, watch)
    if watch:
        raise UsageError("--watch goes with --input and --output")
    return partial(run, Request(prompt, chosen, settings, chat, system, not no_echo, not no_stream, as_json, quiet))


@app.command()
@with_shared_options
def chat(
    model: Model = "storyteller",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No figures after each answer.")] = False,
    **options: Any,
) -> Work:
    """Talk with a model.

    Ctrl-C stops the answer, Ctrl-D ends the talk; /reset forgets what was said. With piped input each line is one turn.
    """
    from unspool.cli.chat import run

    chosen, settings = split(model, options)
    return partial(run, chosen, settings, system, quiet)


@app.command()
@with_shared_options
def inspect(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="How the text begins; - or nothing reads stdin.")
    ] = None,
    model: Model = "storyteller",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.", show_default=False)] = None,
    every: Annotated[bool, _flag("--all", help="List every token, not the least likely ones only.")] = False,
    top: Annotated[int, typer.Option(metavar="N", help="Alternatives of each token.")] = 5,
    num_beams: Annotated[int | None, _mode("N", "Beam search with N beams; greedy unless --sample.")] = None,
    assistant: Annotated[str | None, _mode("PATH_OR_ID", "Draft with this smaller model.")] = None,
    chat: Annotated[bool, _flag("--chat", help="Ask it as a question, by the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, with --chat.")] = None,
    json_schema: Annotated[str | None, _structure("FILE_OR_JSON", "Write JSON that this schema describes.")] = None,
    regex: Annotated[str | None, _structure("PATTERN", "Write text that matches this regular expression.")] = None,
    grammar: Annotated[str | None, _structure("FILE", "Write text of this Lark grammar.")] = None,
    **options: Any,
) -> Work:
    """Show how a text came about: how sure each token was, what else was likely, how beams and drafts went.

    It writes 100 tokens unless --max-new-tokens says otherwise.
    """
    from unspool.cli.inspect import Request, run

    chosen, settings = split(model, {**options, "num_beams": num_beams, **structure(json_schema, regex, grammar)})
    if num_beams is not None:
        settings.setdefault("do_sample", False)
    return partial(run, Request(prompt, chosen, settings, chat, system, assistant, html, every, top))


@app.command()
@with_shared_options
def bench(
    model: Model = "storyteller",
    requests: Annotated[int | None, _load("N", "How many requests; 64, or all lines of --input.", min=1)] = None,
    prompt_tokens: Annotated[
        str | None, _load("N[:N]", "Length of prompts, drawn evenly between the two; 64:256.")
    ] = None,
    output_tokens: Annotated[str | None, _load("N[:N]", "Length of outputs, likewise; 32:128.")] = None,
    shared_prefix: Annotated[
        int | None, _load("N", "Tokens at the beginning that all prompts share; 0.", min=0)
    ] = None,
    rate: Annotated[
        float | None, _load("X", "Requests a second, at random moments; else all at once.", min=1e-6)
    ] = None,
    at_once: Annotated[int | None, _load("N", "Most requests that run at a time.", min=1)] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Prompts of your own, a JSON object a line.", show_default=False),
    ] = None,
    assistant: Annotated[str | None, _mode("PATH_OR_ID", "Draft with this smaller model.")] = None,
    chat: Annotated[bool, _flag("--chat", help="With --input: prompts are questions, by the chat template.")] = False,
    watch: Annotated[bool, _flag("--watch", help="Show the engine's numbers live.")] = False,
    as_json: Annotated[bool, _flag("--json", help="Print one JSON object instead of tables.")] = False,
    **options: Any,
) -> Work:
    """Measure how fast a model answers many requests at once.

    The load is random prompts, the same in every run, whose outputs have the length they are given; or a file.
    """
    from unspool.cli.bench import Load, run, span

    chosen, settings = split(model, options)
    lengths = {"--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens, "--shared-prefix": shared_prefix}
    if source is not None:
        refuse(lengths, "is for random prompts; leave it out with --input")
    else:
        refuse({"--chat": chat}, "goes with --input")
        limits = {"--max-new-tokens": "max_new_tokens", "--min-new-tokens": "min_new_tokens"}
        given = {flag: settings.get(name) for flag, name in limits.items()}
        refuse(given, "goes with --input; --output-tokens says how long outputs of random prompts are")
    prompt = span("--prompt-tokens", prompt_tokens or "64:256")
    output = span("--output-tokens", output_tokens or "32:128")
    load = Load(requests, prompt, output, shared_prefix or 0, rate, at_once, source, assistant)
    return partial(run, load, chosen, settings, chat, as_json, watch)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, folder or Hub id.")] = "storyteller",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")] = None,
    offline: Annotated[bool, _flag("--offline", help="Use only what was downloaded before.")] = False,
    everything: Annotated[bool, _flag("--all", help="Every generation setting and where it comes from.")] = False,
    as_json: Annotated[bool, _flag("--json", help="Print one JSON object.")] = False,
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="Load it with transformers to see how its module runs wrapped."),
    ] = None,
) -> Work:
    """Show what a model is and needs; reads weights only to see how a module of transformers runs (--probe)."""
    from unspool.cli.info import run

    return partial(run, model, revision, offline, everything, as_json, probe)
