"""Updates as hooks against a copy of the model with ΔW added to its weights."""

import copy
import math
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers import (
    dense_model,
    hook_count,
    random_adapter,
    relative,
    some_ids,
    tiny_base,
    tiny_causal,
    tiny_gpt2,
    tiny_t5,
)
from workbench import lowrank
from workbench.adapters import Adapter
from workbench.base import Base, Batch, check_fits
from workbench.compose import LowRank, Routed, alone, compose, grouped, layer_shape, shared, slice_groups
from workbench.errors import AdapterError, BaseError, MergeError
from workbench.stack import Stack

HERE = sys.modules["workbench.compose"]  # the name is the function's in the package
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base():
    return tiny_base(spread=4)


@pytest.fixture(scope="module")
def adapters(base):
    """Four of unequal ranks and targets."""
    targets = (None, ["q_proj", "v_proj"], ["k_proj", "down_proj", "up_proj"], None)
    ranks = ({m: 1 + i % 4 for i, m in enumerate(base.projections)}, 2, 5, 3)
    return [random_adapter(base, r, i, t, name=f"a{i}") for i, (r, t) in enumerate(zip(ranks, targets, strict=True))]


def deltas(stack, coefficients):
    """Σ c ΔW per module, float64; coefficients (N,) or (M, N)."""
    c = coefficients.double()
    out = {}
    for i, (module, units) in enumerate(stack):
        each = (c if c.ndim == 1 else c[i])[units.owner]
        out[module] = (units.B.double() * each) @ units.A.double()
    return out


@torch.no_grad()
def oracle(base, dense, ids):
    return dense_model(base, dense)(input_ids=ids).logits


def run(base, updates, ids, grad):
    with torch.set_grad_enabled(grad), compose(base.model, updates):
        return base.model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("per_module", [False, True])
def test_candidates_over_one_stack(base, adapters, grad, per_module):
    stack = Stack.of(adapters)
    generator = torch.Generator().manual_seed(0)
    c = torch.randn((3, len(stack.modules), 4) if per_module else (3, 4), generator=generator)
    ids = some_ids(base, rows=2)
    got = run(base, shared(stack, c), ids.repeat(3, 1), grad)
    for k in range(3):
        want = oracle(base, deltas(stack, c[k]), ids)
        assert relative(got[2 * k : 2 * k + 2], want) < 1e-4
    assert relative(got[:2], got[2:4]) > 1e-2


@pytest.mark.parametrize("grad", [False, True])
def test_each_group_its_own_adapter(base, adapters, grad):
    ids = some_ids(base, rows=8)
    got = run(base, grouped(adapters), ids, grad)
    for g, adapter in enumerate(adapters):
        want = oracle(base, deltas(Stack.of([adapter]), torch.ones(1)), ids[2 * g : 2 * g + 2])
        assert relative(got[2 * g : 2 * g + 2], want) < 1e-4


@pytest.mark.parametrize("grad", [False, True])
def test_candidates_over_each_of_several_stacks(base, adapters, grad):
    """2 stacks × 3 candidates × 2 rows."""
    generator = torch.Generator().manual_seed(1)
    stacks = [Stack.of(adapters[:2]), Stack.of(adapters[2:])]
    joined = {m: [s.modules[m] for s in stacks] for m in stacks[0].modules if all(m in s.modules for s in stacks)}
    c = {m: [torch.randn(3, len(u), generator=generator) for u in pair] for m, pair in joined.items()}
    updates = {}
    for module, pair in joined.items():
        width = max(len(u) for u in pair)
        B, A = torch.zeros(2, pair[0].shape[0], width), torch.zeros(2, width, pair[0].shape[1])
        full = torch.zeros(6, width)
        for g, u in enumerate(pair):
            B[g, :, : len(u)], A[g, : len(u)], full[3 * g : 3 * g + 3, : len(u)] = u.B, u.A, c[module][g]
        updates[module] = LowRank(B, A, full)
        assert updates[module].groups == 6
    ids = some_ids(base, rows=12)
    got = run(base, updates, ids, grad)
    for g in range(2):
        for k in range(3):
            rows = slice(2 * (3 * g + k), 2 * (3 * g + k) + 2)
            want = oracle(base, {m: joined[m][g].delta(c[m][g][k]) for m in joined}, ids[rows])
            assert relative(got[rows], want) < 1e-4
    whole = [run(base, slice_groups(updates, 3 * g, 3 * g + 3, 6), ids[6 * g : 6 * g + 6], grad) for g in range(2)]
    assert relative(torch.cat(whole), got) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_slices_of_groups_equal_the_whole(base, adapters, size):
    ids = some_ids(base, rows=6)
    c = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    six = [*adapters, adapters[1].times(-2), adapters[0].times(0.5)]
    for updates in (shared(Stack.of(adapters), c), grouped(six), shared(Stack.of(adapters), c[:1]), grouped(six[:1])):
        whole = run(base, updates, ids, False)
        parts = [run(base, slice_groups(updates, i, i + size, 6), ids[i : i + size], False) for i in range(0, 6, size)]
        assert relative(torch.cat(parts), whole) < 1e-5


def test_gradients_reach_c_b_and_a(base, adapters):
    """Against autograd through the dense weight W + B diag(c) A, in float64."""
    wide = Base(copy.deepcopy(base.model).double(), base.tokenizer, "double")
    stack, ids = Stack.of(adapters), some_ids(base, rows=4)
    generator = torch.Generator().manual_seed(3)
    leaves = {}
    for module, units in stack:
        c = torch.randn(2, len(units), generator=generator).double()
        leaves[module] = [t.clone().requires_grad_() for t in (units.B.double(), units.A.double(), c)]
    probe = torch.randn(4, ids.shape[1], len(base.tokenizer), generator=generator).double()
    with compose(wide.model, {m: LowRank(*ts) for m, ts in leaves.items()}):
        loss = (wide.model(input_ids=ids).logits * probe).sum()
    flat = [t for ts in leaves.values() for t in ts]
    got = torch.autograd.grad(loss, flat)
    assert all(p.grad is None for p in wide.model.parameters())
    weights = dict(wide.model.named_parameters())
    total = 0.0
    for k in range(2):
        moved = {f"{m}.weight": weights[f"{m}.weight"] + (B * c[k]) @ A for m, (B, A, c) in leaves.items()}
        rows = slice(2 * k, 2 * k + 2)
        out = torch.func.functional_call(wide.model, moved, kwargs={"input_ids": ids[rows]}).logits
        total = total + (out * probe[rows]).sum()
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=1e-6)
    for mine, want in zip(got, torch.autograd.grad(total, flat), strict=True):
        assert float(want.abs().max()) > 0
        assert relative(mine, want) < 1e-5  # rotary embeddings stay in single precision


def test_gradients_of_stacked_factors_stay_with_their_group(base, adapters):
    updates = grouped(adapters[:2])
    leaves = {m: LowRank(u.B.requires_grad_(), u.A.requires_grad_()) for m, u in updates.items()}
    with compose(base.model, leaves):
        logits = base.model(input_ids=some_ids(base, rows=4)).logits
    logits[:2].square().sum().backward()
    assert float(leaves[Q0].B.grad[0].abs().max()) > 0
    assert float(leaves[Q0].A.grad[0].abs().max()) > 0
    assert float(leaves[Q0].B.grad[1].abs().max()) == 0
    assert float(leaves[Q0].A.grad[1].abs().max()) == 0


def test_no_trace_is_left(base, adapters):
    ids = some_ids(base)
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
    state = {k: v.clone() for k, v in base.model.state_dict().items()}
    assert hook_count(base.model) == 0
    with compose(base.model, grouped(adapters[:1])), torch.no_grad():
        assert hook_count(base.model) == len(adapters[0].modules)
        base.model(input_ids=ids)
    assert hook_count(base.model) == 0
    with pytest.raises(RuntimeError, match="in the middle"), compose(base.model, grouped(adapters[:1])):
        raise RuntimeError("in the middle")
    assert hook_count(base.model) == 0
    last = list(adapters[0].modules)[-1]
    wrong = grouped(adapters[:1]) | {last: LowRank(torch.zeros(3, 1), torch.zeros(1, 3))}
    with pytest.raises(AdapterError, match=f"{last}: an update of 3×3"), compose(base.model, wrong):
        pytest.fail("the context must not open")
    assert hook_count(base.model) == 0
    with pytest.raises(MergeError), compose(base.model, grouped(adapters)), torch.no_grad():
        base.model(input_ids=ids)  # 3 rows, 4 groups: fails within a hook
    assert hook_count(base.model) == 0
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in base.model.state_dict().items())


def test_contexts_nest(base, adapters):
    ids = some_ids(base)
    with torch.no_grad(), compose(base.model, grouped(adapters[:1])), compose(base.model, grouped(adapters[3:])):
        got = base.model(input_ids=ids).logits
    want = oracle(base, deltas(Stack.of([adapters[0], adapters[3]]), torch.ones(2)), ids)
    assert relative(got, want) < 1e-4


def test_the_factors_are_not_changed(base, adapters):
    updates = shared(Stack.of(adapters), torch.ones(1, 4))
    before = {m: (u.B.clone(), u.A.clone(), u.c.clone()) for m, u in updates.items()}
    run(base, updates, some_ids(base), False)
    for module, update in updates.items():
        assert all(map(torch.equal, before[module], (update.B, update.A, update.c)))


@pytest.mark.parametrize("grad", [False, True])
def test_a_bf16_base_takes_fp32_coefficients(base, adapters, grad):
    half = Base(copy.deepcopy(base.model).bfloat16(), base.tokenizer, "half")
    stack, ids = Stack.of(adapters), some_ids(base, rows=2)
    c = torch.tensor([[0.5, 1.0, -0.7, 0.2], [0.0, 0.3, 1.1, -1.0]])
    got = run(half, shared(stack, c), ids.repeat(2, 1), grad)
    assert got.dtype == torch.bfloat16
    for k in range(2):
        want = run(base, shared(stack, c[k : k + 1]), ids, False)
        assert relative(got[2 * k : 2 * k + 2], want) < 5e-2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["shared", "grouped"])
def test_autocast(base, adapters, grad, form):
    stack, ids = Stack.of(adapters), some_ids(base, rows=4)
    updates = shared(stack, torch.ones(2, 4) * 0.3) if form == "shared" else grouped(adapters)
    want = run(base, updates, ids, False)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(base, updates, ids, grad)
    assert relative(got, want) < 5e-2


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_that_answers_in_another_type(grad):
    """As quantised layers do: fp32 in, bf16 out."""

    class Half(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    model = torch.nn.Sequential(Half(6, 4))
    generator = torch.Generator().manual_seed(0)
    B, A, x = (torch.randn(*shape, generator=generator) for shape in ((4, 2), (2, 6), (3, 5, 6)))
    for c in (None, torch.ones(1, 2)):
        with torch.set_grad_enabled(grad), compose(model, {"0": LowRank(B, A, c)}):
            got = model(x).detach()
        assert got.dtype == torch.bfloat16
        assert relative(got, torch.nn.functional.linear(x, model[0].weight + B @ A, model[0].bias).detach()) < 2e-2


def test_conv1d_layers():
    base = tiny_gpt2()
    adapter = random_adapter(base, 3, targets=["c_attn", "c_fc", "c_proj"])
    ids = some_ids(base)
    want = oracle(base, {m: f.delta() for m, f in adapter.modules.items()}, ids)
    assert relative(run(base, grouped([adapter]), ids, False), want) < 1e-4


def test_grouped_fills_up_with_zeros(adapters):
    updates = grouped(adapters)
    assert set(updates) == {m for a in adapters for m in a.modules}
    for module, update in updates.items():
        for g, adapter in enumerate(adapters):
            factors = adapter.modules.get(module)
            want = torch.zeros_like(update.B[0] @ update.A[0]) if factors is None else factors.delta()
            torch.testing.assert_close(update.B[g] @ update.A[g], want)
        assert update.B.shape[2] == max(a.modules[module].rank for a in adapters if module in a.modules)


def test_what_does_not_fit_is_refused(base, adapters):
    stack = Stack.of(adapters)
    with (
        pytest.raises(BaseError, match=r"1 of 1 modules .* 'model\.layers\.7\.q_proj'"),
        compose(base.model, {"model.layers.7.q_proj": LowRank(torch.zeros(2, 1), torch.zeros(1, 2))}),
    ):
        pass
    with (
        pytest.raises(AdapterError, match=rf"{DOWN1}: an update of 32×32 does not fit a layer of 32×64"),
        compose(base.model, {DOWN1: LowRank(torch.zeros(32, 1), torch.zeros(1, 32))}),
    ):
        pass
    for wrong in (torch.ones(2, 3), torch.ones(4), torch.ones(2, 3, 4), torch.ones(1, 2, 14, 4)):
        with pytest.raises(MergeError, match=r"expected coefficients \(candidates, 4\) or \(candidates, 14, 4\)"):
            shared(stack, wrong)
    B, A = torch.zeros(2, 8, 3), torch.zeros(2, 3, 8)
    for c in (torch.ones(2, 1), torch.ones(2, 4), torch.ones(3), torch.ones(3, 3)):  # 1 would broadcast; 3 straddles
        with pytest.raises(MergeError, match=r"expected coefficients \(candidates, 3\), candidates a multiple of 2"):
            LowRank(B, A, c)
    for pair in ((B, A[:1]), (B[0], A), (B, A[:, :2])):
        with pytest.raises(MergeError, match="no pair of factors"):
            LowRank(*pair)
    with pytest.raises(MergeError, match="3 rows cannot be split evenly among 4 groups"):
        run(base, grouped(adapters), some_ids(base, rows=3), False)
    odd = random_adapter({Q0: (32, 31)}, 2, name="odd")
    with pytest.raises(AdapterError, match=rf"odd: {Q0} is 32×31, expected 32×32"):
        grouped([adapters[0], odd])


def test_a_base_knows_its_layers(base, tmp_path):
    assert base.shapes["lm_head"] == (len(base.tokenizer), 32)
    assert "lm_head" not in base.projections
    assert base.projections[DOWN1] == (32, 64)
    assert len(base.projections) == 14
    assert layer_shape(base.model.model.norm) is None
    check_fits(random_adapter(base), base.shapes)
    with pytest.raises(AdapterError, match=r"far: the base has no layer model\.layers\.5\.q"):
        check_fits(random_adapter({"model.layers.5.q": (32, 32)}, name="far"), base.shapes)
    with pytest.raises(AdapterError, match=rf"odd: {Q0} is 32×31, the base's is 32×32"):
        check_fits(random_adapter({Q0: (32, 31)}, name="odd"), base.shapes)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.digest == tiny_base(spread=4).digest != tiny_base(spread=3).digest
    for name in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(BaseError, match="no base model could be loaded"):
            Base.load(tmp_path / name)
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    again = Base.load(tmp_path / "saved", device="cpu")
    assert again.digest == base.digest
    assert again.stop_ids == base.stop_ids == (base.tokenizer("\n")["input_ids"][0],)
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BaseError, match="no base model could be loaded"):
        Base.load(tmp_path / "saved", device="cpu")


def test_an_empty_adapter_composes_to_the_base(base):
    ids = some_ids(base)
    with torch.no_grad():
        want = base.model(input_ids=ids).logits
    assert torch.equal(run(base, grouped([Adapter("none", {})]), ids, False), want)


@contextmanager
def routed_by_hand(model, stack, prototypes, top, temperature, seen=None):
    """Arrow by plain loops, token by token, on a float64 model: y += Σ w_i ΔW_i x. `seen` gets every token's weights."""

    def hook(module):
        units, directions = stack.modules[module], prototypes[module]
        present = [i for i in range(len(stack)) if bool((directions[i] != 0).any())]
        each = {i: units.of(i).B.double() @ units.of(i).A.double() for i in present}

        def add(layer, args, y):
            x, out = args[0], []
            if not x.is_floating_point():
                x = torch.eye(units.shape[1], dtype=torch.float64)[x]
            for token in x.reshape(-1, units.shape[1]):
                logit = {i: (token * directions[i].double()).sum().abs() for i in present}
                kept = sorted(present, key=lambda i: -float(logit[i].detach()))[:top]
                raised = {i: (logit[i] / temperature).exp() for i in kept}
                w = {i: raised[i] / sum(raised.values()) for i in kept}
                if seen is not None:
                    seen.setdefault(module, []).append(
                        [float(w.get(i, torch.zeros(())).detach()) for i in range(len(stack))]
                    )
                out.append(sum((w[i] * (each[i] @ token) for i in kept), torch.zeros(units.shape[0]).double()))
            return y + torch.stack(out).view(y.shape) * getattr(layer, "embed_scale", 1.0)

        return add

    layers = dict(model.named_modules())
    handles = [layers[module].register_forward_hook(hook(module)) for module in stack.modules]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def some_prototypes(stack, seed=0):
    """Random directions, zeros where an adapter is absent."""
    generator = torch.Generator().manual_seed(seed)
    out = {m: torch.randn(len(stack), u.shape[1], generator=generator) / math.sqrt(u.shape[1]) for m, u in stack}
    return {m: p * (stack.modules[m].ranks(len(stack)) > 0)[:, None] for m, p in out.items()}


def route(stack, prototypes, top=2, temperature=0.7):
    return {
        m: Routed(u.B, u.A, owner=u.owner, prototypes=prototypes[m], top=top, temperature=temperature) for m, u in stack
    }


def double(base):
    return Base(copy.deepcopy(base.model).double(), base.tokenizer, "double")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("top", "temperature"), [(2, 0.1), (3, 1.0), (9, 0.5)])
def test_every_token_is_routed_by_itself(base, adapters, grad, top, temperature):
    stack, ids = Stack.of(adapters), some_ids(base, rows=2, length=7)
    p, wide, seen = some_prototypes(stack), double(base), {}
    with torch.no_grad(), routed_by_hand(wide.model, stack, p, top, temperature, seen):
        want = wide.model(input_ids=ids).logits
    got = run(base, route(stack, p, top, temperature), ids, grad)
    assert relative(got, want) < 1e-4
    assert relative(run(base, shared(stack, torch.full((1, 4), 0.25)), ids, False), want) > 1e-2
    kept = torch.tensor(seen[DOWN1]).gt(0)
    assert kept.sum(1).eq(min(top, 3)).all()  # the second adapter has no such module
    assert not kept[:, 1].any()
    assert len(kept.unique(dim=0)) > 1 or top >= 3


@pytest.mark.parametrize("module", ["model.layers.0.mlp.up_proj", "model.embed_tokens"])
def test_weights_of_tokens(base, module):
    """Against the loops, and that those of a group are those of its own prototypes."""
    shape = base.layers[module]
    stacks = [Stack.of([random_adapter({module: shape}, 2, 5 * g + i, name=f"a{i}") for i in range(5)]) for g in (0, 1)]
    p = torch.stack([some_prototypes(stack, g)[module] for g, stack in enumerate(stacks)])
    p[1, 3] = 0
    embedded = module == "model.embed_tokens"
    x = some_ids(base, 4, 6) if embedded else torch.randn(4, 6, shape[1], generator=torch.Generator().manual_seed(0))
    both = [stack.modules[module] for stack in stacks]
    factors = torch.stack([u.B for u in both]), torch.stack([u.A for u in both])
    update = Routed(*factors, owner=torch.stack([u.owner for u in both]), prototypes=p, top=3, temperature=0.2)
    assert update.groups == 2
    weights = update.weights(x)
    assert weights.shape == (2, 12, 5)
    layer = torch.nn.Embedding(*shape[::-1]) if embedded else torch.nn.Linear(*shape[::-1])
    model = torch.nn.ModuleDict({"only": layer}).double()
    y = update.apply(x, torch.zeros(4, 6, shape[0]))
    for g, stack in enumerate(stacks):
        alone = Stack(stack.names, {"only": stack.modules[module]})
        rows, seen = x[2 * g : 2 * g + 2], {}
        rows = rows if embedded else rows.double()
        with torch.no_grad(), routed_by_hand(model, alone, {"only": p[g]}, 3, 0.2, seen):
            want = model["only"](rows)
        want = want - model["only"](rows)
        torch.testing.assert_close(weights[g], torch.tensor(seen["only"]), rtol=1e-4, atol=1e-6)
        assert relative(y[2 * g : 2 * g + 2], want.detach()) < 1e-4
    assert not weights[1, :, 3].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 12))
    assert slice_groups({"m": update}, 1, 2, 2)["m"].weights(x[2:]).equal(weights[1:])


def test_routing_in_an_embedding_that_scales():
    base = tiny_causal("Gemma3")
    name = "model.embed_tokens"
    stack = Stack.of([random_adapter({name: base.layers[name]}, 2, i, name=f"a{i}", size=0.5) for i in range(3)])
    p, ids, wide = some_prototypes(stack), some_ids(base, 2, 6), double(base)
    with torch.no_grad(), routed_by_hand(wide.model, stack, p, 2, 0.1):
        want = wide.model(input_ids=ids).logits
    assert relative(run(base, route(stack, p, 2, 0.1), ids, False), want) < 1e-4


@pytest.mark.parametrize("grad", [False, True])
def test_routing_in_an_encoder_and_its_decoder(grad):
    """Hidden states of 9 and of 4 tokens; cross-attention reads the encoder's. q is 24×32, wo 32×48."""
    base = tiny_t5()
    stack = Stack.of([random_adapter(base, 2, i, ["q", "k", "v", "wo"], name=f"a{i}", size=0.4) for i in range(4)])
    p, wide, seen = some_prototypes(stack), double(base), {}
    ids = {"input_ids": some_ids(base, 2, 9), "decoder_input_ids": some_ids(base, 2, 4, seed=1)}
    with torch.no_grad(), routed_by_hand(wide.model, stack, p, 2, 0.3, seen):
        want = wide.model(**ids).logits
    with torch.set_grad_enabled(grad), compose(base.model, route(stack, p, 2, 0.3)):
        got = base.model(**ids).logits.detach()
    assert relative(got, want) < 1e-4
    with torch.no_grad():
        assert relative(base.model(**ids).logits, want) > 1e-2
    assert {len(tokens) for tokens in seen.values()} == {18, 8}


def test_gradients_reach_the_prototypes(base, adapters):
    """Against plain autograd through the loops, in float64."""
    stack, ids, wide = Stack.of(adapters), some_ids(base, rows=2, length=5), double(base)
    p = {m: one.double().requires_grad_() for m, one in some_prototypes(stack).items()}
    probe = torch.randn(2, 5, len(base.tokenizer), generator=torch.Generator().manual_seed(1)).double()
    found = []
    for context in (
        compose(wide.model, route(stack, p, 2, 0.7)),
        routed_by_hand(wide.model, stack, p, 2, 0.7),
    ):
        with context:
            loss = (wide.model(input_ids=ids).logits * probe).sum()
        found.append(torch.autograd.grad(loss, list(p.values())))
    for module, mine, want in zip(p, *found, strict=True):
        absent = stack.modules[module].ranks(4) == 0
        assert not mine[absent].any()
        assert float(want.abs().max()) > 0
        assert relative(mine, want) < 1e-8
    assert all(q.grad is None for q in wide.model.parameters())


def test_one_adapter_is_itself_and_equal_logits_are_the_average(base, adapters):
    ids = some_ids(base)
    for adapter in adapters:
        stack = Stack.of([adapter])
        got = run(base, route(stack, some_prototypes(stack), 1, 0.01), ids, False)
        assert torch.equal(got, run(base, shared(stack, torch.ones(1, 1)), ids, False))
    full = Stack.of([adapters[0], adapters[3]])
    same = {m: p[:1] * torch.tensor([[1.0], [-1.0]]) for m, p in some_prototypes(full).items()}
    want = run(base, shared(full, torch.full((1, 2), 0.5)), ids, False)
    for top in (2, 7):
        assert relative(run(base, route(full, same, top), ids, False), want) < 1e-5
    first = run(base, grouped(adapters[:1]), ids, False)
    assert relative(run(base, route(full, same, 1), ids, False), first) < 1e-5  # of equals the first
    nobody = {m: torch.zeros_like(p) for m, p in same.items()}
    with torch.no_grad():
        assert torch.equal(run(base, route(full, nobody), ids, False), base.model(input_ids=ids).logits)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_routing_is_in_fp32(how):
    """Logits 1 and 1.001, which are one number in bf16: the second is the larger, and the softmax tells them apart."""
    p = torch.zeros(2, 8)
    p[0, 0], p[1, 0] = 1.0, 1.001
    update = Routed(torch.eye(4, 2), torch.eye(2, 8), owner=torch.arange(2), prototypes=p, top=1)
    x = torch.ones(1, 3, 8, dtype=torch.bfloat16 if how == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = update.apply(x, torch.zeros(1, 3, 4, dtype=torch.bfloat16))
                assert y.dtype == torch.bfloat16
                assert torch.equal(y[0, 0].float(), torch.tensor([0.0, 1.0, 0.0, 0.0]))
        weights = Routed(update.B, update.A, owner=update.owner, prototypes=p, temperature=0.001).weights(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[0], torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)]), rtol=1e-3, atol=0)


def test_cold_routing_takes_the_nearest_alone():
    update = Routed(
        torch.eye(3), torch.eye(3), owner=torch.arange(3), prototypes=torch.diag(torch.tensor([1.0, 2.0, 0.0])), top=3,
        temperature=1e-38,
    )  # fmt: skip
    weights = update.weights(torch.tensor([[3.0, 1.0, 9.0], [1.0, 1.0, 9.0], [2.0, 1.0, 9.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]]))


def test_routed_updates_leave_nothing_behind(base, adapters):
    stack, ids = Stack.of(adapters), some_ids(base)
    updates = route(stack, some_prototypes(stack))
    before = {m: [getattr(u, name).clone() for name in u.stacked] for m, u in updates.items()}
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
    assert relative(run(base, updates, ids, False), bare) > 1e-2
    for grad in (False, True):
        run(base, updates, ids, grad)
    for module, update in updates.items():
        assert all(map(torch.equal, before[module], [getattr(update, name) for name in update.stacked]))
    with pytest.raises(RuntimeError, match="in the middle"), compose(base.model, updates):
        raise RuntimeError("in the middle")
    assert hook_count(base.model) == 0
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, bare)


def test_what_cannot_route_is_refused():
    B, A, fine = torch.ones(4, 3), torch.ones(3, 5), {"owner": torch.zeros(3).long(), "prototypes": torch.ones(2, 5)}
    for top in (0, -1, 1.5, True, None):
        with pytest.raises(MergeError, match=f"top is {top}, expected a whole number .* at least 1"):
            Routed(B, A, **fine, top=top)
    for temperature in (0, -1.0, math.nan, math.inf):
        with pytest.raises(MergeError, match=f"temperature is {temperature}, expected a number above 0"):
            Routed(B, A, **fine, temperature=temperature)
    with pytest.raises(MergeError, match="takes no coefficients"):
        Routed(B, A, torch.ones(1, 3), **fine)
    with pytest.raises(MergeError, match=r"expected owners \(3,\), got \(2,\)"):
        Routed(B, A, **fine | {"owner": torch.zeros(2).long()})
    for shape in ((2, 4), (5,), (0, 5), (1, 2, 5)):
        with pytest.raises(MergeError, match=r"expected prototypes \(adapters, 5\), got \("):
            Routed(B, A, **fine | {"prototypes": torch.ones(shape)})
    stacked = {"owner": torch.zeros(2, 3).long(), "prototypes": torch.ones(3, 2, 5)}
    with pytest.raises(MergeError, match=r"expected prototypes \(2, adapters, 5\), got \(3, 2, 5\)"):
        Routed(B.expand(2, 4, 3), A.expand(2, 3, 5), **stacked)
    with pytest.raises(MergeError, match="no pair of factors"):
        Routed(B, A.T, **fine)


# One product for layers that read one input ----------------------------------------------------------------------------


class Siblings(torch.nn.Module):
    """q, k and v of 5 inputs; `between` is done with the input after q, and gives what k and v read."""

    def __init__(self, between=lambda x: x, skip=()):
        super().__init__()
        torch.manual_seed(0)
        for name, width in (("q_proj", 4), ("k_proj", 2), ("v_proj", 3)):
            setattr(self, name, torch.nn.Linear(5, width).requires_grad_(False))
        self.between, self.skip = between, skip

    def forward(self, x):
        q = self.q_proj(x)
        x = self.between(x)
        return torch.cat(
            [q] + [layer(x) for name, layer in self.named_children() if name not in ("q_proj", *self.skip)], -1
        )


def sibling_updates(candidates=2, *, grad=False):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    sizes = {"q_proj": (4, 2), "k_proj": (2, 3), "v_proj": (3, 1)}
    return {m: LowRank(draw(d, r), draw(r, 5), draw(candidates, r).requires_grad_(grad)) for m, (d, r) in sizes.items()}


@pytest.fixture
def products(monkeypatch):
    """How many products x Aᵀ were taken, and of how many units."""
    seen = []
    for module in (HERE, lowrank):
        monkeypatch.setattr(module, "inner", lambda x, A, own=module.inner: seen.append(A.shape[-2]) or own(x, A))
    return seen


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["shared", "grouped", "stacked"])
def test_joined_products_are_those_of_each_layer(base, adapters, products, form, grad):
    ids = some_ids(base, rows=8)
    if form == "shared":
        updates = shared(Stack.of(adapters), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    else:
        updates = grouped(adapters)
    if form == "stacked":
        generator = torch.Generator().manual_seed(2)
        updates = {m: replace(u, c=torch.randn(8, u.A.shape[1], generator=generator)) for m, u in updates.items()}
    found = []
    for joined in (False, None, True):
        products.clear()
        with torch.set_grad_enabled(grad), compose(base.model, updates, joined=joined):
            found.append(base.model(input_ids=ids).logits.detach())
        each = [u.A.shape[-2] for u in updates.values()]
        assert sum(products) == sum(each)
        assert len(products) == (len(each) - 6 if joined else len(each))  # two layers: k, v and up go with q and gate
    assert torch.equal(found[0], found[1])
    assert relative(found[2], found[0]) < 1e-5
    assert relative(found[0], run(base, {}, ids, False)) > 1e-2


def test_gradients_through_joined_products(base, adapters):
    wide, stack, ids = double(base), Stack.of(adapters), some_ids(base, rows=4)
    c = torch.randn(2, 14, 4, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    found = []
    for joined in (False, True):
        updates = {m: LowRank(u.B.double(), u.A.double(), u.c) for m, u in shared(stack, c).items()}
        with compose(wide.model, updates, joined=joined):
            loss = wide.model(input_ids=ids).logits.square().mean()
        found.append(torch.autograd.grad(loss, c)[0])
    assert float(found[0].abs().max()) > 0
    assert relative(found[1], found[0]) < 1e-10


def test_a_checkpointed_model_takes_joined_products():
    """What is computed again in the backward pass reads other tensors of the same numbers."""
    found, x = [], torch.randn(4, 6, 5)
    for joined in (False, True):
        model, updates = Siblings(), sibling_updates(grad=True)
        with compose(model, updates, joined=joined):
            y = checkpoint(model, x, use_reentrant=False).square().sum()
            found.append(torch.autograd.grad(y, [u.c for u in updates.values()]))
    for mine, want in zip(found[1], found[0], strict=True):
        assert relative(mine, want) < 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["same", "changed", "another", "other mode", "twice"])
def test_a_product_is_used_again_for_the_same_input_alone(products, how, grad):
    def between(x):
        if how == "changed":
            return x.mul_(2)
        return x.clone() if how == "another" else x

    model, updates, x = Siblings(between), sibling_updates(grad=grad), torch.randn(4, 3, 5)
    if how == "other mode":
        model.k_proj.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(not grad) and None)
    found = []
    for joined in (False, True):
        products.clear()
        with torch.set_grad_enabled(grad), compose(model, updates, joined=joined):
            y = model(x.clone())
            if how == "twice":
                y = y + model(x * 3)
            found.append(y.detach())
    torch.testing.assert_close(found[1], found[0])
    assert products == {"same": [6], "twice": [6, 6]}.get(how, [6, 3, 1])


@pytest.mark.parametrize("skip", [(), ("v_proj",)])
def test_a_joined_product_does_not_outlive_its_input(skip):
    with torch.no_grad(), compose(Siblings(skip=skip), sibling_updates(), joined=True) as model:
        family = next(iter(model.q_proj._forward_hooks.values())).family[0]
        x = torch.randn(4, 3, 5)
        model(x)
        assert (family.held is None) is (not skip)  # a layer that has not been run may yet ask for its part
        x = None
        assert family.held is None
        model(x := torch.randn(4, 3, 5))
    assert x is not None
    assert family.held is None  # nor the context


def test_what_cannot_be_joined_is_not(base, adapters, products):
    """A that takes a gradient, unlike numbers of candidates, routed updates, an input of inference mode, many units."""
    model, x = Siblings(), torch.randn(4, 3, 5)

    def taken(updates, mode=torch.no_grad):
        products.clear()
        with mode(), compose(model, updates, joined=True):
            model(torch.randn(4, 3, 5) if mode is torch.inference_mode else x)
        return products

    updates = sibling_updates()
    assert taken(updates) == [6]
    assert taken(updates, torch.inference_mode) == [2, 3, 1]
    assert taken({m: u for m, u in updates.items() if m != "q_proj"}) == [3, 1]
    assert taken({m: u for m, u in updates.items() if m != "k_proj"}) == [3]
    assert taken(updates | {"k_proj": replace(updates["k_proj"], c=None)}) == [2, 3, 1]
    assert taken(updates | {"k_proj": replace(updates["k_proj"], c=torch.ones(1, 3))}) == [2, 3, 1]
    assert taken({m: replace(u, A=u.A.clone().requires_grad_()) for m, u in updates.items()}) == [2, 3, 1]
    wide = {m: LowRank(torch.ones(len(u.B), 2000), torch.ones(2000, 5)) for m, u in updates.items()}
    assert taken(wide) == [2000] * 3
    with pytest.raises(MergeError, match="4 rows cannot be split evenly among 3"):
        taken(sibling_updates(3))


@pytest.mark.parametrize("joined", [False, True])
def test_factors_are_cast_once(monkeypatch, joined):
    """Into a bf16 layer's type at its first call, with what a cast at each call gives; the caller's stay as they are."""
    model, updates, x = Siblings().bfloat16(), sibling_updates(), torch.randn(4, 3, 5).bfloat16()
    with torch.no_grad():
        want = torch.cat(
            [u.apply(x, layer(x)) for u, layer in zip(updates.values(), model.children(), strict=True)], -1
        )
        with compose(model, updates, joined=joined):
            assert torch.equal(model(x), want)
            monkeypatch.setattr(HERE._Hook, "_cast", lambda *_: pytest.fail("cast again"))
            assert torch.equal(model(x), want)
    assert {t.dtype for u in updates.values() for t in (u.A, u.B, u.c)} == {torch.float32}
    monkeypatch.undo()
    with compose(model, updates, joined=joined), torch.no_grad():
        model(x)
        wide = model.float()(x.float())  # another type in the same context is cast from the numbers given
    want = torch.cat([u.apply(x.float(), layer(x.float())) for u, layer in zip(updates.values(), model.children())], -1)  # noqa: B905
    torch.testing.assert_close(wide, want.detach())


def test_a_factor_that_is_not_one_changes_nothing_but_ties():
    """What a GPU multiplies y by in half precision: the sum rounds to the same number but where it lies between two."""
    g = torch.Generator().manual_seed(0)
    y, h, b = (torch.randn(shape, generator=g).bfloat16() for shape in ((200, 300), (200, 16), (300, 16)))
    exact = y.double() + h.double() @ b.double().T
    one, not_one = (y.float().addmm(h.float(), b.float().T, beta=beta) for beta in (1, lowrank._NOT_ONE))
    assert not_one.bfloat16().ne(one.bfloat16()).float().mean() < 1e-3
    error = lambda got: (got.double() - exact).abs().max() / exact.abs().max()  # noqa: E731
    assert error(not_one) < 2 * 2**-23 + error(one)
    assert torch.equal(torch.tensor(float("inf")) * lowrank._NOT_ONE, torch.tensor(float("inf")))


def test_another_thread_s_forward_pass_waits_and_sees_no_update(base, adapters):
    """A background job composes while a cell runs the bare base: each gets what it would get alone."""
    ids = some_ids(base, 2)
    batch = Batch(ids, ids[:, -3:], 3)
    with torch.no_grad():
        bare = base.logits(batch)
        with compose(base.model, grouped(adapters[:1])):
            changed = base.logits(batch)
    open_, go_on, found = threading.Event(), threading.Event(), {}

    def composing():
        with torch.no_grad(), compose(base.model, grouped(adapters[:1])):
            open_.set()
            go_on.wait(30)
            found["composed"] = base.logits(batch)

    def plain():
        with torch.no_grad():
            found["bare"] = base.logits(batch)

    threads = [threading.Thread(target=composing), threading.Thread(target=plain)]
    threads[0].start()
    assert open_.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert "bare" not in found  # it waits
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert torch.equal(found["bare"], bare)
    assert torch.equal(found["composed"], changed)
    assert not torch.equal(bare, changed)


def test_the_model_is_free_again_after_an_error(base, adapters):
    with pytest.raises(BaseError), compose(base.model, {"no.such": LowRank(torch.zeros(2, 1), torch.zeros(1, 2))}):
        pass
    with pytest.raises(RuntimeError, match="mine"), compose(base.model, grouped(adapters[:1])):
        raise RuntimeError("mine")
    free = []

    def take():
        free.append(alone(base.model).acquire(timeout=5))
        alone(base.model).release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(30)
    assert free == [True]
