"""Process reward models: equal to a plain loop, able to learn, exact on resume."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import fastpost
from fastpost.pooling import accelerate_pooled
from fastpost.process_reward import aggregate, encode_steps, step_scores

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def step_model(tokenizer, **config) -> LlamaForTokenClassification:
    torch.manual_seed(0)
    settings = {"initializer_range": 0.2, "num_labels": 1} | config
    return LlamaForTokenClassification(LlamaConfig(**SIZES, vocab_size=len(tokenizer), **settings))


@pytest.fixture
def model(tokenizer) -> LlamaForTokenClassification:
    return step_model(tokenizer)


@pytest.fixture(scope="module")
def step_data() -> Dataset:
    """Two solutions of every problem, which part after the first step; soft labels among them."""
    rows = []
    for i in range(8):
        prompt = f"what is {i} + {i + 1} + 1? "
        first = f"{i} + {i + 1} = {2 * i + 1}"
        rows += [
            {
                "prompt": prompt,
                "completions": [first, f"so it is {2 * i + 2}"],
                "labels": [1.0, 1.0],
            },
            {
                "prompt": prompt,
                "completions": [first, "and so on " * (i % 3 + 1), f"it is {i}"],
                "labels": [1.0, 0.25, 0.0],
            },
        ]
    return Dataset.from_list(rows)


SEQUENTIAL = {
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def plain_run(model, tokenizer, data, num_rows=4, num_steps=3, last_only=False):
    """The same training in plain torch: no packing, logits of every token."""
    model = copy.deepcopy(model).train()
    model.dropout.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=SEQUENTIAL["learning_rate"])
    losses, gradients = [], {}
    for step in range(num_steps):
        logits, labels = [], []
        for row in data.select(range(step * num_rows, (step + 1) * num_rows)):
            ids = tokenizer(row["prompt"])["input_ids"]
            ends = []
            for text in row["completions"]:
                ids += tokenizer(text + "\n")["input_ids"]
                ends.append(len(ids) - 1)
            chosen = slice(-1, None) if last_only else slice(None)
            output = model(torch.tensor([ids])).logits[0, :, 0]
            logits.append(output[ends[chosen]])
            labels.append(torch.tensor(row["labels"][chosen], dtype=torch.float32))
        loss = F.binary_cross_entropy(torch.cat(logits).sigmoid(), torch.cat(labels))
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, {n: p.detach() for n, p in model.named_parameters()}


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "accumulation-uneven": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "last-step": {"train_on_last_step_only": True},
    "no-sharing": {"prefix_sharing": False},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_same_steps_as_a_plain_loop(config, model, tokenizer, step_data, run_trainer) -> None:
    last_only = config.get("train_on_last_step_only", False)
    losses, gradients, weights = plain_run(model, tokenizer, step_data, last_only=last_only)
    trainer = run_trainer(
        fastpost.PRMTrainer, fastpost.PRMConfig, model, step_data, **SEQUENTIAL | config
    )
    trace = trainer.trace
    assert trace.losses == pytest.approx(losses, abs=1e-5)
    for name, gradient in gradients.items():
        error = (trace.gradients[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-7, name
        torch.testing.assert_close(trace.weights[name], weights[name], atol=2e-5, rtol=0)
    stats = trainer.engine.stats
    assert trainer.engine.packed_forwards and not trainer.engine.fallbacks
    assert (stats.unique_tokens < stats.row_tokens) == (
        config.get("prefix_sharing", True) and config.get("per_device_train_batch_size") != 1
    )
    assert stats.scored_tokens == (12 if last_only else 30)
    assert 0.0 <= trace.logs[0]["accuracy"] <= 1.0


def test_another_label_would_be_noticed(model, tokenizer, step_data, run_trainer) -> None:
    losses, _, _ = plain_run(model, tokenizer, step_data)
    flipped = step_data.map(lambda row: {"labels": [1 - y for y in row["labels"]]})
    trainer = run_trainer(fastpost.PRMTrainer, fastpost.PRMConfig, model, flipped, **SEQUENTIAL)
    assert trainer.trace.losses != pytest.approx(losses, abs=1e-2)


def spotty_rows(num_rows: int, seed: int) -> list[dict]:
    """A step is right until the first one that holds a "?"; from there on all are wrong."""
    source = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        steps, labels, is_right = [], [], True
        for _ in range(4):
            wrong = source.random() < 0.25
            text = "".join(source.choice("abcdef") for _ in range(4))
            steps.append(text + "?" if wrong else text)
            is_right = is_right and not wrong
            labels.append(is_right)
        rows.append({"prompt": "go: ", "completions": steps, "labels": labels})
    return rows


def test_it_learns_to_tell_steps(tokenizer, run_trainer, tmp_path) -> None:
    train, held_out = Dataset.from_list(spotty_rows(320, 1)), spotty_rows(60, 2)
    config = {
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "logging_steps": 10,
    }

    def accuracy(data) -> float:
        trainer = run_trainer(
            fastpost.PRMTrainer,
            fastpost.PRMConfig,
            step_model(tokenizer, initializer_range=0.05),
            data,
            **config,
        )
        found = trainer.evaluate(
            trainer._prepare(Dataset.from_list(held_out), trainer.args, "held out", False)
        )
        scores = [
            step_scores(trainer.model, tokenizer, r["prompt"], r["completions"]) for r in held_out
        ]
        hits = [
            (score > 0.5) == label
            for row, given in zip(held_out, scores, strict=True)
            for score, label in zip(given, row["labels"], strict=True)
        ]
        share = sum(hits) / len(hits)
        # The trainer's batches are of 8 rows and the last is smaller: a mean of means.
        assert found["eval_accuracy"] == pytest.approx(share, abs=0.02)
        return share

    learnt = accuracy(train)
    source = random.Random(3)
    senseless = train.map(lambda row: {"labels": [source.random() < 0.5 for _ in row["labels"]]})
    assert learnt > 0.95
    assert accuracy(senseless) < 0.8


def test_resume_takes_the_same_steps(model, step_data, run_trainer, tmp_path) -> None:
    config = {"max_steps": 4, "lr_scheduler_type": "linear", "save_strategy": "steps"}
    config |= {"save_steps": 2, "output_dir": str(tmp_path / "run")}
    whole = run_trainer(fastpost.PRMTrainer, fastpost.PRMConfig, model, step_data, **config)
    again = fastpost.PRMTrainer(
        copy.deepcopy(model),
        args=whole.args,
        train_dataset=step_data,
        processing_class=whole.processing_class,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    for name, weight in again.model.named_parameters():
        torch.testing.assert_close(weight, whole.trace.weights[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "qv"])
def test_scores_survive_saving_and_loading_an_adapter(
    target_modules, tokenizer, step_data, run_trainer, tmp_path
) -> None:
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(base)
    peft_config = LoraConfig(r=4, target_modules=target_modules, task_type="TOKEN_CLS")
    trainer = run_trainer(
        fastpost.PRMTrainer,
        fastpost.PRMConfig,
        AutoModelForTokenClassification.from_pretrained(base, num_labels=1),
        step_data,
        trainer_options={"peft_config": peft_config},
        learning_rate=1e-2,
    )
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForTokenClassification.from_pretrained(base, num_labels=1)
    again = PeftModel.from_pretrained(again, tmp_path / "saved")
    for row in step_data.select(range(3)):
        expected = step_scores(trainer.model, tokenizer, row["prompt"], row["completions"])
        actual = step_scores(again, tokenizer, row["prompt"], row["completions"])
        assert actual == pytest.approx(expected, abs=1e-6)


def test_a_model_folder_is_loaded_and_remembers_its_separator(
    tokenizer, step_data, run_trainer, tmp_path
) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    trainer = fastpost.PRMTrainer(
        str(tmp_path),
        args=fastpost.PRMConfig(
            str(tmp_path / "run"), step_separator="<|im_end|>", use_cpu=True, report_to=[]
        ),
        train_dataset=step_data,
        processing_class=tokenizer,
    )
    trainer.save_model()
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "run")
    row = step_data[0]
    expected = step_scores(trainer.model, tokenizer, row["prompt"], row["completions"])
    assert step_scores(again, tokenizer, row["prompt"], row["completions"]) == expected
    newline = step_scores(again, tokenizer, row["prompt"], row["completions"], step_separator="\n")
    assert newline != pytest.approx(expected, abs=1e-6)


def test_steps_end_where_their_separator_ends(tokenizer) -> None:
    encoded = encode_steps(tokenizer, "ab", ["c", "de"], "\n\n")
    assert tokenizer.decode(encoded.input_ids) == "abc\n\nde\n\n"
    assert encoded.ends == [4, 8]
    assert encode_steps(tokenizer, "ab", ["c", "de"], "").ends == [2, 4]
    chat = encode_steps(tokenizer, [{"role": "user", "content": "ab"}], ["c"])
    assert tokenizer.decode(chat.input_ids).endswith("<|im_start|>assistant\nc\n")
    assert chat.ends == [len(chat.input_ids) - 1]


def test_scores_of_an_accelerated_model_are_its_own(model, tokenizer) -> None:
    model.train()
    expected = step_scores(model, tokenizer, "what? ", ["this", "that"])
    assert model.training and all(0 < score < 1 for score in expected)
    engine = accelerate_pooled(model)
    assert step_scores(model, tokenizer, "what? ", ["this", "that"]) == expected
    assert not engine.fallbacks


def test_max_length_cuts_steps_and_says_so(model, tokenizer, step_data, tmp_path) -> None:
    def reports(**config):
        args = fastpost.PRMConfig(str(tmp_path), use_cpu=True, report_to=[], **config)
        trainer = fastpost.PRMTrainer(
            copy.deepcopy(model),
            args=args,
            train_dataset=step_data,
            eval_dataset={"again": step_data},
            processing_class=tokenizer,
        )
        assert len(trainer.train_dataset) == trainer.step_reports["train"].rows
        return trainer.step_reports

    whole = reports()["train"]
    assert whole == (16, 40, 0, 0, pytest.approx((24 + 8 * 0.25) / 40))
    # Room for the shorter solutions and for the first two steps of some of the longer ones.
    cut = reports(max_length=42)["train"]
    assert (cut.rows, cut.dropped_rows) == (16, 0)
    assert cut.steps + cut.truncated_steps == 40 and 8 <= cut.truncated_steps < 24
    last = reports(max_length=42, train_on_last_step_only=True)
    assert 0 < last["train"].dropped_rows == last["train"].truncated_steps < 16
    assert last["train"].rows == last["train"].steps == 16 - last["train"].dropped_rows
    assert last["again"] == cut
    with pytest.raises(ValueError, match="max_length=5"):
        reports(max_length=5)


BAD_ROWS = {
    "no-steps": ({"completions": [], "labels": []}, "one or more steps"),
    "blank-step": ({"completions": ["a", " \n"], "labels": [1.0, 1.0]}, "step 1 of 2 is blank"),
    "missing-label": ({"completions": ["a", "b"], "labels": [1.0]}, "one label per step"),
    "label-range": ({"completions": ["a"], "labels": [2.0]}, "0 to 1"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_number(
    bad, message, model, tokenizer, step_data, tmp_path
) -> None:
    data = Dataset.from_list([*step_data, {"prompt": "x", **bad}])
    with pytest.raises(ValueError, match=f"row 16 of the train data.*{message}"):
        build(model, tokenizer, data, tmp_path)


def build(model, tokenizer, data, tmp_path, peft_config=None, **config):
    return fastpost.PRMTrainer(
        model,
        args=fastpost.PRMConfig(str(tmp_path), use_cpu=True, report_to=[], **config),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_what_cannot_be_meant_is_refused(model, tokenizer, step_data, tmp_path) -> None:
    with pytest.raises(ValueError, match="completions"):
        build(model, tokenizer, step_data.rename_column("completions", "steps"), tmp_path)
    with pytest.raises(ValueError, match="empty"):
        build(model, tokenizer, step_data.select([]), tmp_path)
    with pytest.raises(TypeError, match=r"datasets\.Dataset"):
        build(model, tokenizer, list(step_data), tmp_path)
    with pytest.raises(ValueError, match="memory_budget_gb"):
        build(model, tokenizer, step_data, tmp_path, memory_budget_gb=1.0)
    with pytest.raises(ValueError, match="num_labels=2"):
        build(step_model(tokenizer, num_labels=2), tokenizer, step_data, tmp_path)
    with pytest.raises(ValueError, match="would not save the classification head"):
        build(model, tokenizer, step_data, tmp_path, LoraConfig(target_modules=["q_proj"]))
    encoder = BertForTokenClassification(
        BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            num_labels=1,
        )
    )
    with pytest.raises(ValueError, match="cannot score steps"):
        build(encoder, tokenizer, step_data, tmp_path)
    two = LlamaForSequenceClassification(
        LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=2)
    )
    with pytest.raises(ValueError, match="num_labels=1"):
        step_scores(two, tokenizer, "a", ["b"])


def test_aggregates() -> None:
    scores = [0.9, 0.5, 0.8]
    assert aggregate(scores, "min") == 0.5
    assert aggregate(scores, "product") == pytest.approx(0.36)
    assert aggregate(scores, "last") == 0.8
    with pytest.raises(ValueError, match="no scores"):
        aggregate([], "min")
    with pytest.raises(ValueError, match="probabilities"):
        aggregate([0.5, 3.0], "product")
    with pytest.raises(ValueError, match="'mean'"):
        aggregate(scores, "mean")
