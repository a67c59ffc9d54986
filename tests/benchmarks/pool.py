"""A pool of a thousand adapters: `python tests/benchmarks/pool.py`, a table of time and memory in Markdown.

Two pools are made on the spot. One has Llama-3.1-8B's shapes: the headers are real, the files have their full size
(168 to 671 MB) and, being sparse, take no disk; it is for everything that reads no values. The other has real weights of
a small Llama. Each line is a process of its own; memory is the most that it held above what it held once it had
imported the package. "Second" openings read the inventory that the first left.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = (16, 16, 16, 32, 64)  # about the recycling study's mix
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_key_value_heads": 2}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def base(folder: Path, size: dict) -> Path:
    """A base model's folder: of its configuration alone."""
    heads = 4 * size["num_key_value_heads"]
    vocabulary = 128256 if size is LARGE else 1000
    folder.mkdir(parents=True)
    config = LLAMA | size | {"num_attention_heads": heads, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(size: dict) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in) of the seven projections of every layer."""
    d, wide, narrow = size["hidden_size"], size["intermediate_size"], size["hidden_size"] // 4
    each = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (narrow, d), "self_attn.v_proj": (narrow, d)}
    each |= {
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (wide, d),
        "mlp.up_proj": (wide, d),
        "mlp.down_proj": (d, wide),
    }
    return {f"model.layers.{i}.{name}": s for i in range(size["num_hidden_layers"]) for name, s in each.items()}


def tensors(size: dict, rank: int) -> dict[str, tuple[int, int]]:
    """A PEFT file's tensors and their shapes."""
    found = {}
    for module, (d_out, d_in) in shapes(size).items():
        found[f"base_model.model.{module}.lora_A.weight"] = (rank, d_in)
        found[f"base_model.model.{module}.lora_B.weight"] = (d_out, rank)
    return found


def write(folder: Path, size: dict, number: int, values: bool) -> None:
    """Adapters in their folders; without values each file is a header and a hole."""
    for i in range(number):
        rank = RANKS[i % len(RANKS)]
        place = folder / f"author{i % 37}" / f"adapter{i:04}"
        place.mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        config |= {
            "base_model_name_or_path": "llama",
            "target_modules": [m.rsplit(".", 1)[-1] for m in list(shapes(size))[:7]],
        }
        (place / "adapter_config.json").write_text(json.dumps(config))
        header, end = {}, 0
        for key, (height, width) in tensors(size, rank).items():
            header[key] = {"dtype": "F32", "shape": [height, width], "data_offsets": [end, end + 4 * height * width]}
            end += 4 * height * width
        text = json.dumps(header).encode()
        with (place / "adapter_model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            if values:
                import torch

                noise = torch.randn(end // 4, generator=torch.Generator().manual_seed(i)) / 16
                file.write(noise.numpy().data)
            else:
                file.truncate(8 + len(text) + end)


def held() -> float:
    """MiB, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(stage: str, home: Path, number: int) -> tuple[float, float]:
    """Seconds and MiB that a stage takes in this process."""
    import torch

    import workbench as wb
    from workbench.folders import find_adapters, revision
    from workbench.inventory import Inventory, kept_shapes, place, settings
    from workbench.screen import screen

    torch.set_num_threads(1)
    large, small, cache = home / "large", home / "small", home / "cache"

    def opened(folder: Path) -> wb.Pool:
        return wb.Pool.open(folder / "pool", base=folder / "base", cache=cache, inventory=True, rules=())

    def headers() -> None:
        """What the first opening does, but for the values."""
        layers, names = kept_shapes(str(large / "base"), cache), ["llama"]
        told = settings((), layers, names)
        kept = Inventory(place(str((large / "pool").resolve()), cache), told)
        found = find_adapters(large / "pool")
        before = {name: revision(folder) for name, folder in found.items()}
        judged = [screen(folder, layers, names, (), name=name, until="header") for name, folder in found.items()]
        assert all(verdict.accepted for verdict in judged)
        kept.add((verdict, before[verdict.name]) for verdict in judged)

    def chosen(pool: wb.Pool) -> wb.Stack:
        return pool.stack(pool.names[:number], lazy=True)

    prepared = None
    if stage in ("table", "outline", "merge", "gram"):
        prepared = opened(small if stage in ("merge", "gram") else large)
    stages = {
        "headers": headers,
        "large": lambda: opened(large),
        "small": lambda: opened(small),
        "table": lambda: prepared.table,
        "outline": lambda: chosen(prepared).ranks(),
        "merge": lambda: wb.merge(chosen(prepared), "average", rank=16),
        "gram": lambda: chosen(prepared).gram(),
    }
    before, start = held(), time.perf_counter()
    stages[stage]()
    return time.perf_counter() - start, held() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=1000, help="adapters of a pool")
    parser.add_argument("--layers", type=int, default=SMALL["num_hidden_layers"], help="of the small model")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(work(args.stage[0], Path(args.stage[1]), int(args.stage[2]))))
        return
    n, size = args.number, SMALL | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as home:
        for name, shape, values in (("large", LARGE, False), ("small", size, True)):
            base(Path(home) / name / "base", shape)
            write(Path(home) / name / "pool", shape, n, values)
        weights = list(Path(home).glob("*/pool/*/*/*.safetensors"))
        total = {k: sum(w.stat().st_size for w in weights if f"/{k}/pool" in str(w)) / 1e9 for k in ("large", "small")}
        print(
            f"{n} adapters of 8B: {total['large']:.1f} GB; {n} small ones of {args.layers} layers: {total['small']:.2f} GB\n"
        )
        print("| what | adapters | s | MiB |\n|---|---|---|---|")
        lines = [
            ("8B: first screening, headers", "headers", n),
            ("8B: second opening", "large", n),
            ("8B: table", "table", n),
            ("8B: lazy stack, its ranks", "outline", n),
            ("small: first screening, with values", "small", n),
            ("small: second opening", "small", n),
        ]
        lines += [("small: lazy merge, average at rank 16", "merge", k) for k in (50, 400) if k <= n]
        lines += [("small: Gram matrix of a lazy stack", "gram", k) for k in (50, 100) if k <= n]
        for label, stage, count in lines:
            command = [sys.executable, __file__, "--stage", stage, home, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, memory = json.loads(done.stdout.splitlines()[-1])
            print(f"| {label} | {count} | {seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
