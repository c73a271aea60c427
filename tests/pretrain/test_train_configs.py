"""The configs that come with the project: real shapes, built without memory for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distmuon
from distmuon.pretrain import Config, load_config
from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.config import validate
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.model import build_model, count_parameters, model_config
from distmuon.pretrain.optimizer import build_optimizer
from distmuon.pretrain.parallel import resolve_layout
from distmuon.pretrain.sharding import decoder_blocks
from distmuon.pretrain.tensor_parallel import tensor_parallel_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def on_meta(config: Config) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(model_config(config.model, 300, config.data.sequence_length), seed=0)


@pytest.mark.parametrize(
    ("name", "parameters", "muon", "blocks", "ranks"),
    [
        # counts of the published models
        ("gpt2_124m", 124_439_808, 12 * 12 * 768**2, 12, 8),
        ("llama_1b", 1_235_814_400, 16 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192), 16, 8),
        ("llama_8b", 8_030_261_248, 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336), 32, 32),
        (
            "qwen3_moe",
            30_532_122_624,
            48 * (2048 * (2 * 4096 + 2 * 512) + 128 * 2048 + 128 * 3 * 2048 * 768),
            48,
            32,
        ),
    ],
)
def test_a_config_has_the_shape_of_its_name(name: str, parameters: int, muon: int, blocks: int, ranks: int) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").splitlines()[0].startswith("# torchrun ")
    config = load_config(path)
    validate(config)
    layout = resolve_layout(config.parallel, ranks)
    assert layout.dp_shard == ranks
    # the whole global batch, on few and on many devices
    for data_ranks in (1, ranks, 8 * ranks):
        plan = plan_batches(config.train, config.data.sequence_length, data_ranks)
        assert plan.device_batch * plan.accumulation * data_ranks == plan.sequences
    model = on_meta(config)
    assert count_parameters(model) == parameters
    assert len(decoder_blocks(model, model.config)) == blocks
    optimizer = build_optimizer(model, config.optim)
    assert isinstance(optimizer, distmuon.Muon)
    routed = [param for group in optimizer.param_groups if group["use_muon"] for param in group["params"]]
    assert sum(param.numel() for param in routed) == muon
    assert {param.ndim for param in routed} == ({2, 3} if name == "qwen3_moe" else {2})


def test_the_plan_of_transformers_splits_attention_mlp_and_head() -> None:
    config = load_config(CONFIGS / "llama_8b.yaml")
    model = on_meta(config)
    plan = tensor_parallel_plan(model, model.config, 8)
    assert len(plan) == 32 * 7 + 1
    assert plan["lm_head"] == "colwise_gather_output"
    assert plan["model.layers.31.self_attn.o_proj"] == plan["model.layers.0.mlp.down_proj"] == "rowwise"


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("gpt2_124m", 2, "model.type gpt2 has no plan for tensor parallelism in transformers: set parallel.tp to 1"),
        ("qwen3_moe", 2, "model.type qwen3_moe asks for 'packed_colwise' of model.layers.0.mlp.experts.gate_up_proj"),
        ("llama_1b", 16, "model.config.num_key_value_heads has 8 parts, which do not divide by it"),
        ("llama_1b", 3, "model.config.num_attention_heads has 32 parts"),
    ],
)
def test_what_cannot_be_tensor_parallel_is_a_sentence(name: str, ranks: int, words: str) -> None:
    model = on_meta(load_config(CONFIGS / f"{name}.yaml"))
    with pytest.raises(UserError) as error:
        tensor_parallel_plan(model, model.config, ranks)
    assert words in str(error.value)


def test_a_tied_head_is_not_split() -> None:
    model = on_meta(load_config(CONFIGS / "llama_1b.yaml"))
    assert "lm_head" not in tensor_parallel_plan(model, model.config, 8)
