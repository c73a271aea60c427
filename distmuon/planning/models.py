"""Which parameters a model has: shapes and routes, from a model that is built without weights."""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distmuon.groups import as_groups
from distmuon.matrices import Matrices, blocks_in
from distmuon.plan.blocks import Block
from distmuon.plan.matrices import MatrixSpec
from distmuon.usage import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
# Where configurations of transformers keep the number of experts
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model.

    Attributes:
        name: Its name.
        shape: Its global shape.
        group: Index of its group, as :class:`distmuon.Muon` makes them of a module.
        blocks: The matrices in it, in one block or several; none: AdamW takes it.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    blocks: tuple[Block, ...]

    @property
    def on_muon(self) -> bool:
        """Whether it holds matrices."""
        return bool(self.blocks)

    @property
    def specs(self) -> tuple[MatrixSpec, ...]:
        """The matrices of its blocks."""
        return tuple(block.matrices for block in self.blocks)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def count(self) -> int:
        """How many matrices it holds."""
        return sum(spec.count for spec in self.specs)

    @property
    def stacked(self) -> bool:
        """Whether its first axis counts matrices, as that of experts does."""
        return len(self.shape) == 3 and any(spec.count > 1 for spec in self.specs)


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        name: What to call it.
        parameters: Group by group.
        active: Parameters that one token goes through, token embeddings left out unless they are the head too.
        optim: Arguments of :class:`distmuon.Muon` that a trainer's config gives.
    """

    name: str
    parameters: tuple[Parameter, ...]
    active: int
    optim: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def on_muon(self) -> tuple[Parameter, ...]:
        """The parameters that hold matrices."""
        return tuple(parameter for parameter in self.parameters if parameter.on_muon)


def builtin_names() -> tuple[str, ...]:
    """Names of the models whose shapes come with the package."""
    return tuple(sorted(path.stem for path in _BUILTIN.glob("*.json")))


def load_model(text: str, matrices: Matrices = None) -> Model:
    """Build a model on the meta device.

    Args:
        text: A trainer's config (YAML), a transformers config (a JSON file, or a folder that has a config.json), or
            one of :func:`builtin_names`.
        matrices: As :class:`distmuon.Muon` takes it; None: as a trainer's config says, or whole.

    Raises:
        UsageError: if there is no such model, or transformers cannot build it.
    """
    path = pathlib.Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _of_trainer(path, matrices)
    builtin = _BUILTIN / f"{text}.json"
    if builtin.exists():
        return _of_json(builtin, text, matrices)
    if path.is_dir():
        path /= "config.json"
        if not path.exists():
            raise UsageError(
                f"--model {text}: the folder {text} has no config.json: give the folder of a transformers model."
            )
    if path.suffix == ".json":
        return _of_json(path, path.parent.name if path.name == "config.json" else path.stem, matrices)
    near = difflib.get_close_matches(text, builtin_names(), n=1)
    advice = f"did you mean {near[0]}?" if near else f"the built-in ones are {', '.join(builtin_names())}."
    raise UsageError(
        f"--model {text} is no trainer config (.yaml), no transformers config (.json or its folder) and no built-in "
        f"model: {advice}"
    )


def of_module(
    name: str, model: nn.Module, *, experts: int = 0, chosen: int = 0, optim: Mapping[str, Any] | None = None
) -> Model:
    """The parameters of a module, routed as :class:`distmuon.Muon` routes them.

    Args:
        name: What to call the model.
        model: On any device.
        experts: Experts of a layer; 0: it has none.
        chosen: Experts that a token goes through.
        optim: Arguments of the optimizer.
    """
    optim = optim or {}
    groups, _ = as_groups(model, muon_names=(), adamw_names=(), matrices=optim.get("matrices"))
    parameters = []
    for index, group in enumerate(groups):
        for parameter_name, tensor in group["params"]:
            shape = tuple(tensor.shape)
            blocks = blocks_in(group, parameter_name, tensor) if group["use_muon"] else ()
            parameters.append(Parameter(parameter_name, shape, index, blocks))
    active = sum(
        p.numel * chosen // experts if experts and p.stacked and p.shape[0] == experts else p.numel for p in parameters
    )
    return Model(name, tuple(parameters), active - _looked_up(model), optim)


def _looked_up(model: nn.Module) -> int:
    """Elements of token embeddings that no product goes through."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return 0
    return embedding.weight.numel()


def _of_json(path: pathlib.Path, name: str, matrices: Matrices) -> Model:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(
            f"--model {path} cannot be read as JSON ({reason}): give a transformers config.json."
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"--model {path} holds a {type(found).__name__}, not the keys of a transformers config.")
    from transformers import AutoConfig

    # how weights are quantized and where code lies says nothing of their shapes
    settings = {key: value for key, value in found.items() if key not in ("quantization_config", "auto_map")}
    try:
        kind = type(AutoConfig.for_model(_type_of(settings)))
    except ValueError as error:
        raise UsageError(
            f"--model {path} has the model_type {found.get('model_type')!r}, which this transformers does not know: "
            "give the config of one of its causal language models."
        ) from error
    try:
        config = kind.from_dict(settings)
    except Exception as error:  # transformers has several kinds for this
        raise UsageError(f"--model {path} is refused by transformers ({_reason(error)}): correct it.") from error
    return _build(config, name, str(path), {} if matrices is None else {"matrices": matrices})


def _type_of(settings: Mapping[str, Any]) -> str:
    """``model_type``; for a type that transformers does not know, that of the class which it says builds it."""
    import transformers

    kind = settings.get("model_type", "")
    if kind in transformers.CONFIG_MAPPING:
        return kind
    for architecture in settings.get("architectures", ()):
        known = getattr(transformers, architecture, None)
        if known is not None:
            return known.config_class.model_type
    return kind


def _of_trainer(path: pathlib.Path, matrices: Matrices) -> Model:
    from distmuon.pretrain import UserError, load_config
    from distmuon.pretrain.data import open_tokenizer
    from distmuon.pretrain.model import model_config
    from distmuon.pretrain.optimizer import muon_options

    try:
        config = load_config(path)
        vocabulary = config.model.config.get("vocab_size") or open_tokenizer(config.data.tokenizer).vocab_size
        built = model_config(config.model, vocabulary, config.data.sequence_length)
    except UserError as error:
        raise UsageError(str(error).replace("--config ", "--model ", 1)) from error
    optim = muon_options(config.optim)
    return _build(built, path.stem, str(path), optim if matrices is None else {**optim, "matrices": matrices})


def _build(config: PretrainedConfig, name: str, where: str, optim: Mapping[str, Any] | None = None) -> Model:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # as above, and what sizes that do not fit raise in torch
        raise UsageError(
            f"--model {where} cannot be built by transformers ({_reason(error)}): correct its sizes, or give the "
            "config of a causal language model."
        ) from error
    experts = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    try:
        return of_module(name, model, experts=experts, chosen=chosen, optim=optim)
    except ValueError as error:
        raise UsageError(f"--model {where} cannot be taken apart ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1][:200] if lines else type(error).__name__).rstrip(".:")


def shapes(model: Model) -> Iterator[tuple[MatrixSpec, int]]:
    """Each shape of matrix of a model, and how many it has, by first appearance."""
    counts: dict[tuple[int, int], int] = {}
    first: dict[tuple[int, int], MatrixSpec] = {}
    for parameter in model.on_muon:
        for matrices in parameter.specs:
            key = (matrices.rows, matrices.cols)
            counts[key] = counts.get(key, 0) + matrices.count
            first.setdefault(key, matrices)
    for key, count in counts.items():
        yield first[key], count
