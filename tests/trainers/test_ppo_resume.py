"""A PPO run that is stopped and resumed computes what it would have computed undisturbed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

import fastpost

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def reward(completion_ids, **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"{i} plus {i}" + "?" * (i % 4)} for i in range(10)])


def make_trainer(model, tokenizer, folder, options=None, reward_funcs=reward, **config: Any) -> Any:
    """Rollouts of 4 prompts: 2 an epoch, each learnt from in 4 steps."""
    return fastpost.PPOTrainer(
        copy.deepcopy(model),
        reward_funcs,
        fastpost.PPOConfig(
            str(folder),
            **{
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "num_mini_batches": 2,
                "num_generations": 2,
                "num_ppo_epochs": 2,
                "max_completion_length": 6,
                "max_steps": 11,
                "learning_rate": 1e-3,
                "kl_target": 0.05,
                "kl_horizon": 40,
                "logging_steps": 2,
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                "save_strategy": "steps",
                "save_steps": 1,
            }
            | config,
        ),
        prompts(),
        processing_class=tokenizer,
        **copy.deepcopy(options or {}),
    )


def value_model(vocab: int) -> Any:
    torch.manual_seed(3)
    return LlamaForTokenClassification(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocab,
            num_labels=1,
        )
    )


# Case -> what the constructor is given, steps behind which the run is stopped: in a rollout (5),
# between two epochs (8), inside the second epoch (9).
CASES = {
    "full": ((), (5, 8, 9)),
    "lora": (("peft_config",), (5,)),
    "critic": (("value_model",), (5,)),
}


@pytest.mark.parametrize(("parts", "stops"), CASES.values(), ids=CASES.keys())
def test_bit_for_bit(parts, stops, model, tokenizer, tmp_path) -> None:
    made = {"peft_config": LORA, "value_model": value_model(len(tokenizer))}
    options = {name: made[name] for name in parts}
    whole = make_trainer(model, tokenizer, tmp_path / "run", options)
    whole.train()
    expected = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    for stop in stops:
        checkpoint = tmp_path / "run" / f"checkpoint-{stop}"
        resumed = make_trainer(
            model, tokenizer, tmp_path / f"from-{stop}", options, save_strategy="no"
        )
        torch.manual_seed(999)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for name, parameter in resumed.model.named_parameters():
            assert torch.equal(parameter, expected[name]), (stop, name)
        assert resumed.kl_controller.coefficient == whole.kl_controller.coefficient != 0.05
        ours, theirs = (run.state.log_history[-2] for run in (resumed, whole))
        assert ours["step"] == theirs["step"] == 10
        assert {k: v for k, v in ours.items() if k != "epoch"} == {
            k: v for k, v in theirs.items() if k != "epoch"
        }


def test_a_resumed_run_needs_its_rollout(model, tokenizer, tmp_path) -> None:
    """The test above can fail: without the saved rollout another one is sampled."""
    whole = make_trainer(model, tokenizer, tmp_path / "run", max_steps=6)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    for file in checkpoint.glob("fastpost_state_*"):
        file.unlink()
    resumed = make_trainer(model, tokenizer, tmp_path / "resumed", max_steps=6, save_strategy="no")
    with pytest.warns(fastpost.scoring.FastpostWarning, match="not exactly"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    after = dict(resumed.model.named_parameters())
    assert any(not torch.equal(p, after[name]) for name, p in whole.model.named_parameters())


def test_checkpoints_load_as_plain_models(model, tokenizer, tmp_path) -> None:
    """The policy's files are transformers' and PEFT's own; the critic has its own beside them."""
    full = make_trainer(model, tokenizer, tmp_path / "full", max_steps=2, save_steps=2)
    full.train()
    folder = tmp_path / "full" / "checkpoint-2"
    assert not any("value" in name for name in load_file(folder / "model.safetensors"))
    head = load_file(folder / "value_head.safetensors")
    assert head["weight"].shape == (1, 64) and head["weight"].abs().max() > 0
    loaded = LlamaForCausalLM.from_pretrained(folder)
    trained = dict(full.model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())

    again = make_trainer(str(folder), tokenizer, tmp_path / "again", max_steps=1)
    assert torch.equal(again.critic.module.weight, full.critic.module.weight)

    adapter = make_trainer(
        model, tokenizer, tmp_path / "lora", {"peft_config": LORA}, max_steps=2, save_steps=2
    )
    adapter.train()
    folder = tmp_path / "lora" / "checkpoint-2"
    assert (folder / "value_head.safetensors").is_file()
    assert not any("value" in name for name in load_file(folder / "adapter_model.safetensors"))
    PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert sorted(Path(tmp_path / "lora").glob("*.safetensors")) == []
    adapter.save_model()
    assert (tmp_path / "lora" / "value_head.safetensors").is_file()


def test_a_checkpoint_with_another_critic_is_refused(model, tokenizer, tmp_path) -> None:
    make_trainer(model, tokenizer, tmp_path / "run", max_steps=1).train()
    critic = {"value_model": value_model(len(tokenizer))}
    other = make_trainer(model, tokenizer, tmp_path / "other", critic, save_strategy="no")
    with pytest.raises(ValueError, match=r"trained_parameters: \d+ in the checkpoint, \d+ now"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_checkpoint_that_lost_its_critic_is_refused(model, tokenizer, tmp_path) -> None:
    critic = {"value_model": value_model(len(tokenizer))}
    trainer = make_trainer(model, tokenizer, tmp_path / "run", critic, max_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "value_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"value_model\.safetensors is missing"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("parts", [(), ("peft_config",)], ids=["full", "lora"])
def test_the_best_checkpoint_comes_back_with_its_critic(parts, model, tokenizer, tmp_path) -> None:
    calls = []

    def worse_every_time(completion_ids, **_: Any) -> list[float]:
        calls.append(0)
        return [-float(len(calls) + sum(ids) % 2) for ids in completion_ids]

    options = {"eval_dataset": prompts()} | ({"peft_config": LORA} if parts else {})
    trainer = make_trainer(
        model,
        tokenizer,
        tmp_path,
        options,
        worse_every_time,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "value_head.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "value_head.safetensors")
    assert best.name == "checkpoint-1" and not torch.equal(last["weight"], saved["weight"])
    assert torch.equal(trainer.critic.module.weight, saved["weight"])
