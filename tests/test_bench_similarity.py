"""Ours and the ways it is compared with compute the same; not how fast they are."""

import pytest
import torch

from workbench.adapters import Adapter, Factors
from workbench.bench import SCALES, similarity
from workbench.bench.similarity import AREA, DENSE, FACTORED, OURS, STREAM, WAYS, dense_closeness, lines, random_units
from workbench.closeness import closeness
from workbench.stack import Stack, cosine, gram


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    works = list(dict.fromkeys(line.work for line in found))
    assert len(works) == 4 + 1 + 3 + 1
    for work in works:
        ways = {line.way: line for line in found if line.work == work}
        assert len(ways) == sum(line.work == work for line in found)
        assert all(line.area == AREA and line.timing.seconds > 0 and line.per > 0 for line in ways.values())
        assert {line.against for line in ways.values()} <= set(ways)
        assert sum(line.error is not None for line in ways.values()) == 1
        if work.startswith("all pairs"):
            assert set(ways) - {STREAM} == {OURS, DENSE, FACTORED}
            assert len({line.per for line in ways.values()}) == 1
            assert all(line.operations > 0 for line in ways.values())
    assert sum(line.way == STREAM for line in found) == 1
    assert max(line.error for line in found if line.error is not None) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_the_same_cosines(dtype):
    units = random_units((12, 9), 4, 3, "cpu", dtype)
    want = cosine(gram(units, 4))
    assert 0.1 < float(want[0, 1]) < 0.9
    for way in WAYS.values():
        for i in range(4):
            for j in range(4):
                assert way(units.of(i), units.of(j)) == pytest.approx(
                    float(want[i, j]), abs=2e-2 if dtype.itemsize == 2 else 1e-5
                )


def test_operations_are_those_of_the_blocks(monkeypatch):
    """Two for each product of entries: of R × R pairs of units over all rows, less what symmetry saves."""
    monkeypatch.setattr("workbench.factored.BLOCK", 5)
    sizes, product = [], similarity.factored._product

    def watched(x, y):
        sizes.append(2 * x.shape[0] * x.shape[1] * y.shape[1])
        return product(x, y)

    monkeypatch.setattr(similarity.factored, "_product", watched)
    for number in (1, 4, 5, 9):
        sizes.clear()
        gram(random_units((12, 9), number, 3, "cpu", torch.float32), number)
        assert sum(sizes) == 21 * similarity._multiplied(3 * number, "cpu")


def test_streaming_sums_over_modules():
    shapes = {"a": (12, 9), "b": (4, 9)}
    parts = [
        gram(random_units(shape, 3, 2, "cpu", torch.float32, seed), 3) for seed, shape in enumerate(shapes.values())
    ]
    torch.testing.assert_close(similarity._streamed(shapes, 3, 2, "cpu", torch.float32), sum(parts))


@pytest.mark.parametrize("how", ["cosine", "clamp", "qfim"])
def test_dense_closeness_is_closeness(how):
    made = [
        Adapter(
            f"a{i}",
            {
                m: Factors(u.B, u.A)
                for m, u in zip(
                    "xy", (random_units((7, 5), 1, 2, "cpu", torch.float32, 2 * i + j) for j in (0, 1)), strict=True
                )
            },
        )
        for i in range(3)
    ]
    want = [dense_closeness(adapter, made[2], how) for adapter in made]
    assert closeness(Stack.of(made), made[2], how).tolist() == pytest.approx(want, abs=1e-6)


def test_the_target_s_sizes():
    """960 adapters of rank 16 on all 224 projections of an 8B model."""
    shapes = SCALES["8B"].shapes()
    assert len(shapes) == 224
    done = sum(sum(shape) for shape in shapes.values()) * similarity._multiplied(960 * 16, "cuda")
    assert 6e14 < done < 8e14
