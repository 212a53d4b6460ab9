"""Times the PyTorch primitives a decode step can be made of, on this machine.

For the layer shapes of two models (T: SmolLM2-135M, M: Llama-3.2-1B) it prints microseconds per call, medians, of

* one linear layer at 1 to 32 rows, by every route PyTorch offers (``F.linear``, ``torch.mv``, ``torch.mm`` both ways,
  oneDNN off, prepacked);
* RMS norm, written several ways;
* attention of one query token per row over a key/value cache, with the query group folded, expanded or left to
  ``enable_gqa``;
* the small elementwise operations in between, whose cost is mostly the call itself.

Weights and caches are taken in turn from a buffer larger than any cache (600 MB in bf16), because a weight timed in a
loop on its own sits in the L3 cache and looks several times faster than it is in a model.

    python benchmarks/primitives.py [--threads 2] [--seconds 0.25] [--only linear,norm,attention,small,bandwidth]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

BUFFER_ELEMENTS = 300_000_000
ROWS = (1, 2, 4, 8, 16, 32)
LINEARS: dict[str, tuple[int, int]] = {
    "T qkv": (960, 576),
    "T o": (576, 576),
    "T gate_up": (3072, 576),
    "T down": (576, 1536),
    "T head": (49152, 576),
    "M qkv": (3072, 2048),
    "M o": (2048, 2048),
    "M gate_up": (16384, 2048),
    "M down": (2048, 8192),
    "M head": (128256, 2048),
}
ATTENTION: dict[str, tuple[int, int, int]] = {"T": (9, 3, 64), "M": (32, 8, 64)}

Call = Callable[[torch.Tensor], object]


def microseconds(call: Call, operands: Iterator[torch.Tensor], seconds: float) -> float:
    """Median time of ``call(operand)`` in microseconds, over at least 5 and at most 3000 calls in about ``seconds``."""
    for _ in range(2):
        call(next(operands))
    times: list[int] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 3000):
        operand = next(operands)
        start = time.perf_counter_ns()
        call(operand)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def in_turn(buffer: torch.Tensor, *shape: int) -> Iterator[torch.Tensor]:
    """Endless views of ``shape`` that walk through ``buffer``, so that each comes from memory."""
    size = torch.Size(shape).numel()
    views = [buffer[i * size : (i + 1) * size].view(shape) for i in range(max(1, buffer.numel() // size))]
    while True:
        yield from views


def cycle(items: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from items


def filled(dtype: torch.dtype) -> torch.Tensor:
    """The flat buffer of small random weights."""
    tile = (torch.randn(1_000_000) * 0.02).to(dtype)
    return tile.repeat(BUFFER_ELEMENTS // tile.numel())


def row_by_row(x: torch.Tensor, features: int) -> Call:
    rows = list(x)
    out = x.new_empty(len(rows), features)
    outs = list(out)

    def call(w: torch.Tensor) -> object:
        for row, target in zip(rows, outs, strict=True):
            torch.mv(w, row, out=target)
        return out

    return call


def prepacked(buffer: torch.Tensor, shape: tuple[int, int], rows: int) -> list[torch.Tensor]:
    """oneDNN-packed copies of about 520 MB of weights of ``shape``."""
    one = shape[0] * shape[1] * buffer.element_size()
    views = in_turn(buffer, *shape)
    return [torch.ops.mkldnn._reorder_linear_weight(next(views), rows) for _ in range(max(1, 520_000_000 // one))]


def prepacked_linear(x: torch.Tensor, packed: torch.Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def linears(dtype: torch.dtype, seconds: float, pack: bool) -> None:
    buffer = filled(dtype)
    names = ("F.linear", "mv", "mv per row", "mm(x,w.t())", "mm(w,x.t())", "no oneDNN", "prepacked")
    print(f"\n### One linear, {str(dtype).removeprefix('torch.')}, us per call\n")
    print("| layer | out x in | rows | " + " | ".join(names) + " | best GB/s |")
    print("|---|---|---|" + "---|" * (len(names) + 1), flush=True)
    for name, (out, inner) in LINEARS.items():
        weights = in_turn(buffer, out, inner)
        for rows in ROWS:
            x = torch.randn(rows, inner).to(dtype)
            xt = x.t()
            calls: dict[str, Call] = {"F.linear": lambda w, x=x: F.linear(x, w)}
            if rows == 1:
                calls["mv"] = lambda w, v=x[0]: torch.mv(w, v)
            elif rows <= 8:
                calls["mv per row"] = row_by_row(x, out)
            calls["mm(x,w.t())"] = lambda w, x=x: torch.mm(x, w.t())
            calls["mm(w,x.t())"] = lambda w, xt=xt: torch.mm(w, xt)
            got = {key: microseconds(call, weights, seconds) for key, call in calls.items()}
            torch.backends.mkldnn.enabled = False
            got["no oneDNN"] = microseconds(calls["F.linear"], weights, seconds)
            torch.backends.mkldnn.enabled = True
            if pack and rows in (1, 8, 32):
                packed = prepacked(buffer, (out, inner), rows)
                got["prepacked"] = microseconds(partial(prepacked_linear, x), cycle(packed), seconds)
                del packed
            rate = out * inner * dtype.itemsize / min(got.values()) / 1000
            cells = [f"{got[key]:.0f}" if key in got else "-" for key in names]
            print(f"| {name} | {out}x{inner} | {rows} | " + " | ".join(cells) + f" | {rate:.1f} |", flush=True)


def norm_calls(weight: torch.Tensor) -> dict[str, Call]:
    """RMS norm variants; every one but the last returns what transformers' module returns, up to rounding."""
    hidden = weight.numel()
    shape, eps, root = (hidden,), 1e-5, hidden**-0.5

    def written_out(x: torch.Tensor) -> object:
        y = x.float()
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def by_vector_norm(x: torch.Tensor) -> object:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x * (scale * root).square_().add_(eps).rsqrt_()).to(x.dtype) * weight

    def plain_dtype(x: torch.Tensor) -> object:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def through_float(x: torch.Tensor) -> object:
        return F.rms_norm(x.float(), shape, None, eps).to(x.dtype) * weight

    twice = torch.cat((weight, weight))

    def mirrored(x: torch.Tensor) -> object:  # the mean of (x, -x) is 0 and its variance the mean square of x
        return F.layer_norm(torch.cat((x, -x), -1), (2 * hidden,), twice, None, eps)[..., :hidden]

    return {
        "layer_norm of (x,-x)": mirrored,
        "F.rms_norm": lambda x: F.rms_norm(x, shape, weight, eps),
        "F.rms_norm fp32 inside": through_float,
        "written out": written_out,
        "vector_norm": by_vector_norm,
        "all in dtype": plain_dtype,
        "F.rms_norm no weight": lambda x: F.rms_norm(x, shape, None, eps),
        "layer_norm (for scale)": lambda x: F.layer_norm(x, shape, weight, None, eps),
    }


def norms(seconds: float) -> None:
    print("\n### RMS norm, us per call\n")
    names = list(norm_calls(torch.ones(8)))
    print("| dtype | hidden | rows | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names), flush=True)
    for dtype in (torch.bfloat16, torch.float32):
        for hidden in (576, 2048):
            calls = norm_calls(torch.ones(hidden, dtype=dtype))
            for rows in (1, 8, 32, 512):
                x = cycle([torch.randn(rows, hidden).to(dtype) for _ in range(4)])
                cells = [f"{microseconds(call, x, seconds):.1f}" for call in calls.values()]
                print(f"| {str(dtype)[6:]} | {hidden} | {rows} | " + " | ".join(cells) + " |", flush=True)


def attention_calls(q: torch.Tensor, kv_heads: int) -> dict[str, Call]:
    """Attention variants over one tensor ``[2, rows, kv heads, length, head size]`` that holds keys and values."""
    rows, heads, _, size = q.shape
    group = heads // kv_heads
    folded = q.view(rows, kv_heads, group, size)
    flat = q.view(rows * kv_heads, group, size)
    scale = size**-0.5

    def by_bmm(kv: torch.Tensor) -> object:
        k, v = kv.flatten(1, 2)
        return torch.bmm(torch.softmax(torch.bmm(flat, k.transpose(1, 2)).mul_(scale), -1), v)

    def repeated(kv: torch.Tensor) -> object:
        k, v = kv.repeat_interleave(group, dim=2)
        return F.scaled_dot_product_attention(q, k, v)

    def token_major(kv: torch.Tensor) -> object:  # the same memory read as [rows, length, kv heads, size]
        k, v = kv.view(2, rows, -1, kv_heads, size).transpose(2, 3)
        return F.scaled_dot_product_attention(folded, k, v)

    return {
        "folded": lambda kv: F.scaled_dot_product_attention(folded, kv[0], kv[1]),
        "folded, token-major": token_major,
        "enable_gqa": lambda kv: F.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=True),
        "repeated": repeated,
        "folded bmm+softmax": by_bmm,
    }


def attentions(seconds: float) -> None:
    print("\n### Attention of one query per row, no mask, us per call\n")
    names = list(attention_calls(torch.zeros(1, 1, 1, 8), 1))
    print("| dtype | shape | rows | context | " + " | ".join(names) + " |")
    print("|---|---|---|---|" + "---|" * len(names), flush=True)
    for dtype in (torch.bfloat16, torch.float32):
        buffer = filled(dtype)
        for shape, (heads, kv_heads, size) in ATTENTION.items():
            for rows in (1, 8, 32):
                q = torch.randn(rows, heads, 1, size).to(dtype)
                for length in (256, 2048):
                    caches = in_turn(buffer, 2, rows, kv_heads, length, size)
                    calls = attention_calls(q, kv_heads)
                    cells = [f"{microseconds(call, caches, seconds):.0f}" for call in calls.values()]
                    line = f"| {str(dtype)[6:]} | {shape} | {rows} | {length} | " + " | ".join(cells) + " |"
                    print(line, flush=True)
        del buffer


def small_calls(rows: int, hidden: int, heads: int, inner: int, dtype: torch.dtype) -> dict[str, Call]:
    """The operations between the linears of one layer."""
    other = torch.randn(rows, hidden).to(dtype)
    wide = torch.randn(rows, 2 * inner).to(dtype)
    gate, up = wide.split(inner, dim=-1)
    qk = torch.randn(rows, heads, 64).to(dtype)
    cos, sin = torch.randn(rows, 1, 64).to(dtype), torch.randn(rows, 1, 64).to(dtype)
    pairs = torch.randn(rows, 1, 32, dtype=torch.complex64)
    pool = torch.zeros(rows * 512, 3, 64, dtype=dtype)
    slots = torch.arange(rows) * 512 + 5
    new = torch.randn(rows, 3, 64).to(dtype)
    table = torch.randn(4096, hidden).to(dtype)
    ids = torch.arange(rows)

    def rope(x: torch.Tensor) -> object:
        a, b = qk.chunk(2, dim=-1)
        return qk * cos + torch.cat((-b, a), dim=-1) * sin

    def rope_addcmul(x: torch.Tensor) -> object:
        return torch.addcmul(qk * cos, qk.roll(32, -1), sin)

    def rope_complex(x: torch.Tensor) -> object:
        z = torch.view_as_complex(qk.float().unflatten(-1, (32, 2)))
        return torch.view_as_real(z * pairs).flatten(-2).to(dtype)

    return {
        "empty": lambda x: torch.empty(rows, hidden, dtype=dtype),
        "view": lambda x: x.view(-1),
        "add": lambda x: x + other,
        "add_": lambda x: x.add_(other),
        "silu*up": lambda x: F.silu(gate) * up,
        "silu*up, out of place + in place": lambda x: F.silu(gate).mul_(up),
        "split": lambda x: wide.split(inner, dim=-1),
        "rope halves": rope,
        "rope roll+addcmul": rope_addcmul,
        "rope complex": rope_complex,
        "index_copy_": lambda x: pool.index_copy_(0, slots, new),
        "index_put": lambda x: pool.index_put_((slots,), new),
        "slice copy_": lambda x: pool[5 : 5 + rows].copy_(new),
        "embedding": lambda x: F.embedding(ids, table),
    }


def small(seconds: float) -> None:
    print("\n### Small operations of T (hidden 576, 12 heads of q and k, inner 1536), us per call\n")
    names = list(small_calls(1, 8, 2, 8, torch.float32))
    print("| dtype | rows | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names), flush=True)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 8, 32):
            x = cycle([torch.randn(rows, 576).to(dtype)])
            calls = small_calls(rows, 576, 12, 1536, dtype)
            cells = [f"{microseconds(call, x, seconds / 4):.1f}" for call in calls.values()]
            print(f"| {str(dtype)[6:]} | {rows} | " + " | ".join(cells) + " |", flush=True)


def bandwidth(seconds: float) -> None:
    """How fast memory can be read: a sum over large fp32 pieces."""
    print("\n### Memory read (sum of fp32 pieces taken in turn)\n\n| MiB per call | GB/s |\n|---|---|", flush=True)
    buffer = filled(torch.float32)
    for mib in (4, 16, 64, 256, 1024):
        pieces = in_turn(buffer, mib << 18)
        time_us = microseconds(lambda piece: piece.sum(), pieces, seconds)
        print(f"| {mib} | {(mib << 20) / time_us / 1000:.1f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.25, help="about how long each figure is measured")
    parser.add_argument("--only", default="bandwidth,linear,norm,attention,small", help="parts to run")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    parts = args.only.split(",")
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    if "bandwidth" in parts:
        bandwidth(args.seconds)
    if "linear" in parts:
        for name in args.dtypes.split(","):
            linears(getattr(torch, name), args.seconds, pack=True)
    if "norm" in parts:
        norms(args.seconds / 2)
    if "attention" in parts:
        attentions(args.seconds / 2)
    if "small" in parts:
        small(args.seconds)


if __name__ == "__main__":
    main()
