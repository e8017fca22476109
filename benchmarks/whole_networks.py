"""Latency of whole networks: the validated configurations of runs, as bottlenecks and folded, and the full network.

    python benchmarks/whole_networks.py RUN [RUN ...] [--batch 1] [--threads 1] [--repeats 30]

Baseline: the full network that was decomposed. One process times all networks, one sample of each per round
(`gross_ray.search.timing`). "folded" is the network that `gross export --fold latency_ms` writes: a layer becomes the
equivalent dense convolution where that is faster on this machine. The runs must have their checkpoints and share one
base network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from gross_ray.report.model_card import most_accurate_seed
from gross_ray.run.opened import Run
from gross_ray.run.store import RunStore
from gross_ray.search.cost import count_macs
from gross_ray.search.folding import fold
from gross_ray.search.latency import LatencyOptions
from gross_ray.search.timing import device_name, typical_ms

FULL = "full network"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30, help="rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, runs = torch.device(options.device), [Run(RunStore.open(run)) for run in options.runs]
    networks: dict[str, nn.Module] = {FULL: runs[0].base.on("cpu").eval()}
    shape = runs[0].base.input_shape
    latency = LatencyOptions(batch_size=options.batch, threads=options.threads)
    for run in runs:
        for configuration in dict.fromkeys(run.store.read_table("validations")["configuration"]):
            if configuration in networks:
                continue
            network = run.validated(configuration, most_accurate_seed(run.store, configuration) or 0)
            folded, foldings = fold(network, shape, objective="latency_ms", latency=latency, device=device)
            networks[configuration] = network.eval()
            dense = sum(one.folded for one in foldings)
            networks[f"{configuration}, folded ({dense} of {len(foldings)} layers dense)"] = folded.eval()
    images = torch.randn(options.batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        times = typical_ms(
            {name: (network.to(device), [images]) for name, network in networks.items()}, options.repeats, device
        )
    where = f"{device_name(device)}, {options.threads} thread(s), batch of {options.batch}"
    print(f"{where}; median of {options.repeats} rounds")
    for name, ms in times.items():
        macs = count_macs(networks[name].to("cpu"), shape)
        print(f"  {name}: {ms:.2f} ms, {macs / 1e6:.1f} M MACs; ratio to the full network {times[FULL] / ms:.2f}")


if __name__ == "__main__":
    main()
