"""Elementwise merges: golden examples, peft's own functions on dense deltas, float64 oracles written from the papers."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import as_on_a_gpu, deltas, gap, pool, single
from workbench.adapters import Adapter
from workbench.errors import MergeError
from workbench.merge import merge, methods
from workbench.merge.elementwise import consensus, drop, fingerprints, mask_seed, threshold
from workbench.stack import Stack, Units

MASKED = ("dare_linear", "dare_ties", "della")
ELEMENTWISE = tuple(name for name, record in methods().items() if record.dense and not record.needs)


def dense(adapters, module="m"):
    return [a.modules[module].delta().double().numpy() for a in adapters]


# TIES ---------------------------------------------------------------------------------------------------------------

X = [[3.0, -1, 0], [0.5, 2, -4], [1, 0, -2]]
Y = [[-1.0, -2, 5], [0.25, -2, 1], [3, 0, -6]]


@pytest.mark.parametrize(
    ("options", "weights", "want"),
    [
        # density 1: signs of X + Y are + − + / + 0 − / + 0 −; the mean of those that agree. 2 against −2: no sign, 0.
        ({"density": 1.0}, None, [[3, -1.5, 5], [0.375, 0, -4], [2, 0, -4]]),
        # density 1/3 keeps three: X's 3, −4 and, 2 and −2 being equal, both; Y's 5, 3, −6
        ({"density": 1 / 3}, None, [[3, 0, 5], [0, 2, -4], [3, 0, -4]]),
        # X + 2Y: + − + / + − − / + 0 −; each agreeing w x, by their number, then by their weights
        ({"density": 1.0}, [1, 2], [[3, -2.5, 10], [0.5, -4, -4], [3.5, 0, -7]]),
        ({"density": 1.0, "divide": "weights"}, [1, 2], [[3, -5 / 3, 5], [1 / 3, -2, -4], [7 / 3, 0, -14 / 3]]),
        # minus Y: signs of X − Y: + + − / + + − / − 0 +
        ({"density": 1.0}, [1, -1], [[2, 2, -5], [0.5, 2, -2.5], [-3, 0, 6]]),
        ({"density": 1.0, "divide": "weights"}, [1, -1], [[2, 2, -5], [0.5, 2, -2.5], [-3, 0, 6]]),
        ({"density": 0.0}, None, [[0, 0, 0]] * 3),
    ],
)
def test_ties_golden(options, weights, want):
    got = merge(single(X, Y), "ties", weights=weights, **options).modules["m"]
    assert torch.allclose(got, torch.tensor(want).double(), atol=1e-6), got


def test_ties_by_frequency_counts_heads_and_by_total_mass():
    matrices = [[[5.0]], [[-1.0]], [[-2.0]]]
    assert merge(single(*matrices), "ties").modules["m"].item() == 5.0
    assert merge(single(*matrices), "ties", elect="frequency").modules["m"].item() == -1.5
    assert merge(single([[5.0]], [[-1.0]]), "ties", elect="frequency").modules["m"].item() == 0.0


def test_ties_elects_nothing_where_the_sum_is_zero_and_is_odd():
    adapters = single([[1.0, 2.0]], [[-1.0, 3.0]])
    got = merge(adapters, "ties", density=1.0).modules["m"]
    assert got.tolist() == [[0.0, 2.5]]
    assert torch.equal(merge(adapters, "ties", density=1.0, weights=[-1, -1]).modules["m"], -got)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 5),
    density=st.sampled_from([0.125, 0.25, 0.5, 0.75]),
    elect=st.sampled_from(["total", "frequency"]),
)
def test_ties_agrees_with_peft_s_own_function_where_the_conventions_meet(seed, n, density, elect):
    """Equal positive weights; an odd number of adapters where heads are counted (peft calls a tie of signs positive)."""
    from peft.utils.merge_utils import ties as peft_ties

    n = n if elect == "total" else 2 * (n // 2) + 1
    adapters = pool(n, seed, shapes={"m": (8, 6)}, ranks=(6,))
    stacked = [a.modules["m"].delta() for a in adapters]
    want = peft_ties(stacked, torch.full((n,), 1.0).double(), density, elect)
    if elect == "frequency":  # entries trimmed away in some adapters can still tie
        kept = torch.stack(
            [d * (d.abs() >= d.abs().flatten().sort(descending=True).values[int(density * 48) - 1]) for d in stacked]
        )
        want = torch.where(kept.sign().sum(0) == 0, 0.0, want)
    got = merge(adapters, "ties", density=density, elect=elect).modules["m"]
    assert torch.allclose(got, want, atol=1e-12)


def test_ties_keeps_the_stated_number_of_entries():
    adapters = pool(1, shapes={"m": (10, 10)}, ranks=(10,))
    for density, kept in ((0.0, 0), (0.001, 1), (0.29, 29), (0.5, 50), (1.0, 100)):
        assert int((merge(adapters, "ties", density=density).modules["m"] != 0).sum()) == kept


# Magnitude pruning and breadcrumbs -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 5), density=st.sampled_from([0.125, 0.25, 0.5, 0.75]), data=st.data()
)
def test_magnitude_pruning_is_peft_s_function_on_dense_deltas(seed, n, density, data):
    from peft.utils.merge_utils import magnitude_prune

    weights = data.draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n))
    adapters = pool(n, seed, shapes={"m": (8, 6)}, ranks=(6,))
    want = magnitude_prune([torch.from_numpy(d) for d in dense(adapters)], torch.tensor(weights).double(), density)
    got = merge(adapters, "magnitude_prune", weights=weights, density=density).modules["m"]
    assert torch.allclose(got, want, atol=1e-6)


def test_pruning_and_breadcrumbs_golden():
    matrix = [[9.0, -8, 7, 6], [5, -4, 3, -2]]
    assert merge(single(matrix), "magnitude_prune", density=0.25).modules["m"].tolist() == [[9, -8, 0, 0], [0] * 4]
    got = merge(single(matrix), "breadcrumbs", density=0.25, outliers=0.125).modules["m"]
    assert got.tolist() == [[0, -8, 7, 0], [0] * 4]  # the largest dropped, the next two kept
    got = merge(single(matrix), "breadcrumbs", density=1.0, outliers=0.25).modules["m"]
    assert got.tolist() == [[0, 0, 7, 6], [5, -4, 3, -2]]
    two = single(matrix, [[0, 8.0, 7, 0], [0, 0, 0, 0]])
    got = merge(two, "breadcrumbs", density=0.25, outliers=0.0, weights=[1, 2]).modules["m"]
    assert got.tolist() == [[9, 8, 14, 0], [0] * 4]
    got = merge(two, "breadcrumbs", density=0.25, outliers=0.0, elect="total", divide="count").modules["m"]
    assert got.tolist() == [[9, 0, 7, 0], [0] * 4]  # −8 against 8: no sign is elected


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 0.9), outliers=st.floats(0, 0.3))
def test_breadcrumbs_keeps_the_ranks_between_its_two_limits(seed, density, outliers):
    adapters = pool(3, seed, shapes={"m": (7, 9)}, ranks=(7,))
    want = np.zeros((7, 9))
    for x in dense(adapters):
        order = np.abs(x).ravel().argsort()[::-1]
        top = max(1, round(outliers * 63)) if outliers else 0
        stop = max(1, round(min(1.0, outliers + density) * 63))
        kept = np.zeros(63, bool)
        kept[order[top:stop]] = True
        want += x * kept.reshape(7, 9)
    got = merge(adapters, "breadcrumbs", density=density, outliers=outliers).modules["m"]
    assert np.allclose(got.numpy(), want)


# Random dropping ------------------------------------------------------------------------------------------------------


def masks(adapters, seed, chance, module="m"):
    """DARE's masks, drawn anew with the stated seeds."""
    out = []
    units = Stack.of(adapters).modules[module]
    for i, fingerprint in enumerate(fingerprints(units).tolist()):
        generator = torch.Generator().manual_seed(mask_seed(seed, module, fingerprint))
        p = chance if isinstance(chance, float) else chance[i]
        out.append((torch.rand(units.shape, generator=generator).numpy() < p).astype(float))
    return out


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 5), density=st.floats(0.1, 0.9), rescale=st.booleans(), data=st.data()
)
def test_dare_is_peft_s_functions_on_the_masked_deltas(seed, n, density, rescale, data):
    """peft draws its own masks, so its task arithmetic and TIES at density 1 are given the deltas dropped already."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, task_arithmetic

    adapters = pool(n, seed, shapes={"m": (8, 6)}, ranks=(6,))
    weights = data.draw(st.lists(st.floats(0.1, 2) | st.floats(-2, -0.1), min_size=n, max_size=n))
    kept = masks(adapters, 3, density)
    parts = [
        torch.from_numpy(d * k / (density if rescale else 1.0)) for d, k in zip(dense(adapters), kept, strict=True)
    ]
    w = torch.tensor(weights)
    got = merge(adapters, "dare_linear", weights=weights, density=density, rescale=rescale, seed=3).modules["m"]
    assert torch.allclose(got, task_arithmetic(parts, w.double()), atol=1e-6)
    weighted = torch.stack([x * v for x, v in zip(parts, w.double(), strict=True)])
    agree = calculate_majority_sign_mask(weighted) & (weighted != 0)  # peft counts zeros where the sum is 0
    want = disjoint_merge(weighted, agree)
    got = merge(adapters, "dare_ties", weights=weights, density=density, rescale=rescale, seed=3).modules["m"]
    assert torch.allclose(got, want, atol=1e-6)


def test_random_dropping_is_unbiased_when_rescaled():
    """E over 400 seeds: within five standard errors of ΔW, entry by entry; without rescaling, of its share."""
    adapter = pool(1, shapes={"m": (8, 6)}, ranks=(6,))
    delta = adapter[0].modules["m"].delta()
    for name, options, want in (
        ("dare_linear", {"density": 0.4}, delta),
        ("dare_linear", {"density": 0.4, "rescale": False}, 0.4 * delta),
        ("della", {"density": 0.5, "window": 0.6, "elect": "none", "divide": "none"}, delta),
    ):
        draws = torch.stack([merge(adapter, name, seed=seed, **options).modules["m"] for seed in range(400)])
        error = (draws.mean(0) - want) / (draws.std(0) / 20)
        assert error.abs().max() < 5, (name, options)
        assert error.abs().mean() > 0.3, (name, options)  # it is random, and no exact copy


def test_masks_depend_on_seed_adapter_and_module_and_not_on_order_or_sign():
    adapters = pool(3, shapes={"m": (6, 6), "n": (6, 6)}, ranks=(6,))
    found = {
        mask_seed(s, m, i) for m, units in Stack.of(adapters) for s in (0, 1) for i in fingerprints(units).tolist()
    }
    assert len(found) == 12
    copied = Adapter("copy", {"m": adapters[0].modules["m"], "n": adapters[0].modules["m"]})
    whole = merge([copied], "dare_linear", density=0.5)
    assert (whole.modules["m"] - whole.modules["n"]).abs().max() > 0.1
    for name in MASKED:
        got, again = merge(adapters, name, seed=1), merge(adapters[::-1], name, seed=1)
        assert gap(got, again) < 1e-12, name
        assert gap(got, merge(adapters, name, seed=2)) > 0.1, name


def fingerprint_by_definition(units, owner):
    """In Python's whole numbers, reduced to 64 bits with a sign after every step."""
    fold = lambda x: (x + 2**63) % 2**64 - 2**63  # noqa: E731

    def scrambled(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = fold((x ^ (x >> shift)) * factor)
        return x ^ (x >> 31)

    total = 0
    for b, a, one in zip(units.B.T, units.A, units.owner, strict=True):
        if one == owner:
            bits = np.abs(torch.cat([b, a]).float().numpy()).view(np.int32).tolist()
            total = fold(total + scrambled(fold(sum(x * scrambled(i) for i, x in enumerate(bits, 1)))))
    return total


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), ranks=st.sampled_from([(1,), (3,), (1, 4, 2)]))
def test_the_fingerprint_is_its_definition_whatever_the_order_and_the_signs(seed, n, ranks):
    units = Stack.of(pool(n, seed, shapes={"m": (5, 7)}, ranks=ranks)).modules["m"]
    want = [fingerprint_by_definition(units, i) for i in range(n)]
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(units), generator=g)
    signs = torch.randint(2, (len(units), 1), generator=g) * 2 - 1
    for other in (units, units[order], replace(units, B=units.B * signs.T), replace(units, A=units.A.double() * signs)):
        assert fingerprints(other).tolist() == want


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_a_change_anywhere_changes_the_fingerprint(seed, data):
    units = Stack.of(pool(2, seed, shapes={"m": (5, 7)}, ranks=(3,))).modules["m"]
    first, second = fingerprints(units).tolist()
    assert first != second
    j, i = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 4))
    B = units.B.clone()
    B[i, j] = torch.nextafter(B[i, j].float(), torch.tensor(9.0)).to(B)
    changed = fingerprints(replace(units, B=B)).tolist()
    assert changed[0] != first
    assert changed[1] == second
    assert fingerprints(replace(units, B=units.B.roll(1, 1), owner=units.owner)).tolist()[0] != first  # other pairs
    assert fingerprints(replace(units, B=units.B.flip(0))).tolist()[0] != first  # other places


def test_many_units_are_fingerprinted_in_blocks():
    units = Stack.of(pool(1, shapes={"m": (3, 4)}, ranks=(2,))).modules["m"]
    many = units[torch.zeros(5000, dtype=torch.int64)]
    one = fingerprints(units[:1]).item()
    assert fingerprints(many).item() == (5000 * one + 2**63) % 2**64 - 2**63


def test_global_random_state_is_neither_used_nor_changed():
    adapters = pool(2)
    for name in MASKED:
        torch.manual_seed(1)
        first = merge(adapters, name)
        state = torch.random.get_rng_state()
        torch.manual_seed(2)
        assert gap(first, merge(adapters, name)) == 0
        torch.manual_seed(1)
        assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(("density", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_share_that_stays(name, density, share):
    adapters = pool(1, shapes={"m": (60, 50)}, ranks=(50,))
    got = merge(adapters, name, density=density).modules["m"]
    stays = float((got != 0).double().mean())
    assert abs(stays - share) < 5 * math.sqrt(share * (1 - share) / 3000) + 1e-12
    if density == 1:
        assert torch.allclose(got, adapters[0].modules["m"].delta())


def test_della_keeps_larger_entries_more_often_by_rank_within_the_row():
    adapters = pool(1, shapes={"m": (1, 11)}, ranks=(1,))
    delta = adapters[0].modules["m"].delta()[0]
    options = {"density": 0.5, "window": 0.8, "elect": "none", "divide": "none"}
    draws = torch.stack([merge(adapters, "della", seed=s, **options).modules["m"][0] for s in range(600)])
    stays = (draws != 0).double().mean(0)[delta.abs().argsort()]
    want = torch.linspace(0.1, 0.9, 11).double()
    assert (stays - want).abs().max() < 5 * math.sqrt(0.25 / 600)
    kept = torch.where(draws != 0, draws / delta, torch.nan).nanmean(0)[delta.abs().argsort()]
    assert torch.allclose(kept, 1 / want, rtol=1e-4)  # what stays is divided by its own probability


def test_della_s_window_narrows_at_the_edges():
    adapters = pool(1, shapes={"m": (30, 40)}, ranks=(30,))
    plain = {"elect": "none", "divide": "none", "window": 1.0}
    assert gap(merge(adapters, "della", density=1.0, **plain), deltas(adapters[0])) < 1e-12
    tenth = merge(adapters, "della", density=0.1, **plain).modules["m"]
    assert abs(float((tenth != 0).double().mean()) - 0.1) < 0.05


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_only_a_few_dense_matrices_are_held_at_once(monkeypatch, name):
    """As many for 30 adapters as for 3, and never more than four (weak references tell)."""
    alive, most, made, plain = weakref.WeakSet(), 0, 0, Units.delta

    def watched(self, coefficients=None):
        nonlocal most, made
        made += 1
        out = plain(self, coefficients)
        alive.add(out)
        most = max(most, len(alive))
        return out

    monkeypatch.setattr(Units, "delta", watched)
    found = []
    for n in (3, 30):
        most = made = 0
        merge(pool(n), name)
        found.append(most)
        assert made == n * 3  # each ΔW once
    assert found[0] == found[1] <= 4


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_density_outside_its_range_is_refused(name):
    for density in (-0.1, 1.1, float("nan")):
        with pytest.raises(MergeError, match=rf"{name}: density is .*, expected a finite number in \[0, 1\]"):
            merge(pool(), name, density=density)


def test_density_0_gives_0_and_density_1_the_whole():
    adapters = pool()
    for name in ELEMENTWISE:
        assert merge(adapters, name, density=0.0).norm() == 0, name
    whole = merge(adapters, "sum")
    assert gap(merge(adapters, "magnitude_prune", density=1.0), whole) < 1e-12
    assert gap(merge(adapters, "dare_linear", density=1.0), whole) < 1e-12
    assert gap(merge(adapters, "breadcrumbs", density=1.0, outliers=0.0), whole) < 1e-12
    assert gap(merge(adapters, "dare_ties", density=1.0), merge(adapters, "ties", density=1.0)) < 1e-12
    assert gap(merge(adapters, "della", density=1.0), merge(adapters, "ties", density=1.0)) < 1e-12


def test_the_steps_by_themselves():
    x = torch.tensor([[3.0, -1, 2], [-2, 0, 0.5]])
    assert [float(threshold(x.abs(), share)) for share in (1 / 6, 2 / 6, 3 / 6, 1.0)] == [3, 2, 2, 0]
    assert float(threshold(x.abs(), 0.0)) == math.inf
    assert drop(x.clone(), 0.0, True, 0).count_nonzero() == 0
    assert torch.equal(drop(x.clone(), 1.0, True, 0), x)
    weights = torch.tensor([2.0, 0.0, -1.0])
    parts = {0: x, 2: torch.ones(2, 3)}
    got = consensus(lambda i: parts[i].clone(), [0, 2], weights, divide="weights")
    # 2x − 1 over the weights of the entries that are not 0
    assert torch.allclose(got, torch.tensor([[5 / 3, -1, 1], [-5 / 3, -1, 0]]))
    assert consensus(lambda i: x.clone(), [], weights).count_nonzero() == 0


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 6),
    elect=st.sampled_from(["total", "frequency", "none"]),
    divide=st.sampled_from(["count", "weights", "none"]),
)
def test_the_consensus_of_one_pass_is_its_definition(seed, n, elect, divide):
    """Small whole numbers, so that sums are exact, many entries are 0 and many sums too."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.randint(-2, 3, (n, 6, 7), generator=g).double()
    weights = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 0.0], dtype=torch.float64)[torch.randperm(6, generator=g)[:n]]
    chosen = weights.nonzero().flatten().tolist()
    x = parts[chosen] * weights[chosen, None, None]
    if elect != "none":
        x = torch.where(x.sign() == (x if elect == "total" else x.sign()).sum(0).sign(), x, 0.0)
    size = (x != 0) * (weights[chosen].abs() if divide == "weights" else torch.ones(len(chosen)))[:, None, None]
    want = x.sum(0) / (1.0 if divide == "none" else torch.where(size.sum(0) > 0, size.sum(0), 1.0))
    got = consensus(lambda i: parts[i].clone(), chosen, weights, elect=elect, divide=divide)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_of_a_gpu_is_the_same_value(dtype):
    g = torch.Generator().manual_seed(0)
    for sizes in (torch.rand(50, 40, generator=g).to(dtype), torch.randint(0, 4, (30, 7), generator=g).to(dtype)):
        for share in (0.0, 0.0004, 0.01, 0.2, 0.5, 0.99, 1.0):
            with as_on_a_gpu():
                got = threshold(sizes, share)
            assert torch.equal(got, threshold(sizes, share))
            assert int((sizes >= got).sum()) >= round(share * sizes.numel())


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_gpu_s_way_gives_the_same(name):
    adapters = pool(5, absent={(0, "wide"), (3, "square")})
    with as_on_a_gpu():
        got = merge(adapters, name, weights=[1, -0.5, 2, 0, 1])
    want = merge(adapters, name, weights=[1, -0.5, 2, 0, 1])
    assert all(torch.equal(got.modules[m], want.modules[m]) for m in want.modules)
