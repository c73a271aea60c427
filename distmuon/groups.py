"""From what the user hands over (a module, names, groups) to checked parameter groups."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from distmuon.comm.layout import check_parameter
from distmuon.matrices import Matrices, blocks_between, blocks_in, unclear_axes
from distmuon.numerics.lmo import norm_axes
from distmuon.numerics.update import resolve_lr_scale
from distmuon.options import Options
from distmuon.plan.reading import READING_KEYS, WHOLE, Reading
from distmuon.routing import Route, clean_name, named_like_experts, route_by_name, route_module, route_named
from distmuon.values import FAMILY_KEYS, check_values

Params: TypeAlias = "nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]"
Group: TypeAlias = dict[str, Any]
Router: TypeAlias = Callable[..., dict[str, Route]]

GROUP_KEYS = (
    "params",
    "use_muon",
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "ns_steps",
    "eps",
    "adjust_lr_fn",
    *FAMILY_KEYS,
    "block_step",
    *READING_KEYS,
    "betas",
    "lmo",
    "name",
)
# Written by torch itself: names of the parameters, and the base rate that schedulers restart from
_TORCH_KEYS = ("param_names", "initial_lr")


def as_groups(
    params: Params,
    *,
    muon_names: Sequence[str],
    adamw_names: Sequence[str],
    matrices: Matrices = None,
    last_stage: bool = True,
) -> tuple[list[Group], dict[str, Route]]:
    """Turn the ``params`` argument into groups that all say ``use_muon``.

    Args:
        params: A module, ``(name, parameter)`` pairs, or groups. Modules and pairs are routed; groups
            decide by ``use_muon`` (or dion's ``algorithm``), unless they hold pairs.
        muon_names: See :func:`distmuon.routing.route_module`.
        adamw_names: See :func:`distmuon.routing.route_module`.
        matrices: See :class:`distmuon.Muon`.
        last_stage: See :func:`distmuon.routing.route_module`.

    Returns:
        The groups, and the routes of the parameters that were routed.

    Raises:
        TypeError: for anything else.
        ValueError: for bare parameters, which say neither what they are nor what they are called.
    """
    for key, globs in (("muon_names", muon_names), ("adamw_names", adamw_names)):
        if isinstance(globs, str):
            raise TypeError(f"{key}={globs!r} is a single string: it takes a list of globs, [{globs!r}].")
    if isinstance(params, nn.Module):
        refuse_flattened(params)
        routes = route_module(
            params, muon_names=muon_names, adamw_names=adamw_names, matrices=matrices, last_stage=last_stage
        )
        return split_by_route(list(params.named_parameters()), routes, {}), routes
    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor: pass a module, named parameters, or groups.")
    items: list[Any] = list(params)
    if not items:
        raise ValueError("params is empty: pass a module, named parameters, or groups.")
    if all(isinstance(item, tuple) for item in items):
        routes = route_named(items, muon_names=muon_names, adamw_names=adamw_names, matrices=matrices)
        return split_by_route(items, routes, {}), routes
    if muon_names or adamw_names or matrices is not None:
        raise ValueError(
            "muon_names, adamw_names and matrices choose among names: pass a module or named parameters, or give the "
            "groups keys of their own."
        )
    if all(isinstance(item, Tensor) for item in items):
        items = [{"params": items}]
    if not all(isinstance(item, Mapping) for item in items):
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(f"params mixes {', '.join(kinds)}: pass a module, named parameters, or groups.")
    groups: list[Group] = []
    found: dict[str, Route] = {}
    for index, item in enumerate(items):
        expanded, routes = expand_group(dict(item), f"group {index}")
        groups.extend(expanded)
        found.update(routes)
    return groups, found


def refuse_flattened(model: nn.Module) -> None:
    """Refuse FSDP1, whose parameters are slices of flattened ones, so that no rank knows its matrices.

    Raises:
        TypeError: naming the module.
    """
    for name, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise TypeError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1), which flattens matrices: shard by "
                "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate, ModelParallelStrategy in "
                "Lightning) instead."
            )


def expand_group(group: Group, label: str) -> tuple[list[Group], dict[str, Route]]:
    """Check the keys of one group and settle who updates it.

    A group of named parameters that does not say ``use_muon`` is routed by name and may come back as
    several groups.

    Args:
        group: As the user wrote it.
        label: What to call it in messages.

    Returns:
        Groups that say ``use_muon``, and the routes of parameters that were routed.

    Raises:
        ValueError: for an unknown key, a contradiction, or a group of bare parameters without
            ``use_muon``.
    """
    label = f"{label} ({group['name']})" if group.get("name") else label
    algorithm = group.pop("algorithm", None)
    for key in group:
        if key not in GROUP_KEYS + _TORCH_KEYS:
            near = difflib.get_close_matches(key, (*GROUP_KEYS, "algorithm"), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(GROUP_KEYS)}."
            raise ValueError(f"{label} has the unknown key {key!r}: {hint}")
    if "params" not in group:
        raise ValueError(f"{label} has no 'params'.")
    params = group["params"]
    group["params"] = [params] if isinstance(params, Tensor) else list(params)
    if not group["params"]:
        raise ValueError(f"{label} has no parameters: leave the group out.")
    if algorithm is not None:
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"{label} has algorithm={algorithm!r}: it is 'muon' or 'adamw'.")
        if group.setdefault("use_muon", algorithm == "muon") != (algorithm == "muon"):
            raise ValueError(f"{label} says use_muon={group['use_muon']} and algorithm={algorithm!r}: keep one.")
    if "use_muon" in group:
        if not isinstance(group["use_muon"], bool):
            raise ValueError(f"{label} has use_muon={group['use_muon']!r}: it is True or False.")
        if group["use_muon"]:
            _warn_of_embeddings(group, label)
            _check_axes(group, label)
        return [group], {}
    if all(isinstance(param, tuple) for param in group["params"]):
        declared = {key: group.pop(key) for key in READING_KEYS if key in group}
        routes = route_named(group["params"], matrices={"*": declared} if declared else None)
        return split_by_route(group["params"], routes, group), routes
    raise ValueError(
        f"{label} holds bare parameters and does not say use_muon: set use_muon=True for hidden matrices and "
        "False for embeddings, heads, norms and biases, or pass the module and let the rules decide (the Trainer of "
        "transformers does so with distmuon.integrations.transformers.MuonFactory in place of this class)."
    )


def split_by_route(named: Sequence[tuple[str, Tensor]], routes: Mapping[str, Route], template: Group) -> list[Group]:
    """One group for whatever is read alike, and one for what AdamW takes.

    Whole matrices come first, then convolutions, then other readings as they appear, and AdamW last.
    """
    convolution = Reading(flatten=True)
    members: dict[Reading | None, list[tuple[str, Tensor]]] = {WHOLE: [], convolution: []}
    for raw_name, param in named:
        name = clean_name(raw_name)
        route = routes[name]
        members.setdefault(route.reading if route.use_muon else None, []).append((name, param))
    members[None] = members.pop(None, [])
    labels = {WHOLE: "muon", convolution: "muon_conv", None: "adamw"}
    groups = []
    for reading, found in members.items():
        if found:
            # other readings are called after the module that holds the first of them
            label = labels.get(reading) or f"muon_{found[0][0].removesuffix('.weight').rpartition('.')[2]}"
            group = {**template, "params": found, "use_muon": reading is not None, **(reading or WHOLE).keys}
            groups.append({**group, "name": template.get("name") or label})
    return groups


def check_group(group: Group, label: str, options: Options) -> None:
    """Check the values of a complete group and the parameters in it.

    Args:
        group: With every key filled in.
        label: What to call it in messages.
        options: Of the optimizer.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a parameter that cannot be optimized.
    """
    label = f"{label} ({group['name']})" if group.get("name") else label
    check_values(group, label, options)
    try:
        Reading.of(group)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from None
    names = group_names(group, label)
    for name, param in zip(names, bare_params(group), strict=True):
        if not isinstance(param, Tensor):
            raise TypeError(f"{label} holds a {type(param).__name__} where parameters are wanted.")
        check_parameter(name, param)
        if group["use_muon"]:
            blocks_in(group, name, param)
            if group["block_period"] > 1:
                blocks_between(group, name, param)
        elif group["lmo"] is not None:
            _check_lmo(group, label, name, param.ndim)


def follow_cycled_betas(groups: Sequence[Group]) -> None:
    """Take for the momentum of matrices what OneCycleLR and CyclicLR wrote to ``betas`` since the last step.

    They cycle the first of ``betas`` where an optimizer has any, and ``momentum`` only where it has none. What was
    followed is a key of the group, and so of the state dict: between two of their steps a momentum set by hand stays,
    in a resumed run too.
    """
    for group in groups:
        averages = group["use_muon"] or group["lmo"] is not None
        if averages and "max_momentum" in group and group.get("followed_beta") != group["betas"][0]:
            group["momentum"] = group["followed_beta"] = group["betas"][0]


def check_loaded(groups: Sequence[Group], options: Options) -> None:
    """Refuse a state whose groups ask for an iteration that the optimizer's engine does not run.

    Raises:
        ValueError: naming the group.
    """
    for index, group in enumerate(groups):
        if group["use_muon"]:
            try:
                options.request(group)
            except ValueError as error:
                raise ValueError(f"group {index} of the loaded state: {error}") from None


def fill_defaults(group: Group, defaults: Mapping[str, Any], options: Options, label: str) -> None:
    """Complete a group with the optimizer's settings.

    Args:
        group: One that says ``use_muon``; written.
        defaults: Of Muon groups.
        options: Of the optimizer.
        label: What to call the group in messages.

    Raises:
        ValueError: for an AdamW group that has no learning rate and can take none, and an lmo group that has none.
    """
    if not group["use_muon"]:
        if group.get("lmo") is not None and "lr" not in group:
            raise ValueError(
                f"{label} has lmo={group['lmo']!r} and no learning rate: lr alone is the size of its steps, so that "
                "neither that of the matrices nor that of AdamW serves; give the group its own, as distmuon.Scion does."
            )
        if "lr" not in group:
            group["lr"] = _adamw_lr(defaults, options, label)
        group.setdefault("weight_decay", options.adamw_weight_decay)
        group.setdefault("eps", options.adamw_eps)
    for key, value in defaults.items():
        if key in GROUP_KEYS:  # torch adds keys of its own when it loads a state dict
            group.setdefault(key, value)


def group_names(group: Group, label: str) -> list[str]:
    """Names of a group's parameters, made up from ``label`` where none were given."""
    if group["params"] and isinstance(group["params"][0], tuple):
        return [clean_name(name) for name, _ in group["params"]]
    names = group.get("param_names")
    if names:
        if len(names) != len(group["params"]):
            raise ValueError(
                f"{label} has {len(group['params'])} parameters and {len(names)} param_names: add parameters by "
                "add_param_group, or extend both lists."
            )
        return [clean_name(name) for name in names]
    return [f"{label}, parameter {index}" for index in range(len(group["params"]))]


def bare_params(group: Group) -> list[Tensor]:
    """The parameters of a group without their names."""
    return [param[1] if isinstance(param, tuple) else param for param in group["params"]]


def check_disjoint(groups: Sequence[Group]) -> None:
    """Refuse a parameter that stands in two groups, or twice in one.

    Raises:
        ValueError: naming the parameter and both groups.
    """
    seen: dict[int, str] = {}
    for index, group in enumerate(groups):
        label = f"group {index}"
        for name, param in zip(group_names(group, label), bare_params(group), strict=True):
            if id(param) in seen:
                raise ValueError(
                    f"parameter {name!r} is in {seen[id(param)]} and again in {label}: keep it in one of them "
                    "(a tied weight counts once)."
                )
            seen[id(param)] = label


def _adamw_lr(defaults: Mapping[str, Any], options: Options, label: str) -> float | Tensor:
    if options.adamw_lr is not None:
        return options.adamw_lr
    scale = resolve_lr_scale(defaults["adjust_lr_fn"])
    if scale == "match_rms_adamw":
        lr: float | Tensor = defaults["lr"]
        return lr
    raise ValueError(
        f"{label} takes AdamW and has no learning rate: with adjust_lr_fn={scale!r} the rate of the matrices "
        "does not suit AdamW. Pass adamw_lr (3e-4 is common), or adjust_lr_fn='match_rms_adamw', with which "
        "one lr, that of AdamW, serves both."
    )


def _check_lmo(group: Group, label: str, name: str, ndim: int) -> None:
    """Refuse a parameter that the oracle of its group is not of, and readings that mean nothing to oracles."""
    lmo, flatten = group["lmo"], group["flatten"]
    for key in ("split_sizes", "num_heads", "interleaved"):
        if group[key]:
            raise ValueError(f"{label} has lmo={lmo!r} and {key}={group[key]!r}, which is for matrices on Muon.")
    try:
        norm_axes(lmo, ndim, flatten=flatten, transposed=group["transposed"])
    except ValueError as error:
        raise ValueError(f"parameter {name!r} in {label} {error}") from None
    if ndim > 3 and not flatten and lmo != "bias_rms":
        raise ValueError(
            f"parameter {name!r} in {label} has {ndim} axes, and lmo={lmo!r} is of matrices: set flatten=True to take "
            "it as a convolution (out, in * kernel)."
        )


def _check_axes(group: Group, label: str) -> None:
    """Refuse to guess what three axes mean, unless the group or the name of the parameter says it."""
    if "flatten" in group or group.get("transposed"):
        return
    for name, param in zip(group_names(group, label), bare_params(group), strict=True):
        if isinstance(param, Tensor) and param.ndim == 3 and not named_like_experts(name):
            raise ValueError(unclear_axes(name, param))


def _warn_of_embeddings(group: Group, label: str) -> None:
    if not isinstance(group["params"][0], tuple):
        return
    for raw_name, param in group["params"]:
        name = clean_name(raw_name)
        route = route_by_name(name, param)
        if param.ndim in (2, 3) and not route.use_muon and route.reason.startswith("named like"):
            warnings.warn(
                f"{label} puts {name!r} on Muon, though it is {route.reason}: Muon is for hidden matrices, and "
                "embeddings and heads usually train better with AdamW.",
                stacklevel=5,
            )
