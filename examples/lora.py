"""LoRA on conversations, on CPU ranks, in about a minute and without a network.

    python examples/lora.py --devices 2 --fold "tp2 | ep2"

Makes a small model with random weights and conversations about numbers, trains an adapter of attention and of every expert
on the assistant's turns, and writes it in PEFT's format. The base stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each rank; torch reads it on import

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli.terminal import peers_end_too, quiet
from lightning_moefold.recipes import FineTuneModule, TextData

#: Conversations as text; the tags say which part is trained on.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}user: {{ message.content }}\nassistant: {% endif %}{% endfor %}"
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def prepare(folder: Path) -> None:
    """Writes the model with its tokenizer, and the conversations."""
    import demo_data  # here, as transformers takes seconds to import

    folder.mkdir(parents=True, exist_ok=True)
    demo_data.write_demo_checkpoint(folder / "base", vocab_size=1024, num_hidden_layers=2)
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(600):
            a, b = number % 10, number // 10 % 10
            turns = [
                ("user", f"What comes after {NUMBERS[a]}?"),
                ("assistant", f"After {NUMBERS[a]} comes {NUMBERS[(a + 1) % 10]}."),
            ]
            turns += [
                ("user", f"And after {NUMBERS[b]}?"),
                ("assistant", f"After {NUMBERS[b]} comes {NUMBERS[(b + 1) % 10]}."),
            ]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def _answer(number: int) -> str:
    return f"After {NUMBERS[number]} comes {NUMBERS[(number + 1) % 10]}."


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--fold", default="tp2 | ep2", help="parallel sizes (%(default)s)")
    add("--devices", type=int, default=2, help="CPU ranks (%(default)s)")
    add("--steps", type=int, default=60, help="optimizer steps (%(default)s)")
    add("--output", type=Path, default=Path("runs/lora"), help="where everything is written")
    args = parser.parse_args()
    quiet()
    if "LOCAL_RANK" not in os.environ:  # the process that starts the others
        prepare(args.output)
    base, losses = str(args.output / "base"), Losses()
    module = FineTuneModule(
        base, learning_rate=1e-2, warmup_steps=5,
        adapter={"rank": 16, "alpha": 32, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "experts"], "expert_rank": 8},
    )  # fmt: skip
    data = TextData(
        [str(args.output / "chats.jsonl")],
        base,
        sequence_length=128,
        batch_size=8,
        cache_dir=str(args.output / "tokens"),
    )
    trainer = L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold), accelerator="cpu", devices=args.devices, max_steps=args.steps,
        max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False, callbacks=[losses],
    )  # fmt: skip
    with peers_end_too(trainer):
        trainer.fit(module, data)
        assert module.model is not None
        module.model.save_adapter(args.output / "adapter")
    if trainer.is_global_zero:
        print(f"train/loss {losses.values[0]:.3f} -> {sum(losses.values[-5:]) / 5:.3f}")
        print(
            f"the adapter is in {args.output / 'adapter'}: moefold merge --checkpoint {base} --adapter ... --output ..."
        )


if __name__ == "__main__":
    main()
