"""Other people's adapters on the Hugging Face Hub: which there are for a base, which may be used, and their files.

    discover("meta-llama/Llama-3.1-8B-Instruct")        # every adapter of a base, with what its card says
    fetch("ann/adapter")                                # one adapter's files, verified, in the Hub client's cache
    open_all("meta-llama/Llama-3.1-8B-Instruct")        # all of them, screened before their weights are downloaded

The endpoint is read from HF_ENDPOINT at every call. Only a configuration, safetensors weights and a card are fetched.
"""

from workbench.hub.client import Patience, hub_api, patiently, said
from workbench.hub.distant import Distant
from workbench.hub.files import fetch
from workbench.hub.listing import ALIASES, Repo, discover
from workbench.hub.opening import Survey, explain_one, survey

__all__ = [
    "ALIASES",
    "Distant",
    "Patience",
    "Repo",
    "Survey",
    "discover",
    "explain_one",
    "fetch",
    "hub_api",
    "patiently",
    "said",
    "survey",
]
