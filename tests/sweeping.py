"""A tiny pool with its base in folders, and sweeps over them."""

from __future__ import annotations

from pathlib import Path

import yaml

from helpers import six_adapters, tiny_base
from workbench.sweep.reading import sweep_of

RECIPES = [{"method": "coefficients", "k": 2, "steps": 2}, {"method": "average", "select": "evaluation", "k": 2}]
TASKS = ["nano/second-days", "nano/mirror-months"]


def tiny_pool(folder: Path) -> dict:
    """A sweep's `pool` and `base`: six random adapters of a tiny Llama with random weights."""
    base = tiny_base(seed=1, spread=12.0)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    (folder / "pool").mkdir()
    six_adapters(base, folder / "pool")
    return {"pool": str(folder / "pool"), "base": str(folder / "base")}


def described(where: dict, results: Path, **changed) -> dict:
    """A sweep of 24 runs: two recipes with their controls and two baselines, two tasks, two seeds."""
    return {
        "name": "tiny",
        "results": str(results),
        **where,
        "tasks": TASKS,
        "seeds": [0, 1],
        "n_train": 4,
        "n_validation": 3,
        "n_test": 5,
        "baselines": ["zero-shot", {"method": "new adapter", "steps": 2}],
        "recipes": RECIPES,
    } | changed


def swept(where: dict, results: Path, **changed):
    """The same, read."""
    return sweep_of(described(where, results, **changed))


def written(path: Path, given: dict) -> Path:
    """A sweep's file."""
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path
