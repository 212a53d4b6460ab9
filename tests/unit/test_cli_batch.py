"""Files of prompts, and the measuring of many requests: what is written, what a kill leaves, what is shown."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, ENVIRONMENT, one_error, terminal, unspool

from unspool.cli.bench import _spread
from unspool.cli.run import run


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_file_of_prompts_after_a_kill(tiny_llama_dir: Path, tmp_path: Path, how: signal.Signals) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "The fox {i}", "max_new_tokens": {1 + i * 3}}}\n' for i in range(60)))
    command = [*COMMAND, "generate", "-m", str(tiny_llama_dir), "--input", str(source), "--output", str(target)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while not target.exists() or target.stat().st_size < 200:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
    before = target.read_bytes()
    if how is signal.SIGINT:
        assert process.returncode == 130
        done = before.count(b"\n")
        assert said == f"unspool: interrupted after {done} lines; the same command goes on with the rest\n"
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


def test_settings_that_are_not_for_lines(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What would make other outputs than one for each line is refused like a misspelt setting."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "The fox", "streaming": true}\n'
        '{"prompt": "The fox", "request_id": "x"}\n'
        '{"prompt": "The fox", "max_new_tokens": 2, "priority": 1, "deadline": 50, "cache_salt": "me"}\n'
    )
    assert run(["generate", "-m", str(tiny_llama_dir), "--input", str(source), "--output", str(target)]) == 0
    lines = lines_of(target)
    assert "streaming" in str(lines[1]["error"]) and "request_id" in str(lines[2]["error"])
    assert lines[3]["finish_reason"] == "length"


def test_two_runs_at_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fcntl import LOCK_EX, flock

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "The fox"}\n')
    with target.open("ab") as other:
        flock(other, LOCK_EX)
        code = run(["generate", "--input", str(source), "--output", str(target)])
    assert "another run" in one_error(code, 2, *capsys.readouterr())


def test_watching_a_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "The fox", "max_new_tokens": 5}\n' * 3 + "broken\n")
    options = ["-m", str(tiny_llama_dir), "--input", str(source), "--output", str(target), "--watch"]
    with terminal("generate", *options) as (screen, process):
        for text in ("running", "tokens/s", "prefix hits", "4 lines written, 1 of them with an error"):
            screen.wait_for(text)
        assert process.wait(60) == 0
    assert "Traceback" not in screen.seen
    assert sorted(lines_of(target)) == [1, 2, 3, 4]


# unspool bench


def test_bench(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests", "9", "--prompt-tokens", "20:40", "--output-tokens", "3:6", "--shared-prefix", "16"]
    reports = []
    for more in ([], ["--rate", "500", "--at-once", "2", "--set", "prompt_lookup_num_tokens=2"]):
        assert run(["bench", "-m", str(tiny_llama_dir), *options, "--json", *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, second = reports
    assert first["requests"] == 9 and first["failed"] == 0 and first["first_error"] is None
    assert 9 * 20 <= first["prompt_tokens"] == second["prompt_tokens"] <= 9 * 40
    assert 9 * 3 <= first["output_tokens"] == second["output_tokens"] <= 9 * 6, "the same load"
    assert first["cached_tokens"] == 8 * 16
    assert first["prefix_hits"] == 8 * 16 / first["prompt_tokens"]
    assert first["computed_tokens"] == first["prompt_tokens"] - 8 * 16 + first["output_tokens"] - 9
    assert first["output_tokens_per_second"] == first["output_tokens"] / first["seconds"]
    assert first["acceptance"] is None and 0 <= second["acceptance"] <= 1
    for name in ("time_to_first_token", "time_per_token", "time_between_tokens", "time_per_request"):
        spread = first[name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"] <= first["seconds"]
    assert first["time_to_first_token"]["max"] < first["time_per_request"]["max"]


def test_bench_of_a_file(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "The fox", "max_new_tokens": 4}\n' * 3 + '{"prompt": "The owl", "top_p": 7}\n')
    command = ["bench", "-m", str(tiny_llama_dir), "--input", str(source)]
    assert run(command) == 0
    shown, errors = capsys.readouterr()
    assert "3 done, 1 failed" in shown and "top_p" in shown
    assert "(12 tokens)" in shown
    assert "time to first token" in shown and "p99" in shown
    assert errors == ""
    assert run([*command, "--requests", "2", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert (two["requests"], two["output_tokens"]) == (2, 8)


def test_watching_a_bench(tiny_llama_dir: Path) -> None:
    options = ["--requests", "3", "--prompt-tokens", "20", "--output-tokens", "4", "--watch"]
    with terminal("bench", "-m", str(tiny_llama_dir), *options) as (screen, process):
        for text in ("running", "preemptions", "p99"):
            screen.wait_for(text)
        assert process.wait(60) == 0
    assert "Traceback" not in screen.seen


def test_percentiles() -> None:
    spread: Any = _spread([4.0, 1.0, 2.0, 3.0, 10.0])
    assert spread == {"mean": 4.0, "p50": 3.0, "p90": pytest.approx(7.6), "p99": pytest.approx(9.76), "max": 10.0}
    assert _spread([]) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "--input", "{file}", "--output", "out", "--system", "Be kind."), "--system has no meaning"),
        (("generate", "--input", "{file}", "--output", "out", "--json"), "--json has no meaning"),
        (("bench", "--input", "{file}", "--prompt-tokens", "5"), "--prompt-tokens is for random prompts"),
        (("bench", "--chat"), "--chat goes with --input"),
        (("bench", "--max-new-tokens", "5"), "--output-tokens says"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "Once"}\n')
    assert run([one.format(file=file) for one in arguments]) == 2
    assert said in capfd.readouterr().err


def test_a_prompt_is_not_echoed_before_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "Once", "--regex", "("]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "regex cannot be used" in err
