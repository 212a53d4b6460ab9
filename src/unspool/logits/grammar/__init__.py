"""Structured output: text that follows a JSON schema, a regular expression or a grammar, through llguidance.

`vocabulary` holds a tokenizer's tokens as llguidance wants them and the grammars compiled for them; `matching` follows
rows through a grammar and says which tokens may come next; `processor` puts that on scores. What is asked for stands in
`config`. llguidance is an optional package, imported here alone.
"""

from unspool.logits.grammar.processor import GrammarLogitsProcessor
from unspool.logits.grammar.vocabulary import Grammar, compile_structure

__all__ = ["Grammar", "GrammarLogitsProcessor", "compile_structure"]
