"""The recycling study's published tables (arXiv 2602.12323, github.com/r-three/realistic-adaptive-merging) as tidy frames.

Nothing of them is shipped; they are read from where a user has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError
from workbench.plain import show
from workbench.studies.reading import Files, operation_of, read_json, read_table, refuse
from workbench.studies.runs import RUN, RUNS, read_runs

__all__ = ["Recycling", "examples_behind", "recycling"]

IDS, FACTS, ZERO_SHOT = "refiltered_model_ids_new.txt", "hf_expert_info_final.json", "zero_shot_performance.csv"
SCORES = {"test": "hub_model_evaluation_test.csv", "train+validation": "hub_model_evaluation_train_valid_new.csv"}
MERGED, BASELINES = "merged_performance_eval_experts_summary.csv", r"lora_baseline_(\d+)_results\.csv"
MERGES, MERGED_K = {"agg": "average", "tsv": "tsv", "ties": "ties"}, 30
MOST_EXAMPLES, FEWEST_SCORES = 5000, 30  # of a test split, at most; scores that tell how many examples there were
# The zero-shot table's names for tasks that all other tables call something else.
ALIASES = {
    "swa": "masakhanews_swa",
    "yor": "masakhanews_yor",
    "imbalanced": "clinc_oos",
    "main": "gsm8k",
    "mmlu": "mmlu_combined",
    "tokenized": "aqua_rat",
    "toxicchat0124": "toxic_chat",
    "cryptonews_articles_with_price_momentum_labels": "cryptonews_articles",
}
# The test table's columns stand in the order of such names (imbalanced, main, tokenized, wic), and four of them got another
# task's name afterwards, three of which are now there twice. Their place, the number of examples behind them and their
# agreement with the scores on train + validation say what they are. (name, name of the next column) → task.
MISNAMED = {
    ("temporal_sequences", "intersect_geometry"): "clinc_oos",
    ("twitter_complaints", "medmcqa"): "gsm8k",
    ("hyperbaton", "toxic_chat"): "aqua_rat",
    ("xlwic_it", "super_glue_wsc"): "super_glue_wic",
}
FAMILIES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "lm_head": ("lm_head",),
    "embeddings": ("embed_tokens", "wte"),
}
SEVEN = FAMILIES["attention"] + FAMILIES["mlp"]
KNOWN = tuple(target for family in FAMILIES.values() for target in family)


@dataclass(frozen=True, eq=False)
class Recycling:
    """The study's tables. Columns that also occur in `Pool.table` or in our own result rows mean the same there.

    pool: name, author, accepted (the study did), rank, alpha_over_r, dropout, targets, families (of the targets: attention,
        mlp, lm_head, embeddings, other), lm_head; missing, or empty, where the study has no metadata.
    scores: name, task, operation, split ("test", "train+validation"), accuracy, n (examples behind it, missing where the
        accuracies do not tell), published_as; one row per adapter of the pool and task that was scored.
    zero_shot: task, operation, accuracy, published_as.
    baselines: method ("new adapter"), examples, task, operation, accuracy.
    merged: method (average, tsv, ties), own (the target's own adapter is among the 30), k, task, operation, accuracy.
    lorahub: run, method, task, operation, k, own, select, budget, examples, accuracy, validation_accuracy, chosen (JSON).
    weights: run, place, name (missing where a run names fewer adapters than it has weights), weight.
    `operation` is the task, save that one data set in several languages or grades (xnli, masakhanews, arc) is one
    operation; intervals are clustered by it. `examples` are training and validation together. A blank cell has no row.
    """

    pool: pd.DataFrame
    scores: pd.DataFrame
    zero_shot: pd.DataFrame
    baselines: pd.DataFrame
    merged: pd.DataFrame
    lorahub: pd.DataFrame
    weights: pd.DataFrame

    def __repr__(self) -> str:
        return (
            f"Recycling({len(self.pool)} adapters, {len(self.scores):,} scores, {len(self.lorahub):,} runs of LoraHub)"
        )

    def matrix(self, split: str = "test") -> pd.DataFrame:
        """Accuracy, adapter × task, in the order of the tables; NaN where an adapter was not scored.

        Raises:
            WorkbenchError: no such split.
        """
        some = self._of(split)
        wide = some.pivot(index="name", columns="task", values="accuracy")
        return wide.reindex(index=pd.Index(self.pool["name"]), columns=pd.Index(some["task"].unique(), name="task"))

    def examples(self, split: str = "test") -> pd.Series:
        """How many examples are behind each task's accuracies; NaN where they do not tell.

        Raises:
            WorkbenchError: no such split.
        """
        return self._of(split).groupby("task", sort=False)["n"].first().astype(float)

    def _of(self, split: str) -> pd.DataFrame:
        if split not in SCORES:
            raise WorkbenchError(f"no split {split!r}; there are {', '.join(SCORES)}")
        return self.scores[self.scores["split"] == split]


def recycling(path: str | Path) -> Recycling:
    """Read the recycling study's tables: the pool's metadata, scores, zero-shot, merged and baseline tables, LoraHub's runs.

    Args:
        path: a clone of the study's repository, or a folder with its files; they are found by name, in subfolders too.
            LoraHub's runs are one JSON-lines file, lorahub_gradient_free.jsonl, or, as in the repository, a file each in a
            folder `lorahub`.

    Raises:
        WorkbenchError: files that are missing, or there twice; damaged lines, by number; a cell that is no number.
    """
    files = Files(path)
    single = {name: files.one(name) for name in (IDS, FACTS, *SCORES.values(), ZERO_SHOT, MERGED)}
    baselines, runs = files.matching(BASELINES), files.one(RUNS) or files.matching(RUN, parent="lorahub")
    missing = [name for name, found in single.items() if found is None]
    missing += ["lora_baseline_N_results.csv"] * (not baselines) + [f"{RUNS} (or lorahub/*_result.json)"] * (not runs)
    if missing:
        raise WorkbenchError(f"{files.folder} lacks {', '.join(missing)}; expected a clone of the study's repository")
    ids = _ids(single[IDS])
    lorahub, weights = read_runs(runs)
    return Recycling(
        pool=_pool(ids, read_json(single[FACTS])),
        scores=pd.concat([_scores(single[SCORES[split]], split, ids) for split in SCORES], ignore_index=True),
        zero_shot=_zero_shot(single[ZERO_SHOT]),
        baselines=pd.concat([_baseline(file) for file in baselines], ignore_index=True),
        merged=_merged(single[MERGED]),
        lorahub=lorahub,
        weights=weights,
    )


def examples_behind(accuracies: Iterable[float]) -> float:
    """The least number of examples, up to 5,000, of which every accuracy is a whole number; NaN where there is none.

    The study does not publish how many examples it scored; each accuracy is a number of them over that. The least that
    fits is the number itself unless all counts share a divisor, so fewer than 30 accuracies tell nothing (NaN).
    """
    values = np.asarray(list(accuracies), float)
    values = values[~np.isnan(values)]
    if len(values) < FEWEST_SCORES:
        return np.nan
    left = np.arange(1, MOST_EXAMPLES + 1)
    for value in np.unique(values):
        left = left[np.abs(value * left - np.rint(value * left)) < 1e-6]  # tables have 10 decimals
    return float(left[0]) if len(left) else np.nan


def _ids(path: Path) -> list[str]:
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{path.name} is no text: {error}") from error
    seen: dict[str, int] = {}
    refuse(
        path,
        {
            i: f"{name!r} is in line {seen[name]} too"
            for i, name in enumerate(ids, 1)
            if name and seen.setdefault(name, i) != i
        },
    )
    return list(seen)


def _pool(ids: list[str], facts: dict) -> pd.DataFrame:
    """Pool.table's columns, as far as the metadata tell them."""
    rows = []
    for name in ids:
        own = facts.get(name) or {}
        if not isinstance(own, dict):
            raise WorkbenchError(f"{FACTS}: {show(name)} has {show(own)}, expected an object")
        rank, alpha, dropout = (_number(own.get(key), name, key) for key in ("r", "lora_alpha", "lora_dropout"))
        targets = _targets(own.get("target_modules"), name)
        families = [family for family, members in FAMILIES.items() if set(members) & set(targets)]
        rows.append(
            {
                "name": name,
                "author": name.partition("/")[0],
                "accepted": True,
                "rank": rank,
                "alpha_over_r": alpha / rank,
                "dropout": dropout,
                "targets": ",".join(targets),
                "families": ",".join(families + ["other"] * bool(set(targets) - set(KNOWN))),
                "lm_head": "lm_head" in targets if targets else None,
            }
        )
    return pd.DataFrame(rows).astype({"rank": "Int64", "lm_head": "boolean"})


def _number(value, name: str, key: str) -> float:
    """A number of a configuration, as text too; NaN where it has none."""
    try:
        found = float("nan" if value in (None, "") else value)
    except (TypeError, ValueError):
        found = -1.0
    whole = key != "r" or (found >= 1 and found % 1 == 0)
    if isinstance(value, bool) or not (np.isnan(found) or (0 <= found < np.inf and whole)):
        raise WorkbenchError(f"{FACTS}: {key} of {show(name)} is {show(value)}, expected a number")
    return found


def _targets(value, name: str) -> list[str]:
    """Last parts of the target modules' names, each once, in the order of a layer; from a list, a text, or a pattern."""
    if value == "all-linear":
        return list(SEVEN)
    if isinstance(value, str):
        words = re.findall(r"\w+", value)
        value = [word for word in words if word in KNOWN] or words
    if not (value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))):
        raise WorkbenchError(f"{FACTS}: target_modules of {show(name)} is {show(value)}, expected a list of names")
    last = {re.sub(r"\W", "_", one.rsplit(".", 1)[-1]) for one in value or ()}  # a stranger's: no markup
    return [one for one in KNOWN if one in last] + sorted(last - set(KNOWN))


def _scores(path: Path, split: str, ids: list[str]) -> pd.DataFrame:
    """Long form of an adapter × task table; adapters that are not in the pool are left out."""
    header, table = read_table(path, "Model ID", ("idx", "Mean"))
    after = [*header[1:], ""]
    tasks = [MISNAMED.get(pair, pair[0]) if split == "test" else pair[0] for pair in zip(header, after, strict=True)]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise WorkbenchError(f"{path.name} has several columns {', '.join(twice)}: which is which is not known")
    parts = [
        pd.DataFrame({"accuracy": column.dropna(), "n": examples_behind(column)}).assign(task=task, published_as=name)
        for task, name, (_, column) in zip(tasks, header, table[table.index.isin(ids)].items(), strict=True)
    ]
    long = pd.concat(parts).rename_axis("name").reset_index()
    long["operation"], long["split"], long["n"] = long["task"].map(operation_of), split, long["n"].astype("Int64")
    return long[["name", "task", "operation", "split", "accuracy", "n", "published_as"]]


def _by_task(path: Path, columns: Iterable[str] | None = None) -> pd.DataFrame:
    """A table of one row per task: task, operation, and its columns.

    Raises:
        WorkbenchError: a column is missing.
    """
    header, table = read_table(path, "task")
    wanted = list(columns or header[:1])
    if lacking := [name for name in wanted if name not in header]:
        raise WorkbenchError(f"{path.name} has no column {', '.join(lacking)}; it has {show(header)}")
    found = pd.DataFrame({name: table[header.index(name)] for name in wanted}).rename_axis("task").reset_index()
    found.insert(1, "operation", found["task"].map(operation_of))
    return found


def _zero_shot(path: Path) -> pd.DataFrame:
    found = _by_task(path, ["zero_shot"]).rename(columns={"zero_shot": "accuracy"}).dropna(ignore_index=True)
    names = set(found["task"])
    task = found["task"].map(lambda name: ALIASES.get(name, name) if ALIASES.get(name) not in names else name)
    return found.assign(published_as=found["task"], task=task, operation=task.map(operation_of))


def _baseline(path: Path) -> pd.DataFrame:
    found = _by_task(path, ["test_accuracy"]).rename(columns={"test_accuracy": "accuracy"}).dropna(ignore_index=True)
    examples = int(re.fullmatch(BASELINES, path.name)[1])
    return found.assign(method="new adapter", examples=examples)[
        ["method", "examples", "task", "operation", "accuracy"]
    ]


def _merged(path: Path) -> pd.DataFrame:
    columns = {
        f"performance_{key}{end}": (method, not end) for key, method in MERGES.items() for end in ("", "_wo_target")
    }
    found = _by_task(path, columns)
    parts = [
        found[["task", "operation"]].assign(accuracy=found[column], method=method, own=own, k=MERGED_K)
        for column, (method, own) in columns.items()
    ]
    long = pd.concat(parts).dropna(subset="accuracy", ignore_index=True)
    return long[["method", "own", "k", "task", "operation", "accuracy"]]
