"""`quantize=` while loading: what is quantised, how good it is, how much memory it takes, what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_checkpoint
from torch import Tensor

import unspool
from unspool.errors import Unsupported
from unspool.kernels import native
from unspool.models.layers.linear import Linear
from unspool.models.layers.quantised import FP4, INT4, INT8, NF4, QuantisedForm, dequantise
from unspool.models.registry import build
from unspool.weights import load_model, save_model
from unspool.weights.quant import FORMATS, encode

TEXT = "Once upon a time, there was a little fox who lived near the river. One day the fox found a"


def forms(model: torch.nn.Module) -> dict[str, str | None]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {
        name: module._packed.code.name if isinstance(module._packed, QuantisedForm) else None
        for name, module in found.items()
    }


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_encoding_is_near_and_never_worse_than_a_step(name: str) -> None:
    code = FORMATS[name]
    rows = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    rows[3], rows[4, 64:128] = 0, 0
    rows[5, 7] = 3.0  # an outlier
    rows = rows.bfloat16().float()
    made = encode(code, rows.bfloat16())
    back = dequantise(code, made)
    assert torch.equal(back[3], torch.zeros(200))
    ordinary = [row for row in range(20) if row not in (3, 5)]
    error = (back - rows)[ordinary].norm() / rows[ordinary].norm()
    assert error < {"int8": 0.012, "nf4": 0.1, "fp4": 0.135}.get(name, 0.11)
    step = made.scales.repeat_interleave(code.group or 200, dim=1)[:, :200].abs()
    if code.name in ("int8", "int4"):
        assert bool(((back - rows).abs() <= step * (0.501 if code.bits == 8 else 1.7) + 1e-6).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_families_load_quantised(name: str, quantize: str, tmp_path: Path) -> None:
    assert name in FAMILIES
    make_checkpoint(name, tmp_path)
    model, plain = load_model(tmp_path, quantize=quantize), load_model(tmp_path)
    kinds = forms(model)
    assert kinds.pop("lm_head") == "int8"
    assert set(kinds.values()) == {quantize}
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got, exact = model(ids).logits, plain(ids).logits
        alone = model(ids[1:]).logits
    assert torch.allclose(alone, got[1:], atol=1e-4)
    restored = build(model.config, dtype=torch.float32)
    restored.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.inference_mode():
        expected = restored.eval()(ids).logits
    assert float((got - expected).norm() / expected.norm()) < 0.05
    assert float((got - exact).norm() / exact.norm()) < (0.05 if quantize == "int8" else 0.7)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("inputs", [64, 200, 576])
def test_pytorch_encodes_alike(name: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = FORMATS[name]
    rows = torch.randn(30, inputs, generator=torch.Generator().manual_seed(inputs)) * 0.1
    rows[3] = 0
    for each in (rows, rows.bfloat16()):
        fast = encode(code, each)
        with monkeypatch.context() as patch:
            patch.setattr("unspool.kernels.encode.usable", lambda rows: False)
            slow = encode(code, each)
        # sums of errors differ in their last bits, and rarely another scale is the best
        same = (fast.codes == slow.codes).all(dim=1)
        assert float(same.float().mean()) >= (0.8 if code.name == "int4" else 1.0)
        assert torch.allclose(fast.scales[same], slow.scales[same], rtol=1e-6)
        errors = [(dequantise(code, made) - each.float()).norm() for made in (fast, slow)]
        assert float(abs(errors[0] - errors[1])) <= 1e-3 * float(errors[1])


def test_the_storyteller_loses_little() -> None:
    """Perplexity of its own text, and the most likely tokens, against the model in bf16."""
    plain, tokenizer = unspool.load("storyteller", dtype="bfloat16")
    torch.manual_seed(0)
    prompt = tokenizer([TEXT] * 6, return_tensors="pt")
    text = plain.generate(**prompt, max_new_tokens=200, do_sample=True, top_k=0, top_p=1.0)

    def look(model: Any) -> tuple[float, Tensor]:
        with torch.inference_mode():
            logits = model(text).logits[:, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())), logits.argmax(-1)

    loss, tops = look(plain)
    for quantize, allowed, same in (("int8", 0.005, 0.985), ("int4", 0.03, 0.93), ("nf4", 0.03, 0.93)):
        quantised, _ = unspool.load("storyteller", dtype="bfloat16", quantize=quantize)
        theirs, chosen = look(quantised)
        assert theirs - loss < allowed
        assert float((chosen == tops).float().mean()) >= same


def test_products_of_codes_are_those_of_the_weights_that_they_stand_for() -> None:
    """Layer by layer, with what each gets from the others, and all together, against fp32."""
    torch.manual_seed(0)
    plain, tokenizer = unspool.load("storyteller", dtype="bfloat16")
    prompt = tokenizer([TEXT] * 4, return_tensors="pt")
    text = plain.generate(**prompt, max_new_tokens=120, do_sample=True, top_k=0, top_p=1.0)
    for quantize, allowed in (("int8", 0.02), ("int4", 0.01), ("nf4", 0.01)):
        model, _ = unspool.load("storyteller", dtype="bfloat16", quantize=quantize)
        packed = {name: m._packed for name, m in model.named_modules() if isinstance(m, Linear)}
        weights = {name: dequantise(form.code, form._read(slice(0, form.outputs))) for name, form in packed.items()}
        exact = build(model.config, dtype=torch.float32)
        state = {key: value.float() for key, value in model.state_dict().items()}
        state |= {f"{name}.weight": weight for name, weight in weights.items()}
        state["embedding.weight"] = weights["lm_head"]
        exact.load_state_dict(state)
        errors: dict[str, float] = {}

        def compare(name: str, x: Tensor, packed: Any = packed, weights: Any = weights, errors: Any = errors) -> None:
            x = x.flatten(0, -2).bfloat16()
            expected = x.float() @ weights[name].T
            errors[name] = float((packed[name].product(x, None).float() - expected).norm() / expected.norm())

        for name, module in exact.eval().named_modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(lambda _, args, name=name, compare=compare: compare(name, args[0]))
        with torch.inference_mode():
            expected, got = exact(text).logits.float(), model(text).logits.float()
        assert errors.keys() == weights.keys()
        assert max(errors.values()) < allowed, (quantize, errors)
        assert (got - expected).norm() < 0.03 * expected.norm()
        losses = [
            torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), text[:, 1:].flatten()) for x in (got, expected)
        ]
        assert abs(losses[0] - losses[1]) < 0.005  # of the perplexity


def test_a_tied_head_shares_its_quantised_weight_with_the_embedding() -> None:
    model, tokenizer = unspool.load("storyteller", quantize="int4")
    assert model.tied
    assert model.embedding._packed is model.lm_head._packed
    assert isinstance(model.lm_head._packed, QuantisedForm)
    out = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert out.shape[1] > 8


def test_saving_writes_what_the_codes_stand_for(tmp_path: Path) -> None:
    model, _ = unspool.load("storyteller", quantize="nf4")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_bitsandbytes_config_asks_for() -> None:
    def kinds(**settings: Any) -> dict[str, str | None]:
        config = unspool.BitsAndBytesConfig(**settings)
        return forms(unspool.AutoModelForCausalLM.from_pretrained("storyteller", quantization_config=config))

    found = kinds(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert found.pop("lm_head") is None
    assert set(found.values()) == {NF4.name}
    found = kinds(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    assert found.pop("lm_head") is None
    assert set(found.values()) == {FP4.name}
    found = kinds(load_in_8bit=True, llm_int8_skip_modules=["model.layers.0", "down_proj"])
    assert {name for name, kind in found.items() if kind is None} == {
        name for name in found if name.startswith("layers.0.") or name.endswith("mlp.down")
    }
    assert {kind for kind in found.values() if kind} == {INT8.name}
    theirs = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model, _ = unspool.load("storyteller", quantize=theirs)
    assert NF4.name in forms(model).values()


def test_the_example_of_the_quantised_page() -> None:
    """The seed page's first example, with its import and its model exchanged."""
    from unspool import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextStreamer

    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained("storyteller", quantization_config=bnb_config, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("storyteller")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    input_ids = inputs["input_ids"].to(model.device)
    output = model.generate(input_ids=input_ids, max_new_tokens=50)
    assert len(tokenizer.decode(output[0], skip_special_tokens=True)) > 60
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7}
    model.generate(input_ids=input_ids, top_k=50, top_p=0.95, **settings)
    model.generate(input_ids=input_ids, streamer=streamer, **settings)
    greedy = model.generate(input_ids=input_ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy, model.generate(input_ids=input_ids, max_new_tokens=20, do_sample=False))


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="`quantize` is 'int3'; use one of 'int8', 'int4'"):
        unspool.load("storyteller", quantize="int3")
    with pytest.raises(
        ValueError, match=r"`quantize` is 'fp8'; .*TorchAoConfig\(Float8WeightOnlyConfig.*unspool\.wrap"
    ):
        unspool.load("storyteller-draft", quantize="fp8")
    with pytest.raises(ValueError, match="`quantize` is 'int4-g48'"):
        unspool.load("storyteller", quantize="int4-g48")
    with pytest.raises(Unsupported, match=r"quantization_config of dict \(method 'gptq'\) is not supported"):
        unspool.AutoModelForCausalLM.from_pretrained("storyteller", quantization_config={"quant_method": "gptq"})
    for settings, message in (
        ({}, "neither"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "use 'nf4' or 'fp4'"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            unspool.BitsAndBytesConfig(**settings)


PEAK = """
import sys
import torch
from unspool.weights import load_model
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
kind = sys.argv[3]
warm = load_model(sys.argv[1], dtype="bfloat16", quantize=kind)
del warm
before = peak()
model = load_model(sys.argv[2], dtype="bfloat16", quantize=kind)
kept = {id(m._packed): m._packed.nbytes for m in model.modules() if getattr(m, "_packed", None) is not None}
plain = sum(p.nbytes for p in model.parameters() if not p.is_meta)
print(peak() - before, sum(kept.values()) + plain)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
    save_model(build({**config, "num_attention_heads": 8, "vocab_size": 8000}, dtype="bfloat16"), folder)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_loading_needs_little_more_memory_than_the_codes(quantize: str, big: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(big), quantize]
    taken, codes = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert codes > (270e6 if quantize == "int8" else 130e6)
    assert taken <= 1.3 * codes


WHOLE = """
import sys
import torch
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
import unspool
model, _ = unspool.load(sys.argv[1], dtype="bfloat16", quantize=sys.argv[2] or None)
kept = {id(m._packed): m._packed for m in model.modules() if getattr(m, "_packed", None) is not None}.values()
weights = sum(getattr(w, "nbytes", 2 * w.outputs * w.inputs) for w in kept)
weights += sum(p.nbytes for p in model.parameters() if not p.is_meta)
ids = torch.arange(3, 203)[None]
out = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=True, seed=1)
config = model.config
cache = out.numel() * 2 * 2 * config.hidden_size * config.num_hidden_layers
print(peak() - before, weights, cache)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not native.active(), reason="PyTorch takes what it needs")
@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_generating_needs_little_beside_weights_and_cache(quantize: str, big: Path) -> None:
    """From `import torch` to the last token; weights that were kept twice would not fit."""
    shutil.copy(Path(unspool.__file__).parent / "assets" / "storyteller" / "tokenizer.json", big)
    command = [sys.executable, "-c", WHOLE, str(big), quantize]
    taken, weights, cache = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert weights > {"": 530e6, "int8": 270e6, "int4": 140e6}[quantize]
    assert taken <= weights + cache + (150 << 20)


def test_the_int4_default_is_groups_of_64() -> None:
    assert FORMATS["int4"] == FORMATS["int4-g64"] == INT4
