"""Where a decoder-only model can be read and written.

A layout names, for each block `l` of a model, the module whose output is read and changed at each site:

    residual[l]   the block: its output is the residual stream after it
    attention[l]  the attention module: its output before it joins the residual stream (SafeSteer, section 3)
    mlp[l]        the feed-forward module: likewise
    neurons[l]    the projection that ends the feed-forward module: its input is the neurons' activations, and column j of
                  its weight is what neuron j writes
    routers[l]    in a mixture of experts, whose neurons cannot be told apart: what chooses among the experts

Nothing is assumed about names beyond "attn", "attention", "mlp", ...: blocks are found as the module list as long as
the configuration says the model is deep. `check_blocks` proves that they carry one residual stream, once a pass and causally;
`safesteer.models.selftest` proves by numbers that steering reaches them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from safesteer.errors import UnsupportedModelError

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = get_args(Site)

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_MIXER = re.compile(r"mamba|conv", re.IGNORECASE)  # what stands in attention's place in hybrid models
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|experts|^fc2$", re.IGNORECASE)
_EXPERTS = re.compile(r"experts|moe|router", re.IGNORECASE)
_ROUTER = re.compile(r"(^|\.)(gate|router(\.layer)?)$")
_NOT_A_SITE = re.compile(r"norm|dropout", re.IGNORECASE)


@dataclass(frozen=True)
class ModelLayout:
    """The decoder, its blocks in order, and the module of each site (empty tuple: the site was not found).

    `decoder` is the innermost module that holds the blocks and receives `attention_mask` and `past_key_values`; `around` are the
    modules that hold it, the model first: a multimodal model gives its decoder embeddings, not token ids. A block that another
    stage of a pipeline holds is an `nn.Identity`, in every site.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    width: int
    neurons: tuple[nn.Module, ...] = ()
    routers: tuple[nn.Module, ...] = ()
    around: tuple[nn.Module, ...] = ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def here(self) -> tuple[int, ...]:
        """The blocks that this process holds: all, unless they are spread over the stages of a pipeline."""
        return tuple(layer for layer, block in enumerate(self.blocks) if not _elsewhere(block))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were found."""
        return tuple(site for site in SITES if self.modules(site))

    def modules(self, site: Site) -> tuple[nn.Module, ...]:
        """The module to hook in every block, for a site."""
        return {"residual": self.blocks, "attention": self.attention, "mlp": self.mlp}[site]

    def module(self, site: Site, layer: int) -> nn.Module:
        """The module to hook at `layer` (0-based). Raises `UnsupportedModelError` if the site was not found."""
        modules = self.modules(site)
        if not modules:
            kind = type(self.blocks[0]).__name__
            raise UnsupportedModelError(f"no {site} module was found in {kind}; use --site {' or '.join(self.sites)}")
        return modules[layer]

    def projection(self, layer: int) -> nn.Module:
        """The projection that ends the feed-forward module at `layer`. Raises `UnsupportedModelError` if there is none."""
        if not self.neurons:
            raise UnsupportedModelError(
                f"the feed-forward modules of {type(self.blocks[0]).__name__} end in no single projection (experts hold their "
                "neurons together), so neurons cannot be read or changed one by one"
            )
        return self.neurons[layer]


def written(projection: nn.Module) -> torch.Tensor:
    """fp32 `[width, neurons]`: what each neuron adds to the residual stream per unit of activation."""
    weight = projection.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise UnsupportedModelError(
            "the projection's weights are quantised; load the model without --load-4bit or --load-8bit"
        )
    columns = weight.detach().float()
    return columns.T if isinstance(projection, Conv1D) else columns


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states `[batch, tokens, width]` in a module's output, which is a tensor or a tuple that leads with one."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(hidden, torch.Tensor):
        raise UnsupportedModelError(f"a module returned {type(hidden).__name__} where hidden states were expected")
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """`output` with its hidden states replaced, in the same container."""
    if isinstance(output, torch.Tensor):
        return hidden
    return type(output)([hidden, *output[1:]]) if isinstance(output, list) else (hidden, *output[1:])


def text_config(model: Any) -> Any:
    """The configuration of the text decoder (of a multimodal model, its text part)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def encoder_decoder(kind: str) -> str:
    """The sentence that refuses one."""
    return f"{kind} is an encoder-decoder model; SafeSteer steers decoder-only models"


def find_layout(model: Any) -> ModelLayout:
    """Find blocks and sites of a causal language model.

    Raises `UnsupportedModelError` with one sentence that names what was not found.
    """
    kind = type(model).__name__
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(encoder_decoder(kind))
    if not isinstance(depth, int) or not isinstance(width, int):
        raise UnsupportedModelError(f"the configuration of {kind} names no num_hidden_layers and hidden_size")
    root: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = {
        start: [
            (parent, child)
            for parent in start.modules()
            for child in parent.children()
            if isinstance(child, nn.ModuleList) and _looks_like_blocks(child)
        ]
        for start in (root, model)
    }
    fitting = [one for found in lists.values() for one in found if len(one[1]) == depth]
    if not fitting and len(lists[root]) == 1:  # LongCat counts the two halves of each of its blocks
        fitting = lists[root]
    if not fitting:
        raise UnsupportedModelError(f"no list of {depth} decoder blocks was found in {kind}")
    parent, child = fitting[0]
    blocks = tuple(child)
    mlp = _site(blocks, _MLP)
    return ModelLayout(
        parent, blocks, _site(blocks, _ATTENTION, _MIXER), mlp, width, _projections(mlp, width), _routers(mlp, width),
        tuple(module for module in model.modules() if module is not parent and parent in set(module.modules())),
    )  # fmt: skip


PROBE, SHORT = 8, 6  # tokens of a text, and of its beginning
ALIKE = 0.1  # relative difference of two readings of one beginning: rounding stays far below, another reading far above


@torch.inference_mode()
def check_blocks(model: Any, layout: ModelLayout) -> None:
    """Run a short text, and its beginning through the decoder alone: is the residual stream what steering takes it for?

    Raises `UnsupportedModelError` where the model does not run on text alone, runs a block more than once a token, carries
    several residual streams, or reads a beginning otherwise when more follows.
    """
    kind = type(model).__name__
    seen: list[list[torch.Tensor]] = [[] for _ in layout.blocks]

    def keep(layer: int) -> Any:
        return lambda _module, _arguments, output: seen[layer].append(hidden_of(output))

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(layout.blocks)]
    try:
        embeddings = model.get_input_embeddings().weight
        ids = (torch.arange(PROBE, device=embeddings.device) * 7919 % max(2, embeddings.shape[0] - 1)).unsqueeze(0)
        model(input_ids=ids, use_cache=False)
        for states in seen:
            if len(states) != 1:
                times = "not at all" if not states else f"{len(states)} times a token"
                raise UnsupportedModelError(
                    f"{kind} runs its blocks {times}; SafeSteer steers models that run each once"
                )
            check_stream(states[0], (1, PROBE, layout.width), f"the blocks of {kind} put")
        whole = seen[-1].pop()[0, :SHORT].float()
        layout.decoder(input_ids=ids[:, :SHORT], use_cache=False)
        alone = seen[-1].pop()[0].float()
    except UnsupportedModelError:
        raise
    except Exception as error:  # of the model's own code
        raise UnsupportedModelError(
            f"{kind} does not run on text alone: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if float(((whole - alone).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-9)).median()) > ALIKE:
        raise UnsupportedModelError(
            f"{kind} reads the beginning of a text otherwise when more follows; SafeSteer steers causal decoders"
        )


def check_stream(hidden: torch.Tensor, shape: tuple[int, ...], who: str) -> None:
    """Raise `UnsupportedModelError` for hidden states of another shape than one residual stream has."""
    if tuple(hidden.shape) != shape:
        raise UnsupportedModelError(
            f"{who} out {list(hidden.shape)} where {list(shape)} was expected; "
            "SafeSteer steers models with one residual stream, one state a token"
        )


def _elsewhere(block: nn.Module) -> bool:
    return isinstance(block, nn.Identity)


def _looks_like_blocks(candidates: nn.ModuleList) -> bool:
    """Blocks hold submodules, with an attention among them in at least one; a list of norms or embeddings does not."""
    here = [
        [f"{n} {type(m).__name__}" for n, m in block.named_children()] for block in candidates if not _elsewhere(block)
    ]
    return all(here) and any(_ATTENTION.search(name) for names in here for name in names)


def _projections(mlp: tuple[nn.Module, ...], width: int) -> tuple[nn.Module, ...]:
    """The last projection to the model's width in each feed-forward module; none where a module holds experts."""
    found: list[nn.Module] = []
    for module in mlp:
        parts = list(module.named_modules())
        if any(_EXPERTS.search(f"{name} {type(part).__name__}") for name, part in parts):
            return ()
        ends = [part for _, part in parts if getattr(part, "out_features", getattr(part, "nf", None)) == width]
        if not ends:
            return ()
        found.append(ends[-1])
    return tuple(found)


def _routers(mlp: tuple[nn.Module, ...], width: int) -> tuple[nn.Module, ...]:
    """What scores experts `[experts, width]` in each feed-forward module; none where a module has none."""
    found: list[nn.Module] = []
    for module in mlp:
        named = [part for name, part in module.named_modules() if _ROUTER.search(name)]
        scoring = [part for part in named if getattr(getattr(part, "weight", None), "ndim", 0) == 2]
        if len(scoring) != 1 or scoring[0].weight.shape[1] != width:
            return ()
        found.append(scoring[0])
    return tuple(found)


def _site(blocks: tuple[nn.Module, ...], *patterns: re.Pattern[str]) -> tuple[nn.Module, ...]:
    """In each block, the one child whose name the first pattern that fits any finds; none where a block has several."""
    found: list[nn.Module] = []
    for block in blocks:
        if _elsewhere(block):
            found.append(block)
            continue
        children = [
            (name, module)
            for name, module in block.named_children()
            if not _NOT_A_SITE.search(f"{name} {type(module).__name__}")
        ]
        matches = next((m for p in patterns if (m := [module for name, module in children if p.search(name)])), [])
        if len(matches) != 1 or isinstance(matches[0], nn.ModuleList):
            return ()
        found.append(matches[0])
    return tuple(found)
