"""Preferences (DPO) with an adapter, on CPU ranks, in about a minute and without a network.

    python examples/dpo.py --devices 2 --fold "| ep2"

Makes a small model with random weights and pairs of a polite and a rude answer, and trains an adapter to prefer the polite
one. The reference is the base without the adapter.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each rank; torch reads it on import

import lightning as L

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli.terminal import peers_end_too, quiet
from lightning_moefold.recipes import PreferenceData, PreferenceModule

#: A prompt and its answer as text; the tags say which part is an answer.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}user: {{ message.content }}\nassistant: {% endif %}{% endfor %}"
)
THINGS = ("the door", "a window", "my book", "the lamp", "this box", "a letter", "the gate", "our table")
ACTS = ("open", "close", "move", "find", "clean")


def prepare(folder: Path) -> None:
    """Writes the model with its tokenizer, and the pairs."""
    import demo_data  # here, as transformers takes seconds to import

    folder.mkdir(parents=True, exist_ok=True)
    demo_data.write_demo_checkpoint(folder / "base", vocab_size=1024, num_hidden_layers=2)
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(320):
            what = f"{ACTS[number % 5]} {THINGS[number // 5 % 8]}"
            row = {
                "prompt": f"Please {what}. ",
                "chosen": f"Gladly, I will {what}.",
                "rejected": f"No, {what} yourself.",
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--fold", default="| ep2", help="parallel sizes (%(default)s)")
    add("--devices", type=int, default=2, help="CPU ranks (%(default)s)")
    add("--steps", type=int, default=30, help="optimizer steps (%(default)s)")
    add("--output", type=Path, default=Path("runs/dpo"), help="where everything is written")
    args = parser.parse_args()
    quiet()
    if "LOCAL_RANK" not in os.environ:  # the process that starts the others
        prepare(args.output)
    base = str(args.output / "base")
    module = PreferenceModule(
        base, beta=0.5, learning_rate=5e-3, warmup_steps=3,
        adapter={"rank": 8, "targets": ["q_proj", "v_proj", "experts"], "expert_rank": 4},
    )  # fmt: skip
    data = PreferenceData(
        [str(args.output / "pairs.jsonl")],
        base,
        sequence_length=48,
        batch_size=8,
        cache_dir=str(args.output / "tokens"),
    )
    trainer = L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold), accelerator="cpu", devices=args.devices, max_steps=args.steps,
        max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    with peers_end_too(trainer):
        trainer.fit(module, data)
        assert module.model is not None
        module.model.save_adapter(args.output / "adapter")
    if trainer.is_global_zero:
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        print(
            f"train/loss {seen['train/loss']:.3f} (0.693 at the start), pairs in the right order {seen['train/accuracy']:.0%}"
        )
        print(f"the adapter is in {args.output / 'adapter'}")


if __name__ == "__main__":
    main()
