"""The peers of `bench zero`: an SFT step on several processes with everything sharded, by FSDP2 or DeepSpeed's ZeRO-3.

    python sharded.py {fsdp2|deepspeed} --shape small --precision f32 --ranks 2 --steps 5

Prints what steps.py prints; `peak_mib` is what all processes hold together after the steps, pages that they share counted
once. DeepSpeed compiles an operation of its own at its first start, which takes a minute, and needs ninja:

    venv/bin/pip install --no-deps deepspeed==0.19.8 hjson py-cpuinfo einops msgpack && venv/bin/pip install ninja
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from steps import SHAPES, Shape, language_model, optimizer, tokens, update


def fsdp2(shape: Shape, precision: str, ids: Tensor) -> Callable[[], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = language_model(shape).train()
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    adamw = optimizer(model)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        update(model, adamw)

    return step


def zero3(shape: Shape, precision: str, ids: Tensor) -> Callable[[], None]:
    import deepspeed

    deepspeed.init_distributed()
    settings = {
        "train_micro_batch_size_per_gpu": ids.shape[0],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "contiguous_gradients": True},
        "bf16": {"enabled": precision == "bf16"},
    }
    model = language_model(shape).train()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=settings)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step


def held_mib() -> float:
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    ranks = str(args.ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, LOCAL_SIZE=ranks, DS_ACCELERATOR="cpu")
    torch.set_num_threads(max(1, args.threads // args.ranks))
    shape = SHAPES[args.shape]
    rows = range(rank, shape.sequences, args.ranks)
    ids = torch.tensor([tokens(row, shape.length, shape.vocabulary) for row in rows])
    step = {"fsdp2": fsdp2, "deepspeed": zero3}[args.engine](shape, args.precision, ids)
    seconds = []
    for _ in range(args.warmup + args.steps):
        dist.barrier()
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    slowest, held = torch.tensor(seconds[args.warmup :]), torch.tensor(held_mib())
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(held)
    if rank == 0:
        count = shape.sequences * shape.length
        print(json.dumps({"seconds": slowest.tolist(), "tokens": count, "peak_mib": held.item(), "phases": []}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["fsdp2", "deepspeed"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(rank_main, (args, port), args.ranks)


if __name__ == "__main__":
    main()
