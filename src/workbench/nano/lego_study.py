"""The five studies of LoRA-LEGO behind notebook 05, each over one draw of the bundled pool's adapters; see `lego_grid`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from workbench.adapt.fresh import Plan, train_fresh
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.canonical import CANONICAL
from workbench.controls import random_like
from workbench.evaluate import encode_task
from workbench.merge import merge, truncate
from workbench.merge.observe import collect
from workbench.multitask import Variant, multitask, score_at, tune
from workbench.nano import world
from workbench.pool import Pool
from workbench.reweighting import norm_decay, variances
from workbench.stack import Stack
from workbench.tasks import Task, load

__all__ = ["REWEIGHTINGS", "STUDIES", "Examples", "Job", "clusters", "draw", "needs", "parts_of"]

REWEIGHTINGS = {
    name: {"parameter_reweighting": name in ("both", "parameter"), "output_reweighting": name in ("both", "output")}
    for name in ("both", "parameter", "output", "none")
}
_EQUAL = 8  # the rank of equal draws: the commonest in the pool
_PRUNED = 10  # adapters to a job
_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Examples:
    """How many of each task's examples a study uses, and how many steps a new adapter is trained."""

    train: int = 80
    validation: int = 20
    test: int = 200
    steps: int = 400


@dataclass(frozen=True)
class Job:
    """One process's unit of work; `stratum` is how adapters are drawn, or the task of a composition."""

    study: str
    stratum: str = ""
    n: int = 0
    draw: int = 0
    form: str = ""


def draw(pool: Pool, stratum: str, n: int, seed: int) -> Stack:
    """n adapters, no two of one task: `equal`, all of rank 8; `mixed`, the pool's ranks in turn."""
    rng = random.Random(f"{stratum}|{n}|{seed}")
    table = pool.table[pool.table.accepted & ~pool.table.name.str.endswith("-v2")]
    ranks = {int(rank): sorted(part) for rank, part in table.groupby("rank")["name"]}
    if stratum == "equal":
        ranks = {_EQUAL: ranks[_EQUAL]}
    for names in ranks.values():
        rng.shuffle(names)
    most = max(map(len, ranks.values()))
    dealt = [names[turn] for turn in range(most) for names in ranks.values() if turn < len(names)]
    return pool.stack(dealt[:n])


def parts_of(spec: world.Spec) -> list[str]:
    """The adapters of a composition's two operations, each the one that shares most else with it."""
    fitting = [up for up in world.UPSTREAM if not up.copy]
    found = []
    for part in spec.parts:
        wanted = replace(spec, operation=part)
        best = max(fitting, key=lambda up, wanted=wanted: (world.relevance(wanted, up), up.domain == spec.domain))
        found.append(best.slug)
    return found


def needs(task: Task) -> str:
    """What a task needs that the base lacks: a new operation, a new format, both, or two operations in a row."""
    if task.labels["kind"] == "composition":
        return "composition"
    new = task.labels["operation"] in world.POOL_OPS, task.labels["format"] in world.POOL_FORMATS
    return {(True, True): "both", (True, False): "new operation", (False, True): "new format"}.get(
        new, "two operations"
    )


def clusters(most: int, by: int = 2) -> list[int]:
    """Numbers of clusters to try: 1, the powers of `by` below `most`, and `most`."""
    found = [1]
    while found[-1] * by < most:
        found.append(found[-1] * by)
    return [*found, most] if most > 1 else found


def _variants(width: int, most: int) -> dict[str, Variant | list[Variant]]:
    return {
        **{
            name: (name, {})
            for name in ("average", "sum", "svd", "ties", "dare_ties", "tsv", "knots_ties", "iso_c", "iso_cts")
        },
        "ties, density chosen": [("ties", {"density": density}) for density in _DENSITIES],
        "lego": ("lego", {"k": width}),
        "lego, k chosen": [("lego", {"k": k}) for k in clusters(most)],
        "lego, k and form chosen": [
            ("lego", {"k": k, "canonical": form}) for k in clusters(most, 4)[1:-1] or [most] for form in CANONICAL
        ],
    }


def _width(stack: Stack) -> int:
    ranks = stack.ranks()
    return int(ranks[ranks > 0].float().mean() + 0.5)


def _most(stack: Stack) -> int:
    return int(stack.ranks().sum(0).max())


def _tasks(names: Sequence[str], examples: Examples, seed: int) -> dict[str, Task]:
    """Where there are many tasks, each has a quarter of the validation and test examples."""
    few = 4 if len(names) > 10 else 1
    counts = {"n_train": examples.train, "n_validation": examples.validation // few, "n_test": examples.test // few}
    return {name: load(f"nano/{name}", seed=seed + 1, **counts) for name in names}


def _merge(base: Base, pool: Pool, job: Job, examples: Examples) -> pd.DataFrame:
    stack = draw(pool, job.stratum, job.n, job.draw)
    width = _width(stack)
    return multitask(
        base,
        stack,
        _tasks(stack.names, examples, job.draw),
        _variants(width, _most(stack)),
        rank=width,
        fresh=(examples.train,),
        schedule=Schedule(steps=examples.steps, lr=3e-3, batch=32),
        seed=job.draw,
    )


def _sweep(base: Base, pool: Pool, job: Job, examples: Examples) -> pd.DataFrame:
    stack = draw(pool, job.stratum, job.n, job.draw)
    variants = {
        f"{which}, k={k}": ("lego", {"k": k, "canonical": job.form, **options})
        for k in clusters(_most(stack), 4 if job.n > 10 else 2)
        for which, options in REWEIGHTINGS.items()
    }
    frame = multitask(base, stack, _tasks(stack.names, examples, job.draw), variants, fresh=(), seed=job.draw)
    frame = frame[frame.method == "lego"]
    return frame.assign(canonical=job.form, reweighting=frame.variant.str.partition(",")[0])


def _scale(base: Base, pool: Pool, job: Job, examples: Examples) -> pd.DataFrame:
    real = draw(pool, job.stratum, job.n, job.draw)
    tasks = _tasks(real.names, examples, job.draw)
    seen = collect(
        base, real, {name: encode_task(base, task, task.validation) for name, task in tasks.items()}, tokens=500
    )
    rows = [seen.rows[name] for name in real.names]
    inputs = {module: torch.cat([own[module].x for own in rows if module in own]).cpu() for module, _ in real}
    out = []
    for control in ("", "sigma"):
        stack = random_like(real, control, seed=job.draw) if control else real
        alone = [stack.adapter(name) for name in stack.names]
        single = {name: variances(alone, x).mean() for name, x in (("layer inputs", inputs), ("Gaussian", None))}
        for k in clusters(_most(stack), 4 if job.n > 10 else 2):
            decay = norm_decay(stack, k, canonical=job.form)
            about = {"control": control, "k": k, "canonical": job.form}
            out += [
                about | {"measure": "norm decay", "value": decay.ratio.mean()},
                about | {"measure": "norm decay, orthogonal", "value": decay.orthogonal.mean()},
            ]
            for which, options in REWEIGHTINGS.items():
                merged = merge(stack, "lego", k=k, canonical=job.form, **options)
                for name, x in (("layer inputs", inputs), ("Gaussian", None)):
                    ratio = (variances([merged], x) / single[name]).to_numpy().mean()
                    out.append(about | {"reweighting": which, "measure": f"variance, {name}", "value": ratio})
    return pd.DataFrame(out).assign(adapters=len(real))


def _composition(base: Base, pool: Pool, job: Job, examples: Examples) -> pd.DataFrame:
    stack = pool.stack(parts_of(world.find(job.stratum)))
    width = _width(stack)
    return multitask(
        base,
        stack,
        _tasks([job.stratum], examples, job.draw),
        _variants(width, _most(stack)),
        rank=width,
        fresh=sorted({min(10, examples.train), examples.train}),
        schedule=Schedule(steps=examples.steps, lr=3e-3),
        seed=job.draw,
    )


def _prune(base: Base, pool: Pool, job: Job, examples: Examples) -> pd.DataFrame:
    """Some adapters of rank 8 and more (others for every draw) cut to k < r units, beside new adapters of rank k."""
    table = pool.table[pool.table.accepted & (pool.table["rank"] >= 8) & ~pool.table.name.str.endswith("-v2")]
    names = sorted(table.name)[_PRUNED * job.draw : _PRUNED * (job.draw + 1)]
    tasks = _tasks(names, examples, job.draw)
    train, validation, test = (
        {name: encode_task(base, task, getattr(task, split)) for name, task in tasks.items()}
        for split in ("train", "validation", "test")
    )
    found = [(name, *one) for name in names for one in _cuts(pool.adapter(name))]
    shapes = list(dict.fromkeys((name, k) for name, variant, k, _ in found if variant == "lego"))
    fresh, _ = train_fresh(
        base,
        [f"new-{name}-{k}" for name, k in shapes],
        [train[name] for name, _ in shapes],
        [validation[name] for name, _ in shapes],
        Schedule(steps=examples.steps, lr=3e-3),
        seeds=[job.draw] * len(shapes),
        plans=[Plan(rank=k) for _, k in shapes],
    )
    label = f"new adapter, {examples.train} examples"
    found += [(name, label, k, one) for (name, k), one in zip(shapes, fresh, strict=True)]
    cuts, rows = [one for *_, one in found], [test[name] for name, *_ in found]
    scales, losses = tune(base, cuts, [validation[name] for name, *_ in found])
    tuned, plain = score_at(base, cuts, scales, rows), score_at(base, cuts, [1.0] * len(cuts), rows)
    labels = {
        name: {what: tasks[name].labels[what] for what in ("kind", "operation", "domain", "format")} for name in names
    }
    frame = pd.DataFrame(
        {"adapter": name, "task": tasks[name].name, **labels[name], "variant": variant, "k": k, "rank": one.rank}
        | {"own_rank": pool.adapter(name).rank, "norm": one.norm(), "n_test": len(test[name])}
        for name, variant, k, one in found
    )
    frame["control"] = frame.variant.map({"random units": "units"}).fillna("")
    frame["scale"], frame["validation_loss"] = scales, losses
    frame["accuracy"], frame["accuracy_unscaled"] = tuned.accuracy.tolist(), plain.accuracy.tolist()
    frame["loss"], frame["loss_unscaled"] = tuned.loss.mean(1).tolist(), plain.loss.mean(1).tolist()
    frame["own"] = frame.adapter.map(frame[frame.variant == "alone"].set_index("adapter").accuracy_unscaled)
    return frame.assign(relative=(frame.accuracy / frame.own).where(frame.own >= 0.5))


def _cuts(adapter: Adapter) -> Iterator[tuple[str, int, Adapter]]:
    """(variant, k, what is left of an adapter), with the whole of it and nothing of it."""
    yield "alone", adapter.rank, adapter
    yield "zero-shot", 0, adapter.times(0.0)
    for k in clusters(adapter.rank)[:-1]:
        yield "lego", k, merge([adapter], "lego", k=k)
        yield "lego, no reweighting", k, merge([adapter], "lego", k=k, **REWEIGHTINGS["none"])
        yield "truncated svd", k, truncate(adapter, k)
        for seed in range(3):
            yield "random units", k, _keep(adapter, k, seed)


def _keep(adapter: Adapter, k: int, seed: int) -> Adapter:
    """k units of each module drawn at random, the others dropped."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, f in adapter.modules.items():
        kept = torch.randperm(f.rank, generator=generator)[:k]
        modules[module] = replace(f, B=f.B[:, kept], A=f.A[kept])
    return replace(adapter, modules=modules)


STUDIES = {"merge": _merge, "sweep": _sweep, "scale": _scale, "composition": _composition, "prune": _prune}
