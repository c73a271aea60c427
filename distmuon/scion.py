"""Scion: every parameter takes steps of unit size in a norm of its own."""

from __future__ import annotations

import fnmatch
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distmuon.comm.group import replicas_of
from distmuon.groups import Group, as_groups
from distmuon.muon import Muon
from distmuon.routing import Route, clean_name


class Scion(Muon):
    """Scion: orthogonalized steps for hidden matrices, and for all else steps of unit size in other norms.

    After Pethick et al., arXiv 2502.07529, and https://github.com/LIONS-EPFL/scion.

    Constrained it is ``W <- (1 - lr) * W - lr * radius * U``, by which weights of a norm of at most ``radius`` keep to
    that; in the groups of this class that is a rate of ``lr * radius`` and a decay of ``1 / radius``. Unconstrained
    there is no decay. ``U`` is made of the momentum average, by kind (:mod:`distmuon.numerics.lmo`):

    ====================================  ==================  ===================================================
    kind                                  radius              U
    ====================================  ==================  ===================================================
    hidden ``(m, n)``                     radius_hidden       ``sqrt(m / n)`` times the polar factor
    the same, of ``input_names``          radius_hidden       ``max(1, sqrt(m / n))`` times the polar factor
    convolutions, kernels of k positions  radius_hidden       ``sqrt(m / n) / k`` times that of ``(m, n * k)``
    heads, embeddings tied to one         radius_rest         ``sign``
    other embeddings                      radius_embedding    ``col_norm``: of root mean square 1 for each token
    biases, gains of norms, all vectors   radius_vectors      ``bias_rms``
    depthwise convolutions, single rows   radius_hidden       ``row_norm``: of a row, what the spectral norm gives
    single columns                        radius_hidden       ``col_norm``: of a column, the same
    ====================================  ==================  ===================================================

    The paper's networks have no gains of norms; Scion's examples with such (airbench, DeiT) take ``bias_rms`` in the
    radius of hidden layers, and so does this. Weights are left as they are: Scion's own ``init()``, which puts them on
    the spheres of the constraint, and its activations times ``sqrt(2)`` belong to the model, and its examples that
    train GPTs do without the former.

    Args:
        model: A module, wrapped or not.
        lr: Of all parameters; times a radius it is the rate of their group.
        momentum: Weight of the past in the momentum average; Scion's own ``momentum`` is one minus this.
        radius_hidden: Of hidden matrices; 50 is that of the paper's GPT.
        radius_rest: Of what takes signs; 3000 is that of the tied embedding of the paper's GPT.
        radius_embedding: Of embeddings that are not tied to a head; None: a third of ``radius_hidden``, as in the GPT
            without tied weights of Scion's examples.
        radius_vectors: Of biases and gains; None: ``radius_hidden``.
        constrained: Whether weights decay.
        input_names: Globs of names of layers that data enters, other than embeddings.
        head_names: Globs of names of what else is an output head, as an embedding that the model multiplies with.
        **kwargs: Other arguments of :class:`distmuon.Muon`. ``adamw_names`` stay on AdamW, with ``adamw_lr``.

    Raises:
        TypeError: as :class:`distmuon.Muon`, and for what is no module.
        ValueError: as :class:`distmuon.Muon`; for a radius that is not positive, and a glob that matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 2**-12,
        momentum: float = 0.9,
        *,
        radius_hidden: float = 50.0,
        radius_rest: float = 3000.0,
        radius_embedding: float | None = None,
        radius_vectors: float | None = None,
        constrained: bool = True,
        input_names: Sequence[str] = (),
        head_names: Sequence[str] = (),
        muon_names: Sequence[str] = (),
        adamw_names: Sequence[str] = (),
        matrices: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Scion takes the model itself, not a {type(model).__name__}: which norm a parameter has is told by "
                "its module. Give distmuon.Muon groups with use_muon=False and lmo to choose by hand."
            )
        if "weight_decay" in kwargs:
            raise ValueError(
                f"weight_decay={kwargs['weight_decay']}: the decay of Scion is one over the radius of each kind, and "
                "constrained=False has none."
            )
        _check_settings(
            lr=lr,
            radius_hidden=radius_hidden,
            radius_rest=radius_rest,
            radius_embedding=radius_embedding,
            radius_vectors=radius_vectors,
            input_names=input_names,
            head_names=head_names,
        )
        radii = {
            "hidden": radius_hidden,
            "sign": radius_rest,
            "embedding": radius_hidden / 3 if radius_embedding is None else radius_embedding,
            "vector": radius_hidden if radius_vectors is None else radius_vectors,
        }
        groups, routes = as_groups(model, muon_names=muon_names, adamw_names=adamw_names, matrices=matrices)
        inputs, heads = (_chosen(globs, routes) for globs in (input_names, head_names))
        heads |= {name for name in _multiplied(model) if "embedding" in routes[name].reason}
        mesh = {} if kwargs.get("mesh") is not None else {"mesh": replicas_of(model)}
        super().__init__(
            _split(groups, routes, radii, inputs, heads, lr=lr, constrained=constrained),
            lr,
            0.0,
            momentum,
            **{"nesterov": False, "adjust_lr_fn": "spectral", **kwargs, **mesh},
        )
        self._routes.update(routes)


def _check_settings(**settings: Any) -> None:
    """Refuse rates, radii and globs of a wrong kind, and radii that are not positive, by their names."""
    for key, value in settings.items():
        if key.endswith("_names"):
            if isinstance(value, str):
                raise TypeError(f"{key}={value!r} is a single string: it takes a list of globs, [{value!r}].")
        elif value is not None or key == "lr":
            if not isinstance(value, Tensor | numbers.Real):
                raise TypeError(f"{key}={value!r} (a {type(value).__name__}): it takes a number.")
            if key != "lr" and not 0 < float(value) < math.inf:
                raise ValueError(f"{key}={value}: it must be above 0.")


def _chosen(globs: Sequence[str], routes: Mapping[str, Route]) -> set[str]:
    """Names that any of the globs matches."""
    found = set()
    for glob in globs:
        matches = fnmatch.filter(routes, glob)
        if not matches:
            raise ValueError(f"the glob {glob!r} matches no parameter; names look like {', '.join(list(routes)[:3])}.")
        found.update(matches)
    return found


def _multiplied(model: nn.Module) -> set[str]:
    """Names of what features are multiplied with, the weights of linear layers."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    getter = getattr(model, "get_output_embeddings", None)  # transformers' public accessor
    output = getter() if callable(getter) else None
    if isinstance(output, nn.Module):
        shared.update(id(param) for param in output.parameters())
    return {clean_name(name) for name, param in model.named_parameters() if id(param) in shared}


def _split(
    groups: Sequence[Group],
    routes: Mapping[str, Route],
    radii: Mapping[str, float],
    inputs: set[str],
    heads: set[str],
    *,
    lr: float | Tensor,
    constrained: bool,
) -> list[Group]:
    """Groups of one norm and radius each, of those of Muon and AdamW."""
    found: dict[tuple[Any, ...], Group] = {}
    for number, group in enumerate(groups):
        for name, param in group["params"]:
            keys, radius = _rule(group, name, param, routes[name], radii, name in inputs, name in heads)
            if radius is not None:
                keys = {**keys, "lr": lr * radius, "weight_decay": 1 / radius if constrained else 0.0}
            like = (number, radius, *((key, value) for key, value in keys.items() if key != "lr"))
            members = {**group, "params": [], **keys}
            found.setdefault(like, members)["params"].append((name, param))
    return list(found.values())


def _rule(
    group: Group, name: str, param: Tensor, route: Route, radii: Mapping[str, float], first: bool, head: bool
) -> tuple[dict[str, Any], float | None]:
    """The group keys of a parameter, and its radius; None on AdamW."""
    if group["use_muon"]:
        positions = math.prod(param.shape[2:]) if group["flatten"] else 1
        keys = {"adjust_lr_fn": "original"} if first else {}
        # the scale of a flattened convolution has the root of the kernel's positions already
        return {**keys, "name": f"{group['name']}{', input' if first else ''}"}, radii["hidden"] / positions**0.5
    if route.reason.startswith("adamw_names"):
        return {}, None
    if param.ndim < 2 or route.reason == "norm" or route.reason.startswith("stack of biases"):
        return {"lmo": "bias_rms", "name": "vectors"}, radii["vector"]
    if "embedding" in route.reason and not head:
        return {"lmo": "col_norm", "transposed": True, "name": "embeddings"}, radii["embedding"]
    if "embedding" in route.reason or "output head" in route.reason or head:
        return {"lmo": "sign", "name": "heads"}, radii["sign"]
    if "convolution" in route.reason:
        return {"lmo": "row_norm", "flatten": True, "name": "kernels"}, radii["hidden"]
    lmo = "row_norm" if param.shape[-2] == 1 else "col_norm"
    return {"lmo": lmo, "flatten": param.ndim > 3, "name": "single rows and columns"}, radii["hidden"]
