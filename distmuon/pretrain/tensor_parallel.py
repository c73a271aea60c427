"""Tensor parallelism by the plan that transformers has for a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PretrainedConfig

from distmuon.pretrain.errors import UserError

_WAY_OUT = "set parallel.tp to 1 and use parallel.dp_shard"

# The words of transformers' plans for what torch can do. A norm of attention heads sees those of its rank, along
# dimension 2 of (batch, tokens, heads, width); its gradient is a sum over the ranks.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def tensor_parallel_plan(model: nn.Module, config: PretrainedConfig, ranks: int) -> dict[str, str]:
    """Which module is split how.

    Args:
        model: A causal language model of transformers, not yet parallel; on any device, meta too.
        config: Its configuration.
        ranks: Processes of the ``tp`` dimension.

    Returns:
        Names of modules, and the word of transformers for how each is split.

    Raises:
        UserError: If transformers has no plan for the model, or one that torch's layers cannot follow, or if heads
            or widths do not divide.
    """
    known = f"parallel.tp is {ranks}, and model.type {config.model_type}"
    patterns = getattr(config, "base_model_tp_plan", None)
    if not patterns:
        raise UserError(f"{known} has no plan for tensor parallelism in transformers: {_WAY_OUT}.")
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters())
    plan: dict[str, str] = {}
    for pattern, word in patterns.items():
        expression = re.compile(re.escape(prefix + pattern).replace(r"\*", r"\d+"))
        names = [name for name in (*modules, *tensors) if expression.fullmatch(name)]
        if names and (word not in _STYLES or names[0] in tensors):
            raise UserError(f"{known} asks for {word!r} of {names[0]}, which this version cannot split: {_WAY_OUT}.")
        plan |= dict.fromkeys(names, word)
    language_model: Any = model
    head = language_model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not config.tie_word_embeddings and head.out_features % ranks == 0:
        plan |= {name: "colwise_gather_output" for name, module in modules.items() if module is head}
    _check_sizes(modules, plan, config, ranks)
    return plan


def apply_tensor_parallel(model: nn.Module, config: PretrainedConfig, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor on a mesh: split as `tensor_parallel_plan` says, or whole on each rank.

    Args:
        model: The model, the same on all ranks, on the device of the mesh; parameter names stay.
        config: Its configuration.
        mesh: The ``tp`` dimension.

    Raises:
        UserError: As `tensor_parallel_plan`.
    """
    plan = tensor_parallel_plan(model, config, mesh.size())
    shared = _shared_parameters(model)
    parallelize_module(model, mesh, {name: _STYLES[word]() for name, word in plan.items()})
    for name, module in list(model.named_modules()):
        if name not in plan and any(True for _ in module.parameters(recurse=False)):
            distribute_module(module, mesh, input_fn=_replicate_inputs, output_fn=_local_outputs)
    for first, *others in shared:
        for other in others:
            owner, _, key = other.rpartition(".")
            setattr(model.get_submodule(owner), key, model.get_parameter(first))


def _check_sizes(modules: dict[str, nn.Module], plan: dict[str, str], config: PretrainedConfig, ranks: int) -> None:
    sizes = {
        f"model.config.{key}": getattr(config, key, None) or ranks
        for key in ("num_attention_heads", "num_key_value_heads")
    }
    for name, word in plan.items():
        module = modules[name]
        if isinstance(module, nn.Linear):
            sizes[name] = module.out_features if word.startswith("colwise") else module.in_features
        elif not word.startswith("replicated"):
            raise UserError(
                f"parallel.tp is {ranks}, and {name} is a {type(module).__name__}, of which only Linear can be split: "
                f"{_WAY_OUT}."
            )
    for name, size in sizes.items():
        if size % ranks:
            raise UserError(
                f"parallel.tp is {ranks}, and {name} has {size} parts, which do not divide by it: set parallel.tp to a "
                f"divisor of {size}, or change the size."
            )


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """Names of the same parameter, where there are several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _replicate_inputs(module: nn.Module, inputs: tuple[object, ...], mesh: DeviceMesh) -> Any:
    return tuple(
        DTensor.from_local(value, mesh, [Replicate()], run_check=False)
        if isinstance(value, Tensor) and not isinstance(value, DTensor)
        else value
        for value in inputs
    )


def _local_outputs(module: nn.Module, outputs: object, mesh: DeviceMesh) -> Any:
    return outputs.to_local() if isinstance(outputs, DTensor) else outputs
