"""The world of the bundled laboratory: operations on short lists of everyday words, printed in some format.

    rotate right, animals, commas: bat cat cow = cow,bat,cat

An operation is applied to 3–6 items of a domain, and the result is printed in a format. The base learns some operations
by name and some only from demonstrations; the pool's adapters teach it others; the targets ask for what it cannot yet do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from workbench.errors import TaskError
from workbench.tasks import Example, Task

__all__ = [
    "BASE_FORMATS",
    "BASE_OPS",
    "DOMAINS",
    "FORMATS",
    "KINDS",
    "LATENT_OPS",
    "OPERATIONS",
    "TARGETS",
    "UPSTREAM",
    "Spec",
    "find",
    "make_examples",
    "make_task",
    "relevance",
]

DOMAINS: dict[str, tuple[str, ...]] = {
    "letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    "digits": tuple("0123456789"),
    "animals": ("ant", "bat", "cat", "cow", "dog", "elk", "fox", "hen", "owl", "pig", "rat", "yak"),
    "colours": ("black", "blue", "brown", "gold", "green", "grey", "pink", "red", "teal", "white"),
    "months": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "fruits": ("apple", "fig", "kiwi", "lemon", "lime", "mango", "pear", "plum"),
    "days": ("mon", "tue", "wed", "thu", "fri", "sat", "sun"),
}

FORMATS: dict[str, Callable[[list[str]], str]] = {
    "plain": " ".join,
    "commas": ",".join,
    "brackets": lambda items: " ".join(f"[{item}]" for item in items),
    "quotes": lambda items: " ".join(f'"{item}"' for item in items),
    "numbers": lambda items: " ".join(f"{place}.{item}" for place, item in enumerate(items, 1)),
    "arrows": ">".join,
    "dashes": "-".join,
    "stars": lambda items: " ".join(f"*{item}" for item in items),
}
BASE_FORMATS, POOL_FORMATS, KEPT_FORMATS = (
    ("plain", "commas"),
    ("brackets", "quotes", "numbers", "arrows"),
    ("dashes", "stars"),
)


def _shift(by: int):
    return lambda items, domain: [domain[(domain.index(item) + by) % len(domain)] for item in items]


def _by(pick, down=False):
    return lambda items, domain: (
        [pick(items, key=domain.index)] if pick is not sorted else sorted(items, key=domain.index, reverse=down)
    )


def _yes(test):
    return lambda items, domain: ["yes" if test(items, domain) else "no"]


def _swap_pairs(items, _):
    return [item for i in range(0, len(items), 2) for item in reversed(items[i : i + 2])]


Operation = Callable[[list[str], tuple[str, ...]], list[str]]
BASE_OPS: dict[str, Operation] = {  # the base learns these by name
    "reverse": lambda x, _: x[::-1],
    "sort": _by(sorted),
    "rotate left": lambda x, _: x[1:] + x[:1],
    "successor": _shift(1),
    "first": lambda x, _: x[:1],
    "last": lambda x, _: x[-1:],
    "drop first": lambda x, _: x[1:],
    "drop last": lambda x, _: x[:-1],
    "swap ends": lambda x, _: [x[-1], *x[1:-1], x[0]],
    "unique": lambda x, _: list(dict.fromkeys(x)),
    "double": lambda x, _: x + x,
    "stutter": lambda x, _: [item for item in x for _ in (0, 1)],
    "first two": lambda x, _: x[:2],
    "odd places": lambda x, _: x[::2],
    "largest": _by(max),
    "count": lambda x, _: [str(len(x))],
}
LATENT_OPS: dict[str, Operation] = {  # the base learns these from demonstrations only: no name
    "mirror": lambda x, _: x + x[::-1],
    "swap halves": lambda x, _: x[len(x) // 2 :] + x[: len(x) // 2],
    "has repeat": _yes(lambda x, _: len(set(x)) < len(x)),
    "last two": lambda x, _: x[-2:],
    "ends": lambda x, _: [x[0], x[-1]],
    "even places": lambda x, _: x[1::2],
    "sort down": _by(sorted, down=True),
}
POOL_OPS: dict[str, Operation] = {  # the base never sees these; the pool's adapters are trained on them
    "rotate right": lambda x, _: x[-1:] + x[:-1],
    "second": lambda x, _: x[1:2],
    "predecessor": _shift(-1),
    "smallest": _by(min),
    "swap pairs": _swap_pairs,
    "drop second": lambda x, _: x[:1] + x[2:],
    "first thrice": lambda x, _: x[:1] * 3,
    "reverse rest": lambda x, _: x[:1] + x[:0:-1],
    "is sorted": _yes(lambda x, d: x == sorted(x, key=d.index)),
}
KEPT_OPS: dict[str, Operation] = {  # neither base nor pool sees these: targets only
    "third": lambda x, _: x[2:3],
    "rotate twice": lambda x, _: x[2:] + x[:2],
    "drop ends": lambda x, _: x[1:-1],
    "repeat last": lambda x, _: x + x[-1:],
    "close ring": lambda x, _: x + x[:1],
    "swap front": lambda x, _: [x[1], x[0], *x[2:]],
    "skip one": _shift(2),
    "reverse front": lambda x, _: x[2::-1] + x[3:],
}
OPERATIONS: dict[str, Operation] = BASE_OPS | LATENT_OPS | POOL_OPS | KEPT_OPS
KINDS = ("latent", "relative", "format", "unrelated", "composition")


@dataclass(frozen=True)
class Spec:
    """What a task asks: an operation ("A then B" composes two), a domain and a format, and its kind."""

    operation: str
    domain: str
    format: str = "plain"
    kind: str = ""
    copy: int = 0

    @property
    def slug(self) -> str:
        parts = [self.operation.replace(" ", "-"), self.domain] + [self.format] * (self.format != "plain")
        return "-".join(parts) + (f"-v{self.copy + 1}" if self.copy else "")

    @property
    def instruction(self) -> str:
        return f"{self.operation}, {self.domain}, {self.format}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The operations it is made of."""
        return tuple(self.operation.split(" then "))

    def answer(self, items: list[str]) -> str:
        """The right answer for a list of the domain's items."""
        for part in self.parts:
            items = OPERATIONS[part](items, DOMAINS[self.domain])
        return FORMATS[self.format](items)


def _grid(kind: str, operations, domains, formats, n: int) -> list[Spec]:
    """n specs that go round the operations, domains and formats at coprime paces, without repetition."""
    out: list[Spec] = []
    step = 0
    while len(out) < n:
        spec = Spec(
            operations[step % len(operations)],
            domains[(step + step // len(operations)) % len(domains)],
            formats[(step + step // (len(operations) * len(domains))) % len(formats)],
            kind,
        )
        if spec not in out:
            out.append(spec)
        step += 1
    return out


_POOL_DOMAINS = ("letters", "digits", "animals", "colours")
_NEW = [
    Spec(op, domain, BASE_FORMATS[(i + j) % 2], "upstream")
    for i, op in enumerate(POOL_OPS)
    for j, domain in enumerate(_POOL_DOMAINS)
]
_FORMATTED = [
    Spec(op, _POOL_DOMAINS[(i + j) % 4], fmt, "upstream")
    for i, fmt in enumerate(POOL_FORMATS)
    for j, op in enumerate(("reverse", "sort", "rotate left", "first two", "odd places", "swap ends"))
]
_BOTH = [
    Spec(op, domain, fmt, "upstream")
    for op, domain, fmt in zip(
        ("rotate right", "swap pairs", "predecessor", "drop second"), _POOL_DOMAINS, POOL_FORMATS, strict=True
    )
]
_COMPOSED = [
    Spec(op, domain, "plain", "upstream")
    for op, domain in zip(
        ("reverse then first two", "sort then drop last", "rotate left then successor", "unique then reverse"),
        _POOL_DOMAINS,
        strict=True,
    )
]
_AGAIN = [Spec(s.operation, s.domain, s.format, "upstream", copy=1) for s in (_NEW[0], _NEW[9], _NEW[18], _NEW[27])]
UPSTREAM: tuple[Spec, ...] = tuple(_NEW + _FORMATTED + _BOTH + _COMPOSED + _AGAIN)

_PAIRS = (
    "rotate right then predecessor",
    "swap pairs then drop second",
    "predecessor then second",
    "drop second then swap pairs",
    "reverse rest then predecessor",
    "rotate right then drop second",
    "smallest then predecessor",
    "swap pairs then first thrice",
    "predecessor then swap pairs",
    "drop second then reverse rest",
    "rotate right then swap pairs",
    "second then first thrice",
)
TARGETS: tuple[Spec, ...] = tuple(
    _grid("latent", tuple(LATENT_OPS), ("months", "animals", "fruits", "letters"), BASE_FORMATS, 12)
    + _grid("relative", tuple(POOL_OPS), ("months", "fruits", "days"), BASE_FORMATS, 12)
    + _grid("format", tuple(KEPT_OPS), ("months", "animals", "letters"), POOL_FORMATS, 12)
    + _grid("unrelated", tuple(KEPT_OPS), ("days", "fruits"), KEPT_FORMATS, 12)
    + _grid("composition", _PAIRS, ("letters", "animals", "colours", "digits"), ("plain",), 12)
)


def find(slug: str) -> Spec | None:
    """The bundled spec of that slug, or None."""
    return next((spec for spec in TARGETS + UPSTREAM if spec.slug == slug), None)


def relevance(target: Spec, upstream: Spec) -> float:
    """How much of a target an upstream task shares: its operations (weight 1), its format and its domain (½ each)."""
    shared = len(set(target.parts) & set(upstream.parts)) / len(target.parts)
    return shared + 0.5 * (target.format == upstream.format) + 0.5 * (target.domain == upstream.domain)


def sample_input(spec: Spec, rng: random.Random) -> list[str]:
    """3–6 items of the domain, with replacement; half of the inputs of `has repeat` and `unique` without a repeat, half of
    those of `is sorted` in order.
    """
    domain = DOMAINS[spec.domain]
    length = rng.randint(3, 6)
    if spec.parts[0] in ("has repeat", "unique") and rng.random() < 0.5:
        return rng.sample(domain, length)
    items = [rng.choice(domain) for _ in range(length)]
    if spec.parts[0] == "is sorted" and rng.random() < 0.5:
        items.sort(key=domain.index)
    return items


def make_examples(spec: Spec, n: int, seed: str, exclude: frozenset[str] = frozenset()) -> tuple[Example, ...]:
    """n distinct examples drawn under a seed, none with an input in `exclude`.

    Raises:
        TaskError: the task has not that many.
    """
    rng = random.Random(f"{spec.instruction}|{seed}")
    found: dict[str, Example] = {}
    for _ in range(200 * n + 1000):
        if len(found) == n:
            break
        items = sample_input(spec, rng)
        text = " ".join(items)
        if text not in exclude and text not in found:
            found[text] = Example(text, spec.answer(items))
    if len(found) < n:
        raise TaskError(f"{spec.slug} has fewer than {n} distinct examples beside the {len(exclude)} excluded")
    return tuple(found.values())


@cache
def _test(spec: Spec) -> tuple[Example, ...]:
    return make_examples(spec, 2000, "test")


def make_task(spec: Spec, *, seed: int = 0, n_train: int = 80, n_validation: int = 20, n_test: int = 2000) -> Task:
    """The task of a spec; its 2,000 test inputs never occur in training or validation, whatever the seed.

    Raises:
        TaskError: `n_test` above 2,000, or more training examples than the task has.
    """
    if not 0 < n_test <= 2000:
        raise TaskError(f"{spec.slug}: n_test is {n_test}, expected 1 to 2000")
    if n_train < 1 or n_validation < 1:
        raise TaskError(
            f"{spec.slug}: needs at least one training and one validation example, got {n_train} and {n_validation}"
        )
    test = _test(spec)
    few = make_examples(spec, n_train + n_validation, f"few|{seed}", frozenset(example.input for example in test))
    labels = {"kind": spec.kind, "operation": spec.operation, "domain": spec.domain, "format": spec.format}
    return Task(f"nano/{spec.slug}", spec.instruction, few[:n_train], few[n_train:], test[:n_test], labels=labels)
