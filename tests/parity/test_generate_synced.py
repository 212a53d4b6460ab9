"""Processes that share a model's weights, with rows of different lengths: the texts of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model

import unspool

RANK = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from families import make_model
import unspool

how, port, rank, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
if how == "native":
    model = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()  # unpacked weights
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.get_submodule(sys.argv[5]):
        fully_shard(layer, mesh=mesh)
    generate = model.generate
else:
    module = make_model("llama")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    if how == "first":  # of the older kind, which stands around a part
        for place, part in enumerate(module.model.layers):
            module.model.layers[place] = FullyShardedDataParallel(part, device_id=torch.device("cpu"))
    else:
        for part in (*module.model.layers, module):
            fully_shard(part, mesh=mesh)
    generate = unspool.wrap(module).generate
    if how == "enabled":
        unspool.enable()
        generate = module.generate
# whoever does not say so is seen to need it
said = {"synced_gpus": True} if how == "sharded" else {}
found = []
for more in json.loads(sys.argv[6]):
    ids = torch.tensor([[5, 9, 11], [17, 4, 8]])[rank:]
    found.append(generate(ids, max_new_tokens=4 + 9 * rank, eos_token_id=None, pad_token_id=0, **said,
                          **more).tolist())
print(json.dumps(found))
dist.destroy_process_group()
"""


def port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("how", ["sharded", "enabled", "native", pytest.param("first", marks=pytest.mark.full)])
def test_two_processes_share_the_weights(how: str, tmp_path: Path) -> None:
    """One process wants three times as many tokens as the other; without its share of the steps it would wait."""
    make_model("llama").save_pretrained(tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    settings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.2},
    ]
    (tmp_path / "rank.py").write_text(RANK)
    number = str(port())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), how, number, str(rank), str(tmp_path), layers,
             json.dumps(settings)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (out, errors) in enumerate(outputs):
        assert processes[rank].returncode == 0, errors[-2000:]
        ids = torch.tensor([[5, 9, 11], [17, 4, 8]])[rank:]
        expected = [
            model.generate(ids, max_new_tokens=4 + 9 * rank, eos_token_id=None, pad_token_id=0, **more).tolist()
            for more in settings
        ]
        assert json.loads(out.splitlines()[-1]) == expected


def test_without_other_processes(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        model.generate([[5, 6]], synced_gpus=True)
    assert model.generate([[5, 6]], synced_gpus=False, max_new_tokens=2).shape == (1, 4)
