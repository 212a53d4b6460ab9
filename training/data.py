"""From grammar text to token ids: the tokenizer and the packed training stream."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from chat import Turns, conversation, recall
from grammar import story
from styles import pirate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIALS = (
    "<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
ROLES = (3, 4, 5)  # the ids of the three roles
HERE = Path(__file__).parent
VOCAB_SIZE = 2048
MAX_POSITIONS = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RECALL = 0.12  # share of texts that are only there to make facts come back
PIRATE_SYSTEM = ("You are a pirate.", "Talk like a pirate.", "You are a pirate who tells stories.")
STYLES = {"plain": lambda text, seed: text, "pirate": pirate}


def render(turns: Turns) -> str:
    """A conversation as the chat template writes it."""
    return BEGIN + "".join(f"<|{role}|>{text}{END}" for role, text in turns)


def document(seed: str, style: str) -> str:
    """One training text: a story, a story under its title, or a conversation.

    A few conversations ask for a pirate, in every style: the base model has then seen all words of the adapter's.
    """
    rng = random.Random(f"document {seed}")
    restyle = STYLES[style]
    kind = rng.random()
    if rng.random() < RECALL:
        return render(recall(seed))
    if kind < 0.45:
        told = story(seed)
        title = f"{told.title}\n\n" if kind < 0.04 else ""
        return BEGIN + title + restyle(told.text, seed) + END
    turns = conversation(seed)
    if kind < 0.51:
        turns = [("system", rng.choice(PIRATE_SYSTEM)), *(turn for turn in turns if turn[0] != "system")]
        restyle = STYLES["pirate"]
    return render([(role, restyle(text, seed) if role == "assistant" else text) for role, text in turns])


def documents(count: int, label: str, style: str = "plain") -> Iterator[str]:
    """``count`` texts; another ``label`` gives other texts."""
    return (document(f"{label} {number}", style) for number in range(count))


def train_tokenizer(count: int = 4000) -> Tokenizer:
    """A byte-level BPE tokenizer (every string encodes), trained on ``count`` texts of each style."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (
        text.replace(BEGIN, "").replace(END, "\n") for style in STYLES for text in documents(count, "tokenizer", style)
    )
    tokenizer.train_from_iterator(plain, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(assets: Path) -> Tokenizer:
    """The tokenizer that an earlier run made."""
    return Tokenizer.from_file(str(assets / "storyteller" / "tokenizer.json"))


@dataclass(frozen=True)
class Texts:
    """Encoded texts in one row of ``tokens``; text i ends before ``ends[i]``. ``learn`` is 0 on what users say."""

    tokens: np.ndarray
    learn: np.ndarray
    ends: np.ndarray

    @cached_property
    def rare(self) -> np.ndarray:
        """True for each token id that is less than one in 200 tokens."""
        return np.bincount(self.tokens, minlength=VOCAB_SIZE) < len(self.tokens) / 200

    def batch(self, picked: Iterable[int], kept: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts as rows, padded to the longest: tokens, the targets of each, and how much each target counts.

        That is 1; 0 where nothing is learnt; and ``kept`` for a rare token that the text already had: a name, a kind,
        a thing that is to stay what it is.
        """
        starts = [0, *self.ends[:-1].tolist()]
        spans = [slice(starts[i], self.ends[i]) for i in picked]
        width = max(span.stop - span.start for span in spans)
        inputs, targets = np.zeros((2, len(spans), width - 1), dtype=np.int64)
        weights = np.zeros((len(spans), width - 1), dtype=np.float32)
        for row, span in enumerate(spans):
            text, count = self.tokens[span].astype(np.int64), span.stop - span.start - 1
            again = self.rare[text]
            again[np.unique(text, return_index=True)[1]] = False
            inputs[row, :count], targets[row, :count] = text[:-1], text[1:]
            weights[row, :count] = (self.learn[span] * np.where(again, kept, 1.0))[1:]
        return inputs, targets, weights


def learnt(ids: list[int]) -> list[int]:
    """1 for every token that a model shall learn to say, 0 for what a user or a system message says."""
    flags, said = [], 1
    for token in ids:
        flags.append(0 if token in ROLES else said)
        if token in ROLES:
            said = int(token == ROLES[-1])
    return flags


def encoded(tokenizer: Tokenizer, count: int, label: str, style: str = "plain") -> Texts:
    """``count`` encoded texts, kept under the temporary folder for the next run."""
    sources = sorted(path for path in HERE.rglob("*") if path.suffix in (".py", ".txt"))
    texts = [
        path.read_text(encoding="utf-8") for path in sources if path.name not in ("train.py", "export.py", "lora.py")
    ]
    key = hashlib.sha256("\x00".join([tokenizer.to_str(), str(count), *texts]).encode())
    path = Path(tempfile.gettempdir()) / f"storyteller-{label}-{style}-{key.hexdigest()[:16]}.npz"
    if not path.exists():
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in documents(count, label, style)]
        np.savez(
            path,
            tokens=np.array([token for text in ids for token in text], dtype=np.uint16),
            learn=np.array([flag for text in ids for flag in learnt(text)], dtype=np.uint8),
            ends=np.cumsum([len(text) for text in ids]),
        )
    with np.load(path) as kept:
        return Texts(kept["tokens"], kept["learn"], kept["ends"])


def batches(texts: Texts, tokens: int, seed: int) -> list[list[int]]:
    """All texts once, in batches of about ``tokens`` tokens and of texts of like length, in random order."""
    rng = random.Random(seed)
    lengths = np.diff(texts.ends, prepend=0)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 30)
    out: list[list[int]] = [[]]
    width = 0
    for i in order:
        width = max(width, lengths[i])
        if out[-1] and (len(out[-1]) + 1) * width > tokens and len(out[-1]) % 4 == 0:  # four workers can share it
            out.append([])
            width = lengths[i]
        out[-1].append(i)
    rng.shuffle(out)
    return out
