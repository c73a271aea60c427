"""The planner: models without weights, layouts as torch cuts them, figures that add up, errors that say what fits."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distmuon import cli
from distmuon.numerics.costs import CostTable, Rates
from distmuon.plan.boxes import Box
from distmuon.plan.simulate import GLOO, NCCL, simulate
from distmuon.planning.advice import Advice, advise
from distmuon.planning.classes import classes, shown_ranks
from distmuon.planning.compare import compare, node_counts, scaling
from distmuon.planning.devices import find_device
from distmuon.planning.layouts import holder, make_layout
from distmuon.planning.models import builtin_names, load_model, of_module
from distmuon.planning.picture_gantt import awaited
from distmuon.planning.predict import predict
from distmuon.planning.rivals import ROUND_ROBIN
from distmuon.planning.specs import Setup, specs_of
from distmuon.planning.states import states_of
from distmuon.planning.story import ms, title
from distmuon.usage import UsageError

H100 = find_device("h100", tflops=600)


class Experts(nn.Module):
    """Two layers of eight stacked experts, of which a token takes two, and a square matrix of each."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.experts = nn.ParameterList([nn.Parameter(torch.empty(8, 256, 64)) for _ in range(2)])
        self.mix = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(2)])


@pytest.fixture(scope="module")
def experts():
    with torch.device("meta"):
        return of_module("experts", Experts(), experts=8, chosen=2)


@pytest.fixture(scope="module")
def gpt2():
    return load_model("gpt2")


@pytest.fixture(scope="module")
def wall():
    """Past the wall: one huge matrix and a few small ones on 16 ranks."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(8192, 8192, bias=False), *(nn.Linear(256, 256) for _ in range(12)))
        head = nn.Linear(256, 10)
    model = of_module("wall", nn.Sequential(module, head))
    return predict(Setup(model, make_layout("fsdp", 2, 8), H100), spans=True)


def plan(*arguments):
    return cli.main(["plan", *arguments])


# Parameters as published with the models, in billions, and matrices on Muon by hand. deepseek-v3: 61 layers of 5 in
# attention, 3 dense MLPs of 3, and 58 times a router, a shared expert of 3, and 2 stacks of 256
@pytest.mark.parametrize(
    ("name", "billions", "matrices"),
    [
        ("gpt2", 0.1244, 12 * 4),
        ("llama-7b", 6.74, 32 * 7),
        ("llama-3-8b", 8.03, 32 * 7),
        ("llama-3-70b", 70.6, 80 * 7),
        ("llama-3-405b", 405.9, 126 * 7),
        ("qwen3-moe", 30.5, 48 * (4 + 1 + 2 * 128)),
        ("deepseek-v3", 671.0, 61 * 5 + 3 * 3 + 58 * (1 + 3 + 2 * 256)),
        ("kimi-k2", 1026.4, 61 * 5 + 1 * 3 + 60 * (1 + 3 + 2 * 384)),
    ],
)
def test_builtin_models_have_the_published_sizes(name, billions, matrices):
    model = load_model(name)
    assert model.numel / 1e9 == pytest.approx(billions, rel=2e-3)
    assert sum(p.count for p in model.on_muon) == matrices
    assert name in builtin_names()


@pytest.mark.parametrize(("name", "billions"), [("qwen3-moe", 3.0), ("deepseek-v3", 37), ("llama-3-8b", 7.5)])
def test_a_token_goes_through_its_experts_alone(name, billions):
    assert load_model(name).active / 1e9 == pytest.approx(billions, rel=0.03)


def test_experts_count_by_the_part_that_is_chosen(experts):
    assert experts.active == 2 * (8 * 256 * 64) * 2 // 8 + 2 * 512 * 512 + 100 * 64
    assert [p.count for p in experts.on_muon] == [8, 8, 1, 1]


def test_a_config_in_json_a_folder_and_a_type_that_is_named_by_its_class(tmp_path):
    config = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    other = tmp_path / "tiny.json"
    other.write_text(json.dumps({"model_type": "private", "architectures": ["GPT2LMHeadModel"], **config}))
    for where in (tmp_path, tmp_path / "config.json", other):
        model = load_model(str(where))
        assert [p.count for p in model.on_muon] == [1] * 12
    assert model.name == "tiny"


def test_a_trainer_config_brings_its_optimizer(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "run.yaml"
    tree = {
        "model": {"type": "llama", "config": {**sizes, "num_key_value_heads": 2}},
        "data": {"tokenizer": "bytes", "sequence_length": 16},
        "optim": {"ns_engine": "gram", "ns_dtype": "float32"},
    }
    path.write_text(yaml.safe_dump(tree))
    model = load_model(str(path))
    assert len(model.on_muon) == 7
    assert (model.optim["ns_engine"], model.optim["ns_dtype"]) == ("gram", torch.float32)


@given(
    kind=st.sampled_from(["fsdp", "hsdp", "ddp"]),
    nodes=st.integers(1, 4),
    gpus=st.sampled_from([1, 2, 3, 4]),
    parallel=st.sampled_from([1, 2, 4]),
    shape=st.sampled_from([(8, 6, 5), (5, 7, 3), (13, 9), (2, 30)]),
)
@settings(deadline=None)
def test_every_layout_stores_each_replica_once(kind, nodes, gpus, parallel, shape):
    try:
        layout = make_layout(kind, nodes, gpus, parallel)
    except UsageError:
        assert (kind == "hsdp" and nodes == 1) or (gpus if kind == "hsdp" else nodes * gpus) % parallel
        return
    holdings = holder(layout)(shape, len(shape) == 3)
    for replica in {h.replica for h in holdings}:
        covered = torch.zeros(shape)
        for holding in holdings:
            if holding.replica == replica:
                covered[holding.box.within(Box.whole(shape))] += 1
        assert covered.eq(1).all()
    assert [h.rank for h in holdings] == list(range(nodes * gpus))
    if len(shape) == 2:
        copies = {"fsdp": 1, "hsdp": nodes, "ddp": nodes * gpus}[kind]
        assert sum(h.box.numel for h in holdings) == copies * shape[0] * shape[1]


@pytest.mark.parametrize("rows", [13, 16, 3])
def test_fsdp_cuts_as_torch_does(rows):
    holdings = holder(make_layout("fsdp", 2, 4))((rows, 5), False)
    lengths = [len(part) for part in torch.empty(rows, 5).chunk(8)]
    assert [h.box.sizes[0] for h in holdings] == lengths + [0] * (8 - len(lengths))


def test_experts_are_cut_along_their_rows_where_ranks_outnumber_them():
    few = holder(make_layout("fsdp", 1, 8, 4))((16, 6, 4), True)
    assert [(h.box.offsets[0], h.box.sizes) for h in few[:3]] == [(0, (2, 6, 4)), (4, (2, 6, 4)), (8, (2, 6, 4))]
    many = holder(make_layout("fsdp", 2, 8, 4))((8, 6, 4), True)
    assert (many[0].box.sizes, many[4].box.offsets) == ((2, 2, 4), (0, 2, 0))


def test_figures_add_up(experts):
    """Every matrix is owned once, bytes that leave arrive, and the makespan is the load of the busiest rank."""
    setup = Setup(experts, make_layout("fsdp", 2, 4), H100)
    found = predict(setup, spans=True)
    assert sum(found.teams().values()) == 18
    for far in (0, 1):
        assert sum(r.sent[far] for r in found.ranks) == sum(r.received[far] for r in found.ranks)
    loads = found.plan.loads()
    assert found.makespan == pytest.approx(1e-9 * max(loads.values()))
    assert found.ideal <= found.bound <= found.makespan <= found.seconds
    assert found.ideal == pytest.approx(1e-9 * sum(s.cost * s.matrices.count for s in specs_of(setup)) / 8)
    assert found.exposed == pytest.approx(found.seconds - found.makespan)
    assert found.share == pytest.approx(found.seconds / (found.seconds + found.training))
    assert found.training == pytest.approx(6 * experts.active * 8192 / (0.4 * 989e12))
    assert {span.rank for span in found.spans} == set(range(8))
    assert sum(len(these.members) for these in classes(found.ranks)) == 8


def test_states_are_weights_gradients_and_averages(experts):
    muon = 2 * (8 * 256 * 64 + 512 * 512)
    states = states_of(experts, make_layout("ddp", 1, 2))
    assert [s.momentum for s in states] == [4 * muon] * 2
    assert [s.total for s in states] == [4 * (3 * muon + 4 * 100 * 64)] * 2
    shards = states_of(experts, make_layout("fsdp", 1, 4))
    assert sum(s.total for s in shards) == states[0].total


def test_a_huge_matrix_gets_a_team_and_the_words_say_so(wall):
    assert wall.teams()[8] == 1
    alone = predict(wall.setup.but(teams=False))
    assert set(alone.teams()) == {1}
    assert alone.makespan > 2 * wall.makespan
    assert "8192 x 8192 in teams of 8" in title(wall)
    assert f"Rank {alone.busiest.rank} is the bottleneck" in title(alone)
    assert "One matrix alone takes it that long" in " ".join(title(alone).split())


def test_links_are_named_where_they_are_the_bottleneck():
    found = predict(Setup(load_model("llama-3-8b"), make_layout("hsdp", 16, 8), H100))
    assert found.links > found.makespan
    words = " ".join(title(found).split())
    assert "The links between nodes are the bottleneck" in words
    assert "Rank 0 is the bottleneck" not in words
    most = max(max(r.sent[1], r.received[1]) for r in found.ranks if r.links == found.links)
    assert f"moves {most / 2**20:,.0f} MiB" in words
    assert words.endswith("--parallel fsdp has one.")
    better = predict(found.setup.but(layout=make_layout("fsdp", 16, 8)))
    assert better.seconds < found.seconds
    advised = " ".join(title(found, Advice(found, better, (found, better))).split())
    assert f"Faster: --parallel fsdp, {ms(better.seconds)} ms." in advised
    assert "Faster" not in title(found, Advice(found, found, (found,)))


def test_round_robin_begins_each_shape_at_rank_0(gpt2):
    """Twelve of each of four shapes on 8 ranks: rank 0 has two of each."""
    found = predict(Setup(gpt2, make_layout("fsdp", 1, 8), H100, teams=False))
    costs = {(s.matrices.rows, s.matrices.cols): s.cost for s in found.plan.parameters}
    rivals = {rival.name: rival.makespan for rival in found.rivals}
    assert rivals[ROUND_ROBIN] == pytest.approx(1e-9 * 2 * sum(costs.values()))
    assert found.makespan < rivals[ROUND_ROBIN]


def test_advice_takes_the_fastest_that_was_tried(gpt2):
    given = predict(Setup(gpt2, make_layout("ddp", 4, 8), H100, bucket_mib=1.0))
    advice = advise(given)
    assert {tried.setup.layout.kind for tried in advice.tried} == {"fsdp", "hsdp", "ddp"}
    assert advice.best.seconds == min(tried.seconds for tried in advice.tried) < given.seconds
    assert any(change.startswith("--parallel") for change in advice.changes)
    assert all(change in str(advice) for change in advice.changes)
    again = advise(advice.best)
    assert "as it is" in str(again) and again.changes == ()


def test_thousands_of_ranks_are_shown_by_a_few(gpt2):
    found = predict(Setup(gpt2, make_layout("fsdp", 32, 8), H100))
    shown = shown_ranks(found.ranks)
    assert len(shown) <= 16
    assert found.busiest.rank in shown
    every = {rank for these in classes(found.ranks) for rank in (m.rank for m in these.members)}
    assert every == set(range(256))


def test_comparison_over_layouts_and_nodes(gpt2):
    assert node_counts(6) == (1, 2, 4, 6)
    small = dataclasses.replace(H100, memory=1.0)
    rows = compare(Setup(gpt2, make_layout("fsdp", 2, 4), small), (1, 2))
    kinds = Counter(row.setup.layout.kind for row in rows if not isinstance(row, str))
    assert kinds == {"fsdp": 2, "hsdp": 1}
    refused = [row for row in rows if isinstance(row, str)]
    assert len(refused) == 2 and all("as ddp on" in row and "--parallel" in row for row in refused)


def test_scaling_curve_rises_past_the_wall(gpt2):
    points = scaling(Setup(gpt2, make_layout("fsdp", 1, 8), H100), (1, 4, 16))
    assert [point.ranks for point in points] == [8, 32, 128]
    assert all(1.0 - 1e-9 <= point.planned <= point.single + 1e-9 <= point.round_robin + 2e-9 for point in points)
    assert points[-1].single > 2 > points[0].single


def test_speeds_and_memory_can_be_given():
    device = find_device("h100", tflops=500, local_gb_s=100, remote_gb_s=10, memory_gib=40)
    assert {rates.big for _, rates in device.table.engines} == {2 / 500e12}
    assert (device.speeds.local.exchange, device.speeds.remote.reduce) == pytest.approx((1e-11, 1e-10))
    assert device.table.speeds == device.speeds
    assert device.memory == 40
    assert find_device(None).name == "h100"


@pytest.fixture
def cpu_table(tmp_path):
    path = tmp_path / "cpu.json"
    CostTable("cpu-float32", "measured on a test", (("composed", Rates(1e-4, 1e-11, 1e-11)),)).save(path)
    return str(path)


def test_a_cost_table_names_its_device(cpu_table):
    device = find_device(None, cost_table=cpu_table)
    assert (device.name, device.table.source, device.peak) == ("cpu", "measured on a test", 2e11)


def test_command_prints_tables(capsys):
    assert plan("--model", "gpt2", "--nodes", "2", "--gpus-per-node", "4", "--parallel", "hsdp") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("48 matrices", "hsdp on 2 nodes of 4 x h100", "predicted step", "8,192 tokens a rank, at 40% of peak"):
        assert part in text
    for part in ("makespan over ideal", "round robin", "longest first, by cost", "Recommended:", "estimate"):
        assert part in text


@pytest.mark.parametrize("more", [[], ["--compare"]], ids=["a plan", "a comparison"])
def test_nothing_is_cut_in_a_terminal_of_80_columns(capsys, monkeypatch, more):
    monkeypatch.setenv("COLUMNS", "80")
    assert plan("--model", "llama-3-8b", "--nodes", "32", "--parallel", "hsdp", "--no-advice", *more) == 0
    text = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_trainer_config_says_whether_there_are_teams_and_how_fast_engines_are(tmp_path, capsys):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1, "num_attention_heads": 64}
    optim = {"teams": False}
    path = tmp_path / "run.yaml"

    def written(**changes):
        tree = {"model": {"type": "llama", "config": sizes}, "data": {"tokenizer": "bytes"}, "optim": optim | changes}
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    arguments = ["--nodes", "2", "--no-advice", "--json", "-", "--model"]
    assert plan(*arguments, written(teams=True)) == 0
    assert max(map(int, json.loads(capsys.readouterr().out)["teams"])) > 1
    assert plan(*arguments, written()) == 0
    assert set(json.loads(capsys.readouterr().out)["teams"]) == {"1"}
    assert plan(*arguments, written(cost_table=str(tmp_path / "missing.json"))) == 2
    assert "missing.json" in capsys.readouterr().err


def test_command_writes_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["--model", "gpt2", "--gpus-per-node", "4", "--no-advice", "--bucket-mib", "4", "--json"]
    assert plan(*arguments, str(path)) == 0
    capsys.readouterr()
    assert plan(*arguments, "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(path.read_text())
    assert (found["ranks"], found["layout"], found["bucket_mib"]) == (4, "fsdp", 4.0)
    assert sum(count for count in found["teams"].values()) == 48
    assert [r["rank"] for r in found["per_rank"]] == [0, 1, 2, 3]
    assert found["step_seconds"] == max(r["finish_seconds"] for r in found["per_rank"])
    assert sum(r["momentum_bytes"] for r in found["per_rank"]) == 4 * 12 * 12 * 768 * 768
    assert found["assumed"] == {"mfu": 0.4, "tokens_per_gpu": 8192}


def test_command_compares(tmp_path, capsys):
    path = tmp_path / "compared.json"
    assert plan("--model", "gpt2", "--nodes", "2", "--gpus-per-node", "2", "--compare", "--json", str(path)) == 0
    assert "Layouts and world sizes" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [(row["layout"], row["ranks"]) for row in found["compared"]] == [
        ("fsdp", 2),
        ("fsdp", 4),
        ("hsdp", 4),
        ("ddp", 2),
        ("ddp", 4),
    ]


@pytest.mark.parametrize("nodes", [1, 16])
def test_command_draws(tmp_path, capsys, nodes):
    path = tmp_path / "step.png"
    assert plan("--model", "gpt2", "--nodes", str(nodes), "--no-advice", "--plot", str(path)) == 0
    assert f"wrote {path}" in capsys.readouterr().out.replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_one_rank_has_nothing_to_exchange(capsys):
    assert plan("--model", "gpt2", "--gpus-per-node", "1", "--no-advice", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sent_bytes"] == {"node": 0, "between": 0}
    assert found["makespan_over_ideal"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--model", "llama-8b"], 2, ["llama-8b", "did you mean llama-3-8b?"]),
        (["--model", "nowhere.json"], 2, ["nowhere.json", "cannot be read"]),
        (["--model", "nowhere.yaml"], 2, ["--model nowhere.yaml", "cannot be read"]),
        (["--device", "h1000"], 2, ["h1000", "did you mean h100?"]),
        (["--device", "abacus"], 2, ["abacus", "a100, b200, cpu, h100, h200"]),
        (["--parallel", "zero3"], 2, ["zero3", "fsdp, hsdp, ddp"]),
        (["--parallel", "hsdp"], 2, ["--parallel hsdp", "--parallel fsdp", "--nodes 2"]),
        (["--nodes", "0"], 2, ["--nodes is 0", "1 or more"]),
        (["--expert-parallel", "3"], 2, ["--expert-parallel 3", "8 ranks", "1, 2, 4 do"]),
        (["--expert-parallel", "2"], 2, ["no stacked experts", "give 1"]),
        (["--tflops", "-1"], 2, ["--tflops is -1.0", "above 0"]),
        (["--bucket-mib", "0"], 2, ["--bucket-mib is 0", "64"]),
        (["--tokens-per-gpu", "0"], 2, ["--tokens-per-gpu is 0"]),
        (["--plot", "/nowhere/x.png"], 2, ["--plot /nowhere/x.png", "no such folder"]),
        (["--compare", "--plot", "x.png"], 2, ["--plot", "--compare", "drop one"]),
        (["--nodes", "two"], 2, ["--nodes", "distmuon plan --help"]),
        (["--model", "llama-3-70b", "--parallel", "ddp"], 1, ["79 GiB", "--parallel fsdp --nodes 2 takes"]),
        (["--parallel", "ddp", "--memory-gib", "1.0"], 1, ["1 GiB", "--parallel fsdp takes 0."]),
        (["--parallel", "fsdp", "--memory-gib", "0.22"], 1, ["buffers of 0.06 GiB", "--bucket-mib 4 takes 0.21"]),
        (["--parallel", "fsdp", "--memory-gib", "0.2"], 1, ["buffers of 0.06 GiB", "--parallel fsdp --nodes 2"]),
        (["--plot", "x.svg"], 2, ["--plot x.svg", "end in .png"]),
        (["--json", "/"], 2, ["--json / is a folder"]),
        (["--plot", "/"], 2, ["--plot / is a folder"]),
        (["--dtype", "float32"], 2, ["--dtype float32", "--device h100", "--tflops", "--cost-table"]),
    ],
)
def test_faults_are_one_sentence_that_says_what_would_fit(arguments, code, parts, capsys):
    given = arguments if "--model" in arguments else ["--model", "gpt2", *arguments]
    assert plan(*given) == code
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


def test_a_cost_table_of_another_device_is_refused(cpu_table, capsys):
    assert plan("--model", "gpt2", "--device", "h100", "--cost-table", cpu_table) == 2
    error = capsys.readouterr().err
    for part in ("'cpu-float32'", "'cuda-sm90'", "take --device cpu", "distmuon calibrate --device cuda"):
        assert part in error
    assert plan("--model", "gpt2", "--cost-table", "nowhere.json") == 2
    assert "--cost-table" in capsys.readouterr().err


def test_a_table_of_no_time_and_a_folder_of_no_model_are_refused(tmp_path, capsys):
    path = tmp_path / "zero.json"
    CostTable("cpu-float32", "of a test", (("composed", Rates(0.0, 0.0, 0.0)),)).save(path)
    assert plan("--model", "gpt2", "--cost-table", str(path)) == 2
    assert "products take no time" in capsys.readouterr().err
    assert plan("--model", str(tmp_path)) == 2
    assert f"the folder {tmp_path} has no config.json" in capsys.readouterr().err


def test_cpus_talk_over_gloo(gpt2):
    """Replicas get updates from owners, as gloo does not gather them: what is sent is more than an all-gather's."""
    setup = Setup(gpt2, make_layout("ddp", 1, 4), find_device("cpu"))
    assert (setup.transport, setup.but(device=H100).transport) == (GLOO, NCCL)
    found = predict(setup)
    same = simulate(found.plan, setup.device.speeds, itemsize=setup.itemsize, transport=GLOO)
    other = simulate(found.plan, setup.device.speeds, itemsize=setup.itemsize, transport=NCCL)
    assert found.seconds == same.seconds != other.seconds


def test_a_wait_is_named_by_the_exchange_that_ends_it(wall):
    waits = [span for span in wall.spans if span.kind == "wait"]
    waves = len(wall.plan.waves)
    told = {awaited(wall, wait) for wait in waits}
    assert any(text.startswith("updates of wave ") and text.endswith(f" of {waves}") for text in told)
    last = max(waits, key=lambda span: span.end)
    assert awaited(wall, last).startswith("updates of wave")
    first = min(waits, key=lambda span: span.start)
    assert awaited(wall, first).startswith("gathers of wave 1 ")


def test_a_missing_package_is_named(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "distmuon.planning.run", raising=False)
    monkeypatch.delitem(sys.modules, "distmuon.planning.report", raising=False)
    assert plan("--model", "gpt2") == 1
    assert "pip install 'distmuon[plan]'" in capsys.readouterr().err
