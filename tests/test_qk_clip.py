"""QK-Clip against attention logits that are computed here, whole and in float64, from what models hand to attention."""

import copy
import math
import sys
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import distmuon
from distmuon.qk_clip import implementation, record
from distmuon.qk_clip.factors import head_factors
from distmuon.qk_clip.heads import Fused, Latent, MultiHead, NormGains

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "first_k_dense_replace": 4}
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),  # biases of q and k
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 3}),
    "deepseek": ("deepseek_v3", {**MLA, "num_key_value_heads": 4, "q_lora_rank": 10}),
    "deepseek-q": ("deepseek_v3", {**MLA, "num_key_value_heads": 4, "q_lora_rank": None}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox", {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"]}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
}


def make_model(name, attention="sdpa", dtype=torch.float64, **changes):
    kind, extra = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for path, param in model.named_parameters():
            if param.ndim == 1:  # norms and biases that are not all alike
                param.add_(0.3 * torch.randn_like(param))
            assert param.requires_grad, path
    return model.train()


def make_batch(left=0, right=0, tokens=12):
    ids = torch.randint(3, 61, (3, tokens))
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[1, tokens - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model, batch, window=None):
    """Scaled visible logits of each attention layer, float64, hidden ones -inf; of a copy that records nothing."""
    twin = copy.deepcopy(model).double()
    for config in {id(m.config): m.config for m in twin.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = "eager"
    attention = next(m for m in twin.modules() if type(m).__name__.endswith("Attention"))
    file, found = sys.modules[type(attention).__module__], []
    eager = file.eager_attention_forward
    tokens = batch["input_ids"].shape[1]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & (distance < (window or tokens)) & batch["attention_mask"][:, None, None, :].bool()

    def spy(module, q, k, v, mask, scaling, **kwargs):
        ratio = q.shape[1] // k.shape[1]
        scores = torch.stack([q[:, head] @ k[:, head // ratio].mT * scaling for head in range(q.shape[1])], 1)
        found.append(scores.masked_fill(~visible, -math.inf))
        return eager(module, q, k, v, mask, scaling=scaling, **kwargs)

    with mock.patch.object(file, "eager_attention_forward", spy), torch.no_grad():
        twin(**batch)
    return found


def largest(logits):
    return logits.amax((0, 2, 3))


# --- what is recorded


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "deepseek"])
def test_recorded_maxima_are_of_what_is_visible(name, attention):
    if (name, attention) == ("deepseek", "flex_attention"):
        pytest.skip("transformers has no FlexAttention for it")
    window = 3 if name == "mistral" else None
    model = make_model(name, attention, torch.float32, num_hidden_layers=2)
    for batch in (make_batch(), make_batch(left=4), make_batch(right=5)):
        # on a CPU FlexAttention is for inference alone
        with torch.set_grad_enabled(attention != "flex_attention"), torch.compiler.set_stance("force_eager"):
            before = model(**batch).logits
            handle = distmuon.attach_qk_clip(model, tau=1e4)
            assert torch.equal(model(**batch).logits, before)
        handle.step()
        found = handle.last_max_logits()
        assert list(found) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        for (_, maxima), logits in zip(found.items(), logits_of(model, batch, window), strict=True):
            torch.testing.assert_close(maxima.double(), largest(logits), rtol=1e-4, atol=1e-4)
        handle.detach()
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_record_max_logits(block, monkeypatch):
    monkeypatch.setattr(record, "_BLOCK", block)
    q, k = torch.randn(2, 6, 9, 4), torch.randn(2, 3, 11, 4)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
    bounded = [
        (None, torch.ones(9, 11, dtype=torch.bool)),
        ("bool", torch.rand(2, 6, 9, 11) < 0.3),
        ("row", torch.rand(2, 1, 1, 11) < 0.5),
        ("none", torch.arange(6)[:, None, None].expand(2, 6, 9, 11) > 2),
    ]
    for kind, visible in bounded:
        for is_causal in (False, True):
            seen = visible & (torch.ones(9, 11, dtype=torch.bool).tril() | (not is_causal))
            expected = logits.masked_fill(~seen, -math.inf).amax((0, 2, 3))
            bias = torch.where(visible, 0.7, torch.finfo(torch.float32).min)
            for mask in (None,) if kind is None else (visible, bias):
                found = distmuon.record_max_logits(q, k, 0.3, mask, is_causal=is_causal)
                torch.testing.assert_close(found, expected)
    torch.testing.assert_close(distmuon.record_max_logits(q, k), (logits / 0.3 / 2).amax((0, 2, 3)))
    with pytest.raises(ValueError, match="positive scale"):
        distmuon.record_max_logits(q, k, -1.0)


def test_flex_attention_tells_its_maxima(monkeypatch):
    """The path of GPUs, whose kernel is replaced by its definition."""
    from transformers.integrations import flex_attention

    calls = []

    def kernel(q, k, v, *, training, block_mask, enable_gqa, scale, kernel_options, return_aux):
        calls.append(return_aux)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
        aux = mock.Mock(lse=scores.logsumexp(-1), max_scores=scores.amax(-1).detach())
        return scores.softmax(-1) @ v, aux

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", kernel)
    monkeypatch.setattr(implementation, "_kernel_tells", lambda *_: True)
    model, batch = make_model("llama-gqa", "flex_attention", torch.float32), make_batch()
    expected = copy.deepcopy(model)
    expected.set_attn_implementation("sdpa")
    handle = distmuon.attach_qk_clip(model, tau=1e4)
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-3, atol=1e-3)
    handle.step()
    (maxima,) = handle.last_max_logits().values()
    torch.testing.assert_close(maxima.double(), largest(logits_of(expected, batch)[0]), rtol=1e-4, atol=1e-4)
    assert calls and calls[0].max_scores


# --- what is scaled


def expected_factors(name, maxima, tau, gqa):
    """The formulas, head by head."""
    gamma = [min(1.0, tau / s) if s > 0 else 1.0 for s in maxima.tolist()]
    if name in ("qwen3", "gemma3"):  # gains of one head, which all heads share
        return [min(gamma)] * 4
    if gqa == "group" and name in ("llama-gqa", "qwen2", "phi3", "olmo2"):
        gamma = [min(gamma[head // 2 * 2], gamma[head // 2 * 2 + 1]) for head in range(4)]
    return gamma


@pytest.mark.parametrize(
    ("name", "gqa"),
    [
        ("llama", "group"),
        ("llama", "query"),
        ("llama-gqa", "group"),
        ("llama-gqa", "query"),
        ("qwen2", "group"),
        ("qwen2", "query"),
        ("deepseek", "group"),
        ("deepseek-q", "group"),
        ("phi3", "group"),
        ("phi3", "query"),
        ("gpt2", "group"),
        ("gpt_neox", "group"),
        ("qwen3", "group"),
        ("gemma3", "group"),
        ("olmo2", "group"),
        ("olmo2", "query"),
    ],
)
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_logits_after_the_clip(name, gqa, alpha):
    model, batch = make_model(name), make_batch(left=3)
    before = {path: param.detach().clone() for path, param in model.named_parameters()}
    logits = logits_of(model, batch)[0]
    maxima = largest(logits)
    tau = float(maxima.sort().values[1:3].mean())  # two heads above, two below
    assert tau > 0
    handle = distmuon.attach_qk_clip(model, tau=tau, alpha=alpha, gqa=gqa, qk_norm="gain")
    model(**batch)
    handle.step()
    factors = torch.tensor(expected_factors(name, maxima, tau, gqa), dtype=torch.float64)
    after = logits_of(model, batch)[0]
    shown = logits.isfinite()
    expected = logits * factors[:, None, None]
    torch.testing.assert_close(after[shown], expected[shown], rtol=2e-6, atol=1e-5)
    if gqa == "query" or name in ("llama", "gpt2", "gpt_neox", "deepseek", "deepseek-q"):
        torch.testing.assert_close(largest(after), maxima.clamp(max=tau), rtol=2e-6, atol=0)
    torch.testing.assert_close(largest(after).max(), torch.tensor(tau, dtype=torch.float64), rtol=2e-6, atol=0)
    assert handle.metrics()["qk_clip/clipped_heads"] == 2 == handle.metrics()["qk_clip/clips"]
    changed = {path.split(".")[-2] for path, param in model.named_parameters() if not torch.equal(param, before[path])}
    parts = {
        "deepseek": {"q_b_proj", "kv_b_proj"},
        "deepseek-q": {"q_proj", "kv_b_proj"},
        "phi3": {"qkv_proj"},
        "gpt2": {"c_attn"},
        "gpt_neox": {"query_key_value"},
        **{key: {"q_norm", "k_norm"} for key in ("qwen3", "gemma3", "olmo2")},
    }.get(name, {"q_proj", "k_proj"})
    assert changed == (parts - {"k_proj", "k_norm"} if gqa == "query" and name not in ("llama", "phi3") else parts)


def test_shares_of_the_factor():
    """Which rows get which power: the product alone would not tell."""
    maxima = torch.tensor([400.0, 50.0])  # gamma 1/4 and 1
    half, whole, one = 0.5, 0.25, 1.0
    weight, bias = torch.ones(8, 3), torch.ones(8)
    q, k = (weight.clone(), bias.clone()), weight.clone()
    gammas = distmuon.qk_clip_({"q_proj": q, "k_proj": k}, maxima, MultiHead(2, 2))
    assert gammas.tolist() == [0.25, 1.0]
    for tensor in (*q, k):
        assert tensor.view(8, -1)[:, 0].tolist() == [half] * 4 + [one] * 4
    q, kv = torch.ones(6, 3, dtype=torch.bfloat16), torch.ones(8, 3)
    distmuon.qk_clip_({"q_b_proj": q, "kv_b_proj": kv}, maxima, Latent(2, 2, 1, 2))
    assert q[:, 0].tolist() == [half, half, whole, one, one, one]
    assert kv[:, 0].tolist() == [half, half, one, one, one, one, one, one]
    maxima = torch.tensor([400.0, 50.0, -3.0, 1600.0])
    for layout, expected in (
        ("sectioned", [half, half, 0.25, 0.25, half, 0.25, one, one]),
        ("interleaved", [half, half, half, one, 0.25, 0.25, 0.25, one]),
    ):
        qkv = torch.ones(3, 16)
        distmuon.qk_clip_({"qkv_proj": qkv}, maxima, Fused(4, 2, layout, transposed=True))
        assert qkv[0].tolist() == [value for value in expected for _ in range(2)]
        assert (qkv == qkv[0]).all()
    q, k = torch.ones(4), torch.ones(2)
    distmuon.qk_clip_({"q_proj": q, "k_proj": k}, maxima, MultiHead(4, 2), gqa="query")
    assert q.tolist() == [0.25, 1.0, 1.0, 0.0625] and k.tolist() == [1.0, 1.0]
    q, k = torch.ones(2), torch.ones(2)
    distmuon.qk_clip_({"q_norm": q, "k_norm": k}, maxima, NormGains(4, 2, 2, offset=1.0))
    assert q.tolist() == k.tolist() == [-0.5, -0.5]  # 1 + w = 2 becomes 0.5


def test_factors_of_odd_maxima():
    odd = [-3.0, -0.0, 0.0, 99.0, 100.0, 200.0, -math.inf, math.inf, math.nan]
    assert head_factors(torch.tensor(odd), 100.0).tolist() == [1, 1, 1, 1, 1, 0.5, 1, 1, 1]


def test_negative_logits_change_no_bit():
    model, batch = make_model("llama"), make_batch()
    handle = distmuon.attach_qk_clip(model, tau=0.5)
    before = copy.deepcopy(model.state_dict())
    handle.update("model.layers.0.self_attn", torch.tensor([-3.0, -1e4, 0.4, -math.inf]))
    handle.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model(**batch).logits.isfinite().all()


# --- when


def make_tiny(**settings):
    model = make_model("llama-gqa", dtype=torch.float32)
    optimizer = distmuon.Muon(model, lr=1e-3, adjust_lr_fn="match_rms_adamw", on_nonfinite="skip")
    return model, optimizer, distmuon.attach_qk_clip(model, optimizer, **settings)


def recorded(handle):
    return handle._maxima.on(torch.device("cpu")).clone()


def test_accumulation_recomputation_and_evaluation():
    model, optimizer, handle = make_tiny(tau=1e4)
    twin = copy.deepcopy(model)
    batches = [make_batch(), make_batch()]
    name = "model.layers.0.self_attn"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for batch in batches:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    loud = copy.deepcopy(batches[0])
    with torch.no_grad():
        for _ in range(3):
            loud["input_ids"] = torch.randint(3, 61, (3, 30))
            loud["attention_mask"] = torch.ones_like(loud["input_ids"])
            model(**loud)
    model.train()
    optimizer.step()
    expected = torch.stack([largest(logits_of(twin, batch)[0]) for batch in batches]).amax(0)
    torch.testing.assert_close(handle.last_max_logits()[name].double(), expected, rtol=1e-4, atol=1e-4)
    assert recorded(handle).eq(-math.inf).all()  # the next step starts from nothing
    model.zero_grad()
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    optimizer.step()
    now = handle.last_max_logits()[name]
    assert (now.double() - expected).abs().max() > 0.01


def test_every_and_metrics():
    model, optimizer, handle = make_tiny(tau=1.0, every=3)
    assert handle.metrics() == {} and handle.last_max_logits() == {}
    recording = []
    for step in range(7):
        batch = make_batch()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        recording.append(recorded(handle).isfinite().all().item())
        optimizer.step()
        handle_said = handle.metrics()
        if step == 0:
            first = handle_said
            assert first["qk_clip/max_logit"] > 1.0 and first["qk_clip/clipped_heads"] == 4
        if step in (1, 2):
            assert handle_said == first
        optimizer.zero_grad()
    assert recording == [True, False, False, True, False, False, True]
    assert handle.metrics()["qk_clip/clips"] > 4


def test_skipped_steps_change_nothing_and_forget():
    model, optimizer, handle = make_tiny(tau=1.0)
    batch = make_batch()
    before = copy.deepcopy(model.state_dict())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.lm_head.weight.grad[0, 0] = math.nan
    assert recorded(handle).isfinite().all()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and handle.metrics() == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert recorded(handle).eq(-math.inf).all()


def test_steps_that_a_grad_scaler_leaves_out():
    """The optimizer is not called: maxima of the same weights count on, and overflows among them do not."""
    model, optimizer, handle = make_tiny(tau=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    batch = make_batch()
    scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
    model.lm_head.weight.grad[0, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    seen = recorded(handle)
    handle.update("model.layers.0.self_attn", torch.full((4,), math.inf))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = recorded(handle)
    assert kept.isfinite().all() and torch.equal(kept, seen)
    optimizer.zero_grad()
    scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
    scaler.step(optimizer)
    assert torch.equal(handle.last_max_logits()["model.layers.0.self_attn"], kept)
    handle.update("model.layers.0.self_attn", torch.ones(4))
    handle.reset()
    assert recorded(handle).eq(-math.inf).all()


def test_compiled_layers_are_not_compiled_again():
    """Two graphs, that of recorded steps and the other; the first step makes what the others write into."""
    model, optimizer, handle = make_tiny(tau=1.0, every=2)
    twin, other, beside = make_tiny(tau=1.0, every=2)
    twin.load_state_dict(model.state_dict())
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for step in range(6):
        batch = make_batch()
        stance = "default" if step < 3 else "fail_on_recompile"
        for one, opt in ((model, optimizer), (twin, other)):
            with torch.compiler.set_stance(stance):
                one(**batch, labels=batch["input_ids"]).loss.backward()
            opt.step()
            opt.zero_grad()
        assert handle.metrics() == pytest.approx(beside.metrics(), rel=1e-3)


# --- the preset, and what is refused


def test_muon_clip_is_muon_and_then_the_clip():
    model = make_model("llama-gqa", dtype=torch.float32)
    twin, batch = copy.deepcopy(model), make_batch()
    preset = distmuon.MuonClip(model, lr=1e-3, tau=1.0)
    by_hand = distmuon.Muon(twin, 1e-3, 0.1, 0.95, False, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        maxima = largest(logits_of(twin, batch)[0]).float()
        for one, optimizer in ((model, preset), (twin, by_hand)):
            optimizer.zero_grad()
            one(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
        distmuon.qk_clip_(twin.model.layers[0].self_attn, maxima, MultiHead(4, 2), tau=1.0)
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-5)
        for name in ("q_proj", "k_proj"):
            weights = [getattr(m.model.layers[0].self_attn, name).weight for m in (model, twin)]
            buffers = [o.state[w]["momentum_buffer"] for o, w in zip((preset, by_hand), weights, strict=True)]
            torch.testing.assert_close(*buffers, rtol=1e-4, atol=1e-7)
    assert preset.qk_clip.metrics()["qk_clip/clips"] >= 4


class OwnAttention(nn.Module):
    """Of a model that transformers did not make."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk = nn.Linear(8, 8), nn.Linear(8, 4)
        self.handle = None

    def forward(self, x):
        q = self.wq(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k = self.wk(x).unflatten(-1, (2, 2)).transpose(1, 2)
        self.handle.record("0", q, k, is_causal=True)
        return q, k


def test_own_models():
    model = nn.Sequential(OwnAttention())
    handle = distmuon.attach_qk_clip(model, tau=0.1, attention={"0": MultiHead(4, 2, "wq", "wk")}, gqa="query")
    model[0].handle = handle
    x = torch.randn(2, 5, 8)
    model(x)
    handle.step()
    before = handle.last_max_logits()["0"]
    model(x)
    handle.step()
    torch.testing.assert_close(handle.last_max_logits()["0"], before.clamp(max=0.1))
    with pytest.raises(ValueError, match="no layer that QK-Clip was attached to"):
        handle.record("1", *model(x))


def test_refusals():
    for name in ("qwen3", "gemma3", "olmo2"):
        with pytest.raises(ValueError, match="scaling W_q and W_k is a mathematical no-op"):
            distmuon.attach_qk_clip(make_model(name))
    model = make_model("llama-gqa")
    for settings, words in (
        ({"tau": 0.0}, "tau=0.0"),
        ({"alpha": 2.0}, "alpha=2.0"),
        ({"gqa": "head"}, "gqa='head'"),
        ({"every": 0}, "every=0"),
        ({"qk_norm": "yes"}, "qk_norm='yes'"),
        ({"attention": {"x": MultiHead(4, 2)}}, "names no module"),
        ({"attention": {"*.self_attn": MultiHead(4, 2, "wq")}}, "there is no weight of that name"),
        ({"attention": {"*.self_attn": MultiHead(4, 3)}}, "4 query heads and 3 key heads"),
    ):
        with pytest.raises(ValueError, match=words):
            distmuon.attach_qk_clip(model, **settings)
    with pytest.raises(TypeError, match=r"tau='1e2' \(a str\): it takes a number"):
        distmuon.attach_qk_clip(model, tau="1e2")
    optimizer = torch.optim.SGD(make_model("llama-gqa").parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the SGD updates none of the attention projections, such as .*self_attn'"):
        distmuon.attach_qk_clip(model, optimizer)
    with pytest.raises(TypeError, match="takes the model first, then its optimizer, and got a SGD"):
        distmuon.attach_qk_clip(optimizer, model)
    handle = distmuon.attach_qk_clip(model)
    with pytest.raises(ValueError, match="attached to this model already"):
        distmuon.attach_qk_clip(model)
    handle.detach()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2', which does not tell"):
        distmuon.attach_qk_clip(model)
    model.config._attn_implementation = "sdpa"
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="trains some of"):
        distmuon.attach_qk_clip(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trained attention layer"):
        distmuon.attach_qk_clip(model)
    with pytest.raises(ValueError, match="not 3 heads"):
        distmuon.qk_clip_({"q_proj": torch.ones(8, 2), "k_proj": torch.ones(8, 2)}, torch.ones(3), MultiHead(3, 1))
    with pytest.raises(ValueError, match="layout='mixed'"):
        Fused(4, 4, "mixed")


def test_fused_projections_of_other_classes():
    model = make_model("phi3")
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("Other", (nn.Module,), dict(vars(type(attention))))
    with pytest.raises(ValueError, match="say by layout="):
        distmuon.attach_qk_clip(model)
    handle = distmuon.attach_qk_clip(model, layout="interleaved")
    assert handle._layers[0].heads == Fused(4, 2, "interleaved", "qkv_proj")
    handle.detach()
