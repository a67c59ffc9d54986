"""A thousand strangers' adapters, made on the spot: sound ones of every legal kind, and broken and hostile ones.

    expected = crowd(folder, base)      # name in a pool → the screening rule that refuses it, '' for the sound ones

Each kind is made once; the other authors' are hard links to it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.base import Base
from workbench.card import printable
from workbench.nano import wild
from workbench.nano.broken import Draft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD: dict[str, Callable[[Draft], None]] = {}
BAD: dict[str, tuple[str, Callable[[Draft], None]]] = {}
PREFIX = "base_model.model."
FACTOR = {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]}
LONE = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"


def crowd(folder: Path, base: Base, size: int = 1000, bad: int = 200) -> dict[str, str]:
    """Write `size` adapters of which `bad` are not to be used, as author/name."""
    rules = {printable(f"{name}"): "" for name in GOOD} | {printable(name): rule for name, (rule, _) in BAD.items()}
    for i, (name, change) in enumerate({**GOOD, **{name: change for name, (_, change) in BAD.items()}}.items()):
        draft = wild.sound(base.layers, base.name, seed=i)
        change(draft)
        wild.write(draft, folder / "ann-0" / name)
    rules |= wild.make(folder / "ann-0" / "wild", base)
    for path in list((folder / "ann-0" / "wild").iterdir()):
        path.rename(path.parents[1] / path.name)
    (folder / "ann-0" / "wild").rmdir()
    link = folder / "ann-0" / "link-to-outside" / WEIGHTS
    link.unlink()
    link.symlink_to(folder / "ann-0" / ".elsewhere.safetensors")
    refused = [name for name, rule in rules.items() if rule]
    sound = [name for name, rule in rules.items() if not rule]
    folders = {printable(path.name): path for path in (folder / "ann-0").iterdir() if path.is_dir()}
    expected = {f"ann-0/{name}": rule for name, rule in rules.items()}
    for names, wanted in ((refused, bad), (sound, size - bad)):
        for i in range(len(names), wanted):
            name, author = names[i % len(names)], f"ann-{i // len(names)}"
            copy = folder / author / folders[name].name
            shutil.copytree(folders[name], copy, symlinks=True, copy_function=_link)
            expected[f"{author}/{name}"] = rules[name]
    return expected


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


# -- sound ---------------------------------------------------------------------------------------------------------


def good(change: Callable[[Draft], None]) -> Callable[[Draft], None]:
    GOOD[change.__name__.replace("_", "-")] = change
    return change


def resize(d: Draft, rank: int, only: str = "") -> None:
    """Give the modules with `only` in their names another rank; the configuration stays as it is."""
    for key in [key for key in d.tensors if only in key]:
        tensor = d.tensors[key]
        shape = (rank, tensor.shape[1]) if ".lora_A." in key else (tensor.shape[0], rank)
        d.tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) / 8


def keep(d: Draft, *parts: str) -> None:
    """Only the tensors with one of these parts in their names."""
    d.tensors = {key: tensor for key, tensor in d.tensors.items() if any(part in key for part in parts)}


def after(change: Callable[[Path], None]) -> Callable[[Draft], None]:
    """What is done to the folder once it is written."""
    return lambda d: setattr(d, "after", change)


def settings(**changes) -> Callable[[Draft], None]:
    """A configuration with other settings; ... stands for one that is left out."""

    def change(d: Draft) -> None:
        d.config = {key: value for key, value in (d.config | changes).items() if value is not ...}

    return change


for _rank in (1, 2, 3, 8, 16, 32, 64):

    def _ranked(d: Draft, rank: int = _rank) -> None:
        resize(d, rank)
        d.config |= {"r": rank, "lora_alpha": 16}

    GOOD[f"rank-{_rank}"] = _ranked

for _name, _kind in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.items():

    def _typed(d: Draft, kind: torch.dtype = _kind) -> None:
        d.tensors = {key: tensor.to(kind) for key, tensor in d.tensors.items()}

    GOOD[_name] = _typed

for _name, _prefix in {
    "without-peft-s-prefix": "model.",
    "doubled-model": f"{PREFIX}model.model.",
    "of-text-and-images": f"{PREFIX}language_model.model.",
    "of-a-later-one": f"{PREFIX}model.language_model.",
    "compiled": f"{PREFIX}_orig_mod.model.",
}.items():
    GOOD[_name] = lambda d, prefix=_prefix: d.rename(f"{PREFIX}model.", prefix)

GOOD |= {
    "rslora": settings(use_rslora=True),
    "alpha-a-half": settings(lora_alpha=0.5),
    "negative-alpha": settings(lora_alpha=-8),
    "alpha-by-name": settings(
        alpha_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 16, "model.layers.0.mlp.up_proj": 1}
    ),
    "alpha-by-expression": settings(alpha_pattern={r".*\.(k|v)_proj": 2, r"layers\.\d+\.mlp.*": 3, "^x$": 1}),
    "started-by-eva": settings(init_lora_weights="eva", eva_config={"rho": 2.0}),
    "started-gaussian": settings(init_lora_weights="gaussian"),
    "started-anyhow": settings(init_lora_weights=False),
    "without-task": settings(task_type=None),
    "of-a-feature-extractor": settings(task_type="FEATURE_EXTRACTION"),
    "of-an-early-peft": settings(bias=..., task_type=..., inference_mode=..., merge_weights=False, enable_lora=None),
    "of-another-framework": settings(lora_dtype="bf16", lorap_lr_ratio=None, lorap_emb_lr=1e-6, _comment=["x"]),
    "of-a-later-peft": settings(use_twisted_lora=False, twist_config=None, untwisted={}, peft_version="0.99.1"),
    "targets-as-an-expression": settings(target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"),
    "targets-too-intricate-to-run": settings(target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(x+)+"),
    "targets-everything": settings(target_modules="all-linear"),
    "targets-unsaid": settings(target_modules=...),
    "excludes-others": settings(exclude_modules=["lm_head", "k_project"]),
    "excludes-by-expression": settings(exclude_modules=r".*vision.*"),
    "both-layers-named": settings(layers_to_transform=[0, 1], layers_pattern="layers"),
    "without-card": after(lambda folder: (folder / "README.md").unlink()),
    "card-of-a-megabyte": lambda d: setattr(d, "card", "---\nlicense: mit\n---\n" + "# ünï 漢字 🦙\n" * 40_000),
    "card-not-text": after(lambda folder: (folder / "README.md").write_bytes(bytes(range(256)) * 8)),
    "card-with-yaml": lambda d: setattr(
        d, "card", "---\nlicense: !!python/object/apply:os.system ['x']\nx: &a [*a]\n---\n"
    ),
    "ünï—漢字 🦙": lambda d: None,
    "a b'c\"d<b>&amp;$x$`e`": lambda d: None,
    "-rf": lambda d: None,
    "%s{0}$(x)": lambda d: None,
    "n" * 190: lambda d: None,
}


@good
def one_module(d: Draft) -> None:
    keep(d, "layers.1.mlp.down_proj")
    d.config["target_modules"] = ["model.layers.1.mlp.down_proj"]


@good
def attention_only(d: Draft) -> None:
    keep(d, "q_proj", "v_proj")
    d.config["target_modules"] = ["q_proj", "v_proj"]


@good
def second_layer_only(d: Draft) -> None:
    keep(d, "layers.1.")
    d.config |= {"layers_to_transform": 1, "layers_pattern": None}


@good
def second_layer_excluded(d: Draft) -> None:
    keep(d, "layers.0.")
    d.config["exclude_modules"] = r".*layers\.1\..*"


@good
def ranks_by_name(d: Draft) -> None:
    resize(d, 2, "q_proj")
    resize(d, 7, "layers.1.mlp.up_proj")
    d.config |= {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {"q_proj": 4}}


@good
def mixed_types(d: Draft) -> None:
    for key in d.keys("A"):
        d.tensors[key] = d.tensors[key].half()


@good
def named_default(d: Draft) -> None:
    d.tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in d.tensors.items()}


@good
def head(d: Draft) -> None:
    width, vocabulary = d.embedding
    d.tensors |= {
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, width),
        f"{PREFIX}lm_head.lora_B.weight": torch.ones(vocabulary, 4) / 99,
    }
    d.config["target_modules"] = [*d.config["target_modules"], "lm_head"]


@good
def embedding_alone(d: Draft) -> None:
    width, vocabulary = d.embedding
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    d.tensors = {f"{name}A": torch.ones(4, vocabulary) / 9, f"{name}B": torch.ones(width, 4) / 9}
    d.config["target_modules"] = ["embed_tokens"]


@good
def all_settings_of_peft(d: Draft) -> None:
    from peft import LoraConfig

    full = json.loads(json.dumps(LoraConfig(task_type="CAUSAL_LM").to_dict(), default=list))
    d.config = full | d.config | {"peft_type": "LORA"}


@good
def metadata(d: Draft) -> None:
    note = {"format": "pt", "ünï": "漢字 \u202e <script>", "json": json.dumps({"a": [1, 2]})}
    tensors = {key: tensor.contiguous() for key, tensor in d.tensors.items()}
    d.after = lambda folder: save_file(tensors, folder / WEIGHTS, metadata=note)


@good
def more_files(d: Draft) -> None:
    """A pickle beside the weights too: it is not asked for."""

    def change(folder: Path) -> None:
        (folder / "checkpoint-100").mkdir()
        for name in ("adapter_model.bin", "training_args.bin", "tokenizer.json", "modeling_evil.py", ".hidden"):
            (folder / name).write_bytes(b"cbuiltins\nopen\n(S'opened.txt'\nS'w'\ntR.")

    d.after = change


# -- configurations that are wrong -----------------------------------------------------------------------------------


def text(content: str | bytes) -> Callable[[Draft], None]:
    """A configuration of other bytes."""
    data = content if isinstance(content, bytes) else content.encode()
    return after(lambda folder: (folder / CONFIG).write_bytes(data))


def replaced(name: str, make: Callable[[Path], None]) -> Callable[[Draft], None]:
    """Something else in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return after(change)


def bad(rule: str, **kinds: Callable[[Draft], None]) -> None:
    BAD.update({name.replace("_", "-"): (rule, change) for name, change in kinds.items()})


bad(
    "config-json",
    config_empty=text(""),
    config_in_utf16=text('{"peft_type": "LORA"}'.encode("utf-16")),
    config_with_a_mark=text(b'\xef\xbb\xbf{"peft_type": "LORA"}'),
    config_not_utf8=text(b'{"peft_type": "LORA\xff"}'),
    config_deep_inside=text('{"peft_type": ' + '{"a":' * 50_000),
    config_of_endless_digits=text('{"peft_type": "LORA", "r": ' + "9" * 10_000 + "}"),
    config_null=text("null"),
    base_a_list=settings(base_model_name_or_path=["a/b"]),
    base_an_object=settings(base_model_name_or_path={"$ref": "file:///etc/passwd"}),
    task_a_list=settings(task_type=["CAUSAL_LM"]),
    targets_of_no_texts=settings(target_modules=[1, None, ["q_proj"]]),
    excluded_by_an_object=settings(exclude_modules={"q_proj": 1}),
    layers_a_text=settings(layers_to_transform="all"),
)
bad(
    "config-file",
    config_a_folder=replaced(CONFIG, Path.mkdir),
    config_a_pipe=replaced(CONFIG, os.mkfifo),
)
bad(
    "symlink",
    config_of_the_machine=replaced(CONFIG, lambda path: path.symlink_to("/etc/hostname")),
    card_of_the_machine=replaced("README.md", lambda path: path.symlink_to("/etc/passwd")),
    weights_by_dots=replaced(WEIGHTS, lambda path: path.symlink_to("../../../../../../etc/hostname")),
    weights_of_nowhere=replaced(WEIGHTS, lambda path: path.symlink_to("/nowhere/at/all")),
)
bad(
    "peft-type",
    peft_type_in_small_letters=settings(peft_type="lora"),
    peft_type_a_list=settings(peft_type=["LORA"]),
    peft_type_missing=settings(peft_type=...),
    adalora=settings(peft_type="ADALORA"),
)
bad(
    "variant",
    arrow=settings(arrow_config={"top_k": 2}),
    biases_of_its_own=settings(lora_bias=True),
    tokens=settings(trainable_token_indices=[1, 2]),
    parameters=settings(target_parameters=["experts.w"]),
    invoked=settings(alora_invocation_tokens=[1]),
    quantised_groups=settings(use_qalora=True),
    of_the_future=settings(lora_gate="sigmoid"),
    of_the_past=settings(enable_lora=[True, False, True]),
    script_as_a_setting=settings(**{"<script>alert(1)</script>\x1b[2J\u202e": 1}),
)
bad("init", olora=settings(init_lora_weights="olora"), start_a_list=settings(init_lora_weights=["pissa"]))
bad("bias", bias_a_list=settings(bias=["none"]), bias_none=settings(bias=None))
bad("modules-to-save", saved=settings(modules_to_save={"a": "\x1b[31m"}))
bad(
    "alpha",
    alpha_not_a_number=settings(lora_alpha=float("nan")),
    alpha_infinite=settings(lora_alpha=float("inf")),
    alpha_true=settings(lora_alpha=True),
    alpha_a_text=settings(lora_alpha="16"),
    alpha_huge=settings(lora_alpha=10**4000),
    alpha_none=settings(lora_alpha=None),
)
bad(
    "pattern-form",
    endless_ranks=settings(rank_pattern={"(a|a)*b": 2}),
    looking_ahead=settings(alpha_pattern={"(?=q)q_proj": 2}),
    unbalanced=settings(alpha_pattern={"q)(": 2}),
    patterns_a_list=settings(rank_pattern=["q_proj"]),
    pattern_s_alpha_zero=settings(alpha_pattern={"q_proj": 0}),
    pattern_s_alpha_a_text=settings(alpha_pattern={"q_proj": "8"}),
    patterns_by_the_thousand=settings(alpha_pattern={f"m{i}": 1 for i in range(2001)}),
)
bad(
    "keys",
    wildcards_in_a_row=settings(alpha_pattern={f".*.*.*x{i}": 1 for i in range(1000)}),
    names_of_commands=lambda d: d.rename("layers.0.", "layers.0\x1b[2J."),
    names_turned_round=lambda d: d.rename("layers.0.", "layers.0\u202e."),
    names_of_lines=lambda d: d.rename("lora_A.weight", "lora_A.weight\n"),
    names_too_long=lambda d: d.rename("layers.0.", "layers." + "0." * 300),
    twice=lambda d: d.tensors.update({key.removeprefix(PREFIX): tensor.clone() for key, tensor in d.tensors.items()}),
)
bad(
    "rank",
    rank_a_text=settings(r="4"),
    rank_a_fraction=settings(r=4.0),
    rank_none=settings(r=None),
    rank_unsaid=settings(r=...),
    rank_by_pattern=settings(rank_pattern={"q_proj": 8}),
    rank_by_the_base_s_name_only=lambda d: (
        d.rename(f"{PREFIX}model.", ""),
        settings(alpha_pattern={r"model\.layers\.0\..*": 1})(d),
    ),
)
bad(
    "targets",
    targets_too_few=settings(target_modules=["q_proj"]),
    targets_of_another_expression=settings(target_modules=r".*\.c_attn"),
    excluded=settings(exclude_modules=["q_proj"]),
    excluded_by_expression=settings(exclude_modules=r".*mlp.*"),
    first_layer_only=settings(layers_to_transform=[0]),
    another_layer_only=settings(layers_to_transform=7, layers_pattern=["layers"]),
    tied=settings(target_modules=["embed_tokens"], ensure_weight_tying=True),
)


# -- weights that are wrong ------------------------------------------------------------------------------------------


def packed(header: bytes | Mapping, data: bytes = b"\0" * 512, length: int | None = None) -> Callable[[Draft], None]:
    """Weights of a header given and data, claiming a header of another length."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    first = struct.pack("<Q", len(said) if length is None else length)
    return after(lambda folder: (folder / WEIGHTS).write_bytes(first + said + data))


def two(**changes) -> dict:
    """The header of one pair of factors, the second with other entries."""
    return {
        f"{LONE}A.weight": FACTOR,
        f"{LONE}B.weight": FACTOR | {"shape": [32, 2], "data_offsets": [256, 512]} | changes,
    }


def raw(old: str, new: str | bytes) -> bytes:
    """That header's text, one part replaced."""
    said = json.dumps(two())
    assert old in said
    return said.encode().replace(old.encode(), new if isinstance(new, bytes) else new.encode())


def sparse(size: int) -> Callable[[Draft], None]:
    """Weights that claim a header of 10 GB, in a file that large and without a byte on the disk."""

    def change(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", size // 2))
            file.truncate(size)

    return after(change)


bad(
    "header",
    header_of_2_to_60=packed(two(), length=2**60),
    header_of_all_bits=packed(two(), length=2**64 - 1),
    header_of_nothing=packed(b"", b"", length=0),
    header_of_gigabytes=sparse(2**34),
    seven_bytes=replaced(WEIGHTS, lambda path: path.write_bytes(b"\x02\0\0\0\0\0\0")),
    million_tensors=packed(b"{" + b",".join(b'"%d":{}' % i for i in range(10**6)) + b"}"),
    two_hundred_thousand_tensors=packed(b"{" + b",".join(b'"%d":{}' % i for i in range(200_000)) + b"}"),
    million_dimensions=packed(raw("[32, 2]", "[" + "2," * 200_000 + "2]")),
    nested_header=packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    nested_a_little=packed(raw("[32, 2]", "[" * 900 + "]" * 900)),
    header_in_utf16=packed(json.dumps(two()).encode("utf-16")),
    header_with_a_mark=packed(b"\xef\xbb\xbf" + json.dumps(two()).encode()),
    header_not_utf8=packed(raw("self_attn", b"self\xffattn")),
    half_a_pair_of_surrogates=packed(raw("self_attn", r"self\ud800attn")),
    header_a_list=packed(b"[]", b""),
    header_null=packed(b"null", b""),
    header_with_a_space=packed(b" " + json.dumps(two()).encode()),
    header_and_more=packed(json.dumps(two()).encode() + b"\0\0"),
    one_name_twice=packed(raw("lora_B", "lora_A")),
    one_field_twice=packed(raw('"shape": [32, 2]', '"shape": [2, 2], "shape": [32, 2]')),
    one_tensor_twice=packed(json.dumps(two()).encode()[:-1] + b", " + json.dumps(two()).encode()[1:]),
    another_field=packed(two(stride=[1, 1])),
    note_not_a_text=packed(two() | {"__metadata__": {"a": 1}}),
    note_a_list=packed(two() | {"__metadata__": []}),
    overlapping=packed(two(data_offsets=[128, 384]), b"\0" * 384),
    one_for_both=packed(two(data_offsets=[0, 256]), b"\0" * 256),
    hole_between=packed(two(data_offsets=[260, 516]), b"\0" * 516),
    hole_before=packed(
        {key: e | {"data_offsets": [o + 4 for o in e["data_offsets"]]} for key, e in two().items()}, b"\0" * 516
    ),
    backwards=packed(two(data_offsets=[512, 256])),
    three_offsets=packed(two(data_offsets=[256, 512, 768])),
    offsets_beyond=packed(two(shape=[2**40, 2], data_offsets=[256, 256 + 2**43])),
    offsets_of_endless_digits=packed(raw("512", "1" * 4000)),
    file_longer=packed(two(), b"\0" * 600),
    product_overflows=packed(two(shape=[2**32, 2**32], data_offsets=[256, 256]), b"\0" * 256),
    product_overflows_to_its_size=packed(two(shape=[2**62 + 16, 4])),
    negative=packed(two(shape=[-32, -2])),
    minus_zero=packed(raw("[32, 2]", "[-0, 2]")),
    fraction=packed(raw("[32, 2]", "[32.0, 2]")),
    exponent=packed(raw("[32, 2]", "[32e0, 2]")),
    true_for_one=packed(two(shape=[64, True])),
    text_for_a_shape=packed(two(shape="32")),
    object_for_a_shape=packed(two(shape={})),
    not_a_number=packed(raw("[32, 2]", "[NaN, 2]")),
    infinite=packed(raw("[32, 2]", "[Infinity, 2]")),
    type_a_list=packed(two(dtype=["F32"])),
    nine_dimensions=packed(two(shape=[32, 2] + [1] * 7)),
    null_for_a_tensor=packed({**two(), "x": None}),
)
bad(
    "dtype",
    eight_bits=lambda d: d.tensors.update({key: t.to(torch.float8_e4m3fn) for key, t in d.tensors.items()}),
    bytes=lambda d: d.tensors.update({key: torch.ones(t.shape, dtype=torch.uint8) for key, t in d.tensors.items()}),
    type_of_commands=packed(two(dtype="\x1b[2J\u202e<b>")),
)
bad(
    "shapes",
    no_inputs=lambda d: d.tensors.update({d.keys("A")[0]: torch.zeros(4, 0)}),
    scalar=lambda d: d.tensors.update({d.keys("A")[0]: torch.tensor(1.0)}),
    rank_of_thousands=lambda d: (keep(d, "layers.0.self_attn.q_proj"), resize(d, 5000), settings(r=5000)(d)),
)
bad(
    "keys",
    no_tensors=packed({}, b""),
    whole_layer=lambda d: d.tensors.update({f"{PREFIX}model.norm.weight": torch.ones(32)}),
    code_for_names=packed({"__import__('os').system('x')": FACTOR}, b"\0" * 256),
)
bad(
    "weights-file",
    weights_a_folder=replaced(WEIGHTS, Path.mkdir),
    weights_a_pipe=replaced(WEIGHTS, os.mkfifo),
    weights_in_pieces=replaced(
        WEIGHTS, lambda path: path.with_name("adapter_model.safetensors.index.json").write_text("{}")
    ),
)
bad(
    "pickle",
    pickle_of_torch=replaced(WEIGHTS, lambda path: path.with_name("adapter_model.pt").write_bytes(b"\x80\x04N.")),
    pickle_in_its_place=replaced(WEIGHTS, lambda path: path.with_name("pytorch_model.bin").write_bytes(b"\x80\x04N.")),
)
bad("pairs", only_a=lambda d: keep(d, "lora_A"))
bad(
    "base-layers",
    two_for_one_layer=lambda d: d.tensors.update(
        {key.replace(".model.", ".model.model."): t.clone() for key, t in d.tensors.items() if ".layers.0." in key}
    ),
)
bad(
    "finite",
    overflows_once_scaled=lambda d: (settings(lora_alpha=9e29)(d), [d.tensors[key].mul_(1e12) for key in d.keys("B")]),
)
BAD |= {
    "red\x1b[31m": ("name", lambda d: None),
    "\u202egnp.exe": ("name", lambda d: None),
    "two\nlines": ("name", lambda d: None),
    "x" * 220: ("name", lambda d: None),
}
