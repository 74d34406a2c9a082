"""The same work as in bench.speed, done by transformers and by TRL's PPO.

bench.speed starts this file with the Python that has these packages, and sends one line of JSON per
measurement. The models have the shape of ours and random weights: speed does not depend on weights.
"""

import json
import os
import sys
import time
import warnings

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    logging,
)

logging.set_verbosity_error()


def config_of(shape) -> LlamaConfig:
    """The configuration for transformers of a model with the shape of ours."""
    return LlamaConfig(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["n_layers"],
        num_labels=1,
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        intermediate_size=shape["ffn_dim"],
        vocab_size=shape["vocab_size"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=shape["max_seq_len"],
    )


def autocast(dtype: str):
    """Mixed precision if dtype is "bfloat16"; the weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


class Work:
    """Each method does one kind of work once and returns its amount; see bench.speed."""

    def __init__(self, shape, dtype: str):
        torch.manual_seed(1)
        self.shape, self.dtype = shape, dtype
        self.model = LlamaForCausalLM(config_of(shape)).eval()
        self.reward_model = LlamaForSequenceClassification(config_of(shape)).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)

    def tokens(self, rows: int, length: int):
        """Random ids, (rows, length)."""
        return torch.randint(3, self.shape["vocab_size"], (rows, length))

    def train(self, rows: int, length: int) -> int:
        tokens = self.tokens(rows, length)
        with autocast(self.dtype):
            loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tokens.numel()

    @torch.inference_mode()
    def prefill(self, rows: int, length: int) -> int:
        tokens = self.tokens(rows, length)
        with autocast(self.dtype):
            self.model(tokens, use_cache=True, logits_to_keep=1)
        return tokens.numel()

    @torch.inference_mode()
    def decode(self, rows: int, length: int, new: int) -> int:
        tokens = self.tokens(rows, length)
        with autocast(self.dtype):
            out = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        assert out.shape == (rows, length + new)
        return rows * new

    @torch.inference_mode()
    def score_sequences(self, lengths) -> int:
        sequences = [self.tokens(1, length)[0] for length in lengths]
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        with autocast(self.dtype):
            self.reward_model(tokens, attention_mask=(tokens != 0).long())
        return sum(lengths)

    def ppo(self, lengths, new: int, mini_batch: int, micro_batch: int) -> int:
        """One iteration of TRL's trainer on len(lengths) prompts. dtype "default": TRL's own."""
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        words = {f"w{i}": i for i in range(self.shape["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
            eos_token="w2",
            pad_token="w0",
            bos_token="w1",
            unk_token="w3",
            padding_side="left",
        )
        prompts = [self.tokens(1, length)[0].tolist() for length in lengths]
        options = (
            {}
            if self.dtype == "default"
            else dict(bf16=self.dtype == "bfloat16", gradient_checkpointing=False)
        )
        settings = PPOConfig(
            output_dir=os.path.join(os.environ["TMPDIR"], "trl"),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
            logging_steps=10**6,
            total_episodes=len(prompts),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(prompts) // micro_batch,
            num_ppo_epochs=1,
            num_mini_batches=len(prompts) // mini_batch,
            response_length=new,
            temperature=1.0,
            local_rollout_forward_batch_size=4 * micro_batch,
            learning_rate=1e-6,
            **options,
        )
        reference = LlamaForCausalLM(config_of(self.shape))
        value = LlamaForSequenceClassification(config_of(self.shape))
        data = Dataset.from_dict({"input_ids": prompts})
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=self.model,
            ref_model=reference,
            reward_model=self.reward_model,
            train_dataset=data,
            value_model=value,
            eval_dataset=data,
        )
        self.started = time.perf_counter()  # do not count the setup
        trainer.train()
        return len(prompts)


def main():
    works, replies = {}, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too: send that to stderr, not among the replies
    for line in sys.stdin:
        request = json.loads(line)
        dtype = request["dtype"]
        if dtype not in works:
            works[dtype] = Work(request["shape"], dtype)
        work = works[dtype]
        work.started = time.perf_counter()
        amount = getattr(work, request["work"])(**request["size"])
        print(amount / (time.perf_counter() - work.started), file=replies, flush=True)


if __name__ == "__main__":
    main()
