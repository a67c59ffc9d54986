"""Merging: dense float64 algebra, plain peft, golden examples; every method is held to the invariances it declares."""

import copy
import itertools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    dense_model,
    hook_logits,
    peft_logits,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_ids,
    tiny_base,
    tiny_gpt2,
)
from workbench.adapters import Adapter, Factors
from workbench.errors import AdapterError, BaseError, MergeError, SelectionError
from workbench.merge import INVARIANCES, Count, Dense, Share, merge, method, methods, truncate
from workbench.merge import registry as registry_under_test
from workbench.stack import Stack

SHAPES = {"wide": (7, 11), "tall": (12, 5), "square": (6, 6)}


def pool(n=4, seed=0, ranks=(3, 2, 4, 1), absent=(), shapes=SHAPES, dtype=torch.float64):
    """n random adapters of mixed ranks; `absent` holds (adapter, module) pairs that are left out."""
    g = torch.Generator().manual_seed(seed)
    adapters = []
    for i in range(n):
        modules = {}
        for module, (d_out, d_in) in shapes.items():
            r = ranks[i % len(ranks)]
            B, A = torch.randn(d_out, r, generator=g, dtype=dtype), torch.randn(r, d_in, generator=g, dtype=dtype)
            if (i, module) not in absent:
                modules[module] = Factors(B, A)
        adapters.append(Adapter(f"a{i}", modules))
    return adapters


def single(*matrices, name="m"):
    """One adapter per matrix, ΔW exactly that matrix."""
    return [
        Adapter(f"x{i}", {name: Factors(torch.tensor(m, dtype=torch.float64), torch.eye(len(m[0])).double())})
        for i, m in enumerate(matrices)
    ]


def deltas(update):
    if isinstance(update, Dense):
        return update.modules
    return {module: factors.delta() for module, factors in update.modules.items()}


def gap(got, want):
    """max over modules of ‖got − want‖ / ‖want‖."""
    got, want = deltas(got), want if isinstance(want, dict) else deltas(want)
    assert list(got) == list(want)
    return max(float((got[m].double() - want[m].double()).norm() / want[m].double().norm()) for m in want)


def weighted_sum(adapters, weights, divide=lambda present: 1):
    """Σ w ΔW over a divisor, in float64 and dense, by the definition."""
    out = {}
    for module in dict.fromkeys(m for a in adapters for m in a.modules):
        parts = [
            w * (a.modules[module].B.double() @ a.modules[module].A.double())
            for w, a in zip(weights, adapters, strict=True)
            if module in a.modules
        ]
        out[module] = sum(parts) / divide(len(parts))
    return {module: out[module] for module in Stack.of(adapters).modules}


# Linear merges ------------------------------------------------------------------------------------------------------


def test_sum_and_average_are_the_dense_sums_over_any_mix_of_ranks_and_targets():
    adapters = pool(absent={(0, "wide"), (2, "wide"), (3, "tall")})
    weights = [0.5, -2.0, 1.25, 3.0]
    assert gap(merge(adapters, "sum", weights=weights), weighted_sum(adapters, weights)) < 1e-12
    assert gap(merge(adapters, "average", weights=weights), weighted_sum(adapters, weights, lambda _: 4)) < 1e-12
    present = merge(adapters, "average", weights=weights, divide="present")
    assert gap(present, weighted_sum(adapters, weights, lambda n: n)) < 1e-12
    assert gap(present, deltas(merge(adapters, weights=weights))) > 0.1


def test_the_average_never_divides_by_the_sum_of_weights():
    adapters = pool()
    assert gap(merge(adapters, weights=[1, -1, 1, -1]), weighted_sum(adapters, [0.25, -0.25, 0.25, -0.25])) < 1e-12


def test_a_negative_weight_merges_the_negated_adapter():
    adapters = pool()
    negated = [adapters[0].times(-1.0), *adapters[1:]]
    for name, record in methods().items():
        got = merge(adapters, name, weights=[-1, 1, 1, 1])
        want = merge(negated, name)
        assert gap(got, want) < 1e-12, record


@pytest.mark.parametrize("form", ["list", "dict", "tensor", "stack"])
def test_weights_may_be_given_in_order_or_by_name(form):
    adapters = pool()
    want = weighted_sum(adapters, [2, 0, -1, 0])
    source = Stack.of(adapters) if form == "stack" else adapters
    weights = {"dict": {"a2": -1, "a0": 2}, "tensor": torch.tensor([2, 0, -1, 0])}.get(form, [2, 0, -1, 0])
    assert gap(merge(source, "sum", weights=weights), want) < 1e-12


def test_scale_multiplies_the_finished_update_of_every_method():
    adapters = pool()
    for name in methods():
        plain = merge(adapters, name)
        want = {module: -0.3 * delta for module, delta in deltas(plain).items()}
        assert gap(merge(adapters, name, scale=-0.3), want) < 1e-12, name


def test_one_adapter_at_weight_one_is_itself():
    adapter = pool(1)
    for name in methods():
        options = {"density": 1.0} if name == "ties" else {}
        assert gap(merge(adapter, name, **options), weighted_sum(adapter, [1])) < 1e-12, name
    assert gap(merge(adapter[0], "sum"), weighted_sum(adapter, [1])) < 1e-12  # an adapter stands for a list of one


def test_zero_weights_give_a_zero_update_that_can_be_saved(tmp_path):
    adapters = pool()
    for name in methods():
        update = merge(adapters, name, weights=[0, 0, 0, 0])
        assert update.norm() == 0, name
        (update.truncate(1) if isinstance(update, Dense) else update).save(tmp_path / name)


def test_zero_adapters_and_duplicates():
    adapters = pool()
    zero = Adapter(
        "zero", {m: Factors(torch.zeros(o, 2).double(), torch.zeros(2, i).double()) for m, (o, i) in SHAPES.items()}
    )
    assert gap(merge([*adapters, zero], "sum"), merge(adapters, "sum")) < 1e-12
    assert gap(merge([*adapters, zero], "ties"), merge(adapters, "ties")) < 1e-12
    twins = [Adapter(f"twin{i}", adapters[0].modules) for i in range(3)]
    for name in ("average", "svd"):
        assert gap(merge(twins, name), weighted_sum(adapters[:1], [1])) < 1e-12
    assert gap(merge(twins, "ties", density=0.4), merge(adapters[:1], "ties", density=0.4)) < 1e-12


def test_a_thousand_tiny_adapters_do_not_stall():
    """In bf16, adding 1 stops at 256; here bf16 factors of ones sum to a thousand."""
    one = Factors(torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
    adapters = [Adapter(f"a{i}", {"m": one}) for i in range(1000)]
    for name, want in (("sum", 1000.0), ("average", 1.0), ("svd", 1.0), ("ties", 1.0)):
        got = deltas(merge(adapters, name))["m"]
        assert got.dtype == torch.float32
        assert torch.allclose(got, torch.full((3, 2), want), rtol=1e-5), name


def test_accumulation_over_a_thousand_adapters_is_as_good_as_fp32_allows():
    adapters = pool(1000, ranks=(1, 2), dtype=torch.float32)
    for name, divisor in (("sum", 1), ("average", 1000)):
        assert gap(merge(adapters, name), weighted_sum(adapters, [1] * 1000, lambda _, d=divisor: d)) < 1e-5
    wide = [Adapter(a.name, {m: Factors(f.B.double(), f.A.double()) for m, f in a.modules.items()}) for a in adapters]
    assert gap(merge(adapters, "ties", density=1.0), merge(wide, "ties", density=1.0)) < 1e-4


# Truncation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 5, 40])
def test_truncation_is_the_best_of_its_rank_and_states_its_error(rank):
    adapters = pool()
    full = weighted_sum(adapters, [1] * 4)
    for update in (merge(adapters, "svd", of="sum", rank=rank), merge(adapters, "sum", rank=rank)):
        for module, delta in full.items():
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            want = (u[:, :rank] * s[:rank]) @ vh[:rank]
            got = update.modules[module].delta()
            assert (got - want).norm() <= 1e-10 * s[0]
            error = float((got - delta).norm() / delta.norm())
            assert update.info["error"][module] == pytest.approx(error, abs=1e-9)
            assert update.modules[module].rank <= max(rank, min(delta.shape))


def test_svd_takes_the_candidates_largest_rank_per_module():
    adapters = pool(absent={(2, "wide")})  # ranks 3, 2, 4, 1
    update = merge(adapters, "svd")
    assert {module: factors.rank for module, factors in update.modules.items()} == {"square": 4, "tall": 4, "wide": 3}


def test_a_dense_update_truncated_in_full_is_unchanged_and_cut_is_the_best_of_its_rank():
    update = merge(pool(), "ties")
    whole = update.truncate()
    for module, delta in update.modules.items():
        assert torch.equal(whole.modules[module].delta(), delta)
        assert whole.modules[module].rank == min(delta.shape)
    assert set(whole.info["error"].values()) == {0.0}
    cut = merge(pool(), "ties", rank=2)
    assert isinstance(cut, Adapter)
    for module, delta in update.modules.items():
        s = torch.linalg.svdvals(delta)
        assert float((cut.modules[module].delta() - delta).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-9)
        assert cut.info["error"][module] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-9)


def test_truncate_keeps_what_is_small_enough_and_refuses_senseless_ranks():
    adapter = pool(1)[0]
    assert truncate(adapter, 3).modules == adapter.modules
    assert truncate(adapter, 3).info["error"] == dict.fromkeys(SHAPES, 0.0)
    assert truncate(adapter, {"wide": 1, "tall": 2, "square": 9}).modules["tall"].rank == 2
    for rank in (0, -1, 1.5, True, "2", None):
        with pytest.raises(MergeError, match="whole number"):
            truncate(adapter, rank)
    with pytest.raises(MergeError, match="whole number"):
        merge(pool(), "ties").truncate(0)


def test_dense_norm_and_times():
    update = merge(pool(), "ties")
    assert update.norm() == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in update.modules.values())))
    assert gap(update.times(-2.0), {m: -2 * d for m, d in update.modules.items()}) == 0
    assert update.norm() == pytest.approx(update.truncate().norm())


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


def test_ties_holds_only_a_few_dense_matrices_at_once(monkeypatch):
    """However many adapters: at most two of their ΔW are alive at any time (weak references tell)."""
    import weakref

    from workbench.stack import Units

    alive, most = weakref.WeakSet(), 0
    plain = Units.delta

    def watched(self, coefficients=None):
        nonlocal most
        out = plain(self, coefficients)
        alive.add(out)
        most = max(most, len(alive))
        return out

    monkeypatch.setattr(Units, "delta", watched)
    merge(pool(30), "ties")
    assert 1 <= most <= 2


# Plain peft ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def ids(base):
    return some_ids(base)


@pytest.fixture(scope="module")
def adapters(base):
    """Of mixed α/r, rslora, with the same rank; the last has fewer targets."""
    return [
        random_adapter(base, 4, 1),
        random_adapter(base, 4, 2, alpha=2),
        random_adapter(base, 4, 3, rslora=True),
        random_adapter(base, 4, 4, ["q_proj", "v_proj"]),
    ]


def peft_merged(base, adapters, weights, folder, ids, kind, **options):
    from peft import PeftModel

    for adapter in adapters:
        adapter.save(folder / adapter.name)
    with peft_s_own_warnings(), torch.no_grad():
        first, *rest = [adapter.name for adapter in adapters]
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder / first), adapter_name=first)
        for name in rest:
            model.load_adapter(str(folder / name), adapter_name=name)
        model.add_weighted_adapter([first, *rest], weights, "merged", combination_type=kind, **options)
        model.set_adapter("merged")
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("kind", "name", "options"), [("cat", "sum", {}), ("svd", "svd", {"of": "sum", "rank": 6})], ids=["cat", "svd"]
)
def test_sum_and_svd_give_the_logits_of_peft_s_cat_and_svd(base, ids, adapters, tmp_path, kind, name, options):
    weights = [0.5, 1.0, 0.75, 2.0]
    extra = {"svd_rank": 6} if kind == "svd" else {}
    want = peft_merged(base, adapters, weights, tmp_path, ids, kind, **extra)
    assert relative(want, base.model(input_ids=ids).logits) > 1e-2
    assert relative(hook_logits(base, merge(adapters, name, weights=weights, **options), ids), want) < 1e-4


@pytest.mark.parametrize("name", list(methods()))
def test_every_result_reloads_in_plain_peft_with_the_same_logits(base, ids, tmp_path, name):
    mixed = [
        random_adapter(base, 4, 1),
        random_adapter(base, 2, 2, alpha=2, rslora=True),
        random_adapter(base, 8, 3, ["q_proj", "v_proj", "down_proj"]),
    ]
    update = merge(mixed, name, weights=[1.0, -0.5, 2.0])
    with torch.no_grad():
        want = dense_model(base, deltas(update))(input_ids=ids).logits
        assert relative(want, base.model(input_ids=ids).logits) > 1e-2
    if isinstance(update, Dense):
        with update.applied(base.model), torch.no_grad():
            assert relative(base.model(input_ids=ids).logits, want) < 1e-4
        update = update.truncate()
    assert relative(hook_logits(base, update, ids), want) < 1e-4
    update.save(tmp_path / "merged")
    assert relative(peft_logits(base, tmp_path / "merged", ids), want) < 1e-4
    again = Adapter.load(tmp_path / "merged")
    assert max(float((again.modules[m].delta() - f.delta()).abs().max()) for m, f in update.modules.items()) < 1e-6


# Dense updates on a model -------------------------------------------------------------------------------------------


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", [tiny_base, tiny_gpt2])
def test_applied_adds_and_takes_back_exactly(make):
    base = make()
    ids = some_ids(base)
    update = merge([random_adapter(base, 3, i, size=0.3) for i in range(3)], "ties")
    before = bits(base.model)
    with torch.no_grad():
        want = dense_model(base, update.modules)(input_ids=ids).logits
        with update.applied(base.model) as model:
            assert torch.equal(model(input_ids=ids).logits, want)
        assert relative(base.model(input_ids=ids).logits, want) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    with pytest.raises(ZeroDivisionError), update.applied(base.model):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def test_applied_in_half_precision_rounds_once_and_takes_back_exactly():
    base = tiny_base()
    model = copy.deepcopy(base.model).bfloat16()
    update = merge([random_adapter(base, 3, i) for i in range(2)], "ties")
    before, module = bits(model), "model.layers.0.mlp.up_proj"
    with update.applied(model):
        got = model.get_submodule(module).weight
        assert torch.equal(got, (before[module + ".weight"].float() + update.modules[module]).bfloat16())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_applied_refuses_what_it_cannot_do_and_leaves_the_model_alone():
    base = tiny_base()
    before = bits(base.model)
    first, head = "model.layers.0.mlp.up_proj", "lm_head"
    good = torch.ones(base.shapes[first])
    quantised = torch.nn.Linear(3, 3)
    quantised.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    for modules, error, words in (
        ({first: good, "model.layers.9.mlp.up_proj": good}, BaseError, "layers.9"),
        ({first: good, "model.layers.1.mlp.up_proj": good.T}, AdapterError, "32×64 does not fit a layer of 64×32"),
        ({first: good, head: torch.ones(base.shapes[head])}, BaseError, "shares its weight"),
        ({first: good, "model.norm": torch.ones(32, 32)}, AdapterError, "not a linear layer"),
    ):
        with pytest.raises(error, match=words), Dense("d", modules).applied(base.model):
            pass
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    with (
        pytest.raises(BaseError, match="floating-point"),
        Dense("d", {"0": torch.ones(3, 3)}).applied(torch.nn.Sequential(quantised)),
    ):
        pass


# Invariances, of every registered method ----------------------------------------------------------------------------


def variants():
    """(method, options) for the defaults of each method and every setting under which it declares more."""
    for name, record in methods().items():
        yield name, {}
        for option, value in record.also:
            yield name, {option: value}


CASES = [(name, options, what) for name, options in variants() for what in sorted(methods()[name].invariant(**options))]


def regauged(adapter, g, kind):
    """The same ΔW, factored otherwise."""
    modules = {}
    for module, f in adapter.modules.items():
        r = f.rank
        if kind == "units":
            order = torch.randperm(r, generator=g)
            modules[module] = Factors(f.B[:, order], f.A[order])
        elif kind == "scale":
            c = torch.exp(torch.randn(r, generator=g).double()) * torch.randn(r, generator=g).double().sign()
            modules[module] = Factors(f.B * c, f.A / c[:, None])
        else:
            m = torch.randn(r, r, generator=g).double() + 2 * torch.eye(r).double()
            modules[module] = Factors(f.B @ m, torch.linalg.solve(m, f.A))
    return Adapter(adapter.name, modules)


def change(adapters, weights, what, g):
    """(adapters, weights) that the invariance says make no difference."""
    if what == "order":
        order = torch.randperm(len(adapters), generator=g).tolist()
        return [adapters[i] for i in order], [weights[i] for i in order]
    return [regauged(a, g, what) for a in adapters], weights


@pytest.mark.parametrize(("name", "options", "what"), CASES)
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 5), data=st.data())
def test_declared_invariances_hold(name, options, what, seed, n, data):
    adapters = pool(n, seed, ranks=(3, 2, 4), absent={(1, "wide")})
    weights = data.draw(st.lists(st.floats(0.25, 2) | st.floats(-2, -0.25), min_size=n, max_size=n))
    g = torch.Generator().manual_seed(seed + 1)
    got = deltas(merge(adapters, name, weights=weights, **options))
    if what == "linear":
        other = torch.randn(n, generator=g).tolist()
        mixed = [2 * w - 3 * v for w, v in zip(weights, other, strict=True)]
        second = deltas(merge(adapters, name, weights=other, **options))
        got = {module: 2 * delta - 3 * second[module] for module, delta in got.items()}
        again = deltas(merge(adapters, name, weights=mixed, **options))
    else:
        changed, weights = change(adapters, weights, what, g)
        again = deltas(merge(changed, name, weights=weights, **options))
    for module, delta in got.items():
        assert (again[module] - delta).norm() <= 1e-5 * max(1.0, float(delta.norm())), (name, options, what, module)


def test_gauge_covers_units_and_scale_wherever_it_is_declared():
    for name, options in variants():
        held = methods()[name].invariant(**options)
        assert held <= set(INVARIANCES)
        assert "gauge" not in held or {"units", "scale"} <= held, (name, options)


# Options and provenance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"method": "ties", "densty": 0.3}, "did you mean 'density'.*elect: one of 'total', 'frequency'"),
        ({"method": "sum", "density": 0.3}, "it takes none"),
        ({"method": "ties", "density": 1.5}, r"density is 1.5, expected a finite number in \[0, 1\]"),
        ({"method": "ties", "density": float("nan")}, "density is nan"),
        ({"method": "ties", "density": "0.2"}, "density is '0.2'"),
        ({"method": "ties", "density": True}, "density is True"),
        ({"method": "ties", "elect": "mass"}, "expected one of 'total', 'frequency'"),
        ({"method": "average", "divide": None}, "divide is None"),
        ({"method": "lego", "k": 0}, "k is 0, expected a whole number ≥ 1 or None"),
        ({"method": "lego", "k": 2.0}, "k is 2.0"),
        ({"method": "lego", "parameter_reweighting": 1}, "expected True or False"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": "1"}, "scale is '1'"),
        ({"rank": 0}, "rank is 0"),
        ({"weights": [1, 2]}, "expected 4 weights"),
        ({"weights": [1, 2, float("nan"), 1]}, "weight of a2 is not finite"),
        ({"weights": {"b": 1}}, "not in the stack: b"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(arguments, words):
    with pytest.raises(MergeError, match=words):
        merge(pool(), **arguments)


def test_empty_sources_are_refused():
    with pytest.raises(SelectionError, match="empty"):
        merge([])
    with pytest.raises(MergeError, match="hold no module"):
        merge([Adapter("a", {})])


def test_values_that_are_not_finite_are_refused_by_adapter_and_module():
    adapters = pool()
    adapters[2].modules["tall"].A[0, 0] = float("nan")
    for name in methods():
        with pytest.raises(MergeError, match=r"tall holds values that are not finite in a2;"):
            merge(adapters, name)
    huge = [Adapter("a", {"m": Factors(torch.full((2, 1), 1e30), torch.ones(1, 2))})]
    with pytest.raises(MergeError, match="the result for m overflows"):
        merge(huge, "sum", weights=[1e30])


def test_the_result_says_what_it_was_made_of(tmp_path):
    adapters = pool(3, absent={(1, "wide")})
    update = merge(adapters, "average", weights=[1, 2, 0], scale=0.5, divide="present")
    assert update.name == "average-of-3"
    assert merge(adapters, name="mine").name == "mine"
    assert update.info["method"] == "average"
    assert update.info["version"] == 1
    assert update.info["options"] == {"divide": "present", "scale": 0.5, "rank": None}
    assert update.info["sources"] == {"a0": 1.0, "a1": 2.0, "a2": 0.0}
    report = pd.DataFrame(update.info["report"]).set_index(["adapter", "module"])
    assert len(report) == 9
    assert report.loc[("a1", "wide"), "status"] == "absent"
    assert report.loc[("a1", "wide"), "rank"] == 0
    assert report.loc[("a0", "wide"), "status"] == "used"
    assert set(report.loc["a2", "status"]) == {"weight 0"}
    card = (update.save(tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    assert "`average`" in card
    assert "| a1 | 2 |" in card
    assert update.info["paper"] in card


def test_merging_leaves_its_sources_alone():
    adapters = pool()
    before = [a.digest() for a in adapters]
    for name in methods():
        merge(adapters, name, weights=[2, -1, 0.5, 1], scale=3.0, rank=2)
    assert [a.digest() for a in adapters] == before


def test_results_are_the_same_from_run_to_run():
    adapters = pool()
    for name in methods():
        first, second = deltas(merge(adapters, name)), deltas(merge(Stack.of(adapters), name))
        assert all(torch.equal(first[m], second[m]) for m in first), name


def test_methods_come_in_a_fixed_order_with_their_record():
    assert list(itertools.islice(merge.methods(), 5)) == ["sum", "average", "svd", "ties", "lego"]
    for name, record in methods().items():
        assert record.name == name
        assert record.paper.startswith("https://")
        assert record.version >= 1
        assert record.function.__doc__, name
        assert all(option.accepts(option.default) for option in record.options.values())
        assert isinstance(merge(pool(), name), Dense) == record.dense
    assert list(methods()["ties"].options) == ["density", "elect", "divide"]


@pytest.fixture
def scratch(monkeypatch):
    monkeypatch.setattr(registry_under_test, "_METHODS", dict(registry_under_test._METHODS))


def test_a_method_is_added_in_eight_lines(scratch):
    @method("largest", paper="https://example.org", invariances={"units", "order"})
    def largest(units, weights, *, keep: Count = 2, share: Share = 1.0):
        """The units of largest norm."""
        sizes = units.B.norm(dim=0) * units.A.norm(dim=1)
        best = sizes.topk(min(keep, len(units))).indices
        return units.times(weights[units.owner])[:, best] * share, units.A[best]

    update = merge(pool(), "largest", keep=3, share=0.5)
    assert update.rank == 3
    assert update.info["options"]["keep"] == 3
    with pytest.raises(MergeError, match="share is 2"):
        merge(pool(), "largest", share=2)
    with pytest.raises(MergeError, match="exists already"):
        method("ties", paper="", invariances=set())(largest)
    with pytest.raises(MergeError, match="unknown invariances sign"):
        method("other", paper="", invariances={"sign"})
    assert "largest" in methods()
