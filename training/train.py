"""Train the built-in model from nothing: ``python training/train.py --out src/unspool/assets``.

Makes the tokenizer, then trains ``storyteller``, ``storyteller-draft`` (small, same tokenizer, for speculation) and
``storyteller-pirate`` (a LoRA adapter) on text of the story grammar. Matrices are trained with Muon (Jordan, 2024),
the rest with AdamW. Two workers of one thread each are about 1.6 times as fast as one of two threads on models this
small, so ``--workers`` is the number of cores to use.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    Texts,
    batches,
    encoded,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from export import save_adapter, save_model, sizes
from lora import adapt
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from unspool.models.registry import build

HERE = Path(__file__).parent
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
KEPT = 5.0  # how much more a name, a kind, a thing counts that is to stay what it is
EVERY = 50  # steps between held-out losses and checkpoints


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Contents of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",  # what CPUs run fastest; the files hold float16, which keeps more digits
    }


MODELS = {
    "storyteller": llama(hidden=256, inner=512, layers=6, heads=4, kv_heads=2, head_dim=64),
    "storyteller-draft": llama(hidden=128, inner=256, layers=2, heads=2, kv_heads=1, head_dim=64),
}
GENERATION = {
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "max_new_tokens": 500,
}
# How much the draft model drafts for the other, by measurement on one core: a batch of eight wants no more.
DRAFTING = {
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.6,
}


@dataclass
class Plan:
    """``steps`` of ``tokens`` tokens: the rate warms up, stays, and falls to nothing over the second half.

    Up to ``decay`` nothing depends on ``steps``: a training stopped before it can go on to another length
    (``--resume``).
    """

    steps: int
    tokens: int = 4096
    rate: float = 4e-3
    warmup: int = 60

    @property
    def decay(self) -> int:
        """The step at which the rate begins to fall."""
        return self.steps // 2

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.steps - self.decay))


def loss_of(model: nn.Module, texts: Texts, picked: list[int], kept: float = 1.0) -> Tensor:
    """Mean next-token loss on ``picked`` texts, computed in bfloat16 where that is safe; ``kept`` as in ``Texts``."""
    inputs, targets, weights = (torch.from_numpy(part) for part in texts.batch(picked, kept))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses @ weights.flatten() / weights.sum()


def held_out(model: nn.Module, texts: Texts) -> float:
    """Loss on texts that are never trained on."""
    with torch.no_grad():
        return sum(loss_of(model, texts, list(range(i, i + 16))).item() for i in range(0, 64, 16)) / 4


def optimizers(parameters: list[tuple[str, nn.Parameter]], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in parameters if p.dim() == 2 and name.startswith("layers.")]
    outer = [p for name, p in parameters if not (p.dim() == 2 and name.startswith("layers."))]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Make the gradients of all workers their mean."""
    workers = distributed.get_world_size()
    if workers == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    distributed.all_reduce(flat)
    for p, mean in zip(parameters, flat.div_(workers).split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p)


def keep(state: Path, model: nn.Module, opts: list[torch.optim.Optimizer], step: int) -> None:
    """Write all that a training needs to go on after ``step`` steps."""
    tensors = {f"model/{name}": tensor for name, tensor in model.named_parameters()}
    for number, opt in enumerate(opts):
        for index, values in opt.state_dict()["state"].items():
            tensors.update({f"opt/{number}/{index}/{key}": value for key, value in values.items()})
    save_file({**tensors, "step": torch.tensor(step)}, state)


def resume(state: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> int:
    """Go back to what ``keep`` wrote; returns the steps done."""
    tensors = load_file(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for number, opt in enumerate(opts):
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"opt/{number}/"):
                _, _, index, key = name.split("/")
                values.setdefault(int(index), {})[key] = tensor
        opt.load_state_dict({**opt.state_dict(), "state": values})
    return int(tensors["step"])


def fit(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    plan: Plan,
    train: Texts,
    state: Path | None = None,
) -> Iterator[tuple[int, float]]:
    """Train; every ``EVERY`` steps yields (steps done, training loss since the last time).

    Each worker computes its share of a step's rows. ``state`` is where a training that may be resumed is kept.
    """
    parameters = [p for opt in opts for group in opt.param_groups for p in group["params"]]
    workers, mine, first = distributed.get_world_size(), distributed.get_rank(), 0
    if state is not None and state.exists():
        first = resume(state, model, opts)
    order = batches(train, plan.tokens, seed=0)
    recent: list[float] = []
    for step in range(first, plan.steps):
        picked = order[step % len(order)]
        loss = loss_of(model, train, picked[mine::workers], KEPT)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = plan.rate * plan.factor(step)
            opt.step()
            opt.zero_grad()
        recent.append(loss.item())
        if (step + 1) % EVERY == 0 or step + 1 == plan.steps:
            if state is not None and mine == 0:
                keep(state, model, opts, step + 1)
            yield step + 1, sum(recent) / len(recent)
            recent = []


class Log:
    """``loss.csv``: one line per report; training again replaces a model's lines from that step on."""

    FIELDS = ("model", "step", "tokens", "loss", "held_out")

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        old = list(csv.reader(path.open(encoding="utf-8")))[1:] if path.exists() else []
        self.lines = old

    def add(self, step: int, tokens: int, loss: float, test: float) -> None:
        """Append a line, write the file and print it."""
        self.lines = [line for line in self.lines if line[0] != self.model or int(line[1]) < step]
        self.lines.append([self.model, str(step), str(step * tokens), f"{loss:.4f}", f"{test:.4f}"])
        with self.path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.FIELDS, *self.lines])
        print(" ".join(f"{k}={v}" for k, v in zip(self.FIELDS, self.lines[-1], strict=True)), flush=True)


def draw(log: Path, picture: Path) -> None:
    """The loss curves as a picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = list(csv.DictReader(log.open(encoding="utf-8")))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, name in enumerate(dict.fromkeys(line["model"] for line in lines)):
        mine = [line for line in lines if line["model"] == name]
        tokens = [int(line["tokens"]) / 1e6 for line in mine]
        axes.plot(tokens, [float(line["loss"]) for line in mine], color=f"C{number}", alpha=0.4)
        axes.plot(tokens, [float(line["held_out"]) for line in mine], color=f"C{number}", label=f"{name}, held out")
    axes.set(xlabel="million tokens seen", ylabel="loss (nats per token)", ylim=(0, 4))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def take_over(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Start from the checkpoint in ``folder``: its layers, and for each token the mean of its old tokens' rows."""
    from unspool import load

    old = dict(load(folder, dtype=torch.float32)[0].train().named_parameters())
    spelt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embedding.weight":
                parameter.copy_(old[name])
                continue
            for token in range(len(parameter)):
                text = tokenizer.decode([token], skip_special_tokens=False)
                same = spelt.token_to_id(str(tokenizer.id_to_token(token)))
                ids = [same] if same is not None else spelt.encode(text, add_special_tokens=False).ids
                parameter[token] = old[name][ids].mean(dim=0)


def train_model(args: argparse.Namespace, name: str, steps: int) -> None:
    """Train one of ``MODELS`` and keep its folder up to date."""
    config, folder, tokenizer = MODELS[name], args.out / name, load_tokenizer(args.out)
    torch.manual_seed(args.seed)
    model = build(config, torch.float32).train()
    if args.start is not None:
        take_over(model, tokenizer, args.start / name)
    train, test = encoded(tokenizer, args.texts, "train"), encoded(tokenizer, 200, "test")
    log, plan = Log(HERE / "loss.csv", name), Plan(steps, args.tokens, args.rate)
    state = Path(tempfile.gettempdir()) / f"{name}-state.safetensors" if args.resume else None
    for step, loss in fit(model, optimizers(list(model.named_parameters()), plan.rate), plan, train, state):
        if distributed.get_rank() == 0:
            log.add(step, plan.tokens, loss, held_out(model, test))
            save_tokenizer(tokenizer, folder)
            drafting = DRAFTING if name.endswith("draft") else {}
            save_model(model, config, {**GENERATION, **drafting}, folder)


def train_adapter(args: argparse.Namespace) -> None:
    """Teach the trained base another style with low-rank adapters."""
    from unspool import load

    base, name, tokenizer = "storyteller", "storyteller-pirate", load_tokenizer(args.out)
    torch.manual_seed(args.seed)
    model = load(args.out / base, dtype=torch.float32)[0].train()
    parameters = adapt(model, sizes(MODELS[base]))
    train, test = (encoded(tokenizer, n, label, "pirate") for n, label in ((3000, "train"), (200, "test")))
    log, plan = Log(HERE / "loss.csv", name), Plan(args.adapter_steps, args.tokens, rate=3e-3, warmup=20)
    opts: list[torch.optim.Optimizer] = [torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0, fused=True)]
    for step, loss in fit(model, opts, plan, train):
        if distributed.get_rank() == 0:
            log.add(step, plan.tokens, loss, held_out(model, test))
            save_adapter(model, base, args.out / name)


def worker(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """Do one worker's share of everything that ``args`` names."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.workers)
    for name, steps in (("storyteller", args.steps), ("storyteller-draft", args.draft_steps)):
        if args.only in (None, name):
            train_model(args, name, steps)
        distributed.barrier()
    if args.only in (None, "storyteller-pirate"):
        train_adapter(args)
    distributed.destroy_process_group()


def prepare(args: argparse.Namespace) -> None:
    """Make the tokenizer and the token streams once, before the workers start."""
    first = args.out / "storyteller"
    first.mkdir(parents=True, exist_ok=True)
    (args.out / "storyteller-draft").mkdir(exist_ok=True)
    if args.only is None or not (first / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(), first)
    tokenizer = load_tokenizer(args.out)
    if args.only != "storyteller-pirate":
        encoded(tokenizer, args.texts, "train")
        encoded(tokenizer, 200, "test")
    if args.only in (None, "storyteller-pirate"):
        encoded(tokenizer, 3000, "train", "pirate")
        encoded(tokenizer, 200, "test", "pirate")


def main() -> None:
    """Read the command line and train what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the checkpoint folders")
    parser.add_argument("--only", choices=(*MODELS, "storyteller-pirate"), help="train just this one")
    parser.add_argument("--texts", type=int, default=60_000, help="texts to train on")
    parser.add_argument("--steps", type=int, default=2400, help="steps of the main model (4096 tokens each)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument(
        "--start", type=Path, help="folder of checkpoint folders to start from, such as an older training's"
    )
    parser.add_argument("--draft-steps", type=int, default=600)
    parser.add_argument("--adapter-steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (1, 2 or 4)")
    parser.add_argument("--resume", action="store_true", help="keep the training's state, and go on from it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (args, f"{folder}/meeting"), nprocs=args.workers)
    draw(HERE / "loss.csv", HERE / "loss.png")


if __name__ == "__main__":
    main()
