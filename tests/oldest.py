"""What `make test-oldest` does not compare: where transformers 5.2.0 itself is wrong, or does otherwise than since."""

from __future__ import annotations

import re
from importlib import metadata

_OTHERWISE = {
    r"\[mamba-beams\]|\[mamba-2\]": "its caches of recurrent models have no beams",
    r"test_recurrent_layers": "its models of states take caches of classes of their own alone",
    r"test_continuous_rows\.py.*\[mamba\]": "its Mamba's cache has no beams, and is not put beside another one",
    r"test_drafts_where_transformers_calls\[mamba": "its caches of recurrent models say otherwise what they cannot do",
    r"test_long_speech\[how2\]": "its long form fails where the text before fills the window",
    r"test_sampled_drafts_are_transformers_own\[lookup\]": "its prompt lookup fails without an end token",
    r"llama-rope-dynamic": "its dynamic rotary angles keep those of the longest text ever seen",
    r"(test_generate|_beams|_inputs)\.py.*phi3-longrope": "its long rotary angles fail to come back to the short ones",
    r"test_config_variants\[gpt2": "its SDPA attention leaves out GPT-2's other scales",
    r"test_a_cache_that_cannot_be_handed_back": "its DeepSeek's cache holds what attention sees, and is handed back",
    r"test_everything_recorded|test_generate_beams\.py::test_settings": "its repetition penalty counts padding as text",
}


def reason(test: str) -> str | None:
    """Why a test is left out with the installed transformers, by its id; `None` where it is not."""
    if not metadata.version("transformers").startswith("5.2."):
        return None
    found = (why for pattern, why in _OTHERWISE.items() if re.search(pattern, test))
    return next((f"transformers 5.2: {why}" for why in found), None)
