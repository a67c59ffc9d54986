"""Trains the bundled laboratory: `workbench forge --preset nano --out FOLDER` (one seeded command;
`python -m workbench.nano.forge` is the same).

The base first (named tasks and unnamed demonstrations, loss on answers), then every adapter of the pool at once over the
stack. Writes base/, adapters/NAME/, forge.json (recipe, log, held-out accuracies).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from workbench.adapt.fresh import PROJECTIONS, Plan, train_fresh
from workbench.adapt.gradient import Curves, Schedule, cosine_rate
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.card import model_card
from workbench.compose import grouped
from workbench.evaluate import encode_task, evaluate, score
from workbench.nano import world
from workbench.nano.corpus import batches, corpus, seen_by_name
from workbench.nano.shelf import make_tokenizer

__all__ = ["PRESETS", "Preset", "forge", "new_model", "train_base", "train_pool"]


@dataclass(frozen=True)
class Preset:
    """Everything that determines a laboratory, but for the machine it is trained on."""

    name: str
    hidden: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 352
    documents: int = 1_500_000
    tokens_per_step: int = 131_072
    base_steps: int = 8000
    base_lr: float = 2e-3
    operations: tuple[str, ...] = tuple(world.BASE_OPS)
    latent: tuple[str, ...] = tuple(world.LATENT_OPS)
    upstream: int = len(world.UPSTREAM)
    examples: int = 4000
    adapter: Schedule = Schedule(steps=400, lr=3e-3, batch=48, every=50)
    seed: int = 0


PRESETS = {
    "nano": Preset("nano"),
    "tiny": Preset(
        "tiny",
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate=64,
        documents=6000,
        tokens_per_step=8192,
        base_steps=150,
        base_lr=1e-2,
        operations=("first", "last", "double", "count"),
        latent=("ends",),
        upstream=6,
        examples=200,
        adapter=Schedule(steps=30, lr=1e-2, batch=16, every=10),
    ),
}
_RANKS, _RATIOS = (2, 4, 8, 8, 16, 4, 8, 16, 8, 2, 4, 32), (1.0, 2.0, 2.0, 0.5, 2.0, 1.0)


_POOL_FIELDS = ("upstream", "examples", "adapter")


def plan_of(i: int) -> Plan:
    """The i-th adapter's rank, α/r, rslora and targets: as mixed as the Hub's (recycling study, pool statistics)."""
    targets = ("q_proj", "v_proj") if i % 9 == 4 else PROJECTIONS[:4] if i % 9 == 7 else PROJECTIONS
    ratio, rank, rslora = _RATIOS[(i // 2) % len(_RATIOS)], _RANKS[i % len(_RANKS)], i % 10 == 6
    return Plan(rank, ratio, rslora, targets)


def new_model(preset: Preset, tokenizer):
    """A Llama of the preset's size with weights drawn under its seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.intermediate,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(preset.seed)
    return LlamaForCausalLM(config)


def train_base(preset: Preset, device: str = "cpu", *, workers: int = 1, say=print) -> tuple[Base, list[dict]]:
    """Train the base; returns it and its log (step, loss, seconds)."""
    tokenizer = make_tokenizer()
    alphabet = "".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))[2:])
    start = time.perf_counter()
    flat, mask, lengths = corpus(
        preset.operations, preset.latent, preset.documents, "\0\1" + alphabet, seed=preset.seed, workers=workers
    )
    say(f"{len(lengths):,} documents, {len(flat):,} tokens in {time.perf_counter() - start:.0f} s")
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])).to(device)
    flat = torch.from_numpy(np.concatenate([flat, np.zeros(2048, np.uint8)])).to(device)
    mask = torch.from_numpy(np.concatenate([mask, np.zeros(2048, np.uint8)])).to(device)
    model = new_model(preset, tokenizer).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=preset.base_lr, betas=(0.9, 0.98), weight_decay=0.05)
    shape = Schedule(steps=preset.base_steps, lr=preset.base_lr, warmup=0.03)
    feed, log = batches(lengths, preset.tokens_per_step, np.random.default_rng(preset.seed)), []
    for step in range(preset.base_steps):
        chosen = next(feed)
        size = torch.from_numpy(lengths[chosen]).to(device)
        where = offsets[torch.from_numpy(chosen).to(device), None] + torch.arange(
            int(lengths[chosen].max()), device=device
        )
        inside = torch.arange(where.shape[1], device=device) < size[:, None]
        ids, answers = flat[where].long() * inside, mask[where].bool() & inside
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][answers[:, 1:]]
            loss = cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][answers[:, 1:]])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = preset.base_lr * cosine_rate(step, shape)
        optimiser.step()
        if step % max(1, preset.base_steps // 40) == 0 or step + 1 == preset.base_steps:
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - start, 1)})
            say(f"base step {step}: loss {log[-1]['loss']}, {log[-1]['seconds']} s")
    return Base(model, tokenizer, preset.name), log


def train_pool(
    base: Base, specs: Sequence[world.Spec], plans: Sequence[Plan], preset: Preset, seeds: Sequence[int], draw: int = 0
) -> tuple[list[Adapter], Curves]:
    """Train one adapter per task, all at once; `draw` is the seed of the examples."""
    tasks = [world.make_task(spec, seed=draw, n_train=preset.examples, n_validation=50, n_test=1) for spec in specs]
    return train_fresh(
        base,
        [spec.slug for spec in specs],
        [encode_task(base, task, task.train) for task in tasks],
        [encode_task(base, task, task.validation) for task in tasks],
        preset.adapter,
        seeds=seeds,
        plans=plans,
        autocast=base.device.type == "cuda",
    )


def report_base(base: Base, preset: Preset, per_task: int = 100) -> dict[str, float]:
    """Held-out exact match of the base: named seen and unseen, in context by number of demonstrations, latent by name."""
    seen, unseen = seen_by_name(preset.operations, preset.seed)

    def by_name(specs):
        return float(np.mean([float(evaluate(base, world.make_task(s, n_test=per_task)).accuracy) for s in specs]))

    def in_context(operations, shots):
        specs = [world.Spec(op, domain) for op in operations for domain in ("months", "animals", "letters")]
        tasks = [world.make_task(spec, n_test=per_task) for spec in specs]
        groups = [encode_task(base, task, task.test, shots=shots) for task in tasks]
        return float(score(base, groups).accuracy.mean())

    rows = {"named, seen": by_name(seen), "named, unseen combination": by_name(unseen)}
    for shots in (1, 3, 5):
        rows[f"in context, {shots} shown, named operations"] = in_context(preset.operations, shots)
        rows[f"in context, {shots} shown, latent operations"] = in_context(preset.latent, shots)
    rows["latent, by name"] = by_name(
        [world.Spec(op, d) for op in preset.latent for d in ("months", "animals", "letters")]
    )
    return {key: round(value, 4) for key, value in rows.items()}


def _compute_in_fp32(config: Path) -> None:
    """State in a saved configuration that its bf16 weights are to be computed with in fp32, on a GPU too."""
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def forge(preset: Preset, out: Path, device: str = "cpu", *, workers: int = 1, say=print) -> dict:
    """Train base and pool and write them under `out`; returns the report that is also stored there as forge.json.

    A base that an earlier run of the same recipe left under `out` is kept, and only the pool is trained.
    """
    report = _earlier(preset, out)
    if not report:
        base, log = train_base(preset, device, workers=workers, say=say)
        base.model.to(torch.bfloat16).save_pretrained(out / "base")
        base.tokenizer.save_pretrained(out / "base")
        _compute_in_fp32(out / "base" / "config.json")
    base = Base.load(out / "base", device=device)  # what is shipped, rounded to bf16, is what the pool is trained on
    base.name = f"workbench/{preset.name}-base"
    quick = preset.name == "tiny"
    if not report:
        report = {
            "preset": asdict(preset),
            "torch": torch.__version__,
            "device": device if device == "cpu" else torch.cuda.get_device_name(),
            "parameters": sum(p.numel() for p in base.model.parameters()),
            "base": report_base(base, preset, 20 if quick else 100),
            "log": log,
        }
        (out / "base" / "README.md").write_text(_base_card(report), encoding="utf-8")
    say(json.dumps(report["base"], indent=1))
    specs = list(world.UPSTREAM[:: max(1, len(world.UPSTREAM) // preset.upstream)][: preset.upstream])
    plans, seeds = [plan_of(i) for i in range(len(specs))], [1000 * preset.seed + i for i in range(len(specs))]
    start = time.perf_counter()
    adapters, curves = train_pool(base, specs, plans, preset, seeds)
    report["preset"], report["pool_seconds"], report["pool"] = asdict(preset), round(time.perf_counter() - start, 1), {}
    for g, (adapter, spec, plan) in enumerate(zip(adapters, specs, plans, strict=True)):
        task = world.make_task(spec, n_test=20 if quick else 500)
        folder = out / "adapters" / adapter.name
        read = save_stranger(adapter, plan, folder)
        before, after = (
            round(float(evaluate(base, task, u).accuracy), 4) for u in (None, grouped([read], base.device))
        )
        validation = [round(float(v), 4) for v in curves.validation[:, g]]
        report["pool"][adapter.name] = {
            "zero_shot": before,
            "accuracy": after,
            "validation": validation,
            **asdict(plan),
        }
        schedule = preset.adapter
        training = f"{preset.examples} examples, {schedule.steps} steps of {schedule.batch}, AdamW at {schedule.lr}"
        result = f"exact match {after:.3f} on {len(task.test)} held-out examples (the base alone: {before:.3f})"
        info = {"task": spec.instruction, "training": training, "result": result, "licence": "mit"}
        (folder / "README.md").write_text(model_card(replace(read, info=info)), encoding="utf-8")
    own, zero = (np.mean([row[key] for row in report["pool"].values()]) for key in ("accuracy", "zero_shot"))
    say(
        f"{len(adapters)} adapters in {report['pool_seconds']:.0f} s; on their own tasks {own:.3f}, the base alone {zero:.3f}"
    )
    (out / "forge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _earlier(preset: Preset, out: Path) -> dict:
    """The report of an earlier run whose base was made by the same recipe, or nothing."""
    if not (out / "forge.json").is_file() or not (out / "base").is_dir():
        return {}
    report = json.loads((out / "forge.json").read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(asdict(preset)))
    return report if all(report["preset"][key] == mine[key] for key in mine if key not in _POOL_FIELDS) else {}


def save_stranger(adapter: Adapter, plan: Plan, folder: Path) -> Adapter:
    """Write an adapter as its author would have: raw factors in bf16, its own α and rslora; returns what reads back."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, f in adapter.modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = f.A.to(torch.bfloat16).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = f.raw_B.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    alpha = plan.ratio * plan.rank
    config = adapter.peft_config() | {
        "r": plan.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": plan.rslora,
        "target_modules": list(plan.targets),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Adapter.load(folder)


def _base_card(report: dict) -> str:
    rows = "\n".join(f"| {key} | {value:.3f} |" for key, value in report["base"].items())
    return (
        f"---\nlibrary_name: transformers\ntags:\n- workbench\n---\n\n# The base of the {report['preset']['name']} laboratory\n\n"
        f"A Llama of {report['parameters']:,} parameters, trained by `python -m workbench.nano.forge --preset {report['preset']['name']}` "
        f"on short list puzzles (see `workbench.nano.world`).\n\n| held-out exact match | |\n|---|---|\n{rows}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`workbench forge` with these arguments, by default the command line's."""
    from workbench.cli import app

    app(["forge", *(sys.argv[1:] if argv is None else argv)], prog_name="workbench", standalone_mode=argv is None)


if __name__ == "__main__":
    main()
