"""All layers of a decoder as one compiled call: the same bits as layer by layer, and only where nobody listens."""

from __future__ import annotations

import copy
import ctypes
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_checkpoint
from hypothesis import given, settings, strategies as st

import unspool
from unspool.attention.registry import paged_attention
from unspool.cache.paged import PagedStore
from unspool.decode.runner import PagedRunner
from unspool.decode.sequence import Group, Sequence, Want, Work
from unspool.kernels import native, program, structs
from unspool.kernels.attention import Plan, Pools
from unspool.kernels.best import best
from unspool.kernels.elementwise import add_rms_norm, norm_heads, rms_norm, silu_gate, turn as rotate
from unspool.kernels.linear import PackedWeight
from unspool.kernels.program import Past, Program, Stops
from unspool.kernels.quantised import PackedCodes
from unspool.models.base import Batch
from unspool.models.compiled import CompiledLayers

pytestmark = pytest.mark.skipif(not native.active(), reason="the compiled kernels are not in use")

LAMAS = [name for name in FAMILIES if name != "gpt2"]
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 20, 21, 22, 23, 24]])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step, whether it was one call, with what stands before and after the layers or without."""
    seen: list[bool] = []
    run, step = CompiledLayers.run, CompiledLayers.step

    def watched(self: CompiledLayers, *args: Any) -> Any:
        out = run(self, *args)
        seen.append(out is not None)
        return out

    def watched_step(self: CompiledLayers, *args: Any) -> Any:
        out = step(self, *args)
        if out is not None:
            seen.append(True)
        return out

    monkeypatch.setattr(CompiledLayers, "run", watched)
    monkeypatch.setattr(CompiledLayers, "step", watched_step)
    return seen


def written(folder: Path, family: str, seed: int = 0) -> Path:
    make_checkpoint(family, folder, seed)
    return folder


def load(path: Path, kind: str | None = None) -> Any:
    return unspool.AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16", quantization_config=kind)


def logits(model: Any, ids: torch.Tensor = PROMPTS, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(
        ids, attention_mask=(ids != 0).long(), output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(out.logits)


def layer_by_layer(monkeypatch: pytest.MonkeyPatch, model: Any, *args: Any, **options: Any) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(CompiledLayers, "run", lambda *_: None)
        patched.setattr(CompiledLayers, "step", lambda *_: None)
        return logits(model, *args, **options)


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("family", LAMAS)
def test_same_bits(
    family: str, kind: str | None, tmp_path: Path, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(written(tmp_path, family), kind)
    compiled = logits(model)
    assert runs and all(runs)
    assert torch.equal(compiled, layer_by_layer(monkeypatch, model))


def test_an_fp32_model_of_bytes(tmp_path: Path, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "qwen3")
    model = unspool.AutoModelForCausalLM.from_pretrained(path, dtype="float32", quantization_config="int8")
    compiled = logits(model)
    assert all(runs)
    assert torch.equal(compiled, layer_by_layer(monkeypatch, model))


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "float32", "quantization_config": "int4"}])
def test_weights_without_such_kernels_go_layer_by_layer(
    options: dict[str, str], tmp_path: Path, runs: list[bool]
) -> None:
    model = unspool.AutoModelForCausalLM.from_pretrained(written(tmp_path, "llama"), **options)
    logits(model)
    assert runs and not any(runs)


def test_fewer_layers(tmp_path: Path, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(written(tmp_path, "llama"))
    options = {"assistant_early_exit": 2, "num_assistant_tokens": 3}
    compiled = model.generate(PROMPTS, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    assert runs and all(runs)
    assert torch.equal(compiled, model.generate(PROMPTS, max_new_tokens=12, do_sample=False, pad_token_id=0))


def test_hooks_are_called(tmp_path: Path, runs: list[bool]) -> None:
    model = load(written(tmp_path, "llama"))
    before = logits(model)
    calls: list[int] = []
    handle = model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(model), before)
    assert len(calls) == 12
    handle.remove()
    runs.clear()
    logits(model)
    assert all(runs)


def test_a_hook_that_changes_what_a_layer_gives(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    before = logits(model)
    handle = model.layers[0].attention.out.register_forward_hook(lambda _, __, out: out * 2)
    assert not torch.equal(logits(model), before)
    handle.remove()
    assert torch.equal(logits(model), before)


def test_exchanged_weights_and_modules_count(tmp_path: Path, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = load(written(tmp_path / "a", "llama")), load(written(tmp_path / "b", "llama", seed=1))
    seen = [logits(model)]

    def new(change: str) -> None:
        now = logits(model)
        assert all(runs), change
        assert not any(torch.equal(now, old) for old in seen), change
        assert torch.equal(now, layer_by_layer(monkeypatch, model)), change
        seen.append(now)
        runs.clear()

    with torch.no_grad():
        model.layers[0].mlp_norm.weight.mul_(2)
    new("a norm, in place")
    model.layers[0].mlp_norm.weight = torch.nn.Parameter(torch.full_like(model.layers[0].mlp_norm.weight, 0.5))
    new("a norm's parameter")
    model.layers[1].mlp_norm.weight.data = torch.full_like(model.layers[1].mlp_norm.weight, 0.5)
    new("a norm's data")
    model.layers[1].attention.qkv = other.layers[1].attention.qkv
    new("a linear layer")
    model.layers[2] = other.layers[2]
    new("a layer")
    model.norm = other.norm
    new("the last norm")
    model.layers[0].attention.scale *= 1.5
    new("a number")
    model.layers = torch.nn.ModuleList(reversed(model.layers[1:]))
    for place, layer in enumerate(model.layers):
        layer.attention.layer = place
    new("all layers")
    model.layers[0].mlp.down.unpack()
    with torch.no_grad():
        model.layers[0].mlp.down.weight.mul_(0.5)
    model.layers[0].mlp.down.pack()
    new("a packed weight")


def test_training_in_between(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    before = logits(model)
    model.train().requires_grad_()
    model(PROMPTS[:1], labels=PROMPTS[:1]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.5)
    model.eval()
    trained = logits(model)
    assert not torch.equal(trained, before)
    model.pack()
    assert not torch.equal(logits(model), before)


def test_copies(tmp_path: Path, runs: list[bool]) -> None:
    model = load(written(tmp_path, "llama"), "int8")
    before = logits(model)
    other = copy.deepcopy(model)
    runs.clear()
    assert torch.equal(logits(other), before)
    assert all(runs)
    with torch.no_grad():
        other.layers[0].mlp_norm.weight.mul_(3)
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("cut", [1, 5])
def test_prompts_in_chunks(cut: int, tmp_path: Path, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(written(tmp_path, "qwen2-window"))
    whole = logits(model)
    assert torch.equal(logits(model, prefill_chunk_size=cut), whole)
    assert all(runs)


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 99), dim=st.sampled_from([16, 48]), bytewise=st.booleans())
def test_a_program_is_its_operations_one_by_one(threads: int, tokens: int, seed: int, dim: int, bytewise: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    width = 4 * dim
    try:
        with torch.no_grad():
            x, norms = torch.randn(tokens, 40).bfloat16(), [torch.randn(n).bfloat16() for n in (40, dim, 40)]
            qkv, out, bias = form(8 * dim, 40, bytewise), form(40, width, bytewise), torch.randn(40).bfloat16()
            turn = torch.randn(2, tokens, 1, dim // 2).bfloat16().unbind()
            pools = torch.randn(4, 64, 2, dim).bfloat16()
            plan = Plan([tokens], [tokens], [[3, 0, 2]], 16)

            program = Program(40, torch.bfloat16)
            normal, heads, mixed = program.buffer(40), program.buffer(8 * dim), program.buffer(width)
            branch, gated = program.buffer(40), program.buffer(20)
            program.norm(program.input, norms[0], 1e-6, normal)
            program.product(normal, qkv, None, heads)
            program.norm_parts(heads, 0, 4, norms[1], 1e-6)
            program.turn(heads, 6, dim, dim // 2)
            program.attend(heads, 4, 2, dim, mixed, group=0, scale=0.3, softcap=2.0)
            program.product(mixed, out, bias, branch)
            program.add(None, branch, 0.5)
            program.add_norm(program.input, branch, norms[2], 1e-6, normal)
            program.add(normal, branch)
            program.gate(branch, gated)
            whole_pools = pools.clone()
            got = program.run(x, gated, Past([plan], Pools(whole_pools[:2].unbind(), [0])), turn)

            y = qkv.product(rms_norm(x, norms[0], 1e-6)).view(tokens, 8, dim)
            assert norm_heads(y[:, :4], norms[1], 1e-6)
            rotated = rotate(y[:, :6], *turn)
            some = plan.attend(rotated[:, :4], rotated[:, 4:], y[:, 6:], pools[0], pools[1], 0.3, 2.0)
            total, normed = add_rms_norm(x, out.product(some, bias).mul_(0.5), norms[2], 1e-6)
            assert torch.equal(got, silu_gate(total.add_(normed)))
            assert torch.equal(whole_pools, pools)
    finally:
        torch.set_num_threads(before)


def form(outputs: int, inputs: int, bytewise: bool) -> PackedWeight | PackedCodes:
    if not bytewise:
        return weight(outputs, inputs)
    made = PackedCodes(outputs, inputs, None, inputs)
    made.write(0, torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8), torch.rand(outputs, 1) / 64)
    return made


def weight(outputs: int, inputs: int) -> PackedWeight:
    made = torch.randn(outputs, inputs).bfloat16()
    return PackedWeight(made)


def test_what_does_not_fit_a_program() -> None:
    program = Program(64, torch.bfloat16)
    wide, narrow = program.buffer(96), program.buffer(64)
    norm = torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="differ"):
        program.norm(program.input, norm, 1e-6, wide)
    with pytest.raises(ValueError, match="none of"):
        program.norm(program.input, norm.float(), 1e-6, narrow)
    with pytest.raises(ValueError, match="cannot be written"):
        program.norm(narrow, norm, 1e-6, program.input)
    with pytest.raises(ValueError, match="gives no 64 of 64"):
        program.product(program.input, weight(96, 64), None, narrow)
    with pytest.raises(ValueError, match="none of"):
        program.product(program.input, weight(96, 64), torch.zeros(95, dtype=torch.bfloat16), wide)
    with pytest.raises(ValueError, match="are not 96 and 64 numbers"):
        program.attend(wide, 4, 2, 16, narrow, group=0, scale=1.0)
    with pytest.raises(ValueError, match="cannot be turned"):
        program.turn(narrow, 4, 16, 18)
    with pytest.raises(ValueError, match="not twice"):
        program.gate(wide, narrow)
    with pytest.raises(ValueError, match="are not in 64"):
        program.norm_parts(narrow, 16, 4, torch.ones(16, dtype=torch.bfloat16), 1e-6)
    with pytest.raises(ValueError, match="no programs for"):
        Program(64, torch.float16)
    codes = PackedCodes(64, 64, torch.arange(16.0), 64)
    other = Program(64, torch.float32)
    out = other.buffer(64)
    with pytest.raises(ValueError, match=r"takes no torch\.float32"):
        other.product(other.input, codes, None, out)


def rows_of(model: Any, prompts: list[list[int]], room: int = 64) -> tuple[PagedRunner, list[Sequence]]:
    """Rows that have chosen one token each, which is not computed yet."""
    rows = [Sequence(i, list(prompt)) for i, prompt in enumerate(prompts)]
    store = PagedStore(model.spec.groups, 16, dtype=model.dtype, device=torch.device("cpu"))
    runner = PagedRunner(model, store, torch.device("cpu"), rows)
    group = Group(rows, None, None)  # type: ignore[arg-type]
    for row in rows:
        store.reserve(row, len(row.tokens))
    with torch.no_grad():
        logits = runner.run([Work(row, len(row.tokens), 1, group) for row in rows], Want()).logits
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.computed = len(row.tokens)
        row.tokens.append(token)
    return runner, rows


def alone(model: Any, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """What plain decoding says, and how probable each token was."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, eos_token_id=[], do_sample=False, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :]
    shares = [score.softmax(-1)[0, token].item() for score, token in zip(out.scores, tokens, strict=True)]
    return tokens.tolist(), shares


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "mistral", "qwen2-window", "smollm3", "phi3", "olmo2"])
def test_going_on_chooses_what_single_steps_choose(family: str, kind: str | None, tmp_path: Path) -> None:
    model = load(written(tmp_path, family), kind)
    prompts = [[5, 6, 7], list(range(20, 37)), [9]]
    wanted = [alone(model, prompt, 20) for prompt in prompts]
    runner, rows = rows_of(model, prompts)
    with torch.no_grad():
        steps = runner.go_on(rows, Stops([19, 19, 19], (), 1e-9))
    for row, prompt, (tokens, shares), chosen in zip(rows, prompts, wanted, steps, strict=True):
        assert [row.tokens[-1], *chosen.tokens] == tokens
        assert chosen.shares == pytest.approx(shares[1:], rel=1e-3)
        assert row.computed == len(prompt) + 19
    with torch.no_grad():  # and what was stored is what single steps would have stored
        for row, chosen in zip(rows, steps, strict=True):
            row.tokens += chosen.tokens
        group = Group(rows, None, None)  # type: ignore[arg-type]
        logits = runner.run([Work(row, 1, 1, group) for row in rows], Want()).logits
    longer = [alone(model, prompt, 21)[0][-1] for prompt in prompts]
    assert logits.argmax(-1).tolist() == longer


def test_going_on_ends(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    prompts = [[5, 6, 7], [9, 8]]
    texts = [alone(model, prompt, 16)[0] for prompt in prompts]

    def steps(*stops: Any) -> list[list[int]]:
        runner, rows = rows_of(model, prompts)
        with torch.no_grad():
            return [chosen.tokens for chosen in runner.go_on(rows, Stops(*stops))]

    def first(count: int) -> list[list[int]]:
        return [text[1 : 1 + count] for text in texts]

    assert steps([3, 15]) == first(15)  # half of the rows go on
    assert steps([3, 5]) == first(5)
    assert steps([15, 15], (), 1.1) == first(1)
    ends = [texts[0][4], texts[1][6]]
    last = max(min(text[1:].index(end) for end in ends if end in text[1:]) for text in texts)
    assert steps([15, 15], ends) == first(last + 1)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_going_on_feeds_what_is_not_computed_yet(family: str, tmp_path: Path) -> None:
    model = load(written(tmp_path, family))
    prompts = [[5, 6, 7], list(range(20, 37)), [9]]
    texts = [alone(model, prompt, 16)[0] for prompt in prompts]
    runner, rows = rows_of(model, prompts)
    for row, text, more in zip(rows, texts, (0, 2, 1), strict=True):
        row.tokens += text[1 : 1 + more]
    with torch.no_grad():
        chosen = runner.go_on(rows, Stops([5, 4, 6]))
    assert [some.tokens for some in chosen] == [texts[0][1:7], texts[1][3:7], texts[2][2:7]]
    assert [row.computed for row in rows] == [len(prompt) + 6 for prompt in prompts]


def test_where_rows_do_not_go_on_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = Stops([3])
    for family in ("gpt2", "granite"):
        runner, rows = rows_of(load(written(tmp_path / family, family)), [[5, 6, 7]])
        with torch.no_grad():
            assert runner.go_on(rows, stops) == []
        assert rows[0].computed == 3
    model = load(written(tmp_path / "llama", "llama"))
    runner, rows = rows_of(model, [[5, 6, 7]])
    assert runner.go_on(rows, stops) == []  # gradients are wanted
    with torch.no_grad():
        handle = model.lm_head.register_forward_hook(lambda *_: None)
        assert runner.go_on(rows, stops) == []
        handle.remove()
        assert len(runner.go_on(rows, stops)[0].tokens) == 3


def test_going_on_needs_room_and_positions(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    runner, rows = rows_of(model, [[5, 6, 7]])
    with torch.no_grad():
        attend = paged_attention(runner.store, rows, [1])
    with torch.no_grad(), pytest.raises(ValueError, match="no room for 400 steps"):
        model.go_on(attend, [[5]], [3], Stops([400]))
    with torch.no_grad(), pytest.raises(ValueError, match="are not of 97"):
        model.go_on(attend, [[97]], [3], Stops([2]))
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        model.go_on(attend, [[5]], [3], Stops([0]))


def test_nothing_to_choose(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    store = PagedStore(model.spec.groups, 4, dtype=model.dtype, device=torch.device("cpu"))
    row = Sequence(0, [5])
    runner = PagedRunner(model, store, torch.device("cpu"), [row])
    store.reserve(row, 1)
    with torch.no_grad():
        assert [chosen.tokens for chosen in runner.go_on([row], Stops([3]))] == [[-1]]


class Doubled(torch.nn.Module):
    """Twice what another module gives."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(*args)
        return out * 2


@pytest.mark.parametrize("part", ["mlp", "mlp.down", "attention", "attention.qkv"])
def test_modules_of_ones_own_are_called(part: str, tmp_path: Path, runs: list[bool]) -> None:
    model = load(written(tmp_path, "llama"))
    before = logits(model)
    parent, _, name = f"layers.0.{part}".rpartition(".")
    inner = model.get_submodule(f"layers.0.{part}")
    setattr(model.get_submodule(parent), name, Doubled(inner))
    runs.clear()
    assert not torch.equal(logits(model), before)
    assert not any(runs)
    setattr(model.get_submodule(parent), name, inner)
    runs.clear()
    assert torch.equal(logits(model), before)
    assert all(runs)


def test_a_forward_of_ones_own_is_called(tmp_path: Path, runs: list[bool]) -> None:
    model = load(written(tmp_path, "llama"))
    before, calls = logits(model), []
    mlp = model.layers[0].mlp
    forward = mlp.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return forward(x)

    mlp.forward = counted
    assert torch.equal(logits(model), before)
    assert len(calls) == 12


def test_heads_and_embeddings_of_ones_own_do_not_go_on(tmp_path: Path) -> None:
    for part in ("lm_head", "embedding"):
        model = load(written(tmp_path / part, "llama"))
        runner, rows = rows_of(model, [[5, 6, 7]])
        setattr(model, part, Doubled(getattr(model, part)))
        with torch.no_grad():
            assert runner.go_on(rows, Stops([3])) == []


def test_hooks_for_all_modules_are_called(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    before, seen = logits(model), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(id(module)))
    try:
        assert torch.equal(logits(model), before)
    finally:
        handle.remove()
    assert seen.count(id(model.layers[0].mlp)) == 12


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of PyTorch, which is slower so
def test_a_weight_of_another_dtype(tmp_path: Path, runs: list[bool]) -> None:
    model = load(written(tmp_path, "llama"), "int8")
    model.layers[0].mlp_norm.float()
    assert logits(model).isfinite().all()
    assert runs and not any(runs)


def test_another_default_device(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"), "int8")
    runner, rows = rows_of(model, [[5, 6, 7]])
    with torch.no_grad():
        attend = paged_attention(runner.store, rows, [1])
        batch = Batch(torch.tensor([5]), torch.tensor([3]), attend)
        scores = torch.rand(2, 2048)
        expected = model.step(batch), best(scores, 3)
        with torch.device("meta"):
            found = model.step(batch), best(scores, 3)
            assert model.go_on(attend, [[5]], [3], Stops([2])) is not None
    assert torch.equal(found[0], expected[0])
    assert found[1] is not None and expected[1] is not None
    assert all(map(torch.equal, found[1], expected[1]))


def test_threads_that_look_anew(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"))
    expected = logits(model)
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(3):
                if not torch.equal(logits(model), expected):
                    wrong.append("other numbers")
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            model.layers[0].multiplier = 1.0  # a change, which makes all of them look anew
            time.sleep(1e-4)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def fields_of(header: Path, name: str) -> list[str]:
    """The fields of a C++ struct."""
    found = re.search(rf"struct {name} {{(.*?)}};", re.sub(r"//.*", "", header.read_text()), re.DOTALL)
    assert found
    return [re.findall(r"\w+", part)[-1] for line in found[1].split(";") if line.strip() for part in line.split(",")]


@pytest.mark.parametrize("name", ["Operation", "Step", "Continuation"])
def test_structs_lie_as_in_the_header(name: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    header = Path(program.__file__).with_name("program.h")
    struct: type[ctypes.Structure] = getattr(structs, name)
    offsets = [getattr(struct, field[0]).offset for field in struct._fields_]
    lines = [f"static_assert(sizeof(unspool::{name}) == {ctypes.sizeof(struct)});"]
    fields = zip(fields_of(header, name), offsets, strict=True)
    lines += [f"static_assert(offsetof(unspool::{name}, {field}) == {offset});" for field, offset in fields]
    source = tmp_path / "layout.cpp"
    source.write_text(f'#include "{header}"\n#include <cstddef>\n' + "\n".join(lines))
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", str(source)], check=True)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_step_from_the_tokens_on(kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(written(tmp_path, "llama"), kind)
    steps: list[bool] = []
    step = CompiledLayers.step

    def watched(self: CompiledLayers, *args: Any) -> Any:
        out = step(self, *args)
        steps.append(out is not None)
        return out

    monkeypatch.setattr(CompiledLayers, "step", watched)
    prompt = torch.arange(40)[None] % 60 + 3
    whole = logits(model, prompt)
    assert sum(steps) >= 10
    assert torch.equal(whole, layer_by_layer(monkeypatch, model, prompt))
    for part in (model.lm_head, model.embedding):
        handle = part.register_forward_hook(lambda _, __, out: out * 2)
        steps.clear()
        assert not torch.equal(logits(model, prompt), whole)
        assert not any(steps)
        handle.remove()
        assert torch.equal(logits(model, prompt), whole)
        assert any(steps)


def test_steps_of_tokens_and_positions_that_there_are_not(tmp_path: Path) -> None:
    model = load(written(tmp_path, "llama"), "int8")
    runner, rows = rows_of(model, [[5, 6, 7]])
    with torch.no_grad():
        attend = paged_attention(runner.store, rows, [1])
    ends, last = (model.embedding, model.lm_head), model.spec.vocab_size - 1

    def step(token: int, position: int) -> Any:
        batch = Batch(torch.tensor([token]), torch.tensor([position]), attend)
        with torch.no_grad():
            return model._compiled.step(model.layers, model.norm, ends, batch, model.rotary)

    known = len(model.rotary.table(1, torch.bfloat16).cos)
    assert step(last, known - 1) is not None
    assert step(last + 1, 0) is None
    assert step(-1, 0) is None
    assert step(0, known) is None
    assert step(0, -1) is None
