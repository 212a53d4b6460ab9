"""What all tests share: tiny checkpoints made by transformers, and devices that may not be there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import oldest
import pytest
import torch
from hypothesis import settings

from unspool.config.notice import warn_once

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "Once upon a time there was a little fox who lived at the edge of the wood.",
    "The fox met an owl, and the owl said: what are you looking for at this time of the day?",
    "A river, said the fox, wide and blue. Naïve café, 日本語 and 🦊 are rare words here.",
] * 8


def pytest_configure(config: pytest.Config) -> None:
    """Processes as tests need them.

    Ctrl-C reaches the programs that tests start, also where the tests themselves run in a shell's background; and each
    of several test processes has one thread, since threads of all would wait for each other's cores.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of a device that is not there, and what an older transformers does otherwise."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        why = oldest.reason(item.nodeid)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def remarks() -> None:
    """Remarks that are made once in a process are made anew in each test."""
    warn_once.cache_clear()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, saved by transformers: weights, settings, template."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    tokenizer = _byte_level_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> Any:
    """A BPE tokenizer of bytes with some merges, a beginning, an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the steps that our loop runs, in either tier, so that no test passes because transformers did the work."""
    from unspool.bridge import probe
    from unspool.bridge.rows import RowsRunner
    from unspool.decode.runner import PagedRunner

    counted: list[int] = []
    judging: list[None] = []

    def counting(kind: Any) -> None:
        original = kind.run

        def run(self: Any, *args: Any) -> Any:
            counted.extend([] if judging else [1])
            return original(self, *args)

        monkeypatch.setattr(kind, "run", run)

    def compare(*args: Any) -> Any:
        judging.append(None)
        try:
            return original(*args)
        finally:
            judging.pop()

    original = probe._compare
    monkeypatch.setattr(probe, "_compare", compare)
    counting(RowsRunner)
    counting(PagedRunner)
    return counted
