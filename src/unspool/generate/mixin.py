"""The public method: settings merged, inputs read, processors and criteria made, and the call run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence as Items
from typing import Any

import torch
from torch import Tensor, nn

from unspool.config import GenerationConfig, GenerationMode, Resolved, effective_lengths, resolve
from unspool.config.fields import FIELDS
from unspool.config.lengths import end_tokens
from unspool.config.mode import mode_of
from unspool.config.notice import warn_once
from unspool.config.resolve import as_generation_config
from unspool.decode.choose.beam_rules import beam_filler
from unspool.decode.draft.vocabularies import read_tokenizers, tongue
from unspool.errors import Unsupported
from unspool.generate.call import Assistant, Call
from unspool.generate.custom import call_custom, load_custom_generate, own_arguments
from unspool.generate.foreign import ForeignSource
from unspool.generate.given import Given, PrefixFn, mention_idle_drafting, refuse_twice
from unspool.generate.guidance import read_negative
from unspool.generate.inputs import Prompts
from unspool.generate.native import NativeSource
from unspool.generate.outputs import GenerateOutput
from unspool.generate.reading import Arguments, Reading, Source
from unspool.generate.report import Report, report_on
from unspool.generate.scores import compute_transition_scores
from unspool.generate.static import run
from unspool.generate.stream import Stream, told_of_failure
from unspool.generate.synced import check_synced
from unspool.logits import (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    build_processors,
    is_guided,
)
from unspool.logits.base import ProcessorLike
from unspool.logits.guidance import GuidanceLogitsProcessor
from unspool.models.base import Model
from unspool.stopping import build_criteria, build_limits


class GenerationMixin:
    """Gives a native model its `generate()`; see `unspool.load`.

    Attributes:
        generation_config: the model's own defaults, from its `generation_config.json`.
    """

    generation_config: GenerationConfig

    def generate(
        self,
        inputs: Tensor | list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Items[Any] | None = None,
        stopping_criteria: Items[Any] | None = None,
        prefix_allowed_tokens_fn: PrefixFn | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: str | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts: greedily, or by sampling with `do_sample=True`; with beams, either, where `num_beams > 1`.

        Contrastive search with `penalty_alpha` and `top_k`; contrast between layers with `dola_layers`.

        Args:
            inputs: prompts, `[rows, columns]` token ids; also as `input_ids=`. Lists of ids of any lengths are taken
                too. Without any, the model's beginning-of-text token starts one row.
            generation_config: settings for this call; what it leaves open comes from the model's own.
            logits_processor: processors of your own, run with the configured ones.
            stopping_criteria: criteria of your own, asked with the configured ones.
            prefix_allowed_tokens_fn: `(row, tokens so far) -> allowed token ids` for every step.
            synced_gpus: several processes each decode prompts of their own with a model whose weights are spread over
                them (FSDP, ZeRO-3); one whose rows have ended goes on taking part until all have. Needs an initialised
                `torch.distributed`; not with drafts. `None`: where the weights are seen to be spread so.
            streamer: gets the prompt, then every step's tokens, then `end()`; when the call fails, `fail(error)`. With
                beams it has a row for each prompt, and gets tokens once everything that may become its best output
                begins with them.
            assistant_model: a smaller model with the same tokenizer that drafts tokens, which this one then
                checks several at a time: the same text, sooner. How much is drafted: `num_assistant_tokens`,
                `num_assistant_tokens_schedule` and `assistant_confidence_threshold`, of this call or else of its own
                generation config. One with another tokenizer takes `tokenizer` and `assistant_tokenizer` too.
            negative_prompt_ids: `[rows, columns]` (or one row for all) what `guidance_scale` steers away from, with
                `negative_prompt_attention_mask`; by default the last token of each prompt.
            custom_generate: decodes in place of this method: a function called as `function(model, input_ids,
                logits_processor=, stopping_criteria=, generation_config=, **model_inputs)`, with those of the call's
                keyword arguments that it alone knows; or a folder with a `custom_generate/generate.py`; or a Hub
                repository with one, which runs with `trust_remote_code=True` only.
            kwargs: any field of `GenerationConfig` (highest priority), and `input_ids`, `attention_mask`
                `[rows, columns]` (1 for tokens, 0 for padding on either side), `past_key_values` (of an earlier call),
                `adapter_names` (a loaded adapter's name for each prompt, `None` or `"__base__"` for none),
                `tokenizer` (for `stop_strings`, `json_schema`, `regex`, `grammar` and an assistant with another
                tokenizer, which is then `assistant_tokenizer`).

        Returns:
            `[rows * num_return_sequences, columns]` int64 ids, prompts included, or a `GenerateDecoderOnlyOutput`
            (`GenerateBeamDecoderOnlyOutput` with beams) with `return_dict_in_generate=True`.

        Raises:
            ValueError, TypeError: an argument that cannot be right, before any work is done.
            Unsupported: a mode this version does not have.
            OutOfMemory: the keys and values do not fit.
            NonFiniteLogits: the model gave NaN for a row.

        Source: `GenerationMixin.generate` of transformers v5.2.
        """
        trust = kwargs.pop("trust_remote_code", None)
        with told_of_failure(streamer):
            if isinstance(custom_generate, (str, os.PathLike)):
                function = load_custom_generate(custom_generate, trust, **kwargs)
                return function(  # type: ignore[no-any-return]
                    model=self,
                    inputs=inputs,
                    generation_config=generation_config,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                    synced_gpus=synced_gpus,
                    assistant_model=assistant_model,
                    streamer=streamer,
                    negative_prompt_ids=negative_prompt_ids,
                    negative_prompt_attention_mask=negative_prompt_attention_mask,
                    **kwargs,
                )
            if custom_generate is not None and not callable(custom_generate):
                raise TypeError(
                    f"custom_generate must be a function, a folder or a Hub repository, not {custom_generate!r}"
                )
            own = {} if custom_generate is None else own_arguments(custom_generate, kwargs, {*FIELDS, *_INPUTS})
            for name in own:
                del kwargs[name]
            resolved = resolve(kwargs, generation_config, getattr(self, "generation_config", None))
            assisted = mode_of(resolved.config, assistant_model is not None) is GenerationMode.ASSISTED_GENERATION
            arguments = Arguments(inputs, resolved.unused, assisted)
            given = Given(
                logits_processor,
                stopping_criteria,
                prefix_allowed_tokens_fn,
                assistant_model,
                streamer,
                negative_prompt_ids,
                negative_prompt_attention_mask,
            )
            source = self._source()
            module = self if isinstance(self, nn.Module) else getattr(self, "_module", source.module)
            synced = check_synced(synced_gpus, module)
            if synced:
                _refuse_synced(resolved.config, assisted, source)
            call = self._prepare(source, arguments, resolved, given)
            call.synced = synced
            if custom_generate is None:
                result = run(call)
            else:
                result = self._custom(custom_generate, call, given, arguments, own)
        if streamer is not None:
            streamer.end()
        return result

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Items[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Score of each generated token; see `unspool.generate.scores.compute_transition_scores`."""
        return compute_transition_scores(sequences, scores, beam_indices, normalize_logits)

    def unspool_report(self) -> Report:
        """How the model is run, and why not in a faster way; a module that was not looked at yet is probed."""
        return report_on(self)  # type: ignore[arg-type]

    def _prepare(self, source: Source, arguments: Arguments, resolved: Resolved, given: Given) -> Call:
        """Settle everything that can be wrong before any work is done."""
        config = resolved.config
        refuse_twice(given, resolved)
        if given.assistant is not None:
            _refuse_drafts(mode_of(config, assisted=False))
        mention_idle_drafting(given, resolved)
        eos = end_tokens(config)
        pad = config.pad_token_id
        beams = int(config.num_beams or 1)
        copies = beams if beams > 1 else int(config.num_return_sequences or 1)
        reading = source.read(arguments, config, copies)
        prompts = reading.prompts
        columns = prompts.rectangle.shape[1]
        lengths = effective_lengths(
            resolved, columns, max_positions=source.max_positions, beyond=source.beyond, embeds_length=reading.embeds
        )
        config.max_length, config.min_length = lengths.max_length, lengths.min_length
        guidance, negative = _guidance(config, source, reading, copies, given, arguments.assisted)
        processors = build_processors(
            config,
            prompt_length=columns,
            eos_token_id=torch.tensor(eos, device=source.device) if eos else None,
            device=source.device,
            custom=given.logits_processor,
            prefix_allowed_tokens_fn=given.prefix_allowed_tokens_fn,
            encoder_input_ids=reading.encoder_ids,
            padding_lengths=reading.padding,
            tokenizer=arguments.tokenizer,
            vocab_size=source.vocab_size,
            guidance=guidance,
        )
        filler = beam_filler(config, eos) if beams > 1 else pad if pad is not None else eos[0] if eos else 0
        call = Call(
            backend=reading.backend,
            config=config,
            prompts=prompts,
            copies=copies,
            processors=processors,
            limits=build_limits(
                config,
                eos=eos,
                max_positions=source.max_positions,
                custom=given.stopping_criteria,
                tokenizer=arguments.tokenizer,
            ),
            filler=filler,
            stream=None if given.streamer is None else Stream(given.streamer, reading.seen if beams > 1 else prompts),
            past=reading.past,
            foreign=bool(given.logits_processor or given.stopping_criteria or given.prefix_allowed_tokens_fn),
            assistant=_read_assistant(given.assistant, source.vocab_size, arguments, prompts),
            negative=negative,
        )
        _check_filler(call)
        return call

    def _custom(
        self, function: Callable[..., Any], call: Call, given: Given, arguments: Arguments, own: dict[str, Any]
    ) -> Any:
        """Hand a prepared call to the caller's own function."""
        criteria = build_criteria(call.config, custom=given.stopping_criteria, tokenizer=arguments.tokenizer)
        always = {
            "logits_processor": call.processors,
            "stopping_criteria": criteria,
            "generation_config": call.config,
        }
        with torch.no_grad():
            inputs = call.backend.kwargs(call.rows(), call.steps)
            named = {
                "streamer": given.streamer,
                "assistant_model": given.assistant,
                "tokenizer": arguments.tokenizer,
                "assistant_tokenizer": arguments.assistant_tokenizer,
            }
            return call_custom(function, self, call.prompts.rectangle, {**always, **inputs, **own}, named)

    def _source(self) -> Source:
        """The model, as the call reads it."""
        if isinstance(self, Model):
            return NativeSource(self)
        if isinstance(self, nn.Module):
            return ForeignSource(self)
        raise TypeError(f"GenerationMixin goes in front of a torch.nn.Module, which {type(self).__name__} is not")


def _guidance(
    config: GenerationConfig, source: Source, reading: Reading, copies: int, given: Given, assisted: bool
) -> tuple[ProcessorLike | None, tuple[Tensor, Tensor] | None]:
    """What guides the scores, and the negative prompts that rows are added for, when guidance is asked for.

    Rows are added where the backend has a place for them, unless that would not be transformers' text: there padding of
    a negative prompt counts as positions, and beams share one past of it.
    """
    if not is_guided(config):
        if given.negative_ids is not None or given.negative_mask is not None:
            warn_once("negative_prompt_ids and negative_prompt_attention_mask have no effect without guidance_scale")
        return None, None
    scale = float(config.guidance_scale or 1.0)
    ids, mask = read_negative(given.negative_ids, given.negative_mask, reading.prompts, copies, source.vocab_size)
    plain = assisted or (int(config.num_beams or 1) == 1 and bool(mask.all()))
    if source.unconditional is None or (plain and reading.backend.abilities.shares_prompts):
        return GuidanceLogitsProcessor(scale), (ids, mask)
    own = given.negative_ids is None
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale, source.unconditional, None if own else ids, None if own else mask, config.use_cache
    )
    return processor, None


def _check_filler(call: Call) -> None:
    """Raise `ValueError` where rows that ended would have to be fed a token that the model does not have."""
    ends = call.limits.eos or call.limits.criteria
    fed = call.every_row and call.backend.abilities.shares_prompts and len(call.prompts.tokens) > 1 and ends
    if fed and not 0 <= call.filler < call.backend.vocab and int(call.config.num_beams or 1) == 1:
        raise ValueError(
            f"pad_token_id={call.filler} is none of the model's {call.backend.vocab} tokens, and rows that ended go on "
            "with it while others are recorded or processed; set it to one of them"
        )


_INPUTS = {
    "adapter_names",
    "assistant_tokenizer",
    "attention_mask",
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "tokenizer",
}


def _refuse_synced(config: GenerationConfig, assisted: bool, source: Source) -> None:
    """Raise `Unsupported` where a step may run the model more than once, which other processes could not follow."""
    extra = is_guided(config) and source.module is not None
    if extra or config.token_healing or assisted:
        raise Unsupported(
            "synced_gpus keeps processes in step by one run of the model in each; leave out drafts, token_healing, and "
            "guidance_scale on modules that are not ours"
        )


def _refuse_drafts(mode: GenerationMode) -> None:
    """Raise for a draft model beside a mode that decides with more than logits."""
    for wrong, name in (
        (GenerationMode.CONTRASTIVE_SEARCH, "penalty_alpha (contrastive search)"),
        (GenerationMode.DOLA_GENERATION, "dola_layers"),
    ):
        if mode is wrong:
            raise ValueError(f"assistant_model does not go with {name}; leave one of them out")


def _read_assistant(model: Any, vocab: int | None, arguments: Arguments, prompts: Prompts) -> Assistant | None:
    """The draft model of a call, checked, with the call's rows as its prompts; `None` where there is none."""
    if model is None:
        if arguments.assistant_tokenizer is not None:
            raise ValueError("assistant_tokenizer belongs to an assistant_model, which is missing; pass both")
        return None
    if not isinstance(model, nn.Module | GenerationMixin):
        raise TypeError(
            f"assistant_model must be a model, not {type(model).__name__}; see unspool.load and unspool.wrap"
        )
    source = model._source() if isinstance(model, GenerationMixin) else ForeignSource(model)
    tokenizers = read_tokenizers(arguments.tokenizer, arguments.assistant_tokenizer, vocab, source.vocab_size)
    own = as_generation_config("the assistant's generation_config", getattr(model, "generation_config", None))
    inputs: dict[str, Any] = {"input_ids": prompts.rectangle, "attention_mask": prompts.mask.long()}
    if tokenizers is not None:
        ours, theirs = map(tongue, tokenizers)
        inputs = {"input_ids": [theirs.encode(ours.decode(tokens), True) for tokens in prompts.tokens]}
    backend = source.draft(Arguments(None, inputs), resolve({}, own).config)
    adapter = model.adapters.current() if isinstance(model, Model) else None
    return Assistant(backend, own or GenerationConfig(), tokenizers, adapter)
