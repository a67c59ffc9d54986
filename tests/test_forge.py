"""The forge end to end at its tiny preset, and the weights that are bundled."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from helpers import comes_out, generate, hook_logits, peft_logits, relative, some_ids
from workbench.adapt.gradient import Schedule
from workbench.adapters import Adapter
from workbench.base import Base, check_fits
from workbench.compose import grouped
from workbench.evaluate import encode_task, evaluate, score
from workbench.loading import choose_dtype
from workbench.nano import forge as forging
from workbench.nano import world
from workbench.nano.forge import PRESETS, forge, plan_of, train_pool
from workbench.nano.shelf import ADAPTERS, BASE, DATA, make_tokenizer

TINY = replace(  # the preset in a hurry: what it learns does not matter here
    PRESETS["tiny"],
    documents=1200,
    tokens_per_step=2048,
    base_steps=45,
    examples=40,
    adapter=Schedule(steps=12, lr=1e-2, batch=8, every=4),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny laboratory, and the report that `forge` returned."""
    out = tmp_path_factory.mktemp("forge")
    return out, forge(TINY, out, say=lambda _: None)


def test_the_base_opens_with_transformers_alone(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, report = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "base"), AutoTokenizer.from_pretrained(out / "base")
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    text = "reverse, months, commas: jan feb = \n"
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "\n"
    base = Base.load(out / "base", device="cpu")
    ids = some_ids(base)
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, base.model(input_ids=ids).logits) < 1e-2
    assert "held-out exact match" in (out / "base" / "README.md").read_text()


def test_every_adapter_opens_with_plain_peft(made):
    out, report = made
    base = Base.load(out / "base", device="cpu")
    folders = sorted((out / "adapters").iterdir())
    assert [f.name for f in folders] == sorted(report["pool"])
    assert len(folders) == TINY.upstream
    ids = some_ids(base)
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
    for folder in folders:
        adapter = Adapter.load(folder)
        check_fits(adapter, base.shapes)
        logits = hook_logits(base, adapter, ids)
        assert relative(peft_logits(base, folder, ids), logits) < 1e-4
        assert relative(logits, bare) > 1e-3
        row = report["pool"][folder.name]
        assert {factors.rank for factors in adapter.modules.values()} == {row["rank"]}
        assert {m.rsplit(".", 1)[-1] for m in adapter.modules} == set(row["targets"])
        assert "exact match" in (folder / "README.md").read_text()


def test_the_report_is_stored_and_says_how_well_it_went(made):
    out, report = made
    stored = json.loads((out / "forge.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert stored["preset"]["name"] == "tiny"
    losses = [row["loss"] for row in stored["log"]]
    assert len(losses) > 20
    assert losses[-1] < 0.8 * losses[0]
    assert set(stored["base"]) >= {"named, seen", "named, unseen combination", "latent, by name"}
    assert {f"in context, {n} shown, {kind} operations" for n in (1, 3, 5) for kind in ("named", "latent")} <= set(
        stored["base"]
    )
    assert all(0 <= value <= 1 for value in stored["base"].values())
    base = Base.load(out / "base", device="cpu")
    for name, row in stored["pool"].items():
        assert world.find(name).kind == "upstream"
        assert 0 <= row["zero_shot"] <= 1
        assert min(row["validation"]) < row["validation"][0]  # training lowered the loss
        task = world.make_task(world.find(name), n_test=20)
        update = grouped([Adapter.load(out / "adapters" / name)])
        assert float(evaluate(base, task, update).accuracy) == pytest.approx(row["accuracy"], abs=1e-4)


def test_a_pool_is_seeded(made):
    out, _ = made
    base = Base.load(out / "base", device="cpu")
    specs, plans = world.UPSTREAM[:3], [plan_of(i) for i in range(3)]
    preset = replace(TINY, examples=20, adapter=replace(TINY.adapter, steps=3))
    before = copy.deepcopy(base.model.state_dict())
    digests = [
        [a.digest() for a in train_pool(base, specs, plans, preset, seeds)[0]]
        for seeds in ([1, 2, 3], [1, 2, 3], [1, 2, 4])
    ]
    assert digests[0] == digests[1]
    assert digests[2][:2] == digests[0][:2]
    assert digests[2][2] != digests[0][2]
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


def test_a_base_is_seeded():
    preset = replace(TINY, documents=200, base_steps=3, tokens_per_step=512)
    digests = [forging.train_base(p, say=lambda _: None)[0].digest for p in (preset, preset, replace(preset, seed=1))]
    assert digests[0] == digests[1] != digests[2]


def test_the_pool_is_as_mixed_as_the_hub_s():
    plans = [plan_of(i) for i in range(len(world.UPSTREAM))]
    assert len({plan.rank for plan in plans}) >= 4
    assert len({plan.ratio for plan in plans}) >= 3
    assert {plan.rslora for plan in plans} == {True, False}
    assert len({plan.targets for plan in plans}) == 3


# The bundled weights

bundled = pytest.mark.skipif(
    not BASE.is_dir() or not ADAPTERS.is_dir(), reason=f"no bundled weights under {DATA.name}/ yet"
)


@pytest.fixture(scope="module")
def base():
    return Base.load(BASE, device="cpu")


@bundled
def test_the_base_is_computed_with_in_fp32_on_any_device(made):
    from transformers import AutoConfig

    for folder in (BASE, made[0] / "base"):
        assert choose_dtype(AutoConfig.from_pretrained(folder), "cuda", None) == torch.float32
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@bundled
def test_bundled_weights_are_small_and_whole():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    folders = sorted(path for path in ADAPTERS.iterdir())
    assert len(folders) >= 64
    assert {folder.name for folder in folders} <= {spec.slug for spec in world.UPSTREAM}
    for folder in folders:
        assert {p.name for p in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert len((folder / "README.md").read_text(encoding="utf-8")) > 100
    assert (BASE / "README.md").is_file()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".py")]


@bundled
def test_bundled_figures(base):
    report = json.loads((DATA / "forge.json").read_text(encoding="utf-8"))
    assert report["parameters"] == sum(p.numel() for p in base.model.parameters()) <= 3_000_000
    held_out = report["base"]
    assert held_out["in context, 3 shown, named operations"] >= 0.9
    assert held_out["named, seen"] >= 0.95
    assert held_out["named, unseen combination"] >= 0.85
    assert held_out["latent, by name"] <= 0.2
    assert set(report["pool"]) == {folder.name for folder in ADAPTERS.iterdir()}
    assert len(report["log"]) > 20


def same_as_peft(base, folders):
    ids = some_ids(base, rows=2)
    for folder in folders:
        adapter = Adapter.load(folder)
        check_fits(adapter, base.projections)
        assert relative(peft_logits(base, folder, ids), hook_logits(base, adapter, ids)) < 1e-4


@bundled
def test_bundled_adapters_open_with_plain_peft(base):
    same_as_peft(base, sorted(ADAPTERS.iterdir())[::9])


@bundled
@pytest.mark.slow
def test_every_bundled_adapter_opens_with_plain_peft(base):
    same_as_peft(base, sorted(ADAPTERS.iterdir()))


def test_the_command_line_hands_its_words_on(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(forging, "forge", lambda *given, **more: called.append((given, more)))
    forging.main(["--preset", "nano", "--out", str(tmp_path), "--device", "cpu", "--workers", "3"])
    assert called == [((PRESETS["nano"], tmp_path, "cpu"), {"workers": 3})]


@bundled
@pytest.mark.slow
def test_bundled_match_is_what_generate_produces(base):
    """Four examples of every task; every third task under an adapter of the pool."""
    folders = sorted(ADAPTERS.iterdir())
    specs = world.TARGETS + world.UPSTREAM
    tasks = [world.make_task(spec, n_test=4) for spec in specs]
    rows = [encode_task(base, task, task.test) for task in tasks]
    made, adapters = {}, dict.fromkeys(range(len(specs)))
    for i in range(0, len(specs), 3):
        own = ADAPTERS / specs[i].slug
        adapters[i] = Adapter.load(own if own.is_dir() else folders[i % len(folders)])
        made[i] = produced(base, rows[i], tasks[i].max_new_tokens, adapters[i])
    bare = [i for i, adapter in adapters.items() if adapter is None]
    limit = max(tasks[i].max_new_tokens for i in bare)
    at_once = iter(produced(base, [row for i in bare for row in rows[i]], limit))
    made |= {i: [next(at_once)[: tasks[i].max_new_tokens] for _ in rows[i]] for i in bare}
    outcomes = []
    for i, task in enumerate(tasks):
        match = score(base, [rows[i]], grouped([adapters[i]]) if adapters[i] else None).match[0].tolist()
        targets = [base.tokenizer(e.target, add_special_tokens=False)["input_ids"] for e in task.test]
        want = [comes_out(base, ids, target, task.max_new_tokens) for ids, target in zip(made[i], targets, strict=True)]
        assert match == want, specs[i].slug
        outcomes += want
    assert True in outcomes
    assert False in outcomes


def produced(base, rows, limit, adapter=None):
    """What `generate` produces for each prompt, the adapter's ΔW added to the weights for the while."""
    layers = dict(base.model.named_modules())
    kept = {}
    with torch.no_grad():
        for module, factors in (adapter.modules if adapter else {}).items():
            kept[module] = layers[module].weight.clone()
            layers[module].weight += factors.delta()
        try:
            return generate(base, [row.prompt for row in rows], limit)
        finally:
            for module, weight in kept.items():
                layers[module].weight.copy_(weight)
