"""What all loops share: the model at the start, adapters, seeds, and errors that say what to do."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fastpost.data.rows import DataError
from fastpost.loops import LOOPS
from fastpost.loops.candidates import Candidate, draw, grade
from fastpost.loops.run import LoopRun
from fastpost.trainers.sft import SFTConfig, SFTTrainer
from tests.loops.conftest import TRAINING, rows_of, user, weights

ROWS = [{"prompt": user(f"q{i}"), "completion": user(f"a{i}")} for i in range(4)]


def open_run(model, tokenizer, folder, rows=ROWS, **options):
    settings = {"options": {}, "seed": 0, "batch_size": 2} | options
    return LoopRun("test", model, tokenizer, folder, data={"rows": rows}, **settings)


def train(run, fields, rows=ROWS):
    return run.train("1-sft", SFTTrainer, SFTConfig, fields, run.start, rows)


def test_the_model_in_memory_stays_as_it_is_and_is_kept(model, tokenizer, tmp_path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with open_run(model, tokenizer, tmp_path) as run:
        folder = train(run, TRAINING)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    for name, tensor in weights(tmp_path / "start").items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, weights(folder)[name])


def test_another_model_does_not_go_on_with_the_run(model, tokenizer, tmp_path) -> None:
    open_run(model, tokenizer, tmp_path).journal.close()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(DataError, match=r"holds another run:\n  model: "):
        open_run(model, tokenizer, tmp_path)


def test_an_adapter_comes_out_merged(model, tokenizer, tmp_path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    fields = TRAINING | {"peft_config": lora, "learning_rate": 1e-2}
    with open_run(model, tokenizer, tmp_path, options={"sft": fields}) as run:
        folder = train(run, fields)
    assert not (folder / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    moved = [
        name
        for name, tensor in plain.state_dict().items()
        if not torch.equal(tensor, model.state_dict()[name])
    ]
    assert moved and all("_proj" in name for name in moved)
    assert fields["peft_config"] is lora
    with open_run(tmp_path / "start", tokenizer, tmp_path / "b", options={"sft": fields}):
        pass


def test_samples_differ_and_are_the_same_again(model, tokenizer, tmp_path) -> None:
    def sampler(folder):
        return lambda conversations, *, seed: [
            None if i else f"{seed}" for i, _ in enumerate(conversations)
        ]

    asked = [row["prompt"] for row in ROWS]
    with open_run(model, tokenizer, tmp_path) as run:
        found = draw(run, "one", sampler, run.start, asked, 3)
        assert found == draw(run, "one", sampler, run.start, asked, 3)
        assert [len(texts) for texts in found] == [3, 0, 3, 0]
        other = draw(run, "two", sampler, run.start, asked, 3)
        assert not {t for texts in found for t in texts} & {t for texts in other for t in texts}


def test_rewards_are_weighed_and_sorted(model, tokenizer, tmp_path) -> None:
    def length(prompts, completions, **_):
        return [len(c[0]["content"]) for c in completions]

    def only_b(prompts, completions, mark, **_):
        return [
            m if "b" in c[0]["content"] else None for c, m in zip(completions, mark, strict=True)
        ]

    rows = [{"prompt": user("x"), "mark": 10.0}, {"prompt": user("y"), "mark": 1.0}]
    with open_run(model, tokenizer, tmp_path) as run:
        graded = grade(run, "g", [length, only_b], rows, [["a", "b", "aaa"], ["bb"]], [1.0, 0.5])
        assert graded == [
            [Candidate("b", 6.0), Candidate("aaa", 3.0), Candidate("a", 1.0)],
            [Candidate("bb", 2.5)],
        ]
        nobody = grade(run, "n", only_b, rows[:1], [["a", "b"]])
        assert nobody == [[Candidate("b", 10.0), Candidate("a", None)]]
        with pytest.raises(ValueError, match="2 rewards and 1 weights"):
            grade(run, "w", [length, only_b], rows, [[], []], [1.0])


@pytest.mark.parametrize(
    ("replies", "error", "message"),
    [(["one"], ValueError, "2 items were given and 1 values"), ([1, 2], TypeError, "with int")],
)
def test_a_chat_model_of_another_form_is_named(
    model, tokenizer, tmp_path, replies, error, message
) -> None:
    with open_run(model, tokenizer, tmp_path) as run, pytest.raises(error, match=message):
        run.ask("s", lambda: lambda conversations, *, seed: replies, [user("a"), user("b")])


def test_what_cannot_run_is_refused(model, tokenizer, tmp_path, monkeypatch) -> None:
    with open_run(model, tokenizer, tmp_path) as run:
        with pytest.raises(ValueError, match="output_dir is chosen by the loop"):
            train(run, {"output_dir": "x"})
        with pytest.raises(ValueError, match="1-sft has no rows"):
            train(run, {}, [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_run(model, tokenizer, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="merge it first"):
        open_run(get_peft_model(model, LoraConfig()), tokenizer, tmp_path / "c")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        open_run(model, tokenizer, tmp_path)


def test_malformed_data_is_named_by_its_line(model, tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 is not JSON"):
        open_run(model, tokenizer, tmp_path / "run", rows=path)
    assert not (tmp_path / "run").exists()


def test_rows_are_read_from_files_too(model, tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with open_run(model, tokenizer, tmp_path / "run", rows=path) as run:
        assert run.data["rows"] == ROWS
        assert rows_of(run.write_rows("1", ROWS)) == ROWS
    open_run(model, tokenizer, tmp_path / "run", rows=ROWS).journal.close()  # the same data


def test_every_loop_is_called_by_its_name() -> None:
    assert {name: loop.__name__ for name, loop in LOOPS.items()} == {name: name for name in LOOPS}
    assert len(LOOPS) == 7
