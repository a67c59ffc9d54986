"""Adapters in good order that are no plain LoRA, or whose parts do not go together; and some that only look broken."""

from __future__ import annotations

import torch

from workbench.nano.broken import EMBEDDING, RANK, Draft, broken

__all__: list[str] = []  # they are found in `broken.BREAKAGES`


# -- not a plain LoRA ----------------------------------------------------------------------------------------------


@broken("peft-type")
def ia3(d: Draft) -> None:
    """Another method, and it says so."""
    d.config["peft_type"] = "IA3"
    d.tensors = {key.replace("lora_A.weight", "ia3_l"): d.tensors[key][:1] for key in d.keys("A")}


@broken("keys")
def ia3_in_disguise(d: Draft) -> None:
    """Another method, which only the names of its tensors show."""
    d.tensors = {key.replace("lora_A.weight", "ia3_l"): d.tensors[key][:1] for key in d.keys("A")}


@broken("dora")
def dora(d: Draft) -> None:
    """DoRA, and it says so."""
    d.config["use_dora"] = True


@broken("keys")
def dora_in_disguise(d: Draft) -> None:
    """DoRA, which only its magnitudes show."""
    for key in d.keys("B"):
        d.tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(d.tensors[key].shape[0])


@broken("modules-to-save")
def whole_head(d: Draft) -> None:
    """The whole head was trained beside the LoRA."""
    d.config["modules_to_save"] = ["lm_head"]


@broken("bias")
def biases(d: Draft) -> None:
    """The base's biases were trained beside the LoRA."""
    d.config["bias"] = "lora_only"


@broken("init")
def pissa(d: Draft) -> None:
    """Started from the base's own singular vectors, which were taken out of the base."""
    d.config["init_lora_weights"] = "pissa_niter_16"


@broken("variant")
def replicated_layers(d: Draft) -> None:
    """A base with layers repeated."""
    d.config["layer_replication"] = [[0, 2], [1, 2]]


@broken("init")
def unheard_of_start(d: Draft) -> None:
    """An initialisation that no one here has heard of."""
    d.config["init_lora_weights"] = "singular_start"


@broken("variant")
def unheard_of_variant(d: Draft) -> None:
    """A setting that no one here has heard of."""
    d.config["use_twisted_lora"] = True


@broken("keys")
def whole_embedding(d: Draft) -> None:
    """A whole embedding beside the LoRA."""
    d.tensors[f"base_model.model.{EMBEDDING}.weight"] = torch.zeros(d.embedding[::-1])


@broken("base-shape")
def resized_vocabulary(d: Draft) -> None:
    """An embedding of one token more, its tensors and configuration in order."""
    width, vocabulary = d.embedding
    _embed(d, (width, vocabulary + 1))


def _embed(d: Draft, shape: tuple[int, int]) -> None:
    width, vocabulary = shape
    d.tensors[f"base_model.model.{EMBEDDING}.lora_embedding_A"] = torch.ones(RANK, vocabulary) / 100
    d.tensors[f"base_model.model.{EMBEDDING}.lora_embedding_B"] = torch.ones(width, RANK) / 100
    d.config["target_modules"] = [*d.config["target_modules"], "embed_tokens"]


# -- factors and configuration that do not go together -------------------------------------------------------------


@broken("shapes")
def ranks_disagree(d: Draft) -> None:
    """A B of one column less than its A has rows."""
    key = d.keys("B")[0]
    d.tensors[key] = d.tensors[key][:, :-1]


@broken("shapes")
def rank_zero(d: Draft) -> None:
    """A pair of rank 0."""
    a, b = d.keys("A")[0], d.keys("B")[0]
    d.tensors[a], d.tensors[b] = d.tensors[a][:0], d.tensors[b][:, :0]


@broken("shapes")
def three_dimensions(d: Draft) -> None:
    """An A of three dimensions."""
    key = d.keys("A")[0]
    d.tensors[key] = d.tensors[key][None]


@broken("pairs")
def unpaired(d: Draft) -> None:
    """An A without its B."""
    del d.tensors[d.keys("B")[0]]


@broken("dtype")
def integers(d: Draft) -> None:
    """Factors of 8-bit integers, whose own scale is nowhere."""
    d.tensors = {key: (100 * tensor).to(torch.int8) for key, tensor in d.tensors.items()}


@broken("rank")
def other_rank_in_config(d: Draft) -> None:
    """The configuration says twice the tensors' rank, so that α/r has two meanings."""
    d.config["r"] = 2 * RANK


@broken("targets")
def untargeted(d: Draft) -> None:
    """The configuration targets other modules than the file holds."""
    d.config["target_modules"] = ["c_attn"]


@broken("alpha")
def no_scale(d: Draft) -> None:
    """α is 0."""
    d.config["lora_alpha"] = 0


@broken("pattern-form")
def endless_pattern(d: Draft) -> None:
    """A regular expression that would be matched for years."""
    d.config["alpha_pattern"] = {"([a-z._0-9]+)+!": 1}


# -- sound, though they do not look it -----------------------------------------------------------------------------


@broken(study="patterns")
def patterns(d: Draft) -> None:
    """One module has a rank and an α of its own."""
    key = d.keys("A")[0]
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    partner = key.replace("lora_A", "lora_B")
    d.tensors[key], d.tensors[partner] = d.tensors[key][:2], d.tensors[partner][:, :2]
    d.config |= {"rank_pattern": {module.replace(".", r"\."): 2}, "alpha_pattern": {module.replace(".", r"\."): 16}}


@broken(study="embeddings")
def embedding(d: Draft) -> None:
    """A LoRA on the embedding too, with the frozen embedding itself beside it, as peft saves it."""
    _embed(d, d.embedding)
    d.tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"] = torch.zeros(d.embedding[::-1])


@broken(study="eva")
def eva(d: Draft) -> None:
    """Initialised by EVA, which leaves the base as it is."""
    d.config["init_lora_weights"] = "eva"


@broken()
def prefix_doubled(d: Draft) -> None:
    """Wrapped twice by peft."""
    d.rename("base_model.model.model.", "base_model.model.base_model.model.model.")


@broken()
def no_prefix(d: Draft) -> None:
    """Names without what peft and transformers put before them."""
    d.rename("base_model.model.model.", "")


@broken(study="task-type")
def no_task_type(d: Draft) -> None:
    """It does not say for which task it is."""
    d.config["task_type"] = None


@broken()
def float64(d: Draft) -> None:
    """Factors in double precision."""
    d.tensors = {key: tensor.double() for key, tensor in d.tensors.items()}


@broken(name="<script>alert(1)<script>")
def script_in_its_name(d: Draft) -> None:
    """A name that a browser would run."""
    d.config["note"] = "the weights are sound; the name must be shown escaped"


@broken()
def script_in_its_card(d: Draft) -> None:
    """A card that a browser, or a renderer of formulas, would run."""
    d.card = "# Nice adapter\n\n<script>alert(document.cookie)</script> $\\href{javascript:alert(1)}{x}$\n"
