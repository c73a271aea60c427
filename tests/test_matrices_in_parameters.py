"""Parameters that hold several matrices: blocks, heads, transposed storage, and what presets know of modules."""

import contextlib
import copy
import functools
import re
import warnings
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import distmuon
from distmuon.flight import LocalParameter
from distmuon.local import _block_of
from distmuon.plan.blocks import Placing, blocks_of
from distmuon.plan.boxes import Box, chunk
from distmuon.plan.layouts import check_holdings
from distmuon.plan.parameters import Holding
from distmuon.plan.reading import Reading
from distmuon.plan.words import describe
from distmuon.presets import presets_of

SETTINGS = dict(lr=0.02, weight_decay=0.1, adamw_lr=0.01)


# --- blocks


@st.composite
def readings(draw):
    """A shape, a reading that fits it, and the logical shape of each block by hand."""
    transposed, stacked = draw(st.booleans()), draw(st.booleans())
    split_axis, interleaved = draw(st.sampled_from(["rows", "cols"])), draw(st.booleans())
    if interleaved:
        sizes, heads = (draw(st.integers(1, 4)),) * draw(st.integers(1, 3)), None
    else:
        pairs = draw(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, 1, 2, 3])), min_size=1, max_size=4))
        sizes = tuple(length * (count or 1) for length, count in pairs)
        heads = tuple(count for _, count in pairs)
    other = draw(st.integers(1, 5))
    split, kept = sum(sizes), other
    logical = (split, kept) if split_axis == "rows" else (kept, split)
    shape = logical[::-1] if transposed else logical
    if stacked:
        shape = (draw(st.integers(1, 3)), *shape)
    reading = Reading(
        transposed=transposed, split_sizes=sizes, num_heads=heads, split_axis=split_axis, interleaved=interleaved
    )
    return shape, reading


def by_hand(tensor, reading):
    """The matrices of a parameter, output x input features, in the order of blocks, heads, experts."""
    logical = tensor.mT if reading.transposed else tensor.flatten(1) if reading.flatten else tensor
    axis = -2 if reading.split_axis == "rows" else -1
    if reading.interleaved:
        count = len(reading.split_sizes)
        places = torch.arange(logical.shape[axis])
        blocks = [logical.index_select(axis, places[number::count]) for number in range(count)]
    else:
        blocks = logical.split(reading.split_sizes or logical.shape[axis], dim=axis)
    found = []
    for number, block in enumerate(blocks):
        heads = reading.heads_of(number) or 1
        for head in block.chunk(heads, dim=axis):
            found += head if head.ndim == 3 else [head]
    return found


def read(tensor, reading, name="w"):
    """The same by what is planned: the views that a rank which stores everything steps."""
    whole = LocalParameter(Box.whole(tensor.shape), tensor, None, tensor)
    found = []
    for block in blocks_of(name, tensor.shape, reading):
        view = _block_of(whole, block).param
        assert view.shape == block.shape
        assert block.matrices.numel == view.numel()
        for matrix in view if view.ndim == 3 else [view]:
            assert matrix.shape == (block.matrices.rows, block.matrices.cols)
            matrix = matrix.mT if block.matrices.transposed else matrix
            assert tuple(matrix.shape) == block.matrices.logical
            found.append(matrix)
    return found


@given(drawn=readings())
def test_blocks_are_the_matrices_and_hold_every_element_once(drawn):
    shape, reading = drawn
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    found, wanted = read(tensor, reading), by_hand(tensor, reading)
    assert len(found) == len(wanted)
    for matrix, other in zip(found, wanted, strict=True):
        assert torch.equal(matrix, other)
    assert sorted(torch.cat([matrix.flatten() for matrix in found]).tolist()) == list(range(tensor.numel()))
    names = [block.matrices.parameter for block in blocks_of("w", shape, reading)]
    assert len(set(names)) == len(names)


@given(drawn=readings(), ranks=st.integers(1, 4), axis=st.integers(0, 2), replicas=st.integers(1, 2))
def test_shards_of_blocks_are_what_ranks_store_of_them(drawn, ranks, axis, replicas):
    shape, reading = drawn
    axis %= len(shape)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    holdings = []
    for replica in range(replicas):
        for part in range(ranks):
            offset, size = chunk(shape[axis], part, ranks)
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[axis], sizes[axis] = offset, size
            holdings.append(Holding(replica * ranks + part, Box(tuple(offsets), tuple(sizes)), (replica,)))
    holdings = tuple(holdings)
    stored = [tensor[holding.box.within(Box.whole(shape))] for holding in holdings]
    pieces = list(Placing().place("w", blocks_of("w", shape, reading), holdings))
    together = []
    for _, block, held in pieces:
        check_holdings(block.matrices.parameter, block.shape, held)
        whole = torch.full(block.shape, -1)
        for holding, local, mine in zip(holdings, stored, held, strict=True):
            assert mine.rank == holding.rank and mine.replica == holding.replica
            view = _block_of(LocalParameter(holding.box, local, None, local), block)
            assert view.box == mine.box
            if mine.box.numel:
                assert view.param.shape == mine.box.sizes
                whole[mine.box.within(Box.whole(block.shape))] = view.param
        together += [m.mT if reading.transposed else m for m in (whole if whole.ndim == 3 else [whole])]
    for matrix, other in zip(together, by_hand(tensor, reading), strict=True):
        assert torch.equal(matrix, other)


def test_layouts_are_clipped_once():
    """Thousands of heads share what was found out for one layer."""
    shape = (64, 8)
    holdings = tuple(Holding(rank, Box((rank * 10, 0), (max(0, min(10, 64 - rank * 10)), 8))) for rank in range(7))
    placing, blocks = Placing(), blocks_of("w", shape, Reading(num_heads=16))
    first, second = (list(placing.place(name, blocks, holdings)) for name in ("a", "b"))
    assert len(first) == 16
    assert all(a[2] is b[2] for a, b in zip(first, second, strict=True))
    assert {block.matrices.parameter.partition("[")[0] for _, block, _ in second} == {"b"}


QKV = Reading(split_sizes=(6, 2, 2))


@pytest.mark.parametrize(
    ("shape", "keys", "message"),
    [
        ((9, 4), dict(split_sizes=(6, 2, 2)), r"'w' of shape \(9, 4\) has 9 output features \(axis 0\).*sum to 10"),
        ((10, 4), dict(split_sizes=(6, 2, 2), split_axis="cols"), r"4 input features \(axis 1\)"),
        ((4, 9), dict(split_sizes=(6, 2, 2), transposed=True), r"9 output features \(axis 1\)"),
        ((10, 4), dict(num_heads=3), r"num_heads=3 for 10 features along axis 0.*give a divisor of 10"),
        ((10, 4), dict(split_sizes=(6, 4), num_heads=(3, 3)), r"num_heads=3 for 4 features"),
        ((10, 4), dict(split_sizes=(6, 4), num_heads=(3,)), r"num_heads=\(3,\).*each of 2 blocks"),
        ((10, 4), dict(num_heads=0), r"num_heads=0"),
        ((10, 4), dict(num_heads=True), r"num_heads=True"),
        ((10, 4), dict(split_sizes=()), r"split_sizes=\(\)"),
        ((10, 4), dict(split_sizes=(5, 5.0)), r"split_sizes=\(5, 5.0\)"),
        ((10, 4), dict(split_sizes=10), r"split_sizes=10"),
        ((10, 4), dict(split_axis="heads"), r"split_axis='heads': it is 'rows'.*or 'cols'"),
        ((10, 4), dict(transposed=1), r"transposed=1: it is True or False"),
        ((10, 4, 3), dict(flatten=True, transposed=True), r"flatten=True and transposed=True"),
        ((10, 4, 3), dict(flatten=True, split_sizes=(2, 2), split_axis="cols"), r"columns are input channels"),
        ((10, 4), dict(split_sizes=(6, 4), interleaved=True), r"equal split_sizes and no heads"),
        ((10, 4), dict(interleaved=True), r"interleaved=True, split_sizes=None"),
    ],
)
def test_what_is_wrong_with_a_group_is_named(shape, keys, message):
    param = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        distmuon.Muon([{"params": [("w", param)], "use_muon": True, **keys}], lr=0.02)


# --- updates on one process


UPDATES = {
    "qkv": ((10, 6), QKV),
    "qkv heads": ((10, 6), Reading(split_sizes=(6, 2, 2), num_heads=(3, 1, None))),
    "o": ((6, 8), Reading(num_heads=4, split_axis="cols")),
    "conv1d": ((6, 10), Reading(split_sizes=(6, 2, 2), transposed=True)),
    "experts": ((3, 8, 5), Reading(split_sizes=(4, 4))),
    "gpt-oss": ((3, 5, 8), Reading(split_sizes=(4, 4), transposed=True, interleaved=True)),
    "kernel": ((8, 3, 2, 2), Reading(flatten=True, split_sizes=(5, 3))),
    "transposed": ((4, 12), Reading(transposed=True)),
}


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral"])
@pytest.mark.parametrize("case", UPDATES)
def test_update_is_that_of_separate_matrices(case, scale):
    shape, reading = UPDATES[case]
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    apart = [nn.Parameter(matrix.clone()) for matrix in by_hand(ours.detach(), reading)]
    # the product of a transposed matrix sums in another order, which bfloat16 would show
    exact = not reading.transposed
    settings = dict(lr=0.02, adjust_lr_fn=scale)
    more = dict(foreach=False, ns_dtype=torch.bfloat16 if exact else torch.float64)
    optimizer = distmuon.Muon([{"params": [("w", ours)], "use_muon": True, **reading.keys}], **settings, **more)
    if exact and scale != "spectral":
        reference = torch.optim.Muon(apart, weight_decay=0.1, **settings)
    else:
        reference = distmuon.Muon([{"params": apart, "use_muon": True}], **settings, **more)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        for param, grad in zip(apart, by_hand(ours.grad, reading), strict=True):
            param.grad = grad.clone()
        optimizer.step()
        reference.step()
    momentum = optimizer.state[ours]["momentum_buffer"]
    assert momentum.shape == ours.shape
    for matrix, kept, param in zip(by_hand(ours.detach(), reading), by_hand(momentum, reading), apart, strict=True):
        assert torch.equal(kept, reference.state[param]["momentum_buffer"])
        if exact:
            assert torch.equal(matrix, param)
        else:
            torch.testing.assert_close(matrix, param.detach(), rtol=0, atol=1e-6)
    rates = optimizer.report().rows[0]
    assert len(rates.lrs or (rates.lr,)) == len(blocks_of("w", shape, reading))


def test_rate_of_a_block():
    group = {"params": [("w", nn.Parameter(torch.zeros(10, 4)))], "use_muon": True, "split_sizes": (8, 2)}
    optimizer = distmuon.Muon([group], lr=0.1, adjust_lr_fn="spectral")
    assert optimizer.effective_lr("w[0:8]") == pytest.approx(0.1 * 2**0.5)
    assert optimizer.effective_lr("w[8:10]") == pytest.approx(0.1 * 0.5**0.5)
    for wanted in ("w", optimizer.param_groups[0]["params"][0]):
        with pytest.raises(ValueError, match=r"rates of their own .*'w\[0:8\]'.*ask for one of them"):
            optimizer.effective_lr(wanted)
    assert "0.141 | 0.0707" in str(optimizer.report())


def test_settings_of_old_states_and_other_readings():
    def build(**keys):
        param = nn.Parameter(torch.ones(10, 4))
        optimizer = distmuon.Muon([{"params": [("w", param)], "use_muon": True, **keys}], lr=0.1)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    old = build().state_dict()
    for key in Reading().keys:
        del old["param_groups"][0][key]
    optimizer = build(split_sizes=(6, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(old)
        optimizer.load_state_dict(build(split_sizes=[6, 2, 2]).state_dict())
        optimizer.step()
    with pytest.warns(UserWarning, match=r"group 0 was saved with split_sizes=None and keeps its own .*\(6, 2, 2\)"):
        optimizer.load_state_dict(build().state_dict())
    assert optimizer.param_groups[0]["split_sizes"] == (6, 2, 2)
    assert len(optimizer.report().rows[0].lrs) == 3
    clone = copy.deepcopy(optimizer)
    clone.step()


# --- names and words


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 16)
        self.out = nn.Linear(8, 8)


def test_globs():
    model = nn.Module()
    model.layers = nn.ModuleList(Attention() for _ in range(2))
    matrices = {
        "*.qkv.weight": {"split_sizes": (8, 4, 4)},
        "layers.1.out.weight": {"num_heads": 2, "split_axis": "cols"},
    }
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.01, matrices=matrices)
    assert [(group["name"], group["param_names"]) for group in optimizer.param_groups[:-1]] == [
        ("muon", ["layers.0.out.weight"]),
        ("muon_qkv", ["layers.0.qkv.weight", "layers.1.qkv.weight"]),
        ("muon_out", ["layers.1.out.weight"]),
    ]
    told = {row.name: row.matrices for row in optimizer.report().rows}
    assert told["layers.1.qkv.weight"] == "8 + 4 + 4 x 8 (rows)"
    assert told["layers.1.out.weight"] == "2 heads of 8 x 4 (columns)"
    by_name = distmuon.Muon(model.named_parameters(), lr=0.02, adamw_lr=0.01, matrices=matrices)
    assert [row.matrices for row in by_name.report().rows] == [row.matrices for row in optimizer.report().rows]
    later = distmuon.Muon(model, lr=0.02, adamw_lr=0.01, matrices={**matrices, "layers.0.*": "whole"})
    assert next(row for row in later.report().rows if row.name == "layers.0.qkv.weight").matrices == "16 x 8"


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ("all", r"matrices='all' is unknown: it is 'auto', 'heads', 'whole'"),
        (["auto"], r"matrices is a list"),
        ({"*.kv.*": "auto"}, r"glob '\*.kv.\*' in matrices matches no parameter on Muon"),
        ({"*.bias": {"num_heads": 2}}, r"'\*.bias' in matrices matches no parameter on Muon"),
        ({"qkv.*": {"split_size": (8, 4, 4)}}, r"unknown key 'split_size': did you mean 'split_sizes'"),
        ({"qkv.*": {"split_sizes": (8, 4)}}, r"'qkv.weight' of shape \(16, 8\).*sum to 12"),
        ({"qkv.*": {"num_heads": -1}}, r"matrices\['qkv.\*'\] has num_heads=-1"),
        ({"qkv.*": 3}, r"matrices\['qkv.\*'\] is 3"),
    ],
)
def test_what_is_wrong_with_matrices_is_named(matrices, message):
    with pytest.raises(ValueError, match=message):
        distmuon.Muon(Attention(), lr=0.02, adamw_lr=0.01, matrices=matrices)


def test_words_need_modules():
    with pytest.raises(ValueError, match="names alone: pass the module itself"):
        distmuon.Muon(Attention().named_parameters(), lr=0.02, adamw_lr=0.01, matrices="auto")
    with pytest.raises(ValueError, match="choose among names"):
        distmuon.Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], "use_muon": True}], matrices="auto")


def three_axes():
    module = nn.Module()
    module.kernel = nn.Parameter(torch.randn(4, 6, 3))
    module.linear = nn.Linear(6, 6)
    return module


def test_three_axes_are_never_guessed():
    both = r"'kernel' has shape \(4, 6, 3\).*a stack of 4 matrices of 6 x 3 .*or as one matrix of 4 x 18"
    model = three_axes()
    make = functools.partial(distmuon.Muon, lr=0.02, adamw_lr=0.01)
    for params, keys in [
        (model, {}),
        (model.named_parameters(), {}),
        (model, {"muon_names": ["kernel"]}),
        ([{"params": [("kernel", model.kernel)], "use_muon": True}], {}),
        ([{"params": [("kernel", model.kernel)]}], {}),
    ]:
        with pytest.raises(ValueError, match=both):
            make(params, **keys)
    for params, keys, matrices in [
        (model, {"matrices": {"kernel": {"flatten": True}}}, "4 x 18"),
        (model, {"matrices": {"kernel": {"flatten": False}}}, "4 of 6 x 3"),
        (model.named_parameters(), {"matrices": {"kernel": {"transposed": True}}}, "4 of 3 x 6 (stored transposed)"),
        ([{"params": [("kernel", model.kernel)], "flatten": True}], {}, "4 x 18"),
        ([{"params": [("kernel", model.kernel)], "use_muon": True, "flatten": False}], {}, "4 of 6 x 3"),
        (model, {"adamw_names": ["kernel"]}, ""),
    ]:
        rows = make(params, **keys).report().rows
        assert next(row for row in rows if row.name == "kernel").matrices == matrices


# --- presets

SIZES = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=32, pad_token_id=0)
GQA = dict(num_key_value_heads=2, head_dim=8, intermediate_size=20)
EXPERTS = dict(num_local_experts=3, num_experts=3, n_routed_experts=3, moe_intermediate_size=10, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=6, q_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=5, v_head_dim=7)
LATENT |= dict(first_k_dense_replace=0, n_group=1, topk_group=1, intermediate_size=20)
KINDS = {
    "gpt2": SIZES,
    "llama": SIZES | GQA,
    "qwen3": SIZES | GQA,
    "mistral": SIZES | GQA,
    "qwen2": SIZES | GQA,
    "gemma": SIZES | GQA,
    "gemma2": SIZES | GQA,
    "gemma3_text": SIZES | GQA,
    "phi": SIZES | dict(num_key_value_heads=2, intermediate_size=20, partial_rotary_factor=1.0),
    "phi3": SIZES | dict(num_key_value_heads=2, intermediate_size=20),
    "mixtral": SIZES | GQA | EXPERTS,
    "qwen3_moe": SIZES | GQA | EXPERTS | dict(decoder_sparse_step=1, mlp_only_layers=[]),
    "olmoe": SIZES | GQA | EXPERTS | dict(intermediate_size=10),
    "gpt_oss": SIZES | GQA | EXPERTS,
    "deepseek_v3": SIZES | LATENT | EXPERTS,
    "gpt_neox": SIZES | dict(intermediate_size=20),
    "bloom": SIZES,
    "falcon": SIZES | dict(multi_query=False, new_decoder_architecture=False),
    "falcon multi-query": SIZES | dict(multi_query=True, new_decoder_architecture=False),
    "falcon groups": SIZES | dict(num_kv_heads=2, new_decoder_architecture=True),
}
# What gives queries, keys and values in attention that knows no other kind of itself
SEAMS = {"BloomAttention": "_reshape", "FalconAttention": "_split_heads"}
ATTENDING_HEAD = 1


class Probe:
    """Attention that notes queries, keys and values by head, and attends to nothing but one head of its own."""

    seen: ClassVar = {}

    def __call__(self, module, query, key, value, attention_mask, **more):
        Probe.seen |= {"q": query, "k": key, "v": value}
        out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        out[:, :, ATTENDING_HEAD] = 1.0
        return out, None


class Seam(TorchFunctionMode):
    """The same of attention without a registry, by the method that takes its fused projection apart."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.method = attention, SEAMS[type(attention).__name__]

    def __enter__(self):
        apart, repeats = getattr(self.attention, self.method), 1
        if getattr(self.attention, "new_decoder_architecture", False):  # which gives keys once a query
            repeats = self.attention.num_heads // self.attention.num_kv_heads

        def note(fused):
            q, k, v = apart(fused)
            by_head = [seen.movedim(2, 1) if self.method == "_split_heads" else seen for seen in (q, k, v)]
            Probe.seen |= {"q": by_head[0], "k": by_head[1][:, ::repeats], "v": by_head[2][:, ::repeats]}
            return q, k, torch.ones_like(v)

        setattr(self.attention, self.method, note)
        return super().__enter__()

    def __exit__(self, *error):
        delattr(self.attention, self.method)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.softmax:
            found.zero_()[:, ATTENDING_HEAD, :, 0] = 1
        return found


@functools.cache
def model_of(kind):
    transformers = pytest.importorskip("transformers")
    transformers.AttentionInterface.register("probe", Probe())
    torch.manual_seed(0)
    name = kind.partition(" ")[0]
    config = transformers.AutoConfig.for_model(name, **KINDS[kind])
    attention = "eager" if name in ("bloom", "falcon") else "probe"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    for param in model.parameters():
        param.data.normal_(std=0.3)
    return model.eval()


def noted(model):
    """What attention gets, by kind and head, and what the layer's attention gives."""
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    given = []
    hook = attention.register_forward_hook(lambda _, __, output: given.append(output[0].clone()))
    seam = Seam(attention) if type(attention).__name__ in SEAMS else contextlib.nullcontext()
    with torch.no_grad(), seam:
        model(torch.arange(1, 6)[None], use_cache=False)
    hook.remove()
    found = {(name, head): seen[:, head].clone() for name, seen in Probe.seen.items() for head in range(seen.shape[1])}
    return found | {"out": given[0]}


def touched(model, matrix):
    """What of it changes with a matrix."""
    before, kept = noted(model), matrix.clone()
    matrix.add_(torch.randn(matrix.shape))
    after = noted(model)
    matrix.copy_(kept)
    return {place for place in before if not torch.equal(before[place], after[place])}


def presets(model):
    return presets_of(dict(model.named_modules()))


def weights(model, suffix):
    return next((name, param.detach()) for name, param in model.named_parameters() if name.endswith(suffix))


FUSED = {"gpt2": "c_attn.weight", "phi3": "qkv_proj.weight", "falcon multi-query": "query_key_value.weight"}


@pytest.mark.parametrize(("kind", "suffix"), FUSED.items())
def test_blocks_of_fused_projections(kind, suffix):
    model = model_of(kind)
    name, weight = weights(model, suffix)
    preset = presets(model)[name]
    found = read(weight, preset.auto)
    assert preset.labels == ("q", "k", "v") and len(found) == 3
    for label, matrix in zip(preset.labels, found, strict=True):
        assert matrix.shape[1] == SIZES["hidden_size"]
        heads = {head for what, head in noted(model).keys() - {"out"} if what == label}
        assert touched(model, matrix) == {(label, head) for head in heads}


HEADS = {
    "gpt2": ("c_attn.weight", "c_proj.weight"),
    "phi": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "dense.weight"),
    "phi3": ("qkv_proj.weight", "o_proj.weight"),
    **dict.fromkeys(
        ("gpt_neox", "bloom", "falcon", "falcon multi-query", "falcon groups"),
        ("query_key_value.weight", "dense.weight"),
    ),
}
# Of which projection and of which head each head of a fused weight is, where they take turns
TURNS = {
    **{kind: [(what, head) for head in range(4) for what in "qkv"] for kind in ("gpt_neox", "bloom", "falcon")},
    "falcon groups": [place for at in (0, 1) for place in (("q", 2 * at), ("q", 2 * at + 1), ("k", at), ("v", at))],
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("deepseek_v3", "olmoe")])
def test_heads(kind):
    model = model_of(kind)
    seen, known = noted(model), presets(model)
    for suffix in HEADS.get(kind, ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
        name, weight = weights(model, suffix)
        found = read(weight, known[name].heads)
        if suffix in ("c_proj.weight", "dense.weight", "o_proj.weight"):
            # only one head attends, so that only its columns are multiplied
            for head, matrix in enumerate(found):
                assert touched(model, matrix) == ({"out"} if head == ATTENDING_HEAD else set()), (name, head)
            continue
        labels = suffix[0] if suffix in ("q_proj.weight", "k_proj.weight", "v_proj.weight") else "qkv"
        wanted = TURNS.get(kind) or [
            place for label in labels for place in sorted(seen.keys() - {"out"}) if place[0] == label
        ]
        assert len(found) == len(wanted)
        for matrix, place in zip(found, wanted, strict=True):
            assert touched(model, matrix) == {place}


def test_cross_attention_of_gpt2():
    """Which has k and v in c_attn, and q beside them."""
    transformers = pytest.importorskip("transformers")
    model_of("gpt2")  # registers the probe
    config = transformers.AutoConfig.for_model("gpt2", **SIZES, add_cross_attention=True)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="probe").eval()
    path, attention = next((p, m) for p, m in model.named_modules() if p.endswith("crossattention"))
    for param in attention.parameters():
        param.data.normal_(std=0.3)
    known, tokens, others = presets(model), torch.randn(1, 5, 24), torch.randn(1, 7, 24)

    def seen():
        with torch.no_grad():
            out = attention(tokens, encoder_hidden_states=others)[0]
        return {(what, head): Probe.seen[what][:, head].clone() for what in "qkv" for head in range(4)} | {"out": out}

    def changed(matrix):
        before, kept = seen(), matrix.clone()
        matrix.add_(torch.randn(matrix.shape))
        after = seen()
        matrix.copy_(kept)
        return {place for place in before if not torch.equal(before[place], after[place])}

    def matrices(name, word):
        return read(getattr(attention, name).weight.detach(), known[f"{path}.{name}.weight"].by(word))

    assert known[f"{path}.c_attn.weight"].labels == ("k", "v")
    for word, wanted in {
        "auto": [{("k", head) for head in range(4)}, {("v", head) for head in range(4)}],
        "heads": [{(what, head)} for what in "kv" for head in range(4)],
    }.items():
        assert [changed(matrix) for matrix in matrices("c_attn", word)] == wanted
    (q,) = matrices("q_attn", "auto")
    assert q.shape == (24, 24) and changed(q) == {("q", head) for head in range(4)}
    assert [changed(matrix) for matrix in matrices("q_attn", "heads")] == [{("q", head)} for head in range(4)]
    heads = [changed(matrix) for matrix in matrices("c_proj", "heads")]
    assert heads == [{"out"} if head == ATTENDING_HEAD else set() for head in range(4)]
    q[3].zero_()  # rows are output features
    assert seen()["q", 0][..., 3].sub(attention.q_attn.bias[3].detach()).abs().max() == 0


def test_latent_attention():
    """Of DeepSeek-V3: rows that are rotated, and heads that hold k beside v."""
    model, known = model_of("deepseek_v3"), presets(model_of("deepseek_v3"))
    nope, heads = LATENT["qk_nope_head_dim"], range(SIZES["num_attention_heads"])
    name, weight = weights(model, "kv_a_proj_with_mqa.weight")
    latent, rotated = read(weight, known[name].auto)
    assert known[name].labels == ("latent", "rope k")

    def changed(matrix):
        before, kept = {key: value.clone() for key, value in (noted(model) and Probe.seen).items()}, matrix.clone()
        matrix.add_(torch.randn(matrix.shape))
        noted(model)
        matrix.copy_(kept)
        parts = {"q": slice(None), "k nope": slice(nope), "k rope": slice(nope, None), "v": slice(None)}
        return {
            (part, head)
            for part, along in parts.items()
            for head in heads
            if not torch.equal(before[part[0]][:, head, :, along], Probe.seen[part[0]][:, head, :, along])
        }

    assert changed(rotated) == {("k rope", head) for head in heads}
    assert changed(latent) == {(part, head) for part in ("k nope", "v") for head in heads}
    name, weight = weights(model, "kv_b_proj.weight")
    assert known[name].auto == Reading() and known[name].labels == ("k", "v")
    places = [(part, head) for head in heads for part in ("k nope", "v")]
    for matrix, place in zip(read(weight, known[name].heads), places, strict=True):
        assert changed(matrix) == {place}
    name, weight = weights(model, "q_b_proj.weight")
    for head, matrix in enumerate(read(weight, known[name].heads)):
        assert changed(matrix) == {("q", head)}
    name, weight = weights(model, "o_proj.weight")
    for head, matrix in enumerate(read(weight, known[name].heads)):
        assert touched(model, matrix) == ({"out"} if head == ATTENDING_HEAD else set())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_experts(kind):
    """Which expert, gate or up a matrix is, by what the module gives."""
    model, known = model_of(kind), presets(model_of(kind))
    path, experts = next((p, m) for p, m in model.named_modules() if type(m).__name__.endswith("Experts"))
    for name, param in experts.named_parameters():
        if name.endswith("bias"):
            param.data.zero_()
    tokens, rates = torch.randn(4, SIZES["hidden_size"]), torch.ones(4, 1)

    def given(expert):
        with torch.no_grad():
            return experts(tokens, torch.full((4, 1), expert), rates)

    fused, down = (known[f"{path}.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert fused.labels == ("gate", "up")
    matrices = read(experts.gate_up_proj.detach(), fused.auto)
    count = KINDS[kind]["num_experts"]
    # by block, then by expert
    for place, matrix in enumerate(matrices):
        block, expert = divmod(place, count)
        assert matrix.shape[1] == SIZES["hidden_size"]
        before, kept = [given(number) for number in range(count)], matrix.clone()
        matrix.zero_()
        after = [given(number) for number in range(count)]
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
            n == expert for n in range(count)
        ]
        if block == 0 or kind != "gpt_oss":
            assert after[expert].abs().max() == 0
        else:  # which adds 1 to what comes up
            assert after[expert].abs().max() > 0
        matrix.copy_(2 * kept)
        if kind != "gpt_oss":
            assert torch.allclose(given(expert), 2 * before[expert], rtol=1e-4) == (block == 1)
        matrix.copy_(kept)
    for expert, matrix in enumerate(read(experts.down_proj.detach(), down.auto)):
        assert matrix.shape[0] == SIZES["hidden_size"]
        kept = matrix.clone()
        matrix[3].zero_()
        changed = [n for n in range(count) if given(n)[:, 3].abs().max() == 0]
        matrix.copy_(kept)
        assert changed == [expert]


def test_gate_and_up_of_phi3():
    model = model_of("phi3")
    path, mlp = next((p, m) for p, m in model.named_modules() if type(m).__name__ == "Phi3MLP")
    preset = presets(model)[f"{path}.gate_up_proj.weight"]
    gate, up = read(mlp.gate_up_proj.weight.detach(), preset.auto)
    assert preset.labels == ("gate", "up")
    tokens = torch.randn(2, SIZES["hidden_size"])
    for matrix, linear in ((gate, False), (up, True)):
        kept = matrix.clone()
        with torch.no_grad():
            before = mlp(tokens)
            matrix.mul_(2.0)
            assert torch.allclose(mlp(tokens), 2 * before, rtol=1e-4) == linear
        matrix.copy_(kept)


def test_attention_of_torch():
    module = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
    known = presets(module)
    q, k, v = read(module.in_proj_weight.detach(), known["in_proj_weight"].auto)
    tokens = torch.randn(1, 3, 8)
    v.zero_()
    assert module(tokens, tokens, tokens)[0].abs().max() == 0
    k.zero_()
    assert torch.allclose(module(tokens, tokens, tokens)[1], torch.tensor(1 / 3))
    assert known["in_proj_weight"].labels == ("q", "k", "v") and q.shape == (8, 8)


def test_heads_of_attention_of_torch():
    """Weights by head tell those of q and k; those of v are tied to columns of the output."""
    module, tokens = nn.MultiheadAttention(8, 4, batch_first=True, bias=False), torch.randn(1, 3, 8)
    known = presets(module)
    fused = read(module.in_proj_weight.detach(), known["in_proj_weight"].heads)
    columns = read(module.out_proj.weight.detach(), known["out_proj.weight"].heads)
    assert [tuple(matrix.shape) for matrix in fused + columns] == [(2, 8)] * 12 + [(8, 2)] * 4

    def given():
        with torch.no_grad():
            return module(tokens, tokens, tokens, average_attn_weights=False)

    for place, matrix in enumerate(fused):
        projection, head = divmod(place, 4)
        before, kept = given(), matrix.clone()
        matrix.neg_()
        after = given()
        changed = [not torch.equal(a, b) for a, b in zip(before[1][0], after[1][0], strict=True)]
        assert changed == [projection < 2 and head == other for other in range(4)]
        if projection == 2:
            # its own columns bring it back
            columns[head].neg_()
            torch.testing.assert_close(given()[0], before[0])
            columns[head].neg_()
            assert not torch.allclose(after[0], before[0])
        matrix.copy_(kept)


REPORTS = {
    ("gpt2", "c_attn.weight"): ("24 x 72", "24 + 24 + 24 x 24 (rows: q | k | v; stored transposed)"),
    ("gpt2", "c_fc.weight"): ("24 x 96", "96 x 24 (stored transposed)"),
    ("phi3", "qkv_proj.weight"): ("48 x 24", "24 + 12 + 12 x 24 (rows: q | k | v)"),
    ("llama", "q_proj.weight"): ("32 x 24", "32 x 24"),
    ("gpt_oss", "gate_up_proj"): (
        "3 of 24 x 40",
        "3 of 20 + 20 x 24 (rows: gate | up, taking turns; stored transposed)",
    ),
    ("deepseek_v3", "kv_a_proj_with_mqa.weight"): ("10 x 24", "6 + 4 x 24 (rows: latent | rope k)"),
    ("falcon multi-query", "query_key_value.weight"): ("36 x 24", "24 + 6 + 6 x 24 (rows: q | k | v)"),
}
BY_HEAD = {
    ("gpt2", "c_attn.weight"): "4 + 4 + 4 heads of 6 x 24 (rows: q | k | v; stored transposed)",
    ("phi3", "qkv_proj.weight"): "4 + 2 + 2 heads of 6 x 24 (rows: q | k | v)",
    ("llama", "q_proj.weight"): "4 heads of 8 x 24 (rows)",
    ("llama", "o_proj.weight"): "4 heads of 24 x 8 (columns)",
    ("deepseek_v3", "kv_b_proj.weight"): "4 times (5 + 7) x 6 (rows: k | v)",
    ("falcon multi-query", "query_key_value.weight"): "4 + 1 + 1 heads of 6 x 24 (rows: q | k | v)",
    ("gpt_neox", "query_key_value.weight"): "12 heads of 6 x 24 (rows)",
}


def test_reports():
    for (kind, suffix), texts in REPORTS.items():
        for matrices, text in zip((None, "auto"), texts, strict=True):
            optimizer = distmuon.Muon(model_of(kind), **SETTINGS, matrices=matrices)
            report = optimizer.report()
            assert next(row for row in report.rows if row.name.endswith(suffix)).matrices == text
            advice = [note for note in report.notes if "matrices='auto'" in note]
            assert bool(advice) == (matrices is None and texts[0] != texts[1])
    for (kind, suffix), text in BY_HEAD.items():
        report = distmuon.Muon(model_of(kind), **SETTINGS, matrices="heads").report()
        assert next(row for row in report.rows if row.name.endswith(suffix)).matrices == text
        assert not any("matrices=" in note for note in report.notes)
    notes = distmuon.Muon(model_of("gpt2"), **SETTINGS).report().notes
    assert notes[0].startswith(
        "1 parameters such as transformer.h.0.attn.c_attn.weight hold q | k | v and count as one"
    )
    biases = {row.name: row.algorithm for row in distmuon.Muon(model_of("gpt_oss"), **SETTINGS).report().rows}
    assert biases["model.layers.0.mlp.experts.gate_up_proj_bias"] == "adamw"


def test_heads_that_take_turns_are_told_of():
    """No block of rows is all queries, so that "auto" has nothing to offer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for matrices in (None, "auto"):
            notes = distmuon.Muon(model_of("gpt_neox"), **SETTINGS, matrices=matrices).report().notes
            wanted = "query_key_value.weight hold q | k | v and count as one matrix: matrices='heads' reads them"
            assert [wanted in note for note in notes[:1]] == [True]


def test_equal_keys_and_values_by_turns_in_words():
    reading = Reading(split_sizes=(4, 4) * 6)
    assert describe(blocks_of("w", (48, 8), reading), reading, ("k", "v")) == "6 times (4 + 4) x 8 (rows: k | v)"


FUSED_NAMES = ["qkv", "Wqkv", "linear_qkv", "query_key_value", "c_attn", "in_proj", "W_pack", "kv_proj", "to_kv"]
FUSED_NAMES += ["gate_up_proj", "up_gate_proj", "w12"]


@pytest.mark.parametrize("name", FUSED_NAMES)
def test_what_looks_fused_and_is_not_known_is_told(name):
    model = nn.Sequential()
    for layer in ("0", "1"):
        model.add_module(layer, nn.Module())
        model[int(layer)].add_module(name, nn.Linear(8, 24))
        model[int(layer)].q_proj = nn.Linear(8, 8)
    told = rf"2 parameters such as 0.{name}.weight look fused .*matrices={{'\*{name}\*': {{'split_sizes': ...}}}}"
    declared = {f"*.{name}.weight": {"split_sizes": (8, 8, 8)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params in (model, model.named_parameters()):
            notes = distmuon.Muon(params, **SETTINGS).report().notes
            assert re.match(told, notes[0])
        for matrices in (declared, {"*": "auto", **declared}, "whole", {"*": "auto", f"*{name}*": "whole"}):
            notes = distmuon.Muon(model, **SETTINGS, matrices=matrices).report().notes
            assert not any("look fused" in note for note in notes)
    for matrices in ("auto", "heads", {"0.*": "auto", "1.*": {"transposed": False}}):
        count = 2 if isinstance(matrices, str) else 1
        with pytest.warns(UserWarning, match=rf"^{count} parameters such as 0.{name}.weight look fused") as caught:
            optimizer = distmuon.Muon(model, **SETTINGS, matrices=matrices)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert re.match(told, optimizer.report().notes[0])
        row = next(row for row in optimizer.report().rows if row.name == f"0.{name}.weight")
        assert row.matrices == "24 x 8"


def test_what_is_not_fused_is_not_told():
    model = nn.ModuleDict()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up", "gate_proj", "c_fc", "c_proj", "kvant", "w1", "wk"):
        model[name] = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = distmuon.Muon(model, **SETTINGS, matrices="auto").report().notes
    assert not any("fused" in note for note in notes)


def test_classes_of_the_same_name_elsewhere_are_not_known():
    class Phi3MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Linear(4, 8)

    assert presets(Phi3MLP()) == {}
