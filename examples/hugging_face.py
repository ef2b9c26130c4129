"""GPT-2 of transformers, cut by hand, trained by a rule in the Trainer of transformers; it goes on as GPT-2.

python examples/hugging_face.py
"""

import torch
from torch.utils.data import TensorDataset, default_collate
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hbll


def cut(model: GPT2LMHeadModel) -> hbll.Chain:
    """The model as a chain; it shares the model's modules, tied weights included."""
    words, places, norm, head = model.transformer.wte, model.transformer.wpe, model.transformer.ln_f, model.lm_head
    return hbll.Chain(
        embed=hbll.part(lambda tokens: words(tokens) + places(torch.arange(tokens.shape[1])), words, places),
        blocks=model.transformer.h,
        head=hbll.part(lambda state: head(norm(state)), norm, head),
    )


class RuleTrainer(Trainer):
    """The Trainer, whose loss is the rule's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(*inputs).loss


def main() -> None:
    torch.manual_seed(0)
    starts = torch.randint(12, (512, 1))
    sequences = (starts + 5 * torch.arange(17)) % 12  # every token is the one before plus five
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_positions=32, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    rule = hbll.make_rule("stream", cut(model), stage=2, states="chain")
    arguments = TrainingArguments(
        output_dir="runs/hugging_face",
        num_train_epochs=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    pairs = TensorDataset(sequences[:, :-1], sequences[:, 1:])
    RuleTrainer(rule, arguments, train_dataset=pairs, data_collator=default_collate).train()
    said = model.eval().generate(torch.tensor([[3]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(" ".join(map(str, said[0].tolist())))


if __name__ == "__main__":
    main()
