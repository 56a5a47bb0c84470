"""A transformers model on this machine as a chat model, and as the user who talks to one.

    conversation ─► chat template ─► batches of like length ─► generate ─► text up to the end token

The user's next turn (Magpie, arXiv:2406.08464, section 2) is what the model writes after the header
of a user message: the template renders the conversation with one more user message, and is cut
where that message's text would begin.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from fastpost.chat_model.interface import (
    Conversation,
    Reply,
    Sampling,
    content_digest,
    in_order,
    require_conversation,
)
from fastpost.rollout.transformers_rollout import TransformersRollout

__all__ = ["LocalChatModel", "user_header"]

_MARK = "fastpost user turn begins here"


class LocalChatModel:
    """A `ChatModel`, `UserTurnModel` and `ChoosingModel` of a transformers model.

    Control tokens in a message's text, such as `<|im_end|>`, are broken up by a zero-width space.

    What is sampled depends on the seeds and on the conversations that share a batch, and on nothing
    sampled before.

    Args:
        model: causal language model; it is neither moved nor changed, beyond evaluation mode while
            it samples.
        tokenizer: its tokenizer, with a chat template.
        name: what names the model in caches and provenance: weights that differ need names that do.
        sampling: how replies are sampled.
        batch_size: conversations at once.

    Raises:
        ValueError: the tokenizer has no chat template or no end token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        sampling: Sampling | None = None,
        batch_size: int = 16,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template; use an instruct model, or set chat_template"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        if not name:
            raise ValueError("name is empty; give one that tells this model's weights from others")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.sampling = sampling or Sampling()
        self.batch_size = batch_size
        self._end_ids = _end_ids(model, tokenizer)
        self._control = _control_tokens(tokenizer)
        pad = tokenizer.pad_token_id
        self._config = GenerationConfig(
            do_sample=self.sampling.temperature > 0,
            temperature=self.sampling.temperature or None,
            top_p=self.sampling.top_p if self.sampling.temperature > 0 else None,
            top_k=0 if self.sampling.temperature > 0 else None,
            max_new_tokens=self.sampling.max_tokens,
            pad_token_id=self._end_ids[0] if pad is None else pad,
            eos_token_id=self._end_ids,
            disable_compile=True,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Name and sampling."""
        return {"model": self.name, **self.sampling.as_dict()}

    def __call__(self, conversations: Sequence[Conversation], *, seed: int) -> list[str | None]:
        """One reply for each conversation; never None.

        Raises:
            ValueError: what is given is no conversation.
        """
        return in_order(self.stream(conversations, seed=seed), len(conversations))

    def stream(
        self, conversations: Sequence[Conversation], *, seed: int
    ) -> Iterator[tuple[int, Reply | None]]:
        """Replies, a batch at a time.

        Raises:
            ValueError: what is given is no conversation.
        """
        yield from self._continue(self._prompts(conversations), [seed] * len(conversations))

    def stream_user_turns(
        self, conversations: Sequence[Conversation], seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply | None]]:
        """The user's next message after each conversation (system message and turns so far).

        Raises:
            ValueError: what is given is no conversation, or the template hides the user's header.
        """
        for conversation in conversations:
            require_conversation(conversation)
        headers = [user_header(self.tokenizer, self._plain(c)) for c in conversations]
        yield from self._continue(self._ids(headers), seeds)

    def stream_choices(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> Iterator[tuple[int, Reply | None]]:
        """argmax_c Σ_t log p(c_t | conversation, c_<t) for each conversation, at temperature 1.

        Raises:
            ValueError: what is given is no conversation, or a choice begins another one, whose
                probability would then be part of its own.
        """
        for one in choices:
            if sum(other.startswith(one) for other in choices) != 1:
                raise ValueError(f"the choice {one!r} begins another one, or stands twice")
        tails = [self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
        for place, prompt in enumerate(self._prompts(conversations)):
            scores = self._logps(prompt, tails)
            yield place, Reply(choices[max(range(len(choices)), key=scores.__getitem__)])

    @torch.no_grad()
    def _logps(self, prompt: list[int], tails: list[list[int]]) -> list[float]:
        """Log-prob of each continuation of one prompt, which is read once."""
        device, width = self.model.device, max(map(len, tails))
        pad = int(self._config.pad_token_id)
        # Padding stands after what is scored: causal attention does not see it.
        ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails], device=device)
        was_training = self.model.training
        self.model.eval()
        try:
            read = self.model(
                input_ids=torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1
            )
            name = _cache_argument(self.model)
            cache = getattr(read, name)
            cache.batch_repeat_interleave(len(tails))
            rest = self.model(input_ids=ids, use_cache=True, **{name: cache})
        finally:
            self.model.train(was_training)
        # The token at t is predicted at t - 1; the first one where the prompt ends.
        logits = torch.cat([read.logits.expand(len(tails), -1, -1), rest.logits[:, :-1]], dim=1)
        logps = logits.float().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
        return [float(row[: len(tail)].sum()) for row, tail in zip(logps, tails, strict=True)]

    def _plain(self, conversation: Conversation) -> Conversation:
        """With the control tokens in the messages' texts broken up: no text can end its turn."""
        return [
            message | {"content": self._control.sub(_broken, message["content"])}
            for message in conversation
        ]

    def _prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Tokens of each conversation up to where the reply begins."""
        for conversation in conversations:
            require_conversation(conversation)
        return self._ids(
            self.tokenizer.apply_chat_template(
                self._plain(conversation), tokenize=False, add_generation_prompt=True
            )
            for conversation in conversations
        )

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def _continue(
        self, prompts: list[list[int]], seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply | None]]:
        # Prompts of like length share a batch: less padding.
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            replies = self._batch([prompts[i] for i in places], [seeds[i] for i in places])
            yield from zip(places, replies, strict=True)

    def _batch(self, prompts: list[list[int]], seeds: list[int]) -> list[Reply]:
        was_training = self.model.training
        self.model.eval()
        device = self.model.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(int(content_digest([seeds, prompts])[:15], 16))
                rollout = TransformersRollout(lambda: nullcontext(self.model), self._config)
                found = rollout.generate(prompts).completion_ids
        finally:
            self.model.train(was_training)
        replies = []
        for ids in found:
            is_whole = bool(ids) and ids[-1] in self._end_ids
            kept = ids[:-1] if is_whole else ids
            replies.append(Reply(self.tokenizer.decode(kept, skip_special_tokens=True), is_whole))
        return replies


def user_header(tokenizer: Any, conversation: Conversation) -> str:
    """The rendered conversation up to where the text of a further user message begins.

    Raises:
        ValueError: no conversation, or the template drops, repeats or changes a user's message.
    """
    require_conversation(conversation)
    rendered = tokenizer.apply_chat_template(
        [*conversation, {"role": "user", "content": _MARK}], tokenize=False
    )
    if rendered.count(_MARK) != 1:
        raise ValueError(
            f"the chat template renders a user message {rendered.count(_MARK)} times; the user's "
            "turn can be continued only where it stands once, as it is"
        )
    return rendered[: rendered.index(_MARK)]


def _cache_argument(model: Any) -> str:
    """What the model's forward calls the keys and values so far; transformers renames it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _special_tokens(tokenizer: Any) -> dict[int, Any]:
    """By id; the chat template's own among them, which `all_special_ids` may lack."""
    return {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Every special token's text; longer ones first, since one may begin another."""
    texts = {str(token) for token in _special_tokens(tokenizer).values()}
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or "$^")


def _broken(control: re.Match[str]) -> str:
    return f"{control[0][:1]}\u200b{control[0][1:]}"


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of the model's own configuration, the tokenizer's, and that of a user turn."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    after = tokenizer(rendered.partition(_MARK)[2], add_special_tokens=False)["input_ids"]
    if after and after[0] in _special_tokens(tokenizer):
        ids.append(after[0])
    if not ids:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    return list(dict.fromkeys(int(i) for i in ids))
