"""Masks by incremental rendering mark what the assistant writes, or refuse to guess."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, chat_template_utils
from trl import SFTTrainer as StockTrainer
from trl.trainer import sft_trainer as trl_sft

from fastpost.demo.smollm2 import smollm2_path
from fastpost.guards.assistant_mask import render_with_mask
from fastpost.guards.assistant_rows import end_of_turn, mask_assistant_turns
from fastpost.guards.unmarked_template import is_unmarked, unmarked_templates_allowed
from fastpost.scoring import FastpostWarning
from tests.trainers.conftest import *  # noqa: F403  fixtures: tokenizer, model, data

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Bonjour, ça va ?"},
    {"role": "assistant", "content": "Très bien 🙂, 谢谢"},
    {"role": "user", "content": " and now?\n"},
    {"role": "assistant", "content": "still  fine\n\nreally"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Moves the system text into the last user turn, as Mistral's later templates do.
SYSTEM_MOVES = (
    "{% set users = messages | selectattr('role', 'eq', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if m == users[-1] and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Keeps the thinking of the last turn only, as reasoning templates do.
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<r>{{ m.content }}</r>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str, eos: str, *others: str, bos: str | None = None):
    """One token per byte, each of the given texts a special token; padding is EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [text for text in (bos, eos, *others) if text]
    backend = Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate([*special, *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, "<|im_end|>", "<|im_start|>")


def scored_texts(tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    runs, previous = [], 0
    for token, bit in zip(ids, mask, strict=True):
        if bit and not previous:
            runs.append([])
        if bit:
            runs[-1].append(token)
        previous = bit
    return [tokenizer.decode(run) for run in runs]


def render(tokenizer, messages, tools=None, **kwargs) -> list[str]:
    """The scored texts; checks the ids against inference on the way."""
    ids, mask = render_with_mask(tokenizer, messages, tools, **kwargs)
    kwargs.pop("scored_from", None)
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False, **kwargs
    )
    assert ids == expected and len(mask) == len(ids) and set(mask) <= {0, 1}
    return scored_texts(tokenizer, ids, mask)


@pytest.mark.parametrize(
    ("tokenizer", "lead", "end"),
    [
        pytest.param(chatml(), "", "<|im_end|>", id="chatml"),
        pytest.param(
            byte_tokenizer(
                LLAMA, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", bos="<|begin|>"
            ),
            "",
            "<|eot_id|>",
            id="llama3",
        ),
        pytest.param(byte_tokenizer(MISTRAL, "</s>", bos="<s>"), " ", "</s>", id="mistral"),
        pytest.param(
            byte_tokenizer(GEMMA, "<eos>", "<start_of_turn>", "<end_of_turn>", bos="<bos>"),
            "",
            "<end_of_turn>",
            id="gemma",
        ),
    ],
)
def test_every_assistant_turn_and_its_end_token(tokenizer, lead, end) -> None:
    expected = [f"{lead}{m['content']}{end}" for m in CHAT if m["role"] == "assistant"]
    assert render(tokenizer, CHAT) == expected
    assert render(tokenizer, [SYSTEM, *CHAT]) == expected
    ids, _ = render_with_mask(tokenizer, [SYSTEM, *CHAT])
    if tokenizer.bos_token:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end


def test_equals_the_mask_of_generation_markers(tokenizer) -> None:
    marked = tokenizer.apply_chat_template(
        [SYSTEM, *CHAT], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(marked["assistant_masks"]) > 20
    ids, mask = render_with_mask(tokenizer, [SYSTEM, *CHAT])
    assert (ids, mask) == (marked["input_ids"], marked["assistant_masks"])


@pytest.mark.parametrize("name", ["llama3", "gemma", "cohere", "phi3", "phi3_5"])
def test_equals_the_marked_version_of_known_templates(name) -> None:
    plain = getattr(chat_template_utils, f"{name}_chat_template")
    marked = getattr(chat_template_utils, f"{name}_training_chat_template")
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<end_of_turn>"]
    special += ["<start_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|END_OF_TURN_TOKEN|>"]
    tokenizer = byte_tokenizer(plain, "<|endoftext|>", *special, bos="<bos>")
    ids, mask = render_with_mask(tokenizer, CHAT)
    theirs = tokenizer.apply_chat_template(
        CHAT,
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ids == theirs["input_ids"]
    # The marked versions score the newline that the template writes after the end token, too.
    assert [text.rstrip() for text in scored_texts(tokenizer, ids, theirs["assistant_masks"])] == (
        scored_texts(tokenizer, ids, mask)
    )


def test_smollm2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    expected = [f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant"]
    assert render(tokenizer, CHAT) == expected
    assert render(tokenizer, [SYSTEM, *CHAT]) == expected
    assert is_unmarked(tokenizer) and end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_the_prompt_of_every_turn_is_tokenised_as_at_inference() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    ids, mask = render_with_mask(tokenizer, CHAT)
    starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
    for turn, start in zip((1, 3), starts, strict=True):
        prompt = tokenizer.apply_chat_template(
            CHAT[:turn], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert prompt == ids[:start]


def test_an_empty_turn_still_learns_to_end() -> None:
    chat = [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:]]
    assert render(chatml(), chat)[0] == "<|im_end|>"


def test_tool_calls_are_scored_and_tool_results_are_not() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    texts = render(chatml(TOOLS), chat, tools)
    assert texts[0].count("<tool_call>") == 2 and texts[0].endswith("</tool_call><|im_end|>")
    assert texts[1:] == ["three<|im_end|>"]


def test_turns_of_the_prompt_are_context() -> None:
    assert render(chatml(), CHAT, scored_from=2) == [f"{CHAT[3]['content']}<|im_end|>"]


def test_template_arguments_reach_every_render() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ think }}{% endif %}")
    template = template.replace(
        "{{ m.content }}", "{{ think if m.role == 'assistant' }}{{ m.content }}"
    )
    texts = render(chatml(template), CHAT, think="<think></think>")
    assert texts == [f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant"]


def test_a_template_that_drops_thinking_is_refused_except_for_the_last_turn() -> None:
    chat = [
        dict(m, content=f"<think>hm</think>{m['content']}") if m["role"] == "assistant" else m
        for m in CHAT
    ]
    tokenizer = chatml(DROPS_THINKING)
    with pytest.raises(ValueError, match=r"renders message 1 differently(.|\n)*<think>"):
        render_with_mask(tokenizer, chat)
    assert render(tokenizer, chat, scored_from=2) == [f"{chat[3]['content']}<|im_end|>"]


def test_a_template_that_moves_the_system_text_is_refused() -> None:
    tokenizer = byte_tokenizer(SYSTEM_MOVES, "</s>")
    assert len(render(tokenizer, CHAT)) == 2
    with pytest.raises(ValueError, match="the prompt before message 2 differently"):
        render_with_mask(tokenizer, [SYSTEM, *CHAT])


def test_a_turn_without_a_prompt_and_a_turn_not_rendered_are_refused() -> None:
    with pytest.raises(ValueError, match="message 0 is an assistant turn"):
        render_with_mask(chatml(), CHAT[1:])
    with pytest.raises(ValueError, match="renders nothing of message 1"):
        render_with_mask(chatml("{{ messages[0].content }}"), CHAT)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        render_with_mask(Slow(), CHAT)


def test_a_token_across_the_edge_of_a_turn_is_named_and_not_scored() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    chat = [CHAT[0], {"role": "assistant", "content": "\n\nyes"}]
    with pytest.warns(FastpostWarning, match="lies across the edge"):
        ids, mask = render_with_mask(tokenizer, chat)
    assert scored_texts(tokenizer, ids, mask) == ["\nyes<|im_end|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render_with_mask(tokenizer, CHAT)


def test_rows_from_messages_and_from_prompt_and_completion() -> None:
    tokenizer = chatml()
    whole = mask_assistant_turns(Dataset.from_list([{"messages": CHAT}] * 2), tokenizer)
    assert whole.column_names == ["input_ids", "assistant_masks"]
    assert (whole[1]["input_ids"], whole[1]["assistant_masks"]) == render_with_mask(tokenizer, CHAT)
    split = [{"prompt": CHAT[:3], "completion": CHAT[3:]}]
    last = mask_assistant_turns(Dataset.from_list(split), tokenizer)[0]
    assert last["assistant_masks"] == render_with_mask(tokenizer, CHAT, scored_from=3)[1]
    both = mask_assistant_turns(Dataset.from_list(split), tokenizer, completion_only=False)[0]
    assert both["assistant_masks"] == whole[0]["assistant_masks"]
    shared = [{"from": m["role"], "value": m["content"]} for m in CHAT]
    shared = Dataset.from_list([{"conversations": shared}])
    assert mask_assistant_turns(shared, tokenizer)[0] == whole[0]
    assert mask_assistant_turns(whole, tokenizer) is whole
    stream = mask_assistant_turns(IterableDataset.from_generator(lambda: iter(split)), tokenizer)
    assert next(iter(stream)) == last


def test_rows_honour_their_tools_and_refuse_other_columns() -> None:
    tokenizer = chatml(TOOLS)
    tools = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    row = mask_assistant_turns(Dataset.from_list([{"messages": CHAT, "tools": tools}]), tokenizer)
    assert '"name": "add"' in tokenizer.decode(row[0]["input_ids"])
    with pytest.raises(ValueError, match=r"assistant_only_loss needs the columns messages"):
        mask_assistant_turns(Dataset.from_list([{"text": "no"}]), tokenizer)


class Trainer(StockTrainer):
    """The stock trainer with the three lines that make it take any template."""

    def __init__(self, *args, **kwargs):
        with unmarked_templates_allowed(trl_sft):
            super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, name):
        if args.assistant_only_loss and is_unmarked(processing_class):
            dataset = mask_assistant_turns(
                dataset, processing_class, completion_only=self.completion_only_loss
            )
        return super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, name
        )


def train(trainer_class, model, tokenizer, dataset, folder):
    args = SFTConfig(
        str(folder),
        assistant_only_loss=True,
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer)
    return trainer, trainer.train().training_loss


@pytest.mark.parametrize("data", ["messages_data", "prompt_completion_data"])
def test_training_equals_training_on_a_marked_template(
    data, request, model, tokenizer, tmp_path
) -> None:
    dataset = request.getfixturevalue(data)
    unmarked = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<|im_end|>"
    )
    unmarked.chat_template = re.sub(r"{% (end)?generation %}", "", tokenizer.chat_template)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not training-compatible"):
        train(StockTrainer, model, unmarked, dataset, tmp_path)
    marked, marked_loss = train(StockTrainer, model, tokenizer, dataset, tmp_path)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    ours, our_loss = train(Trainer, model, unmarked, dataset, tmp_path)
    assert ours.train_dataset["labels"] == marked.train_dataset["labels"]
    assert our_loss == marked_loss and our_loss > 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=0)
    assert trl_sft.get_training_chat_template is chat_template_utils.get_training_chat_template
