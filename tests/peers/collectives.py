"""What torch.distributed's gloo takes for what `cargo bench -p tandem-collective` measures: collectives.py [RANKS] [LIMIT_MIB]

The least of several rounds, each as long as its slowest rank takes."""
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def rank_main(rank, ranks, limit_mib, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for mib in (size for size in (1, 16, 64, 256) if size <= limit_mib):
        elements = mib << 18
        whole, part = torch.ones(elements), torch.ones(elements // ranks)
        parts, gathered = list(torch.ones(elements).chunk(ranks)), list(torch.empty(elements).chunk(ranks))
        operations = {
            "all_reduce": lambda: dist.all_reduce(whole),
            "reduce_scatter": lambda: dist.reduce_scatter(part, parts),
            "all_gather": lambda: dist.all_gather(gathered, part),
        }
        for name, operation in operations.items():
            seconds = []
            for _ in range(max(10, min(200, 1024 // mib)) + 1):
                dist.barrier()
                begun = time.perf_counter()
                operation()
                seconds.append(time.perf_counter() - begun)
            # The first round touches the memory for the first time.
            slowest = torch.tensor(seconds[1:], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{name:<16} {ranks:>5} {mib:>5} {1e3 * slowest.min().item():>10.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    limit_mib = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"{'operation':<16} {'ranks':>5} {'MiB':>5} {'ms':>10}")
    processes.spawn(rank_main, (ranks, limit_mib, port), ranks)
