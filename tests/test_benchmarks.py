"""What the benchmarks compute beside what they time."""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import distmuon
from distmuon.numerics.coefficients import resolve_stages
from distmuon.numerics.polar import polar_factor
from distmuon.numerics.recipe import Request, choose

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import accuracy  # noqa: E402
import engine_losses  # noqa: E402
import family  # noqa: E402
import family_costs  # noqa: E402
import heads  # noqa: E402
import lr_sweep  # noqa: E402
import matrix_families  # noqa: E402
import momenta  # noqa: E402
import orthogonalize  # noqa: E402
import orthogonalize_contenders as ways  # noqa: E402
import qk_clip  # noqa: E402
import step_time  # noqa: E402
import step_time_contenders as contenders  # noqa: E402
import step_time_probes as probes  # noqa: E402
import step_time_report as report  # noqa: E402
from engine_losses_report import Outcome, same_curves, spreads  # noqa: E402
from family_members import MEMBERS, REFERENCE  # noqa: E402
from family_report import against  # noqa: E402
from lr_sweep_report import Curve, moves, vertex  # noqa: E402
from orthogonalize_report import Result, as_json, geometric_means, make_table, summary  # noqa: E402
from step_time_ranks import Row  # noqa: E402
from timing import Judged, Timing, interleaved  # noqa: E402

NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  174125    2082    0    0    0     0          0         0   174126    2083    0    0    0     0       0          0
  eth0: 362460781    8547    0    0    0     0          0         0   492811    4855    0    0    0     0       0          0
"""  # noqa: E501


def test_bytes_sent_on_loopback_are_read():
    assert probes.loopback_bytes(NET_DEV) == 174126
    with pytest.raises(ValueError, match="no interface lo"):
        probes.loopback_bytes(NET_DEV.replace("lo:", "l0:"))


def test_use_of_the_cores_leaves_idle_time_and_interrupts_out():
    ticks = {"user": 1, "nice": 2, "system": 4, "idle": 8, "wait": 16, "irq": 32, "softirq": 64, "steal": 128}
    text = "cpu  " + " ".join(map(str, ticks.values())) + " 0 0\ncpu0 1 1"
    assert probes.cpu_seconds(text) * 100 == pytest.approx(1 + 2 + 4 + 128)


def test_least_bytes():
    numels = [512 * 512] * 3 + [2048 * 512]
    total = 2 * sum(numels)
    assert probes.least_bytes(numels, 1, "FSDP2") == probes.least_bytes(numels, 1, "replicated") == 0
    # at two ranks both layouts send every matrix once
    assert probes.least_bytes(numels, 2, "FSDP2") == probes.least_bytes(numels, 2, "replicated") == total
    assert probes.least_bytes(numels, 4, "replicated") == 3 * total
    # up: three quarters of each matrix to its owner; down: the same
    assert probes.least_bytes(numels, 4, "FSDP2") == 1.5 * total


def test_a_bucket_is_one_shape_up_to_the_bound_of_each_rank():
    shapes = [(512, 512)] * 32 + [(2048, 512)] * 7
    assert step_time.bucket_bytes(shapes, 1) == 2 * 32 * 512 * 512
    assert step_time.bucket_bytes(shapes, 4) == 2 * 32 * 512 * 512
    bound = inspect.signature(distmuon.Muon).parameters["bucket_bytes"].default
    assert step_time.bucket_bytes([(512, 512)] * 1000, 1) == bound
    assert step_time.bucket_bytes([(512, 512)] * 1000, 4) == 4 * bound
    assert step_time.bucket_bytes([(16384, 8192)], 1) == 2 * 16384 * 8192 > bound


def test_a_long_sample_is_judged_alone_and_a_short_one_by_its_round():
    assert probes.judge([1.0, 1.0, 0.01], [0.5, 0.0, 0.0], cores=2) == [False, True, False]
    assert probes.judge([1.0, 1.0, 0.01], [0.1, 0.0, 0.02], cores=2) == [True, True, True]


def test_peak_memory_is_what_was_allocated_at_once():
    def step():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second + 1

    for _ in range(2):
        assert probes.peak_bytes(step, "cpu") == pytest.approx(8_000_000, abs=1000)


def test_settings_are_read():
    settings = contenders.parse_settings("ns_steps=4 wire_dtype=float32 ns_coefficients=nested14 foreach=False")
    assert settings == {"ns_steps": 4, "wire_dtype": torch.float32, "ns_coefficients": "nested14", "foreach": False}
    with pytest.raises(ValueError, match="'ns_steps'"):
        contenders.parse_settings("ns_steps 4")
    with pytest.raises(ValueError, match="'float31'"):
        contenders.parse_settings("wire_dtype=float31")


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (3, 32, 32)])
def test_the_quintic_of_the_peers_is_that_of_torch(shape):
    """Up to a few roundings of bfloat16 (2^-8): torch adds inside its products, the peers after them."""
    x = torch.randn(shape)
    y = contenders.plain_quintic(x)
    for grad, found in zip(x.reshape(-1, *shape[-2:]), y.reshape(-1, *shape[-2:]), strict=True):
        param = torch.nn.Parameter(torch.zeros(shape[-2:]))
        param.grad = grad
        torch.optim.Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
        torch.testing.assert_close(-param.detach() / scale, found.float(), atol=2**-5, rtol=2**-5)


def test_models_have_the_matrices_they_are_named_for():
    def millions(name):
        blocks, shapes = contenders.MODELS[name]
        return blocks * sum(rows * cols for rows, cols in shapes) / 1e6

    assert millions("blocks_512") == pytest.approx(25.2, abs=0.05)
    # parameters without embeddings, heads and norms
    assert millions("gpt2_124m") == millions("gpt2_124m_split_qkv") == pytest.approx(84.9, abs=0.05)
    assert millions("qwen3_0.6b") == pytest.approx(440.4, abs=0.05)
    assert millions("llama3.2_1b") == pytest.approx(973.1, abs=0.05)
    assert millions("llama3_8b") == pytest.approx(6979.3, abs=0.05)


def test_a_peer_is_imported_without_compilation(tmp_path, monkeypatch):
    (tmp_path / "muon_fsdp2.py").write_text(
        "import torch\n@torch.compile(fullgraph=True)\ndef decorated(x): return x\ncalled = torch.compile(decorated)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    compile_before = torch.compile
    arguments = {"ours_settings": (), "compile_peers": False}
    found = contenders.contenders("cpu", peer_paths=[str(tmp_path)], **arguments)
    peer = sys.modules.pop("muon_fsdp2")
    assert [(c.name, c.layout) for c in found][-1] == ("muon-fsdp2", "FSDP2")
    assert peer.called is peer.decorated and type(peer.decorated).__name__ == "function"
    assert torch.compile is compile_before
    (tmp_path / "muon_fsdp2.py").unlink()
    with pytest.raises(ValueError, match="found no peer"):
        contenders.contenders("cpu", peer_paths=[str(tmp_path)], **arguments)


def test_a_row_that_failed_or_was_disturbed_says_so():
    rows = [
        Row("torch.optim.Muon", "replicated", "", 0, Timing(4.0, 3.0, 5.0, 3)),
        Row("ours", "FSDP2", "a note", 10, Timing(2.0, 1.0, 3.0, 3), quiet=False),
        Row("theirs", "FSDP2", "", 10, error="ValueError: no"),
    ]
    assert report.baseline_ms(rows) == 4.0
    assert report.make_table(rows, 2, bucket=100).row_count == 3
    lines = report.notes(rows)
    assert lines[:2] == ["ours: a note.", "theirs, FSDP2, failed: ValueError: no"]
    assert lines[2].startswith("* No sample of this row was quiet")


def test_work_is_read():
    parts = ways.parse_work("gpt2_pair")
    assert [(part.count, part.rows, part.cols) for part in parts] == [(8, 768, 768), (2, 3072, 768), (2, 768, 3072)]
    assert ways.parse_work("3072x768") == (ways.Part(1, 3072, 768),)
    for wrong in ("768", "axb", "1x2x3x4", "0x4x4"):
        with pytest.raises(ValueError, match=f"'{wrong}'"):
            ways.parse_work(wrong)


def test_flops_of_the_engines():
    wide = ways.Part(3, 64, 256)
    big, small = 2 * 64 * 64 * 256, 2 * 64**3
    assert wide.standard_flops == ways.Part(3, 256, 64).standard_flops == 3 * (10 * big + 5 * small)
    cpu = torch.device("cpu")
    assert wide.flops(ways.engine_recipe("standard", wide, cpu)) == wide.standard_flops
    assert wide.flops(ways.engine_recipe("composed", wide, cpu)) == 3 * (8 * big + 6 * small)
    # two inverses, each half of a product
    assert wide.flops(ways.engine_recipe("rational", wide, cpu)) == 3 * (2 * big + small)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_the_baselines_run_the_quintic(shape):
    x = torch.randn(shape)
    stages = resolve_stages("quintic", 5)
    exact = distmuon.orthogonalize(x.double(), coefficients=stages, engine="composed")
    torch.testing.assert_close(ways.result_of("float32", x).double(), exact, atol=2e-4, rtol=0)
    assert torch.equal(ways.result_of("torch", x), ways.result_of("standard", x))
    assert (ways.result_of("torch", x).double() - exact).abs().max() < 2**-4


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (512, 128), (256, 256), (300, 1024), (768, 3072)])
@pytest.mark.parametrize("engine", ["composed", "gram"])
def test_iterates_are_held_as_with_bfloat16_units(shape, engine, native_bf16):
    native = choose(*shape, torch.device("cpu"), Request(torch.bfloat16, engine))
    assert native.dtype is torch.bfloat16
    assert ways.held_recipe(engine, *shape, torch.bfloat16) == native


def judged(median, *, quiet=True):
    return Judged(median, median, median, 3, 0, quiet)


def test_foretold_times_stay_out_of_measured_ratios():
    measured = Result("8x8", {"torch": judged(8.0), "float32": judged(4.0), "auto": judged(2.0)})
    foretold = Result("4x4", {"float32": judged(4.0), "auto": judged(1.0, quiet=False)}, foretold_ms=1000.0)
    assert foretold.ratio("auto", "torch") is None and measured.foretold_ratio("auto") is None
    means = geometric_means([measured, foretold])
    assert means["torch"]["auto"] == (0.25, 1)
    assert means["float32"]["auto"] == (pytest.approx(math.sqrt(0.5 * 0.25)), 2)
    assert means["torch_foretold"]["auto"] == (pytest.approx(0.001), 1)
    first, second = as_json([measured, foretold])
    assert first["ratios"]["torch"]["auto"] == 0.25 and first["ratios_to_foretold_torch"] == {}
    assert second["ratios"] == {"float32": {"float32": 1.0, "auto": 0.25}}
    assert second["ratios_to_foretold_torch"]["auto"] == 0.001 and "torch" not in second["ms"]
    table = make_table(foretold)
    assert list(table.columns[1].cells) == ["~1,000", "4.0", "1.0*"]
    assert list(table.columns[4].cells) == ["", "~0.0040", "~0.0010"]
    assert "auto ~0.001 (1)" in summary([measured, foretold])[-1]


def test_a_disturbed_sample_is_rejected(monkeypatch):
    quiet = iter([True, False, True, True, False, True])
    monkeypatch.setattr("timing._sample", lambda function, device: (function(), next(quiet)))
    functions = {"a": lambda: 1.0, "b": lambda: 2.0}
    timings = interleaved(functions, samples=2, limit_s=60, device=torch.device("cpu"))
    assert timings["a"] == Judged(1.0, 1.0, 1.0, 2, rejected=1, quiet=True)
    assert timings["b"] == Judged(2.0, 2.0, 2.0, 2, rejected=1, quiet=True)
    monkeypatch.setattr("timing._sample", lambda function, device: (function(), False))
    timings = interleaved(functions, samples=2, limit_s=60, device=torch.device("cpu"))
    assert timings["a"] == Judged(1.0, 1.0, 1.0, 4, rejected=0, quiet=False)


@pytest.fixture
def short_samples(monkeypatch):
    monkeypatch.setattr(orthogonalize, "_SAMPLE_S", 1e-3)
    monkeypatch.setattr(orthogonalize, "_REFERENCE", ways.Part(1, 16, 16))


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    return module.main()


@pytest.mark.parametrize("limit", [60.0, 1e-9])
def test_engines_are_timed(limit, tmp_path, monkeypatch, short_samples, capsys):
    save_momenta(tmp_path / "momenta.safetensors")
    outputs = ["--json", tmp_path / "found.json", "--picture", tmp_path / "found.png"]
    arguments = ["--shapes", "8x16", "2x8x8+1x16x8", "--samples", 2, "--device", "cpu", "--limit", limit]
    monkeypatch.setattr(orthogonalize, "has_native_bf16", lambda device_type: False)
    run_main(orthogonalize, monkeypatch, *arguments, *outputs, "--momenta", tmp_path / "momenta.safetensors")
    found = json.loads((tmp_path / "found.json").read_text())
    alone, pair = found["results"]
    assert alone["chosen"].keys() == {"8x16"} and pair["chosen"].keys() == {"8x8", "16x8"}
    engines = {"float32", "composed", "gram", "rational", "auto"}
    left_out = limit < 1
    assert alone["ms"].keys() == (engines if left_out else engines | {"torch", "standard"})
    assert (alone["foretold_torch_ms"] is not None) == ("torch" not in alone["ratios"]) == left_out
    assert ("~ foretold from its FLOPs: float32 ~" in capsys.readouterr().out) == left_out
    assert found["geometric_means"]["torch_foretold" if left_out else "torch"]["auto"]["shapes"] == 2
    assert found["geometric_means"]["torch" if left_out else "torch_foretold"]["auto"]["mean"] is None
    assert alone["ms"]["auto"]["median"] > 0 and alone["gflops"]["auto"] > 0 and alone["product_gflops"] > 0
    # the file has matrices of 8 x 16 and none of the others
    assert alone["accuracy"].keys() == {"gauss", "momenta"} and pair["accuracy"].keys() == {"gauss"}
    assert 0 < alone["accuracy"]["gauss"]["auto"]["error"] < 0.3
    assert found["momenta"].keys() == {"8x16", "6x6"}
    assert (tmp_path / "found.png").stat().st_size > 0


@pytest.mark.slow
def test_heads_are_timed_and_send_nothing_where_they_lie_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(heads.MODELS, "qwen3_0.6b", (1, [(16, 8), (8, 8), (8, 8), (8, 16), (12, 8), (12, 8), (8, 12)]))
    run_main(heads, monkeypatch, "--head", 4, "--ranks", 2, "--samples", 2, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(found["ms"][word]) for word in ("whole", "heads")] == [2, 2]
    sent = found["bytes"]["2"]
    assert sent["q, k, v"]["heads"] == 0 < sent["q, k, v"]["whole"]
    assert sent["o"]["heads"] > 0


def test_whole_steps_are_timed(tmp_path, monkeypatch, short_samples):
    arguments = ["--shapes", "2x8x16", "--samples", 1, "--step", "--device", "cpu", "--engines", "composed", "auto"]
    run_main(orthogonalize, monkeypatch, *arguments, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["what"] == "optimizer steps"
    assert found["results"][0]["ms"].keys() == {"torch", "float32", "composed", "auto"}
    assert found["results"][0]["accuracy"] == {}


def save_momenta(path):
    from safetensors.torch import save_file

    stack = torch.randn(2, 8, 16)
    save_file({"step1/stack": stack, "step1/zero": torch.zeros(4, 4), "step2/square": torch.randn(6, 6)}, path)
    return stack


def test_saved_momenta_are_loaded(tmp_path):
    stack = save_momenta(tmp_path / "momenta.safetensors")
    found = matrix_families.load_momenta(tmp_path / "momenta.safetensors")
    assert found.keys() == {"step1/stack[0]", "step1/stack[1]", "step2/square"}
    assert torch.equal(found["step1/stack[1]"], stack[1])
    with pytest.raises(ValueError, match="no such file"):
        matrix_families.load_momenta(tmp_path / "other.safetensors")


def test_ill_conditioned_matrices_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    stacks = list(matrix_families.ill_conditioned(990, generator, stack=10))
    assert sum(map(len, stacks)) == 990 and all(torch.isfinite(stack).all() for stack in stacks)
    largest = torch.cat([stack.abs().amax((1, 2)) for stack in stacks])
    assert largest.max() > 1e25 and largest[largest > 0].min() < 1e-25
    conditions = []
    for stack in stacks:
        sigma = torch.linalg.svdvals(stack.double() / stack.abs().amax((1, 2), keepdim=True).clamp(min=1e-38))
        conditions += (sigma[:, -1] / sigma[:, 0]).tolist()
    # singular ones, ill-conditioned ones that are not, and those of one direction
    assert sum(value < 1e-7 for value in conditions) > 50
    assert sum(1e-7 < value < 1e-3 for value in conditions) > 50


def contender(name, run, **changes):
    return dataclasses.replace(accuracy.Contender(name, run, emulated=False), **changes)


def test_bars_of_accuracy_are_kept_or_missed():
    x = torch.randn(16, 24)

    def off(x):
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        return (u + 0.07 * u.roll(1, dims=1)) @ vh

    ways_to_fail = {
        "high": lambda x: 1.23 * polar_factor(x),
        "low": lambda x: 0.4 * polar_factor(x),
        "off": off,
        "nan": lambda x: polar_factor(x) * math.nan,
    }
    found = [contender("exact", polar_factor)] + [contender(name, run) for name, run in ways_to_fail.items()]
    rows = {row.engine: row for row in accuracy.measure({"gauss": [x, 2 * x]}, found, limit_s=60.0)}
    assert rows["exact"].passed and rows["exact"].matrices == 2
    assert rows["exact"].error < 1e-12 and rows["exact"].over_torch < -0.1
    assert rows["high"].high == pytest.approx(1.23) and rows["low"].under_torch > 0.05
    assert rows["off"].off == pytest.approx(0.07) and rows["off"].over_torch < 0
    assert not any(rows[name].passed for name in ways_to_fail)
    assert accuracy.accuracy_table(list(rows.values())).row_count == 5


def test_an_emulated_way_is_left_out_where_it_takes_too_long(monkeypatch):
    monkeypatch.setattr(accuracy, "has_native_bf16", lambda device_type: False)
    found = [contender("exact", polar_factor), contender("slow", polar_factor, emulated=True)]
    (row,) = accuracy.measure({"gauss": [torch.randn(16, 24)]}, found, limit_s=1e-9)
    assert (row.engine, row.stood_in) == ("exact", 1)


def test_scales_and_draws_are_judged():
    exact = functools.partial(accuracy.robustness, draws=100, device=torch.device("cpu"))

    def safe(x):
        return polar_factor(x.double() / x.double().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-300))

    good = exact(contender("good", safe))
    assert good.passed and good.draws == 100 and good.scales < 1e-6 and good.largest == pytest.approx(1.0)
    assert not exact(contender("large", lambda x: 1.3 * safe(x))).passed
    assert not exact(contender("nan", lambda x: safe(x) * math.nan)).passed
    drifting = exact(contender("drifting", lambda x: safe(x) * (1 - 0.1 * (x.abs().max() > 1e6).double())))
    assert not drifting.passed and drifting.finite and drifting.largest <= 1.0 + 1e-9
    assert exact(contender("torch", safe, any_scale=False)).scales is None


def test_the_table_of_accuracy(tmp_path, monkeypatch, capsys):
    save_momenta(tmp_path / "saved.safetensors")
    arguments = ["--shapes", "16x32", "--seeds", 0, "--draws", 50, "--device", "cpu", "--json", tmp_path / "found.json"]
    chosen = ["--engines", "standard", "rational", "--momenta", tmp_path / "saved.safetensors"]
    assert run_main(accuracy, monkeypatch, *arguments, *chosen) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["family"] for row in found["rows"]} >= {"gauss", "power_law", "saved"}
    assert {row["engine"] for row in found["robustness"]} == {"standard", "rational"}
    assert "All bars hold." in capsys.readouterr().out
    monkeypatch.setattr(accuracy, "HIGH", 0.5)
    assert run_main(accuracy, monkeypatch, *arguments, *chosen) == 1


@pytest.fixture
def tiny_config(tmp_path):
    """A run of the trainer of a second, on words of its own."""
    words = torch.randint(97, 105, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text("".join(" " if word == 97 else chr(word) for word in words))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tree = {
        "model": {
            "type": "llama",
            "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **heads},
        },
        "data": {"source": str(tmp_path / "words.txt"), "sequence_length": 16, "cache_dir": str(tmp_path / "cache")},
        "optim": {"lr": 3e-3},
        "train": {"steps": 6, "global_batch_tokens": 64, "device_batch": 4, "eval_tokens": 64, "device": "cpu"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_momenta_of_a_run_are_saved(tiny_config, tmp_path, monkeypatch):
    out = tmp_path / "momenta.safetensors"
    run_main(momenta, monkeypatch, "--config", tiny_config, "--steps", 1, "end", "--out", out)
    found = matrix_families.load_momenta(out)
    names = {name.split("/", 1)[1] for name in found}
    assert len(names) == 7 and len(found) == 14
    assert {tuple(value.shape) for value in found.values()} == {(16, 16), (32, 16), (16, 32)}
    for name in names:
        first, last = found[f"step1/{name}"], found[f"step6/{name}"]
        # 0.05 of one gradient, whose global norm is clipped at 1, and of six
        assert 0 < first.norm() <= 0.0501 and not torch.equal(first, last) and last.norm() < 0.3
    config = momenta.load_config(str(tiny_config))
    with pytest.raises(ValueError, match=r"steps=\[9\]"):
        momenta.collect(config, [9])
    wide = momenta.widened(config, 128, 2).model.config
    assert (wide["hidden_size"], wide["intermediate_size"], wide["num_attention_heads"]) == (128, 512, 2)


def test_every_engine_at_one_seed_and_one_engine_at_every_seed():
    runs = engine_losses.plan("c.yaml", ["composed", "auto"], [3, 4], "auto", steps=5, emulated=False)
    assert [(run.engine, run.seed) for run in runs] == [("composed", 3), ("auto", 3), ("auto", 4)]
    losses = {("composed", 3): 1.0, ("auto", 3): 1.5, ("auto", 4): 3.5}
    outcomes = [Outcome(*pair, "bfloat16", loss, 1.0, [(10, loss)]) for pair, loss in losses.items()]
    engines, seeds = spreads(outcomes, seed=3, engine="auto")
    assert engines.losses == {"composed": 1.0, "auto": 1.5} and engines.range == 0.5
    assert seeds.losses == {"3": 1.5, "4": 3.5} and seeds.deviation == pytest.approx(math.sqrt(2))
    twin = dataclasses.replace(outcomes[1], engine="gram", ns_dtype="float32")
    assert [names for names, _ in same_curves([*outcomes[:2], twin])] == ["composed", "auto = gram (float32)"]


def test_losses_of_engines(tiny_config, tmp_path, monkeypatch):
    pools = []

    class Here:
        """Runs in this process, whose imports are done."""

        def __init__(self, *arguments, **settings):
            pools.append(self)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(engine_losses, "ProcessPoolExecutor", Here)
    outputs = ["--json", tmp_path / "found.json", "--picture", tmp_path / "found.png", "--out", tmp_path / "runs"]
    chosen = ["--config", tiny_config, "--engines", "standard", "rational", "--seeds", 0, 1, "--seeds-of", "rational"]
    run_main(engine_losses, monkeypatch, *chosen, *outputs)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(run["engine"], run["seed"]) for run in found["runs"]] == [
        ("standard", 0),
        ("rational", 0),
        ("rational", 1),
    ]
    standard, rational, other_seed = (run["loss"] for run in found["runs"])
    assert len({standard, rational, other_seed}) == 3 and abs(standard - rational) < 0.5
    assert found["over_engines"]["range"] == pytest.approx(abs(standard - rational))
    assert found["steps"] == 6 and len(found["runs"][0]["curve"]) == 6
    assert (tmp_path / "found.png").stat().st_size > 0
    # finished runs are read and not trained again
    monkeypatch.setattr(engine_losses, "train", None)
    run_main(engine_losses, monkeypatch, *chosen, *outputs)
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_the_best_rate_lies_between_those_tried():
    def bowl(best, rates):
        return {lr: [1 + (math.log2(lr / best)) ** 2] for lr in rates}

    assert Curve("none", 8, bowl(0.05, [0.02, 0.04, 0.08])).best == pytest.approx(0.05)
    edge = Curve("none", 8, bowl(0.05, [0.005, 0.01, 0.02]))
    assert edge.best is None and edge.edge == 0.04 and edge.best_tried == 0.02
    assert Curve("none", 8, bowl(0.05, [0.08, 0.16])).edge == 0.04
    assert vertex({0.01: 2.0, 0.02: 1.0, 0.04: math.inf}) is None
    two_seeds = Curve("none", 8, {0.01: [2.0, 3.0], 0.02: [1.0, 1.0], 0.04: [2.0, 2.0]})
    assert two_seeds.best_by_seed == [pytest.approx(0.02), pytest.approx(0.02 * 2 ** (0.5 / 3))]
    wider = Curve("none", 32, bowl(0.025, [0.01, 0.02, 0.04, 0.08]))
    (line,) = moves([Curve("none", 8, bowl(0.05, [0.02, 0.04, 0.08])), wider])
    # log2(0.04 / 0.025) is 0.68, and log2(0.02 / 0.025) is -0.32
    assert line.startswith("none: from 0.05 at 8 to 0.025 at 32, times 0.50;") and "costs 0.356 nats" in line


def test_learning_rates_are_swept_over_widths(tmp_path, monkeypatch):
    losses = []

    def loss(run):
        """Best at 0.04 for all widths, but at match_rms_adamw at 0.08 / width."""
        best = 0.08 / run.size.hidden if run.scale == "match_rms_adamw" else 0.04
        losses.append(run)
        return 1 + math.log2(run.lr / best) ** 2 + run.seed

    class Here:
        """Answers in place of training, as Runner does."""

        def __init__(self, folder, workers, console):
            self.results = {}

        def run(self, title, runs):
            from token_efficiency_runs import Result

            self.results.update({run: Result(loss(run), seconds=1.0) for run in runs if run not in self.results})

        close = lambda self: None  # noqa: E731

    monkeypatch.setattr(lr_sweep, "Runner", Here)
    monkeypatch.setattr(lr_sweep, "open_corpus", lambda config: argparse.Namespace(description="words"))
    monkeypatch.setattr(lr_sweep, "FIRST", dict.fromkeys(lr_sweep.SCALES, 0.02))
    outputs = ["--out", tmp_path / "out", "--json", tmp_path / "found.json", "--picture", tmp_path / "found.png"]
    chosen = ["--widths", 4, 8, 32, "--seeds", 0, 1, "--seeds-to", 4, "--scales-to", 8]
    assert run_main(lr_sweep, monkeypatch, *chosen, *outputs) == 0
    curves = {(one["width"], one["scale"]): one for one in json.loads((tmp_path / "found.json").read_text())["curves"]}
    assert len(curves) == 4 + 4 + 2
    for (width, scale), one in curves.items():
        assert one["best_lr"] == pytest.approx(0.08 / width if scale == "match_rms_adamw" else 0.04)
        assert len(one["best_lr_by_seed"]) == (2 if width == 4 else 1)
    # seven rates first, then three, and two more down to where the widest has a neighbour below its best
    assert len(curves[4, "none"]["losses"]) == 7 and len(curves[8, "none"]["losses"]) == 3
    assert len(curves[32, "match_rms_adamw"]["losses"]) == 5 and len(losses) == len(set(losses))
    assert (tmp_path / "found.png").stat().st_size > 0


def test_a_run_of_the_sweep_differs_in_scale_and_rate_alone():
    size = lr_sweep.Size("width64", 64, 1, 3, 1)
    one, other = (lr_sweep.SweepRun(size, "muon", 0.04, scale=scale).config("") for scale in ("spectral", "none"))
    assert (one.optim.adjust_lr_fn, other.optim.adjust_lr_fn) == ("spectral", "none")
    assert dataclasses.replace(other, optim=dataclasses.replace(other.optim, adjust_lr_fn="spectral")) == one
    assert one.optim.adamw_lr == lr_sweep.ADAMW_LR and one.optim.weight_decay == 0
    assert one.model.config["initializer_range"] == 0.08 and one.train.steps == 3


def test_a_run_of_the_sweep_is_trained_once(tmp_path, monkeypatch):
    import token_efficiency_runs

    words = torch.randint(97, 105, (40_000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text("".join(" " if word == 97 else chr(word) for word in words))
    source = {"source": str(tmp_path / "words.txt"), "cache_dir": str(tmp_path / "cache")}
    made = token_efficiency_runs.DataConfig
    monkeypatch.setattr(token_efficiency_runs, "DataConfig", functools.partial(made, **source))
    run = lr_sweep.SweepRun(lr_sweep.Size("width32", 32, 1, 8, 1), "muon", 0.02, scale="spectral")
    result, kept = token_efficiency_runs.execute(run, tmp_path)
    # between the entropy of eight letters, 2.08, and that of all tokens, 5.55
    assert not kept and 2.0 < result.loss < 5.5
    monkeypatch.setattr(token_efficiency_runs, "train", None)
    assert token_efficiency_runs.execute(run, tmp_path) == (result, True)


OURS = [name for name, member in MEMBERS.items() if member.ours]


def family_outcome(name, losses):
    import family_report
    from token_efficiency_runs import Result

    curve = Curve(name, 64, {0.01: [9.0], 0.02: losses[:1], 0.04: [9.0]})
    return family_report.Outcome(curve, [Result(loss, parameters=10, tokens=20) for loss in losses])


def test_a_member_is_lower_only_where_seeds_agree_and_spread_less():
    reference = family_outcome(REFERENCE, [1.0, 1.1, 1.2])

    def verdict(*losses):
        mean, words = against(family_outcome("other", list(losses)), reference)
        assert mean == pytest.approx(sum(losses) / len(losses) - 1.1)
        return words

    assert verdict(0.7, 0.8, 0.9) == "lower" and verdict(1.3, 1.4, 1.5) == "higher"
    # twice the standard deviation of 0.1 is 0.2; then a spread of its own; then one seed of ten that does not agree
    assert verdict(0.85, 0.95, 1.05) == verdict(0.95, 0.95, 0.95) == "in the spread"
    assert verdict(0.9, 0.1, 1.1) == "in the spread"
    tens = [family_outcome(name, losses) for name, losses in (("other", [0.8] * 9 + [1.01]), (REFERENCE, [1.0] * 10))]
    assert against(*tens)[1] == "in the spread"
    alone = [family_outcome(name, [loss]) for name, loss in (("other", 0.5), (REFERENCE, 1.0))]
    assert against(*alone) == (-0.5, "one seed")


@pytest.mark.parametrize("name", [name for name in OURS if name != REFERENCE])
def test_members_are_no_moonlight(name):
    def moved(name):
        torch.manual_seed(0)
        model = family_costs.make_model(29, 16, 2, 8)
        before = {key: param.detach().clone() for key, param in model.named_parameters() if "proj" in key}
        optimizer = MEMBERS[name].build(model, MEMBERS[name].rates[1])
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return {key: model.get_parameter(key).detach() - value for key, value in before.items()}

    ours, theirs = moved(name), moved(REFERENCE)
    assert ours and not all(torch.equal(value, theirs[key]) for key, value in ours.items())
    # and steps are of one size at the rates in the middle, so that the grids are alike
    sizes = [sum(float(value.square().sum()) for value in found.values()) ** 0.5 for found in (ours, theirs)]
    assert 0.5 < sizes[0] / sizes[1] < 2


def test_a_member_takes_the_place_of_the_trainers_optimizer(tmp_path, monkeypatch):
    import token_efficiency_runs

    words = torch.randint(97, 105, (40_000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text("".join(" " if word == 97 else chr(word) for word in words))
    source = {"source": str(tmp_path / "words.txt"), "cache_dir": str(tmp_path / "cache")}
    made = token_efficiency_runs.DataConfig
    monkeypatch.setattr(token_efficiency_runs, "DataConfig", functools.partial(made, **source))
    size = lr_sweep.Size("width32", 32, 1, 8, 1)
    execute = functools.partial(token_efficiency_runs.execute, folder=tmp_path)
    found = {name: execute(family.FamilyRun(size, name, 0.02))[0] for name in (REFERENCE, "AdamW", "Muon, original")}
    for name, theirs in ((REFERENCE, "muon"), ("AdamW", "adamw")):
        assert found[name].loss == pytest.approx(
            execute(token_efficiency_runs.Run(size, theirs, 0.02))[0].loss, abs=1e-5
        )
    assert len({result.loss for result in found.values()}) == 3
    # another rate, seed or length is another file, and a finished run is read
    monkeypatch.setattr(token_efficiency_runs, "train", None)
    assert execute(family.FamilyRun(size, "AdamW", 0.02)) == (found["AdamW"], True)
    with pytest.raises(TypeError):
        execute(family.FamilyRun(size, "AdamW", 0.02, 1))


def test_members_are_tuned_and_compared(tmp_path, monkeypatch, capsys):
    class Here:
        """Answers in place of training, as Runner does."""

        def __init__(self, folder, workers, console):
            self.results = {}

        def run(self, title, runs):
            from token_efficiency_runs import Result

            for run in runs:
                best = {"AdamW": 0.00125, REFERENCE: 0.04}.get(run.optimizer, 0.02)
                loss = 1 + math.log2(run.lr / best) ** 2 + 0.01 * run.seed + (run.optimizer == "AdamW")
                self.results[run] = Result(loss, parameters=10, tokens=20, seconds=1.0)

        close = lambda self: None  # noqa: E731

    monkeypatch.setattr(family, "Runner", Here)
    monkeypatch.setattr(family, "open_corpus", lambda config: argparse.Namespace(description="words"))
    monkeypatch.setitem(family.MEMBERS, "absent", dataclasses.replace(MEMBERS["AdamW"], package="no_such_package"))
    outputs = ["--out", tmp_path / "out", "--json", tmp_path / "found.json", "--picture", tmp_path / "found.png"]
    chosen = ["--members", "AdamW", "absent", REFERENCE, "Muon, original", "--seeds", 3, 4]
    assert run_main(family, monkeypatch, *chosen, *outputs) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    members = {one["curve"]["scale"]: one for one in found["members"]}
    assert list(members) == ["AdamW", REFERENCE, "Muon, original"] and found["seeds"] == [3, 4]
    rates = {name: sorted(map(float, one["curve"]["losses"])) for name, one in members.items()}
    assert rates["AdamW"][:2] == [0.000625, 0.00125] and rates[REFERENCE][-1] == 0.08
    assert rates["Muon, original"] == [0.01, 0.02, 0.04]
    assert [result["loss"] for result in members[REFERENCE]["results"]] == pytest.approx([1.03, 1.04])
    out = capsys.readouterr().out
    assert "absent is left out: no_such_package is not installed." in out
    (line,) = [line for line in out.splitlines() if "AdamW" in line]
    assert line.split() == ["AdamW", "0.00125", "2.035", "±", "0.007", "+1.000", "higher"]
    assert (tmp_path / "found.png").stat().st_size > 0


def test_a_sample_of_a_member_is_the_mean_over_its_period(monkeypatch):
    monkeypatch.setitem(family_costs.MEMBERS, "period", dataclasses.replace(MEMBERS["AdamW"], period=3))
    taken = []

    def sample(name, values):
        values = iter(values)
        return lambda: taken.append(name) or next(values)

    samples = {"period": sample("period", [1, 1, 4, 1, 1, 7, 0, 0, 0]), "AdamW": sample("AdamW", [5.0, 6.0, 9.0])}
    assert family_costs.medians(samples, 3) == {"period": 2, "AdamW": 6}
    assert taken[:5] == ["period", "period", "period", "AdamW", "period"]


def test_the_share_of_a_training_step():
    names = [REFERENCE, "AdamW"]
    share = family_costs.share_of_training(names, rounds=1, width=32)
    assert set(share.step_ms) == set(names) and 0 < share.of("AdamW") < 1
    share = family_costs.Share(300.0, {REFERENCE: 100.0, "AdamW": 50.0}, 10)
    cost = functools.partial(family_costs.Cost, state_bytes=80, numel=10)
    several = {REFERENCE: cost(20.0, 3e6), "AdamW": cost(error="no DTensors")}
    table = family_costs.costs_table({1: {REFERENCE: cost(10.0), "AdamW": cost(5.0)}, 2: several}, share)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells[0] == (REFERENCE, "1.00", "1.00", "3.0 MB", "8.0", "25.0%")
    assert cells[1] == ("AdamW", "0.50", "failed", "", "8.0", "14.3%")


@pytest.mark.slow
def test_costs_of_members():
    names = [REFERENCE, "AdamW"]
    table, lines, figures = family_costs.measure_costs(names, 1, model="tiny", blocks=2, width=32)
    assert table.row_count == 2 and len(lines) == 2
    one, two = figures["ranks"][1], figures["ranks"][2]
    # momentum, and two moments with a counter of 4 bytes
    assert one[REFERENCE]["state_bytes"] == two[REFERENCE]["state_bytes"] == 4 * one[REFERENCE]["numel"]
    assert one["AdamW"]["state_bytes"] == 8 * one["AdamW"]["numel"] + 4 * 12
    assert one[REFERENCE]["sent_bytes"] == 0 and two["AdamW"]["sent_bytes"] == 0
    # every matrix once in bfloat16, half of it to its owner and half of it back
    assert two[REFERENCE]["sent_bytes"] >= 2 * one[REFERENCE]["numel"]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    command = [sys.executable, BENCHMARKS / "step_time.py", "--ranks", "2", "--model", "tiny", "--rounds", "1"]
    outputs = ["--json", tmp_path / "step.json", "--png", tmp_path / "step.png"]
    done = subprocess.run([*command, *outputs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "step.json").read_text())["results"]
    rows = {(row["name"], row["layout"]): row for row in found["rows"]}
    assert all(row["error"] is None for row in rows.values())
    assert rows["torch.optim.Muon", "replicated"]["ratio"] == 1.0
    for layout in ("replicated", "FSDP2"):
        ours, theirs = rows["distmuon", layout], rows["AdamW", layout]
        assert theirs["least_bytes"] == 0 < ours["least_bytes"]
        assert ours["timing"]["samples"] >= 1 and ours["peak_bytes"] > 0
        if ours["sent_bytes"] is not None:
            assert ours["sent_bytes"] >= ours["least_bytes"]
    assert (tmp_path / "step.png").stat().st_size > 0


def test_overlap_between_two_hosts(tmp_path):
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root, ip and tc")
    command = [sys.executable, str(BENCHMARKS / "overlap.py"), "--model", "tiny", "--rounds", "2", "--rate", "200mbit"]
    outputs = ["--json", str(tmp_path / "overlap.json"), "--png", str(tmp_path / "overlap.png")]
    done = subprocess.run([*command, *outputs], capture_output=True, text=True, timeout=240)
    if "permits no namespaces" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "overlap.json").read_text())["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        # nothing is cut, so that nothing of a shape overlaps, and the table that knows the slow cable cuts no less
        counts = list(rank["buckets"].values())
        assert counts == sorted(counts)
        assert counts[0] == 3
        for spans in rank["spans"].values():
            assert {name for name, _, _ in spans} >= {"distmuon/ns", "distmuon/wait", "gloo:all_to_all"}
    assert (tmp_path / "overlap.png").stat().st_size > 10_000


def test_what_an_update_adds_to_logits_is_told_apart_from_other_batches():
    run = qk_clip.Trained([50.0, 200.0, 104.0, 90.0], [51.0, 103.0, 101.0, 90.0], [3.0, 2.0], 2.5, 7.0)
    told = qk_clip.told(run)
    assert told.startswith("largest logit 200.0, in the last 100 steps 200.0, at the end 90.0; ")
    assert "validation loss 2.5000, last 50 training losses 2.5000" in told
    assert "from step 2 on 66.7% above 1.0 tau, 66.7% above 1.02 tau, 33.3% above 1.05 tau, 33.3% above 1.1 tau" in told
    # 100 to 103, 100 to 101 and 90 to 90; 103 to 104 and 101 to 90
    assert "at most 103.0, as the update adds +1.00% (median) and at most +3.0%" in told
    assert told.endswith("to the next batch -10.9% to +1.0%")
    assert "clips" not in qk_clip.told(dataclasses.replace(run, after=[]))


def test_a_batch_is_looked_at_again_after_the_clip(monkeypatch):
    """Without learning rates the clip is all that a step does, and brings the same batch to the bound."""
    monkeypatch.setattr(qk_clip, "OTHER_LR", 0.0)
    data = torch.randint(0, 200, (5000,))
    runs = [qk_clip.train(data, data, 200, 3, 0.0, tau, 0) for tau in (qk_clip.NEVER, 0.01)]
    assert runs[0].after == [] and runs[0].clips == 0 and min(runs[0].max_logits) > 0.01
    assert runs[1].max_logits[0] == runs[0].max_logits[0]
    # not exactly: what the second layer sees changes with the first
    assert runs[1].after == pytest.approx([0.01] * 3, rel=0.05)
