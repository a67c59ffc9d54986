"""Merging: dense float64 algebra, plain peft, golden examples; every method is held to the invariances it declares."""

import copy
import itertools
import json
import math
from dataclasses import replace

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
    write_peft,
)
from merging import SHAPES, as_on_a_gpu, deltas, gap, pool, single, weighted_sum
from workbench.adapters import Adapter, Factors
from workbench.errors import AdapterError, BaseError, MergeError, SelectionError
from workbench.merge import INVARIANCES, Count, Dense, Share, merge, method, methods, truncate
from workbench.merge import registry as registry_under_test
from workbench.pool import Pool
from workbench.stack import Stack

# What a method takes and needs ---------------------------------------------------------------------------------------

KEEPS_ALL = {"density": 1.0, "outliers": 0.0, "window": 0.0}  # options at which nothing is dropped
FLATTEN = ("iso_c", "iso_cts")  # made to change a single adapter too


def keeping_all(name):
    return {option: value for option, value in KEEPS_ALL.items() if option in methods()[name].options}


def run(adapters, name, weights=None, **options):
    """`merge`, with as many of the adapters as the method takes, and statistics where it needs them."""
    record = methods()[name]
    adapters = list(adapters)[: record.takes]
    if record.needs:
        from helpers import some_statistics

        options["statistics"] = some_statistics(adapters, gradients=record.needs == "gradients")
    return merge(adapters, name, weights=None if weights is None else weights[: record.takes], **options)


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
        got = run(adapters, name, weights=[-1, 1, 1, 1])
        want = run(negated, name)
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
        plain = run(adapters, name)
        want = {module: -0.3 * delta for module, delta in deltas(plain).items()}
        assert gap(run(adapters, name, scale=-0.3), want) < 1e-12, name


def test_one_adapter_at_weight_one_is_itself():
    adapter = pool(1)
    for name, record in methods().items():
        if record.takes is None and name not in FLATTEN:
            assert gap(run(adapter, name, **keeping_all(name)), weighted_sum(adapter, [1])) < 1e-12, name
    assert gap(merge(adapter[0], "sum"), weighted_sum(adapter, [1])) < 1e-12  # an adapter stands for a list of one


def test_zero_weights_give_a_zero_update_that_can_be_saved(tmp_path):
    adapters = pool()
    for name in methods():
        update = run(adapters, name, weights=[0, 0, 0, 0])
        assert update.norm() == 0, name
        (update.truncate(1) if isinstance(update, Dense) else update).save(tmp_path / name)


ZERO = Adapter(
    "zero", {m: Factors(torch.zeros(o, 2).double(), torch.zeros(2, i).double()) for m, (o, i) in SHAPES.items()}
)
# A zero adapter is counted by an average, shares out the directions of tsv and iso_cts, is a centroid to lego, and makes
# the basis of core space larger, where thresholds are shares and masks are drawn.
COUNTED = {"average", "svd", "tsv", "iso_cts", "slerp", "lego", "regmean", "fisher", "core", "core_dare"}


def test_a_zero_adapter_adds_nothing_where_nothing_is_counted():
    adapters = pool()
    for name in methods():
        if name not in COUNTED:
            assert gap(run([*adapters, ZERO], name), run(adapters, name)) < 1e-9, name


def test_every_method_takes_zero_adapters_alone_and_among_others():
    for name in methods():
        assert run([ZERO, replace(ZERO, name="zero too")], name).norm() == 0, name
        assert math.isfinite(run([pool(1)[0], ZERO], name).norm()), name


def test_duplicates_average_to_themselves():
    adapters = pool()
    twins = [Adapter(f"twin{i}", adapters[0].modules) for i in range(3)]
    for name in ("average", "svd", "slerp"):
        assert gap(run(twins, name), weighted_sum(adapters[:1], [1])) < 1e-12
    for name in ("ties", "dare_ties", "della"):  # copies get the same mask
        assert gap(run(twins, name, density=0.4), run(adapters[:1], name, density=0.4)) < 1e-12, name


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_every_method_merges_any_number_of_adapters(n):
    adapters = pool(n, seed=n, absent={(0, "wide")} if n > 1 else ())
    for name, record in methods().items():
        if record.takes is None or n >= record.takes:
            update = run(adapters, name)
            assert list(update.modules) == ["square", "tall", "wide"], name
            assert 0 < update.norm() < math.inf, name


def test_a_method_for_two_says_so():
    for n in (1, 3):
        with pytest.raises(MergeError, match=f"slerp merges 2 adapters, got {n}"):
            merge(pool(n), "slerp")
    assert gap(merge(pool(3), "slerp", weights=[1, 0, 2]), merge(pool(3)[::2], "slerp", weights=[1, 2])) < 1e-12


def slerped(x, y, t):
    """Shoemake (1985), on matrices as vectors."""
    theta = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    return (math.sin((1 - t) * theta) * x + math.sin(t * theta) * y) / math.sin(theta)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), t=st.floats(0, 1), w=st.floats(-3, 3).filter(lambda w: abs(w) > 0.01))
def test_slerp_is_shoemake_s_formula_per_module(seed, t, w):
    adapters = pool(2, seed, absent={(1, "wide")})
    got = merge(adapters, "slerp", weights=[1, w], t=t).modules
    x, y = (deltas(a) for a in adapters)
    for module in ("tall", "square"):
        want = slerped(x[module], w * y[module], t)
        assert (got[module].delta() - want).norm() < 1e-6 * want.norm()
    assert torch.allclose(got["wide"].delta(), (1 - t) * x["wide"])  # the other lacks it: a straight line to 0


def test_slerp_keeps_the_length_of_equal_lengths_and_goes_straight_where_no_arc_is_defined():
    x, y = torch.tensor([[2.0, 0], [0, 0]]).double(), torch.tensor([[0, 0], [2.0, 0]]).double()
    assert merge(single(x.tolist(), y.tolist()), "slerp", t=0.3).norm() == pytest.approx(2.0)
    opposed = merge(single(x.tolist(), (-x).tolist()), "slerp", t=0.25)
    assert torch.allclose(opposed.modules["m"].delta(), 0.5 * x)


def test_linear_is_the_product_of_the_factors_sums_and_pads_unequal_ranks():
    g = torch.Generator().manual_seed(0)
    raw = [
        (torch.randn(5, r, generator=g).double(), torch.randn(r, 4, generator=g).double(), s)
        for r, s in ((2, 2.0), (3, 0.5))
    ]
    adapters = [Adapter(f"a{i}", {"m": Factors(B * s, A, s)}) for i, (B, A, s) in enumerate(raw)]
    left, right = torch.zeros(5, 3).double(), torch.zeros(3, 4).double()
    for (B, A, s), w in zip(raw, (1.5, -2.0), strict=True):
        size = math.sqrt(abs(w * s))
        left[:, : len(A)] += size * B
        right[: len(A)] += math.copysign(size, w * s) * A
    got = merge(adapters, "linear", weights=[1.5, -2.0]).modules["m"]
    assert got.rank == 3
    assert torch.allclose(got.delta(), left @ right)


def test_linear_is_far_from_the_sum():
    adapters = pool(2, ranks=(4,))
    assert gap(merge(adapters, "linear"), merge(adapters, "sum")) > 0.5


def test_a_thousand_tiny_adapters_do_not_stall():
    """In bf16, adding 1 stops at 256; here bf16 factors of ones sum to a thousand."""
    one = Factors(torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
    adapters = [Adapter(f"a{i}", {"m": one}) for i in range(1000)]
    known = {"sum": 1000.0, "cat": 1000.0, "average": 1.0, "svd": 1.0, "ties": 1.0, "magnitude_prune": 1000.0}
    for name, want in known.items():
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


# Plain peft ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def ids(base):
    return some_ids(base)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Written by plain peft: mixed α, one rslora, the same rank; the last has fewer targets."""
    out, every = tmp_path_factory.mktemp("written"), ["q_proj", "v_proj", "up_proj", "down_proj"]
    for i, (alpha, rslora, targets) in enumerate(
        [(8, False, every), (2, False, every), (4, True, every), (8, False, every[:2])]
    ):
        settings = {"r": 4, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": targets}
        write_peft(base, out / f"a{i}", i + 1, **settings)
    return [out / f"a{i}" for i in range(4)]


def peft_merged(base, folders, weights, ids, kind, **options):
    from peft import PeftModel

    with peft_s_own_warnings(), torch.no_grad():
        first, *rest = folders
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(first), adapter_name=first.name)
        for folder in rest:
            model.load_adapter(str(folder), adapter_name=folder.name)
        names = [folder.name for folder in folders]
        model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
        model.set_adapter("merged")
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [("cat", "cat", {}), ("svd", "svd", {"of": "sum", "rank": 6}), ("linear", "linear", {})],
    ids=["cat", "svd", "linear"],
)
def test_cat_svd_and_linear_give_the_logits_of_peft_s_own(base, ids, folders, kind, name, options):
    weights = [0.5, 1.0, 0.75, 2.0] if kind == "svd" else [0.5, -1.0, 0.75, 2.0]  # peft's svd takes no negative ones
    want = peft_merged(base, folders, weights, ids, kind, **({"svd_rank": 6} if kind == "svd" else {}))
    assert relative(want, base.model(input_ids=ids).logits) > 1e-2
    merged = merge([Adapter.load(folder) for folder in folders], name, weights=weights, **options)
    assert relative(hook_logits(base, merged, ids), want) < 1e-4


@pytest.mark.parametrize("name", list(methods()))
def test_every_result_reloads_in_plain_peft_with_the_same_logits(base, ids, tmp_path, name):
    mixed = [
        random_adapter(base, 4, 1),
        random_adapter(base, 2, 2, alpha=2, rslora=True),
        random_adapter(base, 8, 3, ["q_proj", "v_proj", "down_proj"]),
    ]
    update = run(mixed, name, weights=[1.0, -0.5, 2.0])
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
    n = methods()[name].takes or n
    adapters = pool(n, seed, ranks=(3, 2, 4), absent={(1, "wide")})
    weights = data.draw(st.lists(st.floats(0.25, 2) | st.floats(-2, -0.25), min_size=n, max_size=n))
    g = torch.Generator().manual_seed(seed + 1)
    got = deltas(run(adapters, name, weights=weights, **options))
    if what == "linear":
        other = torch.randn(n, generator=g).tolist()
        mixed = [2 * w - 3 * v for w, v in zip(weights, other, strict=True)]
        second = deltas(run(adapters, name, weights=other, **options))
        got = {module: 2 * delta - 3 * second[module] for module, delta in got.items()}
        again = deltas(run(adapters, name, weights=mixed, **options))
    else:
        changed, weights = change(adapters, weights, what, g)
        again = deltas(run(changed, name, weights=weights, **options))
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
    adapters[0].modules["tall"].A[0, 0] = float("nan")
    for name in methods():
        with pytest.raises(MergeError, match=r"tall holds values that are not finite in a0;"):
            run(adapters, name)
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
    report = update.info["report"].set_index(["adapter", "module"])
    assert len(report) == 9
    assert report.loc[("a1", "wide"), "status"] == "absent"
    assert report.loc[("a1", "wide"), "rank"] == 0
    assert report.loc[("a0", "wide"), "status"] == "used"
    assert set(report.loc["a2", "status"]) == {"weight 0"}
    card = (update.save(tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    assert "`average`" in card
    assert "| a1 | 2 |" in card
    assert update.info["paper"] in card


def test_a_pool_is_merged_whole_and_its_refused_adapters_are_reported(base, tmp_path):
    for i in range(2):
        random_adapter(base, 2, i).save(tmp_path / f"a{i}")
    bad = random_adapter(base, 2, 2).save(tmp_path / "dora")
    config = json.loads((bad / "adapter_config.json").read_text(encoding="utf-8"))
    (bad / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}), encoding="utf-8")
    opened = Pool.open(tmp_path)
    update = merge(opened, "average")
    assert gap(update, merge([opened.adapter("a0"), opened.adapter("a1")], "average")) == 0
    last = update.info["report"].iloc[-1]
    assert (last.adapter, last.status) == ("dora", "refused")
    assert "DoRA" in last.reason
    assert set(update.info["report"].status) == {"used", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(methods()))
def test_the_whole_bundled_pool_merges_by_every_method(name):
    opened = Pool.open("nano")
    stack = opened.stack()
    if methods()[name].takes:
        stack = stack.choose(stack.names[: methods()[name].takes])
    statistics = None
    if methods()[name].needs:
        from helpers import some_statistics

        statistics = some_statistics(stack, gradients=methods()[name].needs == "gradients")
    update = merge(stack, name, statistics=statistics)
    assert set(update.modules) == set(stack.modules)
    assert 0 < update.norm() < math.inf


def test_merging_leaves_its_sources_alone():
    adapters = pool()
    before = [a.digest() for a in adapters]
    for name in methods():
        run(adapters, name, weights=[2, -1, 0.5, 1], scale=3.0, rank=2)
    assert [a.digest() for a in adapters] == before


def test_results_are_the_same_from_run_to_run():
    adapters = pool()
    for name in methods():
        first, second = deltas(run(adapters, name)), deltas(run(adapters, name))
        assert all(torch.equal(first[m], second[m]) for m in first), name


def test_times_is_written_down():
    for name in ("average", "ties"):
        update = merge(pool(), name, scale=2.0)
        assert update.times(-0.5).info["options"] == update.info["options"] | {"scale": -1.0}
        assert update.info["options"]["scale"] == 2.0


def test_methods_come_in_a_fixed_order_with_their_record():
    assert list(itertools.islice(merge.methods(), 4)) == ["sum", "cat", "average", "svd"]
    for name, record in methods().items():
        assert record.name == name
        assert record.paper.startswith("https://")
        assert record.version >= 1
        assert record.function.__doc__, name
        assert all(option.accepts(option.default) for option in record.options.values())
        assert isinstance(run(pool(), name), Dense) == record.dense
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_s_way_of_cutting_and_fetching_gives_the_same(dtype):
    adapters = pool(3, dtype=dtype, shapes={"m": (20, 30), "n": (6, 4)})
    for name, rank in (("ties", None), ("ties", 3), ("svd", 2), ("sum", 2), ("average", None), ("svd", None)):
        want = run(adapters, name, rank=rank, scale=0.5)
        with as_on_a_gpu():
            got = run(adapters, name, rank=rank, scale=0.5)
        assert gap(got, want) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert got.info.get("error", {}) == pytest.approx(want.info.get("error", {}), abs=1e-5)


def test_values_whose_sum_overflows_are_finite_all_the_same():
    large = torch.full((4, 2), 2e38)
    got = merge([Adapter("large", {"m": Factors(large, torch.full((2, 3), 1e-10))})], "sum")
    assert torch.equal(got.modules["m"].B, large)
