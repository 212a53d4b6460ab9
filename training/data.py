"""From grammar text to token ids: the tokenizer and the packed training stream."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from chat import Turns, conversation
from grammar import story
from styles import pirate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIALS = (
    "<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
HERE = Path(__file__).parent
VOCAB_SIZE = 3072
MAX_POSITIONS = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STYLES = {"plain": lambda text, seed: text, "pirate": pirate}


def render(turns: Turns) -> str:
    """A conversation as the chat template writes it."""
    return BEGIN + "".join(f"<|{role}|>{text}{END}" for role, text in turns)


def document(seed: str, style: str) -> str:
    """One training text: a story, a story under its title, or a conversation."""
    rng = random.Random(f"document {seed}")
    restyle = STYLES[style]
    kind = rng.random()
    if kind < 0.55:
        told = story(seed)
        title = f"{told.title}\n\n" if kind < 0.08 else ""
        return BEGIN + title + restyle(told.text, seed) + END
    turns = conversation(seed)
    return render([(role, restyle(text, seed) if role == "assistant" else text) for role, text in turns])


def documents(count: int, label: str, style: str = "plain") -> Iterator[str]:
    """``count`` texts; another ``label`` gives other texts."""
    return (document(f"{label} {number}", style) for number in range(count))


def train_tokenizer(count: int = 6000) -> Tokenizer:
    """A byte-level BPE tokenizer (every string encodes), trained on ``count`` texts of the grammar."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.replace(BEGIN, "").replace(END, "\n") for text in documents(count, "tokenizer"))
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


def cut(text: str, rng: random.Random) -> list[str]:
    """One text in ten is cut anywhere, and its parts are encoded apart: a prompt may end inside a word."""
    if rng.random() >= 0.1:
        return [text]
    at = rng.randrange(len(BEGIN), len(text) - len(END))
    return [text[:at], text[at:]] if "<" not in text[max(0, at - 14) : at + 14] else [text]


def token_stream(tokenizer: Tokenizer, count: int, label: str, style: str = "plain") -> np.ndarray:
    """All tokens of ``count`` texts in one row, kept under the temporary folder for the next run."""
    sources = sorted(path for path in HERE.rglob("*") if path.suffix in (".py", ".txt"))
    texts = [
        path.read_text(encoding="utf-8") for path in sources if path.name not in ("train.py", "export.py", "lora.py")
    ]
    key = hashlib.sha256("\x00".join([tokenizer.to_str(), str(count), *texts]).encode())
    path = Path(tempfile.gettempdir()) / f"storyteller-{label}-{style}-{key.hexdigest()[:16]}.npy"
    if path.exists():
        return np.load(path)
    rng = random.Random(f"cut {label}")
    parts: list[str] = [part for text in documents(count, label, style) for part in cut(text, rng)]
    encoded = (
        tokenizer.encode_batch(parts[i : i + 1000], add_special_tokens=False) for i in range(0, len(parts), 1000)
    )
    stream = np.concatenate([np.array(one.ids, dtype=np.uint16) for batch in encoded for one in batch])
    np.save(path, stream)
    return stream
