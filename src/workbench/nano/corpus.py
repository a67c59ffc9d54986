"""What the base is trained on: documents of list puzzles as token ids, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from workbench.nano import world

__all__ = ["batches", "corpus", "seen_by_name"]


def seen_by_name(operations: Sequence[str], seed: int) -> tuple[list[world.Spec], list[world.Spec]]:
    """(seen, unseen): 70 % of operation × domain × base format are trained by name, the rest is held out."""
    every = [world.Spec(op, domain, fmt) for op in operations for domain in world.DOMAINS for fmt in world.BASE_FORMATS]
    rng = random.Random(f"named|{seed}")
    unseen = set(rng.sample(range(len(every)), round(0.3 * len(every))))
    return [s for i, s in enumerate(every) if i not in unseen], [s for i, s in enumerate(every) if i in unseen]


def _documents(job: tuple[int, int, list, list, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat token ids, answer mask and document lengths; 40 % named single lines, 60 % unnamed with 1–5 demonstrations."""
    seed, count, named, shown, alphabet = job
    rng = random.Random(f"documents|{seed}")
    code = {character: i for i, character in enumerate(alphabet)}
    ids, mask, lengths = [], [], []
    for _ in range(count):
        size = len(ids)
        if rng.random() < 0.4:
            spec, lines = rng.choice(named), 1
        else:
            spec, lines = rng.choice(shown), rng.randint(2, 6)
        for line in range(lines):
            items = world.sample_input(spec, rng)
            head = f"{spec.instruction}: " * (lines == 1) + " ".join(items) + " = "
            answer = spec.answer(items) + "\n"
            ids += [code[c] for c in head + answer]
            mask += [0] * len(head) + [int(lines == 1 or line > 0)] * len(answer)
        lengths.append(len(ids) - size)
    return np.array(ids, np.uint8), np.array(mask, np.uint8), np.array(lengths, np.int32)


def corpus(
    operations: Sequence[str], latent: Sequence[str], count: int, alphabet: str, *, seed: int, workers: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About `count` documents: flat token ids (uint8), answer mask (uint8), lengths (int32); the same for any `workers`.

    `alphabet` lists the characters in the order of their ids.
    """
    named, _ = seen_by_name(operations, seed)
    every = (*operations, *latent)
    shown = [world.Spec(op, domain, fmt) for op in every for domain in world.DOMAINS for fmt in world.BASE_FORMATS]
    parts = 64
    jobs = [(seed * parts + i, count // parts + 1, named, shown, alphabet) for i in range(parts)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            done = list(pool.map(_documents, jobs))
    else:
        done = [_documents(job) for job in jobs]
    return tuple(np.concatenate(column) for column in zip(*done, strict=True))


def batches(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of documents of like length, at most `budget` tokens with padding; every epoch in another order."""
    while True:
        order = rng.permutation(len(lengths))
        cuts = []
        for part in np.array_split(order, max(1, len(order) // 50_000)):
            part = part[np.argsort(lengths[part], kind="stable")]
            start = 0
            while start < len(part):
                longest, stop = 0, start
                while stop < len(part) and max(longest, lengths[part[stop]]) * (stop - start + 1) <= budget:
                    longest, stop = max(longest, int(lengths[part[stop]])), stop + 1
                cuts.append(part[start : max(stop, start + 1)])
                start = max(stop, start + 1)
        for i in rng.permutation(len(cuts)):
            yield cuts[i]
