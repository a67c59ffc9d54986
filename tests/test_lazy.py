"""A stack whose factors stay in the files: the same to the last bit as one in memory, one module at a time."""

import gc
import json
import math
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import random_adapter, some_statistics, tiny_base, tiny_gpt2, write_peft
from workbench import lazy as lazily
from workbench import source
from workbench.adapters import Adapter
from workbench.closeness import MEASURES, closeness
from workbench.controls import random_like
from workbench.errors import AdapterError, SelectionError
from workbench.merge import Dense, merge, methods
from workbench.pool import Pool
from workbench.select import rank_by_closeness
from workbench.similarity import norm_profile, similarity
from workbench.source import Source
from workbench.stack import Stack

WEIGHTS = "adapter_model.safetensors"
RANKS = (2, 5, 3, 4)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """Four adapters of unequal ranks, scales, targets and types; one with a copy of the base's own weight."""
    folder = tmp_path_factory.mktemp("lazy")
    for i, rank in enumerate(RANKS):
        targets = ["v_proj", "q_proj", "down_proj"] if i == 1 else None
        dtype = torch.bfloat16 if i == 2 else torch.float32
        adapter = random_adapter(base, rank, i, targets, alpha=3 + i, rslora=i == 3, name=f"a{i}")
        adapter.save(folder / f"a{i}", dtype=dtype)
    return folder


@pytest.fixture
def pool(folder):
    return Pool.open(folder)


@pytest.fixture
def reads(monkeypatch):
    """(adapter, module) of everything read from here on."""
    found, copy = [], Source.copy

    def watched(self, module, *into):
        found.append((self.name, module))
        return copy(self, module, *into)

    monkeypatch.setattr(Source, "copy", watched)
    return found


def both(pool):
    return pool.stack(lazy=False), pool.stack(lazy=True)


def same(got, want):
    """Two units, factors or dense updates to the last bit."""
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        return
    assert (got.shape, got.embedding) == (want.shape, want.embedding)
    for name in ("A", "B", "owner", "scale"):
        if hasattr(want, name):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0)


def test_every_module_is_the_same(pool):
    eager, lazy = both(pool)
    assert (eager.lazy, lazy.lazy) == (False, True)
    assert list(lazy.modules) == list(eager.modules)
    assert (lazy.names, lazy.base, lazy.infos, len(lazy)) == (eager.names, eager.base, eager.infos, 4)
    for module, units in lazy:
        same(units, eager.modules[module])
        assert units.module == module
        assert module in lazy.modules
    assert len(lazy.modules) == len(eager.modules) == 14
    assert "nothing" not in lazy.modules
    assert lazy.modules.get("nothing") is None
    with pytest.raises(KeyError):
        lazy.modules["nothing"]


def test_the_outline_reads_nothing(pool, reads):
    eager, lazy = both(pool)
    reads.clear()
    assert torch.equal(lazy.ranks(), eager.ranks())
    assert lazy.shapes() == eager.shapes()
    assert lazy.device == torch.device("cpu")
    assert lazy.config == eager.config
    assert lazy.choose(["a2", "a0"]).names == ("a2", "a0")
    for module, units in lazy.outline.items():
        assert torch.equal(units.owner, eager.modules[module].owner)
        assert torch.equal(units.scale, eager.modules[module].scale)
        assert (len(units), units.shape) == (len(eager.modules[module]), eager.modules[module].shape)
        assert units.A.is_meta
    total = int(eager.ranks().sum())
    assert repr(lazy) == f"Stack(4 adapters, 14 modules, {total} units, rank 2–5, read from files, cpu)"
    assert reads == []


def test_the_algebra_is_the_same(pool, reads):
    eager, lazy = both(pool)
    reads.clear()
    assert torch.equal(lazy.gram(), eager.gram())
    assert len(reads) == len(set(reads)) == 14 * 3 + 6  # each adapter's modules once
    assert torch.equal(lazy.norms(), eager.norms())
    assert lazy.digest() == eager.digest()
    assert similarity(lazy).equals(similarity(eager))
    assert norm_profile(lazy).equals(norm_profile(eager))
    for module, units in lazy.to("cpu"):
        same(units, eager.modules[module])
    for match in ("sigma", "spectrum"):
        for module, units in random_like(lazy, match, seed=1):
            same(units, random_like(eager, match, seed=1).modules[module])


def test_adapters_and_choices_read_only_what_they_are_of(pool, reads):
    eager, lazy = both(pool)
    reads.clear()
    for which in ("a1", 2):
        got, want = lazy.adapter(which), eager.adapter(which)
        assert (got.name, got.base, got.info, list(got.modules)) == (
            want.name,
            want.base,
            want.info,
            list(want.modules),
        )
        for module, factors in got.modules.items():
            same(factors, want.modules[module])
            assert factors.scale == want.modules[module].scale
        assert {name for name, _ in reads} == {want.name}
        reads.clear()
    chosen = lazy.choose(["a3", 1])
    assert reads == []
    assert chosen.lazy
    assert chosen.base == lazy.base
    for module, units in chosen:
        same(units, eager.choose(["a3", 1]).modules[module])
    assert {name for name, _ in reads} == {"a3", "a1"}
    with pytest.raises(SelectionError, match="more than once: a1"):
        lazy.choose(["a1", 1])
    with pytest.raises(SelectionError, match="at least one"):
        lazy.choose([])


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_merges_it_alike(pool, base, name):
    """Bit by bit, and each module of each adapter is read once."""
    record = methods()[name]
    names = pool.names[: record.takes]
    eager, lazy = pool.stack(names, lazy=False), pool.stack(names, lazy=True)
    settings = {"weights": [0.5, -1.0, 2.0, 0.0][: len(names)] if record.takes is None else None}
    if record.needs:
        settings["statistics"] = some_statistics(eager)
    for rank in (None, 3):
        want, got = (merge(stack, name, rank=rank, **settings) for stack in (eager, lazy))
        assert type(got) is type(want)
        assert list(got.modules) == list(want.modules)
        for module, update in want.modules.items():
            same(got.modules[module], update)
        assert got.info["report"].equals(want.info["report"])
        assert {**got.info, "report": 0} == {**want.info, "report": 0}
        assert not isinstance(want, Dense) or got.embeddings == want.embeddings


@pytest.mark.parametrize("name", ["average", "ties", "tsv", "core", "iso_cts", "lego"])
def test_a_merge_reads_each_module_once(pool, reads, name):
    merge(pool.stack(lazy=True), name, rank=2)
    assert len(reads) == len(set(reads)) == 14 * 3 + 6


@pytest.mark.parametrize("how", MEASURES)
def test_closeness_is_the_same(pool, base, reads, how, monkeypatch):
    target = random_adapter(base, 3, 99, name="target")
    eager, lazy = both(pool)
    reads.clear()
    assert torch.equal(closeness(lazy, target, how), closeness(eager, target, how))
    assert len(reads) == len(set(reads))
    want = rank_by_closeness(pool, target, how)
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(Pool, "adapter", None)
    assert rank_by_closeness(Pool.open(pool._folders["a0"].parent), target, how) == want


def test_one_module_is_in_memory_at_a_time(pool, monkeypatch):
    alive, most = [], []

    def watched(read):
        def wrapped(self, module):
            found = read(self, module)
            alive.append(weakref.ref(found.A if isinstance(found, source.Factors) else found[0]))
            most.append(sum(each() is not None for each in alive))
            return found

        return wrapped

    monkeypatch.setattr(lazily.Files, "_factors", watched(lazily.Files._factors))
    monkeypatch.setattr(Source, "read", watched(Source.read))
    lazy = pool.stack(lazy=True)
    gc.collect()
    for _, units in lazy:
        del units
    lazy.gram()
    lazy.norms()
    assert len(most) == 3 * 14
    assert max(most) <= 2
    most.clear()
    Source(pool._folders["a0"]).measure()
    assert max(most) <= 2


def test_no_file_stays_open(pool):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    lazy = pool.stack(lazy=True)
    for _ in lazy:
        pass
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_more_adapters_than_files_may_be_open(pool):
    import resource

    sources = [pool.source(name) for name in pool.names * 20]
    for i, each in enumerate(sources):
        each.name = str(i)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 5, before[1]))
    try:
        stack = Stack.of(sources)
        assert sum(len(units) for _, units in stack) == 20 * int(pool.stack().ranks().sum())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_large_selections_are_lazy_by_themselves(pool, monkeypatch):
    size = sum(4 * (u.A.numel() + u.B.numel()) for _, u in pool.stack(["a0", "a1"]))
    monkeypatch.setattr("workbench.pool.STACKED_IN_MEMORY", size)
    assert not pool.stack(["a0", "a1"]).lazy
    assert pool.stack().lazy
    assert not pool.stack(lazy=False).lazy
    want = merge(pool.stack(lazy=False), "sum")
    assert merge(pool, "sum").digest() == want.digest()
    assert pool.select("random", 4).lazy
    with pytest.raises(SelectionError, match="no adapter 'b'"):
        pool.stack(["b"], lazy=True)


# Sources, against the safetensors library.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_those_that_safetensors_reads(tmp_path, base, dtype):
    adapter = random_adapter(base, 3, 1, alpha=7)
    path = adapter.save(tmp_path / "a", dtype=dtype)
    stored = load_file(path / WEIGHTS)
    found = Source(path)
    for module, factors in found:
        assert torch.equal(factors.A, stored[f"base_model.model.{module}.lora_A.weight"].float())
        assert torch.equal(factors.B, stored[f"base_model.model.{module}.lora_B.weight"].float() * factors.scale)
        slot = found.modules[module]
        assert (slot.rank, slot.shape, slot.scale) == (factors.rank, factors.shape, factors.scale)
        assert factors.A.is_contiguous()
        assert factors.B.is_contiguous()
    assert found.measure()[1] == Adapter.load(path).digest()
    assert found.measure()[0] == pytest.approx(Adapter.load(path).norm(), rel=1e-12)


def test_what_peft_writes(tmp_path):
    gpt2 = tiny_gpt2()
    write_peft(gpt2, tmp_path / "a", r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    source = Source(tmp_path / "a", "own", shapes=gpt2.layers)
    assert source.name == "own"
    assert {slot.embedding for slot in source.modules.values()} == {True, False}
    lazy, eager = Stack.of([source]), Stack.of([Adapter.load(tmp_path / "a", "own", shapes=gpt2.layers)])
    for module, units in lazy:
        same(units, eager.modules[module])
    assert lazy.infos == eager.infos


def test_the_digest_goes_by_the_base_s_names(tmp_path, base):
    """Whatever order the file's own names for the modules have."""
    path = random_adapter(base, 2).save(tmp_path / "a")
    digest = Adapter.load(path).digest()
    stored = {key.replace("model.model.layers.1", "model.layers.1"): t for key, t in load_file(path / WEIGHTS).items()}
    save_file(stored, path / WEIGHTS)
    found = Source(path, shapes=base.layers)
    assert list(found.modules) != sorted(found.modules)
    assert found.measure()[1] == Adapter.load(path, shapes=base.layers).digest() == digest


def test_aliases_of_one_base_stack(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pool")
    path = tmp_path / "pool" / "a1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/tiny"}))
    pool = Pool.open(tmp_path / "pool", rules=())
    eager, lazy = both(pool)
    assert lazy.base == eager.base == lazy.choose(["a1"]).base == lazy.adapter("a1").base
    assert lazy.digest() == eager.digest()


def test_a_type_that_is_no_float_is_refused(tmp_path, base):
    path = random_adapter(base, 2).save(tmp_path / "a")
    stored = load_file(path / WEIGHTS)
    first = min(stored)
    save_file(stored | {first: stored[first].to(torch.int8)}, path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"lora_A of .* is of type 'I8', expected F64, F32, F16, BF16"):
        Source(path)


def test_a_file_that_changed_meanwhile(tmp_path, base):
    path = random_adapter(base, 2).save(tmp_path / "a")
    found = Source(path)
    module = next(iter(found.modules))
    before = (path / WEIGHTS).stat()
    os.utime(path / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(AdapterError, match=r"a: adapter_model\.safetensors has changed since it was opened"):
        found.read(module)
    (path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"a: adapter_model.safetensors cannot be read any more \(.*No such file"):
        found.read(module)


def test_values_that_are_not_finite_name_their_module(tmp_path, base):
    path = random_adapter(base, 2).save(tmp_path / "a")
    stored = load_file(path / WEIGHTS)
    key = sorted(stored)[5]
    stored[key][0, 0] = float("inf")
    save_file(stored, path / WEIGHTS)
    module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
    found = Source(path)
    with pytest.raises(AdapterError, match=f"a: {module} holds NaN or infinite values"):
        found.read(module)
    with pytest.raises(AdapterError, match=f"a: {module} holds NaN or infinite values"):
        found.measure()
    assert found.read(next(m for m in found.modules if m != module))


def test_stacks_check_sources_as_they_check_adapters(tmp_path, base):
    wide = {m: (2 * d_out, d_in) for m, (d_out, d_in) in base.projections.items()}
    paths = [random_adapter(b, 2, name=n).save(tmp_path / n) for b, n in ((base, "a"), (wide, "b"))]
    with pytest.raises(AdapterError) as lazy:
        Stack.of([Source(path) for path in paths])
    with pytest.raises(AdapterError) as eager:
        Stack.of([Adapter.load(path) for path in paths])
    assert str(lazy.value) == str(eager.value)
    sources = [Source(paths[0]), Source(paths[0], "other")]
    sources[1].base = "someone's"
    with pytest.raises(AdapterError, match="adapters of different bases cannot be stacked"):
        Stack.of(sources)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("bfloat16", "float32", "float64"), ("float64",)])
def test_types_of_any_width_side_by_side(tmp_path, dtypes):
    """Of an odd number of bytes over eight, so that what lies behind must be aligned."""
    shapes = {"a.q_proj": (3, 5), "b.q_proj": (7, 1)}
    adapters = [random_adapter(shapes, 1 + i, i, alpha=3, name=f"a{i}") for i in range(2 * len(dtypes))]
    kinds = [getattr(torch, dtype) for dtype in dtypes] * 2
    paths = [a.save(tmp_path / a.name, dtype=kind) for a, kind in zip(adapters, kinds, strict=True)]
    eager = Stack.of([Adapter.load(path) for path in paths])
    for module, units in Stack.of([Source(path) for path in paths]):
        same(units, eager.modules[module])
        assert (units.A.dtype, units.B.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("threads", [2, 9])
def test_as_many_threads_read_as_torch_has(pool, reads, threads):
    eager, lazy = both(pool)
    reads.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for module, units in lazy:
            same(units, eager.modules[module])
    finally:
        torch.set_num_threads(before)
    assert len(reads) == len(set(reads)) == 14 * 3 + 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_stack_names_whose_values_are_not_finite(tmp_path, base, side, value):
    paths = [random_adapter(base, 2, i, name=f"a{i}").save(tmp_path / f"a{i}", dtype=torch.bfloat16) for i in range(3)]
    stored = load_file(paths[1] / WEIGHTS)
    key = sorted(k for k in stored if f"lora_{side}" in k)[3]
    stored[key][-1, -1] = value
    save_file(stored, paths[1] / WEIGHTS)
    module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
    stack = Stack.of([Source(path) for path in paths])
    with pytest.raises(AdapterError, match=f"a1: {module} holds NaN or infinite values"):
        stack.modules[module]
    assert all(len(stack.modules[m]) == 6 for m in stack.modules if m != module)


def test_large_values_are_finite(tmp_path):
    """Their sum is not."""
    adapter = random_adapter({"q_proj": (4, 6)}, 2)
    f = adapter.modules["q_proj"]
    adapter.modules["q_proj"] = source.Factors(f.B, torch.full_like(f.A, 3e38), f.scale)
    (_, units), *_ = Stack.of([Source(adapter.save(tmp_path / "a"))])
    assert float(units.A.min()) == float(torch.tensor(3e38))


def test_a_stack_s_file_that_changed_or_went(tmp_path, base):
    paths = [random_adapter(base, 2, i, name=f"a{i}").save(tmp_path / f"a{i}") for i in range(2)]
    stack = Stack.of([Source(path) for path in paths])
    module = next(iter(stack.modules))
    before = (paths[1] / WEIGHTS).stat()
    os.utime(paths[1] / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(AdapterError, match=r"a1: adapter_model\.safetensors has changed since it was opened"):
        stack.modules[module]
    (paths[1] / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"a1: adapter_model.safetensors cannot be read any more"):
        stack.modules[module]


def test_a_file_given_out_in_pieces(pool, monkeypatch):
    """The system may return fewer bytes than were asked for, or none at all."""
    eager, lazy = both(pool)

    class Slow:
        def __init__(self, file):
            self.file, self.fileno, self.seek = file, file.fileno, file.seek

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def readinto(self, view):
            return self.file.readinto(view[: most[0]])

    opened, most = type(pool._folders["a0"]).open, [7]
    monkeypatch.setattr(
        type(pool._folders["a0"]), "open", lambda self, *args, **kwargs: Slow(opened(self, *args, **kwargs))
    )
    for module, units in lazy:
        same(units, eager.modules[module])
    most[0] = 0
    with pytest.raises(AdapterError, match=r"cannot be read any more \(it ends too early\)"):
        next(iter(lazy))
