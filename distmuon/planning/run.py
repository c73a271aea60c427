"""What ``distmuon plan`` does with its options."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import rich
import torch

from distmuon.numerics.recipe import Request
from distmuon.planning.advice import advise
from distmuon.planning.classes import shown_ranks
from distmuon.planning.compare import compare, node_counts, scaling
from distmuon.planning.devices import find_device
from distmuon.planning.figures import Prediction
from distmuon.planning.layouts import make_layout
from distmuon.planning.memory import check_peak, check_states
from distmuon.planning.models import load_model
from distmuon.planning.predict import MFU, predict
from distmuon.planning.report import show, show_comparison
from distmuon.planning.specs import Setup
from distmuon.usage import UsageError

# The scaling curve goes so far at least
_CURVE_NODES = 32


def run(known: argparse.Namespace) -> None:
    """Predict and show.

    Args:
        known: The options of the command line.

    Raises:
        UsageError: for options that make no plan.
        InfeasibleError: for a plan that does not fit the memory.
        OSError: for a file that cannot be written.
    """
    setup = read_setup(known)
    quiet = known.json == "-"
    console = rich.get_console()
    if known.compare:
        rows = compare(setup, node_counts(setup.layout.nodes), tokens_per_gpu=known.tokens_per_gpu)
        if not quiet:
            show_comparison(rows, console)
        if known.json:
            compared = [row.summary() for row in rows if isinstance(row, Prediction)]
            _write_json(known.json, {"compared": compared, "left_out": [row for row in rows if isinstance(row, str)]})
        return
    check_states(setup)

    def again(other: Setup) -> Prediction:
        return predict(other, tokens_per_gpu=known.tokens_per_gpu)

    prediction = again(setup)
    check_peak(prediction)
    advice = None if known.no_advice else advise(prediction, again)
    if not quiet:
        show(prediction, advice, tokens_per_gpu=known.tokens_per_gpu, console=console)
    if known.json:
        found = as_json(prediction)
        found["assumed"] = {"mfu": MFU, "tokens_per_gpu": known.tokens_per_gpu}
        if advice is not None:
            found["advice"] = {
                "change": list(advice.changes),
                "best": advice.best.summary(),
                "tried": [tried.summary() for tried in advice.tried],
            }
        _write_json(known.json, found)
    if known.plot:
        from distmuon.planning.picture import draw

        # the wall is worth seeing from far before it
        most = max(setup.layout.nodes, _CURVE_NODES)
        drawn = predict(setup, tokens_per_gpu=known.tokens_per_gpu, spans=shown_ranks(prediction.ranks))
        draw(drawn, scaling(setup, node_counts(most)), pathlib.Path(known.plot), advice)
        if not quiet:
            console.print(f"wrote {known.plot}")


def read_setup(known: argparse.Namespace) -> Setup:
    """What the options mean.

    Raises:
        UsageError: naming the option.
    """
    layout = make_layout(known.parallel, known.nodes, known.gpus_per_node, known.expert_parallel)
    model = load_model(known.model, known.matrices)
    if not model.on_muon:
        raise UsageError(f"--model {known.model} has no matrix that Muon would take: there is nothing to plan.")
    if layout.expert_parallel > 1:
        experts = min((p.shape[0] for p in model.on_muon if p.stacked), default=0)
        if experts < layout.expert_parallel:
            what = f"layers of {experts} experts" if experts else "no stacked experts"
            raise UsageError(
                f"--expert-parallel {layout.expert_parallel} and {model.name} has {what}: give "
                f"{'at most ' * bool(experts)}{max(1, experts)}."
            )
    optim = model.optim
    dtype = optim.get("ns_dtype", torch.bfloat16) if known.dtype is None else getattr(torch, known.dtype)
    device = find_device(
        known.device,
        cost_table=known.cost_table or optim.get("cost_table"),
        dtype=dtype,
        tflops=known.tflops,
        local_gb_s=known.local_gb_s,
        remote_gb_s=known.remote_gb_s,
        memory_gib=known.memory_gib,
    )
    return Setup(
        model,
        layout,
        device,
        request=_request(known.engine or optim.get("ns_engine", "auto"), dtype, optim),
        bucket_mib=known.bucket_mib,
        teams=not known.no_teams and optim.get("teams", True),
    )


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Everything about a prediction: seconds and bytes."""
    found = prediction.summary()
    found["cost_table"] = prediction.setup.device.table.source
    found["per_rank"] = [
        {
            "rank": r.rank,
            "owned": [{"rows": k.rows, "cols": k.cols, "parts": k.parts, "count": count} for k, count in r.owned],
            "whole": r.whole,
            "in_teams": r.shared,
            "ns_seconds": r.ns,
            "waiting_seconds": r.waiting,
            "finish_seconds": r.finish,
            "sent_bytes": {"node": r.sent[0], "between": r.sent[1]},
            "received_bytes": {"node": r.received[0], "between": r.received[1]},
            "busiest_link_seconds": r.links,
            "buffer_bytes": r.buffers,
            "momentum_bytes": r.states.momentum,
            "state_bytes": r.states.total,
        }
        for r in prediction.ranks
    ]
    return found


def _request(engine: str, dtype: torch.dtype, optim: Mapping[str, Any]) -> Request:
    try:
        return Request(dtype, engine, optim.get("ns_coefficients", "auto"), optim.get("ns_steps"))
    except ValueError as error:
        raise UsageError(f"the iteration cannot be ({error}).") from error


def _write_json(where: str, found: Mapping[str, Any]) -> None:
    text = json.dumps(found, indent=1)
    if where == "-":
        print(text)
        return
    pathlib.Path(where).write_text(text + "\n", encoding="utf-8")
