"""`unspool.inspect`: what it reads from outputs, and pages and terminals that no token can break."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies as st
from rich.console import Console

import unspool
from unspool.cli.run import run
from unspool.generate.outputs import Draft, GenerateDecoderOnlyOutput
from unspool.inspection.report import Report, Tree
from unspool.inspection.spelling import Speller, visible
from unspool.tokenization import Tokenizer

KEEP: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x07\x00",
    "\u202eright to left\u2066\u200b",
    "[bold red]markup[/]",
    "\u2028\u2029\x85",
    "\ud800",
    "\u0301",
    "a\r\nb\tc",
]


@pytest.fixture(scope="module")
def storyteller() -> tuple[Any, Any]:
    return unspool.load("storyteller", dtype=torch.float32)


def report_of(storyteller: tuple[Any, Any], texts: list[str], **kwargs: Any) -> tuple[Any, Report]:
    model, tokenizer = storyteller
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, **{**KEEP, **kwargs})
    return output, unspool.inspect(output, tokenizer).report


class FakeTokenizer:
    """Tokens with any texts."""

    eos_token_id = None
    pad_token_id = None

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.texts[i] for i in ids)


# What is read


def test_probabilities_ranks_and_alternatives(storyteller: tuple[Any, Any]) -> None:
    output, report = report_of(storyteller, ["One morning", "The"], max_new_tokens=8, do_sample=True, top_k=7, seed=2)
    begin = output.sequences.shape[1] - len(output.scores)
    for number, row in enumerate(report.rows):
        for i, step in enumerate(row.steps):
            scores, logits = output.scores[i][number], output.logits[i][number]
            assert step.id == output.sequences[number, begin + i]
            assert step.p == pytest.approx(float(scores.softmax(-1)[step.id]), rel=1e-5)
            assert step.own == pytest.approx(float(logits.softmax(-1)[step.id]), rel=1e-5)
            assert step.rank == 1 + int((scores > scores[step.id]).sum())
            assert step.allowed == int(scores.isfinite().sum()) <= 7
            chances = [other.p for other in step.others if other.p]
            assert chances == sorted(chances, reverse=True)
            assert chances[0] == pytest.approx(float(scores.softmax(-1).max()), rel=1e-5)
    assert report.rows[1].prompt == "<|begin|>The"  # no padding
    assert report.vocab == output.scores[0].shape[1]


def test_top_logprobs_stand_in_for_scores(storyteller: tuple[Any, Any]) -> None:
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    _, whole = report_of(storyteller, ["One morning"], output_logits=False, **kwargs)
    lean = {"output_scores": False, "output_logits": False, "output_top_logprobs": 5}
    _, tops = report_of(storyteller, ["One morning"], **lean, **kwargs)
    for one, other in zip(whole.rows[0].steps, tops.rows[0].steps, strict=True):
        assert other.p == pytest.approx(one.p, rel=1e-4)
        assert [a.text for a in other.others] == [a.text for a in one.others]
    assert tops.rows[0].steps[0].rank is None
    assert any("output_scores" in note for note in tops.notes)


def test_rows_end_where_they_ended(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    end = tokenizer(",", add_special_tokens=False)["input_ids"][0]
    inputs = tokenizer(["Once upon a time", "The old"], return_tensors="pt", padding=True)
    kwargs = {**KEEP, "max_new_tokens": 12, "do_sample": True, "seed": 5, "eos_token_id": end, "pad_token_id": 0}
    output = model.generate(**inputs, **kwargs)
    report = unspool.inspect(output, tokenizer, eos_token_id=end).report
    new = output.sequences[:, inputs.input_ids.shape[1] :].tolist()
    for row, ids, reason in zip(report.rows, new, output.finish_reasons, strict=True):
        length = ids.index(end) + 1 if reason == "stop" else len(ids)
        assert [step.id for step in row.steps] == ids[:length]
        assert row.finish == reason


def assert_drawable(tree: Tree) -> None:
    """Every node stands in one line, at a place of its own."""
    placed = [place for chain in tree.chains for place in chain]
    assert sorted(placed) == list(range(len(tree.nodes)))
    assert len({(node.step, node.lane) for node in tree.nodes}) == len(tree.nodes)
    assert tree.lanes == 1 + max(node.lane for node in tree.nodes)
    for place, node in enumerate(tree.nodes):
        assert node.parent < place
        assert node.step == (0 if node.parent < 0 else tree.nodes[node.parent].step + 1)


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "seed": 3}, {"num_beam_groups": 2, "diversity_penalty": 1.0}])
def test_beams(storyteller: tuple[Any, Any], mode: dict[str, Any]) -> None:
    kwargs = {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 10, **mode}
    output, report = report_of(storyteller, ["Once upon a time", "The fox and"], **kwargs)
    steps = output.beam_steps
    assert sum(len(tree.nodes) for tree in report.trees) >= 2 * 4
    for tree in report.trees:
        assert_drawable(tree)
        goes_on = {node.parent for node in tree.nodes}
        for place, node in enumerate(tree.nodes):
            if node.fate == "pruned":
                assert place not in goes_on
                assert node.until == node.step + 1
            elif node.fate == "went on":
                assert place in goes_on
    # the recorded rows are those that the outputs went through
    begin = output.sequences.shape[1] - output.beam_indices.shape[1]
    for ids, rows in zip(output.sequences[:, begin:].tolist(), output.beam_indices.tolist(), strict=True):
        for i in range(len(rows) - 1):
            if rows[i + 1] >= 0:
                place = steps[i].rows.index(rows[i + 1])
                assert (steps[i].parents[place], steps[i].tokens[place]) == (rows[i], ids[i])
    ends = {number: node for tree in report.trees for node in tree.nodes for number in node.outputs}
    assert sorted(ends) == list(range(6))
    for number, row in enumerate(report.rows):
        assert ends[number].step == len(row.steps) - 1
        assert ends[number].wins
        if not mode:
            assert ends[number].total / len(row.steps) == pytest.approx(row.score, rel=1e-5)


def test_every_beam_is_in_the_tree_and_pruned_when_nobody_continues_it(storyteller: tuple[Any, Any]) -> None:
    output, report = report_of(storyteller, ["A"], do_sample=False, num_beams=5, max_new_tokens=9)
    (tree,) = report.trees
    for number, step in enumerate(output.beam_steps):
        alive = [node for node in tree.nodes if node.step == number and node.fate != "returned"]
        assert len(alive) == 5
        if number:
            pruned = sum(node.until == number for node in tree.nodes)
            assert pruned == 5 - len(set(step.parents))


def test_drafts(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    draft, _ = unspool.load("storyteller-draft", dtype=torch.float32)
    inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
    output = model.generate(**inputs, **KEEP, max_new_tokens=24, do_sample=False, assistant_model=draft)
    report = unspool.inspect(output, tokenizer).report
    assert report.acceptance_rate == output.acceptance_rate
    for row, drafts in zip(report.rows, output.drafts, strict=True):
        assert sum(step.drafted for step in row.steps) == sum(part.accepted for part in drafts) == row.accepted
        assert sum(len(step.refused) for step in row.steps) == row.drafted - row.accepted


def test_drafts_are_placed_by_what_was_accepted() -> None:
    """A prompt that begins with the padding token looks shorter than it was."""
    tokenizer = FakeTokenizer(["<pad>", "a", "b", "c", "d"])
    tokenizer.pad_token_id = 0
    output = GenerateDecoderOnlyOutput(
        sequences=torch.tensor([[0, 1, 2, 3, 4, 1]]),
        scores=tuple(torch.zeros(1, 5) for _ in range(4)),
        drafts=[[Draft(2, [2, 3, 1], 2)]],
    )
    (row,) = unspool.inspect(output, tokenizer).report.rows
    assert [step.drafted for step in row.steps] == [True, True, False, False]
    assert [step.refused for step in row.steps] == [(), (), ("a",), ()]


def test_grammar_masks(storyteller: tuple[Any, Any]) -> None:
    pytest.importorskip("llguidance")
    model, tokenizer = storyteller
    inputs = tokenizer("The fox said:", return_tensors="pt")
    output = model.generate(**inputs, **KEEP, max_new_tokens=9, do_sample=False, regex="[0-9]{4}", tokenizer=tokenizer)
    seen = unspool.inspect(output, tokenizer)
    (row,) = seen.report.rows
    assert row.finish == "stop"
    assert [step.allowed for step in row.steps] == [int(scores[0].isfinite().sum()) for scores in output.scores]
    masked = [other for other in row.steps[0].others if other.p == 0]
    assert masked
    assert masked[0].own == pytest.approx(float(output.logits[0].softmax(-1).max()), rel=1e-5)
    assert "masked out" in seen.html


def test_outputs_of_transformers(tiny_llama_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    output = model.generate(**inputs, **kwargs, return_dict_in_generate=True, output_scores=True)
    report = unspool.inspect(output, tokenizer).report
    assert any("other beams were not recorded" in note for note in report.notes)
    for tree in report.trees:
        assert_drawable(tree)
    assert [step.id for step in report.rows[0].steps] == output.sequences[0, -5:].tolist()


# Texts of tokens


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = unspool.AutoTokenizer.from_pretrained("storyteller")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = "".join(Speller(tokenizer).pieces(ids))
    assert re.sub(r"⟨[0-9A-F]{2}⟩|◌", "", joined) == re.sub("◌", "", "".join(map(visible, text))).replace("◌", "")


def test_bytes_of_a_split_character_are_shown(storyteller: tuple[Any, Any]) -> None:
    tokenizer = storyteller[1]
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    pieces = Speller(tokenizer).pieces(ids)
    assert pieces[-1] == "日"
    assert "".join(pieces[:-1]) == "".join(f"⟨{byte:02X}⟩" for byte in "日".encode()[: len(pieces) - 1])
    cut = Speller(tokenizer).pieces([*ids[:-1], *tokenizer("a", add_special_tokens=False)["input_ids"]])
    assert cut[-1] == "a"
    assert cut[:-1] == pieces[:-1]


def test_byte_fallback_and_dropped_spaces() -> None:
    names = ["<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "▁fox", "ly"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    speller = Speller(Tokenizer(backend))
    assert speller.pieces([0, 1, 2]) == ["⟨E6⟩", "⟨97⟩", "日"]
    assert speller.pieces([3, 4, 5, 0]) == ["⟨FF⟩", " fox", "ly", "⟨E6⟩"]
    assert speller.name(2) == "⟨A5⟩"


def test_nothing_visible_acts() -> None:
    for text in HOSTILE:
        assert all(char.isprintable() or char in " \n" for char in visible(text))


# Pages and terminals


class Elements(HTMLParser):
    """Everything a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attributes}
        self._inside = dict(attributes).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def hostile_output(texts: list[str]) -> tuple[Any, FakeTokenizer]:
    steps = len(texts)
    scores = tuple(torch.randn(1, steps) for _ in range(steps))
    drafts = [[Draft(1 + i, [i, (i + 1) % steps], 1) for i in range(steps - 1)]]
    output = SimpleNamespace(sequences=torch.tensor([[0, *range(steps)]]), scores=scores, drafts=drafts)
    output.beam_indices = torch.zeros(1, steps, dtype=torch.int32)
    return output, FakeTokenizer(texts)


def test_hostile_tokens_do_nothing_in_a_page() -> None:
    quiet = Elements(unspool.inspect(*hostile_output(["a"] * len(HOSTILE))).html)
    page = unspool.inspect(*hostile_output(HOSTILE), title=HOSTILE[0]).html
    loud = Elements(page)
    assert loud.tags == quiet.tags
    assert loud.attributes == quiet.attributes
    assert loud.tags["script"] == 2
    assert not {name for name in loud.attributes if name.startswith("on")}
    names = {Speller(FakeTokenizer(HOSTILE)).name(token) for token in range(len(HOSTILE))}
    assert names <= set(json.loads(loud.texts["data"])["texts"])
    page.encode("utf-8")


def test_hostile_tokens_do_nothing_in_a_terminal() -> None:
    seen = unspool.inspect(*hostile_output(HOSTILE))
    console = Console(color_system=None, width=100)
    with console.capture() as capture:
        console.print(seen.terminal(every=True))
    text = capture.get()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "[bold red]markup[/]" in str(seen)


def test_a_page_loads_nothing(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    inputs = tokenizer("Once", return_tensors="pt")
    page = unspool.inspect(
        model.generate(**inputs, **KEEP, max_new_tokens=3, num_beams=2, do_sample=False), tokenizer
    ).html
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//|@import|url\(|src=|href=|fetch\(|XMLHttp", re.sub(r"<\?|'//'", "", page))


def test_notebooks_get_a_frame_of_its_own(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    seen = unspool.inspect(
        model.generate(**tokenizer("Once", return_tensors="pt"), **KEEP, max_new_tokens=2), tokenizer
    )
    (inner,) = re.findall(r'srcdoc="([^"]*)"', seen._repr_html_())
    assert html.unescape(inner) == seen.html
    assert 'sandbox="allow-scripts"' in seen._repr_html_()
    assert repr(seen) == "Inspection(1 rows, 2 tokens)"


def test_a_token_is_one_piece_and_its_line_break_stands_behind_it(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    inputs = tokenizer(["Once upon a time"], return_tensors="pt")
    newline = tokenizer("fox.\n").input_ids[-1]
    output = model.generate(
        **inputs, **KEEP, max_new_tokens=4, do_sample=False, sequence_bias={(newline,): 50.0}
    )  # fmt: skip
    text = tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :])
    assert text.count("\n") >= 2
    page = unspool.inspect(output, tokenizer).html
    inside = page[page.index('<div class="text"') : page.index("</div>", page.index('<div class="text"'))]
    assert inside.count("⏎</span>\n") == text.count("\n") == inside.count("⏎")


def test_long_outputs_make_small_pages() -> None:
    rows, steps, vocab = 8, 200, 500
    output = GenerateDecoderOnlyOutput(
        sequences=torch.randint(vocab, (rows, steps + 1)), scores=tuple(torch.randn(rows, vocab) for _ in range(steps))
    )
    page = unspool.inspect(output, FakeTokenizer([f" word{i}" for i in range(vocab)])).html
    assert len(page) < 200 * rows * steps


def test_save_leaves_no_halves(storyteller: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = storyteller
    seen = unspool.inspect(
        model.generate(**tokenizer("Once", return_tensors="pt"), **KEEP, max_new_tokens=2), tokenizer
    )
    assert seen.save(tmp_path / "page.html").read_text(encoding="utf-8") == seen.html
    with pytest.raises(FileNotFoundError):
        seen.save(tmp_path / "nowhere" / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


# Mistakes


def test_mistakes_are_told() -> None:
    tokenizer = FakeTokenizer(["a"])
    with pytest.raises(TypeError, match="return_dict_in_generate=True"):
        unspool.inspect(torch.zeros(1, 2, dtype=torch.int64), tokenizer)
    bare = GenerateDecoderOnlyOutput(sequences=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="output_scores=True"):
        unspool.inspect(bare, tokenizer)
    with pytest.raises(TypeError, match="decode"):
        unspool.inspect(bare, None)
    with pytest.raises(ValueError, match="top is 0"):
        unspool.inspect(bare, tokenizer, top=0)
    books = GenerateDecoderOnlyOutput(sequences=torch.zeros(1, 2, 3, dtype=torch.int64), scores=(torch.zeros(1, 2),))
    with pytest.raises(ValueError, match=r"\[1, 2, 3\]"):
        unspool.inspect(books, tokenizer)


# The command


def test_command_shows_tokens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["inspect", "Once upon a time", "--max-new-tokens", "6", "--greedy", "--all"]) == 0
    text = capsys.readouterr().out
    assert "6 tokens" in text
    assert "every token" in text
    assert max(map(len, text.splitlines())) <= 100


def test_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.html"
    beams = ["--num-beams", "3", "-n", "2", "--max-new-tokens", "5", "--html", str(target)]
    assert run(["inspect", "Once", *beams]) == 0
    assert "wrote" in capsys.readouterr().err
    assert Elements(target.read_text(encoding="utf-8")).tags["svg"] == 1


def test_command_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "Once", "--greedy", "--max-new-tokens", "8", "--assistant", "storyteller-draft"]) == 0
    assert "drafted tokens accepted" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--html", "nowhere/page.html"], "no folder"),
        (["--top", "0"], "at least 1"),
        (["--system", "x"], "--chat"),
    ],
)
def test_command_refuses(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "Once", *arguments]) == 2
    assert says in capsys.readouterr().err
