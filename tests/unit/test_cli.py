"""The command line as a shell sees it: output, exit codes, pipes, signals, terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unspool import __version__
from unspool.cli.run import run

COMMAND = [sys.executable, "-m", "unspool.cli"]
PROMPT = "Once upon a time"
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("UNSPOOL_TRACEBACK", None)


def unspool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command with pipes at all ends."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def one_error(code: int, expected: int, output: str, errors: str) -> str:
    """The one line on stderr of a command that failed as expected and printed nothing."""
    assert code == expected, errors
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("unspool: error: ")
    return line


# Help, version, mistakes: no model is loaded


def test_version() -> None:
    result = unspool("--version")
    assert (result.returncode, result.stdout) == (0, f"unspool {__version__}\n")


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["inspect"], ["info"]])
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


# Makes stdin the controlling terminal, so that Ctrl-C reaches the program.
IN_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv[0] = 'unspool'\n"
    "from unspool.cli import main; main()"
)


# An answer of 400 tokens then takes 40 s, so that a key pressed while it is written cannot come too late.
SLOWLY = (
    "import time; from unspool.cli import text; put = text.Printer.put\n"
    "text.Printer.put = lambda self, ids: (time.sleep(0.1), put(self, ids))\n"
)


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self) -> None:
        """Take in some more of what the program shows."""
        ready, _, _ = select.select([self.descriptor], [], [], 60)
        assert ready, f"nothing more after {self.seen!r}"
        self.seen += os.read(self.descriptor, 4096).decode(errors="replace")

    def press(self, key: str, until: str, since: int) -> int:
        """Type a key again and again until `until` appears: input() may miss a signal while it sets itself up."""
        for _ in range(60):
            self.type(key)
            ready, _, _ = select.select([self.descriptor], [], [], 1)
            if ready:
                return self.wait_for(until, since)
        pytest.fail(f"{key!r} does nothing after {self.seen!r}")

    def wait_for(self, text: str, since: int = 0) -> int:
        """Read until `text` appears behind `since`; returns the place behind it."""
        while (at := self.seen.find(text, since)) < 0:
            self.read()
        return at + len(text)


@contextmanager
def terminal(*arguments: str, before: str = "") -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", before + IN_TERMINAL, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


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


# Files of prompts


def lines_of(path: Path) -> dict[int, dict[str, object]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["line"] for line in found}) == len(found), "no line twice"
    return {line["line"]: line for line in found}


def test_a_file_of_prompts(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "Once upon a time", "id": "first"}\n'
        '{"prompt": "The fox", "max_new_tokens": 3}\n'
        "no json\n"
        '{"prompt": "The owl", "temprature": 2}\n'
        '{"max_new_tokens": 3}\n'
        '{"prompt": "A river", "do_sample": true, "seed": 1, "num_return_sequences": 2}\n'
        '{"messages": [{"role": "user", "content": "Hello"}]}'
    )
    command = ["generate", "-m", tiny_llama_dir, "--input", source, "--output", target, "--max-new-tokens", "5"]
    result = unspool(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert [line for line in result.stderr.splitlines() if "line 3:" in line or "line 4:" in line or "line 5:" in line]
    assert "7 lines written, 3 of them with an error" in result.stderr
    lines = lines_of(target)
    assert sorted(lines) == list(range(1, 8))
    alone = json.loads(
        unspool("generate", "-m", tiny_llama_dir, "--max-new-tokens", "5", "--json", "Once upon a time").stdout
    )
    assert lines[1]["id"] == "first"
    assert lines[1]["text"] == alone["outputs"][0]["text"]
    assert lines[2]["tokens"] == 3
    assert [lines[i]["finish_reason"] for i in (3, 4, 5)] == ["rejected"] * 3
    assert "temprature" in str(lines[4]["error"])
    assert len(lines[6]["outputs"]) == 2  # type: ignore[arg-type]

    whole = target.read_bytes()
    again = unspool(*command)
    assert (again.returncode, target.read_bytes()) == (0, whole)
    target.write_bytes(whole[: whole.index(b"\n") + 20])  # as a kill may leave it
    assert unspool(*command).returncode == 0
    assert lines_of(target) == lines


def test_a_file_of_prompts_after_a_kill(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "The fox {i}", "max_new_tokens": {1 + i * 3}}}\n' for i in range(60)))
    command = [*COMMAND, "generate", "-m", str(tiny_llama_dir), "--input", str(source), "--output", str(target)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not target.exists() or target.stat().st_size < 200:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = target.read_bytes()
    result = unspool(*command[len(COMMAND) :])
    assert result.returncode == 0, result.stderr
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(lines_of(target)) == list(range(1, 61))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "x"], "go together"),
        (["--output", "x"], "go together"),
        (["--input", "x", "--output", "y", "Once"], "go together"),
        (["--input", "nowhere.jsonl", "--output", "y"], "no such file"),
        (["--input", "pyproject.toml", "--output", "pyproject.toml"], "is the input"),
        (["--input", "pyproject.toml", "--output", "README.md"], "not of this command"),
    ],
)
def test_mistakes_about_files(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).write_text("text\n")
    monkeypatch.chdir(tmp_path)
    code = run(["generate", *arguments])
    assert says in one_error(code, 2, *capsys.readouterr())
    assert (tmp_path / "README.md").read_text() == "text\n"
