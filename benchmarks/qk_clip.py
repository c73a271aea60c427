"""Does QK-Clip keep attention logits in bounds, does the loss suffer, and what does recording cost?

    python benchmarks/qk_clip.py --picture docs/qk_clip.png    # about three minutes on one CPU core

A Llama of two layers learns the built-in corpus by Muon at a learning rate at which its attention logits explode,
without QK-Clip and with it, from the same weights and over the same batches. With it, each batch is looked at once more
after the step, which tells what the update adds to logits from what the next batch does. Then a step's CPU time is
measured for sequences of several lengths, with recording in every step, in every tenth, and not at all, in turns.
Finished parts are kept in the output folder, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import distmuon
from distmuon.pretrain.data import DataConfig, open_corpus

TAU = 100.0
BOUNDS = (1.0, 1.02, 1.05, 1.1)
# No logit comes near it, so that it records and never clips
NEVER = 1e30
TOKENS, BATCH = 64, 16
OTHER_LR, WARMUP = 3e-3, 60


@dataclass
class Trained:
    """One run: the largest logit of each step's batch before the step and after it, losses in nats a token."""

    max_logits: list[float]
    after: list[float]
    losses: list[float]
    validation: float
    clips: float


@dataclass
class Cost:
    """Medians of the milliseconds of CPU time of a step: forward, backward, optimizer."""

    tokens: int
    off: float
    every_tenth: float
    always: float


def make_model(vocab_size: int, hidden: int, layers: int, tokens: int, seed: int = 0) -> nn.Module:
    """A Llama with heads of 32 dimensions at most, and random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 32),
        num_key_value_heads=max(4, hidden // 32),
        max_position_embeddings=tokens,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model.train()


def train(data: Tensor, held_out: Tensor, vocab_size: int, steps: int, lr: float, tau: float, seed: int) -> Trained:
    """Warm up, then go down in a straight line; nothing decays, as decay too keeps logits small."""
    model = make_model(vocab_size, 64, 2, TOKENS, seed)
    twin = copy.deepcopy(model)
    probe = distmuon.attach_qk_clip(twin, tau=NEVER)
    settings: dict[str, Any] = {"weight_decay": 0.0, "adamw_lr": OTHER_LR}
    optimizer = distmuon.MuonClip(model, lr, tau=tau, **settings)
    assert optimizer.qk_clip is not None
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    draw = torch.Generator().manual_seed(seed + 1)
    done = Trained([], [], [], 0.0, 0.0)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        starts = torch.randint(0, len(data) - TOKENS - 1, (BATCH,), generator=draw)
        windows = torch.stack([data[at : at + TOKENS + 1] for at in starts.tolist()])
        loss = loss_of(model, windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = optimizer.qk_clip.metrics()
        done.max_logits.append(metrics["qk_clip/max_logit"])
        done.losses.append(loss.item())
        done.clips = metrics["qk_clip/clips"]
        if tau != NEVER:
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                loss_of(twin, windows)
            probe.step()
            done.after.append(probe.metrics()["qk_clip/max_logit"])
    model.eval()
    with torch.no_grad():
        windows = held_out[: 64 * (TOKENS + 1)].view(-1, TOKENS + 1)
        done.validation = float(torch.stack([loss_of(model, part) for part in windows.split(BATCH)]).mean())
    return done


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of the next token, in nats."""
    logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def measure(data: Tensor, vocab_size: int, tokens: int, repeats: int) -> Cost:
    """CPU times of a step over 2048 tokens by a Llama of width 256 and four layers."""
    windows = data[: 2048 // tokens * (tokens + 1)].view(-1, tokens + 1)

    def stepper(every: int | None) -> Callable[[], float]:
        model = make_model(vocab_size, 256, 4, tokens)
        optimizer = distmuon.Muon(model, 1e-3, adjust_lr_fn="match_rms_adamw")
        if every is not None:
            distmuon.attach_qk_clip(model, optimizer, tau=NEVER, every=every)

        def step() -> float:
            begin = time.process_time()
            loss_of(model, windows).backward()
            optimizer.step()
            optimizer.zero_grad()
            return 1e3 * (time.process_time() - begin)

        step()
        return step

    steppers = {"off": stepper(None), "every_tenth": stepper(10), "always": stepper(1)}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(repeats):
        for name, step in steppers.items():
            times[name].append(step())
    found = {name: statistics.median(of) for name, of in times.items()}
    # the mean of ten steps of which one is recorded
    found["every_tenth"] = 0.9 * found["every_tenth"] + 0.1 * found["always"]
    return Cost(tokens, **found)


def told(run: Trained, tau: float = TAU) -> str:
    """A run in words: logits, in what share of steps they were above tau and why, losses."""
    text = (
        f"largest logit {max(run.max_logits):.1f}, in the last 100 steps {max(run.max_logits[-100:]):.1f}, at the end "
        f"{run.max_logits[-1]:.1f}; validation loss {run.validation:.4f}, last 50 training losses "
        f"{statistics.mean(run.losses[-50:]):.4f}"
    )
    first = next((step for step, logit in enumerate(run.max_logits) if logit > tau), len(run.max_logits))
    before, after = run.max_logits[first:], run.after[first:]
    if len(after) < 2:
        return text
    shares = ", ".join(
        f"{sum(logit > bound * tau for logit in before) / len(before):.1%} above {bound} tau" for bound in BOUNDS
    )
    added = [to / min(was, tau) - 1 for was, to in zip(before, after, strict=True)]
    between = [to / was - 1 for was, to in zip(after[:-1], before[1:], strict=True)]
    return (
        f"{text}; {run.clips:.0f} clips of heads; from step {first + 1} on {shares}; of the same batch after update "
        f"and clip at most {max(after):.1f}, as the update adds {statistics.median(added):+.2%} (median) and at most "
        f"{max(added):+.1%}; from there to the next batch {min(between):+.1%} to {max(between):+.1%}"
    )


def draw_picture(without: Trained, clipped: Trained, path: Path, tau: float) -> None:
    """Largest logits and losses over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run, label, colour in ((without, "without", "tab:red"), (clipped, f"QK-Clip, tau = {tau:g}", "tab:blue")):
        left.plot(run.max_logits, color=colour, label=label)
        smooth = torch.tensor(run.losses).unfold(0, 20, 1).mean(1)
        right.plot(range(19, len(run.losses)), smooth.tolist(), color=colour, label=label)
    left.axhline(tau, color="gray", linestyle="dotted")
    left.set(yscale="log", xlabel="step", ylabel="largest attention logit")
    right.set(xlabel="step", ylabel="training loss, nats a token (mean of 20)", ylim=(None, without.losses[20]))
    left.legend()
    figure.savefig(path, dpi=110)


def kept(path: Path, make: Callable[[], Any]) -> dict[str, Any]:
    """What an earlier call has written to ``path``, or else what ``make`` returns."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(make())), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Run everything and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/qk_clip"), help="folder of results")
    parser.add_argument("--picture", type=Path, help="file to draw")
    parser.add_argument("--steps", type=int, default=500, help="of each of the two runs")
    parser.add_argument("--lr", type=float, default=0.1, help="of the matrices, at its peak")
    parser.add_argument("--tau", type=float, default=TAU, help="bound of the logits, from which shares are told")
    parser.add_argument("--seeds", type=int, default=1, help="of weights and batches; the picture is of the first")
    lengths = "of sequences whose recording is timed; none: nothing is timed"
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 1024], help=lengths)
    parser.add_argument("--repeats", type=int, default=6, help="of each timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = open_corpus(DataConfig(sequence_length=TOKENS))
    data, held_out = (torch.from_numpy(part.slice(0, len(part)).astype("int64")) for part in (corpus.train, corpus.val))
    runs = {}
    for seed in range(options.seeds):
        for name, tau in (("without", NEVER), (f"clipped-{options.tau:g}", options.tau)):
            path = options.output / f"{name}-lr{options.lr:g}-{options.steps}-seed{seed}.json"
            make = partial(train, data, held_out, corpus.vocab_size, options.steps, options.lr, tau, seed)
            runs[name, seed] = Trained(**kept(path, make))
            print(f"{name}, seed {seed}: {told(runs[name, seed], options.tau)}", flush=True)
    print("| tokens of a sequence | step, ms of CPU time | recorded every tenth | recorded always |\n|---|---|---|---|")
    for tokens in options.lengths:
        path = options.output / f"cost-{tokens}-{options.repeats}.json"
        cost = Cost(**kept(path, partial(measure, data, corpus.vocab_size, tokens, options.repeats)))
        shares = [100 * (spent / cost.off - 1) for spent in (cost.every_tenth, cost.always)]
        print(f"| {tokens} | {cost.off:.0f} | {shares[0]:+.1f}% | {shares[1]:+.1f}% |")
    if options.picture is not None:
        draw_picture(runs["without", 0], runs[f"clipped-{options.tau:g}", 0], options.picture, options.tau)


if __name__ == "__main__":
    main()
