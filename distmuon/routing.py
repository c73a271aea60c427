"""Who gets Muon, who gets AdamW, and why."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from distmuon.matrices import Matrices, declare, unclear_axes
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.reading import WHOLE, Reading
from distmuon.presets import Preset, presets_of

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_OUTERMOST = _WRAPPERS | {"module"}
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HEAD_NAMES = frozenset(
    "lm_head head output output_head output_layer classifier score embed_out unembed unembedding".split()
)
_HEAD = "output head"
# Last part of the name of a parameter that belongs to no module type we know
_EMBEDDING_NAME = re.compile(r"(^|_)(embed|embeds|embedding|embeddings|emb|wte|wpe)(_|$)|(^|_)tokens?$")
# In the name of a parameter, or in that of the class that holds it: its first axis counts matrices
_EXPERT_NAME = re.compile(r"expert|(^|[._])moe([._]|$)", re.IGNORECASE)
_EXPERT_CLASS = re.compile(r"expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Route:
    """The decision for one parameter.

    Attributes:
        use_muon: Muon, else AdamW.
        reason: A few words for the report.
        reading: The matrices that Muon takes it for.
        preset: What is known of the module that holds it.
        doubt: Why it cannot be read without being declared, an error message; empty: it can.
        looks_fused: Whether its name says that it holds several matrices, and neither a preset nor the user how.
    """

    use_muon: bool
    reason: str
    reading: Reading = WHOLE
    preset: Preset | None = None
    doubt: str = ""
    looks_fused: bool = False

    @property
    def flatten(self) -> bool:
        """Whether all axes after the first are joined to one (convolutions)."""
        return self.reading.flatten

    @property
    def known_fused(self) -> bool:
        """Whether a preset says that several projections are in it."""
        return self.preset is not None and bool(self.preset.labels)


def clean_name(name: str) -> str:
    """Strip the prefixes that torch.compile, FSDP, activation checkpointing and DDP put into names.

    ``module`` is stripped at the front only, where DDP puts it.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def route_module(
    module: nn.Module,
    *,
    muon_names: Sequence[str] = (),
    adamw_names: Sequence[str] = (),
    matrices: Matrices = None,
    last_stage: bool = True,
) -> dict[str, Route]:
    """Route every parameter of a model by the modules that use it.

    A parameter that several modules share (a tied head) is an embedding or a head if any of them is.
    The user's globs come last and win.

    Args:
        module: The model, wrapped or not, on any device.
        muon_names: Globs of names that Muon takes, whatever the rules say.
        adamw_names: Globs of names that AdamW takes.
        matrices: What parameters are read as, see :class:`distmuon.Muon`.
        last_stage: Whether the model may end in a head that nothing but its place tells; not so in the middle of a
            pipeline.

    Returns:
        One route a parameter, under its clean name, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: if a glob matches nothing, two globs disagree, a parameter's matrix axes are not known, or two
            parameters have one clean name; and as :func:`distmuon.matrices.declare`.
    """
    module = _unwrapped(module)
    uses = _uses(module)
    heads = _heads(module, uses, last_stage=last_stage)
    params = _by_clean_name(module.named_parameters())
    routes = {
        name: _route_used(name, param, uses[id(param)], heads.get(id(param), "")) for name, param in params.items()
    }
    presets = presets_of({clean_name(path): found for path, found in module.named_modules(remove_duplicate=False)})
    for name in presets.keys() & routes.keys():
        routes[name] = replace(routes[name], preset=presets[name], doubt="")
    return declare(_apply_globs(routes, params, muon_names, adamw_names), params, matrices)


def route_named(
    named: Iterable[tuple[str, Tensor]],
    *,
    muon_names: Sequence[str] = (),
    adamw_names: Sequence[str] = (),
    matrices: Matrices = None,
) -> dict[str, Route]:
    """Route parameters of which only names and shapes are known.

    Args:
        named: ``(name, parameter)`` pairs, as ``module.named_parameters()`` gives them.
        muon_names: Globs of names that Muon takes.
        adamw_names: Globs of names that AdamW takes.
        matrices: What parameters are read as, by name globs; presets need modules.

    Returns:
        One route a parameter, under its clean name.

    Raises:
        ValueError: as :func:`route_module`.
    """
    params = _by_clean_name(named)
    routes = {name: route_by_name(name, param) for name, param in params.items()}
    return declare(_apply_globs(routes, params, muon_names, adamw_names), params, matrices, names_only=True)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile or activation checkpointing, whose outermost layers the rules look at."""
    children = dict(module.named_children())
    while len(children) == 1 and next(iter(children)) in _OUTERMOST and not [*module.parameters(recurse=False)]:
        (module,) = children.values()
        children = dict(module.named_children())
    return module


@dataclass(frozen=True)
class _Use:
    """One module that holds a parameter."""

    path: str
    module: nn.Module


def _uses(root: nn.Module) -> dict[int, list[_Use]]:
    uses: dict[int, list[_Use]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        for param in module.parameters(recurse=False):
            uses.setdefault(id(param), []).append(_Use(clean_name(path), module))
    return uses


def _heads(root: nn.Module, uses: dict[int, list[_Use]], *, last_stage: bool) -> dict[int, str]:
    """Identities of output-head weights, what maps features to tokens or classes, and what tells them."""
    heads: dict[int, str] = {}
    vocabularies: set[tuple[int, ...]] = set()
    for module in root.modules():
        if isinstance(module, nn.Embedding):
            vocabularies.add(tuple(module.weight.shape))
        getter = getattr(module, "get_output_embeddings", None)  # transformers' public accessor
        output = getter() if callable(getter) else None
        if isinstance(output, nn.Module):
            heads.update((id(param), _HEAD) for param in output.parameters())
    for identity, users in uses.items():
        for use in users:
            parts = _within_stage(root, use.path, uses)
            # Numbered blocks repeat; what stands outside them and maps to the vocabulary is the head
            if not isinstance(use.module, nn.Linear) or any(part.isdigit() for part in parts):
                continue
            rows, cols = use.module.weight.shape
            if parts[-1] in _HEAD_NAMES or (rows != cols and (rows, cols) in vocabularies):
                heads[identity] = _HEAD
    if last_stage:
        for param in _last_linear_of_sequential(_core(root)):
            heads.setdefault(id(param), f"{_HEAD}, as the last Linear of a Sequential")
    return heads


def _within_stage(root: nn.Module, path: str, uses: dict[int, list[_Use]]) -> list[str]:
    """The path of a layer without the number of the pipeline stage that holds it, in a list of stages.

    What several items of a list have is a layer of blocks, and keeps the number.
    """
    parts = path.split(".")
    if isinstance(root, nn.ModuleList) and len(parts) > 1:
        same = {use.path for users in uses.values() for use in users if use.path.split(".")[1:] == parts[1:]}
        if len(same) == 1:
            return parts[1:]
    return parts


def _core(root: nn.Module) -> nn.Module:
    """What holds all parameters: the model itself, or the one child that has any, as in a LightningModule."""
    trained = [child for child in root.children() if next(child.parameters(), None) is not None]
    if len(trained) == 1 and next(root.parameters(recurse=False), None) is None and not isinstance(root, nn.Sequential):
        return _core(trained[0])
    return root


def _last_linear_of_sequential(root: nn.Module) -> Iterator[Tensor]:
    if isinstance(root, nn.Sequential):
        linears = [child for child in root if isinstance(child, nn.Linear)]
        if len(linears) > 1:
            yield from linears[-1].parameters()


def _route_used(name: str, param: Tensor, users: Sequence[_Use], head: str) -> Route:
    tied = " (tied)" if len(users) > 1 else ""
    modules = [use.module for use in users]
    if param.ndim < 2:
        return Route(False, "vector or scalar")
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
        return Route(False, f"embedding{tied}")
    if head:
        return Route(False, f"{head}{tied}")
    if any(isinstance(module, _NORMS) for module in modules):
        return Route(False, "norm")
    convolution = next((module for module in modules if isinstance(module, _CONVOLUTIONS)), None)
    if convolution is not None:
        if convolution.groups > 1:
            depthwise = convolution.groups == convolution.in_channels
            return Route(False, "depthwise convolution" if depthwise else "grouped convolution")
        return _by_shape(name, param, "convolution", flatten=True)
    if any(isinstance(module, nn.Linear | nn.Bilinear) for module in modules):
        return replace(_by_shape(name, param, "hidden matrix"), doubt="")
    classes = [kind.__name__ for module in modules for kind in type(module).__mro__]
    return route_by_name(name, param, stacked=any(map(_EXPERT_CLASS.search, classes)))


def route_by_name(name: str, param: Tensor, *, stacked: bool = False) -> Route:
    """What the rules say of a parameter of which name and shape are known.

    Args:
        name: Its clean name.
        param: The parameter.
        stacked: Whether it is known that the first of three axes counts matrices.
    """
    parts = name.split(".")
    if param.ndim < 2:
        return Route(False, "vector or scalar")
    if parts[-1].endswith("bias") and param.ndim == 2:
        return Route(False, f"stack of biases ({parts[-1]})")
    owner = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
    if _EMBEDDING_NAME.search(owner):
        return Route(False, f"named like an embedding ({owner})")
    if owner in _HEAD_NAMES and not any(part.isdigit() for part in parts):
        return Route(False, f"named like an output head ({owner})")
    route = _by_shape(name, param, "hidden matrix")
    return replace(route, doubt="") if param.ndim == 3 and (stacked or named_like_experts(name)) else route


def named_like_experts(name: str) -> bool:
    """Whether the name of a parameter of three axes says that the first one counts matrices."""
    return bool(_EXPERT_NAME.search(name))


def _by_shape(name: str, param: Tensor, what: str, *, flatten: bool = False) -> Route:
    if param.numel() == 0:
        return Route(False, "empty")
    if param.ndim > 3 and not flatten:
        return Route(True, what, doubt=unclear_axes(name, param))
    spec = matrix_spec(name, param.shape, flatten=flatten)
    if spec.degenerate:
        return Route(False, f"degenerate matrix ({spec.rows} x {spec.cols})")
    doubt = unclear_axes(name, param) if param.ndim == 3 and not flatten else ""
    return Route(True, what if spec.count == 1 else f"stack of {spec.count} matrices", Reading(flatten), doubt=doubt)


def _apply_globs(
    routes: dict[str, Route],
    params: dict[str, Tensor],
    muon_names: Sequence[str],
    adamw_names: Sequence[str],
) -> dict[str, Route]:
    chosen = {glob: fnmatch.filter(routes, glob) for glob in (*muon_names, *adamw_names)}
    for glob, matches in chosen.items():
        if not matches:
            near = ", ".join(list(routes)[:3])
            raise ValueError(f"the glob {glob!r} matches no parameter; names look like {near}.")
    by_muon = {name: glob for glob in muon_names for name in chosen[glob]}
    by_adamw = {name: glob for glob in adamw_names for name in chosen[glob]}
    for name in by_muon.keys() & by_adamw.keys():
        raise ValueError(
            f"parameter {name!r} matches {by_muon[name]!r} in muon_names and {by_adamw[name]!r} in "
            "adamw_names: make one of the globs narrower."
        )
    routes = dict(routes)
    for name, glob in by_adamw.items():
        routes[name] = Route(False, f"adamw_names {glob!r}")
    for name, glob in by_muon.items():
        ruled = routes[name]
        if not ruled.use_muon and ("embedding" in ruled.reason or "head" in ruled.reason):
            warnings.warn(
                f"{name!r} goes to Muon by muon_names={glob!r}, though the rules say {ruled.reason}: Muon is "
                "for hidden matrices, and embeddings and heads usually train better with AdamW.",
                stacklevel=4,
            )
        flatten = ruled.reading.flatten or params[name].ndim > 3
        matrix_spec(name, params[name].shape, flatten=flatten)
        doubt = "" if flatten else ruled.doubt
        routes[name] = replace(
            ruled, use_muon=True, reason=f"muon_names {glob!r}", reading=Reading(flatten), doubt=doubt
        )
    return routes


def _by_clean_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    raw_names: dict[str, str] = {}
    for raw_name, param in named:
        name = clean_name(raw_name)
        if name in params:
            raise ValueError(
                f"the parameters {raw_names[name]!r} and {raw_name!r} are both {name!r} without what DDP, FSDP, "
                "torch.compile and activation checkpointing put into names: call one of the modules otherwise."
            )
        params[name], raw_names[name] = param, raw_name
    return params
