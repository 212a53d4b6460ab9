"""The tokenizer: text to ids, ids to text, conversations to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from unspool.tokenization import chat
from unspool.tokenization.encode import Encoder, Truncation, truncation_of
from unspool.tokenization.encoding import BatchEncoding, PadSide, TensorKind, pad_rows, to_lists
from unspool.tokenization.files import find_folder, read_files, write_files
from unspool.tokenization.special import NAMES, declared_tokens
from unspool.tokenization.vocabulary import Vocabulary, check_id
from unspool.types import FileName

__all__ = ["Tokenizer"]

_NO_LIMIT = int(1e30)
"""`model_max_length` where the files name none, as transformers writes it. Anything above 1e20 is no limit."""

_CLEAN_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

# Entries of a configuration that say where it came from, or that other files say.
_NOT_SAVED = frozenset({"added_tokens_decoder", "additional_special_tokens", "add_bos_token", "add_eos_token"})
_NOT_SAVED |= {"chat_template", "is_local", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file"}

_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer(Vocabulary):
    """A checkpoint's tokenizer, with the interface of transformers' `PreTrainedTokenizerFast`.

    Make one with `Tokenizer.from_pretrained` (which `AutoTokenizer.from_pretrained` is), or from a
    `tokenizers.Tokenizer`. Encoding and decoding may be used from several threads at once.

    Args:
        backend: What does the work. It is taken over: its own padding and truncation settings are removed.
        chat_template: Jinja text, or several by name.
        name_or_path: Where it comes from, for display.
        config: What tokenizer_config.json may say: `bos_token`, `eos_token`, `pad_token` and the like,
            `extra_special_tokens`, `added_tokens_decoder`, `model_max_length` (tokens; no limit by default),
            `padding_side` ("left" by default, since decoders go on from the right end), `truncation_side` ("right"),
            `clean_up_tokenization_spaces` (`False`), `add_bos_token` and `add_eos_token` (default: as the backend
            does). Special tokens that the vocabulary lacks are added to it. Entries not named here are kept and saved.

    Raises:
        ValueError: An entry of `config` has a value it cannot have.
    """

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        /,
        *,
        chat_template: str | dict[str, str] | None = None,
        name_or_path: str = "",
        **config: Any,
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.name_or_path = name_or_path
        padding = self.backend_tokenizer.padding or {}
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        if padding and "pad_token" not in config:
            config["pad_token"] = padding["pad_token"]

        self._config = config
        limit = config.get("model_max_length")
        self.model_max_length: int = _NO_LIMIT if limit is None else int(limit)
        self.padding_side: PadSide = config.get("padding_side", padding.get("direction", "left"))
        self.truncation_side: PadSide = config.get("truncation_side", "right")
        for name in ("padding_side", "truncation_side"):
            _check_side(name, getattr(self, name))
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces") or False)

        self.special, missing = declared_tokens(config, self.backend_tokenizer)
        self.backend_tokenizer.add_tokens(missing)
        self._encoder = Encoder(self.backend_tokenizer)
        if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
            self._encoder.surround(self._around("bos_token"), self._around("eos_token"))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: FileName,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: FileName | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        use_fast: bool = True,
        **overrides: Any,
    ) -> Tokenizer:
        """Read a tokenizer from a folder, or from a Hub repository (only its tokenizer files are downloaded).

        Read are tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
        additional_chat_templates/. Where tokenizer.json and tokenizer_config.json differ about bos and eos tokens
        around a text, tokenizer.json counts, as in transformers.

        Args:
            path_or_id: A folder, or a repository such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
            revision: Branch, tag or commit of the repository.
            token: Access token of the Hub; `True` for the stored one.
            cache_dir: Where downloads are kept.
            local_files_only: Download nothing.
            subfolder: Folder inside.
            use_fast: Accepted for transformers' sake; there is no other kind.
            overrides: Entries of the configuration to replace, such as `padding_side="right"` or `pad_token="<pad>"`
                (see the class). `add_bos_token=` and `add_eos_token=` replace what tokenizer.json does.

        Raises:
            CheckpointError: There is no such folder or repository, tokenizer.json is missing, or a file is damaged.
        """
        folder = find_folder(
            path_or_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        files = read_files(folder)
        ignored = ("chat_template", "add_bos_token", "add_eos_token", "name_or_path")
        config = {name: value for name, value in files.config.items() if name not in ignored}
        return cls(
            files.backend, **{"chat_template": files.template, "name_or_path": str(path_or_id), **config, **overrides}
        )

    def save_pretrained(self, folder: FileName) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat templates, for transformers as much as for us.

        Each file appears whole or not at all.

        Args:
            folder: Made if it is not there.

        Returns:
            The paths written.
        """
        dropped = {*_NOT_SAVED, *NAMES}
        config = {name: value for name, value in self._config.items() if name not in dropped}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config |= self.special.by_name()
        if self.special.extra:
            config["extra_special_tokens"] = self.special.extra
        else:
            config.pop("extra_special_tokens", None)
        for name in ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
            config[name] = getattr(self, name)
        return write_files(folder, self.backend_tokenizer, config, self.chat_template)

    def __repr__(self) -> str:
        limit = "" if self.model_max_length > 10**20 else f", model_max_length={self.model_max_length}"
        return (
            f"Tokenizer({self.name_or_path!r}, {len(self)} tokens, padding_side={self.padding_side!r}{limit}, "
            f"special_tokens={self.special_tokens_map})"
        )

    def _around(self, name: str) -> str | None:
        """The token that `add_bos_token` or `add_eos_token` puts around a text."""
        if not self._config.get(f"add_{name}"):
            return None
        if name not in self.special.named:
            raise ValueError(f"add_{name}=True, but this tokenizer has no {name}; set {name} as well")
        return self.special.named[name]

    # Text to ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: PadSide | None = None,
        return_tensors: TensorKind | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> BatchEncoding:
        """Turn text into token ids.

        Args:
            text: One text or several.
            text_pair: A second text for each, behind the first.
            add_special_tokens: Put the tokens around it that the checkpoint's files prescribe.
            padding: `True` or `"longest"` pads to the longest text, `"max_length"` to `max_length`.
            truncation: `True` or `"longest_first"` cuts to `max_length` tokens, special ones included; `"only_first"`
                and `"only_second"` cut one text of a pair. Default: `True` if `max_length` is given and there is no
                padding.
            max_length: In tokens; `model_max_length` when not given.
            padding_side: `"left"` or `"right"`; the tokenizer's `padding_side` when not given.
            return_tensors: `"pt"` or `"np"` for int64 tensors `[rows, len]`, a single text being one row.
            return_attention_mask: Add `attention_mask`, 1 at tokens of the text and 0 at padding.
            return_token_type_ids: Add `token_type_ids`, 1 in the second text. Decoder models do not take them.
            pad_to_multiple_of: Round the padded length up.

        Returns:
            `input_ids` and the masks.

        Raises:
            ValueError: There is no padding token, or rows of different lengths are asked for as a tensor.
            TypeError: A text is not a `str`.
        """
        strategy, limit = truncation_of(truncation, max_length, bool(padding), self.model_max_length)
        target = self._padding_length(padding, max_length)
        encodings, batched = self._encoder(
            text, text_pair, add_special_tokens, Truncation(strategy, limit, self.truncation_side)
        )
        columns = {"input_ids": [encoding.ids for encoding in encodings]}
        if return_token_type_ids:
            columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        if target is not None:
            columns = self._pad(columns, target, pad_to_multiple_of, padding_side)
        single = not batched and return_tensors is None
        entries = {name: rows[0] if single else rows for name, rows in columns.items()}
        return BatchEncoding(entries).convert_to_tensors(return_tensors)

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of one text: a list of ints, or a tensor with `return_tensors`. Options are those of a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The names of a text's tokens."""
        names: list[str] = self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens, **options))
        return names

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: PadSide | None = None,
        return_attention_mask: bool = True,
        return_tensors: TensorKind | None = None,
    ) -> BatchEncoding:
        """Pad what was encoded before: several encodings, or one of several texts. Arguments are those of a call."""
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        if "input_ids" not in encoded_inputs:
            raise ValueError(f"encoded_inputs has {sorted(encoded_inputs)} and no 'input_ids'")
        columns = {name: to_lists(value) for name, value in encoded_inputs.items()}
        single = bool(columns["input_ids"]) and isinstance(columns["input_ids"][0], int)
        if single:
            columns = {name: [row] for name, row in columns.items()}
        if return_attention_mask and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        target = self._padding_length(padding, max_length)
        if target is not None:
            columns = self._pad(columns, target, pad_to_multiple_of, padding_side)
        if single and return_tensors is None:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns).convert_to_tensors(return_tensors)

    def _padding_length(self, padding: bool | str, max_length: int | None) -> int | None:
        """The length to pad to, 0 for that of the longest row; `None` for no padding."""
        if padding in (False, None, "do_not_pad"):
            return None
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; it can be True ('longest'), 'max_length' or False")
        if self.pad_token_id is None:
            raise ValueError(
                "padding is asked for, but this tokenizer has no padding token; set one: "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        if padding != "max_length":
            return 0
        length = self.model_max_length if max_length is None else max_length
        if length > 10**20:
            raise ValueError("padding='max_length' needs max_length, as this tokenizer has no model_max_length")
        return length

    def _pad(
        self, columns: dict[str, list[list[int]]], target: int, multiple_of: int | None, side: PadSide | None
    ) -> dict[str, list[list[int]]]:
        side = self.padding_side if side is None else side
        _check_side("padding_side", side)
        assert self.pad_token_id is not None
        filler = {"input_ids": self.pad_token_id, "special_tokens_mask": 1, "labels": -100}
        return pad_rows(
            columns,
            {name: filler.get(name, 0) for name in columns},
            length=target or None,
            multiple_of=multiple_of,
            side=side,
        )

    # Ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Turn token ids into text.

        Args:
            token_ids: An int, a list, tensor or array of them; or several rows.
            skip_special_tokens: Leave special tokens out.
            clean_up_tokenization_spaces: Remove spaces before punctuation; the tokenizer's setting when not given.
                Without effect on BPE tokenizers, whose spaces are part of the text.

        Returns:
            A `str`, or a list of them for several rows. Ids outside the vocabulary have no text.

        Raises:
            ValueError: An id is negative.
            TypeError: These are no ids.
        """
        ids = to_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        wrong = [ids] if not isinstance(ids, list) else [one for one in ids if not isinstance(one, int | list)]
        if wrong:
            raise TypeError(
                f"decode takes token ids (integers) and not {wrong[0]!r}; texts are encoded by calling the tokenizer"
            )
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        if ids and min(ids) < 0:
            check_id(min(ids))
        text = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces and (
            not isinstance(self.backend_tokenizer.model, tokenizers.models.BPE) or self._config.get(_CLEAN_BPE)
        ):
            return self.clean_up_tokenization(text)
        return text

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """`decode`, with a list as the result in any case."""
        texts: str | list[str] = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def clean_up_tokenization(self, text: str) -> str:
        """`text` without spaces before punctuation and English contractions."""
        for old, new in _CLEAN_UP:
            text = text.replace(old, new)
        return text

    # Conversations

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template `apply_chat_template` would use.

        Args:
            chat_template: A template's name or text.
            tools: If there are any, a template named `tool_use` is preferred.
        """
        return chat.choose_template(self.chat_template, chat_template, tools is not None)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: TensorKind | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """Write a conversation as the model was trained to read it, and tokenize it.

        The template runs in a sandbox, with bounded time and size.

        Args:
            conversation: Messages such as `{"role": "user", "content": "Hello"}`, or several lists of them.
            tools: JSON schemas, or functions with type hints and a docstring.
            documents: Dictionaries for retrieval, usually with `title` and `text`.
            chat_template: The name of one of the tokenizer's templates, or a template.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: Leave the last message open, for the model to go on with; a string names the field.
            tokenize: Return tokens; `False` returns the text.
            padding: As in a call.
            truncation: As in a call.
            max_length: As in a call.
            return_tensors: As in a call.
            return_dict: Return a `BatchEncoding`; `False` returns its `input_ids`.
            tokenizer_kwargs: Further options of a call.
            template_variables: What else the template reads, such as `enable_thinking=False`.

        Raises:
            ValueError: There is no template, or it fails on the conversation.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt opens a new message and continue_final_message the last; pass one of them"
            )
        conversations, batched = chat.as_conversations(conversation)
        texts = chat.render(
            self.get_chat_template(chat_template, tools),
            conversations,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens_map, **template_variables},
        )
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(
            texts if batched else texts[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            add_special_tokens=False,
            **(tokenizer_kwargs or {}),
        )
        return encoding if return_dict else encoding["input_ids"]


def _check_side(name: str, side: object) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"{name} is {side!r}; it can be 'left' or 'right'")
