"""The command line as a shell sees it: output, exit codes, pipes, signals, terminals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from commands import COMMAND, ENVIRONMENT, one_error, terminal, unspool

from unspool import __version__
from unspool.cli.run import run

PROMPT = "Once upon a time"


# Help, version, mistakes: no model is loaded


def test_version() -> None:
    result = unspool("--version")
    assert (result.returncode, result.stdout) == (0, f"unspool {__version__}\n")


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["inspect"], ["bench"], ["info"]])
def test_help_fits_a_terminal(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: unspool" in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from unspool.cli.run import run; run(['generate', '--help'])\n"
        "print(*({'torch', 'tokenizers', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", PROMPT, "--temprature", "2"], "--temprature"),
        (["generate", PROMPT, "--temperature", "warm"], "--temperature"),
        (["generate", PROMPT, "--temperature", "-1"], "temperature"),
        (["generate", PROMPT, "--top-p", "1.5"], "top_p"),
        (["generate", PROMPT, "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", PROMPT, "--greedy", "--top-k", "5"], "--top-k"),
        (["generate", PROMPT, "--set", "beam"], "NAME=JSON"),
        (["generate", PROMPT, "--set", "no_such_field=1"], "no_such_field"),
        (["generate", PROMPT, "--system", "Be kind"], "--chat"),
        (["generate", PROMPT, "--regex", "a", "--json-schema", "{}"], "json_schema and regex are both set"),
        (["generate", PROMPT, "--json-schema", "{nothing}"], "json_schema is not valid JSON"),
        (["generate", PROMPT, "--grammar", "/no/such.lark"], "/no/such.lark"),
        (["generate", PROMPT, "--threads", "0"], "--threads"),
        (["generate", PROMPT, "--watch"], "--input"),
        (["bench", "--prompt-tokens", "many"], "one number of tokens or two"),
        (["bench", "--output-tokens", "9:8"], "at most the second"),
        (["bench", "--output-tokens", "0"], "at least 1"),
        (["bench", "--requests", "0"], "--requests"),
        (["bench", "--rate", "0"], "--rate"),
        (["bench", "--shared-prefix", "64"], "--shared-prefix"),
        (["bench", "--prompt-tokens", "1000", "--output-tokens", "25"], "1024 positions"),
        (["bench", "--input", "/no/such.jsonl"], "no such file"),
        (["bench", "--watch"], "no terminal"),
        (["tell"], "tell"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(arguments)
    assert says in one_error(code, 2, *capsys.readouterr())


@pytest.mark.parametrize("command", [["generate", PROMPT, "--model"], ["chat", "--model"], ["info"]])
def test_no_such_model(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = run([*command, "no/such/model"])
    assert "no/such/model" in one_error(code, 1, *capsys.readouterr())


def test_traceback_on_request() -> None:
    environment = {**ENVIRONMENT, "UNSPOOL_TRACEBACK": "1"}
    result = subprocess.run(
        [*COMMAND, "info", "/no/such"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_structured_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "go.lark").write_text('start: "go" | "stay"')
    base = ["generate", PROMPT, "--no-echo", "--seed", "1"]
    for value in (json.dumps(schema), str(tmp_path / "schema.json")):
        assert run([*base, "--json-schema", value]) == 0
        assert isinstance(json.loads(capsys.readouterr().out)["far"], bool)
    assert run([*base, "--regex", "(yes|no)"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert run([*base, "--grammar", str(tmp_path / "go.lark")]) == 0
    assert capsys.readouterr().out in ("go\n", "stay\n")


def test_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    from unspool import load

    model, tokenizer = load()
    model.load_adapter("storyteller-pirate")
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    options = ["--greedy", "--max-new-tokens", "20", "--quiet"]
    assert run(["generate", PROMPT, "--adapter", "storyteller-pirate", *options]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == expected.removesuffix("\n")
    code = run(["generate", PROMPT, "--adapter", "./no/such"])
    assert "no adapter's folder" in one_error(code, 1, *capsys.readouterr())


# info


def test_info(tiny_llama_dir: Path) -> None:
    result = unspool("info", tiny_llama_dir)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for fact in ("llama (LlamaForCausalLM)", "2 layers", "42,592", "float32 170 kB", "256 B a token", "eos_token_id"):
        assert fact in result.stdout


def test_info_as_json_reads_no_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headers"
    folder.mkdir()
    for file in tiny_llama_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    whole = unspool("info", folder, "--json")
    facts = json.loads(whole.stdout)
    assert facts["parameters"] == 42_592
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert facts["memory_bytes"]["bfloat16"] == 2 * 42_592
    assert facts["generation"]["eos_token_id"] == 1
    weights.unlink()
    assert json.loads(unspool("info", folder, "--json").stdout)["weights_files"] == 0


def test_info_on_a_model_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    result = unspool("info", tmp_path)
    assert result.returncode == 0
    assert re.search(r"runs here +no: .*'mamba'", result.stdout)
    assert re.search(r"wrapped +not looked at: its weights are not here\n", result.stdout)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bloom", "rows, because its forward takes no position_ids"),
        ("t5", "rows, because it has an encoder"),
        ("ctrl", "ragged"),
    ],
)
def test_info_tells_how_a_module_of_transformers_runs(
    kind: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = next(one for one in ARCHITECTURES if one.model_type == kind).make()
    model.save_pretrained(tmp_path)
    capsys.readouterr()  # of saving
    assert run(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"runs here +wrapped alone: unspool.wrap", out)
    assert re.search(rf"wrapped +{says}\n", out)
    assert run(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [facts["wrapped"], facts["wrapped_reason"]] == (says.split(", because ") + [None])[:2]
    assert run(["info", str(tmp_path), "--no-probe"]) == 0
    assert "wrapped  " not in capsys.readouterr().out


def test_info_on_weights_that_transformers_cannot_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(one for one in ARCHITECTURES if one.model_type == "ctrl").make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-kind"}')
    assert run(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"runs here +no: .*'no-such-kind'", out)
    assert re.search(r"wrapped +not looked at: transformers cannot load it: .*no-such-kind", out)


def test_info_on_a_native_model_as_transformers_runs_it(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(tiny_llama_dir), "--probe"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"runs here +yes", out)
    assert re.search(r"wrapped +ragged\n", out)


# generate


def test_generate_prints_prompt_and_continuation(tiny_llama_dir: Path) -> None:
    result = unspool("generate", PROMPT, "--model", tiny_llama_dir, "--max-new-tokens", "12", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(PROMPT)
    assert result.stdout.endswith("\n")
    assert "\x1b" not in result.stdout
    assert re.fullmatch(
        r"unspool: \d+ tokens?, [\d.]+ tokens/s, first token after [\d.]+ s(; stopped at the limit of tokens)?\n",
        result.stderr,
    )


def test_generate_gives_the_librarys_text(tiny_llama_dir: Path) -> None:
    from unspool import load

    model, tokenizer = load(tiny_llama_dir)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=0.7, seed=3)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    options = ["--model", tiny_llama_dir, "--max-new-tokens", "12", "--temperature", "0.7", "--seed", "3", "--quiet"]
    streamed = unspool("generate", PROMPT, *options)
    assert streamed.stdout.removesuffix("\n") == expected.removesuffix("\n")
    whole = unspool("generate", PROMPT, *options, "--no-stream", "--no-echo")
    assert PROMPT + whole.stdout.removesuffix("\n") == expected.removesuffix("\n")
    assert streamed.stderr == whole.stderr == ""


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_generate_reads_a_pipe(tiny_llama_dir: Path, argument: list[str]) -> None:
    options = ["--model", tiny_llama_dir, "--max-new-tokens", "3", "--greedy"]
    piped = unspool("generate", *argument, *options, stdin=f"{PROMPT}\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == unspool("generate", PROMPT, *options).stdout


def test_generate_as_json(tiny_llama_dir: Path) -> None:
    options = ["--model", tiny_llama_dir, "--max-new-tokens", "5", "-n", "3", "--seed", "0", "--set", "top_k=null"]
    result = unspool("generate", PROMPT, *options, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["prompt"] == PROMPT
    assert len(report["outputs"]) == 3
    for output in report["outputs"]:
        assert set(output) == {"text", "tokens", "finish_reason"}
        assert 1 <= output["tokens"] <= 5
        assert output["finish_reason"] in ("stop", "length")


def test_generate_by_chat_template(tiny_llama_dir: Path) -> None:
    options = ["--model", tiny_llama_dir, "--max-new-tokens", "4", "--greedy", "--json"]
    plain = json.loads(unspool("generate", PROMPT, *options).stdout)
    chat = json.loads(unspool("generate", PROMPT, *options, "--chat", "--system", "Be brief.").stdout)
    assert chat["prompt_tokens"] > plain["prompt_tokens"]


def test_generate_into_a_closed_pipe(tiny_llama_dir: Path) -> None:
    """As in `unspool generate … | head -1`: it ends, and says nothing."""
    command = [
        *COMMAND,
        "generate",
        "a\nb\n",
        "--model",
        str(tiny_llama_dir),
        "--max-new-tokens",
        "400",
        "--min-new-tokens",
        "400",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "a\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()


def test_generate_is_interrupted(tiny_llama_dir: Path) -> None:
    command = [
        *COMMAND,
        "generate",
        "a\n",
        "--model",
        str(tiny_llama_dir),
        "--max-new-tokens",
        "500",
        "--min-new-tokens",
        "500",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "a\n"
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.stderr.read() == ""
    assert process.wait(60) == 130
    process.stdout.close()
    process.stderr.close()


# chat


def test_chat_answers_each_line_of_a_pipe(tiny_llama_dir: Path) -> None:
    options = ["--model", tiny_llama_dir, "--max-new-tokens", "3", "--seed", "1"]
    result = unspool("chat", *options, stdin="hello\n\nwho are you?\n")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"tokens/s", result.stderr)) == 2
    assert "hello" not in result.stdout


def test_chat_needs_a_template(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.iterdir():
        if not file.name.startswith("chat_template"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = unspool("chat", "--model", tmp_path, stdin="hello\n")
    assert "chat template" in one_error(result.returncode, 2, result.stdout, result.stderr)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_answers_break_between_words(size: int) -> None:
    from unspool.cli.text import Lines

    text = "Once upon a time\n\nthere was a supercalifragilistic fox.  It lived in a den. \tThe end"
    lines = Lines(12)
    shown = "".join(lines.push(text[i : i + size]) for i in range(0, len(text), size)) + lines.finish()
    assert [word for line in shown.split("\n") for word in line.split()] == text.split()
    assert shown.startswith("Once upon a \ntime\n\nthere was a \n")
    assert [line.strip() for line in shown.split("\n") if len(line) > 12] == ["supercalifragilistic"]


# An answer of 400 tokens then takes 40 s, so that a key pressed while it is written cannot come too late.
SLOWLY = (
    "import time; from unspool.cli import text; put = text.Printer.put\n"
    "text.Printer.put = lambda self, ids: (time.sleep(0.1), put(self, ids))\n"
)


def test_chat_ctrl_c_stops_the_answer_only(tiny_llama_dir: Path) -> None:
    options = ["--model", str(tiny_llama_dir), "--min-new-tokens", "400", "--max-new-tokens", "400"]
    with terminal("chat", *options, before=SLOWLY) as (screen, process):
        at = screen.wait_for("> ")
        screen.type("hello\n")
        at = screen.wait_for("hello\r\n", at)
        while len(screen.seen) < at + 3:  # the answer has begun
            screen.read()
        screen.type("\x03")
        at = screen.wait_for("\r\n> ", at)
        assert "tokens/s" not in screen.seen
        screen.type("/reset\n")
        at = screen.wait_for("forgotten", at)
        at = screen.wait_for("> ", at)
        screen.press("\x03", "\r\n> ", at)  # at the prompt: a new line
        assert process.poll() is None
        screen.type("\x04")
        assert process.wait(60) == 0
    assert "Traceback" not in screen.seen


def test_chat_commands(tiny_llama_dir: Path) -> None:
    with terminal("chat", "--model", str(tiny_llama_dir), "--max-new-tokens", "3") as (screen, process):
        at = screen.wait_for("> ")
        screen.type("/help\n")
        at = screen.wait_for("Ctrl-C", at)
        screen.type("/dance\n")
        at = screen.wait_for("there is no /dance", at)
        screen.type("hello\n")
        at = screen.wait_for("tokens/s", at)
        screen.type("exit\n")
        assert process.wait(60) == 0
