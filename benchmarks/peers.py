"""llama.cpp and CTranslate2 on the random checkpoints: their files, made once, and a batch of equal steps.

Both are optional (``pip install 'unspool[peers]'``; llama.cpp is compiled then, which takes a while). Files are kept in
``.cache/checkpoints/`` beside the checkpoint: GGUF in bf16 written here and quantised by llama.cpp's own function,
CTranslate2's by its own converter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import CACHE, checkpoint

# Number of the file type in llama.cpp's own list.
LLAMA_FORMATS = {"BF16": None, "Q8_0": 7, "Q4_0": 2}
CTRANSLATE2_FORMATS = ("bfloat16", "int8", "int8_bfloat16")


def gguf_file(shape: str, kind: str) -> Path:
    """The checkpoint ``shape`` as a GGUF file of one of ``LLAMA_FORMATS``, made now if it is not there yet."""
    path = CACHE / f"{shape}-{kind}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        if LLAMA_FORMATS[kind] is None:
            _write_gguf(checkpoint(shape), unfinished)
        else:
            import llama_cpp

            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = LLAMA_FORMATS[kind]
            source = gguf_file(shape, "BF16")
            if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), settings):
                raise RuntimeError(f"llama.cpp could not quantise {source.name} to {kind}")
        unfinished.rename(path)
    return path


def _write_gguf(folder: Path, path: Path) -> None:
    """A Llama checkpoint without its tokenizer: only ids are fed."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads, groups, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    dim = config.get("head_dim") or hidden // heads
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, dim))

    def halves_woven(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Rows of a head's two halves in turn: GGUF's Llama turns neighbours where the checkpoint turns halves."""
        return weight.view(count, 2, dim // 2, -1).transpose(1, 2).reshape(weight.shape)

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            weight, bare = file.get_tensor(name), name.removeprefix("model.").removesuffix(".weight")
            if bare.startswith("layers."):
                _, layer, part = bare.split(".", 2)
                if part in ("self_attn.q_proj", "self_attn.k_proj"):
                    weight = halves_woven(weight, heads if "q_proj" in part else groups)
                bare = f"blk.{layer}.{names[part]}"
            else:
                bare = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[bare]
            if weight.dim() == 1:
                writer.add_tensor(f"{bare}.weight", weight.float().numpy())
            else:
                kind = gguf.GGMLQuantizationType.BF16
                rows = weight.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(f"{bare}.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray[Any, Any]:
    """What llama3's scaling divides each frequency by, as GGUF stores it."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    waves, length = 2 * np.pi / frequencies, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def ctranslate2_folder(shape: str, kind: str) -> Path:
    """The checkpoint ``shape`` in CTranslate2's form, made now if it is not there yet."""
    path = CACHE / f"{shape}-ctranslate2-{kind}"
    if not path.exists():
        from ctranslate2.converters import TransformersConverter

        unfinished = path.with_suffix(".unfinished")
        TransformersConverter(str(checkpoint(shape)), load_as_float16=False).convert(
            str(unfinished), quantization=kind, force=True
        )
        settings = json.loads((unfinished / "config.json").read_text())
        named = {name: "<pad>" if value is None else value for name, value in settings.items()}
        (unfinished / "config.json").write_text(json.dumps(named))  # a token that is null does not load
        unfinished.rename(path)
    return path


class LlamaCpp:
    """llama.cpp's library, greedily; all rows in one call of ``llama_decode`` a step."""

    def __init__(self, shape: str, kind: str, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.threads = threads
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_file(shape, kind)).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load the {kind} file of {shape}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def times(self, prompts: list[list[int]], new: int) -> tuple[float, list[float], list[int]]:
        """Seconds of the prompts, of each step after them, and the first row's new tokens."""
        lib, rows = self.lib, len(prompts)
        longest = max(map(len, prompts))
        settings = lib.llama_context_default_params()
        settings.n_ctx = rows * (longest + new + 8)
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.kv_unified = True
        context = lib.llama_init_from_model(self.model, settings)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        batch = lib.llama_batch_init(512, 0, 1)
        last: dict[int, int] = {}

        def flush(wanted: dict[int, int]) -> None:
            """Run what is in the batch; ``wanted`` says which of its places end which row."""
            if batch.n_tokens and lib.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for place, row in wanted.items():
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (self.vocab,))
                last[row] = int(logits.argmax())
            batch.n_tokens = 0

        def feed(work: Iterable[tuple[int, int, int, bool]]) -> None:
            """Row, token, position, and whether its logits are wanted; as many calls as needed."""
            wanted: dict[int, int] = {}
            for row, token, position, end in work:
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, end
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.n_tokens += 1
                if end:
                    wanted[at] = row
                if batch.n_tokens == 512:
                    flush(wanted)
                    wanted = {}
            flush(wanted)

        try:
            began = time.perf_counter()
            feed((row, token, i, i == len(ids) - 1) for row, ids in enumerate(prompts) for i, token in enumerate(ids))
            moments, made = [time.perf_counter()], [last[0]]
            for step in range(new - 1):
                feed([(row, last[row], len(ids) + step, True) for row, ids in enumerate(prompts)])
                moments.append(time.perf_counter())
                made.append(last[0])
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
        return moments[0] - began, [b - a for a, b in pairwise(moments)], made


class CTranslate2:
    """CTranslate2's generator, greedily; it tells of every step."""

    def __init__(self, shape: str, kind: str, threads: int) -> None:
        import ctranslate2

        folder = ctranslate2_folder(shape, kind)
        self.model = ctranslate2.Generator(str(folder), device="cpu", compute_type=kind, intra_threads=threads)
        self.words = json.loads((folder / "vocabulary.json").read_text())

    def times(self, prompts: list[list[int]], new: int) -> tuple[float, list[float], list[int]]:
        """Seconds of the prompts, of each step after them, and the first row's new tokens."""
        moments: dict[int, float] = {}
        made: list[int] = []

        def told(result: Any) -> bool:
            moments[result.step] = time.perf_counter()
            if result.batch_id == 0:
                made.append(result.token_id)
            return False

        words = [[self.words[token] for token in ids] for ids in prompts]
        began = time.perf_counter()
        self.model.generate_batch(
            words,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            max_batch_size=0,
            callback=told,
        )
        order = [moments[step] for step in sorted(moments)]
        return order[0] - began, [b - a for a, b in pairwise(order)], made
