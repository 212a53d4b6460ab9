"""How trainers and evaluation harnesses call `generate()` on a model of transformers, decoded by us (`unspool.enable`).

The calls are those of TRL's GRPO and online trainers and of lm-eval's `generate_until`, without these libraries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from families import make_model
from torch import Tensor

import unspool


@contextlib.contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """A model in training, as trainers make it ready for `generate()`: without recomputing activations."""
    model.gradient_checkpointing_disable()
    try:
        yield model
    finally:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()


def train(adapter: bool, cast: bool, steps: list[int]) -> tuple[list[Tensor], list[list[int]], int]:
    """Two steps of a policy that learns from its own samples: weights, texts, and steps of our loop."""
    torch.manual_seed(0)
    model = make_model("llama")
    if adapter:
        wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, wanted)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    steps.clear()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    config = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=True, temperature=0.9, top_p=1.0, top_k=0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cache_implementation=None,
    )  # fmt: skip
    ids = torch.tensor([[0, 0, 5, 9, 11], [0, 17, 4, 8, 6]]).repeat_interleave(2, 0)
    mask = (ids != 0).long()
    texts = []
    for _ in range(2):
        if hasattr(model, "unspool_report"):  # while we decode it
            assert model.unspool_report().tier == "rows"  # without a past, since activations are recomputed
        with unwrapped(model) as policy, torch.no_grad():
            if hasattr(model, "unspool_report"):
                assert model.unspool_report().tier == "ragged"  # hooks that mark embeddings are not in the way
            out = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        assert not out.is_inference()
        texts += out.tolist()
        whole = torch.cat([mask, torch.ones_like(out[:, ids.shape[1] :])], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            logits = model(input_ids=out, attention_mask=whole, use_cache=False).logits
        chances = logits[:, :-1].float().log_softmax(-1).gather(-1, out[:, 1:, None])
        reward = (out[:, ids.shape[1] :] % 7).float().mean(dim=1)
        (-(reward - reward.mean())[:, None] * chances[..., 0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.training
    return [one.detach().clone() for one in model.parameters()], texts, len(steps)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_policy_learns_bitwise_the_same(adapter: bool, cast: bool, steps: list[int]) -> None:
    expected, said, none = train(adapter, cast, steps)
    with unspool.enabled():
        found, texts, ours = train(adapter, cast, steps)
    assert (none, ours) == (0, 12)
    assert texts == said
    assert all(map(torch.equal, found, expected))


def test_a_harness_generates_until(steps: list[int]) -> None:
    """Criteria of its own that answer for the whole batch, `max_length`, and an autocast that is switched off."""
    model = make_model("llama")
    ids = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(4))
    ids[1, :2] = 0
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_length": 20, "use_cache": True}
    call |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    free = model.generate(**call)[:, 6:]

    class Until(transformers.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, ends: list[int]) -> None:
            self.ends, self.done = ends, [False] * len(ends)

        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            for row, end in enumerate(self.ends):
                self.done[row] = self.done[row] or end in ids[row, 6:].tolist()
            return all(self.done)

    def until() -> Any:
        return transformers.StoppingCriteriaList([Until([int(free[row, 3 + row]) for row in range(3)])])

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = model.generate(**call, stopping_criteria=until())
        with unspool.enabled():
            found = model.generate(**call, stopping_criteria=until())
    assert found.tolist() == expected.tolist()
    assert 6 < found.shape[1] < 20
    assert len(steps) == found.shape[1] - 6


def test_a_trainer_batches_continuously() -> None:
    """`generate_batch` with transformers' own settings for it, and what comes back read as theirs."""
    model = make_model("llama").train()
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    prompts = [[5, 9, 11], [17, 4, 8, 6], [3]]
    if hasattr(transformers.generation, "ContinuousBatchingConfig"):
        batching = {"continuous_batching_config": transformers.generation.ContinuousBatchingConfig()}
    else:  # transformers 5.2
        batching = {"num_q_padding_intervals": 2, "num_kv_padding_intervals": 2, "allow_block_sharing": False}
    with unspool.enabled(), torch.no_grad():
        answers = model.generate_batch(prompts, generation_config=config, progress_bar=False, **batching)
    model.train()
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert answer.generated_tokens == alone.tolist()[: len(answer.generated_tokens)]
