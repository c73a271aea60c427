"""What a run leaves behind: ``summary.json`` and ``loss.png``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field

from distmuon.pretrain.files import replace_text
from distmuon.pretrain.metrics import Record, curve

TRAIN_LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation/loss"
BITS_PER_BYTE = "validation/bits_per_byte"


@dataclass
class Summary:
    """The result of a run.

    Attributes:
        run_dir: The run folder.
        optimizer: ``muon`` or ``adamw``.
        parameters: Number of trained values.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        seconds: Training time without validation, checkpoints and sampling.
        tokens_per_second: tokens / seconds.
        train_loss: Loss of the last step, nats a token.
        validation_loss: Last validation loss, nats a token.
        bits_per_byte: The same in bits a byte; None where the bytes of the data are not known.
        validation_curve: ``(tokens, validation loss)`` of each validation.
        checkpoint: Last checkpoint; None with checkpoints switched off.
        sample: Sample text; None if none was asked for.
    """

    run_dir: str
    optimizer: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float
    bits_per_byte: float | None
    validation_curve: list[tuple[float, float]] = field(default_factory=list)
    checkpoint: str | None = None
    sample: str | None = None

    def save(self, path: pathlib.Path) -> None:
        """Write the summary as JSON."""
        replace_text(path, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: pathlib.Path) -> Summary | None:
        """Read what `save` wrote; None if there is no file, or it is not that."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["validation_curve"] = [(tokens, loss) for tokens, loss in fields["validation_curve"]]
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def summarize(
    records: list[Record],
    *,
    run_dir: pathlib.Path,
    optimizer: str,
    parameters: int,
    checkpoint: pathlib.Path | None,
    sample: str | None,
) -> Summary:
    """Sum up the records of a finished run, the last of which has every number."""
    last = records[-1]
    return Summary(
        run_dir=str(run_dir),
        optimizer=optimizer,
        parameters=parameters,
        steps=last["step"],
        tokens=last["tokens"],
        seconds=last["seconds"],
        tokens_per_second=last["tokens"] / last["seconds"],
        train_loss=last[TRAIN_LOSS],
        validation_loss=last[VALIDATION_LOSS],
        bits_per_byte=last.get(BITS_PER_BYTE),
        validation_curve=curve(records, VALIDATION_LOSS),
        checkpoint=None if checkpoint is None else str(checkpoint),
        sample=sample,
    )


def plot_loss(records: list[Record], path: pathlib.Path, title: str) -> None:
    """Draw training and validation loss against tokens and against time.

    Args:
        records: Of ``metrics.jsonl``.
        path: The PNG to write.
        title: Of the figure.
    """
    # pyplot would choose a backend and keep figures; this needs neither a screen nor cleaning up
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, against, label in zip(panels, ("tokens", "seconds"), ("tokens", "training time (s)"), strict=True):
        for name, style, shown in ((TRAIN_LOSS, "-", "training"), (VALIDATION_LOSS, "o-", "validation")):
            points = curve(records, name, against)
            if points:
                panel.plot(*zip(*points, strict=True), style, label=shown, linewidth=1.5, markersize=4)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("loss (nats per token)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
