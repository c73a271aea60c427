"""What the benchmarks compute beside what they time."""

import inspect
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import distmuon

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import step_time  # noqa: E402
import step_time_contenders as contenders  # noqa: E402
import step_time_probes as probes  # noqa: E402
import step_time_report as report  # noqa: E402
from step_time_ranks import Row  # noqa: E402
from timing import Timing  # noqa: E402

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
