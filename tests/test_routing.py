import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distmuon
from distmuon.routing import clean_name, route_module, route_named


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 1, bias=False)
        self.experts = nn.Parameter(torch.randn(4, width, width))
        self.matrix_norm = nn.LayerNorm((2, width))


class Model(nn.Module):
    def __init__(self, width=8, vocabulary=20, *, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.patch = nn.Conv2d(3, width, 4)
        self.depthwise = nn.Conv1d(width, width, 3, groups=width)
        self.grouped = nn.Conv1d(width, width, 3, groups=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.out = nn.Linear(width, vocabulary)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.out.weight = self.tokens.weight


EXPECTED = {
    "pos_embed": (False, "named like an embedding (pos_embed)"),
    "temperature": (False, "vector or scalar"),
    "tokens.weight": (False, "embedding"),
    "patch.weight": (True, "convolution"),
    "patch.bias": (False, "vector or scalar"),
    "depthwise.weight": (False, "depthwise convolution"),
    "grouped.weight": (False, "grouped convolution"),
    "blocks.0.experts": (True, "stack of 4 matrices"),
    "blocks.0.norm.weight": (False, "vector or scalar"),
    "blocks.0.proj.weight": (True, "hidden matrix"),
    "blocks.0.gate.weight": (False, "degenerate matrix (1 x 8)"),
    "blocks.1.matrix_norm.weight": (False, "norm"),
    "out.weight": (False, "output head"),
    "out.bias": (False, "vector or scalar"),
}


def test_rules():
    routes = route_module(Model())
    for name, (use_muon, reason) in EXPECTED.items():
        assert (routes[name].use_muon, routes[name].reason) == (use_muon, reason), name
    assert routes.keys() == {name for name, _ in Model().named_parameters()}


def test_tied_head_counts_once_and_is_no_matrix():
    model = Model(tied=True)
    routes = route_module(model)
    assert "out.weight" not in routes
    assert routes["tokens.weight"].reason == "embedding (tied)"
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_wrappers_do_not_change_routes_or_names():
    plain = route_module(Model())
    assert route_module(torch.compile(Model())) == plain
    assert route_module(nn.Sequential()) == {}

    class DDPLike(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert route_module(DDPLike(Model())) == plain


def test_meta_models_are_routed():
    with torch.device("meta"):
        model = Model()
    assert route_module(model) == route_module(Model())


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("_orig_mod.blocks.0.weight", "blocks.0.weight"),
        ("module.module.a.weight", "a.weight"),
        ("_orig_mod.module._orig_mod.a.weight", "a.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("blocks.module.weight", "blocks.module.weight"),
        ("weight", "weight"),
    ],
)
def test_clean_name(raw, clean):
    assert clean_name(raw) == clean


def test_last_linear_of_the_sequential_that_holds_all_parameters_is_the_head():
    class Task(nn.Module):
        def __init__(self, *more):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.loss = nn.CrossEntropyLoss()
            self.more = nn.ModuleList(more)

    routes = route_module(Task())
    assert not routes["net.2.weight"].use_muon and routes["net.0.weight"].use_muon
    # with more beside it, it may be any part of the model
    assert route_module(Task(nn.Linear(4, 4)))["net.2.weight"].use_muon


def test_last_linear_of_a_sequential_is_the_head():
    routes = route_module(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)))
    assert [name for name, route in routes.items() if route.use_muon] == ["0.weight", "2.weight"]


def test_square_byte_model_keeps_its_projections():
    """A vocabulary as large as the width must not make every projection a head."""

    class Byte(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 16)
            self.mix = nn.Linear(16, 16, bias=False)

    assert route_module(Byte())["mix.weight"].use_muon


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_models(kind, tied):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    more = dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts=4, n_routed_experts=4)
    config = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tied, **more)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    by_type, by_name = route_module(model), route_named(model.named_parameters())
    outside = {name for name, route in by_type.items() if not route.use_muon and "vector" not in route.reason}
    heads = set() if tied else {"lm_head.weight"}
    embeddings = {name for name in by_type if "embed" in name or name.endswith(("wte.weight", "wpe.weight"))}
    assert outside == heads | embeddings
    assert {name: route.use_muon for name, route in by_type.items()} == {
        name: route.use_muon for name, route in by_name.items()
    }


def test_globs_win_and_say_so():
    routes = route_module(Model(), muon_names=["depthwise.weight"], adamw_names=["blocks.1.*", "patch.weight"])
    assert routes["depthwise.weight"].reason == "muon_names 'depthwise.weight'"
    assert routes["blocks.1.proj.weight"].reason == "adamw_names 'blocks.1.*'"
    assert routes["blocks.0.proj.weight"].use_muon
    assert not routes["patch.weight"].use_muon


def test_embedding_put_on_muon_by_hand_warns():
    with pytest.warns(UserWarning, match=r"'tokens\.weight' goes to Muon .* embedding"):
        route_module(Model(), muon_names=["tokens.*"])
    named = [("wte.weight", nn.Parameter(torch.randn(9, 4)))]
    with pytest.warns(UserWarning, match=r"'wte\.weight' on Muon"):
        distmuon.Muon([{"params": named, "use_muon": True}])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(muon_names=["nothing.*"]), "'nothing.*' matches no parameter"),
        (dict(muon_names=["blocks.*.weight"], adamw_names=["blocks.0.proj.*"]), "make one of the globs narrower"),
        (dict(muon_names=["temperature"]), "holds no matrix"),
    ],
)
def test_glob_errors(kwargs, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        route_module(Model(), **kwargs)


def test_unknown_matrix_axes_are_an_error():
    module = nn.Module()
    module.weights = nn.Parameter(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"'weights' has shape .* matrix axes are not known"):
        route_module(module)


@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=6),
    names=st.lists(st.sampled_from(["a", "embed_tokens", "lm_head", "wte", "mlp"]), min_size=6, max_size=6),
)
def test_every_parameter_is_routed_once(shapes, names):
    # three axes need a name that tells what the first one counts
    ends = [f"{i}x.experts" if len(shape) == 3 else f"{i}x.weight" for i, shape in enumerate(shapes)]
    named = [(f"{names[i]}.{ends[i]}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
    routes = route_named(named)
    assert list(routes) == [name for name, _ in named]
    for name, param in named:
        if routes[name].use_muon:
            assert param.ndim in (2, 3)
            assert min(param.shape[-2:]) > 1
        else:
            assert routes[name].reason


def test_heads_of_pipeline_stages():
    """In a list of stages the number is that of a stage, unless several have the layer, as blocks do."""

    def stage(**layers):
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), **layers})

    stages = nn.ModuleList(
        [stage(embed=nn.Embedding(9, 4), up=nn.Linear(4, 6)), stage(), stage(head=nn.Linear(4, 9), up=nn.Linear(4, 6))]
    )
    assert {name for name, route in route_module(stages).items() if route.reason == "output head"} == {"2.head.weight"}
    tied_to_vocabulary = nn.ModuleList([stages[0], stage(predict=nn.Linear(4, 9))])
    assert route_module(tied_to_vocabulary)["1.predict.weight"].reason == "output head"
    blocks = nn.ModuleList(stage(output=nn.Linear(4, 4)) for _ in range(2))
    assert all(route.use_muon for name, route in route_module(blocks).items() if name.endswith("output.weight"))


def test_a_stage_in_the_middle_ends_in_no_head():
    stage = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    last, middle = (route_module(stage, last_stage=last)["2.weight"] for last in (True, False))
    assert last.reason == "output head, as the last Linear of a Sequential" and not last.use_muon
    assert middle.use_muon
    named = nn.ModuleDict({"up": nn.Linear(4, 6), "lm_head": nn.Linear(4, 9)})
    assert route_module(named, last_stage=False)["lm_head.weight"].reason == "output head"
