"""Models: loading, finding where to read and write, encoding prompts, recognising a model, proving that steering reaches."""

from safesteer.models.chat import EncodedPrompt, encode
from safesteer.models.context import check_lengths, encode_all
from safesteer.models.fingerprint import Fingerprint, fingerprint
from safesteer.models.layout import SITES, ModelLayout, Site, find_layout
from safesteer.models.loading import EMBEDDED, LoadedModel, load_model
from safesteer.models.messages import Conversation

__all__ = [
    "EMBEDDED",
    "SITES",
    "Conversation",
    "EncodedPrompt",
    "Fingerprint",
    "LoadedModel",
    "ModelLayout",
    "Site",
    "check_lengths",
    "encode",
    "encode_all",
    "find_layout",
    "fingerprint",
    "load_model",
]
