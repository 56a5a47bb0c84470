"""Reference log-probs on disk: found by what they depend on, computed once, never stale."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import fastpost
from fastpost import reference_cache
from fastpost.reference_cache import (
    ReferenceStore,
    ScoredRow,
    cache_folder,
    cached_logps,
    reference_digest,
    unpadded_row,
)
from fastpost.scoring import FastpostWarning
from fastpost.trainers.cached_reference import CachedReference
from tests.trainers import methods
from tests.trainers.methods import causal_model, preference_rows

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of the reference."""
    stock, calls = CachedReference._score_with_reference, []

    def score(self: Any, rows: list[ScoredRow]) -> torch.Tensor:
        calls.append(len(rows))
        return stock(self, rows)

    monkeypatch.setattr(CachedReference, "_score_with_reference", score)
    return calls


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(
        data: Dataset | None = None,
        seed: int = 0,
        tokenizer: Any = None,
        options: dict[str, Any] | None = None,
        module: Any = fastpost,
        **config: Any,
    ) -> Any:
        settings = methods.settings_of(methods.METHODS["DPO"], tmp_path / "run", **config)
        if module is fastpost:
            settings["reference"] = "cached"
        else:
            settings["precompute_ref_log_probs"] = True
        return module.DPOTrainer(
            causal_model(seed=seed),
            args=module.DPOConfig(**settings),
            train_dataset=preference_rows() if data is None else data,
            processing_class=copy.deepcopy(tokenizer or methods.tokenizer()),
            **(options or {}),
        )

    return make


@pytest.mark.parametrize(
    "config",
    [{}, {"max_length": 55}, {"max_length": 40, "truncation_mode": "keep_end"}, {"ld_alpha": 0.3}],
    ids=["plain", "truncated", "truncated-start", "length-desensitised"],
)
def test_values_are_those_of_trl(config: dict[str, Any], make: Any) -> None:
    ours, stock = make(**config).train_dataset, make(module=trl, **config).train_dataset
    assert ours.column_names == stock.column_names
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours.features[name] == stock.features[name]
        np.testing.assert_allclose(ours[name], stock[name], rtol=2e-6)
        assert len(set(ours[name])) >= 6


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_values_of_kto_are_those_of_trl(loss_type: str, tmp_path: Path, scored: list[int]) -> None:
    """With mismatched rows for the KL estimate, and for the loss that has none."""
    found = []
    for module, choice in ((fastpost, "reference"), (trl, "precompute_ref_log_probs")):
        settings = methods.settings_of(
            methods.METHODS["KTO"], tmp_path / "run", loss_type=loss_type, max_length=70
        )
        trainer = module.KTOTrainer(
            causal_model(),
            args=module.KTOConfig(**settings, **{choice: "cached" if module is fastpost else True}),
            train_dataset=methods.unpaired_rows(),
            processing_class=copy.deepcopy(methods.tokenizer()),
        )
        found.append(trainer.train_dataset)
    ours, stock = found
    names = {"ref_logps", "ref_KL_logps"} & set(stock.column_names)
    assert ours.column_names == stock.column_names and len(names) == 1 + (loss_type == "kto")
    for name in names:
        assert ours.features[name] == stock.features[name]
        np.testing.assert_allclose(ours[name], stock[name], rtol=2e-6)
    assert sum(scored) > 6 and len(set(ours["ref_logps"])) > 6


def test_a_second_run_computes_nothing(make: Any, scored: list[int]) -> None:
    first = make(per_device_train_batch_size=4)
    assert scored == [8, 8, 8] and first.reference_report.computed == 24
    again = make(per_device_train_batch_size=2, beta=0.5, learning_rate=1.0)
    assert scored == [8, 8, 8] and again.reference_report.computed == 0
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert first.train_dataset[name] == again.train_dataset[name]
    name = first.reference_report.name[:12]
    assert str(first.reference_report) == f"cached, 24 rows (24 computed now), sha {name}"


def test_other_weights_are_another_reference(make: Any, cache: Path, scored: list[int]) -> None:
    one, other = make(), make(seed=1)
    assert sum(scored) == 48
    assert one.reference_report.name != other.reference_report.name
    assert {p.name for p in cache.iterdir()} == {t.reference_report.name for t in (one, other)}
    assert one.train_dataset["ref_chosen_logps"] != other.train_dataset["ref_chosen_logps"]


def test_only_new_rows_are_computed(make: Any, scored: list[int]) -> None:
    make(preference_rows().select(range(5)))
    assert sum(scored) == 10
    rows = preference_rows().to_list()
    rows[2]["rejected"][0]["content"] += "!"
    changed = make(Dataset.from_list(rows))
    # 7 pairs are new, and one answer of the five known pairs.
    assert sum(scored) == 10 + 15 == 10 + changed.reference_report.computed


def test_another_template_is_other_rows(make: Any, scored: list[int]) -> None:
    make()
    tokenizer = copy.deepcopy(methods.tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant:\n{%")
    make(tokenizer=tokenizer)
    assert sum(scored) == 48


def test_truncation_makes_other_rows_of_those_it_cuts(make: Any, scored: list[int]) -> None:
    make()
    make(max_length=60)
    assert 24 < sum(scored) < 48


def test_an_adapter_and_its_bare_base_share_a_reference(make: Any, scored: list[int]) -> None:
    bare = make()
    adapted = make(options={"peft_config": LORA})
    assert sum(scored) == 24 and adapted.reference_report.name == bare.reference_report.name
    # The other way round, the log-probs are really computed with the adapter off.
    for values in adapted.model.named_parameters():
        if "lora_B" in values[0]:
            torch.nn.init.normal_(values[1])
    rows = [ScoredRow(np.arange(3, 9), np.ones(6, np.float32))]
    torch.testing.assert_close(
        adapted._score_with_reference(rows), bare._score_with_reference(rows), atol=1e-5, rtol=0
    )


def test_the_reference_is_freed_before_training(make: Any, scored: list[int]) -> None:
    reference = causal_model(seed=1)
    memory = weakref.ref(reference)
    options = {"ref_model": reference}
    trainer = make(options=options, max_steps=2)
    assert sum(scored) == 24 and trainer.ref_model is None and trainer.ref_engine is None
    del reference, options["ref_model"]
    gc.collect()
    assert memory() is None
    trainer.train()
    # Rows that are known need no reference; others cannot be computed any more.
    trainer.state.global_step = 0
    assert "eval_loss" in trainer.evaluate(preference_rows())
    row = preference_rows()[0] | {"chosen": [{"role": "assistant", "content": "never seen"}]}
    with pytest.raises(ValueError, match="reference was freed"):
        trainer.evaluate(Dataset.from_list([row]))


def test_streams_are_refused(make: Any) -> None:
    stream = preference_rows().to_iterable_dataset()
    with pytest.raises(ValueError, match="cannot be computed beforehand for a stream"):
        make(stream)


def test_eval_data_is_cached_too(make: Any, scored: list[int]) -> None:
    rows = preference_rows()
    trainer = make(rows.select(range(8)), options={"eval_dataset": {"held": rows.select([9, 10])}})
    assert sum(scored) == 20 and trainer.reference_report.rows == 16
    assert "ref_chosen_logps" in trainer.eval_dataset["held"].column_names


# The store by itself.

ALONE = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)


def some_rows(count: int) -> list[ScoredRow]:
    return [ScoredRow(np.arange(i, i + 5), np.ones(5, np.float32)) for i in range(count)]


def sums(rows: list[ScoredRow]) -> torch.Tensor:
    return torch.tensor([float(row.ids.sum()) / 3 for row in rows])


def look_up(rows: list[ScoredRow], folder: Path, score: Any = sums, batch_rows: int = 4) -> Any:
    return cached_logps(rows, folder, score, batch_rows=batch_rows, accelerator=ALONE)


def test_values_come_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    rows = some_rows(11) + some_rows(3)  # the first three twice
    values, report = look_up(rows, tmp_path / "a")
    assert torch.equal(values, sums(rows)) and (report.rows, report.computed) == (14, 11)
    values, report = look_up(rows[::-1], tmp_path / "a", score=None)
    assert torch.equal(values, sums(rows[::-1])) and report.computed == 0


def test_rows_with_equal_beginnings_share_a_forward(tmp_path: Path) -> None:
    rows = [
        ScoredRow(np.array([prompt] * 6 + [answer]), np.ones(7, np.float32))
        for answer in range(2)
        for prompt in (300, 7, 40_000, 12)
    ]
    batches: list[set[int]] = []

    def score(batch: list[ScoredRow]) -> torch.Tensor:
        batches.append({int(row.ids[0]) for row in batch})
        return sums(batch)

    look_up(rows, tmp_path / "a", score, batch_rows=2)
    assert batches == [{7}, {12}, {300}, {40_000}]


def test_an_interrupted_computation_goes_on(tmp_path: Path) -> None:
    seen: list[int] = []

    def score(batch: list[ScoredRow]) -> torch.Tensor:
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.extend(int(row.ids[0]) for row in batch)
        return sums(batch)

    rows = some_rows(10)
    with pytest.raises(KeyboardInterrupt):
        look_up(rows, tmp_path / "a", score)
    values, report = look_up(rows, tmp_path / "a")
    assert report.computed == 2 and torch.equal(values, sums(rows))


@pytest.mark.parametrize("damaged_byte", [1, 33, 38], ids=["key", "value", "checksum"])
def test_a_damaged_record_is_computed_again(damaged_byte: int, tmp_path: Path) -> None:
    rows = some_rows(6)
    look_up(rows, tmp_path)
    (log,) = tmp_path.glob("rows-*.log")
    content = bytearray(log.read_bytes())
    content[2 * 40 + damaged_byte] ^= 4
    log.write_bytes(content)
    with pytest.warns(FastpostWarning, match="1 of 6 records .* are damaged"):
        values, report = look_up(rows, tmp_path)
    assert report.computed == 1 and torch.equal(values, sums(rows))
    assert look_up(rows, tmp_path)[1].computed == 0  # and warned of once: pytest would fail else


@pytest.mark.filterwarnings("error")
def test_half_a_record_at_the_end_is_passed_over(tmp_path: Path) -> None:
    rows = some_rows(6)
    look_up(rows, tmp_path)
    (log,) = tmp_path.glob("rows-*.log")
    log.write_bytes(log.read_bytes()[:-7])
    values, report = look_up(rows, tmp_path)
    assert report.computed == 1 and torch.equal(values, sums(rows))


def test_log_probs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        look_up(some_rows(2), tmp_path, lambda batch: torch.tensor([0.0, torch.nan]))
    assert ReferenceStore(tmp_path).read() == {}


@pytest.mark.parametrize("count", [3, 9, 16])
def test_processes_share_the_work(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, here threads: equally many forwards each, everything computed once."""
    meeting, this = threading.Barrier(2, timeout=20), threading.local()
    shared: dict[int, Any] = {}

    def exchange(value: Any) -> list[Any]:
        shared[this.rank] = value
        meeting.wait()
        both = [shared[0], shared[1]]
        meeting.wait()
        return both

    monkeypatch.setattr(reference_cache, "broadcast_object_list", lambda v: exchange(v)[0])
    monkeypatch.setattr(
        reference_cache, "gather_object", lambda v: [*itertools.chain(*exchange(v))]
    )
    rows, results, calls = some_rows(count), {}, {0: 0, 1: 0}

    def work(rank: int) -> None:
        this.rank = rank
        process = SimpleNamespace(is_main_process=rank == 0, num_processes=2, process_index=rank)

        def score(batch: list[ScoredRow]) -> torch.Tensor:
            calls[rank] += 1
            return sums(batch)

        results[rank] = cached_logps(rows, tmp_path, score, batch_rows=4, accelerator=process)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls[0] == calls[1] == -(-count // 8)
    for values, report in results.values():
        assert torch.equal(values, sums(rows)) and report.computed == count
    sizes = [path.stat().st_size // 40 for path in tmp_path.glob("rows-*.log")]
    assert sum(sizes) == count == len(ReferenceStore(tmp_path).read())


def test_a_row_is_its_tokens_and_weights() -> None:
    row = ScoredRow(np.array([1, 2, 3]), np.array([0, 1, 1], np.float32))
    padded = unpadded_row(
        torch.tensor([0, 1, 2, 3, 0]),
        torch.tensor([0, 1, 1, 1, 0]),
        torch.tensor([0, 0, 1, 1, 0]),
    )
    assert padded.digest() == row.digest()
    others = [
        ScoredRow(np.array([1, 2, 4]), row.weights),
        ScoredRow(row.ids, np.array([0, 1, 0.5], np.float32)),
        ScoredRow(np.array([1, 2, 3, 0]), np.array([0, 1, 1, 0], np.float32)),
    ]
    assert len({row.digest(), *(other.digest() for other in others)}) == 4


def test_the_folder_is_named_after_all_it_depends_on() -> None:
    names = {
        cache_folder("a", "no"),
        cache_folder("b", "no"),
        cache_folder("a", "bf16"),
        cache_folder("a", "no", temperature=0.7),
    }
    assert len(names) == 4 and cache_folder("a", "no", 1.0) in names


def test_the_digest_sees_weights_and_configuration() -> None:
    model = causal_model()
    digest = reference_digest(model)
    renamed = causal_model()
    renamed.config._name_or_path, renamed.config.use_cache = "elsewhere", False
    assert reference_digest(renamed) == digest
    changed = causal_model()
    with torch.no_grad():
        changed.model.norm.weight[-1] += 1e-7
    others = [changed, causal_model(rms_norm_eps=1e-3), causal_model().to(torch.bfloat16)]
    assert len({digest, *(reference_digest(other) for other in others)}) == 4


def test_the_digest_of_an_adapted_model_is_of_its_reference() -> None:
    digest = reference_digest(causal_model())
    adapted = get_peft_model(causal_model(), LORA)
    assert reference_digest(adapted) == digest
    adapted.add_adapter("ref", LORA)  # what TRL makes of an adapter it is given
    with_copy = reference_digest(adapted)
    assert with_copy != digest
    for name, parameter in adapted.named_parameters():
        if ".ref." in name:
            torch.nn.init.normal_(parameter)
    assert reference_digest(adapted) not in (digest, with_copy)
