"""Merges that need examples: plain hooks and autograd's own gradients of the weights, dense float64 algebra, closed forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from helpers import (
    dense_model,
    hook_count,
    random_adapter,
    relative,
    some_examples,
    some_statistics,
    tiny_base,
    tiny_gpt2,
    worded_base,
)
from workbench.adapters import Adapter, Factors
from workbench.errors import AdapterError, MergeError, TaskError
from workbench.experiment import Recipe, compare
from workbench.merge import Statistics, collect, merge
from workbench.merge.statistics import Rows
from workbench.pool import Pool
from workbench.runs import EXAMPLES, Case, Workplace
from workbench.stack import Stack
from workbench.tasks import Example, Task, upstream

SHAPES = {"wide": (7, 11), "tall": (12, 5), "square": (6, 6)}
WEIGHTS = [0.5, -2.0, 0.0, 3.0]


def pool(n=4, absent=(), shapes=SHAPES, embedding=False):
    g = torch.Generator().manual_seed(5)
    out = []
    for i in range(n):
        made = {
            m: (torch.randn(o, 1 + i % 3, generator=g), torch.randn(1 + i % 3, d, generator=g))
            for m, (o, d) in shapes.items()
        }
        modules = {
            m: Factors(b.double(), a.double(), embedding=embedding)
            for m, (b, a) in made.items()
            if (i, m) not in absent
        }
        out.append(Adapter(f"a{i}", modules))
    return out


def deltas(update):
    return {m: x.B.double() @ x.A.double() if isinstance(x, Factors) else x for m, x in update.modules.items()}


def gap(got, want):
    got = deltas(got) if hasattr(got, "modules") else got
    assert list(got) == list(want)
    return max(float((got[m] - want[m]).norm() / want[m].norm()) for m in want)


def parts(adapters, module, shape):
    return [a.modules[module].delta() if module in a.modules else torch.zeros(shape).double() for a in adapters]


def plain_average(adapters, weights):
    """Σ w ΔW / Σ|w|, dense."""
    total = sum(abs(w) for w in weights)
    shapes = Stack.of(adapters).shapes()
    return {
        m: sum(w * d for w, d in zip(weights, parts(adapters, m, s), strict=True)) / total for m, s in shapes.items()
    }


def altered(statistics, change):
    """Statistics with every `Rows` passed through change(name, module, rows)."""
    rows = {n: {m: change(n, m, r) for m, r in modules.items()} for n, modules in statistics.rows.items()}
    return Statistics(rows, statistics.gradients)


# Collecting ---------------------------------------------------------------------------------------------------------


def in_double(base):
    base.model.double()
    return base


def bases():
    llama, gpt2, bpe = in_double(tiny_base(spread=4)), in_double(tiny_gpt2()), in_double(worded_base("byte-bpe"))
    head = {name: shape for name, shape in bpe.shapes.items() if "layers.1" in name or name == "lm_head"}
    mixed = [
        random_adapter(llama, 4, 1, ["q_proj", "v_proj", "down_proj"], rslora=True),
        random_adapter(llama, 2, 2),
        random_adapter(llama, 6, 3, ["o_proj", "up_proj"]),
    ]
    return {
        "llama": (llama, mixed),
        "gpt2": (gpt2, [random_adapter(gpt2, 3, 1), random_adapter(gpt2, 2, 2, ["c_attn"])]),
        "head": (bpe, [random_adapter(head, 3, 1), random_adapter(head, 2, 2, ["lm_head", "q_proj"])]),
    }


@pytest.fixture(scope="module")
def known():
    """kind → base in fp64, adapters of mixed ranks and targets, examples for each (3, 5 and 2 of them)."""
    return {
        kind: (base, adapters, {a.name: some_examples(base, (3, 5, 2)[i], 10 + i) for i, a in enumerate(adapters)})
        for kind, (base, adapters) in bases().items()
    }


def observed(base, adapter, modules, example):
    """One example alone through base + ΔW: module → (its inputs, the gradient of −log p(answer | prompt) for its weight)."""
    model = dense_model(base, {m: f.B.double() @ f.A.double() for m, f in adapter.modules.items()})
    layers, inputs = dict(model.named_modules()), {}
    for module in modules:
        layers[module].weight.requires_grad_(True)
        layers[module].register_forward_pre_hook(
            lambda _, args, module=module: inputs.update({module: args[0].detach()[0]})
        )
    ids = torch.tensor([example.prompt + example.answer])
    logged = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(example.prompt)
    loss = -sum(logged[start - 1 + k, token] for k, token in enumerate(example.answer))
    grads = torch.autograd.grad(loss, [layers[module].weight for module in modules])
    turn = [g if isinstance(layers[m], torch.nn.Linear) else g.T for m, g in zip(modules, grads, strict=True)]
    return {module: (inputs[module], g) for module, g in zip(modules, turn, strict=True)}


@pytest.fixture(scope="module")
def oracle(known):
    """kind → adapter's name → one `observed` per example, in order of length (as rows are kept)."""
    return {
        kind: {
            a.name: [observed(base, a, list(Stack.of(adapters).modules), e) for e in sorted(examples[a.name], key=len)]
            for a in adapters
        }
        for kind, (base, adapters, examples) in known.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "head"])
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_are_what_plain_hooks_and_autograd_say(known, oracle, kind, gradients):
    base, adapters, examples = known[kind]
    statistics = collect(base, adapters, examples, gradients=gradients)
    assert statistics.names == tuple(a.name for a in adapters)
    assert statistics.gradients is gradients
    for name, alone in oracle[kind].items():
        assert list(statistics.rows[name]) == list(Stack.of(adapters).modules)  # those that it lacks too
        for module, rows in statistics.rows[name].items():
            assert relative(rows.x, torch.cat([seen[module][0] for seen in alone])) < 1e-9, (name, module)
            assert rows.examples == len(alone)
            if not gradients:
                assert rows.g is None
                continue
            for k, seen in enumerate(alone):
                own = rows.example == k
                assert relative(rows.g[own].T @ rows.x[own], seen[module][1]) < 1e-6, (name, module)  # the loss is fp32
            want = sum(seen[module][1].square() for seen in alone) / len(alone)
            assert relative(rows.fisher(rows.g), want) < 1e-6


def test_neither_padding_nor_company_nor_the_size_of_a_batch_matters(known):
    base, adapters, examples = known["llama"]
    together = collect(base, adapters, examples, gradients=True)
    split = collect(base, adapters, examples, gradients=True, max_tokens=1)  # one example of one adapter at a time
    short = {name: rows[:1] for name, rows in examples.items()} | {adapters[1].name: examples[adapters[1].name]}
    other = collect(base, adapters[::-1], short, gradients=True)
    for name, modules in together.rows.items():
        for module, rows in modules.items():
            for again in (split, other) if name == adapters[1].name else (split,):
                found = again.rows[name][module]
                assert len(found) == len(rows) == sum(map(len, examples[name]))
                assert relative(found.x, rows.x) < 1e-9
                assert relative(found.g, rows.g) < 1e-9
                assert torch.equal(found.example, rows.example)


def test_layers_that_read_one_tensor_share_what_is_kept(known):
    base, adapters, examples = known["llama"]
    rows = collect(base, adapters, examples).rows[adapters[1].name]
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    q, k, v, o = (rows[f"{attention}{x}_proj"].x for x in "qkvo")
    assert q.data_ptr() == k.data_ptr() == v.data_ptr() != o.data_ptr()
    assert rows[mlp + "gate_proj"].x.data_ptr() == rows[mlp + "up_proj"].x.data_ptr() != q.data_ptr()
    statistics = collect(base, adapters, examples)
    tokens = sum(len(e) for own in examples.values() for e in own)
    assert statistics.nbytes == 8 * tokens * 2 * (32 + 32 + 32 + 64)  # two layers: into q k v, o, gate and up, down
    assert "inputs of 3 adapters in 14 modules" in repr(statistics)


def test_the_model_is_left_as_it_was(known, monkeypatch):
    base, adapters, examples = known["llama"]
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    collect(base, adapters, examples, gradients=True)
    assert torch.is_grad_enabled()
    for name, p in base.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert not p.requires_grad
    assert hook_count(base.model) == 0
    monkeypatch.setattr(base, "logits", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(base, adapters, examples)
    assert hook_count(base.model) == 0
    assert torch.is_grad_enabled()


def test_at_most_so_many_tokens_are_drawn_evenly_under_a_seed(known):
    base, adapters, examples = known["llama"]
    name, module = adapters[1].name, "model.layers.1.self_attn.q_proj"
    full = collect(base, adapters, examples).rows[name][module].x
    capped = collect(base, adapters, examples, tokens=7)
    for own, rows in capped.rows.items():
        assert [len(r) for r in rows.values()] == [min(7, sum(map(len, examples[own])))] * 14
    some = capped.rows[name][module].x
    nearest = torch.cdist(some, full).min(1)
    assert nearest.values.max() < 1e-6
    assert len(nearest.indices.unique()) == 7
    alone = collect(base, adapters[1:2], examples, tokens=7, max_tokens=1).rows[name][module].x
    assert relative(alone, some) < 1e-9
    assert relative(collect(base, adapters, examples, tokens=7, seed=1).rows[name][module].x, some) > 1e-3
    assert relative(collect(base, adapters, examples, tokens=10_000).rows[name][module].x, full) < 1e-9
    places = torch.cat(
        [
            torch.cdist(collect(base, adapters, examples, tokens=7, seed=s).rows[name][module].x, full).min(1).indices
            for s in range(40)
        ]
    )
    assert abs(float(places.double().mean()) / (len(full) - 1) - 0.5) < 0.08  # 280 draws: σ is 0.017
    one = next(iter(examples.values()))
    drawn = [r["model.layers.0.self_attn.q_proj"].x for r in collect(base, adapters, one, tokens=7).rows.values()]
    assert not torch.equal(drawn[0], drawn[1])  # of the same examples and inputs, each its own draw
    for tokens, gradients, words in ((0, False, "tokens is 0"), (7, True, "needs all of its tokens")):
        with pytest.raises(MergeError, match=words):
            collect(base, adapters, examples, tokens=tokens, gradients=gradients)


def test_examples_may_be_tasks_or_encoded_and_one_for_all(known):
    base, adapters, examples = known["llama"]
    task = Task("t", "say", (Example("a b", "b"), Example("c", "dd")), (), ())
    rows = collect(base, adapters, task).rows
    assert len({len(r) for modules in rows.values() for r in modules.values()}) == 1
    again = collect(base, adapters[:1], {adapters[0].name: task, "another": task}).rows[adapters[0].name]
    assert all(relative(again[m].x, rows[adapters[0].name][m].x) < 1e-9 for m in again)
    collect(base, Stack.of(adapters), next(iter(examples.values())))
    for given_, words in (
        ({adapters[0].name: task}, "no examples for 2 of 3 adapters, such as 'random-2'"),
        (replace(task, train=()), "examples for random-1 are empty"),
        ([], "are empty"),
    ):
        with pytest.raises(TaskError, match=words):
            collect(base, adapters, given_)


def test_what_cannot_be_observed_is_refused(known, monkeypatch):
    base, adapters, examples = known["llama"]
    elsewhere = Adapter("far", {"model.layers.7.mlp.up_proj": Factors(torch.ones(64, 1), torch.ones(1, 32))})
    with pytest.raises(AdapterError, match=r"far: the base has no layer model\.layers\.7"):
        collect(base, [*adapters, elsewhere], next(iter(examples.values())))
    whole = base.logits
    monkeypatch.setattr(base, "logits", lambda batch: whole(replace(batch, ids=batch.ids[:, 1:])))
    with pytest.raises(MergeError, match="every token of every row"):
        collect(base, adapters, examples)
    monkeypatch.setattr(base, "logits", lambda batch: None)
    with pytest.raises(MergeError, match="was never run"):
        collect(base, adapters, examples)


# RegMean ------------------------------------------------------------------------------------------------------------


def grams(statistics, names, module, shrink, normalise):
    out = []
    for name in names:
        x = statistics.rows[name][module].x.double()
        gram = x.T @ x / (len(x) if normalise else 1)
        out.append(gram * shrink + (1 - shrink) * torch.diag(gram.diagonal()))
    return out


def regmean_oracle(adapters, weights, statistics, shrink=0.9, normalise=True, divide="all", ridge=1e-6):
    """(Σ w ΔW H)(Σ |w| H)⁻¹, H = G + ridge · the diagonal of the weighted mean G; as the paper's, term by term."""
    out = {}
    for module, shape in Stack.of(adapters).shapes().items():
        some = [(a, w) for a, w in zip(adapters, weights, strict=True) if divide == "all" or module in a.modules]
        g = grams(statistics, [a.name for a, _ in some], module, shrink, normalise)
        mean = sum(abs(w) * one for (_, w), one in zip(some, g, strict=True)) / sum(abs(w) for _, w in some)
        h = [one + ridge * torch.diag(mean.diagonal()) for one in g]
        over = sum(
            w * d @ one for (_, w), d, one in zip(some, parts([a for a, _ in some], module, shape), h, strict=True)
        )
        out[module] = over @ torch.linalg.inv(sum(abs(w) * one for (_, w), one in zip(some, h, strict=True)))
    return out


ABSENT = {(0, "wide"), (2, "wide"), (3, "tall")}


@pytest.mark.parametrize("shrink", [0.9, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("divide", ["all", "present"])
def test_regmean_is_the_paper_s_closed_form(shrink, normalise, divide):
    adapters = pool(absent=ABSENT)
    sizes = dict(zip(("a0", "a1", "a2", "a3"), (12, 9, 7, 3), strict=True))
    statistics = altered(some_statistics(adapters), lambda name, _, r: replace(r, x=r.x[: sizes[name]] * 2, g=None))
    options = {"shrink": shrink, "normalise": normalise, "divide": divide}
    got = merge(adapters, "regmean", weights=WEIGHTS, statistics=statistics, **options)
    assert isinstance(got, Adapter)
    assert {m: f.rank for m, f in got.modules.items()} == {"square": 7, "tall": 6, "wide": 3}
    assert gap(got, regmean_oracle(adapters, WEIGHTS, statistics, **options)) < 1e-7
    assert gap(got, regmean_oracle(adapters, WEIGHTS, statistics, **options, ridge=1e-12)) < 1e-3  # it is small
    assert gap(got, plain_average(adapters, WEIGHTS)) > 0.05


def test_regmean_from_a_model_is_the_closed_form_on_activations_of_plain_hooks(known, oracle):
    base, adapters, examples = known["llama"]
    weights = [1.0, -0.5, 2.0]
    seen = {
        name: {m: Rows(torch.cat([one[m][0] for one in alone])) for m in alone[0]}
        for name, alone in oracle["llama"].items()
    }
    want = regmean_oracle(
        [replace(a, modules={m: Factors(f.B.double(), f.A.double()) for m, f in a.modules.items()}) for a in adapters],
        weights,
        Statistics(seen),
    )
    got = merge(adapters, "regmean", weights=weights, statistics=collect(base, adapters, examples))
    assert gap(got, want) < 1e-4  # the adapters are fp32
    assert gap(got, plain_average(adapters, weights)) > 0.1


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), shrink=st.sampled_from([1.0, 0.9, 0.3]))
def test_regmean_minimises_its_objective(seed, shrink):
    adapters = pool(absent={(1, "wide")})
    statistics = some_statistics(adapters, seed, gradients=False, tokens=16)
    got = deltas(merge(adapters, "regmean", weights=WEIGHTS, statistics=statistics, shrink=shrink))
    g = torch.Generator().manual_seed(seed)
    for module, delta in got.items():
        own = parts(adapters, module, delta.shape)
        h = grams(statistics, [a.name for a in adapters], module, shrink, True)

        def objective(x, own=own, h=h):
            terms = [(x - d * (1 if w > 0 else -1), abs(w), one) for d, w, one in zip(own, WEIGHTS, h, strict=True)]
            return float(sum(w * ((e @ one) * e).sum() for e, w, one in terms))

        for size in (1e-2, 1.0):
            step = torch.randn(delta.shape, generator=g).double() * size
            assert objective(delta + step) > objective(delta) < objective(delta - step)


def test_equal_grams_give_the_average():
    adapters = pool(absent={(1, "wide")})
    one = some_statistics(adapters[:1], tokens=3)
    rows = some_statistics(adapters[2:3], tokens=3).rows["a2"] | one.rows["a0"]
    statistics = Statistics({a.name: rows for a in adapters})
    for shrink, close in (
        (0.9, 1e-12),
        (1.0, 1e-8),
    ):  # three tokens: without shrinking only the ridge makes it invertible
        got = merge(adapters, "regmean", weights=WEIGHTS, statistics=statistics, shrink=shrink)
        assert gap(got, plain_average(adapters, WEIGHTS)) < close
    assert gap(merge(adapters, "regmean", statistics=statistics), deltas(merge(adapters, "average"))) < 1e-12


@pytest.mark.parametrize("turned", [False, True])
def test_where_inputs_live_apart_each_adapter_has_its_own_way(turned):
    """Two directions each, three tokens: fewer than d_in, and two directions of `wide` that nobody excites."""
    adapters = pool(3, shapes={"m": (6, 8)})
    g = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(8, 8, generator=g).double())[0] if turned else torch.eye(8).double()
    x = {a.name: torch.randn(3, 2, generator=g).double() @ frame[2 * i : 2 * i + 2] for i, a in enumerate(adapters)}
    statistics = Statistics({name: {"m": Rows(rows)} for name, rows in x.items()})
    weights = [1.0, -3.0, 0.25]
    got = deltas(merge(adapters, "regmean", weights=weights, statistics=statistics, shrink=1.0))["m"]
    for adapter, w in zip(adapters, weights, strict=True):
        sign = 1 if w > 0 else -1
        assert relative(x[adapter.name] @ got.T, sign * x[adapter.name] @ adapter.modules["m"].delta().T) < 1e-4
    if not turned:
        assert relative(got[:, 6:], plain_average(adapters, weights)["m"][:, 6:]) < 1e-12


def test_without_data_regmean_is_the_plain_average():
    adapters = pool(absent={(1, "wide")})
    empty = altered(some_statistics(adapters), lambda name, module, rows: Rows(rows.x[:0]))
    zero = altered(some_statistics(adapters), lambda name, module, rows: Rows(rows.x * 0))
    for statistics in (empty, zero):
        got = merge(adapters, "regmean", weights=WEIGHTS, statistics=statistics)
        assert gap(got, plain_average(adapters, WEIGHTS)) < 1e-12


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_one_adapter_is_itself_whatever_its_weight_and_its_data(name):
    adapter = pool(1)
    for statistics in (
        some_statistics(adapter),
        some_statistics(adapter, tokens=2),
        altered(some_statistics(adapter), lambda n, m, r: replace(r, x=r.x * 1e-9)),
    ):
        for weight, sign in ((1.0, 1), (2.0, 1), (-0.5, -1)):
            options = {"shrink": 1.0} if name == "regmean" else {}
            got = merge(adapter, name, weights=[weight], statistics=statistics, **options)
            assert gap(got, {m: sign * f.delta() for m, f in Stack.of(adapter).adapter(0).modules.items()}) < 1e-12
    others = pool()
    got = merge(others, name, weights=[0, 0, 5, 0], statistics=some_statistics(others), divide="present")
    assert gap(got, {m: others[2].modules[m].delta() for m in Stack.of(others).modules}) < 1e-12


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_only_the_ratios_of_weights_matter(name):
    adapters = pool(absent=ABSENT)
    statistics = some_statistics(adapters)
    one, many = (deltas(merge(adapters, name, weights=[c * w for w in WEIGHTS], statistics=statistics)) for c in (1, 4))
    assert gap(many, one) < 1e-12


def test_more_tokens_have_more_say_only_where_grams_are_sums():
    adapters = pool()
    once = some_statistics(adapters, gradients=False)
    thrice = altered(once, lambda name, _, r: Rows(r.x.repeat(3, 1)) if name == "a1" else r)
    normal = merge(adapters, "regmean", statistics=once)
    assert gap(merge(adapters, "regmean", statistics=thrice), deltas(normal)) < 1e-12
    summed = merge(adapters, "regmean", statistics=thrice, normalise=False)
    weighted = merge(adapters, "regmean", statistics=once, weights=[1, 3, 1, 1], normalise=False)
    assert gap(summed, deltas(weighted)) < 1e-5  # the ridge is shared by four in the one and by six in the other
    assert gap(summed, deltas(normal)) > 1e-2


def test_a_few_tokens_and_huge_inputs_do_not_blow_up():
    adapters = pool(4, shapes={"m": (9, 40)})
    for seed in range(5):
        for shrink in (0.9, 1.0):
            statistics = altered(
                some_statistics(adapters, seed, tokens=2),
                lambda name, _, r: Rows(r.x * torch.logspace(-4, 4, 40).double()),  # outlying dimensions
            )
            got = merge(adapters, "regmean", statistics=statistics, shrink=shrink)
            assert gap(got, regmean_oracle(adapters, [1] * 4, statistics, shrink)) < 1e-5
            for a in adapters:  # so few tokens can all be fitted
                x = statistics.rows[a.name]["m"].x
                if shrink == 1.0:
                    assert relative(x @ deltas(got)["m"].T, x @ a.modules["m"].delta().T) < 1e-2


@pytest.mark.parametrize(("name", "options"), [("regmean", {}), ("fisher", {}), ("fisher", {"normalise": "module"})])
def test_ids_of_an_embedding_are_one_hot_inputs(name, options):
    absent = {(2, "e")}
    looked_up, linear = (pool(absent=absent, shapes={"e": (5, 9)}, embedding=kind) for kind in (True, False))
    ids = altered(
        some_statistics(looked_up, tokens=6), lambda n, m, r: replace(r, x=r.x.clamp(max=7))
    )  # 8 is never met
    dense = altered(ids, lambda n, m, r: replace(r, x=torch.nn.functional.one_hot(r.x, 9).double()))
    got = merge(looked_up, name, weights=WEIGHTS, statistics=ids, **options)
    assert gap(got, deltas(merge(linear, name, weights=WEIGHTS, statistics=dense, **options))) < 1e-9
    assert relative(deltas(got)["e"][:, 8], plain_average(linear, WEIGHTS)["e"][:, 8]) < 1e-9
    assert gap(got, plain_average(linear, WEIGHTS)) > 1e-2


def test_ids_and_gradients_of_an_embedding_are_collected():
    base = in_double(worded_base("byte-bpe"))
    shape = tuple(base.model.get_input_embeddings().weight.T.shape)
    g = torch.Generator().manual_seed(0)
    factors = Factors(
        torch.randn(shape[0], 2, generator=g), torch.randn(2, shape[1], generator=g) * 0.05, embedding=True
    )
    adapter = Adapter("e", {"model.embed_tokens": factors})
    examples = sorted(some_examples(base, 3, 0), key=len)
    rows = collect(base, [adapter], examples, gradients=True).rows["e"]["model.embed_tokens"]
    assert rows.x.tolist() == [token for e in examples for token in e.prompt + e.answer]
    model = dense_model(base, {})
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight += (factors.B.double() @ factors.A.double()).T
    weight.requires_grad_(True)
    want = 0
    for e in examples:
        logged = model(input_ids=torch.tensor([e.prompt + e.answer])).logits[0].log_softmax(-1)
        loss = -sum(logged[len(e.prompt) - 1 + k, token] for k, token in enumerate(e.answer))
        want = want + torch.autograd.grad(loss, weight)[0].T.square() / 3
    assert relative(rows.fisher(rows.g, shape[1]), want) < 1e-6


# The diagonal Fisher ------------------------------------------------------------------------------------------------


def fisher_oracle(adapters, weights, information, normalise="model", floor=1e-6, divide="all"):
    """`information`: adapter's name → module → F, dense."""
    out = {}
    for module, shape in Stack.of(adapters).shapes().items():
        top = bottom = floored = 0
        some = [(a, w) for a, w in zip(adapters, weights, strict=True) if divide == "all" or module in a.modules]
        total = sum(abs(w) for _, w in some)
        size = {
            "model": lambda name: sum(float(f.square().sum()) for f in information[name].values()) ** 0.5,
            "module": lambda name, module=module: float(information[name][module].norm()),
            "none": lambda name: 1.0,
        }[normalise]
        scaled = {a.name: information[a.name][module] / size(a.name) for a, _ in some}
        floored = floor * sum(abs(w) * float(scaled[a.name].mean()) for a, w in some) / total
        for (a, w), d in zip(some, parts([a for a, _ in some], module, shape), strict=True):
            top = top + w * (scaled[a.name] + floored) * d
            bottom = bottom + abs(w) * (scaled[a.name] + floored)
        out[module] = top / bottom
    return out


@pytest.mark.parametrize("normalise", ["model", "module", "none"])
@pytest.mark.parametrize("divide", ["all", "present"])
@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_fisher_is_the_paper_s_weighted_average(normalise, divide, floor):
    adapters = pool(absent=ABSENT)
    statistics = altered(some_statistics(adapters), lambda name, _, r: replace(r, g=r.g * (1 + 4 * (name == "a1"))))
    information = {
        name: {
            m: sum((r.g[r.example == k].T @ r.x[r.example == k]).square() for k in range(3)) / 3
            for m, r in modules.items()
        }
        for name, modules in statistics.rows.items()
    }
    options = {"normalise": normalise, "divide": divide, "floor": floor}
    got = merge(adapters, "fisher", weights=WEIGHTS, statistics=statistics, **options)
    assert gap(got, fisher_oracle(adapters, WEIGHTS, information, **options)) < 1e-10
    assert gap(got, plain_average(adapters, WEIGHTS)) > 0.05
    for option, other in (("normalise", "module" if normalise == "none" else "none"), ("floor", 0.1)):
        again = merge(adapters, "fisher", weights=WEIGHTS, statistics=statistics, **(options | {option: other}))
        assert gap(again, deltas(got)) > 1e-4


@pytest.mark.parametrize("normalise", ["model", "none"])
def test_fisher_from_a_model_is_the_weighted_average_by_autograd_s_gradients(known, oracle, normalise):
    base, adapters, examples = known["llama"]
    weights = [1.0, -0.5, 2.0]
    information = {
        name: {m: sum(one[m][1].square() for one in alone) / len(alone) for m in alone[0]}
        for name, alone in oracle["llama"].items()
    }
    statistics = collect(base, adapters, examples, gradients=True)
    got = merge(adapters, "fisher", weights=weights, statistics=statistics, normalise=normalise)
    wide = [
        replace(a, modules={m: Factors(f.B.double(), f.A.double()) for m, f in a.modules.items()}) for a in adapters
    ]
    want = fisher_oracle(wide, weights, information, normalise)
    assert gap({m: d.double() for m, d in got.modules.items()}, want) < 1e-5
    assert gap(want, plain_average(wide, weights)) > 0.1


def test_equal_information_gives_the_average_and_separate_information_each_its_own():
    adapters = pool(3, shapes={"m": (6, 8)})
    one = some_statistics(adapters[:1]).rows["a0"]["m"]
    same = Statistics({a.name: {"m": one} for a in adapters}, True)
    weights = [1.0, -3.0, 0.25]
    average = plain_average(adapters, weights)
    assert gap(merge(adapters, "fisher", weights=weights, statistics=same), average) < 1e-12
    mask = {f"a{i}": (torch.arange(6) // 2 == i).double() for i in range(2)} | {"a2": torch.zeros(6).double()}
    apart = altered(same, lambda name, _, r: replace(r, g=r.g * mask[name]))
    got = deltas(merge(adapters, "fisher", weights=weights, statistics=apart))["m"]
    for i, sign in ((0, 1), (1, -1)):
        rows = slice(2 * i, 2 * i + 2)
        assert relative(got[rows], sign * adapters[i].modules["m"].delta()[rows]) < 1e-3
    assert relative(got[4:], average["m"][4:]) < 1e-12  # nobody knows
    none = altered(same, lambda name, _, r: replace(r, g=r.g * 0))
    for normalise in ("model", "module", "none"):
        update = merge(adapters, "fisher", weights=weights, statistics=none, normalise=normalise)
        assert gap(update, average) < 1e-12


def test_gradients_cancel_within_an_example_and_not_between_examples():
    adapters = pool(2, shapes={"m": (3, 4)})
    x, g = torch.ones(2, 4).double(), torch.stack([torch.ones(3), -torch.ones(3)]).double()
    strong = Rows(x[:1], g[:1], torch.tensor([0]), examples=1)
    for example, want in (([0, 0], 0.0), ([0, 1], 1.0)):
        opposed = Rows(x, g, torch.tensor(example), examples=1 + example[1])
        assert torch.equal(opposed.fisher(g), torch.full((3, 4), want).double())
        statistics = Statistics({"a0": {"m": opposed}, "a1": {"m": strong}}, True)
        got = merge(adapters, "fisher", statistics=statistics, normalise="none", floor=0)
        own = [a.modules["m"].delta() for a in adapters]
        assert gap(got, {"m": (own[0] + own[1]) / 2 if want else own[1]}) < 1e-12


def test_the_size_of_gradients_counts_only_where_it_is_not_normalised():
    adapters = pool()
    once = some_statistics(adapters)
    loud = altered(once, lambda name, _, r: replace(r, g=r.g * 10) if name == "a1" else r)
    for normalise in ("model", "module"):
        got = merge(adapters, "fisher", statistics=loud, normalise=normalise)
        assert gap(got, deltas(merge(adapters, "fisher", statistics=once, normalise=normalise))) < 1e-12
    got = merge(adapters, "fisher", statistics=loud, normalise="none")
    want = merge(adapters, "fisher", statistics=once, normalise="none", weights=[1, 100, 1, 1])
    assert gap(got, deltas(want)) < 1e-4  # but for the floor
    half = altered(loud, lambda name, module, r: replace(r, g=r.g / 10) if module == "wide" else r)
    model, module = (deltas(merge(adapters, "fisher", statistics=half, normalise=n)) for n in ("model", "module"))
    assert float((model["wide"] - module["wide"]).norm()) > 1e-2


# What is asked of statistics ----------------------------------------------------------------------------------------


def test_statistics_that_do_not_serve_are_refused():
    adapters = pool()
    full, plain = some_statistics(adapters), some_statistics(adapters, gradients=False)
    for method, statistics, words in (
        ("regmean", None, "regmean needs inputs of each adapter's examples; pass statistics"),
        ("fisher", None, "gradients=True"),
        ("fisher", plain, "which these statistics lack; pass gradients=True"),
        ("regmean", some_statistics(adapters[:2]), "lack 2 of 4 adapters, such as 'a2'"),
        (
            "regmean",
            altered(full, lambda n, m, r: Rows(r.x[:, 1:])),
            r"square takes inputs of width 6, but .* of width 5",
        ),
        (
            "regmean",
            altered(full, lambda n, m, r: Rows(torch.arange(4))),
            "but the statistics of a0 hold token ids below 4",
        ),
        ("fisher", altered(full, lambda n, m, r: replace(r, g=r.g[:, 1:])), "the gradients of a0 have 5 columns"),
        (
            "fisher",
            altered(full, lambda n, m, r: replace(r, g=r.g / 0)),
            "a0: its gradients at square are not all finite",
        ),
        ("regmean", altered(full, lambda n, m, r: replace(r, x=r.x * float("nan"))), "a0: its inputs at square"),
    ):
        with pytest.raises(MergeError, match=words):
            merge(adapters, method, statistics=statistics)
    fewer = Statistics({n: {m: r for m, r in modules.items() if m != "tall"} for n, modules in full.rows.items()}, True)
    with pytest.raises(MergeError, match="the statistics of a0 lack tall"):
        merge(adapters, "regmean", statistics=fewer)
    embedded = pool(shapes={"e": (5, 9)}, embedding=True)
    beyond = altered(some_statistics(embedded), lambda n, m, r: replace(r, x=r.x + 8))
    with pytest.raises(MergeError, match="e takes token ids below 9, but"):
        merge(embedded, "regmean", statistics=beyond)
    for option, value in (("shrink", 1.5), ("floor", -1.0), ("normalise", "layer")):
        with pytest.raises(MergeError, match=f"{option} is"):
            merge(adapters, "fisher" if option != "shrink" else "regmean", statistics=full, **{option: value})


def test_statistics_of_more_adapters_serve_for_some_of_them():
    adapters = pool()
    for name in ("regmean", "fisher"):
        some = merge(adapters[1:3], name, statistics=some_statistics(adapters))
        assert gap(some, deltas(merge(adapters[1:3], name, statistics=some_statistics(adapters[1:3])))) == 0


# The bundled pool, and recipes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    bundled = Pool.open("nano")
    return wb.Base.load(bundled.base, device="cpu"), bundled


def test_upstream_tasks_are_the_adapters_own(nano):
    names = [name for name in nano[1].names if name.startswith("first-thrice-colours")]
    assert len(names) == 2
    tasks = upstream(names, 3)
    assert list(tasks) == names
    first, copy = tasks.values()
    assert len(first.train) == 3
    assert first.train == copy.train  # of the very same task
    assert first.train != upstream(names, 3, seed=1)[names[0]].train
    assert list(upstream(nano[1].stack(names), 2)) == names
    with pytest.raises(TaskError, match="1 of 3 adapters are not bundled ones, such as 'mine'"):
        upstream([*names, "mine"])


def test_regmean_fits_the_pool_s_own_examples_better_than_the_average(nano):
    base, bundled = nano
    stack = bundled.stack(bundled.names[::24])
    statistics = collect(base, stack, upstream(stack, 4))

    def misfit(update):
        total = 0.0
        for i, name in enumerate(stack.names):
            own = stack.adapter(i).modules
            for module, rows in statistics.rows[name].items():
                error = update.modules[module].delta() - (own[module].delta() if module in own else 0)
                total += float((rows.x @ error.T).square().mean())
        return total

    merged = {name: misfit(merge(stack, name, **options)) for name, options in (("average", {}), ("sum", {}))}
    assert misfit(merge(stack, "regmean", statistics=statistics, shrink=1.0)) < 0.2 * min(merged.values())
    assert misfit(merge(stack, "regmean", statistics=statistics)) < 0.6 * min(merged.values())


def test_a_recipe_finds_the_examples_of_bundled_adapters(nano):
    base, bundled = nano
    task = wb.tasks.load("nano/mirror-months", n_train=4, n_validation=4, n_test=8)
    place = Workplace(base, bundled)
    for method, gradients in (("regmean", False), ("fisher", True)):
        recipe = Recipe(method, k=2)
        (stack,) = place.stacks(recipe, [Case(task, 0)])
        known = collect(base, stack, upstream(stack, EXAMPLES), gradients=gradients)
        want = merge(stack, method, statistics=known)
        got = place.merged(recipe, stack)
        assert gap(got, {m: d.double() for m, d in deltas(want).items()}) < 1e-5
    table = compare(base, bundled, [task], [Recipe("regmean", k=2)], baselines=())
    assert table["control"].tolist() == ["", "sigma"]
    assert table["loss"].nunique() == 2


def test_a_recipe_over_other_pools_is_refused_before_anything_runs(tmp_path, monkeypatch):
    base = tiny_base()
    random_adapter(base, 2, 0, name="mine").save(tmp_path / "mine")
    task = wb.tasks.load("nano/mirror-months", n_train=4, n_validation=4, n_test=8)
    monkeypatch.setattr("workbench.experiment.run", lambda *_: 1 / 0)
    with pytest.raises(MergeError, match=r"fisher needs gradients of .* not for 'mine'; merge by hand"):
        compare(base, Pool.open(tmp_path), [task], [Recipe("fisher", k=1)], baselines=())
